"""What the codec computes along a trellis, against its definition in numpy float64."""

import math

import numpy as np
import pytest
import torch
import trellis_oracle
from trellis_oracle import Pairs

from tqsearch import BitPlan, TurboQuantIndex, TurboQuantizer
from tqsearch.errors import BackendError, InvalidInputError

MIXED = [(5, 4), (20, 2), (7, 0), (3, 8), (7, 6), (22, 1)]
ALIGNED = [(16, 4), (8, 0), (24, 3), (8, 2), (13, 1)]
PLANS: list[list[tuple[int, int]]] = [[(64, 1)], [(64, 2)], [(64, 3)], [(64, 4)], [(9, 3)], MIXED, ALIGNED]


def vectors(rng, count, dim):
    """Rows of very different norms, and a zero row."""
    rows = (rng.standard_normal((count, dim)) * np.exp(2 * rng.standard_normal((count, 1)))).astype(np.float32)
    rows[count // 2] = 0
    return rows


@pytest.mark.parametrize(("size", "bits"), [(9, 3), (100, 2), (13, 1), (64, 4)])
def test_it_says_the_bytes_of_its_own_codes(size, bits):
    """Not those of the scalar codes, which end each plane on a whole byte."""
    quantizer, index = TurboQuantizer(size, bits, codec="trellis"), TurboQuantIndex(size, bits, codec="trellis")
    there = trellis_oracle.row_bytes([(size, bits)])
    assert len(quantizer.encode(np.ones((1, size))).packed[0]) == there
    for shown in (quantizer, index):
        assert f"plan={size} x {bits} bit = {there} bytes" in repr(shown)
        assert str(shown.plan) == f"{size} x {bits} bit"


def split(pairs) -> tuple[Pairs, np.ndarray]:
    """The bands along the path, and the width of every coordinate."""
    widths = np.repeat([bits for _, bits in pairs], [size for size, _ in pairs])
    return [(size, bits) for size, bits in pairs if bits not in (0, 6, 8)], widths


def scalar_codes(row, pairs):
    """The codes of a row's bands of 6 and 8 bits, plane by plane as `packing` says, the low bits first."""
    codes, byte = [], 0
    for size, bits in ((size, bits) for size, bits in pairs if bits in (6, 8)):
        band = [0] * size
        for plane, shift in ((8, 0),) if bits == 8 else ((4, 0), (2, 4)):
            for i in range(size):
                place = i * plane
                band[i] |= (row[byte + place // 8] >> place % 8 & 2**plane - 1) << shift
            byte += math.ceil(size * plane / 8)
        codes += band
    return np.array(codes)


def levels_of(oracle, packed, pairs):
    """The float64 levels of rows of bytes."""
    on_path, widths = split(pairs)
    cut, dim = trellis_oracle.row_bytes(on_path), len(widths)
    levels = np.zeros((len(packed), dim))
    path, beside = (widths > 0) & (widths < 6), widths >= 6
    levels[:, path] = [trellis_oracle.levels_of(trellis_oracle.unpack(row[:cut], on_path), on_path) for row in packed]
    tables = [oracle.lloyd(int(bits), dim)[0] for bits in widths[beside]]
    for row, part in zip(packed, levels, strict=True):
        codes = scalar_codes(row[cut:], pairs)
        part[beside] = [table[code] for table, code in zip(tables, codes, strict=True)]
    return levels


@pytest.mark.parametrize("pairs", PLANS, ids=str)
def test_codes_scales_and_decoding_equal_the_definition(oracle, rng, pairs):
    on_path, widths = split(pairs)
    dim, seed = len(widths), 12
    quantizer = TurboQuantizer(dim, BitPlan.from_pairs(pairs), seed=seed, codec="trellis")
    x = vectors(rng, 13, dim)
    codes = quantizer.encode(x)
    packed = [row.numpy().tobytes() for row in codes.packed]
    assert quantizer.bytes_per_vector == len(packed[0]) + 4
    unit, levels = oracle.unit(x, seed), levels_of(oracle, packed, pairs)

    path = (widths > 0) & (widths < 6)
    errors = ((unit - levels) ** 2)[:, path].sum(axis=1)
    least = np.array([trellis_oracle.least_error(row, on_path) for row in unit[:, path]])
    np.testing.assert_allclose(errors, least, rtol=1e-4)
    for bits in (6, 8):
        wide, table = (widths == bits), oracle.lloyd(bits, dim)[0]
        nearest = np.abs(unit[:, wide, None] - table).min(axis=2)
        np.testing.assert_allclose(np.abs(unit - levels)[:, wide], nearest, atol=oracle.rounding(dim))

    norms, dots = np.linalg.norm(x.astype(np.float64), axis=1), (unit * levels).sum(axis=1)
    scales = np.where(norms > 0, norms * math.sqrt(dim) / np.where(norms > 0, dots, 1), 0)
    np.testing.assert_allclose(codes.scales, scales, rtol=1e-5)

    estimates = scales[:, None] * levels
    size = np.abs(estimates).max(axis=1, keepdims=True)
    assert (
        np.abs(oracle.rotate(quantizer.decode(codes, unbiased=True).numpy(), seed) - estimates) <= 1e-5 * size
    ).all()
    shrunk = estimates * (1 - quantizer.distortion)
    assert (np.abs(oracle.rotate(quantizer.decode(codes).numpy(), seed) - shrunk) <= 1e-5 * size).all()
    queries = rng.standard_normal((4, dim)).astype(np.float32)
    slack = 1e-5 * np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(estimates, axis=1)
    assert (np.abs(quantizer.inner_product(queries, codes) - oracle.rotate(queries, seed) @ estimates.T) <= slack).all()


def test_distortion_is_the_mean_of_the_bands(oracle):
    plan = BitPlan.from_pairs([(16, 1), (8, 0), (24, 3), (16, 8)])
    found = TurboQuantizer(64, plan, codec="trellis").distortion
    # The table of the docstring of `trellis`; of 8 bits the scalar's.
    assert found == pytest.approx((16 * 0.27416 + 8 + 24 * 0.02172 + 16 * oracle.distortion(8, 64)) / 64, rel=1e-3)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_error_of_decoded_vectors_is_the_distortion(rng, bits):
    """In 512 dimensions the known start costs 1 % at most."""
    x = rng.standard_normal((60, 512)).astype(np.float32)
    quantizer = TurboQuantizer(512, bits, codec="trellis")
    errors = np.square(quantizer.decode(quantizer.encode(x)).numpy() - x).sum(1) / np.square(x).sum(1)
    noise = errors.std(ddof=1) / math.sqrt(len(errors))
    assert abs(errors.mean() - quantizer.distortion) < 4.5 * noise + 0.01 * quantizer.distortion
    assert errors.mean() < 0.8 * TurboQuantizer(512, bits).distortion


@pytest.mark.parametrize("bits", [1, 3])
def test_inner_products_are_unbiased_over_seeds(rng, z, bits):
    x = rng.standard_normal((8, 24)).astype(np.float32)
    queries = (x + rng.standard_normal((8, 24))).astype(np.float32)
    found = []
    for seed in range(150):
        quantizer = TurboQuantizer(24, bits, seed=seed, codec="trellis")
        found.append(np.diag(np.asarray(quantizer.inner_product(queries, quantizer.encode(x)))))
    exact = (queries.astype(np.float64) * x).sum(axis=1)
    errors = (np.array(found) - exact).mean(axis=1)  # over vectors: the seeds are independent
    assert abs(z(errors, 0.0)) < 5
    assert errors.std() < np.abs(exact).mean()


@pytest.mark.parametrize("bits", [2, BitPlan.from_pairs(MIXED)], ids=["2 bits", "bands"])
@pytest.mark.parametrize("rotation", ["hadamard", "dense", "identity"])
def test_codes_do_not_depend_on_the_batch(rng, bits, rotation):
    x = vectors(rng, 31, 64)
    centre = rng.standard_normal(64).astype(np.float32)
    quantizer = TurboQuantizer(64, bits, rotation=rotation, codec="trellis", centre=centre, unit=True)
    whole = quantizer.encode(x)
    for part in (slice(0, 1), slice(4, 20), slice(30, 31)):
        codes = quantizer.encode(x[part])
        assert torch.equal(codes.packed, whole.packed[part])
        assert torch.equal(codes.scales, whole.scales[part])
    assert quantizer.encode(x[:0]).packed.shape == (0, quantizer.row_bytes)


def test_refusals():
    with pytest.raises(InvalidInputError, match="codec must be one of 'scalar', 'trellis', got 'tree'"):
        TurboQuantizer(16, 2, codec="tree")
    for bits, got in ((5, "5 bits"), (4.5, "5 bits"), (8, "the plan 16 x 8 bit"), (0.0, "the plan 16 x 0 bit")):
        with pytest.raises(InvalidInputError, match=f"needs a band of 1 to 4 bits, .* got {got}.*; use codec 'scalar'"):
            TurboQuantizer(16, bits, codec="trellis")
    with pytest.raises(InvalidInputError, match="codec must be 'scalar' for form 'prod', got 'trellis'"):
        TurboQuantizer(16, 3, form="prod", codec="trellis")


def test_an_explicit_backend_does_not_fall_back(monkeypatch, rng):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendError, match="backend 'triton' needs"):
        TurboQuantizer(16, 2, codec="trellis", backend="triton").encode(vectors(rng, 3, 16))


def test_it_says_what_it_is():
    assert "codec='trellis'" in repr(TurboQuantizer(16, 2, codec="trellis"))
    assert "codec" not in repr(TurboQuantizer(16, 2))
