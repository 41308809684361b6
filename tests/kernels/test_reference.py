"""The reference ops against numpy float64. Tables of small integers make scores exact in float32: equal, not close."""

import numpy as np
import pytest
import torch
from encoded_rows import PLANS, Rows, as_float
from hypothesis import example, given
from hypothesis import strategies as st

from tqsearch import kernels
from tqsearch.errors import BackendError, InvalidInputError
from tqsearch.kernels import reference

SIZES = [0, 1, 63, 65, 200]


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


def test_unknown_backend_and_device_are_refused():
    with pytest.raises(InvalidInputError, match="got 'cuda'"):
        kernels.select("cuda", torch.device("cpu"))
    with pytest.raises(BackendError, match="cpu or cuda device, got meta"):
        kernels.select("auto", torch.device("meta"))
    assert kernels.select("reference", torch.device("cpu")) == "reference"
    assert kernels.select("auto", torch.device("cpu")) == "reference"
