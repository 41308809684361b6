"""Data sets by name or by path."""

import difflib
import os
import re
from pathlib import Path

import numpy as np

from tqsearch.datasets.dataset import Dataset
from tqsearch.datasets.download import FOLDER_VARIABLE, fetch, find_file
from tqsearch.datasets.hdf5 import read_hdf5
from tqsearch.datasets.io import VECTOR_SUFFIXES, read_vectors
from tqsearch.datasets.metric import METRICS, Metric, metric_from_name
from tqsearch.datasets.registry import REGISTRY, SYNTHETIC_NAME
from tqsearch.datasets.synthetic import synthetic_embeddings
from tqsearch.errors import DatasetError, InvalidInputError

HDF5_SUFFIXES = (".hdf5", ".h5")
HELD_OUT = 1_000

_BASE = re.compile(r"(?:(?P<set>.*)[._-])?base", re.IGNORECASE)


def list_datasets() -> list[str]:
    """The names that `load_dataset` knows, sorted; the generated set `synthetic-embeddings` is one of them."""
    return sorted((*REGISTRY, SYNTHETIC_NAME))


def load_dataset(name_or_path: str | os.PathLike[str], *, metric: Metric | None = None) -> Dataset:
    """Load a data set by its name, or from a file or folder of one's own.

    A name is one of `list_datasets()`, which is downloaded once, or that of a file `NAME.hdf5` in `$TQSEARCH_DATA` or
    in the cache. Anything else is a path, of one of these:

    - an ann-benchmarks file, `.hdf5`;
    - `X_base.fvecs`, the naming of TEXMEX, with any suffix that `read_vectors` knows: the queries are those of
      `X_query.*`, the neighbours those of `X_groundtruth.*`, if there is one;
    - any other file of vectors: **the last min(1000, n // 10) rows are held out as queries**, and the base is the rest;
    - a folder that holds exactly one of these.

    Args:
        name_or_path: the name or the path.
        metric: of the vectors, where the file does not say. Without it, a file of plain vectors has the metric that its
            name ends with (`x-angular.npy`), else `l2`, that of TEXMEX.

    Returns:
        The data set.

    Raises:
        DatasetError: there is no such data set (the message names close matches), it cannot be downloaded, or a file is
            malformed.
    """
    if metric not in (None, *METRICS):
        raise InvalidInputError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
    text = os.fspath(name_or_path)
    if text == SYNTHETIC_NAME:
        if metric not in (None, "cosine"):
            raise DatasetError(f"{SYNTHETIC_NAME}: metric {metric!r} was asked for, but the set's is 'cosine'")
        return synthetic_embeddings()
    if text in REGISTRY:
        return _registered(text, metric)
    path = Path(text).expanduser()
    if path.is_dir():
        return _load_file(_only_file(path), metric)
    if path.is_file():
        return _load_file(path, metric)
    plain = isinstance(name_or_path, str) and path.name == text
    if plain and (found := find_file(text)):
        return _load_file(found, metric)
    if not plain or path.suffix.lower() in (*HDF5_SUFFIXES, *VECTOR_SUFFIXES):
        raise DatasetError(f"{path}: there is no such file or folder")
    close = difflib.get_close_matches(text, list_datasets(), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(list_datasets())}."
    raise DatasetError(
        f"no data set is called {text!r}: {hint} A file {text}.hdf5 of your own is found in the folder"
        f" that ${FOLDER_VARIABLE} names, and a path is taken as well"
    )


def _registered(name: str, metric: Metric | None) -> Dataset:
    entry = REGISTRY[name]
    data = read_hdf5(fetch(entry), metric)
    if (data.metric, data.train.shape) != (entry.metric, (entry.n, entry.dim)):
        raise DatasetError(
            f"{name}: expected {entry.n} vectors of dimension {entry.dim} with metric {entry.metric},"
            f" found {data.train.shape[0]} of {data.dim} with {data.metric}: a part of it needs another name"
        )
    return data


def _only_file(folder: Path) -> Path:
    """The one data set in a folder."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    vectors = [path for path in files if path.suffix.lower() in VECTOR_SUFFIXES]
    hdf5 = [path for path in files if path.suffix.lower() in HDF5_SUFFIXES]
    bases = [path for path in vectors if _BASE.fullmatch(path.stem)]
    candidates = hdf5 + (bases or vectors)
    if len(candidates) != 1:
        found = ", ".join(path.name for path in candidates) or "none"
        raise DatasetError(
            f"{folder}: expected one .hdf5, one *_base.* or one file of vectors, found {found}: give its path"
        )
    return candidates[0]


def _load_file(path: Path, metric: Metric | None) -> Dataset:
    if path.suffix.lower() in HDF5_SUFFIXES:
        return read_hdf5(path, metric)
    vectors = read_vectors(path)
    base = _BASE.fullmatch(path.stem)
    name = (base["set"] or path.resolve().parent.name) if base else path.stem
    metric = metric or metric_from_name(name) or "l2"
    queries = _sibling(path, "query") if base else None
    truth = _sibling(path, "groundtruth") if base else None
    try:
        if queries is not None:
            test = np.array(read_vectors(queries), np.float32, order="C")
            return Dataset(name, metric, vectors, test, None if truth is None else np.array(read_vectors(truth)))
        held_out = min(HELD_OUT, len(vectors) // 10)
        if held_out == 0:
            raise DatasetError(
                f"{path}: expected at least 10 rows, of which a tenth becomes queries, found {len(vectors)}"
            )
        return Dataset(name, metric, vectors[:-held_out], np.array(vectors[-held_out:], np.float32, order="C"))
    except InvalidInputError as error:
        raise DatasetError(f"{path}: {error}") from error


def _sibling(base: Path, role: str) -> Path | None:
    """The file beside `X_base.*` that is called `X_query.*` or the like, or None."""
    stem = base.stem[: -len("base")] + role
    found = sorted(p for p in base.parent.glob("*") if p.stem == stem and p.suffix.lower() in VECTOR_SUFFIXES)
    if len(found) > 1:
        raise DatasetError(f"{base.parent}: expected one file {stem}.*, found {', '.join(p.name for p in found)}")
    return found[0] if found else None
