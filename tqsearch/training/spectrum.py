"""Principal axes of a sample and the variances along them, shrunk where the sample is small.

Of centred rows z the covariance is S = sum z z^T / n. Its eigenvalues spread wider than the true ones, the more so the
smaller n / dim. They are drawn towards their mean m by Ledoit and Wolf's formula ("A well-conditioned estimator for
large-dimensional covariance matrices", 2004): (1 - rho) lambda + rho m, with

    rho = min(1, (sum |z|^4 / n^2 - |S|^2 / n) / |S - m I|^2),

the share of S's deviation from m I that is chance. So axes that the sample does not span keep a variance, and with
few rows all axes become alike, as those of a random rotation.

Up to `EXACT_DIM` dimensions S is diagonalised. Above, the `RANK` largest axes are found by a randomized range finder
with two power iterations (Halko, Martinsson and Tropp, 2011), and what is orthogonal to them is rotated at random, each
of its axes given the same variance.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tqsearch import splitmix
from tqsearch.rotation import Hadamard

EXACT_DIM = 2048
RANK = 1024
_EXTRA = 32  # columns of the range finder beyond the rank
_STREAM = 48  # of the seed's generator
_MOST_ROWS = 1 << 17  # of a block of float64


def principal_axes(centred: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Orthonormal axes by descending variance; see the module's docstring.

    Args:
        centred: (n, dim), floating point, n >= 1, of mean 0, on any device; not all zero.
        seed: of the randomized search.

    Returns:
        axes: (dim, dim) float64, rows; of each the largest entry is positive.
        variances: (dim,) float64, descending, shrunk.
    """
    count, dim = centred.shape
    if dim <= EXACT_DIM:
        covariance = torch.zeros((dim, dim), dtype=torch.float64, device=centred.device)
        for block in torch.split(centred, _MOST_ROWS):
            covariance += block.double().t() @ block.double()
        variances, columns = torch.linalg.eigh(covariance / count)
        axes, variances = columns.t().flip(0), variances.flip(0).clamp(min=0)
    else:
        axes, variances = _randomized(centred, min(RANK, count, dim // 2), seed)
    largest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))
    return axes * torch.where(largest < 0, -1.0, 1.0), _shrunk(variances, centred)


def _shrunk(variances: Tensor, centred: Tensor) -> Tensor:
    count, mean = len(centred), variances.mean()
    fourth = sum(float(block.double().square().sum(1).square().sum()) for block in torch.split(centred, _MOST_ROWS))
    chance = fourth / count**2 - float(variances.square().sum()) / count
    spread = float((variances - mean).square().sum())
    share = 1.0 if spread <= chance else max(chance, 0.0) / spread
    return (1.0 - share) * variances + share * mean


def _randomized(centred: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    count, dim = centred.shape
    width = min(rank + _EXTRA, dim)
    start = torch.from_numpy(splitmix.gaussians(seed, _STREAM, dim * width).reshape(dim, width)).to(centred.device)
    span = torch.linalg.qr(_covariance_times(centred, start))[0]
    for _ in range(2):
        span = torch.linalg.qr(_covariance_times(centred, span))[0]
    small = span.t() @ _covariance_times(centred, span)
    found, turn = torch.linalg.eigh(0.5 * (small + small.t()))
    leading = (span @ turn).flip(1)[:, :rank]
    found = found.flip(0)[:rank].clamp(min=0)
    total = sum(float(block.double().square().sum()) for block in torch.split(centred, _MOST_ROWS)) / count
    rest = max(total - float(found.sum()), 0.0) / (dim - rank)
    complement = torch.linalg.qr(leading, mode="complete")[0][:, rank:]  # the columns after the rank span the rest
    mixed = Hadamard(dim - rank, seed).apply(complement)
    variances = torch.cat([found, found.new_full((dim - rank,), rest)])
    order = torch.argsort(variances, descending=True, stable=True)
    return torch.cat([leading, mixed], dim=1).t()[order], variances[order]


def _covariance_times(centred: Tensor, columns: Tensor) -> Tensor:
    """S @ columns without S: (dim, k) float64."""
    product = torch.zeros_like(columns)
    for block in torch.split(centred, max(1, math.floor(_MOST_ROWS * 64 / centred.shape[1]))):
        rows = block.double()
        product += rows.t() @ (rows @ columns)
    return product / len(centred)
