"""The reference ops against numpy float64. Tables of small integers make scores exact in float32: equal, not close."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tqsearch import kernels
from tqsearch.errors import BackendError, InvalidInputError
from tqsearch.kernels import BandTable, reference
from tqsearch.rotation import Hadamard

PLANS = [[(8, 4)], [(1, 1)], [(63, 2)], [(65, 3)], [(100, 8)], [(24, 3), (40, 2)], [(7, 5), (9, 0), (30, 1), (3, 6)]]
PLANS += [[(16, 7)], [(5, 0), (4, 4)], [(128, 1)]]
SIZES = [0, 1, 63, 65, 200]


class Rows:
    """Encoded rows of integer levels, with float64 copies of everything."""

    def __init__(self, oracle, pairs, count, seed=0, queries=5):
        rng = np.random.default_rng(seed)
        self.dim = sum(size for size, _ in pairs)
        self.bands, codes, levels, self.tables, start = [], [], [], [], 0
        for size, width in pairs:
            table = np.sort(rng.choice(np.arange(-128, 128), 2**width, replace=False)) if width else np.zeros(1)
            boundaries = (table[1:] + table[:-1]) / 2
            band = BandTable(size, width, as_float(boundaries), as_float(table), tuple(map(int, table)), 0.0, 1.0)
            self.bands.append(band)
            code = rng.integers(0, 2**width, (count, size))
            codes.append(code)
            levels.append(table[code].astype(np.float64))
            self.tables.append((slice(start, start + size), table, boundaries))
            start += size
        self.bands = tuple(self.bands)
        self.codes, self.levels = np.concatenate(codes, axis=1), np.concatenate(levels, axis=1)
        packed = b"".join(oracle.pack(row.tolist(), pairs) for row in self.codes)
        nbytes = len(oracle.pack([0] * self.dim, pairs))
        self.packed = torch.from_numpy(np.frombuffer(packed, np.uint8).reshape(count, nbytes).copy())
        self.scales = 2.0 ** rng.integers(-3, 3, count)
        self.queries = rng.integers(-8, 9, (queries, self.dim)).astype(np.float64)
        self.bias = rng.integers(-50, 50, count) / 2.0
        self.mask = rng.random(count) < 0.5
        self.products = self.queries @ self.levels.T * self.scales

    def scan(self, k, bias=False, mask=None):
        mask = None if mask is None else torch.from_numpy(np.asarray(mask))
        bias = as_float(self.bias) if bias else None
        arguments = (as_float(self.queries), self.packed, as_float(self.scales), bias, mask, self.bands, k)
        return [out.numpy() for out in kernels.scan(*arguments)]


def as_float(values):
    return torch.from_numpy(np.asarray(values, dtype=np.float32))


def check_top(scores, rows, all_scores, k):
    """Scores are the k largest, descending; each row has its score, once. Ties may come in any order."""
    allowed = np.isfinite(all_scores).sum(axis=1)
    width = min(k, all_scores.shape[1])
    assert scores.shape == rows.shape == (len(all_scores), width)
    assert scores.dtype == np.float32
    assert rows.dtype == np.int64
    np.testing.assert_array_equal(scores, -np.sort(-all_scores, axis=1)[:, :width])
    for q in range(len(all_scores)):
        found = min(width, allowed[q])
        assert (rows[q, found:] == -1).all()
        assert len(set(rows[q, :found])) == found
        np.testing.assert_array_equal(all_scores[q, rows[q, :found]], scores[q, :found])


@pytest.mark.parametrize("pairs", PLANS)
@pytest.mark.parametrize("count", SIZES)
def test_products_and_reconstruction_are_exact(oracle, pairs, count):
    data = Rows(oracle, pairs, count)
    estimate = kernels.reconstruct(data.packed, as_float(data.scales), data.bands)
    np.testing.assert_array_equal(estimate.numpy(), data.levels * data.scales[:, None])
    products = kernels.inner_products(as_float(data.queries), data.packed, as_float(data.scales), data.bands)
    np.testing.assert_array_equal(products.numpy(), data.products)
    assert products.dtype == torch.float32


@pytest.mark.parametrize("pairs", PLANS)
@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("k", [1, 10, 300])
def test_scan_is_exact(oracle, pairs, count, k):
    data = Rows(oracle, pairs, count)
    check_top(*data.scan(k), data.products, k)
    check_top(*data.scan(k, bias=True), data.products + data.bias, k)
    masked = np.where(data.mask, data.products + data.bias, -np.inf)
    check_top(*data.scan(k, bias=True, mask=data.mask), masked, k)


@pytest.mark.parametrize("allowed", [0, 1, 4])
@pytest.mark.parametrize("k", [5, 80])
def test_a_mask_that_allows_fewer_than_k(oracle, allowed, k):
    data = Rows(oracle, [(24, 3)], 65)
    mask = np.zeros(65, dtype=bool)
    mask[[64, 0, 31, 32][:allowed]] = True
    scores, rows = data.scan(k, mask=mask)
    check_top(scores, rows, np.where(mask, data.products, -np.inf), k)
    assert (rows[:, allowed:] == -1).all()
    assert (scores[:, allowed:] == -np.inf).all()


@pytest.mark.parametrize("block_rows", [1, 7, 64, 100])
@pytest.mark.parametrize("k", [1, 3, 150])
def test_block_boundaries_do_not_show(oracle, monkeypatch, block_rows, k):
    data = Rows(oracle, [(24, 3), (40, 2)], 333, seed=3)
    monkeypatch.setattr(reference, "SCAN_BLOCK", block_rows * data.dim)
    check_top(*data.scan(k, bias=True), data.products + data.bias, k)
    check_top(*data.scan(k, mask=data.mask), np.where(data.mask, data.products, -np.inf), k)
    products = kernels.inner_products(as_float(data.queries), data.packed, as_float(data.scales), data.bands)
    np.testing.assert_array_equal(products.numpy(), data.products)


@pytest.mark.parametrize("count", [127, 128, 129, 1000, 5000])
@pytest.mark.parametrize("k", [1, 2, 5, 31])
def test_groups_of_the_top_k(oracle, count, k):
    """Sizes around the whole groups, where the tail is searched apart; few levels, so that ties are many."""
    data = Rows(oracle, [(4, 1)], count, seed=count, queries=9)
    assert len(np.unique(data.products[0])) < count / 2
    check_top(*data.scan(k), data.products, k)


@given(
    pairs=st.sampled_from([[(3, 1)], [(3, 8)]]),
    count=st.integers(0, 1500),
    block=st.integers(1, 20),
    k=st.one_of(st.integers(1, 5), st.integers(6, 40)),
    queries=st.integers(1, 4),
    allowed=st.floats(0, 1),
    seed=st.integers(0, 2**32),
)
@example(pairs=[(3, 1)], count=200, block=2, k=3, queries=2, allowed=0.0, seed=0)
def test_scan_of_any_size_in_any_blocks(oracle, pairs, count, block, k, queries, allowed, seed):
    """At 1 bit ties within and between blocks are many, at 8 later blocks are often better; masks from none to all."""
    data = Rows(oracle, pairs, count, seed=seed, queries=queries)
    mask = np.random.default_rng(seed).random(count) < allowed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "SCAN_BLOCK", 32 * block * data.dim)
        check_top(*data.scan(k, mask=mask), np.where(mask, data.products, -np.inf), k)


@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("order", ["ascending", "descending", "shuffled", "last row"])
def test_a_later_block_that_is_a_little_better_is_looked_into(oracle, rng, monkeypatch, k, order):
    """Blocks of 32 groups, scores a step of 1/256 apart: pruning by the k-th best so far loses none of them."""
    data = Rows(oracle, [(1, 1)], 5000, queries=3)
    monkeypatch.setattr(reference, "SCAN_BLOCK", 1024)
    data.queries[:] = 0.0
    steps = {"ascending": np.arange(5000), "descending": np.arange(5000)[::-1], "shuffled": rng.permutation(5000)}
    data.bias = steps.get(order, (np.arange(5000) == 4999).astype(float)) / 256.0
    check_top(*data.scan(k, bias=True), np.tile(data.bias, (3, 1)), k)


@pytest.mark.parametrize(("left", "right", "k"), [(0, 0, 3), (0, 5, 3), (4, 0, 3), (4, 5, 3), (2, 2, 9)])
def test_merge_keeps_the_largest(rng, left, right, k):
    parts = [-np.sort(-rng.integers(0, 9, (6, size)).astype(np.float32), axis=1) for size in (left, right)]
    rows = [np.tile(np.arange(left), (6, 1)), np.tile(np.arange(left, left + right), (6, 1))]
    arguments = [torch.from_numpy(a) for a in (parts[0], rows[0], parts[1], rows[1])]
    scores, found = (t.numpy() for t in reference.merge_top_k(*arguments, k))
    check_top(scores, found, np.concatenate(parts, axis=1).astype(np.float64), k)


@pytest.mark.parametrize("count", [0, 10, 200])
def test_no_queries(oracle, monkeypatch, count):
    data = Rows(oracle, [(24, 3)], count, queries=0)
    monkeypatch.setattr(reference, "SCAN_BLOCK", 64 * data.dim)
    scores, rows = data.scan(4)
    assert scores.shape == rows.shape == (0, min(4, count))
    products = kernels.inner_products(as_float(data.queries), data.packed, as_float(data.scales), data.bands)
    assert products.shape == (0, count)


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scales_of_other_dtypes(oracle, scale_dtype):
    data = Rows(oracle, [(24, 3)], 65)
    scales = as_float(data.scales).to(scale_dtype)
    products = kernels.inner_products(as_float(data.queries), data.packed, scales, data.bands)
    assert products.dtype == torch.float32
    np.testing.assert_array_equal(products.numpy(), data.products)


def test_float_queries_lie_within_the_error_of_a_float32_sum(oracle, rng):
    """Whatever the order of additions |error| <= (d + 2) eps sum |q_i l_i| scale."""
    data = Rows(oracle, [(200, 4)], 65)
    queries = rng.standard_normal((7, 200)).astype(np.float32)
    scales = rng.random(65).astype(np.float32)
    products = kernels.inner_products(torch.from_numpy(queries), data.packed, torch.from_numpy(scales), data.bands)
    exact = queries.astype(np.float64) @ data.levels.T * scales
    bound = 202 * oracle.eps * (np.abs(queries) @ np.abs(data.levels).T) * scales
    assert (np.abs(products.numpy() - exact) <= bound).all()


@pytest.mark.parametrize("pairs", PLANS)
@pytest.mark.parametrize("count", [0, 1, 65])
@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("centred", [None, "centre", "unit and centre", "unit"])
def test_encode(oracle, rng, pairs, count, rotated, centred):
    data = Rows(oracle, pairs, count)
    tables = [(rows, levels / 64.0, boundaries / 64.0) for rows, levels, boundaries in data.tables]
    bands = tuple(b._replace(boundaries=b.boundaries / 64, levels=b.levels / 64) for b in data.bands)
    x = rng.standard_normal((count, data.dim)) * np.exp(3 * rng.standard_normal((count, 1)))
    x = x.astype(np.float32)
    factors, orders = Hadamard(data.dim, 6).tensors(torch.device("cpu")) if rotated else (None, None)
    z, options, growth = x.astype(np.float64), {}, 1.0
    if centred:
        unit = centred.startswith("unit")
        norms = np.linalg.norm(z, axis=1, keepdims=True)
        centre = rng.standard_normal(data.dim).astype(np.float32) * (0.1 if unit else 1.0)
        centre = centre if centred.endswith("centre") else None
        options = {"unit": unit, "centre": None if centre is None else torch.from_numpy(centre)}
        z = (z / norms if unit else z) - (0.0 if centre is None else centre)
        # What is taken off keeps the rounding of what was there: relative to |z| it grows by (|x| + |c|) / |z|.
        before = (1.0 if unit else norms) + (0.0 if centre is None else np.linalg.norm(centre))
        growth = 1 + float((before / np.linalg.norm(z, axis=1, keepdims=True)).max(initial=0.0))
    out = kernels.encode(torch.from_numpy(x), bands, factors, orders, **options)
    check_encoded(oracle, out, z, tables, pairs, 6 if rotated else None, growth)
    c = np.zeros(data.dim) if options.get("centre") is None else centre.astype(np.float64)
    slack = (2 * math.log2(data.dim) + 8) * oracle.eps * growth * np.linalg.norm(z, axis=1) * np.linalg.norm(c)
    assert (np.abs(out.centre_products.numpy() - z @ c) <= slack).all()


def check_encoded(oracle, out, z, tables, pairs, seed, growth):
    dim = z.shape[1]
    unit = oracle.unit(z, seed)
    codes = decode_bits(oracle, out.packed.numpy(), pairs)
    tolerance = oracle.rounding(dim) * growth
    oracle.count_wrong_codes(codes, unit, tables, tolerance)
    levels = np.concatenate([table[codes[:, rows]] for rows, table, _ in tables], axis=1)
    norms = np.linalg.norm(z, axis=1)
    np.testing.assert_allclose(out.norms.numpy(), norms, rtol=(2 * math.log2(dim) + 8) * oracle.eps * growth)
    dots = (unit * levels).sum(axis=1)
    slack = tolerance * np.abs(levels).sum(axis=1) + (math.log2(dim) + 2) * oracle.eps * np.abs(unit * levels).sum(1)
    assert (np.abs(out.dots.numpy() - dots) <= slack).all()
    assert out.packed.dtype == torch.uint8
    assert out.norms.dtype == out.dots.dtype == torch.float32


def test_a_zero_row_divided_by_its_norm_stays_zero_before_the_centre_is_taken_off(oracle):
    data = Rows(oracle, [(8, 2)], 1)
    centre = torch.full((8,), -0.5)
    out = kernels.encode(torch.zeros(1, 8), data.bands, centre=centre, unit=True)
    expected = kernels.encode(torch.full((1, 8), 0.5), data.bands)
    assert torch.equal(out.packed, expected.packed)
    assert out.norms.tolist() == pytest.approx([math.sqrt(2.0)], rel=1e-6)


def decode_bits(oracle, packed, pairs):
    """Codes by looking for each byte row's meaning bit by bit: the packed image of every single set bit is known."""
    dim = sum(size for size, _ in pairs)
    bits = np.unpackbits(packed, axis=1, bitorder="little").astype(np.int64)
    codes, start = np.zeros((len(packed), dim), dtype=np.int64), 0
    for size, width in pairs:
        for i in range(start, start + size):
            for bit in range(width):
                one = [0] * dim
                one[i] = 1 << bit
                image = np.frombuffer(oracle.pack(one, pairs), np.uint8)
                codes[:, i] |= bits[:, int(np.argmax(np.unpackbits(image, bitorder="little")))] << bit
        start += size
    return codes


