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
from tqsearch.training.spectrum import principal_axes

FEWEST_ROWS = 64  # of a sample from which axes are learnt
PRIOR_QUERIES = 32  # queries given count beside so many that are distributed as the sample
_WIDE = 256  # from this dimension on widths are given to blocks of 32 coordinates, so that GPU loads stay aligned
_FLOOR = 1e-6  # deviations are at least this part of the largest


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

    Without `queries` they are taken to be distributed as the sample. The moments of few queries are drawn towards that:
    they are the mean over the queries given and `PRIOR_QUERIES` more of the sample's kind and the given ones' length.

    For "cosine" and "ip", <q, z> = <q - c, z> + <c, z>. Keeping <c, z> costs bytes, which the codes then lack, and
    makes m that of q - c. The expected error decides.

    Args:
        spectrum: of the sample.
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
    choices = []
    for keeps in (False,) if metric == "l2" else (False, True):
        if budget(keeps) < 1:
            continue
        moved = metric == "l2" or keeps  # the queries are q - c
        moments = variances if moved else variances + offset.square()
        if queries is not None:
            given = _second_moments((queries - centre) if moved else queries, axes)
            length = given.mean() / moments.mean()
            if length > 0:  # else they are all zero, and say nothing
                known = len(queries) / (len(queries) + PRIOR_QUERIES)
                moments = known * given + (1 - known) * moments * length
        weights = variances * moments**power * moments.mean() ** (1 - power)
        order = torch.argsort(weights, descending=True, stable=True)
        basis, error = _allotted(weights[order], axes[order], variances[order], budget(keeps), codec)
        choices.append(Learnt(centre, basis, keeps, error))
    return min(choices, key=lambda learnt: learnt.expected_error, default=None)


def _second_moments(queries: Tensor, axes: Tensor) -> Tensor:
    """The mean of <q, a>^2 for each axis a, (dim,) float64."""
    total = torch.zeros(len(axes), dtype=torch.float64, device=axes.device)
    for block in torch.split(queries, 1 << 14):
        total += (block.double() @ axes.t()).square().sum(dim=0)
    return total / max(len(queries), 1)


def _allotted(weights: Tensor, axes: Tensor, variances: Tensor, budget: int, codec: Codec) -> tuple[Basis, float]:
    dim = len(weights)
    block = 32 if dim >= _WIDE and dim % 32 == 0 else 8
    relative: Array = (weights / weights.max()).cpu().numpy()
    plan = allocate(relative, budget, block, codec)
    coded = torch.from_numpy(np.repeat([band.width > 0 for band in plan.bands], [band.size for band in plan.bands]))
    deviations = variances.sqrt().cpu()
    deviations = deviations.clamp(min=_FLOOR * float(deviations.max())).float()
    basis = Basis(plan, axes.cpu()[coded].float().contiguous(), deviations, codec)
    return basis, expected_error(relative, plan, codec) * float(weights.max())
