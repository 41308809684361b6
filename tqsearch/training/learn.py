"""From a sample, and queries if there are any, to a centre, axes, widths, and whether <c, z> is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tqsearch.codec import Codec
from tqsearch.training.allocation import Array, allocate, expected_error
from tqsearch.training.basis import Basis
from tqsearch.training.neighbours import Neighbours, moments_of
from tqsearch.training.spectrum import principal_axes

FEWEST_ROWS = 64  # of a sample from which axes are learnt
_WIDE = 256  # from this dimension on widths are given to blocks of 32 coordinates, so that GPU loads stay aligned
_FLOOR = 1e-6  # deviations are at least this part of the largest
_VAGUE = 0.25  # where the variance of products is so large beside their squared mean, scales are left as they are


@dataclass(frozen=True)
class Learnt:
    """What a sample taught.

    Attributes:
        centre: (dim,) float32.
        basis: the axes and the plan.
        keeps_product: whether <c, z> is kept for each vector; never for "l2", which keeps |z|^2.
        expected_error: of a score, squared, for queries as assumed: what chose between keeping <c, z> and not.
    """

    centre: Tensor
    basis: Basis
    keeps_product: bool
    expected_error: float


@dataclass(frozen=True)
class Spectrum:
    """A sample's centre, its principal axes, (dim, dim) float64 rows, and the variances along them, descending."""

    centre: Tensor
    axes: Tensor
    variances: Tensor


def centre_of(sample: Tensor) -> Tensor:
    """The mean of rows, (n, dim) to (dim,) float32, summed in float64."""
    return sample.double().mean(dim=0).float()


def spectrum_of(sample: Tensor, seed: int) -> Spectrum | None:
    """The spectrum of rows, (n, dim) float32; None for fewer than `FEWEST_ROWS` rows, or if all rows are alike."""
    centre = centre_of(sample)
    centred = sample - centre
    if len(sample) < FEWEST_ROWS or not bool((centred.abs().amax(dim=0) > 0).any()):
        return None
    return Spectrum(centre, *principal_axes(centred, seed))


def learn(
    spectrum: Spectrum,
    near: Neighbours,
    queries: Tensor | None,
    metric: str,
    budget: Callable[[bool], int],
    codec: Codec = "scalar",
    power: float = 0.5,
) -> Learnt | None:
    """Learns the widths of axes.

    The error of a score is <q, e>, with e the error of z's code, whose variance along axis i is lambda_i D(b_i). Its
    expected square is the sum of m_i lambda_i D(b_i), with m_i the second moment of the queries along axis i. But what
    decides a ranking is the difference of neighbours, which lies in all directions: so what `allocate` makes least is
    the sum of mu_i lambda_i D(b_i) with mu_i = m_i^power mean(m)^(1 - power). `choice` says how the power is chosen.

    Without `queries` they are taken to be distributed as the sample, and those given are believed as far as they differ
    from that by more than chance: `neighbours.moments_of`.

    For "cosine" and "ip", <q, z> = <q - c, z> + <c, z>. Keeping <c, z> costs bytes, which the codes then lack. Either
    way the score of the query t expected of a row is made exact (`neighbours`), by the kept number or, if none is kept,
    by the scale. What is left is, with v_i = r_i m_i the second moment of q - t, the sum of v_i lambda_i D(b_i); a
    scale brings the error of <t, z> into all other products, in proportion to them, which adds k E t_i^2 to v_i, k
    being the variance of <q - t, z> over the squared mean of <t, z>. The lesser of the two sums decides.

    Args:
        spectrum: of the sample.
        near: what its rows tell of the queries.
        queries: (m, dim) float32, of norm 1 for "cosine"; or None.
        metric: the index's.
        budget: the bytes a row of codes may take, without and with <c, z> kept.
        codec: of the coordinates.
        power: from 0, where the queries do not matter, to 1.

    Returns:
        What was learnt; None where the budget has no bytes for codes.
    """
    centre, axes, variances = spectrum.centre, spectrum.axes, spectrum.variances
    offset = axes @ centre.double()
    around, _ = moments_of(variances, queries, centre, axes)  # of q - c
    length = around.mean() / variances.mean() if metric == "ip" else 1.0  # squared; t is of the sample's
    spread = float((near.left * around * variances).sum() / length)
    mean = float((near.slopes * variances).sum())
    vague = spread >= _VAGUE * mean * mean
    choices = []
    slopes: Tensor | None
    for keeps in (False,) if metric == "l2" else (False, True):
        if budget(keeps) < 1:
            continue
        if metric == "l2" or keeps:
            moments, slopes, remaining = around, near.slopes, near.left * around
        else:
            moments, _ = moments_of(variances + offset.square(), queries, torch.zeros_like(centre), axes)
            expected = length * (offset.square() + near.slopes.square() * variances)  # E t_i^2
            slopes = None if vague else near.slopes
            remaining = moments if vague else near.left * around + spread / mean**2 * expected
        weights = variances * moments**power * moments.mean() ** (1 - power)
        order = torch.argsort(weights, descending=True, stable=True)
        basis = _allotted(order, weights, axes, variances, slopes, budget(keeps), codec)
        error = expected_error((remaining * variances)[order].cpu().numpy(), basis.plan, codec)
        choices.append(Learnt(centre, basis, keeps, error))
    return min(choices, key=lambda learnt: learnt.expected_error, default=None)


def _allotted(
    order: Tensor, weights: Tensor, axes: Tensor, variances: Tensor, slopes: Tensor | None, budget: int, codec: Codec
) -> Basis:
    """The basis of axes put in an order, in which the weights descend."""
    weights, axes, variances = weights[order], axes[order], variances[order].cpu()
    dim = len(weights)
    block = 32 if dim >= _WIDE and dim % 32 == 0 else 8
    relative: Array = (weights / weights.max()).cpu().numpy()
    plan = allocate(relative, budget, block, codec)
    coded = torch.from_numpy(np.repeat([band.width > 0 for band in plan.bands], [band.size for band in plan.bands]))
    deviations = variances.sqrt()
    deviations = deviations.clamp(min=_FLOOR * float(deviations.max())).float()
    if slopes is not None:
        slopes = slopes[order].cpu()
        rest = variances[~coded]  # one slope for all: their coordinates are not looked at
        slopes[~coded] = (slopes[~coded] * rest).sum() / rest.sum().clamp(min=1e-300)
        slopes = slopes.float()
    return Basis(plan, axes.cpu()[coded].float().contiguous(), deviations, codec, slopes=slopes)
