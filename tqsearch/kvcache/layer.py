"""The cache of one attention layer: what transformers calls, over two histories."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from tqsearch.codec import Codec
from tqsearch.errors import InvalidInputError
from tqsearch.kvcache.attention import states_of
from tqsearch.kvcache.history import History
from tqsearch.kvcache.outliers import key_codec
from tqsearch.kvcache.policy import LayerBits
from tqsearch.kvcache.store import value_codec
from tqsearch.kvcache.window import Counter, Window

# Before 5.18 a positive argument of `crop` was the length to keep.
LEGACY_CROP = hasattr(DynamicCache, "get_max_cache_shape")


@dataclass(frozen=True)
class LayerSettings:
    """What a layer's cache does; see `TurboQuantCache` for the meaning.

    Attributes:
        latent: (width of the latent, width of the RoPE key) of a model with multi-head latent attention, else None.
        from_codes: whether the model attends by `attention.attention_forward`, which reads codes.
    """

    bits: LayerBits
    residual_length: int
    sink_length: int
    block_length: int
    seed: int
    backend: str
    outlier_channels: int = 0
    codec: Codec = "scalar"
    latent: tuple[int, int] | None = None
    from_codes: bool = False


class TurboQuantLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Compressed keys and values of one full-attention layer."""

    def __init__(self, settings: LayerSettings) -> None:
        self.settings = settings
        self._past: tuple[History, History] | None = None
        self._window: Window | None = None  # holds the recent tokens while steps are replayed
        self._fetched: tuple[tuple[History, History], ...] = ()  # what was on the CPU, and the same on the device
        DynamicLayer.__init__(self)  # type: ignore[no-untyped-call]  # by name: the hybrid layer has other bases

    @property
    def past(self) -> tuple[History, History] | None:
        """Keys and values as they are kept, or None before the first update."""
        return self._past if self._window is None else self._window.past()

    @past.setter
    def past(self, past: tuple[History, History] | None) -> None:
        """Replaces them; steps that were recorded go on no more."""
        self._past, self._window = past, None

    def __getstate__(self) -> dict[str, Any]:
        """What a copy gets: a window belongs to one layer."""
        return {**vars(self), "_past": self.past, "_window": None}

    @property
    def keys(self) -> Tensor | None:
        """All keys, decoded anew at each use: (B, H, T, D), or None before the first update."""
        return None if self.past is None else self.past[0].decode()

    @keys.setter
    def keys(self, states: Tensor | None) -> None:
        """Refuses all but None: keys come by `update`."""
        self._refuse(states, "keys")

    @property
    def values(self) -> Tensor | None:
        """All values, decoded anew at each use: (B, H, T, D), or None before the first update."""
        return None if self.past is None else self.past[1].decode()

    @values.setter
    def values(self, states: Tensor | None) -> None:
        """Refuses all but None: values come by `update`."""
        self._refuse(states, "values")

    def _refuse(self, states: Tensor | None, name: str) -> None:
        if states is not None:
            raise InvalidInputError(f"{name} of a compressed layer cannot be set; use update, crop or reset")

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Chooses codecs for states of these shapes, dtype and device; no token is kept."""
        self.dtype, self.device = key_states.dtype, key_states.device
        settings = self.settings
        key_bits, value_bits = settings.bits
        if settings.latent is not None:
            key_bits, value_bits = _latent_bits(settings, key_states, value_states)
        common = settings.block_length, settings.seed, settings.backend
        keys, values = None, None
        if key_bits is not None:
            channels = settings.outlier_channels
            keys = key_codec(key_states.shape[3], key_bits, *common, channels, settings.codec)
        if value_bits is not None:
            values = value_codec(value_states.shape[3], value_bits, *common, settings.codec)
        self.past = History.empty(key_states, keys), History.empty(value_states, values)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keeps new states and returns all: the new ones exact, the past as it is kept.

        Compression comes after, so that a first prompt attends to exact keys and values.

        Args:
            key_states: (B, H, n, D).
            value_states: (B, H, n, D'), D' = D or not.

        Returns:
            keys (B, H, T, D) and values (B, H, T, D'); what they hold of the past is decoded for this call alone,
            or not at all where the model attends from the codes.
        """
        if self._window is not None and self._window.counter.running:
            return self._window.append(key_states, value_states)
        if self.past is None:
            self.lazy_initialization(key_states, value_states)
        past, settings = self._matching(key_states), self.settings
        keys = past[0].append(key_states, settings.sink_length)
        values = past[1].append(value_states, settings.sink_length)
        # Nothing of this call is compressed yet, and without a past the states themselves are all there is.
        returned = states_of(keys, values, settings.backend) if settings.from_codes else None
        if returned is None:
            returned = (keys.decode(), values.decode()) if len(past[0]) else (key_states, value_states)
        residual = settings.residual_length
        self.past = keys.detached().compress(residual), values.detached().compress(residual)
        return returned

    def _matching(self, states: Tensor) -> tuple[History, History]:
        """The past on the device of new states, once it is known to go with them."""
        past = self.past
        assert past is not None
        kept = past[0].recent
        if kept.dtype != states.dtype:
            raise InvalidInputError(
                f"states must be {kept.dtype} as those in the cache, got {states.dtype}; make a new cache"
            )
        if kept.shape[:2] != states.shape[:2] or kept.shape[3] != states.shape[3]:
            raise InvalidInputError(
                f"states must have shape ({kept.shape[0]}, {kept.shape[1]}, n, {kept.shape[3]}) as those in the cache, "
                f"got {tuple(states.shape)}; batch_repeat_interleave repeats a cached prefix for a larger batch"
            )
        if kept.device != states.device:
            self.device = states.device
            self.past = past = past[0].to(states.device), past[1].to(states.device)
        return past

    def open_window(self, counter: Counter) -> bool:
        """Puts the recent tokens into a `Window` for steps that are replayed; False where there is nothing to replay.

        That is where attention does not read codes, or not yet, or recent tokens are not as many as the counter says.
        """
        past = self.past if self.settings.from_codes else None
        if past is None or any(history.recent.shape[2] != counter.held for history in past):
            return False
        window = Window(past, counter)
        states = states_of(*window.full, self.settings.backend, counter)
        if states is None:
            return False
        window.states = states
        self._past, self._window = None, window
        return True

    @property
    def counter(self) -> Counter | None:
        """Of the window, if there is one."""
        return None if self._window is None else self._window.counter

    def close_window(self) -> None:
        """Takes the recent tokens out of the window, and compresses a block of them if it is due."""
        if self._window is not None:
            residual = self.settings.residual_length
            keys, values = (history.compress(residual) for history in self._window.past())
            self.past = keys.owning(), values.owning()

    def get_seq_length(self) -> int:
        """T, the number of tokens kept."""
        if self._window is not None:
            return len(self._window)
        return 0 if self._past is None else len(self._past[0])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The number of keys a query of this length will see, and the position of the first."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """-1: there is no limit."""
        return -1

    def reset(self) -> None:
        """Forgets everything, also shapes and dtype."""
        self.past, self._fetched = None, ()
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens.

        Args:
            tokens_to_remove: minus their number, or 0. A positive number is the length to keep in transformers before
                5.18, and refused since, as in the library.
        """
        length = self.get_seq_length()
        if tokens_to_remove > 0 and not LEGACY_CROP:
            raise InvalidInputError(
                f"crop takes minus the number of tokens to remove, got {tokens_to_remove}; use a number of at most 0"
            )
        kept = tokens_to_remove if tokens_to_remove > 0 else max(length + tokens_to_remove, 0)
        if self.past is not None and kept < length:
            self.past = self.past[0].first(kept), self.past[1].first(kept)

    def _select(self, index: Tensor) -> None:
        if self.past is not None:
            self.past = self.past[0].rows(index), self.past[1].rows(index)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keeps for each beam the past of the beam it came from."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the sequences of these indices, or those where a mask is True."""
        indices = torch.as_tensor(indices)
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        if self.past is not None:  # negative indices count from the end, as in the library
            indices = torch.where(indices < 0, indices + self.past[0].recent.shape[0], indices)
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each sequence."""
        if self.past is not None:
            self._select(torch.arange(self.past[0].recent.shape[0], device="cpu").repeat_interleave(repeats))

    def offload(self) -> None:
        """Moves everything to the CPU; blocks that `prefetch` fetched and that are as they were are still there."""
        if self.past is not None:
            twins = {id(moved.compressed): kept.compressed for kept, moved in self._fetched}
            keys, values = (history.to("cpu", twins.get(id(history.compressed))) for history in self.past)
            self.past, self._fetched = (keys, values), ()

    def prefetch(self) -> None:
        """Moves everything back to the layer's device."""
        if self.past is not None and self.past[0].recent.device != self.device:
            kept, on_gpu = self.past, self.device.type == "cuda"
            if on_gpu:
                # The library fetches on a stream of its own, and does not make it wait for what is still on its way to
                # the CPU; and what is fetched there must outlive its uses on the usual stream.
                usual = torch.cuda.default_stream(self.device)
                torch.cuda.current_stream(self.device).wait_stream(usual)
            self.past = kept[0].to(self.device), kept[1].to(self.device)
            self._fetched = tuple(zip(kept, self.past, strict=True))
            if on_gpu:
                for history in self.past:
                    for tensor in history.tensors().values():
                        tensor.record_stream(usual)


def _latent_bits(settings: LayerSettings, keys: Tensor, values: Tensor) -> LayerBits:
    """The widths with multi-head latent attention: the RoPE key, shared by all heads, is never compressed."""
    assert settings.latent is not None
    latent, rope = settings.latent
    widths = keys.shape[3], values.shape[3]
    if keys.shape[1] > 1 and values.shape[1] > 1:  # expanded to ordinary keys and values
        return settings.bits
    if widths == (latent, rope):
        return LayerBits(settings.bits.keys, None)
    if widths == (rope, latent):
        return LayerBits(None, settings.bits.keys)
    raise InvalidInputError(
        f"a model with multi-head latent attention must cache its latent of width {latent} and its RoPE key of width "
        f"{rope} apart, got states of widths {widths[0]} and {widths[1]}; the RoPE key must not be compressed and "
        "cannot be told from the rest: use the library's DynamicCache"
    )
