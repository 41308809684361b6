"""Outlier channels of keys: the few channels of largest variance are coded on their own, at 8 bits.

In most models some channels of the keys are several times larger than the rest. A rotation over all channels spreads
them over all coordinates, so that every coordinate's error grows with them. Here the channels of each head are put in
`order`, the largest first; each is divided by its `gain`, so that both groups have one variance; and each group has a
rotation of its own. The codes are those of the whole vector, with one scale, in two bands or more (TurboQuant, arXiv
2504.19874, section 4.3, splits channels likewise, into two quantizers with a scale each):

    z = forth(k) = ((k - offset) / gain)[order],    z_hat = |z| / sqrt(D) R^T (levels / (1 - distortion of their band))

The scale is that of the norm here. One that makes <z, z_hat> = |z|^2 for each vector, as without outliers, would lift
all bands alike for what the narrow one lacks, and so add more error to the outliers than their 8 bits take away.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from tqsearch import codec as codecs
from tqsearch.codec import Codec
from tqsearch.errors import InvalidInputError
from tqsearch.kernels import Encoded
from tqsearch.kvcache.store import KeyCodec
from tqsearch.plan import BitPlan
from tqsearch.rotation import Hadamard

OUTLIER_BITS = 8


class GroupedRotation:
    """A seeded Hadamard transform of the first coordinates, and one of the others.

    Args:
        first: how many coordinates the first group has.
        dim: of both groups.
        seed: any integer.
    """

    name = "grouped"

    def __init__(self, first: int, dim: int, seed: int) -> None:
        self.first, self.dim = first, dim
        self.groups = Hadamard(first, seed), Hadamard(dim - first, seed)

    def apply(self, vectors: Tensor) -> Tensor:
        """The transform of each row: (n, dim) floating point to (n, dim) float32."""
        parts = vectors[:, : self.first], vectors[:, self.first :]
        return torch.cat([group.apply(part) for group, part in zip(self.groups, parts, strict=True)], dim=1)

    def invert(self, vectors: Tensor) -> Tensor:
        """The inverse of `apply`."""
        parts = vectors[:, : self.first], vectors[:, self.first :]
        return torch.cat([group.invert(part) for group, part in zip(self.groups, parts, strict=True)], dim=1)


class OutlierKeyCodec(KeyCodec):
    """Keys with outlier channels.

    Args:
        dim: D.
        bits: width of the other channels.
        block_length: tokens of a block.
        seed: of the rotations.
        backend: see `kernels.select`.
        channels: how many outlier channels, 1 to D - 1.
        codec: of the other channels.
    """

    def __init__(
        self,
        dim: int,
        bits: float | BitPlan,
        block_length: int,
        seed: int,
        backend: str,
        channels: int,
        codec: Codec = "scalar",
    ) -> None:
        if isinstance(bits, BitPlan):
            raise InvalidInputError(
                "key_bits must be a number with outlier_channels, got a BitPlan; put the band into it"
            )
        if channels >= dim:
            raise InvalidInputError(f"outlier_channels must be less than the head dimension {dim}, got {channels}")
        plan = BitPlan.from_pairs([(channels, OUTLIER_BITS), *BitPlan.of(dim - channels, bits).pairs()])
        super().__init__(dim, plan, block_length, seed, backend, codec)
        self.quantizer.rotation = GroupedRotation(channels, dim, seed)
        self.channels = channels

    def levels(self, packed: Tensor) -> Tensor:
        """The levels, lengthened by 1 / (1 - distortion) band by band, which makes inner products unbiased."""
        levels, first = super().levels(packed), 0
        for band in self.plan.bands:
            shrunk = 1 - codecs.distortion(self.quantizer.codec, band.width, self.dim)
            levels[:, first : first + band.size] *= 1 / shrunk
            first += band.size
        return levels

    def scales(self, encoded: Encoded) -> Tensor:
        """|z| / sqrt(D)."""
        return encoded.norms / math.sqrt(self.dim)

    def estimate(self, states: Tensor) -> dict[str, Tensor]:
        """`offset`, `order` and `gain` of keys (B, H, T, D); keys that are not finite count as none."""
        constants = super().estimate(states)
        variance = torch.zeros((states.shape[1], self.dim), dtype=torch.float64, device=states.device)
        for start, stop in self.pieces(states):
            rest = super().forth(states[:, :, start:stop].float(), constants)
            squares = torch.where(rest.isfinite().all(dim=3, keepdim=True), rest, 0.0).square()
            variance += squares.sum(dim=(0, 2), dtype=torch.float64)
        order = variance.argsort(dim=1, descending=True, stable=True)
        ordered = variance.gather(1, order)
        outliers, others = (part.mean(dim=1) for part in (ordered[:, : self.channels], ordered[:, self.channels :]))
        ratio = torch.where((outliers > 0) & (others > 0), outliers / torch.where(others > 0, others, 1.0), 1.0).sqrt()
        gain = torch.ones_like(variance).scatter(1, order[:, : self.channels], ratio[:, None].expand(-1, self.channels))
        return {**constants, "order": order.short(), "gain": gain.float()}

    def forth(self, states: Tensor, constants: dict[str, Tensor]) -> Tensor:
        """See the module's docstring."""
        states = super().forth(states, constants) / constants["gain"][:, None]
        return states.gather(3, constants["order"].long()[:, None].expand(states.shape))

    def back(self, states: Tensor, constants: dict[str, Tensor]) -> Tensor:
        """The inverse of `forth`."""
        order = constants["order"].long()[:, None].expand(states.shape)
        states = torch.empty_like(states).scatter_(3, order, states)
        return super().back(states * constants["gain"][:, None], constants)


@lru_cache(maxsize=256)
def key_codec(
    dim: int,
    bits: float | BitPlan,
    block_length: int,
    seed: int,
    backend: str,
    outlier_channels: int = 0,
    codec: Codec = "scalar",
) -> KeyCodec:
    """The one codec of keys with these arguments: layers and caches share its tables."""
    if outlier_channels:
        return OutlierKeyCodec(dim, bits, block_length, seed, backend, outlier_channels, codec)
    return KeyCodec(dim, bits, block_length, seed, backend, codec)
