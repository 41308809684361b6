"""What to learn: axes or the centre alone, and how much the queries' moments count for the widths.

A candidate codes rows, and its scores are compared with the exact ones where rankings are decided: for each query among
the rows nearest to it. The measure is the squared error of the scores after their mean error is taken off, which
reorders nothing, over the variance of the exact scores, averaged over the queries. Recall follows it closely: decision
008 has both side by side.

1. Axes or the centre: learnt from three quarters of the sample, judged on the fourth.
2. The power of the moments (see `learn`): 0.5, unless another has clearly less error. Where queries are given, theirs
   is measured, among the rows of the whole sample, and of 256 or more 5 % less is clear. Of fewer it takes 15 %, as it
   does where none are given: rows held out stand in for them, which may be of another kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tqsearch import kernels
from tqsearch.estimator import Estimator
from tqsearch.training.basis import Basis
from tqsearch.training.learn import Spectrum, centre_of, learn, spectrum_of
from tqsearch.training.neighbours import Neighbours, exact_scores, first_rows, neighbours_of

POWERS = (0.5, 0.75, 1.0)
_CLEARLY = {"given": 0.95, "stand-ins": 0.85}
_MOST_QUERIES = 256
_NEAR_HELD_OUT = 10
_NEAR = 30

Make = Callable[[Tensor, Basis | None, bool], Estimator]


def chosen(sample: Tensor, queries: Tensor | None, untrained: Estimator, make: Make) -> Estimator:
    """The centre alone or learnt axes; see the module's docstring.

    Args:
        sample: (n, dim) float32, unit rows for "cosine".
        queries: (m, dim), likewise, or None.
        untrained: the index's estimator before training.
        make: an estimator of a centre, a basis, and whether <c, z> is kept.
    """
    quantizer, metric = untrained.quantizer, untrained.metric

    def seen(rows: Tensor) -> tuple[Spectrum, Neighbours] | None:
        spectrum = spectrum_of(rows, quantizer.seed)
        if spectrum is None:
            return None
        return spectrum, neighbours_of(spectrum.axes, spectrum.variances, spectrum.centre, rows, queries, metric)

    def with_axes(part: tuple[Spectrum, Neighbours] | None, power: float) -> Estimator | None:
        if part is None:
            return None
        learnt = learn(*part, queries, metric, lambda keeps: _budget(untrained, keeps), quantizer.codec, power)
        return None if learnt is None else make(learnt.centre, learnt.basis, learnt.keeps_product)

    held_out = torch.arange(len(sample), device=sample.device) % 4 == 3
    part = seen(sample[~held_out])
    found = {power: with_axes(part, power) for power in POWERS}
    first = found[POWERS[0]]
    if part is None or first is None:
        return make(centre_of(sample), None, True)
    rows = sample[held_out]
    asking = min(_MOST_QUERIES, len(rows) // 4)
    asked, rows = (rows[:asking], rows[asking:]) if queries is None else (queries[:_MOST_QUERIES], rows)
    judge = _Judge(rows, asked, metric, _NEAR_HELD_OUT)
    if judge.error(first) >= judge.error(make(part[0].centre, None, True)):
        return make(centre_of(sample), None, True)
    if queries is not None:
        judge = _Judge(sample, asked, metric, _NEAR)
    errors = {power: judge.error(estimator) for power, estimator in found.items() if estimator is not None}
    best = min(errors, key=lambda power: errors[power])
    enough = queries is not None and len(queries) >= _MOST_QUERIES
    if errors[best] >= _CLEARLY["given" if enough else "stand-ins"] * errors[POWERS[0]]:
        best = POWERS[0]
    whole = with_axes(seen(sample), best)
    assert whole is not None  # it has the rows of its part
    return whole


def _budget(untrained: Estimator, keeps_product: bool) -> int:
    """Bytes of codes, so that all that is kept of a vector is what it is untrained."""
    kept = 2 + (2 if keeps_product or untrained.metric == "l2" else 0)
    return untrained.bytes_per_vector - kept


class _Judge:
    """The exact scores of queries with the rows nearest to them, and the error of an estimator's."""

    def __init__(self, rows: Tensor, queries: Tensor, metric: str, near_rows: int) -> None:
        rows, self._queries = first_rows(rows), queries
        exact = exact_scores(rows.double(), queries.double(), metric)
        near = exact.topk(min(near_rows, len(rows)), dim=1).indices
        used, places = torch.unique(near, return_inverse=True)
        self._rows, self._near = rows[used], places
        exact = exact.gather(1, near)
        self._exact = exact - exact.mean(dim=1, keepdim=True)

    def error(self, estimator: Estimator) -> float:
        """The module docstring's measure; infinite if a score is not finite, or no query tells its rows apart."""
        columns = estimator.encode(self._rows)
        scanned = estimator.scanned(self._queries)
        scores = (scanned.queries.double() @ _levels(estimator, columns["packed"]).t()) * columns["scales"].double()
        if "bias" in columns:
            scores = scores + columns["bias"].double()
        errors = (scores * estimator.unit).gather(1, self._near)
        errors = errors - errors.mean(dim=1, keepdim=True) - self._exact
        spread = self._exact.square().sum(dim=1)
        told = spread > 0
        found = float((errors.square().sum(dim=1)[told] / spread[told]).mean())
        return found if math.isfinite(found) else math.inf


def _levels(estimator: Estimator, packed: Tensor) -> Tensor:
    tables = estimator.quantizer.tables(packed.device)
    ones = torch.ones(len(packed), dtype=torch.float32, device=packed.device)
    return kernels.reconstruct(packed, ones, tables, backend=estimator.quantizer.backend).double()
