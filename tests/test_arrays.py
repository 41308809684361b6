"""Users' arrays, by themselves and through the quantizer."""

import gc
import math
import tracemalloc

import numpy as np
import pytest
import torch

from tqsearch import TurboQuantIndex, TurboQuantizer
from tqsearch.arrays import as_ids, as_matrix, as_rows, like
from tqsearch.errors import InvalidInputError

DTYPES = ["float16", "bfloat16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8"]


def test_float32_is_shared_not_copied():
    array, tensor = np.ones((3, 4), dtype=np.float32), torch.ones(3, 4)
    assert as_matrix(array, 4, "x").data_ptr() == array.ctypes.data
    assert as_matrix(tensor, 4, "x").data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize("dtype", ["f4", "f2", "u1", "i8"])
def test_a_mapped_file_is_not_copied(tmp_path, rng, dtype):
    """Nor written to, which would end the process; it stays open as long as what was made of it."""
    array = rng.integers(0, 100, (3000, 40)).astype(dtype)
    np.save(tmp_path / "file.npy", array)
    mapped = np.load(tmp_path / "file.npy", mmap_mode="r")
    address, index = mapped.ctypes.data, TurboQuantIndex(40, 4, "l2", train="auto")
    rows = as_rows(mapped, 40, "x")
    assert rows.data_ptr() == address
    assert as_rows(mapped[::2, 3:7], 4, "x").data_ptr() == address + 3 * array.itemsize
    tracemalloc.start()
    try:
        index.add(mapped)
        assert tracemalloc.get_traced_memory()[1] < array.nbytes / 2  # of numpy and Python, not of torch
    finally:
        tracemalloc.stop()
    index.search(mapped[:3], 2)
    del mapped
    gc.collect()
    np.testing.assert_array_equal(rows.numpy(), array)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "g", ">f8", "i1", "i2", "i4", "i8", ">i8", "u1", "u2", "u4", "u8"])
def test_values_are_those_of_numpys_conversion(rng, dtype):
    array = rng.integers(0, 120, (5, 6)).astype(dtype) / (1 if np.dtype(dtype).kind in "iu" else 3)
    array = array.astype(dtype)
    matrix = as_matrix(array, 6, "x")
    assert matrix.dtype == torch.float32
    np.testing.assert_array_equal(matrix.numpy(), array.astype(np.float32))


@pytest.mark.parametrize(
    "values", [np.arange(-6.0, 6).reshape(3, 4)[::-1, ::-1], np.arange(24.0).reshape(3, 8)[:, ::2]]
)
def test_strides(values):
    np.testing.assert_array_equal(as_matrix(values, 4, "x").numpy(), values.astype(np.float32))


def test_vectors_within_records():
    """Their rows lie apart by what is no multiple of a number's bytes, of which torch makes no tensor."""
    records = np.zeros(5, [("id", "u1"), ("vector", "f4", (4,))])
    records["vector"] = np.arange(20).reshape(5, 4)
    np.testing.assert_array_equal(as_matrix(records["vector"], 4, "x").numpy(), np.arange(20).reshape(5, 4))


def test_one_row_only_where_it_is_asked_for():
    row = np.arange(4.0)
    np.testing.assert_array_equal(as_matrix(row, 4, "x", one=True).numpy(), [[0, 1, 2, 3]])
    with pytest.raises(InvalidInputError, match=r"x must have shape \(n, 4\), got \(4,\)"):
        as_matrix(row, 4, "x")
    with pytest.raises(InvalidInputError, match=r"x must have shape \(n, 4\) or \(4,\), got \(5,\)"):
        as_matrix(np.arange(5.0), 4, "x", one=True)
    with pytest.raises(InvalidInputError, match=r"got \(\)"):
        as_matrix(np.array(3.0), 4, "x", one=True)


def test_no_rows_are_legal():
    assert as_matrix(np.empty((0, 4)), 4, "x").shape == (0, 4)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_the_first_bad_row_is_named(value, dtype):
    array = np.ones((9, 4), dtype=dtype)
    array[[5, 7], [0, 3]] = value
    for values in (array, torch.from_numpy(array)):
        with pytest.raises(InvalidInputError, match=r"x must be finite in float32.* row 5; 2 such rows of 9"):
            as_matrix(values, 4, "x")


def test_an_infinity_of_each_sign_does_not_cancel():
    array = np.ones((4, 4))
    array[2, :2] = [np.inf, -np.inf]
    with pytest.raises(InvalidInputError, match="row 2; 1 such rows of 4"):
        as_matrix(array, 4, "x")


def test_values_that_overflow_float32_are_refused_and_the_largest_are_not():
    array = np.full((2, 4), 3.4e38)
    np.testing.assert_array_equal(as_matrix(array, 4, "x").numpy(), array.astype(np.float32))
    array[1, 1] = 3.5e38
    with pytest.raises(InvalidInputError, match="row 1"):
        as_matrix(array, 4, "x")


