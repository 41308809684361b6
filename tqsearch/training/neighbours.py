"""What a row tells of the queries that it is near to.

A query for which a row x = c + z matters is near to it, so its coordinates along the axes lean towards those of the
row. With y_i = <z, a_i> the query's coordinate is, on average over such pairs, gamma_i y_i: the query *expected* of a
row is t = c + sum of gamma_i y_i a_i. What is kept beside the codes is made so that the score of t is exact
(`estimator`); the errors that remain are those of q - t, along axis i of second moment r_i m_i, m_i being that of the
queries. gamma is the slope of the regression over the pairs, r the share of the second moment that it leaves:

    gamma_i = E q_i y_i / E y_i^2,    r_i = 1 - gamma_i E q_i y_i / E q_i^2.

Pairs are queries with the rows of the sample nearest to them. Rows of the sample, themselves left out, stand in where
no queries are given; queries that are given replace them as far as they differ from them by more than chance.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

_MOST_ROWS = 1 << 14  # among which the nearest are looked for,
_MOST_NUMBERS = 1 << 24  # and the most numbers of these
_MOST_QUERIES = 512
_NEAR = 10
_BLOCK = 32  # queries at a time


class Neighbours(NamedTuple):
    """See the module's docstring.

    Attributes:
        slopes: (dim,) float64, gamma, from 0 to 1; 0 along an axis on which the rows do not vary.
        left: (dim,) float64, r, from 0 to 1.
    """

    slopes: Tensor
    left: Tensor


def first_rows(sample: Tensor) -> Tensor:
    """As many rows of a sample, (n, dim), as nearest rows are looked for in."""
    return sample[: min(_MOST_ROWS, _MOST_NUMBERS // sample.shape[1])]


def exact_scores(rows: Tensor, queries: Tensor, metric: str) -> Tensor:
    """The larger the nearer: (q, n) of (n, dim) and (q, dim), up to a constant for each query."""
    products = queries @ rows.t()
    return 2.0 * products - rows.square().sum(dim=1) if metric == "l2" else products


def moments_of(stand_ins: Tensor, queries: Tensor | None, origin: Tensor, axes: Tensor) -> tuple[Tensor, float]:
    """The second moments of queries along axes, drawn towards those of stand-ins, and how far they are believed.

    Of the squared distance between the moments given and those of stand-ins, brought to the same sum, a part is chance:
    the variance of a mean of so many squares, at least that of Gaussians. The share of the rest is how far the queries
    are believed. Distances and variances are summed over the axes in parts of the stand-ins' moments.

    Args:
        stand_ins: (dim,) float64, >= 0: the moments if no queries are given.
        queries: (m, dim) float32, or None.
        origin: (dim,) float32: the moments are those of q - origin.
        axes: (dim, dim) float64, orthonormal rows.

    Returns:
        (dim,) float64, and a number from 0 to 1.
    """
    if queries is None:
        return stand_ins, 0.0
    given, fourth = torch.zeros_like(stand_ins), torch.zeros_like(stand_ins)
    for block in torch.split(queries - origin, _MOST_ROWS):
        squares = (block.double() @ axes.t()).square() / len(queries)
        given += squares.sum(dim=0)
        fourth += squares.square().sum(dim=0)
    alike = stand_ins * (given.mean() / stand_ins.mean())
    if not alike.mean() > 0:  # the queries are all zero, and say nothing
        return stand_ins, 0.0
    spread = torch.maximum(fourth - given.square() / len(queries), 2 * given.square() / len(queries))
    parts = 1 / alike.clamp(min=1e-300)
    apart, chance = float(((given - alike).square() * parts).sum()), float((spread * parts).sum())
    known = max(apart - chance, 0.0) / apart if apart > 0 else 0.0
    return alike + known * (given - alike), known


def neighbours_of(
    axes: Tensor, variances: Tensor, centre: Tensor, sample: Tensor, queries: Tensor | None, metric: str
) -> Neighbours:
    """Slopes and shares along axes.

    Args:
        axes: (dim, dim) float64, orthonormal rows.
        variances: (dim,) float64, of the sample along them.
        centre: (dim,) float32.
        sample: (n, dim) float32, n >= 2.
        queries: (m, dim), likewise, or None; of norm 1 for "cosine", as the sample.
        metric: what is near.
    """
    rows = first_rows(sample)
    standing = torch.arange(0, len(rows), math.ceil(len(rows) / _MOST_QUERIES), device=rows.device)
    sums = _sums(axes, centre, rows, rows[standing], standing, metric) / len(standing)
    known = moments_of(variances, queries, centre, axes)[1]
    if queries is not None and known > 0:
        given = queries[:_MOST_QUERIES]
        if metric == "ip":  # whose queries may be of any length
            length = given.double().square().mean().sqrt().clamp(min=1e-30)
            given = given * (rows.double().square().mean().sqrt() / length).float()
        sums = (1 - known) * sums + known * _sums(axes, centre, rows, given, None, metric) / len(given)
    products, squares, moments = sums
    slopes = (products / torch.where(squares > 0, squares, math.inf)).clamp(0, 1)
    left = moments - 2 * slopes * products + slopes.square() * squares
    return Neighbours(slopes, (left / torch.where(moments > 0, moments, math.inf)).clamp(0, 1))


def _sums(axes: Tensor, centre: Tensor, rows: Tensor, queries: Tensor, standing: Tensor | None, metric: str) -> Tensor:
    """(3, dim) float64: q_i y_i, y_i^2 and q_i^2 of queries with the rows near to them, their mean for each query."""
    sums = torch.zeros((3, len(axes)), dtype=torch.float64, device=axes.device)
    near_rows = min(_NEAR, len(rows) - 1)
    for first in range(0, len(queries), _BLOCK):
        asked = queries[first : first + _BLOCK]
        scores = exact_scores(rows, asked, metric)
        if standing is not None:
            scores.scatter_(1, standing[first : first + _BLOCK, None], -math.inf)
        near = scores.topk(near_rows, dim=1).indices
        y = (rows[near] - centre).double() @ axes.t()
        q = ((asked - centre).double() @ axes.t())[:, None]
        sums += torch.stack([(part / near_rows).sum(dim=(0, 1)) for part in (q * y, y * y, (q * q).expand_as(y))])
    return sums
