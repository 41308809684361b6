"""The keys, or the values, of one layer: first tokens and recent tokens as they came, compressed blocks between.

A `History` is a value: every operation returns a new one and changes no tensor, so that histories may share tensors.
Their storages are no larger than their content, so that what a cache holds is what it reports.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tqsearch.kvcache.store import CompressedStates, StateCodec
from tqsearch.modes import without_autocast


@dataclass(frozen=True, eq=False, repr=False)
class History:
    """The states of T tokens, S first + C compressed + R recent.

    Attributes:
        sinks: (B, H, S, D) in the model's dtype.
        compressed: C tokens, or None for none.
        recent: (B, H, R, D) in the model's dtype.
        codec: writes and reads `compressed`; None if these states are never compressed.
    """

    sinks: Tensor
    compressed: CompressedStates | None
    recent: Tensor
    codec: StateCodec | None

    @classmethod
    def empty(cls, like: Tensor, codec: StateCodec | None) -> History:
        """No tokens, for states like (B, H, any, D)."""
        none = like.detach().new_empty((*like.shape[:2], 0, like.shape[3]))
        return cls(none, None, none.clone(), codec)

    @property
    def compressed_length(self) -> int:
        """C."""
        return 0 if self.compressed is None else len(self.compressed)

    def __len__(self) -> int:
        return self.sinks.shape[2] + self.compressed_length + self.recent.shape[2]

    def __repr__(self) -> str:
        return (
            f"History({self.sinks.shape[2]} first, {self.compressed_length} compressed, {self.recent.shape[2]} recent)"
        )

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        parts = {"sinks": self.sinks, "recent": self.recent}
        return parts if self.compressed is None else {**parts, **self.compressed.tensors()}

    @without_autocast
    def append(self, states: Tensor, sink_length: int) -> History:
        """With new tokens at the end, (B, H, n, D); the first `sink_length` of all go to the sinks."""
        if self.compressed is not None:
            return History(self.sinks, self.compressed, torch.cat([self.recent, states], dim=2), self.codec)
        first = 0
        sinks, recent = self.sinks, self.recent
        if sinks.shape[2] < sink_length and not recent.shape[2]:
            first = min(sink_length - sinks.shape[2], states.shape[2])
            sinks = torch.cat([sinks, states[:, :, :first]], dim=2)
        if first < states.shape[2]:
            recent = torch.cat([recent, states[:, :, first:]], dim=2)
        return History(sinks, self.compressed, recent, self.codec)

    def detached(self) -> History:
        """The same without the graph of automatic differentiation."""
        if not (self.sinks.requires_grad or self.recent.requires_grad):
            return self
        return replace(self, sinks=self.sinks.detach(), recent=self.recent.detach())

    @without_autocast
    def compress(self, residual_length: int) -> History:
        """With the older recent tokens in compressed blocks, once `residual_length` + a block have gathered.

        The first compression estimates the codec's constants from all recent tokens, and waits for a GPU to choose the
        scales' dtype; later ones keep both and wait for nothing.

        Args:
            residual_length: how many tokens stay recent at least.
        """
        if self.codec is None:
            return self
        block = self.codec.block_length
        count = (self.recent.shape[2] - residual_length) // block * block
        if count <= 0:
            return self
        with torch.no_grad():
            old = self.recent[:, :, :count]
            recent = self.recent[:, :, count:].clone(memory_format=torch.contiguous_format)
            if self.compressed is None:
                compressed = self.codec.encode(old, **self.codec.estimate(self.recent))
            else:
                # On a GPU the first blocks have chosen the scales' dtype: to look at these would be to wait for them.
                chosen = self.compressed.scales.dtype if old.is_cuda else None
                compressed = self.compressed.cat(self.codec.encode(old, chosen, **self.compressed.constants()))
        return replace(self, compressed=compressed, recent=recent)

    def owning(self) -> History:
        """The same with recent tokens in a storage no larger than they are."""
        if self.recent.untyped_storage().nbytes() == self.recent.nbytes:
            return self
        return replace(self, recent=self.recent.clone(memory_format=torch.contiguous_format))

    @without_autocast
    def decode(self) -> Tensor:
        """All tokens, (B, H, T, D) in the model's dtype."""
        sinks, compressed = self.sinks.shape[2], self.compressed_length
        if not compressed:
            return torch.cat([self.sinks, self.recent], dim=2) if sinks else self.recent
        batch, heads, _, dim = self.sinks.shape
        out = self.recent.new_empty((batch, heads, len(self), dim))
        if self.codec is not None and self.compressed is not None:
            self.codec.decode(self.compressed, out[:, :, sinks : sinks + compressed])
        out[:, :, :sinks] = self.sinks
        out[:, :, sinks + compressed :] = self.recent
        return out

    @without_autocast
    def decoded(self, start: int, stop: int) -> Tensor:
        """The compressed tokens from `start` to `stop`, whole blocks: (B, H, stop - start, D) in the model's dtype."""
        states = self.recent.new_empty((*self.recent.shape[:2], stop - start, self.recent.shape[3]))
        if self.codec is not None and self.compressed is not None:
            self.codec.decode(self.compressed.tokens(start, stop), states)
        return states

    def first(self, length: int) -> History:
        """The first `length` tokens; those of a block that is cut become recent tokens, as decoded."""
        sinks, compressed = self.sinks.shape[2], self.compressed_length
        if length >= len(self):
            return self
        if length >= sinks + compressed:
            return replace(self, recent=_prefix(self.recent, length - sinks - compressed))
        if length <= sinks or self.compressed is None or self.codec is None:
            return replace(
                self, sinks=_prefix(self.sinks, min(length, sinks)), compressed=None, recent=_prefix(self.recent, 0)
            )
        kept = length - sinks
        whole = kept // self.codec.block_length * self.codec.block_length
        recent = _prefix(self.recent, 0)
        if kept > whole:
            recent = _prefix(self.decoded(whole, whole + self.codec.block_length), kept - whole)
        return replace(self, compressed=self.compressed.tokens(0, whole).copied() if whole else None, recent=recent)

    def rows(self, index: Tensor) -> History:
        """The sequences of the batch that `index` names, (B',) int64."""
        index = index.to(self.recent.device)
        compressed = None if self.compressed is None else self.compressed.rows(index)
        sinks, recent = (part.index_select(0, index) for part in (self.sinks, self.recent))
        return replace(self, sinks=sinks, compressed=compressed, recent=recent)

    def to(self, device: torch.device | str, compressed: CompressedStates | None = None) -> History:
        """The same on another device, its blocks too unless `compressed` is them; copies to a GPU do not wait."""
        if compressed is None and self.compressed is not None:
            compressed = self.compressed.to(device)
        sinks, recent = (part.to(device, non_blocking=True) for part in (self.sinks, self.recent))
        return replace(self, sinks=sinks, compressed=compressed, recent=recent)


def _prefix(states: Tensor, length: int) -> Tensor:
    return states[:, :, :length].clone(memory_format=torch.contiguous_format)
