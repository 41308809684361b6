"""What the codec computes, against its definition in numpy float64.

Its statistics are in `test_distortion.py`, the kinds of input in `test_arrays.py`.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import linalg

from tqsearch import BitPlan, TurboQuantizer
from tqsearch.errors import InvalidInputError
from tqsearch.packing import unpack

MIXED = [(5, 4), (20, 2), (7, 0), (3, 8), (29, 1)]


def vectors(rng, count, dim):
    """Rows of very different norms."""
    return (rng.standard_normal((count, dim)) * np.exp(2 * rng.standard_normal((count, 1)))).astype(np.float32)


def same(a, b):
    """Equal codes, part by part, bit for bit."""
    parts = [(a.packed, b.packed), (a.scales, b.scales), (a.signs, b.signs), (a.residual_norms, b.residual_norms)]
    return all((x is None and y is None) or torch.equal(x, y) for x, y in parts)


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


@pytest.mark.parametrize("options", [{}, {"rotation": "identity"}, {"bits": 2.5}, {"scale_dtype": torch.float16}])
@pytest.mark.parametrize("dim", [8, 65, 384])
def test_any_split_of_a_batch_gives_the_same_bytes(rng, dim, options):
    quantizer = TurboQuantizer(dim, **options)
    x = torch.from_numpy(rng.standard_normal((130, dim)).astype(np.float32))
    whole = quantizer.encode(x)
    for sizes in ([1] * 130, [63, 65, 2], [129, 1]):
        parts = [quantizer.encode(part) for part in x.split(sizes)]
        assert torch.equal(torch.cat([part.packed for part in parts]), whole.packed)
        assert torch.equal(torch.cat([part.scales for part in parts]), whole.scales)


@pytest.mark.parametrize("form", ["mse", "prod"])
def test_equal_rows_have_equal_codes(rng, form):
    quantizer = TurboQuantizer(65, 3, form=form)
    row = rng.standard_normal(65).astype(np.float32)
    codes = quantizer.encode(np.tile(row, (63, 1)))
    first = quantizer.encode(row[None])
    assert (codes.packed == first.packed).all()
    assert (codes.scales == first.scales).all()


@given(power=st.integers(-90, 90), seed=st.integers(0, 1000), bits=st.sampled_from([1, 2.5, 4, 8]))
@example(power=100, seed=0, bits=4)
@example(power=-100, seed=0, bits=4)
def test_powers_of_two_scale_exactly(power, seed, bits):
    quantizer = TurboQuantizer(33, bits)
    x = np.random.default_rng(seed).standard_normal((9, 33)).astype(np.float32)
    plain, scaled = quantizer.encode(x), quantizer.encode(np.ldexp(x, power))
    assert torch.equal(plain.packed, scaled.packed)
    np.testing.assert_array_equal(np.ldexp(plain.scales.numpy(), power), scaled.scales.numpy())


@given(factor=st.floats(1e-6, 1e6), seed=st.integers(0, 1000))
def test_any_factor_scales_to_rounding(oracle, factor, seed):
    quantizer = TurboQuantizer(33, 4)
    x = np.random.default_rng(seed).standard_normal((9, 33)).astype(np.float32)
    y = (x * np.float32(factor)).astype(np.float32)
    plain, scaled = quantizer.encode(x), quantizer.encode(y)
    numbers = [unpack(codes.packed, quantizer.plan).numpy() for codes in (plain, scaled)]
    unit = oracle.unit(x, 0)
    tables = list(oracle.tables([(33, 4)], 33))
    for codes in numbers:
        oracle.count_wrong_codes(codes, unit, tables, 2 * oracle.rounding(33))
    equal = (numbers[0] == numbers[1]).all(axis=1)
    assert equal.sum() >= 7  # a code differs where a value lies within 3e-5 of one of 15 boundaries: 1 row in 80
    ratio = scaled.scales.numpy()[equal] / plain.scales.numpy()[equal] / np.float32(factor)
    np.testing.assert_allclose(ratio, 1.0, rtol=2 * oracle.rounding(33))


@pytest.mark.parametrize("form", ["mse", "prod"])
@pytest.mark.parametrize("norm", [1e-42, 1e-30, 1e-10, 1.0, 1e10, 1e30, 1e36])
def test_tiny_and_huge_norms(rng, form, norm):
    """The relative error of decoding is that of norm 1 (at 1e-42 float32 itself has three digits)."""
    quantizer = TurboQuantizer(64, 4, form=form)
    x = rng.standard_normal((20, 64))
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    given_rows = (x * norm).astype(np.float32)
    reference = quantizer.decode(quantizer.encode(x)).double().numpy()
    decoded = quantizer.decode(quantizer.encode(given_rows)).double().numpy() / norm
    error = ((decoded - x) ** 2).sum(axis=1).mean()
    assert error == pytest.approx(((reference - x) ** 2).sum(axis=1).mean(), rel=0.1 if norm < 1e-37 else 0.01)


@pytest.mark.parametrize("form", ["mse", "prod"])
@pytest.mark.parametrize("rotation", ["hadamard", "dense", "identity"])
def test_zero_vectors_decode_to_zero(rng, form, rotation):
    quantizer = TurboQuantizer(63, 3, form=form, rotation=rotation)
    x = vectors(rng, 5, 63)
    x[[0, 3]] = 0.0
    codes = quantizer.encode(x)
    assert torch.isfinite(codes.scales).all()
    assert codes.scales[[0, 3]].tolist() == [0.0, 0.0]
    assert not quantizer.decode(codes)[[0, 3]].any()
    assert not quantizer.inner_product(x, codes)[:, [0, 3]].any()
    assert not quantizer.inner_product(x, codes)[[0, 3]].any()


def test_rows_that_lie_in_bands_of_width_zero_decode_to_zero():
    quantizer = TurboQuantizer(16, BitPlan.from_pairs([(8, 4), (8, 0)]), rotation="identity")
    x = np.zeros((2, 16), dtype=np.float32)
    x[0, 8:] = 1.0
    x[1, :8] = 1.0
    codes = quantizer.encode(x)
    assert codes.scales[0] == 0.0
    assert not quantizer.decode(codes)[0].any()
    assert quantizer.inner_product(x[1], codes)[1] == pytest.approx(8.0, rel=1e-5)  # s <x, x_hat> = |x|^2
    assert not quantizer.decode(codes)[1, 8:].any()


@pytest.mark.parametrize("bits", [2, 3, 3.5])
@pytest.mark.parametrize("form", ["mse", "prod"])
def test_no_vectors(form, bits):
    quantizer = TurboQuantizer(24, bits, form=form)
    codes = quantizer.encode(np.empty((0, 24), dtype=np.float32))
    assert len(codes) == 0
    assert codes.nbytes == 0
    assert quantizer.decode(codes).shape == (0, 24)
    assert quantizer.inner_product(np.ones((2, 24), dtype=np.float32), codes).shape == (2, 0)
    full = quantizer.encode(np.ones((3, 24), dtype=np.float32))
    assert quantizer.inner_product(np.empty((0, 24), dtype=np.float32), full).shape == (0, 3)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_one_dimension_is_exact(bits):
    """The unit sphere of R^1 is -1 and 1: every vector decodes to itself."""
    quantizer = TurboQuantizer(1, bits)
    x = np.array([[3.0], [-0.25], [0.0], [1e-20]], dtype=np.float32)
    np.testing.assert_allclose(quantizer.decode(quantizer.encode(x)).numpy(), x, rtol=1e-6)


@pytest.mark.parametrize("form", ["mse", "prod"])
def test_layouts_of_memory_do_not_matter(rng, form):
    quantizer = TurboQuantizer(24, 4, form=form)
    x = vectors(rng, 9, 24)
    expected = quantizer.encode(x)
    read_only = x.copy()
    read_only.flags.writeable = False
    wide = np.zeros((18, 72), dtype=np.float32)
    wide[::2, 1::3] = x
    layouts = {
        "columns": np.asfortranarray(x),
        "negative strides": x[::-1, ::-1].copy()[::-1, ::-1],
        "read-only": read_only,
        "strided": wide[::2, 1::3],
        "repeated": np.broadcast_to(x[:, None], (9, 2, 24))[:, 1],
        "torch transposed": torch.from_numpy(x.T.copy()).t(),
        "torch strided": torch.from_numpy(wide)[::2, 1::3],
        "requires grad": torch.from_numpy(x).requires_grad_(),
    }
    for name, layout in layouts.items():
        assert same(quantizer.encode(layout), expected), name
    one = quantizer.encode(np.broadcast_to(x[0], (5, 24)))
    assert (one.packed == expected.packed[0]).all()


def test_one_query_gives_one_row(rng):
    quantizer = TurboQuantizer(24, 4)
    x = vectors(rng, 9, 24)
    codes = quantizer.encode(x)
    both = quantizer.inner_product(x[:2], codes)
    single = quantizer.inner_product(x[0], codes)
    assert single.shape == (9,)
    np.testing.assert_allclose(single, both[0], rtol=1e-5, atol=1e-6)


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


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"dim": 32}, "8 bytes a row without signs, got 16 bytes a row without signs"),
        ({"bits": 2}, "8 bytes a row without signs, got 4 bytes a row without signs"),
        ({"form": "prod"}, "8 bytes a row without signs, got 6 bytes a row and signs"),
    ],
)
def test_codes_of_another_quantizer_are_refused(rng, other, says):
    codes = TurboQuantizer(**{"dim": 16, **other}).encode(vectors(rng, 3, other.get("dim", 16)))
    quantizer = TurboQuantizer(16)
    with pytest.raises(InvalidInputError, match=f"codes must be of this quantizer, {says}"):
        quantizer.decode(codes)
    with pytest.raises(InvalidInputError, match=says):
        quantizer.inner_product(np.ones(16), codes)
    with pytest.raises(InvalidInputError, match="codes must be what encode returns, got ndarray"):
        quantizer.decode(np.ones((3, 8)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "dim must be an integer from 1 to 8192, got 0"),
        ({"dim": 8193}, "dim must be an integer from 1 to 8192, got 8193"),
        ({"bits": 9}, "bits must be a number from 0 to 8 or a BitPlan, got 9"),
        ({"bits": 0}, "bits must be above 0 for form 'mse'"),
        ({"bits": "4"}, "bits must be a number"),
        ({"bits": BitPlan.of(9, 4)}, "the plan must cover 8 coordinates, got one for 9"),
        ({"form": "ip"}, "form must be 'mse' or 'prod', got 'ip'"),
        ({"rotation": "pca"}, "rotation must be one of"),
        ({"form": "prod", "projection": "hadamard"}, "projection must be 'gaussian' or 'orthogonal', got 'hadamard'"),
        ({"scale_dtype": torch.bfloat16}, "scale_dtype must be torch.float32 or torch.float16, got torch.bfloat16"),
        ({"form": "prod", "bits": 0}, "bits must be a number from 1 to 8 or a BitPlan for form 'prod', got 0"),
        ({"form": "prod", "bits": 0.5}, "for form 'prod', got 0.5"),
        ({"form": "prod", "bits": 9}, "for form 'prod', got 9"),
        ({"form": "prod", "bits": "4"}, "for form 'prod', got '4'"),
        ({"form": "prod", "bits": True}, "for form 'prod', got True"),
        ({"form": "prod", "bits": BitPlan.from_pairs([(4, 2), (4, 0)])}, "got size 4, width -1"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(InvalidInputError, match=message):
        TurboQuantizer(**{"dim": 8, **options})


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


@pytest.mark.parametrize(
    ("centre", "message"),
    [
        (np.zeros(23), r"centre must have shape .*\(24,\), got \(23,\)"),
        (np.zeros((2, 24)), r"centre must have shape .*\(24,\), got \(2, 24\)"),
        (np.zeros((0, 24)), r"centre must have shape .*\(24,\), got \(0, 24\)"),
        (np.full(24, np.nan), "centre must be finite"),
    ],
)
def test_a_bad_centre_is_named(centre, message):
    with pytest.raises(InvalidInputError, match=message):
        TurboQuantizer(24, centre=centre)


@pytest.mark.parametrize("options", [{"centre": np.zeros(24)}, {"unit": True}])
def test_centre_and_unit_go_with_the_mse_form(options):
    with pytest.raises(InvalidInputError, match="go with form 'mse' only"):
        TurboQuantizer(24, form="prod", **options)


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


@pytest.mark.parametrize("dim", [0, 8193, 8.5, True, "8"])
def test_dimensions_that_are_refused(dim):
    with pytest.raises(InvalidInputError, match=f"dim must be an integer from 1 to 8192, got {dim!r}"):
        TurboQuantizer(dim)


@pytest.mark.parametrize("seed", [1.5, True, "1"])
def test_seeds_that_are_refused(seed):
    with pytest.raises(InvalidInputError, match=f"seed must be an integer, got {seed!r}"):
        TurboQuantizer(8, seed=seed)


def test_numpy_numbers_are_numbers():
    quantizer = TurboQuantizer(np.int64(16), np.float32(2.5), seed=np.int32(3))
    assert quantizer.plan.pairs() == [(8, 3), (8, 2)]
    x = np.random.default_rng(0).standard_normal((4, 16), dtype=np.float32)
    assert torch.equal(quantizer.encode(x).packed, TurboQuantizer(16, 2.5, seed=3).encode(x).packed)


def test_scales_stay_finite_where_most_coordinates_are_dropped():
    """A vector that lies in the dropped coordinates has a scale far above float16's 65504."""
    plan = BitPlan.from_pairs([(1, 8), (127, 0)])
    quantizer = TurboQuantizer(128, plan, unit=True, rotation="identity")
    x = np.zeros((2, 128), np.float32)
    x[:, 1], x[:, 0] = 1.0, [1e-9, 0.5]
    scales = quantizer.encode(x).scales
    assert scales.dtype == torch.float32
    assert torch.isfinite(scales).all()
    assert TurboQuantizer(128, 1, unit=True).encode(x).scales.dtype == torch.float16
