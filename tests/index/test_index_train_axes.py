"""Indexes of learnt axes: beside the oracle, beside theory, and beside the untrained index."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from index_oracle import check_searches, distortion, parse
from learnt_rows import DIM, METRICS, made, recall, rows
from trained_oracle import parse_trained

from tqsearch.index import TurboQuantIndex

SavedOf = Callable[[TurboQuantIndex], bytes]


@pytest.mark.parametrize("metric", METRICS)
def test_results_equal_the_oracle(saved: SavedOf, metric: str) -> None:
    index = made(metric)
    content = parse_trained(saved(index))
    wanted = content.encode(rows(200))
    # A code may differ where a coordinate lies within float32 of a boundary; scales are float16.
    np.testing.assert_allclose(content.estimates, wanted, atol=2e-3 * np.abs(wanted).max())
    if content.has_bias:
        bias = content.encode_bias(rows(200))
        np.testing.assert_allclose(content.double("bias") * content.unit, bias, rtol=2**-10, atol=1e-6)
    check_searches(index, content, rows(20, 2))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("bits", [1, 2, 2.5, 3])
def test_a_vector_costs_not_more_than_untrained(saved: SavedOf, metric: Any, bits: float) -> None:
    index = made(metric, bits)
    plain = TurboQuantIndex(DIM, bits, metric)
    content = parse_trained(saved(index))
    columns = sum(content.tensors[name].nbytes for name in ("packed", "scales", "bias") if name in content.tensors)
    assert columns == 200 * index.bytes_per_vector
    assert plain.bytes_per_vector - 2 < index.bytes_per_vector <= plain.bytes_per_vector
    once = sum(content.tensors[name].nbytes for name in ("axes", "deviations", "slopes") if name in content.tensors)
    assert index.nbytes == columns + once
    assert f"expected distortion {index.plan.expected_distortion:.3g}" in str(index.plan)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_the_error_of_scores_is_what_theory_says(saved: SavedOf, bits: float) -> None:
    """Gaussian vectors and queries: the squared error of scores has the expectation of the oracle's formula.

    Queries are independent of the vectors, with unit variance in every direction. The mean over blocks of queries has a
    standard error that the blocks show; 3 % are for the law of a coordinate, once its vector's length is divided out.
    """
    index = TurboQuantIndex(DIM, bits, "ip", seed=7)
    index.train(rows(20000, 1))
    base = rows(500)
    index.add(base)
    content = parse_trained(saved(index))
    queries = np.random.default_rng(5).standard_normal((400, DIM)).astype(np.float32)
    scores, ids = (np.asarray(part) for part in index.search(queries, 500))
    exact = queries.astype(float) @ base.T.astype(float)
    errors = np.square(np.take_along_axis(scores, ids.argsort(1), 1) - exact).mean(axis=0)
    z = content.residuals(base)
    axes = content.double("axes")
    inside = np.square(z @ axes.T).mean(0)
    outside = (np.square(z).sum(1).mean() - inside.sum()) / max(DIM - len(axes), 1)
    variances = np.full(DIM, outside)
    variances[content.widths > 0] = inside
    moments = np.ones(DIM)
    if content.header["keeps_product"]:  # the queries are q - c
        moments = moments + np.square(content.double("centre")).sum() / DIM
    wanted = content.expected_error(variances, moments)
    assert abs(errors.mean() - wanted) < 5 * errors.std(ddof=1) / np.sqrt(len(errors)) + 0.03 * wanted


@pytest.mark.parametrize("metric", METRICS)
def test_recall_is_that_of_wider_codes(saved: SavedOf, metric: Any) -> None:
    """At 1 bit the expected error of scores is below the untrained index's at 2: so recall must be no lower.

    Both are means over 200 queries of 10 neighbours, each with a standard error below 0.5 / sqrt(200).
    """
    dim = 128
    base, queries = rows(2000, 0, dim, 2.0, 0.0), rows(200, 3, dim, 2.0, 0.0)
    index = TurboQuantIndex(dim, 1, metric, seed=1)
    index.train(rows(4000, 1, dim, 2.0, 0.0))
    index.add(base)
    content = parse_trained(saved(index))
    variances = content.double("deviations") ** 2
    variances[content.widths > 0] = np.square(content.residuals(base) @ content.double("axes").T).mean(0)
    wide = distortion(2, dim) / (1 - distortion(2, dim)) * variances.sum() ** 2 / dim
    assert content.expected_error(variances, variances) < wide  # queries are distributed as the vectors
    found = {}
    for bits in (1, 2):
        plain = TurboQuantIndex(dim, bits, metric, seed=1)
        plain.add(base)
        found[bits] = recall(plain, base, queries)
    trained = recall(index, base, queries)
    assert trained > found[2] - 2 * 0.5 / np.sqrt(200)
    assert trained > found[1] + 0.1


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_queries_given_win_where_they_differ_and_lose_nowhere(metric: Any, bits: int) -> None:
    """Queries that turn away from the vectors' long axes, and such as are distributed as the vectors.

    Recall is a mean over 200 queries of 10 neighbours; of two indexes on the same queries the difference has a standard
    error below 0.3 / sqrt(200).
    """
    dim, offset = 64, 0.0
    base, sample = rows(3000, 0, dim, 1.0, offset), rows(4000, 1, dim, 1.0, offset)
    other = np.linalg.qr(np.random.default_rng(99).standard_normal((dim, dim)))[0]
    away = np.random.default_rng(5).standard_normal((400, dim)) * np.linspace(0.02, 1.0, dim) ** 2 @ other
    gains = []
    for queries in (away.astype(np.float32), rows(400, 6, dim, 1.0, offset)):
        found = []
        for given in (None, queries[:200]):
            index = TurboQuantIndex(dim, bits, metric, seed=1)
            index.train(sample, given)
            index.add(base)
            found.append(recall(index, base, queries[200:]))
        gains.append(found[1] - found[0])
    assert gains[0] > 0.05
    assert gains[1] > -2 * 0.3 / np.sqrt(200)


@pytest.mark.parametrize("metric", METRICS)
def test_parts_blocks_and_files(saved: SavedOf, tmp_path: Path, monkeypatch: Any, metric: Any) -> None:
    wanted = saved(made(metric))
    parts = TurboQuantIndex(DIM, 2, metric, seed=7)
    parts.train(rows(2000, 1))
    (tmp_path / "empty").write_bytes(saved(parts))
    for part in np.split(rows(200), [1, 2, 90, 190]):
        parts.add(part)
    assert saved(parts) == wanted
    monkeypatch.setattr("tqsearch.quantizer._BASIS_BLOCK", 37 * DIM)
    loaded = TurboQuantIndex.load(tmp_path / "empty")
    assert loaded.learnt == "axes"
    loaded.add(rows(200))
    assert saved(loaded) == wanted
    (tmp_path / "whole").write_bytes(wanted)
    again = TurboQuantIndex.load(tmp_path / "whole")
    for first, second in zip(again.search(rows(3, 2), 5), parts.search(rows(3, 2), 5), strict=True):
        np.testing.assert_array_equal(first, second)
    again.remove(range(200))
    again.train(rows(100, 3), learn="centre")
    again.add(rows(50))
    assert again.learnt == "centre"
    assert parse(saved(again)).plan == ((DIM, 2),)


def test_reconstruction_has_the_expected_distortion() -> None:
    index = TurboQuantIndex(DIM, 3, "l2", seed=7)
    index.train(rows(20000, 1))
    base = rows(3000, 4)
    index.add(base)
    assert index.centre is not None
    z, found = base - index.centre, np.asarray(index.reconstruct(np.arange(3000))) - index.centre
    shares = np.square(found - z).sum(1) / np.square(z).sum(1).mean()
    known = index.plan.expected_distortion
    assert known is not None
    # 5 % are for the trained variances, of 20,000 rows, and for the law once a vector's length is divided out.
    assert abs(shares.mean() - known) < 5 * shares.std(ddof=1) / np.sqrt(3000) + 0.05 * known


def test_queries_change_the_widths_and_lower_the_error_for_such_queries() -> None:
    """Queries lie along the last axes, where vectors vary least: their scores get better by what the widths say."""
    base = rows(1500, 4, power=0.6, offset=0.0)
    turn = np.linalg.qr(np.random.default_rng(99).standard_normal((DIM, DIM)))[0]
    spread = np.where(np.arange(DIM) < DIM - 8, 0.05, 1.0)
    asked = ((np.random.default_rng(6).standard_normal((600, DIM)) * spread) @ turn).astype(np.float32)
    errors = []
    for queries in (None, asked[:300]):
        index = TurboQuantIndex(DIM, 2, "ip", seed=7)
        index.train(rows(4000, 1, power=0.6, offset=0.0), queries)
        assert index.learnt == "axes"
        index.add(base)
        scores, ids = (np.asarray(part) for part in index.search(asked[300:], 1500))
        exact = asked[300:].astype(float) @ base.T.astype(float)
        errors.append(np.square(np.take_along_axis(scores, ids.argsort(1), 1) - exact).mean())
    assert errors[1] < 0.5 * errors[0]
