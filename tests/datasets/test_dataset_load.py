"""Names, paths and folders; nothing here goes to a network."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tqsearch import datasets
from tqsearch.datasets import Dataset, list_datasets, load_dataset
from tqsearch.datasets.registry import REGISTRY
from tqsearch.errors import DatasetError, InvalidInputError


def vectors(n: int, d: int = 4, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


def write_rows(path: Path, rows: np.ndarray) -> None:
    heads = np.full((len(rows), 1), rows.shape[1], "<i4")
    np.hstack((heads.view("u1"), np.ascontiguousarray(rows).view("u1"))).tofile(path)


def test_public_names_are_sorted_and_light() -> None:
    assert datasets.__all__ == sorted(datasets.__all__)
    # None in sys.modules makes an import fail, so that what the package imports for its other parts does not count.
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('h5py', 'tqdm', 'platformdirs', 'matplotlib')));"
        "from tqsearch.datasets import synthetic_embeddings;"
        "print(synthetic_embeddings(50, 4, 2).ground_truth(1).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "(2, 1)"), done.stderr


def test_registry_is_consistent() -> None:
    assert list_datasets() == sorted({*REGISTRY, "synthetic-embeddings"})
    for name, entry in REGISTRY.items():
        assert entry.name == name
        assert entry.file_name == f"{name}.hdf5"
        assert entry.url.startswith("https://")
        assert entry.url.endswith(f"/{entry.file_name}")
        assert entry.sha256 is None or re.fullmatch("[0-9a-f]{64}", entry.sha256)
        assert str(entry.dim) in name or name == "lastfm-64-dot"
        assert entry.size is None or entry.size > 4 * entry.n * entry.dim


@pytest.mark.parametrize(
    ("asked", "meant"), [("sift-128-euclidian", "sift-128-euclidean"), ("synthetic", "synthetic-embeddings")]
)
def test_unknown_name_names_close_matches(asked: str, meant: str) -> None:
    with pytest.raises(DatasetError, match=rf"'{asked}': did you mean .*{meant}.*TQSEARCH_DATA"):
        load_dataset(asked)


def test_unknown_name_without_a_close_match_lists_all() -> None:
    with pytest.raises(DatasetError, match=r"known are coco-i2i.*synthetic-embeddings\."):
        load_dataset("qqqqqq")


@pytest.mark.parametrize("path", [Path("qqqqqq"), "./qqqqqq", "x.fvecs", "x.hdf5"])
def test_missing_path(path: Path | str) -> None:
    with pytest.raises(DatasetError, match="no such file or folder"):
        load_dataset(path)


def test_wrong_metric(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", vectors(20))
    with pytest.raises(InvalidInputError, match="metric must be one of cosine, ip, l2, got 'hamming'"):
        load_dataset(tmp_path / "x.npy", metric="hamming")  # type: ignore[arg-type]
    with pytest.raises(DatasetError, match="'l2' was asked for"):
        load_dataset("synthetic-embeddings", metric="l2")


def test_texmex_naming(tmp_path: Path) -> None:
    base, queries, truth = vectors(50), vectors(3, seed=1), np.arange(6, dtype=np.int32).reshape(3, 2)
    for role, rows in {"base": base, "query": queries, "learn": base}.items():
        write_rows(tmp_path / f"siftsmall_{role}.fvecs", rows)
    write_rows(tmp_path / "siftsmall_groundtruth.ivecs", truth)
    for place in (tmp_path / "siftsmall_base.fvecs", tmp_path, str(tmp_path)):
        data = load_dataset(place)
        assert (data.name, data.metric) == ("siftsmall", "l2")
        np.testing.assert_array_equal(data.train, base)
        np.testing.assert_array_equal(data.test, queries)
        assert data.neighbors is not None
        np.testing.assert_array_equal(data.ground_truth(2), truth)
        assert data.distances is None


def test_names_without_a_prefix_and_other_suffixes(tmp_path: Path) -> None:
    folder = tmp_path / "mine-angular"
    folder.mkdir()
    np.save(folder / "base.npy", vectors(50))
    np.save(folder / "query.npy", vectors(5, seed=1).astype(np.float64))
    data = load_dataset(folder)
    assert (data.name, data.metric, data.neighbors) == ("mine-angular", "cosine", None)
    assert data.test.dtype == np.float32
    assert load_dataset(folder, metric="ip").metric == "ip"


@pytest.mark.parametrize(("n", "held_out"), [(10, 1), (99, 9), (20_000, 1000)])
def test_lone_file_holds_out_its_last_rows(tmp_path: Path, n: int, held_out: int) -> None:
    rows = vectors(n)
    np.save(tmp_path / "x.npy", rows)
    data = load_dataset(tmp_path / "x.npy")
    assert (data.name, data.metric) == ("x", "l2")
    np.testing.assert_array_equal(data.train, rows[:-held_out])
    np.testing.assert_array_equal(data.test, rows[-held_out:])
    assert data.test.flags.writeable


def test_lone_file_too_short(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", vectors(9))
    with pytest.raises(DatasetError, match=r"expected at least 10 rows.*found 9"):
        load_dataset(tmp_path / "x.npy")


def test_siblings_that_do_not_fit(tmp_path: Path) -> None:
    np.save(tmp_path / "x_base.npy", vectors(20))
    np.save(tmp_path / "x_query.npy", vectors(3, d=5))
    with pytest.raises(DatasetError, match=r"x_base.npy: test must have shape \(q, 4\)"):
        load_dataset(tmp_path / "x_base.npy")
    write_rows(tmp_path / "x_query.fvecs", vectors(3))
    with pytest.raises(DatasetError, match=r"expected one file x_query\.\*, found x_query.fvecs, x_query.npy"):
        load_dataset(tmp_path / "x_base.npy")


def test_folder_without_or_with_two_data_sets(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="found none: give its path"):
        load_dataset(tmp_path)
    for name in ("a", "b"):
        np.save(tmp_path / f"{name}.npy", vectors(20))
    with pytest.raises(DatasetError, match=r"found a\.npy, b\.npy: give its path"):
        load_dataset(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": "hamming"}, "metric must be one of"),
        ({"train": np.zeros((5, 4), complex)}, "train must be a matrix of numbers"),
        ({"test": np.zeros((2, 4))}, "test must be float32, got float64"),
        ({"test": np.zeros((2, 3), np.float32)}, r"test must have shape \(q, 4\)"),
        ({"neighbors": np.zeros((2, 1))}, "neighbors must be integers"),
        ({"distances": np.zeros((2, 1))}, "distances must be None without neighbors"),
    ],
)
def test_parts_that_do_not_fit(change: dict[str, object], message: str) -> None:
    parts = {"name": "x", "metric": "l2", "train": np.zeros((5, 4)), "test": np.zeros((2, 4), np.float32), **change}
    with pytest.raises(InvalidInputError, match=message):
        Dataset(**parts)  # type: ignore[arg-type]
