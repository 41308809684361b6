"""Attention from the codes for transformers: `attn_implementation="turboquant"`.

The cache hands an attention layer its keys and values as `CompressedTensor`: tensors of the right shape that hold no
numbers, only the histories they stand for. `attention_forward`, registered with the library's attention interface,
passes those histories to `kernels.attention`. Any other operation on such a tensor decodes it first, so a model that
does something of its own with keys and values gets what it would get from a dense cache.

The name is registered for masks too: without that, the library gives the attention no mask at all.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from tqsearch import kernels
from tqsearch.kernels import Compressed, Context, Dense
from tqsearch.kvcache import tiles
from tqsearch.kvcache.history import History
from tqsearch.kvcache.store import KeyCodec, ValueCodec
from tqsearch.kvcache.window import Counter, NotReplayable

NAME = "turboquant"
# Up to so many queries plain torch decodes the layer at once, as its reference does; for more, tile by tile.
FEW_QUERIES = 16
# Queries a launch: bounds what the kernel's programs write for `merge`.
MANY_QUERIES = 256
_warned: set[str] = set()


class Past(NamedTuple):
    """The histories of one layer at one step, new tokens included.

    With a counter their recent tokens are buffers, of which only so many are there yet.
    """

    keys: History
    values: History
    backend: str
    counter: Counter | None = None


class CompressedTensor(torch.Tensor):
    """The keys or the values of a `Past`, decoded when anything but `attention_forward` uses them.

    Attributes:
        past: the histories of both.
        of_keys: whether this is the keys.
    """

    past: Past
    of_keys: bool
    _decoded: Tensor | None
    # Attributes are read as of any tensor; operations come to __torch_dispatch__ all the same.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def of(cls, past: Past, length: int, of_keys: bool) -> CompressedTensor:
        """The keys, or the values, of a past of so many tokens."""
        recent = (past.keys if of_keys else past.values).recent
        batch, heads, _, dim = recent.shape
        made: CompressedTensor = torch.Tensor._make_wrapper_subclass(
            cls, (batch, heads, length, dim), dtype=recent.dtype, device=recent.device
        )
        made.past, made.of_keys, made._decoded = past, of_keys, None
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"CompressedTensor({'keys' if self.of_keys else 'values'}, shape={tuple(self.shape)})"

    def decoded(self) -> Tensor:
        """The states themselves, (B, H, T, D)."""
        if self.past.counter is not None:
            raise NotReplayable("the model uses keys or values other than by attention")
        if self._decoded is None:
            self._decoded = (self.past.keys if self.of_keys else self.past.values).decode()
        return self._decoded

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs the operation on decoded states."""
        plain = tree_map(lambda part: part.decoded() if isinstance(part, CompressedTensor) else part, (args, kwargs))
        return func(*plain[0], **(plain[1] or {}))


def states_of(
    keys: History, values: History, backend: str, counter: Counter | None = None
) -> tuple[Tensor, Tensor] | None:
    """The two histories as tensors that `attention_forward` knows, or None where it has no use for them.

    That is where nothing is compressed yet, only one of the two is, a codec is of another kind, or a gradient is asked
    for.
    """
    if keys.compressed is None or values.compressed is None:
        if keys.compressed is not None or values.compressed is not None:
            _warn("way with keys or values alone")
        return None
    if keys.codec is None or values.codec is None or len(keys.compressed) != len(values.compressed):
        return None
    if keys.codec.quantizer.codec == "trellis" or values.codec.quantizer.codec == "trellis":
        _warn("trellis codes")
        return None
    if type(keys.codec) is not KeyCodec or type(values.codec) is not ValueCodec:
        _warn("outlier channels")
        return None
    if (keys.recent.requires_grad or values.recent.requires_grad) and torch.is_grad_enabled():
        return None
    past, length = Past(keys, values, backend, counter), len(keys)
    return CompressedTensor.of(past, length, True), CompressedTensor.of(past, length, False)