def test_gradients_are_dropped():
    assert not as_matrix(torch.ones(2, 4, requires_grad=True), 4, "x").requires_grad


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([3, 1, 2], [3, 1, 2]),
        ((5,), [5]),
        ([], []),
        (np.array([7, 8], dtype=np.uint64), [7, 8]),
        (np.array([1, 2], dtype=np.int8), [1, 2]),
        (torch.tensor([4, 5], dtype=torch.int32), [4, 5]),
        (np.array([2**63 - 1, -(2**63)]), [2**63 - 1, -(2**63)]),
        (np.arange(10)[::-3], [9, 6, 3, 0]),
        (np.array([5, np.int8(6)], dtype=object), [5, 6]),  # as pandas hands out
    ],
)
def test_ids(values, expected):
    ids = as_ids(values, "ids")
    assert ids.dtype == np.int64
    assert ids.tolist() == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, 2.0], "ids must be integers, got dtype float64"),
        ([True, False], "ids must be integers, got dtype bool"),
        (["a"], "ids must be integers, got dtype <U1"),
        ([[1], [2]], r"ids must be a 1-d array of integers, got shape \(2, 1\)"),
        (3, r"ids must be a 1-d array of integers, got shape \(\)"),
        (np.array([2**63], dtype=np.uint64), "ids must fit in int64, got 9223372036854775808"),
        (torch.tensor([1.5]), "ids must be integers, got dtype float32"),
        (np.array([1, True], dtype=object), "ids must be integers, got dtype object"),
        (np.array([1, -(2**63) - 1], dtype=object), "ids must fit in int64, got -9223372036854775809"),
        (np.ma.masked_equal([1, 2], 2), "ids must be a plain array, got a masked one"),
    ],
)
def test_bad_ids_say_what_came(values, message):
    with pytest.raises(InvalidInputError, match=message):
        as_ids(values, "ids")


def test_results_come_back_as_the_kind_that_was_given():
    result = torch.arange(6.0).view(2, 3)
    as_numpy, as_torch = like(result, np.empty(0)), like(result, torch.empty(0))
    assert isinstance(as_numpy, np.ndarray)
    assert isinstance(as_torch, torch.Tensor)
    np.testing.assert_array_equal(as_numpy, [[0, 1, 2], [3, 4, 5]])
    assert torch.equal(as_torch, result)


def same(a, b):
    """Equal codes of form "mse"."""
    return torch.equal(a.packed, b.packed) and torch.equal(a.scales, b.scales)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_are_taken_at_their_value_in_float32(rng, dtype):
    quantizer = TurboQuantizer(24, 4)
    x = torch.from_numpy(rng.integers(0, 100, (7, 24)) / (1.0 if "int" in dtype else 7.0)).to(getattr(torch, dtype))
    expected = quantizer.encode(x.float())
    assert same(quantizer.encode(x), expected)
    products = quantizer.inner_product(x, expected)
    assert isinstance(products, torch.Tensor)
    assert torch.equal(products, quantizer.inner_product(x.float(), expected))
    if dtype != "bfloat16":  # which numpy lacks
        assert same(quantizer.encode(x.numpy()), expected)
        from_numpy = quantizer.inner_product(x.numpy(), expected)
        assert isinstance(from_numpy, np.ndarray)
        np.testing.assert_array_equal(from_numpy, products.numpy())


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "uint64", ">f4", ">i4"])
def test_numpys_other_dtypes(rng, dtype):
    quantizer = TurboQuantizer(24, 4)
    x = rng.integers(0, 100, (7, 24))
    assert same(quantizer.encode(x.astype(dtype)), quantizer.encode(x))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.ones((10, 64)), r"vectors must have shape \(n, 128\), got \(10, 64\)"),
        (np.ones(128), r"vectors must have shape \(n, 128\), got \(128,\)"),
        (torch.ones(2, 3, 128), r"vectors must have shape \(n, 128\), got \(2, 3, 128\)"),
        ([[1.0] * 128], "vectors must be a numpy array or a torch tensor, got list"),
        (np.ones((2, 128), dtype=bool), "vectors must be real numbers, got dtype bool"),
        (torch.ones(2, 128, dtype=torch.bool), "vectors must be real numbers, got dtype torch.bool"),
        (np.ones((2, 128), dtype=complex), "vectors must be real numbers, got dtype complex128"),
        (torch.ones(2, 128, dtype=torch.complex64), "vectors must be real numbers, got dtype torch.complex64"),
        (np.full((2, 128), "a"), "vectors must be real numbers, got dtype <U1"),
        (np.full((2, 128), None), "vectors must be real numbers, got dtype object"),
    ],
)
def test_bad_vectors_say_what_was_wanted_and_what_came(bad, message):
    with pytest.raises(InvalidInputError, match=message):
        TurboQuantizer(128).encode(bad)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e39])
@pytest.mark.parametrize("form", ["mse", "prod"])
def test_the_first_row_that_is_not_finite_is_named(rng, value, form):
    x = rng.standard_normal((100, 24))
    x[[41, 77], [3, 23]] = value
    with pytest.raises(InvalidInputError, match=r"vectors must be finite in float32.* in row 41; 2 such rows of 100"):
        TurboQuantizer(24, form=form).encode(x)


def test_bad_queries_say_both_shapes():
    quantizer = TurboQuantizer(24)
    codes = quantizer.encode(np.ones((1, 24)))
    with pytest.raises(InvalidInputError, match=r"queries must have shape \(n, 24\) or \(24,\), got \(3, 5\)"):
        quantizer.inner_product(np.ones((3, 5)), codes)
    with pytest.raises(InvalidInputError, match="queries must be finite"):
        quantizer.inner_product(np.full(24, np.nan), codes)
    with pytest.raises(InvalidInputError, match="got list"):
        quantizer.inner_product([1.0] * 24, codes)


def test_inputs_are_not_written_to(rng):
    for form in ("mse", "prod"):
        quantizer = TurboQuantizer(24, 4, form=form)
        for x in (
            rng.standard_normal((1, 24)).astype(np.float32),
            np.asfortranarray(rng.standard_normal((5, 24)).astype(np.float32)),
        ):
            before = x.copy()
            codes = quantizer.encode(x)
            packed, scales = codes.packed.clone(), codes.scales.clone()
            quantizer.inner_product(x, codes)
            quantizer.decode(codes)
            np.testing.assert_array_equal(x, before)
            assert torch.equal(codes.packed, packed)
            assert torch.equal(codes.scales, scales)
