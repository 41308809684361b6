"""What a row tells of the queries that it is near to.

A query for which a row x = c + z matters is near to it, so its coordinates along the axes lean towards those of the
row. With y_i = <z, a_i> the query's coordinate is, on average over such pairs, gamma_i y_i: the query *expected* of a
row is t = c + sum of gamma_i y_i a_i. What is kept beside the codes is made so that the score of t is exact
(`estimator`); the errors that remain are those of q - t, along axis i of second moment r_i m_i, m_i being that of the
queries. gamma is the slope of the regression over the pairs, r the share of the second moment that it leaves:

    gamma_i = E q_i y_i / E y_i^2,    r_i = 1 - gamma_i E q_i y_i / E q_i^2.

Pairs are queries with the rows of the sample nearest to them; rows of the sample, themselves left out, stand in where
no queries are given, and count as `STAND_INS` queries beside those that are.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

STAND_INS = 32
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


def neighbours_of(axes: Tensor, centre: Tensor, sample: Tensor, queries: Tensor | None, metric: str) -> Neighbours:
    """Slopes and shares along axes.

    Args:
        axes: (dim, dim) float64, orthonormal rows.
        centre: (dim,) float32.
        sample: (n, dim) float32, n >= 2.
        queries: (m, dim), likewise, or None; of norm 1 for "cosine", as the sample.
        metric: what is near.
    """
    rows = first_rows(sample)
    standing = torch.arange(0, len(rows), math.ceil(len(rows) / _MOST_QUERIES), device=rows.device)
    sums = _sums(axes, centre, rows, rows[standing], standing, metric) / len(standing)
    if queries is not None and bool((queries != 0).any()):  # else they say nothing
        given = queries[:_MOST_QUERIES]
        if metric == "ip":  # whose queries may be of any length
            given = given * (rows.double().square().mean() / given.double().square().mean()).sqrt().float()
        sums = (STAND_INS * sums + _sums(axes, centre, rows, given, None, metric)) / (STAND_INS + len(given))
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
