"""Learnt axes of odd samples, of vectors unlike them, and of a first `add`."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from learnt_rows import DIM, METRICS, made, recall, rows

from tqsearch.errors import InvalidInputError
from tqsearch.index import AUTO_ROWS, TurboQuantIndex

SavedOf = Callable[[TurboQuantIndex], bytes]


@pytest.mark.parametrize("metric", METRICS)
def test_constant_and_duplicate_columns(metric: Any) -> None:
    """They carry nothing: bits go to the rest, and later vectors that differ there are still searched by the rest."""
    data = rows(3000, 1)
    data[:, 5:15] = 2.0
    data[:, 15:20] = data[:, :5]
    index = TurboQuantIndex(DIM, 2, metric)
    index.train(data[:2000])
    index.add(data[2000:])
    plain = TurboQuantIndex(DIM, 2, metric)
    plain.add(data[2000:])
    assert recall(index, data[2000:], data[:100]) > recall(plain, data[2000:], data[:100])
    other = rows(10, 8) * 3
    index.add(other)
    scores, ids = (np.asarray(part) for part in index.search(other, 1010))
    assert np.isfinite(scores).all()
    assert (np.sort(ids, axis=1) == np.arange(1010)).all()


@pytest.mark.parametrize("n", [1, 2, 63, 64, 80, 500])
@pytest.mark.parametrize("power", [0.0, 2.0])
def test_small_samples_do_not_hurt(n: int, power: float) -> None:
    """From fewer rows than dimensions on: never a recall below the centre's alone by more than chance."""
    dim = 96
    base, queries = rows(2000, 4, dim, power), rows(200, 5, dim, power)
    found = []
    for learn in ("axes", "centre"):
        index = TurboQuantIndex(dim, 2, "l2")
        index.train(rows(n, 1, dim, power), learn=learn)  # type: ignore[arg-type]
        index.add(base)
        assert learn == "axes" or index.learnt == "centre"
        assert n >= 64 or index.learnt == "centre"
        found.append(recall(index, base, queries))
    assert found[0] > found[1] - 2 * 0.5 / np.sqrt(200)


@pytest.mark.parametrize("metric", METRICS)
def test_queries_that_say_nothing(metric: Any) -> None:
    """Zeros, by which axes cannot be judged, and for l2 queries at the centre, whose scores need no codes."""
    data = rows(1000, 1)
    index = TurboQuantIndex(DIM, 2, metric)
    centre = data.mean(axis=0, dtype=np.float64).astype(np.float32)
    index.train(data, queries=np.tile(centre, (50, 1)) if metric == "l2" else np.zeros((50, DIM)))
    index.add(data)
    assert index.learnt == "centre"
    assert recall(index, data, data[:100]) > 0.5


def test_one_dimension() -> None:
    data = np.random.default_rng(0).standard_normal((500, 1)).astype(np.float32) + 3
    for metric in ("ip", "l2"):
        index = TurboQuantIndex(1, 1, metric)  # type: ignore[arg-type]
        index.train(data)
        index.add(data)
        assert recall(index, data, data[:50]) > 0.9
    index = TurboQuantIndex(1, 1, "cosine")
    index.train(data)
    assert index.learnt == "centre"  # unit vectors of one dimension are alike


def test_vectors_of_another_distribution() -> None:
    """After a shift to other axes and another mean the index still ranks, if worse than untrained."""
    turn = np.linalg.qr(np.random.default_rng(1).standard_normal((DIM, DIM)))[0].astype(np.float32)
    base, queries = rows(2000, 4) @ turn, rows(100, 5) @ turn
    index = TurboQuantIndex(DIM, 4, "l2")
    index.train(rows(4000, 1))
    index.add(base)
    one = TurboQuantIndex(DIM, 1, "l2")
    one.add(base)
    assert recall(index, base, queries) > recall(one, base, queries)


@pytest.mark.parametrize("metric", METRICS)
def test_vectors_on_the_centre_and_off_the_axes(metric: Any) -> None:
    index = made(metric, 1)
    assert index.centre is not None
    more = np.stack([index.centre, 0 * index.centre, -index.centre, index.centre + 100 * np.eye(DIM)[0]])
    index.add(more.astype(np.float32))
    scores, ids = (
        np.asarray(part) for part in index.search(np.concatenate([more, rows(3, 2)]).astype(np.float32), 204)
    )
    assert np.isfinite(scores).all()
    assert (np.sort(ids, axis=1) == np.arange(204)).all()


@pytest.mark.parametrize("scale", [1e-15, 1e12])
@pytest.mark.parametrize("metric", METRICS)
def test_the_unit_of_the_vectors_does_not_matter(metric: Any, scale: float) -> None:
    """A power of two near `scale`: the same neighbours, and scores by its square (its first power for none)."""
    factor = np.float32(2.0 ** np.round(np.log2(scale)))
    index = TurboQuantIndex(DIM, 2, metric, seed=7)
    index.train(rows(2000, 1) * factor)
    index.add(rows(200) * factor)
    wanted, got = made(metric).search(rows(9, 2), 10), index.search(rows(9, 2) * factor, 10)
    np.testing.assert_array_equal(got[1], wanted[1])
    by = 1.0 if metric == "cosine" else float(factor) ** 2
    np.testing.assert_allclose(np.asarray(got[0], np.float64) / by, np.asarray(wanted[0]), rtol=1e-4, atol=1e-4)


def test_vectors_far_longer_than_the_sample_are_refused(saved: SavedOf) -> None:
    for metric, factor in (("l2", 1e4), ("ip", 1e7)):
        index = TurboQuantIndex(DIM, 2, metric, seed=7)  # type: ignore[arg-type]
        index.train(rows(2000, 1))
        before = saved(index)
        long = rows(5)
        long[3] *= factor
        with pytest.raises(InvalidInputError, match=r"near the sample's.*; train on a sample .* in row 3"):
            index.add(long)
        assert saved(index) == before


# Automatic training


def test_auto_trains_on_the_first_large_addition(saved: SavedOf) -> None:
    base = rows(AUTO_ROWS)
    index = TurboQuantIndex(DIM, 2, "l2", train="auto")
    assert index.learnt == "nothing"
    index.add(base)
    assert index.learnt == "axes"
    wanted = TurboQuantIndex(DIM, 2, "l2")
    wanted.train(base)
    wanted.add(base)
    assert saved(index) == saved(wanted)
    small = TurboQuantIndex(DIM, 2, "l2", train="auto")
    small.add(base[: AUTO_ROWS - 1])
    small.add(base)
    assert small.learnt == "nothing"
    given = TurboQuantIndex(DIM, 2, "l2", train="auto")
    given.train(rows(300, 1), learn="centre")
    given.add(base)
    assert given.learnt == "centre"
    with pytest.raises(InvalidInputError, match="train must be 'off' or 'auto', got True"):
        TurboQuantIndex(DIM, 2, train=True)  # type: ignore[arg-type]


def test_bad_arguments_change_nothing(saved: SavedOf) -> None:
    index = TurboQuantIndex(DIM, 2, "l2")
    before = saved(index)
    for sample, more, says in (
        (rows(100), {"queries": rows(5)[:, :3]}, r"queries must have shape \(n, 40\)"),
        (rows(100), {"queries": rows(0)}, "queries must have at least one row"),
        (rows(100), {"learn": "all"}, "learn must be 'axes' or 'centre', got 'all'"),
        (rows(100) * np.nan, {}, "sample must be finite"),
    ):
        with pytest.raises(InvalidInputError, match=says):
            index.train(sample, **more)  # type: ignore[arg-type]
    assert saved(index) == before
