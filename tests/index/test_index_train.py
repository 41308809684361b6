"""The learnt centre: what it changes, beside the oracle, and what it must not."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from index_oracle import Parsed, bias_of, check_searches, estimate, mean_distortion, unit_rows

from tqsearch.errors import InvalidInputError
from tqsearch.index import TurboQuantIndex

METRICS = ["ip", "cosine", "l2"]
DIM = 24
SavedOf = Callable[[TurboQuantIndex], bytes]
ParsedOf = Callable[[TurboQuantIndex], Parsed]


def rows(n: int, seed: int = 0) -> np.ndarray:
    """Vectors far from the origin: without a centre most bits go to their common mean."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((n, DIM)) + 5 * np.sin(np.arange(DIM))).astype(np.float32)


def made(metric: Any, *, train: bool = True, seed: int = 7, bits: float = 3) -> TurboQuantIndex:
    index = TurboQuantIndex(DIM, bits, metric, seed=seed)
    if train:
        index.train(rows(500, 1), learn="centre")
    index.add(rows(200))
    return index


def mean(metric: str) -> np.ndarray:
    sample = rows(500, 1).astype(np.float64)
    return (unit_rows(sample) if metric == "cosine" else sample).mean(0)


@pytest.mark.parametrize("metric", METRICS)
def test_results_equal_the_oracle(parsed: ParsedOf, metric: str) -> None:
    index = made(metric)
    content = parsed(index)
    centre = content.tensors["centre"]
    np.testing.assert_allclose(centre, mean(metric), rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(index.centre, centre)
    wanted = estimate(rows(200), content.plan, 7, metric, centre.astype(np.float64))
    np.testing.assert_allclose(content.estimates, wanted, atol=2e-3 * np.abs(wanted).max())
    rounding = 2.0**-11 if metric == "cosine" else 2.0**-19
    bias = bias_of(rows(200), metric, centre)
    np.testing.assert_allclose(content.tensors["bias"], bias, rtol=rounding, atol=rounding)
    check_searches(index, content, rows(20, 2))
    shrunk = content.estimates * (1 - mean_distortion(content.plan)) + centre
    np.testing.assert_allclose(index.reconstruct(np.arange(200)), shrunk, atol=1e-5 * np.abs(shrunk).max())


def across(x: np.ndarray, q: np.ndarray) -> float:
    """The sum over all pairs of |x|^2 |q|^2 sin^2 of their angle."""
    return float(np.outer((q**2).sum(1), (x**2).sum(1)).sum() - ((q @ x.T) ** 2).sum())


@pytest.mark.parametrize("metric", METRICS)
def test_scores_stay_unbiased_and_become_better(metric: str) -> None:
    """Over seeds the mean error is within five standard errors of zero; and the squared error falls as theory says.

    The scale makes the error of z orthogonal to z, in a random direction and of a length in proportion to |z|: so the
    square of its product with q - c is in proportion to |z|^2 |q - c|^2 sin^2(q - c, z), where z = x - c.
    """
    vectors, queries = rows(200), rows(200)[:10] + 0.3 * (rows(10, 3) - rows(10, 4))
    x, q = vectors.astype(float), queries.astype(float)
    truth = {
        "ip": q @ x.T,
        "cosine": unit_rows(q) @ unit_rows(x).T,
        "l2": ((q[:, None] - x) ** 2).sum(2),
    }[metric]
    errors: dict[bool, list[np.ndarray]] = {False: [], True: []}
    for train in errors:
        for seed in range(30):
            scores, ids = (
                np.asarray(part) for part in made(metric, train=train, seed=seed, bits=1).search(queries, 200)
            )
            errors[train].append(np.take_along_axis(scores, ids.argsort(1), 1) - truth)
    for found in errors.values():
        means = np.array([error.mean() for error in found])
        assert abs(means.mean()) < 5 * means.std(ddof=1) / np.sqrt(len(means))
    centre = mean(metric)
    given = (unit_rows(x), unit_rows(q)) if metric == "cosine" else (x, q)
    expected = across(given[0] - centre, given[1] - centre) / across(*given)
    assert expected < 0.6
    ratios = np.array(
        [np.square(a).sum() / np.square(b).sum() for a, b in zip(errors[True], errors[False], strict=True)]
    )
    assert abs(ratios.mean() - expected) < 5 * ratios.std(ddof=1) / np.sqrt(len(ratios)) + 0.02


@pytest.mark.parametrize("metric", METRICS)
def test_parts_blocks_and_files(saved: SavedOf, tmp_path: Any, monkeypatch: Any, metric: Any) -> None:
    wanted = saved(made(metric))
    parts = TurboQuantIndex(DIM, 3, metric, seed=7)
    parts.train(rows(500, 1), learn="centre")
    (tmp_path / "empty").write_bytes(saved(parts))
    for part in np.split(rows(200), [1, 2, 90, 190]):
        parts.add(part)
    assert saved(parts) == wanted
    # A file of a trained index without vectors is one too.
    monkeypatch.setattr("tqsearch.kernels.reference.ENCODE_BLOCK", 37 * DIM)
    loaded = TurboQuantIndex.load(tmp_path / "empty")
    np.testing.assert_array_equal(loaded.centre, parts.centre)
    loaded.add(rows(200))
    assert saved(loaded) == wanted
    (tmp_path / "whole").write_bytes(wanted)
    again = TurboQuantIndex.load(tmp_path / "whole")
    np.testing.assert_array_equal(again.search(rows(3, 2), 5)[0], parts.search(rows(3, 2), 5)[0])
    again.remove(range(190))
    extra = {"ip": 4, "cosine": 2, "l2": 0}[metric]
    assert again.bytes_per_vector == TurboQuantIndex(DIM, 3, metric).bytes_per_vector + extra


def test_only_before_vectors(saved: SavedOf) -> None:
    index = made("l2")
    before = saved(index)
    with pytest.raises(InvalidInputError, match="train must come before add, got an index of 200 vectors"):
        index.train(rows(10), learn="centre")
    assert saved(index) == before
    index.remove(range(200))
    index.train(rows(1, 5), learn="centre")
    np.testing.assert_array_equal(index.centre, rows(1, 5)[0])
    index.add(rows(1, 5))
    assert np.asarray(index.search(rows(1, 5)[0], 1)[0])[0] == 0
    assert index.ids.tolist() == [200]


BAD_SAMPLES: dict[str, tuple[Any, str]] = {
    "no rows": (np.empty((0, DIM)), r"at least one row, got shape \(0, 24\)"),
    "narrow": (np.ones((3, DIM - 1)), r"shape \(n, 24\), got \(3, 23\)"),
    "one row": (np.ones(DIM), r"shape \(n, 24\), got \(24,\)"),
    "nan": (np.where(np.eye(9, DIM, -4) > 0, np.nan, 1.0), "row 4"),
    "text": (np.full((2, DIM), "a"), "real numbers"),
    "too large": (np.full((3, DIM), 1e38), "squared norm .* finite in float32"),
}


@pytest.mark.parametrize("case", BAD_SAMPLES)
def test_bad_samples_change_nothing(saved: SavedOf, case: str) -> None:
    index = TurboQuantIndex(DIM, 3, "ip")
    index.train(rows(3), learn="centre")
    before = saved(index)
    sample, says = BAD_SAMPLES[case]
    with pytest.raises(InvalidInputError, match="sample.*" + says):
        index.train(sample, learn="centre")
    assert saved(index) == before


@pytest.mark.parametrize("metric", METRICS)
def test_vectors_without_residual(metric: str) -> None:
    """The centre itself has nothing left to code: its scale is 0, not 0/0, and its score is exact."""
    centre = rows(1, 3)
    index = TurboQuantIndex(DIM, 2, metric)  # type: ignore[arg-type]
    index.train(centre, learn="centre")
    index.add(np.concatenate([centre, np.zeros_like(centre), -centre, rows(3)]))
    queries = np.concatenate([centre, np.zeros_like(centre), rows(2, 4)])
    scores, ids = (np.asarray(part) for part in index.search(queries, 6))
    assert np.isfinite(scores).all()
    assert (np.sort(ids, axis=1) == np.arange(6)).all()
    q, c = queries.astype(float), centre.astype(float)
    exact = {"ip": q @ c[0], "cosine": unit_rows(q) @ unit_rows(c)[0], "l2": ((q - c) ** 2).sum(1)}[metric]
    np.testing.assert_allclose(scores[ids == 0], exact, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.asarray(index.reconstruct([0])), unit_rows(c) if metric == "cosine" else c, rtol=1e-6)


def test_a_product_with_the_centre_that_overflows(saved: SavedOf) -> None:
    index = TurboQuantIndex(DIM, 3, "ip")
    index.train(np.full((2, DIM), 1e18, np.float32), learn="centre")
    before = saved(index)
    vectors = rows(3)
    vectors[1] = 1e30
    with pytest.raises(InvalidInputError, match=r"products with the centre .* overflow in row 1"):
        index.add(vectors)
    assert saved(index) == before


def test_the_sample_is_not_kept() -> None:
    sample = rows(1)
    index = TurboQuantIndex(DIM, 4, "ip")
    index.train(sample, learn="centre")
    sample[:] = 0
    held = index.centre
    np.testing.assert_array_equal(held, rows(1)[0])
    assert held is not None
    held[:] = 0
    np.testing.assert_array_equal(index.centre, rows(1)[0])
    from_torch = TurboQuantIndex(DIM, 4, "ip")
    from_torch.train(torch.from_numpy(rows(1)), learn="centre")
    np.testing.assert_array_equal(from_torch.centre, index.centre)


def test_train_between_the_two_halves_of_an_add(saved: SavedOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread trains after an add has made its codes and before it appends them: they must be made anew."""
    index, wanted = TurboQuantIndex(DIM, 4, "l2"), TurboQuantIndex(DIM, 4, "l2")
    wanted.train(rows(50, 1), learn="centre")
    wanted.add(rows(20))
    encode, times = index._encode, []

    def encode_then_train(*args: Any) -> Any:
        columns = encode(*args)
        times.append(1)
        if len(times) == 1:
            index.train(rows(50, 1), learn="centre")
        return columns

    monkeypatch.setattr(index, "_encode", encode_then_train)
    index.add(rows(20))
    assert saved(index) == saved(wanted)
