"""What a row tells of the queries near to it: beside regressions pair by pair, and what an index makes of it."""

import numpy as np
import pytest
import torch

from tqsearch.training.neighbours import neighbours_of

METRICS = ["ip", "cosine", "l2"]
NEAR = 10


def pairs_of(rows: np.ndarray, queries: np.ndarray, metric: str, themselves: bool) -> tuple[np.ndarray, np.ndarray]:
    """Each query with each of the rows nearest to it, one by one: (q near, dim) queries and rows."""
    found = []
    for i, query in enumerate(queries):
        far = np.square(rows - query).sum(1) if metric == "l2" else -(rows @ query)
        if themselves:
            far[i] = np.inf
        found += [(query, rows[j]) for j in np.argsort(far)[:NEAR]]
    return np.array([pair[0] for pair in found]), np.array([pair[1] for pair in found])


def sample(n: int, dim: int, metric: str, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((n, dim)) * np.arange(1, dim + 1) ** -0.7 + 0.3
    return rows / np.linalg.norm(rows, axis=1, keepdims=True) if metric == "cosine" else rows


def believed(variances: np.ndarray, coordinates: np.ndarray) -> float:
    """How much of the distance of queries' second moments from the sample's is not chance."""
    given = np.square(coordinates).mean(0)
    alike = variances * given.sum() / variances.sum()
    apart = (np.square(given - alike) / alike).sum()
    chance = (np.maximum(np.square(coordinates).var(0), 2 * given**2) / len(coordinates) / alike).sum()
    return float(max(0.0, 1 - chance / apart))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("asked", "turned"), [(0, True), (5, True), (200, True), (200, False)])
def test_slopes_are_those_of_regressions_over_pairs(metric: str, asked: int, turned: bool) -> None:
    """Queries count beside stand-ins as far as they are believed; for inner products their length does not matter."""
    dim = 12
    rows = sample(300, dim, metric).astype(np.float32).astype(np.float64)
    turn = np.linalg.qr(np.random.default_rng(2).standard_normal((dim, dim)))[0] if turned else np.eye(dim)
    queries = (sample(asked, dim, metric, 1) @ turn).astype(np.float32).astype(np.float64)
    centre = rows.mean(0).astype(np.float32).astype(np.float64)
    axes = np.linalg.eigh(np.cov(rows.T))[1].T[::-1].copy()
    variances = np.square((rows - centre) @ axes.T).mean(0)
    groups = [(*pairs_of(rows, rows, metric, themselves=True), 1.0)]
    if asked:
        known = believed(variances, (queries - centre) @ axes.T)
        assert known > 0.8 if turned and asked > 5 else known < 0.8
        length = np.sqrt(np.square(rows).mean() / np.square(queries).mean()) if metric == "ip" else 1.0
        groups = [(*groups[0][:2], 1 - known), (*pairs_of(rows, queries * length, metric, themselves=False), known)]
    weights = np.concatenate([np.full(len(q), share / len(q)) for q, _, share in groups])
    q, y = ((np.concatenate([group[i] for group in groups]) - centre) @ axes.T for i in (0, 1))
    wanted = ((weights @ (q * y)) / (weights @ np.square(y))).clip(0, 1)
    left = (weights @ np.square(q - wanted * y)) / (weights @ np.square(q))
    found = neighbours_of(
        torch.from_numpy(axes),
        torch.from_numpy(variances),
        torch.from_numpy(centre.astype(np.float32)),
        torch.from_numpy(rows.astype(np.float32)),
        torch.from_numpy(queries.astype(np.float32)) if asked else None,
        metric,
    )
    np.testing.assert_allclose(found.slopes, wanted, atol=1e-4)
    np.testing.assert_allclose(found.left, left, atol=1e-4)


def test_axes_without_variance_have_no_slope() -> None:
    rows = torch.from_numpy(sample(100, 6, "l2").astype(np.float32))
    rows[:, 4:] = 2.0
    found = neighbours_of(torch.eye(6, dtype=torch.float64), rows.var(0).double(), rows.mean(0), rows, None, "l2")
    assert (found.slopes[4:] == 0).all()
    assert (found.slopes[:4] > 0.1).all()
    assert torch.isfinite(found.left).all()
