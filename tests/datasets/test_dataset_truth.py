"""Ground truth against brute force in float64 that shares no code with it."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tqsearch.datasets import Dataset, load_dataset, truth
from tqsearch.errors import InvalidInputError

METRICS = ["cosine", "ip", "l2"]


def similarity(train: Any, test: Any, metric: str) -> np.ndarray:
    base, queries = np.asarray(train, np.float64), np.asarray(test, np.float64)
    if metric == "l2":
        return -np.stack([((base - q) ** 2).sum(1) for q in queries])
    scores = np.stack([(base * q).sum(1) for q in queries])
    if metric == "cosine":
        lengths = np.sqrt((base**2).sum(1)) * np.sqrt((queries**2).sum(1))[:, None]
        scores = np.where(lengths > 0, scores / np.where(lengths > 0, lengths, 1), 0)
    return scores


def check(data: Dataset, k: int) -> None:
    """Ids through their scores: equal to the k largest, whatever the order of ties, and no id twice."""
    got = data.ground_truth(k)
    assert got.shape == (len(data.test), k)
    assert got.dtype == np.int64
    assert all(len(set(row)) == k for row in got.tolist())
    scores = similarity(data.train, data.test, data.metric)
    best = -np.sort(-scores, axis=1)[:, :k]
    scale = np.abs(scores).max()
    np.testing.assert_allclose(np.take_along_axis(scores, got, axis=1), best, rtol=0, atol=1e-13 * scale)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("n", "d", "q", "k"), [(1, 1, 1, 1), (63, 3, 5, 63), (1000, 17, 9, 10), (9001, 24, 513, 3)])
def test_equal_to_brute_force(metric: Any, n: int, d: int, q: int, k: int) -> None:
    rng = np.random.default_rng(n)
    train, test = (rng.standard_normal((rows, d)).astype(np.float32) for rows in (n, q))
    check(Dataset("x", metric, train, test), k)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("block", [64, 1000, 1 << 14])
def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch, metric: Any, block: int) -> None:
    rng = np.random.default_rng(2)
    data = Dataset("x", metric, rng.standard_normal((3000, 8)), rng.standard_normal((20, 8)).astype(np.float32))
    wanted = data.ground_truth(5)
    monkeypatch.setattr(truth, "BLOCK_FLOATS", block)
    monkeypatch.setattr(truth, "QUERY_ROWS", 7)
    np.testing.assert_array_equal(data.ground_truth(5), wanted)


@pytest.mark.parametrize("metric", METRICS)
def test_neighbours_closer_than_float32_can_tell(metric: Any) -> None:
    """Far more base vectors than candidates, all within rounding of each other, far from the origin."""
    rng = np.random.default_rng(5)
    train = 1000 + rng.standard_normal((2000, 16)) * 1e-5
    test = (1000 + rng.standard_normal((4, 16))).astype(np.float32)
    data = Dataset("x", metric, train, test)
    got = data.ground_truth(10)
    scores = similarity(train, test, metric)
    worst = np.take_along_axis(scores, got, axis=1).min(axis=1)
    best = -np.sort(-scores, axis=1)[:, 9]
    assert np.all(worst >= best - 4 * np.spacing(np.abs(best)))
    spread = scores.max(axis=1) - scores.min(axis=1)
    assert np.all(spread > 100 * np.spacing(np.abs(best))), "float64 can tell them apart, so the check above is sharp"


@pytest.mark.parametrize("metric", METRICS)
def test_ties_are_in_the_order_of_ids(metric: Any) -> None:
    train = np.tile(np.array([[1, 2, 3], [3, 2, 1]], np.float32), (500, 1))
    data = Dataset("x", metric, train, np.array([[1, 2, 3.5]], np.float32))
    np.testing.assert_array_equal(data.ground_truth(20), [np.arange(0, 40, 2)])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", ["u1", "i1", "f2", "f8"])
def test_other_types_and_zero_vectors(metric: Any, dtype: str) -> None:
    rng = np.random.default_rng(4)
    train = rng.integers(0, 100, (300, 6)).astype(dtype)
    test = rng.integers(0, 100, (8, 6)).astype(np.float32)
    train[7] = 0
    test[3] = 0
    check(Dataset("x", metric, train, test), 300)
    check(Dataset("x", metric, train, test), 4)


def test_one_huge_vector_spoils_nothing() -> None:
    rng = np.random.default_rng(6)
    train = rng.standard_normal((2000, 8)).astype(np.float32)
    train[11] *= 1e6
    check(Dataset("x", "l2", train, rng.standard_normal((5, 8)).astype(np.float32)), 10)


def test_stored_neighbors_are_used_while_they_suffice() -> None:
    rng = np.random.default_rng(7)
    train, test = rng.standard_normal((50, 4)), rng.standard_normal((2, 4)).astype(np.float32)
    stored = np.array([[3, 1], [2, 4]], np.int32)
    data = Dataset("x", "l2", train, test, stored)
    np.testing.assert_array_equal(data.ground_truth(2), stored)
    assert data.ground_truth(1).dtype == np.int64
    check(data, 3)


@pytest.mark.parametrize("k", [0, -1, 51])
def test_k_out_of_range(k: int) -> None:
    data = Dataset("x", "l2", np.zeros((50, 4)), np.zeros((2, 4), np.float32))
    with pytest.raises(InvalidInputError, match=f"k must be from 1 to 50.*got {k}"):
        data.ground_truth(k)


@pytest.mark.parametrize("name", ["sift-4800-128-euclidean", "deep-1900-96-angular"])
def test_real_sets_agree_with_their_own_neighbors(shared_data: Path, name: str) -> None:
    pytest.importorskip("h5py", reason="h5py is not installed: pip install 'tqsearch[bench]'")
    if not (shared_data / f"{name}.hdf5").is_file():
        pytest.skip(f"{shared_data} has no {name}.hdf5")
    data = load_dataset(shared_data / f"{name}.hdf5")
    check(dataclasses.replace(data, test=data.test[:100], neighbors=None, distances=None), 100)
    computed = dataclasses.replace(data, neighbors=None, distances=None).ground_truth(10)
    assert data.neighbors is not None
    assert np.mean(computed == data.neighbors[:, :10]) > 0.99, "only ties may differ"
