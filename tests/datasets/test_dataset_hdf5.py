"""The ann-benchmarks format: whole, partial, malformed, and real."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tqsearch.datasets import load_dataset
from tqsearch.errors import DatasetError

h5py = pytest.importorskip("h5py", reason="h5py is not installed: pip install 'tqsearch[bench]'")


def fields(n: int = 20, q: int = 3, d: int = 4, k: int = 5) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    return {
        "train": rng.standard_normal((n, d)).astype(np.float32),
        "test": rng.standard_normal((q, d)).astype(np.float32),
        "neighbors": rng.integers(0, n, (q, k)).astype(np.int32),
        "distances": rng.random((q, k)).astype(np.float32),
    }


def write(path: Path, arrays: dict[str, Any], distance: object = "angular", **options: object) -> Path:
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array, **options)
        if distance is not None:
            file.attrs["distance"] = distance
    return path


@pytest.mark.parametrize("options", [{}, {"chunks": (2, 2)}, {"compression": "gzip"}])
def test_reads_what_was_written(tmp_path: Path, options: dict[str, object]) -> None:
    wanted = fields()
    data = load_dataset(write(tmp_path / "some.hdf5", wanted, **options))
    assert (data.name, data.metric, data.dim) == ("some", "cosine", 4)
    for name, array in wanted.items():
        got = getattr(data, name)
        np.testing.assert_array_equal(got, array)
        assert got.dtype == array.dtype
    assert data.train.flags.writeable == bool(options), "mapped, and so read-only, when in one piece"


@pytest.mark.parametrize(
    ("word", "metric"), [("angular", "cosine"), ("euclidean", "l2"), ("dot", "ip"), (b"angular", "cosine")]
)
def test_metric_of_the_attribute(tmp_path: Path, word: object, metric: str) -> None:
    assert load_dataset(write(tmp_path / "x-dot.hdf5", fields(), word)).metric == metric


@pytest.mark.parametrize(("end", "metric"), [("angular", "cosine"), ("euclidean", "l2"), ("dot", "ip")])
def test_metric_of_the_name_without_attribute(tmp_path: Path, end: str, metric: str) -> None:
    assert load_dataset(write(tmp_path / f"x-4-{end}.hdf5", fields(), None)).metric == metric


def test_metric_unknown_asked_for_and_contradicted(tmp_path: Path) -> None:
    silent = write(tmp_path / "x.hdf5", fields(), None)
    with pytest.raises(DatasetError, match=r"expected the attribute distance, found none.*rename"):
        load_dataset(silent)
    assert load_dataset(silent, metric="ip").metric == "ip"
    with pytest.raises(DatasetError, match="'l2' was asked for, but the file says 'angular'"):
        load_dataset(write(tmp_path / "y.hdf5", fields()), metric="l2")
    with pytest.raises(DatasetError, match="found 'jaccard'"):
        load_dataset(write(tmp_path / "z.hdf5", fields(), "jaccard"))


def test_groups_are_no_neighbors(tmp_path: Path) -> None:
    path = write(tmp_path / "x-dot.hdf5", {name: fields()[name] for name in ("train", "test")})
    with h5py.File(path, "a") as file:
        file.create_group("neighbors")
        file.create_group("distances")
    data = load_dataset(path)
    assert data.neighbors is None
    assert data.distances is None


def test_neighbors_may_be_missing_and_queries_become_float32(tmp_path: Path) -> None:
    arrays = {"train": fields()["train"].astype(np.float64), "test": fields()["test"].astype(np.float64)}
    data = load_dataset(write(tmp_path / "x.hdf5", arrays))
    assert data.neighbors is None
    assert data.distances is None
    assert data.test.dtype == np.float32
    assert data.train.dtype == np.float64


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("test", np.zeros((3, 5), np.float32), r"test must have shape \(q, 4\)"),
        ("train", np.zeros(4, np.float32), "train must be a matrix"),
        ("train", np.zeros((0, 4), np.float32), "train must be a matrix"),
        ("neighbors", np.zeros((2, 5), np.int32), r"neighbors must be integers \(3, k\)"),
        ("neighbors", np.full((3, 5), 20), "neighbors must be in 0 to 19, got 20"),
        ("neighbors", np.full((3, 5), -1), "neighbors must be in 0 to 19, got -1"),
        ("distances", np.zeros((3, 4)), r"distances must be of the shape of neighbors, \(3, 5\)"),
        ("test", np.array([[b"a"] * 4]), "expected numbers in test"),
    ],
)
def test_fields_that_do_not_fit(tmp_path: Path, field: str, value: Any, message: str) -> None:
    path = write(tmp_path / "x.hdf5", {**fields(), field: value})
    with pytest.raises(DatasetError, match=rf"x\.hdf5: {message}"):
        load_dataset(path)


@pytest.mark.parametrize("field", ["train", "test"])
def test_missing_field_is_named(tmp_path: Path, field: str) -> None:
    arrays = fields()
    del arrays[field]
    with pytest.raises(DatasetError, match="expected the fields train and test, found distances"):
        load_dataset(write(tmp_path / "x.hdf5", arrays))


def test_truncated_and_foreign_files(tmp_path: Path) -> None:
    path = write(tmp_path / "x.hdf5", fields(n=500))
    whole = path.read_bytes()
    for length in (len(whole) // 2, 100, 0):
        path.write_bytes(whole[:length])
        with pytest.raises(DatasetError, match=f"expected a whole HDF5 file, found {length} bytes"):
            load_dataset(path)
    with pytest.raises(DatasetError, match="no such file"):
        load_dataset(tmp_path / "y.hdf5")


def test_without_h5py_the_error_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "x.hdf5", fields())
    for name in [name for name in sys.modules if name.split(".")[0] == "h5py"]:
        monkeypatch.delitem(sys.modules, name)

    class NoH5py:
        @staticmethod
        def find_spec(name: str, *_: object) -> None:
            if name == "h5py":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys, "meta_path", [NoH5py, *sys.meta_path])
    with pytest.raises(DatasetError, match=r"h5py is needed to read x\.hdf5: pip install 'tqsearch\[bench\]'"):
        load_dataset(path)


@pytest.mark.parametrize(
    ("name", "metric", "shape"),
    [
        ("sift-4800-128-euclidean", "l2", (4800, 128)),
        ("deep-1900-96-angular", "cosine", (1900, 96)),
        ("mnist-10k-784-euclidean", "l2", (10_000, 784)),
        ("minilm-100k-384-angular", "cosine", (100_000, 384)),
    ],
)
def test_real_files_by_name(
    shared_data: Path, monkeypatch: pytest.MonkeyPatch, name: str, metric: str, shape: tuple[int, int]
) -> None:
    if not (shared_data / f"{name}.hdf5").is_file():
        pytest.skip(f"{shared_data} has no {name}.hdf5")
    monkeypatch.setenv("TQSEARCH_DATA", str(shared_data))
    data = load_dataset(name)
    assert (data.name, data.metric) == (name, metric)
    assert data.neighbors is not None
    assert data.neighbors.shape == (len(data.test), 100)
    with h5py.File(shared_data / f"{name}.hdf5") as file:
        assert data.train.shape == file["train"].shape
        np.testing.assert_array_equal(data.train[-50:], file["train"][-50:])
    np.testing.assert_array_equal(data.ground_truth(10), data.neighbors[:, :10])
