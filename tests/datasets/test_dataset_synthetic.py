"""The generated set has the statistics that its docstring states, and follows from its seed."""

import numpy as np
import pytest

from tqsearch.datasets import Dataset, synthetic_embeddings
from tqsearch.errors import InvalidInputError


@pytest.fixture(scope="module")
def data() -> Dataset:
    return synthetic_embeddings(n=20_000, queries=500, seed=3)


def test_shape_type_and_norms(data: Dataset) -> None:
    assert (data.name, data.metric, data.dim) == ("synthetic-embeddings", "cosine", 384)
    assert data.train.shape == (20_000, 384)
    assert data.test.shape == (500, 384)
    assert data.train.dtype == data.test.dtype == np.float32
    assert data.neighbors is None
    for rows in (data.train, data.test):
        norms = np.sqrt((rows.astype(np.float64) ** 2).sum(1))
        assert np.abs(norms - 1).max() < 4 * 2**-23


def test_means_are_those_of_a_text_model(data: Dataset) -> None:
    base, queries = data.train.mean(0, dtype=np.float64), data.test.mean(0, dtype=np.float64)
    assert np.linalg.norm(base) == pytest.approx(0.1685, abs=0.01)
    # The mean of 500 unit vectors has noise of squared norm 1 / 500 in it.
    assert np.linalg.norm(queries) == pytest.approx((0.2853**2 + 1 / 500) ** 0.5, abs=0.015)
    assert base @ queries / np.linalg.norm(base) / np.linalg.norm(queries) == pytest.approx(0.417, abs=0.06)


def test_spectrum_decays(data: Dataset) -> None:
    centred = data.train.astype(np.float64) - data.train.mean(0, dtype=np.float64)
    variance = np.linalg.eigvalsh(centred.T @ centred)[::-1]
    share = variance / variance.sum()
    # Fewer vectors have fewer clusters, whose centres sample the same spectrum: at n = 100,000 it is 0.41 and 211.
    assert 0.41 <= share[:38].sum() <= 0.46
    assert 185 <= np.exp(-(share * np.log(share)).sum()) <= 215
    assert 110 <= 1 / (share**2).sum() <= 145
    coordinates = centred.var(axis=0)
    assert coordinates.max() < 4 * coordinates.mean(), "no coordinate is special: the basis is random"


def test_queries_are_related_to_the_base_and_no_copies(data: Dataset) -> None:
    scores = -np.sort(-(data.test @ data.train.T), axis=1)
    assert 0.55 <= scores[:, 0].mean() <= 0.67
    assert 0.40 <= scores[:, 9].mean() <= 0.50
    assert scores[:, 0].std() > 0.08, "some are easy, some hard"
    assert scores.max() < 0.99
    assert scores.mean() == pytest.approx(0.02, abs=0.01)
    assert scores.std() == pytest.approx(0.079, abs=0.015)


def test_base_has_clusters(data: Dataset) -> None:
    some = np.arange(0, 20_000, 100)
    scores = data.train[some] @ data.train.T
    scores[np.arange(len(some)), some] = -1
    assert 0.57 <= scores.max(axis=1).mean() <= 0.68
    assert scores.max() < 0.999


def test_the_seed_decides() -> None:
    first, again, other = (synthetic_embeddings(3000, 40, 20, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.train, again.train)
    np.testing.assert_array_equal(first.test, again.test)
    assert np.abs(first.train - other.train).max() > 0.1
    assert np.abs(first.test - other.test).max() > 0.1


def test_the_draws_are_the_same_for_ever() -> None:
    """The law of the set is a format: results are compared across versions. These numbers are from version 0.1.0."""
    data = synthetic_embeddings(9000, 8, 3, seed=5)
    got = [data.train[0, 0], data.train[8999, 7], data.test[2, 3]]
    np.testing.assert_allclose(got, [-0.326433, 0.064777, -0.376654], atol=1e-4)


@pytest.mark.parametrize(("n", "dim", "queries"), [(1, 2, 1), (31, 3, 50), (8193, 5, 8193)])
def test_small_and_odd_sizes(n: int, dim: int, queries: int) -> None:
    data = synthetic_embeddings(n, dim, queries)
    assert data.train.shape == (n, dim)
    assert data.test.shape == (queries, dim)
    assert np.isfinite(data.train).all()
    assert np.isfinite(data.test).all()


@pytest.mark.parametrize("argument", ["n", "dim", "queries", "seed"])
def test_arguments_too_small(argument: str) -> None:
    with pytest.raises(InvalidInputError, match=f"{argument} must be at least ., got -1"):
        synthetic_embeddings(**{argument: -1})
