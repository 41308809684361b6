"""Whether learnt axes pay: measured on rows of the sample that were not learnt from."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tqsearch import kernels
from tqsearch.estimator import Estimator
from tqsearch.training.basis import Basis
from tqsearch.training.learn import Learnt, centre_of, learn

_MOST_ROWS = 1024  # of those held out, that are coded
_MOST_QUERIES = 256

Make = Callable[[Tensor, Basis | None, bool], Estimator]


def chosen(sample: Tensor, queries: Tensor | None, untrained: Estimator, make: Make) -> Estimator:
    """The better of the centre alone and learnt axes.

    Both are learnt from one half of the sample and code rows of the other; the mean squared error of their scores
    against the exact ones decides. The winner is then learnt from the whole sample.

    Args:
        sample: (n, dim) float32, unit rows for "cosine".
        queries: (m, dim), likewise, or None: rows held out are then asked for one another.
        untrained: the index's estimator before training.
        make: an estimator of a centre, a basis, and whether <c, z> is kept.
    """

    def learnt_from(rows: Tensor) -> Learnt | None:
        quantizer = untrained.quantizer
        return learn(
            rows, queries, untrained.metric, lambda keeps: _budget(untrained, keeps), quantizer.seed, quantizer.codec
        )

    alone = make(centre_of(sample), None, True)
    half = learnt_from(sample[::2])
    if half is None:
        return alone
    held_out = sample[1::2][:_MOST_ROWS]
    asked = sample[1::2][-_MOST_QUERIES:] if queries is None else queries[:_MOST_QUERIES]
    with_axes = make(half.centre, half.basis, half.keeps_product)
    if _error(with_axes, held_out, asked) >= _error(make(half.centre, None, True), held_out, asked):
        return alone
    whole = learnt_from(sample)
    assert whole is not None  # it has the rows of its half
    return make(whole.centre, whole.basis, whole.keeps_product)


def _budget(untrained: Estimator, keeps_product: bool) -> int:
    """Bytes of codes, so that all that is kept of a vector is what it is untrained."""
    kept = 2 + (2 if keeps_product or untrained.metric == "l2" else 0)
    return untrained.bytes_per_vector - kept


def _error(estimator: Estimator, rows: Tensor, queries: Tensor) -> float:
    """The mean squared error of scores, after the mean error of each query, which reorders nothing, is taken off."""
    columns = estimator.encode(rows)
    scanned = estimator.scanned(queries)
    quantizer = estimator.quantizer
    levels = _levels(estimator, columns["packed"])
    scores = (scanned.queries.double() @ levels.t()) * columns["scales"].double()
    if "bias" in columns:
        scores = scores + columns["bias"].double()
    centre = torch.zeros(quantizer.dim) if quantizer.centre is None else quantizer.centre
    z, q = rows.double() - centre.to(rows.device), queries.double()
    if estimator.metric == "l2":
        exact = 2.0 * (q - centre.to(rows.device)) @ z.t() - z.square().sum(dim=1)
    else:
        exact = q @ z.t()
    errors = scores * estimator.unit - exact
    errors = errors - errors.mean(dim=1, keepdim=True)
    found = float(errors.square().mean())
    return found if math.isfinite(found) else math.inf


def _levels(estimator: Estimator, packed: Tensor) -> Tensor:
    tables = estimator.quantizer.tables(packed.device)
    ones = torch.ones(len(packed), device=packed.device)
    return kernels.reconstruct(packed, ones, tables, backend=estimator.quantizer.backend).double()
