"""Bytes that a cache really holds, from the storages of the tensors reachable from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

STOP = (str, bytes, int, float, bool, type(None), torch.dtype, torch.device, torch.nn.Module)


def storages(root: Any) -> dict[int, int]:
    """Bytes of every storage reachable from an object, by its address; shared storages count once."""
    found: dict[int, int] = {}
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        item = waiting.pop()
        if isinstance(item, STOP) or id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            flatten = getattr(item, "__tensor_flatten__", None)
            if flatten is not None:  # a tensor subclass of parts, such as quanto's
                waiting += [getattr(item, name) for name in flatten()[0]]
            elif item.numel():
                whole = item.untyped_storage()
                found[whole.data_ptr()] = whole.nbytes()
        elif isinstance(item, dict):
            waiting += list(item.values())
        elif isinstance(item, list | tuple | set | frozenset):
            waiting += list(item)
        elif not callable(item) and not isinstance(item, type):
            waiting += list(getattr(item, "__dict__", {}).values())
            waiting += [getattr(item, name) for name in getattr(type(item), "__slots__", ()) if hasattr(item, name)]
    return found


def storage_bytes(root: Any) -> int:
    """Bytes of all storages reachable from an object."""
    return sum(storages(root).values())


@torch.inference_mode()
def states(model: Any, tokens: Tensor, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """The keys and values of every layer for one document, (1, heads, tokens, dim) each, in `dtype`."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    model(tokens[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
    layers: list[Any] = cache.layers
    return [(layer.keys.to(dtype), layer.values.to(dtype)) for layer in layers]


@torch.inference_mode()
def replay(recorded: list[tuple[Tensor, Tensor]], cache: Any, chunk: int, stop: int) -> None:
    """Feed recorded states to a cache in chunks, from where it stands to `stop` tokens."""
    for start in range(cache.get_seq_length(), stop, chunk):
        end = min(start + chunk, stop)
        for number, (keys, values) in enumerate(recorded):
            cache.update(keys[:, :, start:end].clone(), values[:, :, start:end].clone(), number)


def measured_bytes(
    recorded: list[tuple[Tensor, Tensor]], make: Callable[[], Any], chunk: int, shorter: int, longer: int
) -> dict[str, Any]:
    """Bytes of a cache at two lengths, and what one more token costs.

    Args:
        recorded: of `states`, at least `longer` tokens.
        make: an empty cache.
        chunk: tokens fed at a time.
        shorter: tokens at first; a multiple of `chunk`.
        longer: tokens at last; the difference is a multiple of the block, so that the dense window is as long at both.
    """
    cache = make()
    replay(recorded, cache, chunk, shorter)
    first = storage_bytes(cache)
    replay(recorded, cache, chunk, longer)
    last = storage_bytes(cache)
    dense = sum(part.element_size() * part[:, :, 0].numel() for pair in recorded for part in pair)
    return {
        "tokens": longer,
        "total": last,
        "ratio_total": round(last / (dense * longer), 4),
        "per_token": round((last - first) / (longer - shorter), 2),
        "ratio_per_token": round((last - first) / (longer - shorter) / dense, 4),
        "dense_per_token": dense,
        "dtype": str(recorded[0][0].dtype).removeprefix("torch."),
        "from": "storages",
    }
