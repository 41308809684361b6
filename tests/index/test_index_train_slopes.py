"""Slopes of learnt axes: the score of the query expected of a row is exact, and recall gains."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from learnt_rows import METRICS, recall, rows
from trained_oracle import Trained, parse_trained

from tqsearch.index import TurboQuantIndex
from tqsearch.training import choice
from tqsearch.training.learn import learn

SavedOf = Callable[[TurboQuantIndex], bytes]
DIM = 64


def made(metric: Any, bits: float, offset: float) -> TurboQuantIndex:
    index = TurboQuantIndex(DIM, bits, metric, seed=3)
    index.train(rows(3000, 1, DIM, 1.5, offset))
    index.add(rows(300, 0, DIM, 1.5, offset))
    return index


def expected_queries(content: Trained, vectors: np.ndarray) -> np.ndarray:
    """c + the sum of gamma_i y_i a_i, and gamma times all that lies outside the coded axes, (n, dim)."""
    z, axes, slopes = content.residuals(vectors), content.double("axes"), content.double("slopes")
    y, coded = z @ axes.T, content.widths > 0
    outside = np.append(slopes[~coded], 0.0)[0] * (z - y @ axes)
    return content.double("centre") + (slopes[coded] * y) @ axes + outside


@pytest.mark.parametrize(("metric", "offset", "keeps"), [("l2", 0.0, True), ("cosine", 0.5, False), ("ip", 9.0, True)])
def test_the_score_of_the_expected_query_is_exact(saved: SavedOf, metric: Any, offset: float, keeps: bool) -> None:
    """Up to float16 of what is kept: 2^-11 of it. For cosine a query is divided by its length, and so is its score."""
    index = made(metric, 2, offset)
    content = parse_trained(saved(index))
    assert "slopes" in content.tensors
    assert content.has_bias is keeps
    base = rows(300, 0, DIM, 1.5, offset).astype(np.float64)
    base = base / np.linalg.norm(base, axis=1, keepdims=True) if metric == "cosine" else base
    queries = expected_queries(content, base)
    queries = queries / np.linalg.norm(queries, axis=1, keepdims=True) if metric == "cosine" else queries
    scores, ids = (np.asarray(part) for part in index.search(queries.astype(np.float32), 300))
    found = np.take_along_axis(scores, ids.argsort(1), 1).diagonal()
    exact = np.square(queries - base).sum(1) if metric == "l2" else (queries * base).sum(1)
    parts = (
        np.abs(content.double("bias") * content.unit) if keeps else np.abs((queries * content.residuals(base)).sum(1))
    )
    slack = 2.0**-10 * parts + 1e-5 * (np.square(queries).sum(1) + np.square(base).sum(1))
    assert (np.abs(found - exact) <= slack).all()


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("bits", [1, 2])
def test_recall_gains(metric: Any, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the same plan without slopes: 400 queries, of whose differences the standard error is below 0.3 / 20."""
    offset = 0.5
    base, queries = rows(3000, 0, DIM, 1.5, offset), rows(400, 5, DIM, 1.5, offset)
    found = []
    for sloping in (True, False):
        if not sloping:

            def plain(*arguments: Any) -> Any:
                learnt = learn(*arguments)
                return learnt and dataclasses.replace(learnt, basis=dataclasses.replace(learnt.basis, slopes=None))

            monkeypatch.setattr(choice, "learn", plain)
        index = TurboQuantIndex(DIM, bits, metric, seed=3)
        index.train(rows(3000, 1, DIM, 1.5, offset))
        index.add(base)
        assert index.learnt == "axes"
        found.append(recall(index, base, queries))
    assert found[0] > found[1]


@pytest.mark.parametrize("metric", METRICS)
def test_a_loaded_index_adds_the_same_bytes(saved: SavedOf, tmp_path: Any, metric: Any) -> None:
    whole = saved(made(metric, 2, 0.5))
    index = TurboQuantIndex(DIM, 2, metric, seed=3)
    index.train(rows(3000, 1, DIM, 1.5, 0.5))
    index.add(rows(300, 0, DIM, 1.5, 0.5)[:17])
    (tmp_path / "part").write_bytes(saved(index))
    loaded = TurboQuantIndex.load(tmp_path / "part")
    loaded.add(rows(300, 0, DIM, 1.5, 0.5)[17:])
    assert saved(loaded) == whole