@pytest.mark.parametrize("block_rows", [1, 13, 64])
def test_encode_in_blocks_is_the_same(oracle, rng, monkeypatch, block_rows):
    data = Rows(oracle, [(24, 3), (41, 2)], 1)
    x = torch.from_numpy(rng.standard_normal((200, 65)).astype(np.float32))
    tensors = Hadamard(65, 1).tensors(torch.device("cpu"))
    whole = kernels.encode(x, data.bands, *tensors)
    monkeypatch.setattr(reference, "ENCODE_BLOCK", block_rows * 65)
    parts = kernels.encode(x, data.bands, *tensors)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_a_value_on_a_boundary_has_the_lower_code(oracle):
    """All ones: u = 1 exactly in every coordinate."""
    boundaries = torch.tensor([-1.0, 0.0, 1.0])
    band = BandTable(4, 2, boundaries, torch.tensor([-1.5, -0.5, 0.5, 1.5]), (-3, -1, 1, 3), 0.0, 0.5)
    out = kernels.encode(torch.tensor([[1.0, 1, 1, 1], [3, -3, 3, -3], [0, 0, 0, 0]]), (band,))
    assert out.packed.numpy().tobytes().hex() == "aa2255"  # codes 2222, 2020 from the low end, 1111
    assert out.norms.tolist() == [2.0, 6.0, 0.0]
    assert out.dots.tolist() == [2.0, 4.0, 0.0]


def test_encode_does_not_write_to_its_input(oracle, rng):
    data = Rows(oracle, [(24, 3)], 1)
    for x in (torch.randn(1, 24), torch.randn(24, 5).t()):
        before = x.clone()
        kernels.encode(x, data.bands, *Hadamard(24, 1).tensors(torch.device("cpu")))
        assert torch.equal(x, before)


def test_unknown_backend_and_device_are_refused():
    with pytest.raises(InvalidInputError, match="got 'cuda'"):
        kernels.select("cuda", torch.device("cpu"))
    with pytest.raises(BackendError, match="cpu or cuda device, got meta"):
        kernels.select("auto", torch.device("meta"))
    assert kernels.select("reference", torch.device("cpu")) == "reference"
    assert kernels.select("auto", torch.device("cpu")) == "reference"
