"""A codec that knows what queries a model asks: transform coding in a basis fitted to keys and queries.

An error e of a key changes the logit of a query q by <q, e>, so its cost is e^T W e, W the second moment of queries.
With C the covariance of keys, and W^(1/2) C W^(1/2) = U diag(v) U^T, the coordinates y = U^T W^(1/2) k are uncorrelated
and their squared errors add up to the cost; bits go to the coordinates of large v by reverse water-filling. A query is
transformed once, so the logits come from the codes as with a rotation. The basis is one matrix a layer and KV head,
fitted once for a model; it is not counted as bytes of a cache.

For values, W is the second moment of the output projection's columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tqsearch.codebook import lloyd_max

GROUP = 8  # coordinates that share a width, so that no byte is wasted
MOST_BITS = 6
FLOOR = 1e-9  # of the largest eigenvalue: what is below is taken for this


@dataclass(frozen=True)
class HeadTransform:
    """The basis of one head.

    Attributes:
        forward: (D, D), from a vector to its coordinates, those of largest variance first.
        inverse: (D, D), back.
        deviations: (D,) of the coordinates.
        widths: (D,) int64, bits of each.
    """

    forward: Tensor
    inverse: Tensor
    deviations: Tensor
    widths: Tensor


def head_transform(covariance: Tensor, weight: Tensor | None, bits: float) -> HeadTransform:
    """The basis that fits a head.

    Args:
        covariance: (D, D) float64, of the vectors.
        weight: (D, D) float64, W; None for the identity, which gives the principal components.
        bits: mean width of a coordinate.
    """
    root = inverse_root = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    if weight is not None:
        values, vectors = torch.linalg.eigh(weight)
        values = values.clamp(min=float(values.amax()) * FLOOR)
        root, inverse_root = ((vectors * values**power) @ vectors.T for power in (0.5, -0.5))
    variances, basis = torch.linalg.eigh(root @ covariance @ root)
    variances = variances.flip(0).clamp(min=float(variances.amax()) * FLOOR)
    basis = basis.flip(1)
    widths = allotted(variances, bits).to(covariance.device)
    return HeadTransform((basis.T @ root).float(), (inverse_root @ basis).float(), variances.sqrt().float(), widths)


def allotted(variances: Tensor, bits: float) -> Tensor:
    """Widths of least total squared error, a group of coordinates at a time, (D,) int64."""
    errors = [lloyd_max(width).distortion for width in range(MOST_BITS + 1)]
    groups = variances.view(-1, GROUP).sum(dim=1).tolist()
    widths = [0] * len(groups)
    for _ in range(round(bits * len(groups))):
        gains = [
            power * (errors[width] - errors[width + 1]) if width < MOST_BITS else -1.0
            for power, width in zip(groups, widths, strict=True)
        ]
        widths[gains.index(max(gains))] += 1
    return torch.tensor(widths).repeat_interleave(GROUP)


class CalibratedCodec:
    """Keys, or values, of one layer, each head in its own basis, with one unbiased scale a vector."""

    def __init__(self, heads: list[HeadTransform]) -> None:
        self.heads = heads

    def round_trip(self, states: Tensor) -> Tensor:
        """See `simulated.Codec`."""
        decoded = [coded(states[:, number].float(), head) for number, head in enumerate(self.heads)]
        return torch.stack(decoded, dim=1).to(states)

    def bytes_per_vector(self) -> float:
        """Codes and a float16 scale, the mean of the heads."""
        return sum(float(head.widths.sum()) for head in self.heads) / len(self.heads) / 8 + 2


def coded(vectors: Tensor, head: HeadTransform) -> Tensor:
    """Vectors, (..., D), as their codes say."""
    coordinates = vectors @ head.forward.T
    kept = head.widths > 0
    normal = coordinates / head.deviations
    gain = normal[..., kept].square().mean(dim=-1, keepdim=True).sqrt().clamp(min=1e-12)
    estimate = torch.zeros_like(normal)
    for width in head.widths[kept].unique().tolist():
        levels = torch.from_numpy(lloyd_max(width).levels).float().to(normal.device)
        band = head.widths == width
        scaled = (normal[..., band] / gain).contiguous()
        estimate[..., band] = levels[torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2)]
    estimate = estimate * head.deviations
    power = coordinates[..., kept].square().sum(dim=-1, keepdim=True)
    scale = power / (coordinates * estimate).sum(dim=-1, keepdim=True).clamp(min=1e-12)
    return (estimate * scale) @ head.inverse.T
