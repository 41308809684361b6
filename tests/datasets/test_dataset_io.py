"""Every format, written here with struct and tofile, and what is said of files that are not whole."""

import struct
from pathlib import Path

import numpy as np
import pytest

from tqsearch.datasets import read_vectors
from tqsearch.errors import DatasetError

ROWS = {".fvecs": "f", ".ivecs": "i", ".bvecs": "B"}
MATRIX = {".fbin": "<f4", ".ibin": "<i4", ".u8bin": "u1", ".i8bin": "i1"}


def write_rows(path: Path, rows: np.ndarray) -> None:
    letter = ROWS[path.suffix]
    with path.open("wb") as file:
        for row in rows.tolist():
            file.write(struct.pack(f"<i{len(row)}{letter}", len(row), *row))


def write_matrix(path: Path, rows: np.ndarray) -> None:
    with path.open("wb") as file:
        file.write(struct.pack("<II", *rows.shape))
        rows.astype(MATRIX[path.suffix]).tofile(file)


def numbers(suffix: str, shape: tuple[int, int] = (7, 5)) -> np.ndarray:
    rng = np.random.default_rng(3)
    if suffix.startswith(".f"):
        return rng.standard_normal(shape).astype(np.float32)
    if suffix in (".bvecs", ".u8bin"):
        return rng.integers(0, 256, shape, dtype=np.uint8)
    if suffix == ".i8bin":
        return rng.integers(-128, 128, shape, dtype=np.int8)
    return rng.integers(-(2**31), 2**31, shape, dtype=np.int32)


@pytest.mark.parametrize("shape", [(7, 5), (1, 1), (1, 9), (9, 1)])
@pytest.mark.parametrize("suffix", [*ROWS, *MATRIX])
def test_reads_what_was_written(tmp_path: Path, suffix: str, shape: tuple[int, int]) -> None:
    path = tmp_path / f"x{suffix}"
    wanted = numbers(suffix, shape)
    (write_rows if suffix in ROWS else write_matrix)(path, wanted)
    got = read_vectors(path)
    assert got.dtype == wanted.dtype
    np.testing.assert_array_equal(got, wanted)
    assert not got.flags.writeable


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2", "u1", "<i8"])
def test_reads_npy_of_any_real_type(tmp_path: Path, dtype: str) -> None:
    wanted = np.arange(12).reshape(4, 3).astype(dtype)
    np.save(tmp_path / "x.npy", wanted)
    got = read_vectors(str(tmp_path / "x.npy"))
    assert got.dtype == wanted.dtype
    np.testing.assert_array_equal(got, wanted)
    assert not got.flags.writeable


@pytest.mark.parametrize("suffix", [*ROWS, *MATRIX, ".npy"])
def test_truncated_files_say_what_was_expected_and_found(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    if suffix == ".npy":
        np.save(path, numbers(".fvecs"))
    else:
        (write_rows if suffix in ROWS else write_matrix)(path, numbers(suffix))
    whole = path.read_bytes()
    for length in (len(whole) - 1, len(whole) // 2 + 1, 3, 0):
        path.write_bytes(whole[:length])
        with pytest.raises(DatasetError, match=rf"x\{suffix}: .*expected .*found {length} bytes"):
            read_vectors(path)


@pytest.mark.parametrize("suffix", [*ROWS, *MATRIX])
def test_bytes_too_many_are_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    (write_rows if suffix in ROWS else write_matrix)(path, numbers(suffix))
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(DatasetError, match=r"expected .*found"):
        read_vectors(path)


@pytest.mark.parametrize("dim", [0, -1, 2**31 - 1])
def test_senseless_dimension_in_rows(tmp_path: Path, dim: int) -> None:
    (tmp_path / "x.fvecs").write_bytes(struct.pack("<i4f", dim, 1, 2, 3, 4))
    with pytest.raises(DatasetError, match=f"dimension {dim}"):
        read_vectors(tmp_path / "x.fvecs")


@pytest.mark.parametrize(("n", "d"), [(0, 4), (4, 0), (2**32 - 1, 2**32 - 1)])
def test_senseless_header_of_matrix(tmp_path: Path, n: int, d: int) -> None:
    (tmp_path / "x.fbin").write_bytes(struct.pack("<II", n, d))
    with pytest.raises(DatasetError, match=f"{n} rows of dimension {d}"):
        read_vectors(tmp_path / "x.fbin")


@pytest.mark.parametrize("row", [1, 3, 6])
def test_another_dimension_in_one_row(tmp_path: Path, row: int) -> None:
    path = tmp_path / "x.bvecs"
    write_rows(path, numbers(".bvecs"))
    content = bytearray(path.read_bytes())
    content[row * 9] = 6
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=f"expected dimension 5 in every row, found 6 in row {row}"):
        read_vectors(path)


@pytest.mark.parametrize(
    "array", [np.zeros(3), np.zeros((2, 2, 2)), np.zeros((0, 3)), np.zeros((2, 2), complex), np.array([["a"]])]
)
def test_npy_must_be_a_matrix_of_real_numbers(tmp_path: Path, array: np.ndarray) -> None:
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(DatasetError, match=r"x\.npy: expected"):
        read_vectors(tmp_path / "x.npy")


def test_npy_with_objects_is_never_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([[{}]], dtype=object), allow_pickle=True)
    with pytest.raises(DatasetError, match=r"x\.npy: expected"):
        read_vectors(tmp_path / "x.npy")


def test_missing_file_and_unknown_suffix(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="No such file"):
        read_vectors(tmp_path / "x.fvecs")
    with pytest.raises(DatasetError, match=r"one of \.fvecs, .*got \.txt"):
        read_vectors(tmp_path / "x.txt")
