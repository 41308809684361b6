"""A cache that replaces old tokens by what a codec makes of them, in float: for codecs that have no cache of their own.

It answers what a codec costs in quality. Its bytes are the codec's formula, not its storages: it keeps dense tensors.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class Codec(Protocol):
    """What encodes and decodes the keys, or the values, of one layer."""

    def round_trip(self, states: Tensor) -> Tensor:
        """Decoded codes of states, (batch, heads, tokens, dim) in and out."""

    def bytes_per_vector(self) -> float:
        """Bytes of one vector of one head, all overhead included."""


class SimulatedLayer(DynamicLayer):
    """One layer: first tokens and recent ones exact, what is between them decoded codes.

    Args:
        keys_codec: of this layer.
        values_codec: of this layer.
        residual: recent tokens that stay exact, at least.
        sinks: first tokens that stay exact.
        block: tokens that are compressed at a time.
        remove_offset: whether the keys' mean is taken off before they are coded: that of all tokens behind the sinks
            when some are first compressed, as in `TurboQuantCache`.
    """

    def __init__(
        self, keys_codec: Codec, values_codec: Codec, residual: int, sinks: int, block: int, remove_offset: bool
    ) -> None:
        super().__init__()
        self.keys_codec, self.values_codec = keys_codec, values_codec
        self.residual, self.sinks, self.block, self.remove_offset = residual, sinks, block, remove_offset
        self.done = sinks
        self.offset: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append; return what attention reads now, then compress what has become old."""
        read = super().update(key_states, value_states, *args, **kwargs)
        assert self.keys is not None
        assert self.values is not None
        whole = (self.keys.shape[-2] - self.residual - self.done) // self.block * self.block
        if whole > 0:
            old = slice(self.done, self.done + whole)
            self.keys, self.values = self.keys.clone(), self.values.clone()  # attention still reads the exact ones
            if self.remove_offset:
                if self.offset is None:
                    seen = self.keys[:, :, self.sinks :].float()
                    self.offset = seen.mean(dim=(0, 2), keepdim=True).to(self.keys.dtype)
                self.keys[:, :, old] = self.keys_codec.round_trip(self.keys[:, :, old] - self.offset) + self.offset
            else:
                self.keys[:, :, old] = self.keys_codec.round_trip(self.keys[:, :, old])
            self.values[:, :, old] = self.values_codec.round_trip(self.values[:, :, old])
            self.done += whole
        return read


def simulated_cache(
    config: Any,
    codecs: list[tuple[Codec, Codec]],
    *,
    residual: int = 128,
    sinks: int = 4,
    block: int = 16,
    remove_offset: bool = True,
) -> DynamicCache:
    """A cache whose layers read keys and values through codecs.

    Args:
        codecs: keys' and values' codec of every layer.
    """
    cache = DynamicCache(config=config)
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        raise NotImplementedError("simulated codecs need a model whose layers are all full attention")
    cache.layers = [SimulatedLayer(*pair, residual, sinks, block, remove_offset) for pair in codecs]
    return cache


def formula_bytes(codecs: list[tuple[Codec, Codec]], heads: int, dim: int, longer: int, window: int) -> dict[str, Any]:
    """Bytes by the codecs' formulas, as `storage.measured_bytes` reports them from storages.

    Args:
        window: tokens that stay exact, sinks included, in bfloat16.
    """
    coded = sum(heads * (keys.bytes_per_vector() + values.bytes_per_vector()) for keys, values in codecs)
    dense = len(codecs) * 2 * heads * dim * torch.bfloat16.itemsize
    total = coded * (longer - window) + dense * window
    return {
        "tokens": longer,
        "total": round(total),
        "ratio_total": round(total / (dense * longer), 4),
        "per_token": round(coded, 2),
        "ratio_per_token": round(coded / dense, 4),
        "dense_per_token": dense,
        "dtype": "bfloat16",
        "from": "formula",
    }
