"""Files of ann-benchmarks: HDF5 with `train`, `test`, `neighbors`, `distances` and the attribute `distance`."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tqsearch.datasets.dataset import Dataset
from tqsearch.datasets.metric import Metric, metric_from_name, metric_from_word
from tqsearch.datasets.optional import needs
from tqsearch.errors import DatasetError, InvalidInputError


def read_hdf5(path: str | os.PathLike[str], metric: Metric | None = None) -> Dataset:
    """Read a file in the format of ann-benchmarks.

    Args:
        path: of the file.
        metric: for a file without the attribute `distance` whose name does not end with a metric, as
            `sift-128-euclidean.hdf5` does. It must not contradict the attribute, for which the neighbours hold.

    Returns:
        The data set; `train` is mapped into memory, read-only, if the file holds it in one piece, as ann-benchmarks'
        do, and loaded otherwise. `neighbors` and `distances` are None where the file has none.

    Raises:
        DatasetError: the file is missing, truncated or malformed, its metric is not one of ours or is not known, or
            h5py is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise DatasetError(f"{path}: there is no such file")
    h5py = needs("h5py", f"read {path.name}")
    try:
        with h5py.File(path, "r") as file:
            for field in ("train", "test"):
                if not isinstance(file.get(field), h5py.Dataset):
                    raise DatasetError(f"{path}: expected the fields train and test, found {', '.join(file) or 'none'}")
            found = _metric(path, file.attrs.get("distance"), metric)
            test = file["test"]
            if test.dtype.kind not in "fiu":
                raise DatasetError(f"{path}: expected numbers in test, found dtype {test.dtype}")
            queries = np.asarray(test[()], np.float32)
            neighbors, distances = (
                file[field][()] if isinstance(file.get(field), h5py.Dataset) else None
                for field in ("neighbors", "distances")
            )
            train = _array(path, file["train"])
    except OSError as error:  # what h5py raises for a file that is cut short or not HDF5
        raise DatasetError(f"{path}: expected a whole HDF5 file, found {path.stat().st_size} bytes: {error}") from error
    try:
        return Dataset(path.stem, found, train, queries, neighbors, distances)
    except InvalidInputError as error:
        raise DatasetError(f"{path}: {error}") from error


def _metric(path: Path, attribute: Any, wanted: Metric | None) -> Metric:
    """The metric of the attribute, else the one asked for, else the one the file's name ends with."""
    if attribute is None:
        found = wanted or metric_from_name(path.stem)
        if found is None:
            raise DatasetError(
                f"{path}: expected the attribute distance, found none, and the name does not end with a metric:"
                " rename the file to end with -angular, -euclidean or -dot, or give metric"
            )
        return found
    word = attribute.decode() if isinstance(attribute, bytes) else str(attribute)
    found = metric_from_word(word)
    if found is None:
        raise DatasetError(
            f"{path}: expected distance angular, euclidean or dot, found {word!r}, which is not supported"
        )
    if wanted not in (None, found):
        raise DatasetError(f"{path}: metric {wanted!r} was asked for, but the file says {word!r}")
    return found


def _array(path: Path, data: Any) -> NDArray[Any]:
    """A field of the file, mapped where it lies there in one piece."""
    offset = data.id.get_offset()  # None where it is chunked, compressed or empty
    if offset is None or data.file.userblock_size or data.external or data.is_virtual or data.dtype.kind not in "fiu":
        return np.asarray(data[()])
    return np.asarray(np.memmap(path, data.dtype, mode="r", offset=offset, shape=data.shape))
