"""Rows that have axes to learn, an index that has learnt them, and its recall."""

from typing import Any

import numpy as np
from index_oracle import unit_rows

from tqsearch.index import TurboQuantIndex

METRICS = ["ip", "cosine", "l2"]
DIM = 40


def rows(n: int, seed: int = 0, dim: int = DIM, power: float = 1.0, offset: float = 1.0) -> np.ndarray:
    """Gaussian rows of variances 1 / i^power along random axes, which are the same for every seed, and a mean."""
    turn = np.linalg.qr(np.random.default_rng(99).standard_normal((dim, dim)))[0]
    spread = np.arange(1, dim + 1) ** (-power / 2)
    mean = offset * np.sin(np.arange(dim)) / np.sqrt(dim)
    return ((np.random.default_rng(seed).standard_normal((n, dim)) * spread) @ turn + mean).astype(np.float32)


def made(metric: Any, bits: float = 2, **more: Any) -> TurboQuantIndex:
    index = TurboQuantIndex(DIM, bits, metric, seed=7)
    index.train(rows(2000, 1), **more)
    assert index.learnt == "axes"
    index.add(rows(200))
    return index


def recall(index: TurboQuantIndex, base: np.ndarray, queries: np.ndarray, k: int = 10) -> float:
    """Of the true nearest by cosine or inner product that are found."""
    if index.metric == "cosine":
        base, queries = unit_rows(base.astype(float)), unit_rows(queries.astype(float))
    true = (queries @ base.T).argsort(axis=1)[:, -k:]
    if index.metric == "l2":
        true = ((queries[:, None] - base) ** 2).sum(2).argsort(axis=1)[:, :k]
    found = np.asarray(index.search(queries.astype(np.float32), k)[1])
    return float(np.mean([len(set(a) & set(b)) / k for a, b in zip(found.tolist(), true.tolist(), strict=True)]))
