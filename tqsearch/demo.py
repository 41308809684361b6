"""What `tqsearch demo` and `tqsearch bench` measure: TurboQuant, exact search and FAISS PQ over one data set.

Small enough for a minute or two; the comparison with all rivals is `python -m benchmarks search` in a checkout.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tqsearch.datasets import Dataset
from tqsearch.index import TurboQuantIndex
from tqsearch.progress import progress
from tqsearch.recall import recall

K = 10
BATCHES = (1, 32, 1000)
ADD_ROWS = 10_000
PQ_ROWS = 10_000
PQ_CENTROIDS = 256  # of a byte: FAISS trains on no fewer rows
PQ_ITERATIONS = 8
SECONDS_PER_BATCH = 1.0
BLOCK = 250

Vectors = NDArray[np.float32]
Search = Callable[[Vectors, int], NDArray[Any]]


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table; `qps` is by batch size."""

    name: str
    bytes_per_vector: float
    recall_10: float
    recall_1: float
    train_seconds: float
    add_seconds: float
    qps: dict[int, float]


def first_queries(data: Dataset, count: int) -> Dataset:
    """The data set with at most `count` queries."""
    neighbors = None if data.neighbors is None else data.neighbors[:count]
    distances = None if data.distances is None else data.distances[:count]
    return dataclasses.replace(data, test=data.test[:count], neighbors=neighbors, distances=distances)


def unit_rows(vectors: NDArray[Any], metric: str) -> Vectors:
    """float32, and of norm 1 where the metric is cosine; a zero vector stays zero."""
    matrix = np.ascontiguousarray(vectors, dtype=np.float32)
    if metric != "cosine":
        return matrix
    norms = np.linalg.norm(matrix, axis=1, keepdims=True)
    unit: Vectors = np.divide(matrix, norms, out=np.zeros_like(matrix), where=norms > 0)
    return unit


def true_scores(base: Vectors, query: Vectors, metric: str) -> NDArray[np.float64]:
    """The scores of one query with all rows of `unit_rows`: squared distances for l2, inner products otherwise."""
    if metric == "l2":
        return np.asarray(np.square(base - query).sum(axis=1), dtype=np.float64)
    return np.asarray(base @ query, dtype=np.float64)


def exact_search(base: Vectors, metric: str) -> Search:
    """Brute force in float32 with torch: one matrix product and a top-k for each block of queries."""
    rows = torch.from_numpy(base)
    squares = rows.square().sum(dim=1) if metric == "l2" else None

    def search(queries: Vectors, k: int) -> NDArray[Any]:
        scores = torch.from_numpy(queries) @ rows.T
        if squares is not None:
            scores = scores.mul_(2).sub_(squares)
        return scores.topk(k, dim=1).indices.numpy()

    return search


def queries_per_second(search: Search, queries: Vectors) -> dict[int, float]:
    """By batch size, from the median of the calls that fit in a second each, after one that does not count."""
    rates = {}
    for batch in BATCHES:
        pool = np.ascontiguousarray(np.resize(queries, (max(batch, len(queries)), queries.shape[1])))
        search(pool[: min(batch, 32)], K)
        times: list[float] = []
        while not times or (sum(times) < SECONDS_PER_BATCH and len(times) < 100):
            start = len(times) * batch % (len(pool) - batch + 1)
            begun = time.perf_counter()
            for block in range(start, start + batch, BLOCK):
                search(pool[block : min(block + BLOCK, start + batch)], K)
            times.append(time.perf_counter() - begun)
        rates[batch] = batch / statistics.median(times)
    return rates


def measured(
    name: str, search: Search, data: Dataset, truth: NDArray[Any], cost: float, train: float = 0.0, add: float = 0.0
) -> Row:
    """A row: recall over all queries, and speed."""
    queries = unit_rows(data.test, data.metric)
    found = np.concatenate([search(queries[start : start + BLOCK], K) for start in range(0, len(queries), BLOCK)])
    return Row(
        name=name,
        bytes_per_vector=cost,
        recall_10=recall(found, truth, K, K),
        recall_1=recall(found, truth, 1, 1),
        train_seconds=train,
        add_seconds=add,
        qps=queries_per_second(search, queries),
    )


def build(data: Dataset, bits: float, seed: int = 0) -> tuple[TurboQuantIndex, float]:
    """An index over the base, with a progress bar, and the seconds it took."""
    index = TurboQuantIndex(data.dim, bits=bits, metric=data.metric, seed=seed)
    begun = time.perf_counter()
    with progress(len(data.train), f"adding at {bits:g} bits", " vectors") as bar:
        for start in range(0, len(data.train), ADD_ROWS):
            block = np.asarray(data.train[start : start + ADD_ROWS], dtype=np.float32)
            index.add(block)
            bar.update(len(block))
    return index, time.perf_counter() - begun


