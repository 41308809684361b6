"""The cache of a layer with both attention and a recurrent state: the attention's half is compressed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

from tqsearch.kvcache.layer import LayerSettings, TurboQuantLayer

# The library's methods have no type hints.
_Recurrent: Any = LinearAttentionLayer


class TurboQuantHybridLayer(TurboQuantLayer, LinearAttentionAndFullAttentionLayer):  # type: ignore[misc, override, no-untyped-call]
    """Compressed keys and values, and the library's recurrent state, untouched."""

    is_compileable = False

    def __init__(self, settings: LayerSettings, number_of_states: int = 1) -> None:
        _Recurrent.__init__(self, number_of_states=number_of_states)
        TurboQuantLayer.__init__(self, settings)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Of the attention with two states given by position, of the recurrent state with keywords."""
        if len(args) == 2:
            TurboQuantLayer.lazy_initialization(self, *args)
        else:
            _Recurrent.lazy_initialization(self, *args, **kwargs)

    def offload(self) -> None:
        """Moves everything to the CPU."""
        TurboQuantLayer.offload(self)
        _Recurrent.offload(self)

    def prefetch(self) -> None:
        """Moves everything back to the layer's device."""
        TurboQuantLayer.prefetch(self)
        _Recurrent.prefetch(self)

    def reset(self) -> None:
        """Forgets all tokens and the recurrent state."""
        _Recurrent.reset(self)
        TurboQuantLayer.reset(self)

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens; the library raises where a recurrent state cannot follow."""
        _Recurrent.crop(self, tokens_to_remove)
        TurboQuantLayer.crop(self, tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keeps for each beam the past of the beam it came from."""
        _Recurrent.reorder_cache(self, beam_idx)
        TurboQuantLayer.reorder_cache(self, beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the sequences of these indices, or those where a mask is True."""
        if (batch := recurrent_batch(self)) is not None:
            _Recurrent.reorder_cache(self, torch.arange(batch, device="cpu")[torch.as_tensor(indices).cpu()])
        TurboQuantLayer.batch_select_indices(self, indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each sequence."""
        if (batch := recurrent_batch(self)) is not None:
            _Recurrent.reorder_cache(self, torch.arange(batch, device="cpu").repeat_interleave(repeats))
        TurboQuantLayer.batch_repeat_interleave(self, repeats)


def recurrent_batch(layer: Any) -> int | None:
    """The number of sequences whose recurrent state a layer holds; None if it holds none."""
    for states in (getattr(layer, "conv_states", {}), getattr(layer, "recurrent_states", {})):
        for tensor in states.values():
            if tensor is not None:
                return int(tensor.shape[0])
    return None
