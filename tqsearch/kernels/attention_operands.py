"""What attention over compressed keys and values takes, beside the query."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from tqsearch.kernels.bands import BandTable


class Compressed(NamedTuple):
    """The compressed keys or values of one attention layer: C tokens in whole blocks, C possibly 0.

    A token's vector is estimated as `scale * R^T levels`, plus the offset for keys.

    Attributes:
        packed: (B, H, C / block, bytes) uint8. Keys: a row for each token in the layout of `packing` along the head
            dimension, the rows of a block by planes (`packing.by_planes`). Values: for each rotated coordinate a row of
            the block's codes in the layout of `packing` along the tokens, the rows of a band by planes; bands in order.
        scales: (B, H, C) float16 or float32.
        bands: the rotated coordinates' tables in order, sizes summing to the head dimension D.
        rotation: (D, D) float32, R: the rotated vector of x is R x.
    """

    packed: Tensor
    scales: Tensor
    bands: tuple[BandTable, ...]
    rotation: Tensor


class Dense(NamedTuple):
    """Keys and values kept in the model's dtype, (B, H, n, D) each."""

    keys: Tensor
    values: Tensor


class Context(NamedTuple):
    """All that a layer attends to, in the order of the tokens: sinks, compressed tokens, recent tokens.

    Attributes:
        sinks: the first tokens.
        keys, values: the compressed tokens that follow.
        recent: the last tokens.
        offset: (H, D) float32, added to every compressed key's estimate; None for zero.
        recents: (1,) int64 on the device, how many of `recent` there are yet, at least the queries; what lies beyond
            is never read. None for all.
    """

    sinks: Dense
    keys: Compressed
    values: Compressed
    recent: Dense
    offset: Tensor | None = None
    recents: Tensor | None = None

    @property
    def compressed(self) -> int:
        """How many tokens are compressed."""
        return self.keys.scales.shape[2]

    @property
    def length(self) -> int:
        """How many tokens there are in all, with room for more where `recents` counts them."""
        return self.sinks.keys.shape[2] + self.compressed + self.recent.keys.shape[2]
