"""What the codec computes, against its definition in numpy float64.

Its statistics are in `test_distortion.py`, the kinds of input in `test_quantizer_inputs.py` and `test_arrays.py`.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantizer_rows import MIXED, same, vectors
from scipy import linalg

from tqsearch import BitPlan, TurboQuantizer
from tqsearch.packing import unpack


def levels_of(oracle, quantizer, codes):
    """The float64 levels that packed codes stand for (unpacking has its own tests)."""
    numbers = unpack(codes.packed, quantizer.plan).numpy().astype(np.int64)
    tables = oracle.tables(quantizer.plan.pairs(), quantizer.dim)
    return numbers, np.concatenate([levels[numbers[:, rows]] for rows, levels, _ in tables], axis=1)


@pytest.mark.parametrize("dim", [2, 3, 8, 63, 64, 65, 100, 384, 1536, 8192])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
def test_codes_scales_and_decoding_equal_the_definition(oracle, rng, dim, bits):
    check_definition(oracle, TurboQuantizer(dim, bits, seed=12), vectors(rng, 3 if dim > 2000 else 65, dim), 12)


@pytest.mark.parametrize("bits", [2.5, 3.5, BitPlan.from_pairs(MIXED)])
def test_bands_equal_the_definition(oracle, rng, bits):
    check_definition(oracle, TurboQuantizer(64, bits, seed=-5), vectors(rng, 200, 64), -5)


@settings(max_examples=30)
@given(dim=st.integers(2, 300), bits=st.integers(1, 8), seed=st.integers(-(2**63), 2**63))
def test_any_dim_bits_and_seed_equal_the_definition(oracle, dim, bits, seed):
    quantizer = TurboQuantizer(dim, bits, seed=seed)
    check_definition(oracle, quantizer, vectors(np.random.default_rng(dim), 4, dim), seed)


def check_definition(oracle, quantizer, x, seed):
    dim, tolerance = quantizer.dim, oracle.rounding(quantizer.dim)
    codes = quantizer.encode(x)
    numbers, levels = levels_of(oracle, quantizer, codes)
    unit = oracle.unit(x, seed)
    tables = list(oracle.tables(quantizer.plan.pairs(), dim))
    # Codes differ only where the float64 value lies within rounding of a boundary. How often: the errors of a row have
    # norm <= tolerance, so tolerance / sqrt(d) a coordinate in the mean, and a boundary lies that near with probability
    # at most error / smallest spacing.
    wrong = oracle.count_wrong_codes(numbers, unit, tables, tolerance + 2 * oracle.eps * math.sqrt(dim))
    spacing = min(np.diff(levels_).min() for _, levels_, boundaries in tables if len(boundaries))
    expected_wrong = unit.size * (tolerance / math.sqrt(dim) + oracle.eps) / spacing
    assert wrong <= expected_wrong + 5 * math.sqrt(expected_wrong) + 1
    # s = |x|^2 / <x, x_hat>
    norms = np.linalg.norm(x.astype(np.float64), axis=1)
    dots = (unit * levels).sum(axis=1)
    scales = norms * math.sqrt(dim) / dots
    relative = tolerance * np.abs(levels).sum(axis=1) / dots + (dim.bit_length() + 8) * oracle.eps
    assert (np.abs(codes.scales.numpy() / scales - 1) <= relative).all()
    # decode = (1 - D) s R^T levels; unbiased without (1 - D)
    distortion = sum(s * oracle.distortion(w, dim) for s, w in quantizer.plan.pairs()) / dim
    assert quantizer.distortion == pytest.approx(distortion, rel=1e-6)
    rotated_back = quantizer.rotation.invert(torch.from_numpy(levels)).numpy()  # its own tests: test_rotation
    expected = codes.scales.double().numpy()[:, None] * rotated_back
    bound = tolerance * np.linalg.norm(expected, axis=1, keepdims=True) / math.sqrt(dim) * 2
    assert (np.abs(quantizer.decode(codes, unbiased=True).numpy() - expected) <= bound).all()
    assert (np.abs(quantizer.decode(codes).numpy() - (1 - distortion) * expected) <= bound).all()
    # <q, x> is estimated by s <q, R^T levels>
    queries = x[::-1].astype(np.float64)
    products = quantizer.inner_product(queries, codes)
    slack = 3 * tolerance / math.sqrt(dim) * np.outer(norms[::-1], np.linalg.norm(expected, axis=1))
    assert (np.abs(products - queries @ expected.T) <= slack).all()


@pytest.mark.parametrize("projection", ["gaussian", "orthogonal"])
@pytest.mark.parametrize("bits", [1, 2, 3.5, 5])
def test_prod_form_equals_algorithm_two(oracle, rng, bits, projection):
    """x_hat with b - 1 bits and scale |x| / sqrt(d); sign(S r) and |r| of r = x - x_hat;
    <y, x> by <y, x_hat> + c / d |r| <S y, sign(S r)>."""
    dim, seed, count = 40, 3, 65
    quantizer = TurboQuantizer(dim, bits, form="prod", projection=projection, seed=seed)
    x = vectors(rng, count, dim)
    codes = quantizer.encode(x)
    assert quantizer.plan.pairs() == BitPlan.of(dim, bits - 1).pairs()
    numbers, levels = levels_of(oracle, quantizer, codes)
    tables = list(oracle.tables(quantizer.plan.pairs(), dim))
    oracle.count_wrong_codes(numbers, oracle.unit(x, seed), tables, oracle.rounding(dim) + 2e-6)
    norms = np.linalg.norm(x.astype(np.float64), axis=1)
    np.testing.assert_allclose(codes.scales.numpy(), norms / math.sqrt(dim), rtol=20 * oracle.eps)

    matrix = oracle.rotate(np.eye(dim), seed).T
    estimate = norms[:, None] / math.sqrt(dim) * levels @ matrix
    residual = x - estimate
    if projection == "gaussian":
        s, constant = oracle.gaussians(seed, 48, dim * dim).reshape(dim, dim), math.sqrt(math.pi / 2)
    else:
        q, r = linalg.qr(oracle.gaussians(seed, 49, dim * dim).reshape(dim, dim))
        s = math.sqrt(dim) * (q * np.sign(np.diag(r))).T
        absolute = math.sqrt(dim / math.pi) * math.gamma(dim / 2) / math.gamma((dim + 1) / 2)  # E |sqrt(d) t|
        constant = 1 / absolute
    projected = residual @ s.T
    plus = unpack(codes.signs, BitPlan.of(dim, 1)).numpy().astype(bool)
    rounding = 100 * oracle.eps * norms[:, None] * np.linalg.norm(s, axis=1)
    assert ((plus == (projected >= 0)) | (np.abs(projected) < rounding)).all()
    np.testing.assert_allclose(codes.residual_norms.numpy(), np.linalg.norm(residual, axis=1), rtol=1e-4)

    queries = rng.standard_normal((7, dim)).astype(np.float32)
    signs = np.where(plus, 1.0, -1.0)
    qjl = constant / dim * codes.residual_norms.double().numpy() * ((queries @ s.T) @ signs.T)
    expected = queries @ estimate.T + qjl
    slack = 100 * oracle.eps * np.outer(np.linalg.norm(queries, axis=1), norms) * math.sqrt(dim)
    products = quantizer.inner_product(queries, codes)
    assert (np.abs(products - expected) <= slack).all()
    decoded = quantizer.decode(codes).double().numpy()
    assert (np.abs(queries @ decoded.T - expected) <= slack).all()


@pytest.mark.parametrize(
    ("options", "nbytes"),
    [
        ({"dim": 384, "bits": 4}, 196),
        ({"dim": 1536, "bits": 2}, 388),
        ({"dim": 128, "bits": 2.5}, 44),
        ({"dim": 100, "bits": 3}, 42),  # 25 + 13 bytes of planes, 4 of scale
        ({"dim": 384, "bits": 4, "scale_dtype": torch.float16}, 194),
        ({"dim": 128, "bits": 4, "form": "prod"}, 48 + 4 + 16 + 4),
        ({"dim": 128, "bits": 1, "form": "prod"}, 0 + 4 + 16 + 4),
        ({"dim": 64, "bits": BitPlan.from_pairs(MIXED)}, 3 + 5 + 0 + 3 + 4 + 4),
    ],
)
def test_bytes_are_counted_and_stored(rng, options, nbytes):
    quantizer = TurboQuantizer(**options)
    assert quantizer.bytes_per_vector == nbytes
    assert quantizer.compression_ratio == pytest.approx(4 * quantizer.dim / nbytes)
    assert quantizer.encode(vectors(rng, 7, quantizer.dim)).nbytes == 7 * nbytes


def test_scales_in_float16_are_the_float32_ones_rounded(rng):
    x = rng.standard_normal((50, 64)).astype(np.float32)
    full, half = (TurboQuantizer(64, 4, scale_dtype=t).encode(x) for t in (torch.float32, torch.float16))
    assert torch.equal(full.packed, half.packed)
    assert torch.equal(full.scales.half(), half.scales)


@pytest.mark.parametrize("rotation", ["hadamard", "identity"])
def test_a_centre_is_taken_off_and_put_back(rng, rotation):
    """Codes are those of x - c; <q, x> = <q, c> + <q, x - c>; a centre of small integers keeps x - c exact."""
    x = np.ldexp(rng.integers(-1000, 1000, (65, 24)), -6).astype(np.float32)
    centre = rng.integers(-20, 20, 24)
    plain = TurboQuantizer(24, 3, rotation=rotation)
    centred = TurboQuantizer(24, 3, rotation=rotation, centre=centre)
    codes, expected = centred.encode(x), plain.encode(x - centre)
    assert same(codes, expected)
    for unbiased in (False, True):
        decoded = plain.decode(expected, unbiased=unbiased).double().numpy() + centre
        np.testing.assert_allclose(centred.decode(codes, unbiased=unbiased).numpy(), decoded, rtol=0, atol=1e-5)
    queries = rng.standard_normal((5, 24)).astype(np.float32)
    products = plain.inner_product(queries, expected).astype(np.float64) + (queries @ centre)[:, None]
    np.testing.assert_allclose(centred.inner_product(queries, codes), products, rtol=0, atol=2e-4)


def test_unit_codes_stand_for_the_unit_vectors(oracle, rng):
    x = vectors(rng, 65, 24)
    unit = x / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    quantizer = TurboQuantizer(24, 4, unit=True, scale_dtype=torch.float32)
    codes = quantizer.encode(x)
    numbers, _ = levels_of(oracle, quantizer, codes)
    oracle.count_wrong_codes(numbers, oracle.unit(x, 0), list(oracle.tables([(24, 4)], 24)), 2 * oracle.rounding(24))
    own = quantizer.decode(codes, unbiased=True).double().numpy()  # <x, s x_hat> = |x|^2 by the definition of the scale
    np.testing.assert_allclose((own * unit).sum(axis=1), 1.0, rtol=0, atol=1e-5)
    x[7] = 0.0
    assert not quantizer.decode(quantizer.encode(x))[7].any()


def test_golden_codes_never_change(oracle):
    """A file's meaning, end to end: x = 1 .. 8, d = 8, seed 1, 2 bits. Signs of streams 0 to 2, by hand."""
    quantizer = TurboQuantizer(8, 2, seed=1)
    x = np.arange(1, 9, dtype=np.float32)[None]
    h = linalg.hadamard(8) / math.sqrt(8)
    u = x[0] * math.sqrt(8) / np.linalg.norm(x)
    for signs in SIGNS_OF_SEED_ONE:
        u = h @ (np.array(signs) * u)
    boundaries = oracle.lloyd(2, 8)[1]
    codes = np.searchsorted(boundaries, u)
    assert np.abs(u[:, None] - boundaries).min() > 1e-3
    packed = [sum(int(c) << (2 * i) for i, c in enumerate(part)) for part in (codes[:4], codes[4:])]
    assert quantizer.encode(x).packed.tolist() == [packed]


SIGNS_OF_SEED_ONE = (  # top bits of words(1, 0 to 2, 8)
    [1, 1, -1, -1, 1, 1, -1, 1],
    [-1, -1, 1, -1, 1, -1, -1, 1],
    [-1, 1, 1, -1, 1, 1, 1, 1],
)
