"""What a quantizer is given: batches, norms, zero and no rows, layouts, and what it refuses."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from quantizer_rows import same, vectors

from tqsearch import BitPlan, TurboQuantizer
from tqsearch.errors import InvalidInputError
from tqsearch.packing import unpack


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
    ("change", "says"),
    [
        ({"packed": torch.zeros((3, 8), dtype=torch.int64)}, r"got \(3, 8\) of torch.int64 and \(3,\)"),
        ({"packed": np.zeros((3, 8), np.uint8)}, r"got \(3, 8\) of uint8 and \(3,\)"),
        ({"packed": torch.zeros(8, dtype=torch.uint8)}, r"got \(8,\) of torch.uint8 and \(3,\)"),
        ({"scales": torch.ones(2)}, r"got \(3, 8\) of torch.uint8 and \(2,\)"),
        ({"scales": torch.ones(3, 1)}, r"got \(3, 8\) of torch.uint8 and \(3, 1\)"),
    ],
)
def test_codes_that_no_quantizer_made_are_refused(rng, change, says):
    quantizer = TurboQuantizer(16)
    codes = dataclasses.replace(quantizer.encode(vectors(rng, 3, 16)), **change)
    with pytest.raises(InvalidInputError, match=says):
        quantizer.decode(codes)
    with pytest.raises(InvalidInputError, match=says):
        quantizer.inner_product(np.ones(16), codes)


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
