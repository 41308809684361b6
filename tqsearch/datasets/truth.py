"""Exact nearest neighbours by brute force: the truth that recall is measured against.

A block of the base meets a block of the queries in one float32 matrix product, and more candidates than asked for are
kept. They are scored again in float64 from the vectors as stored. The result is certified: if the k-th score does not
beat the best that a dropped vector can have, given the error bound of a float32 product, the query is done again in
float64 against the whole base. What it allocates beside is one score a base vector, for such a query, and some blocks.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tqsearch.datasets.metric import Metric
from tqsearch.progress import progress

QUERY_ROWS = 512
BLOCK_FLOATS = 1 << 22  # of a block of the base, and of its scores, in float32: 16 MiB
LARGE = 10**11  # multiplications from which a progress bar is shown

Floats32 = NDArray[np.float32]
Floats64 = NDArray[np.float64]
Ids = NDArray[np.int64]


def exact_neighbors(base: NDArray[Any], queries: NDArray[Any], k: int, metric: Metric) -> Ids:
    """The k nearest base vectors of every query.

    A vector of norm zero has cosine zero with everything.

    Args:
        base: (n, dim), of any real type; read in blocks.
        queries: (q, dim).
        k: from 1 to n.
        metric: `cosine`, `l2` or `ip`.

    Returns:
        (q, k) int64, nearest first, equal float64 scores in the order of ids.
    """
    n, dim = base.shape
    rows = max(1, BLOCK_FLOATS // max(dim, QUERY_ROWS))
    center = _center(base, rows) if metric == "l2" else np.zeros(dim)
    result = np.empty((len(queries), k), np.int64)
    large = n * len(queries) * dim >= LARGE
    with progress(len(queries), "exact neighbours", " queries", shown=large) as bar:
        for start in range(0, len(queries), QUERY_ROWS):
            block = np.asarray(queries[start : start + QUERY_ROWS], np.float64)
            ids, bounds = _candidates(base, block, min(n, 2 * k + 32), metric, center, rows)
            for i, query in enumerate(block):
                mine = np.sort(ids[i])
                scores = _scores(base[mine], query, metric)
                best = np.lexsort((mine, -scores))[:k]
                if scores[best[-1]] <= bounds[i]:
                    result[start + i] = _one_by_one(base, query, k, metric, rows)
                else:
                    result[start + i] = mine[best]
            bar.update(len(block))
    return result


def _center(base: NDArray[Any], rows: int) -> Floats64:
    """The mean of the base: about it, |x|^2 - 2 <q, x> cancels least."""
    total = np.zeros(base.shape[1])
    for start in range(0, len(base), rows):
        total += base[start : start + rows].sum(axis=0, dtype=np.float64)
    return total / len(base)


def _candidates(
    base: NDArray[Any], queries: Floats64, keep: int, metric: Metric, center: Floats64, rows: int
) -> tuple[Ids, Floats64]:
    """The `keep` best ids by float32 scores, (q, keep), and what no dropped vector's true score exceeds, (q,)."""
    q = _unit(queries) if metric == "cosine" else queries - center
    q32 = q.astype(np.float32)
    best_ids = np.empty((len(q), 0), np.int64)
    best = np.empty((len(q), 0), np.float32)
    longest = 0.0
    for start in range(0, len(base), rows):
        x = np.asarray(base[start : start + rows], np.float64)
        x = _unit(x) if metric == "cosine" else x - center
        squares = np.einsum("nd,nd->n", x, x)
        longest = max(longest, float(squares.max()) ** 0.5)
        scores = q32 @ x.astype(np.float32).T
        if metric == "l2":
            scores *= 2
            scores -= squares.astype(np.float32)
        columns, scores = _largest(scores, keep)
        best_ids = np.hstack((best_ids, columns + start))
        chosen, best = _largest(np.hstack((best, scores)), keep)
        best_ids = np.take_along_axis(best_ids, chosen, axis=1)
    if keep == len(base):
        return best_ids, np.full(len(q), -np.inf)
    norms = np.linalg.norm(q, axis=1)
    # |fl(<q, x>) - <q, x>| <= (dim + 4) u |q| |x| with u = 2^-24: dim for the sum, the rest for rounding q, x, result.
    error = (base.shape[1] + 4) * 2.0**-24 * norms * longest
    if metric == "l2":
        error = 2 * error + 3 * 2.0**-24 * (longest**2 + 2 * norms * longest)
        # The scores compared are -|q - x|^2: the same order, |q|^2 below.
        return best_ids, best.min(axis=1) + error - norms**2
    return best_ids, best.min(axis=1) + error


def _largest(scores: Floats32, keep: int) -> tuple[Ids, Floats32]:
    """The columns of the `keep` largest scores of each row, in no order, and these scores."""
    if scores.shape[1] <= keep:
        return np.broadcast_to(np.arange(scores.shape[1]), scores.shape), scores
    columns = np.argpartition(scores, scores.shape[1] - keep, axis=1)[:, -keep:]
    return columns, np.take_along_axis(scores, columns, axis=1)


def _unit(rows: Floats64) -> Floats64:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0))


def _scores(rows: NDArray[Any], query: Floats64, metric: Metric) -> Floats64:
    """Larger is nearer: cosine, -|q - x|^2 or <q, x> in float64, (n,)."""
    x = np.asarray(rows, np.float64)
    if metric == "l2":
        return np.asarray(-np.square(x - query).sum(axis=1))
    if metric == "cosine":
        x, query = _unit(x), _unit(query[None])[0]
    return np.asarray((x * query).sum(axis=1))  # row by row, so that equal rows have equal scores


def _one_by_one(base: NDArray[Any], query: Floats64, k: int, metric: Metric, rows: int) -> Ids:
    """The k nearest of one query with every score in float64, (k,)."""
    blocks = [_scores(base[start : start + rows], query, metric) for start in range(0, len(base), rows)]
    scores = np.concatenate(blocks)
    return np.lexsort((np.arange(len(scores)), -scores))[:k].astype(np.int64)
