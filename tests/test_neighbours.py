"""What a row tells of the queries near to it: beside regressions pair by pair, and what an index makes of it."""

import numpy as np
import pytest
import torch

from tqsearch.training.neighbours import STAND_INS, neighbours_of

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


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("asked", [0, 5, 200])
def test_slopes_are_those_of_regressions_over_pairs(metric: str, asked: int) -> None:
    """Stand-ins count as 32 queries beside those given, whose length does not matter for inner products."""
    dim = 12
    rows = sample(300, dim, metric).astype(np.float32).astype(np.float64)
    queries = sample(asked, dim, metric, 1) @ np.linalg.qr(np.random.default_rng(2).standard_normal((dim, dim)))[0]
    queries = queries.astype(np.float32).astype(np.float64)
    centre = rows.mean(0).astype(np.float32).astype(np.float64)
    axes = np.linalg.eigh(np.cov(rows.T))[1].T[::-1].copy()
    groups = [(*pairs_of(rows, rows, metric, themselves=True), float(STAND_INS))]
    if asked:
        length = np.sqrt(np.square(rows).mean() / np.square(queries).mean()) if metric == "ip" else 1.0
        groups.append((*pairs_of(rows, queries * length, metric, themselves=False), float(asked)))
    weights = np.concatenate([np.full(len(q), count / len(q)) for q, _, count in groups])
    q, y = ((np.concatenate([group[i] for group in groups]) - centre) @ axes.T for i in (0, 1))
    wanted = np.array([np.polynomial.polynomial.polyfit(y[:, i], q[:, i], [1], w=weights**0.5)[1] for i in range(dim)])
    wanted = wanted.clip(0, 1)
    left = (weights @ np.square(q - wanted * y)) / (weights @ np.square(q))
    given = torch.from_numpy(queries.astype(np.float32)) if asked else None
    found = neighbours_of(
        torch.from_numpy(axes),
        torch.from_numpy(centre.astype(np.float32)),
        torch.from_numpy(rows.astype(np.float32)),
        given,
        metric,
    )
    np.testing.assert_allclose(found.slopes, wanted, atol=1e-4)
    np.testing.assert_allclose(found.left, left, atol=1e-4)


def test_axes_without_variance_have_no_slope() -> None:
    rows = torch.from_numpy(sample(100, 6, "l2").astype(np.float32))
    rows[:, 4:] = 2.0
    found = neighbours_of(torch.eye(6, dtype=torch.float64), rows.mean(0), rows, None, "l2")
    assert (found.slopes[4:] == 0).all()
    assert (found.slopes[:4] > 0.1).all()
    assert torch.isfinite(found.left).all()