def turboquant_row(index: TurboQuantIndex, bits: float, data: Dataset, truth: NDArray[Any], seconds: float) -> Row:
    """TurboQuant's line."""

    def search(queries: Vectors, k: int) -> NDArray[Any]:
        return np.asarray(index.search(queries, k=k)[1])

    return measured(
        f"TurboQuant {bits:g} bit{'' if bits == 1 else 's'}", search, data, truth, index.bytes_per_vector, add=seconds
    )


def exact_row(data: Dataset, truth: NDArray[Any]) -> Row:
    """Brute force's line."""
    search = exact_search(unit_rows(data.train, data.metric), data.metric)
    return measured("exact float32", search, data, truth, 4 * data.dim)


def pq_row(code_bytes: int, data: Dataset, truth: NDArray[Any]) -> Row:
    """FAISS PQ's line at so many bytes: trained on a sample of `PQ_ROWS` rows with `PQ_ITERATIONS` of k-means."""
    from tqsearch.faiss_pq import faiss_pq

    base = unit_rows(data.train, data.metric)
    index = faiss_pq(data.dim, code_bytes, data.metric, iterations=PQ_ITERATIONS)
    sample = base[np.sort(np.random.default_rng(0).permutation(len(base))[:PQ_ROWS])]
    begun = time.perf_counter()
    index.train(sample)
    trained = time.perf_counter()
    index.add(base)
    added = time.perf_counter()

    def search(queries: Vectors, k: int) -> NDArray[Any]:
        return np.asarray(index.search(queries, k)[1])

    return measured(f"FAISS PQ{code_bytes}x8", search, data, truth, code_bytes, trained - begun, added - trained)


def neighbours_text(index: TurboQuantIndex, data: Dataset, truth: NDArray[Any], query: int = 0) -> str:
    """One query's neighbours: the score estimated from the codes beside the true one, and the rank by exact search."""
    base = unit_rows(data.train, data.metric)
    vector = unit_rows(data.test[query : query + 1], data.metric)
    scores, ids = (np.asarray(part)[0] for part in index.search(vector, k=K))
    true = true_scores(base, vector[0], data.metric)
    lines = [f"{'':>4}{'id':>9}{'from codes':>13}{'true':>10}{'exact rank':>13}"]
    for place, (score, id) in enumerate(zip(scores, ids, strict=True), 1):
        better = true < true[id] if data.metric == "l2" else true > true[id]
        lines.append(f"{place:>4}{id:>9}{score:>13.4f}{true[id]:>10.4f}{int(better.sum()) + 1:>13}")
    among = len(np.intersect1d(ids, truth[query, :K]))
    return "\n".join([*lines, f"{among} of the true {K} are found."])


def table_text(rows: Sequence[Row]) -> str:
    """The rows as a table for a terminal."""
    head = f"{'':<22}{'bytes':>7}{'10@10':>8}{'1@1':>8}{'train s':>9}{'add s':>8}"
    lines = [head + "".join(f"{title:>11}" for title in ("q/s by 1", "by 32", "by 1000"))]
    for row in rows:
        line = f"{row.name:<22}{row.bytes_per_vector:>7g}{row.recall_10:>8.3f}{row.recall_1:>8.3f}"
        line += f"{row.train_seconds:>9.1f}{row.add_seconds:>8.1f}"
        lines.append(line + "".join(f"{row.qps[batch]:>11,.0f}" for batch in BATCHES))
    return "\n".join(lines)


def draw(rows: Sequence[Row], data: Dataset, path: Path) -> None:
    """Recall 10@10 against bytes per vector, a line for TurboQuant and one for its rival, as a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for family, colour, marker in (("TurboQuant", "#D55E00", "o"), ("FAISS PQ", "#0072B2", "s")):
        shown = [row for row in rows if row.name.startswith(family)]
        if not shown:
            continue
        xs, ys = [row.bytes_per_vector for row in shown], [row.recall_10 for row in shown]
        axes.plot(xs, ys, color=colour, marker=marker, linewidth=2.5, markersize=8, label=family)
        for row in shown:
            below = family == "FAISS PQ"
            axes.annotate(
                f"{row.recall_10:.3f}",
                (row.bytes_per_vector, row.recall_10),
                xytext=(8, -14) if below else (-8, 9),
                textcoords="offset points",
                ha="left" if below else "right",
                color=colour,
            )
    axes.set_title(f"{data.name}: {len(data.train):,} x {data.dim}; float32 takes {4 * data.dim:,} bytes", loc="left")
    axes.set_xlabel("bytes per vector, all overhead counted")
    axes.set_ylabel("recall 10@10")
    axes.margins(0.12)
    axes.grid(True, color="#e4e4e4")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
