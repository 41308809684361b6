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


def centre_of(sample: Tensor) -> Tensor:
    """The mean of rows, (n, dim) to (dim,) float32, summed in float64."""
    return sample.double().mean(dim=0).float()


def learn(
    sample: Tensor,
    queries: Tensor | None,
    metric: str,
    budget: Callable[[bool], int],
    seed: int,
    codec: Codec = "scalar",
) -> Learnt | None:
    """Learns axes and their widths.

    The error of a score is <q, e>, with e the error of z's code, whose variance along axis i is lambda_i D(b_i). Its
    expected square is the sum of mu_i lambda_i D(b_i) with mu_i the second moment of the queries along axis i, and that
    is what `allocate` makes least. Without `queries` they are taken to be distributed as the sample. But what decides a
    ranking is the difference of neighbours, which lies in all directions: so mu_i is taken between the two, as the
    geometric mean of the queries' second moment along axis i and its mean over all axes.

    For "cosine" and "ip", <q, z> = <q - c, z> + <c, z>. Keeping <c, z> costs bytes, which the codes then lack, and
    makes mu that of q - c. The expected error decides.

    Args:
        sample: (n, dim) float32, unit rows for "cosine".
        queries: (m, dim) float32, likewise; or None.
        metric: the index's.
        budget: the bytes a row of codes may take, without and with <c, z> kept.
        seed: of the randomized search for axes.
        codec: of the coordinates.

    Returns:
        What was learnt; None where there is nothing to learn: fewer than `FEWEST_ROWS` rows, or all rows alike.
    """
    centre = centre_of(sample)
    centred = sample - centre
    if len(sample) < FEWEST_ROWS or not bool((centred.abs().amax(dim=0) > 0).any()):
        return None
    axes, variances = principal_axes(centred, seed)
    offset = axes @ centre.double()
    choices = []
    for keeps in (False,) if metric == "l2" else (False, True):
        if budget(keeps) < 1:
            continue
        moved = metric == "l2" or keeps  # the queries are q - c
        moments = variances if moved else variances + offset.square()
        if queries is not None:
            moments = _second_moments((queries - centre) if moved else queries, axes)
        moments = (moments * moments.mean()).sqrt()
        weights = variances * moments
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
