"""Files that hold one matrix of vectors, mapped into memory.

================================  ======================================================  ==========================
suffix                            layout, little-endian                                   components
================================  ======================================================  ==========================
`.fvecs`, `.ivecs`, `.bvecs`      a row: its dimension d as int32, then d components      float32, int32, uint8
`.fbin`, `.ibin`                  n and d as uint32, then n rows of d components          float32, int32
`.u8bin`, `.i8bin`                the same                                                uint8, int8
`.npy`                            NumPy's own                                             any real type
================================  ======================================================  ==========================
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tqsearch.errors import DatasetError

ROWS_TYPES = {".fvecs": "<f4", ".ivecs": "<i4", ".bvecs": "u1"}
MATRIX_TYPES = {".fbin": "<f4", ".ibin": "<i4", ".u8bin": "u1", ".i8bin": "i1"}
VECTOR_SUFFIXES = (*ROWS_TYPES, *MATRIX_TYPES, ".npy")

CHECKED_ROWS = 1 << 20  # of a longer file with a dimension in every row, this many, evenly spread, are checked


def read_vectors(path: str | os.PathLike[str]) -> NDArray[Any]:
    """Read a file of vectors; its suffix says the format, and the module's docstring lists them.

    Args:
        path: of the file.

    Returns:
        (n, dim), mapped into memory and read-only, of the type the file holds. In `.fvecs`, `.ivecs` and `.bvecs` there
        are gaps between the rows: `numpy.ascontiguousarray` makes a copy without.

    Raises:
        DatasetError: there is no such file, its suffix is unknown, or it is malformed or truncated.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in VECTOR_SUFFIXES:
        known = ", ".join(VECTOR_SUFFIXES)
        raise DatasetError(f"{path}: the suffix must be one of {known}, got {suffix or 'none'}")
    try:
        size = path.stat().st_size
        if suffix in ROWS_TYPES:
            return _read_rows(path, size, np.dtype(ROWS_TYPES[suffix]))
        if suffix in MATRIX_TYPES:
            return _read_matrix(path, size, np.dtype(MATRIX_TYPES[suffix]))
        return _read_npy(path, size)
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read: {error.strerror or error}") from error


def _read_rows(path: Path, size: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """A file in which every row begins with its dimension."""
    if size < 4:
        raise DatasetError(f"{path}: expected a row that begins with 4 bytes of dimension, found {size} bytes")
    dim = int(np.fromfile(path, "<i4", 1)[0])
    row_bytes = 4 + dim * dtype.itemsize
    if dim < 1 or row_bytes > size:
        raise DatasetError(
            f"{path}: the first row says dimension {dim}: expected at least 1,"
            f" and {row_bytes} bytes a row; found {size} bytes"
        )
    rows, rest = divmod(size, row_bytes)
    if rest:
        raise DatasetError(
            f"{path}: expected whole rows of {row_bytes} bytes (dimension {dim}),"
            f" found {size} bytes: {rows} rows and {rest} bytes over; truncated, or rows of different dimensions"
        )
    raw = _map(path, np.dtype("u1"), (rows, row_bytes), 0)
    some = np.arange(0, rows, -(-rows // CHECKED_ROWS))
    some[-1] = rows - 1
    dims = np.ascontiguousarray(raw[some, :4]).view("<i4")[:, 0]
    wrong = np.flatnonzero(dims != dim)
    if wrong.size:
        raise DatasetError(
            f"{path}: expected dimension {dim} in every row, found {dims[wrong[0]]} in row {some[wrong[0]]}"
        )
    return raw[:, 4:].view(dtype)


def _read_matrix(path: Path, size: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """A file that begins with the number of rows and the dimension."""
    if size < 8:
        raise DatasetError(f"{path}: expected a header of 8 bytes, n and d as uint32, found {size} bytes")
    rows, dim = (int(number) for number in np.fromfile(path, "<u4", 2))
    expected = 8 + rows * dim * dtype.itemsize
    if rows < 1 or dim < 1 or size != expected:
        raise DatasetError(
            f"{path}: the header says {rows} rows of dimension {dim}: expected at least 1 of each,"
            f" and {expected} bytes; found {size} bytes"
        )
    return _map(path, dtype, (rows, dim), 8)


def _read_npy(path: Path, size: int) -> NDArray[Any]:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise DatasetError(f"{path}: expected a whole NumPy array, found {size} bytes that are not: {error}") from error
    if array.ndim != 2 or 0 in array.shape or array.dtype.kind not in "fiu":
        raise DatasetError(
            f"{path}: expected a matrix of real numbers with at least one row and column,"
            f" found shape {array.shape}, dtype {array.dtype}"
        )
    return np.asarray(array)


def _map(path: Path, dtype: np.dtype[Any], shape: tuple[int, int], offset: int) -> NDArray[Any]:
    """A read-only view of a part of the file."""
    return np.asarray(np.memmap(path, dtype, mode="r", offset=offset, shape=shape))
