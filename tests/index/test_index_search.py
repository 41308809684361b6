"""Search against plain numpy in float64 over estimates that the oracle decodes from the bytes of the index's file."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from index_oracle import Parsed, check_top_k, distortion, estimate, mean_distortion, similarity

from tqsearch.index import TurboQuantIndex
from tqsearch.plan import BitPlan

METRICS = ["ip", "cosine", "l2"]
ParsedOf = Callable[[TurboQuantIndex], Parsed]


def rows(n: int, dim: int, seed: int = 0) -> np.ndarray:
    """Vectors of different lengths, with a common mean, in no special position."""
    rng = np.random.default_rng(seed)
    return ((rng.standard_normal((n, dim)) + 0.3) * rng.uniform(0.1, 3, (n, 1))).astype(np.float32)


def made(metric: Any, vectors: np.ndarray, bits: Any = 4, seed: int = 7, **options: Any) -> TurboQuantIndex:
    index = TurboQuantIndex(vectors.shape[1], bits, metric, seed=seed, **options)
    index.add(vectors)
    return index


def test_oracle_is_right() -> None:
    """The distortions of the oracle's levels are the published ones (Max, 1960), at a dimension near the limit."""
    published = [0.3634, 0.1175, 0.03454, 0.009497]
    np.testing.assert_allclose([distortion(width, 4096) for width in (1, 2, 3, 4)], published, rtol=2e-3)


PLANS = [1, 2, 3, 4, 2.5, 3.5, BitPlan.from_pairs([(5, 4), (9, 0), (11, 3), (7, 1)])]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("bits", PLANS, ids=str)
def test_results_equal_the_oracle(parsed: ParsedOf, metric: str, bits: Any) -> None:
    vectors, queries = rows(300, 32), rows(20, 32, 1)
    index = made(metric, vectors, bits)
    content = parsed(index)
    wanted, slack = content.similarity(queries)
    for k in (1, 10, 300, 301):
        check_top_k(index.search(queries, k), wanted, slack, content.ids, k, metric)  # type: ignore[arg-type]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("dim", "bits"), [(8, 4), (12, 3), (37, 2), (64, 2.5), (100, 4)])
def test_codes_equal_an_independent_encoder(parsed: ParsedOf, metric: str, dim: int, bits: float) -> None:
    vectors = rows(200, dim, dim)
    index = made(metric, vectors, bits)
    content = parsed(index)
    wanted = estimate(vectors, tuple(index.plan.pairs()), 7, metric)
    rounding = 2.0**-10 if metric == "cosine" else 1e-5  # of the scale
    np.testing.assert_allclose(content.estimates, wanted, atol=rounding * np.abs(wanted).max())
    if metric == "l2":
        np.testing.assert_allclose(-content.tensors["bias"], (vectors.astype(float) ** 2).sum(1), rtol=1e-5)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (63, 5), (257, 1), (5000, 3), (5001, 200)])
def test_group_and_block_boundaries(parsed: ParsedOf, monkeypatch: Any, metric: str, n: int, k: int) -> None:
    monkeypatch.setattr("tqsearch.kernels.reference.SCAN_BLOCK", 12 * 1700)
    vectors, queries = rows(n, 12), rows(7, 12, 1)
    index = made(metric, vectors, 4)
    content = parsed(index)
    check_top_k(index.search(queries, k), *content.similarity(queries), content.ids, k, metric)  # type: ignore[arg-type]


@pytest.mark.parametrize("rotation", ["dense", "identity"])
def test_other_rotations_through_reconstruct(rotation: str) -> None:
    """Unbiased estimates are what `reconstruct` gives over 1 - distortion."""
    vectors, queries = rows(300, 24), rows(9, 24, 1)
    index = made("ip", vectors, 4, rotation=rotation)
    held = index.reconstruct(np.arange(300)).astype(np.float64) / (1 - distortion(4, 24))  # type: ignore[union-attr]
    check_top_k(index.search(queries, 10), *similarity(queries, held, None, "ip"), np.arange(300), 10, "ip")  # type: ignore[arg-type]
    error = ((held - vectors) ** 2).sum(1) / (vectors.astype(float) ** 2).sum(1)
    assert error.mean() < 3 * distortion(4, 24), "reconstruct does not resemble the vectors"


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("bits", [1, 3, 2.5], ids=str)
def test_reconstruct_is_the_shrunk_estimate(parsed: ParsedOf, metric: str, bits: float) -> None:
    index = made(metric, rows(100, 40), bits)
    content = parsed(index)
    wanted = content.estimates * (1 - mean_distortion(content.plan))
    ids = np.array([3, 99, 0, 3])
    got = index.reconstruct(ids)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, wanted[ids], atol=1e-5 * np.abs(wanted).max())
    from_torch = index.reconstruct(torch.from_numpy(ids))
    assert isinstance(from_torch, torch.Tensor)
    np.testing.assert_array_equal(from_torch.numpy(), got)