def context_of(past: Past) -> Context:
    """What `kernels.attention` takes."""
    parts = []
    for history in (past.keys, past.values):
        assert history.codec is not None
        assert history.compressed is not None
        device = history.recent.device
        tables, rotation = history.codec.quantizer.tables(device), history.codec.matrix(device)
        parts.append(Compressed(history.compressed.packed, history.compressed.scales, tables, rotation))
    sinks, recent = Dense(past.keys.sinks, past.values.sinks), Dense(past.keys.recent, past.values.recent)
    assert past.keys.compressed is not None
    recents = None if past.counter is None else past.counter.counts[1:]
    return Context(sinks, parts[0], parts[1], recent, past.keys.compressed.offset, recents)


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as the library calls it: from the codes where keys and values are compressed, else exact.

    Args:
        module: the attention layer.
        query: (B, Hq, Tq, D).
        key, value: (B, H, T, D), of which a `TurboQuantCache` makes `CompressedTensor`.
        attention_mask: (B, 1, Tq, T), bool or added to the logits; None for causal.
        dropout: of the weights; not from the codes.
        scaling: of the inner products; None for 1 / sqrt(D).
        softcap, s_aux, sliding_window: as for `kernels.attention`.
        **kwargs: what else the library passes; a `position_bias` is not taken into account from the codes.

    Returns:
        (B, Tq, Hq, D) and no weights.
    """
    scaling = 1.0 / math.sqrt(query.shape[3]) if scaling is None else scaling
    if isinstance(key, CompressedTensor) and key.past.counter is not None:
        attention_mask = key.past.counter.mask
        if hindrance := _hindrance(query, attention_mask, dropout, kwargs):
            raise NotReplayable(f"attention has {hindrance}")
        return _from_codes(query, key.past, scaling, attention_mask, softcap, s_aux, sliding_window), None
    if attention_mask is not None and attention_mask.shape[-1] > key.shape[2]:
        attention_mask = attention_mask[..., : key.shape[2]]
    if isinstance(key, CompressedTensor) and isinstance(value, CompressedTensor) and key.past is value.past:
        hindrance = _hindrance(query, attention_mask, dropout, kwargs)
        causal = attention_mask is not None or query.shape[2] == 1 or getattr(module, "is_causal", True)
        if hindrance:
            _warn(hindrance)
        elif causal:
            # A mask holds the window already.
            window = sliding_window if attention_mask is None else None
            return _from_codes(query, key.past, scaling, attention_mask, softcap, s_aux, window), None
    key, value = (part.decoded() if isinstance(part, CompressedTensor) else part for part in (key, value))
    if softcap is None and s_aux is None:
        found = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return found[0], None
    out = tiles.attention(  # the library's sdpa has neither capped logits nor sink logits
        query,
        [(key, value)],
        key.shape[2],
        scaling=scaling,
        mask=attention_mask,
        causal=getattr(module, "is_causal", True) and query.shape[2] > 1,
        softcap=softcap,
        s_aux=s_aux,
        dropout=dropout if module.training else 0.0,
    )
    return out, None


def _from_codes(
    query: Tensor,
    past: Past,
    scaling: float,
    mask: Tensor | None,
    softcap: float | None,
    s_aux: Tensor | None,
    window: int | None,
) -> Tensor:
    """Attention of queries that are the last tokens of a past: (B, Tq, Hq, D)."""
    context, count = context_of(past), query.shape[2]
    options: dict[str, Any] = {"scaling": scaling, "softcap": softcap, "s_aux": s_aux, "sliding_window": window}
    if count <= FEW_QUERIES:
        return kernels.attention(query, context, mask=mask, backend=past.backend, **options)
    if kernels.attention_backend(context, past.backend, query.device) == "reference":
        every = tiles.tiles_of(past.keys, past.values)
        return tiles.attention(query, every, context.length, mask=mask, **options)
    found = []
    for start in range(0, count, MANY_QUERIES):
        stop = min(start + MANY_QUERIES, count)
        seen = context.length - count + stop  # later tokens are hidden from these queries
        recent = Dense(*(part[:, :, : part.shape[2] - count + stop] for part in context.recent))
        masked = None if mask is None else mask[:, :, start:stop, :seen]
        part = context._replace(recent=recent)
        found.append(kernels.attention(query[:, :, start:stop], part, mask=masked, backend=past.backend, **options))
    return found[0] if len(found) == 1 else torch.cat(found, dim=1)


def _hindrance(query: Tensor, mask: Tensor | None, dropout: float, kwargs: dict[str, Any]) -> str:
    """What is asked for that attention from the codes cannot do; empty for nothing."""
    if kwargs.get("position_bias") is not None:
        return "a position bias"
    if dropout:
        return "dropout"
    if kwargs.get("output_attentions"):
        return "attention weights"
    if torch.is_grad_enabled() and query.requires_grad:
        return "gradients"
    if mask is not None and mask.shape[1] != 1:
        return "a mask for each head"
    return ""


def _warn(hindrance: str) -> None:
    if hindrance not in _warned:
        _warned.add(hindrance)
        warnings.warn(
            f"attention from compressed states has no {hindrance}: these layers decode their states at each step, "
            "which is right but slow",
            stacklevel=3,
        )


def register() -> None:
    """Makes the name known to the library, for attention and for masks."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