def true_scores(metric: str, queries: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    q, x = queries.astype(np.float64), vectors.astype(np.float64)
    if metric == "l2":
        return np.array([[((a - b) ** 2).sum() for b in x] for a in q])
    if metric == "cosine":
        q, x = (m / np.linalg.norm(m, axis=1, keepdims=True) for m in (q, x))
    return q @ x.T


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("bits", [1, 2], ids=str)
def test_scores_are_unbiased(metric: str, bits: int) -> None:
    """The mean error over many vectors is within five standard errors of zero, the seeds being the independent draws.

    The queries lie near vectors of the index: there a scale that is the norm alone, or the shrunk estimate of least
    squared error, is off by a third at 1 bit. The second half of the test shows that the first would see it.
    """
    vectors = rows(100, 48)
    queries = vectors[:8] + 0.5 * rows(8, 48, 1)
    truth = true_scores(metric, queries, vectors)
    near = np.arange(8)  # each query's own vector, where a bias is largest
    errors, shrunk = [], []
    for seed in range(40):
        index = made(metric, vectors, bits, seed, rotation="hadamard" if seed % 2 else "dense")
        scores, ids = (np.asarray(part) for part in index.search(queries, 100))
        ordered = np.take_along_axis(scores, np.argsort(ids, axis=1), axis=1).astype(np.float64)
        errors.append([(ordered - truth).mean(), (ordered - truth)[near, near].mean()])
        held = np.asarray(index.reconstruct(near), np.float64)
        products = np.einsum("ij,ij->i", queries.astype(float), held)
        lengths = np.linalg.norm(queries.astype(float), axis=1)
        if metric == "l2":
            estimates = lengths**2 + (vectors[:8].astype(float) ** 2).sum(1) - 2 * products
        else:
            estimates = products / (lengths if metric == "cosine" else 1)
        shrunk.append((estimates - truth[near, near]).mean())

    def deviations(samples: Any) -> np.ndarray:
        values = np.array(samples)
        return np.abs(values.mean(0)) / (values.std(0, ddof=1) / np.sqrt(len(values)))

    assert (deviations(errors) < 5).all()
    assert deviations(shrunk) > 10


@pytest.mark.parametrize("metric", METRICS)
def test_a_query_equal_to_a_vector_scores_exactly(metric: str) -> None:
    """s <x, x_hat> = |x|^2 by the choice of s, whatever the width: so a vector's distance to itself is 0."""
    vectors = rows(50, 64)
    index = made(metric, vectors, 1)
    lengths = (vectors.astype(np.float64) ** 2).sum(1)
    for i in range(50):
        (score,), (found,) = index.search(vectors[i], 1, allow=[i])
        wanted, scale = {"ip": (lengths[i], lengths[i]), "cosine": (1, 1), "l2": (0, lengths[i])}[metric]
        assert found == i
        assert abs(score - wanted) < (2.0**-11 if metric == "cosine" else 2e-6) * 1.01 * scale


class TestShapes:
    index = made("l2", rows(20, 8))

    def test_one_query(self) -> None:
        query = rows(1, 8, 1)
        scores, ids = self.index.search(query[0], 5)
        assert (scores.shape, ids.shape) == ((5,), (5,))
        both = self.index.search(query, 5)
        np.testing.assert_array_equal(both[0], scores[None])
        np.testing.assert_array_equal(both[1], ids[None])

    def test_no_queries(self) -> None:
        for n, k in ((20, 3), (3000, 1)):
            scores, ids = made("ip", rows(n, 8)).search(np.empty((0, 8)), k)
            assert (scores.shape, ids.shape) == ((0, k), (0, k))

    @pytest.mark.parametrize("metric", METRICS)
    def test_empty_index(self, metric: Any) -> None:
        index = TurboQuantIndex(8, 4, metric)
        for allow in (None, [], [3], np.empty(0, bool)):
            scores, ids = index.search(rows(2, 8), 3, allow=allow)
            np.testing.assert_array_equal(ids, np.full((2, 3), -1))
            np.testing.assert_array_equal(scores, np.full((2, 3), np.inf if metric == "l2" else -np.inf))
        assert np.asarray(index.reconstruct([])).shape == (0, 8)
        assert len(index) == index.nbytes == len(index.ids) == 0

    def test_torch_in_torch_out(self) -> None:
        query = rows(3, 8, 1)
        wanted = self.index.search(query, 4)
        got = self.index.search(torch.from_numpy(query), 4)
        for part, other in zip(got, wanted, strict=True):
            assert isinstance(part, torch.Tensor)
            assert part.device == torch.device("cpu")
            assert isinstance(other, np.ndarray)
            np.testing.assert_array_equal(part.numpy(), other)
        assert (got[0].dtype, got[1].dtype) == (torch.float32, torch.int64)
        assert not self.index.search(torch.from_numpy(query).requires_grad_(), 4)[0].requires_grad  # type: ignore[union-attr]

    @pytest.mark.parametrize("k", [np.int64(2), np.uint8(2)])
    def test_k_of_numpy(self, k: Any) -> None:
        np.testing.assert_array_equal(self.index.search(rows(1, 8), k)[1], self.index.search(rows(1, 8), 2)[1])


def test_properties_and_repr() -> None:
    index = made("cosine", rows(20, 16), 2.5, seed=3)
    assert (index.dim, index.metric, index.seed, index.device) == (16, "cosine", 3, torch.device("cpu"))
    assert index.plan.pairs() == [(8, 3), (8, 2)]
    assert repr(index) == (
        "TurboQuantIndex(20 vectors, dim=16, metric='cosine', plan=8 x 3 bit + 8 x 2 bit = 5 bytes, device='cpu')"
    )


def test_to_cpu_is_the_same_index(saved: Callable[[TurboQuantIndex], bytes]) -> None:
    index = made("l2", rows(50, 8))
    index.remove([3, 20])
    before = saved(index), index.search(rows(2, 8, 1), 5)
    assert index.to("cpu") is index
    assert saved(index) == before[0]
    np.testing.assert_array_equal(index.search(rows(2, 8, 1), 5)[0], before[1][0])
    index.add(rows(5, 8, 2))
    assert len(index) == 53
