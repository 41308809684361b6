"""A cache to its file and back: which attributes of which layer go where."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from tqsearch.arrays import as_device
from tqsearch.errors import CorruptFileError, InvalidInputError
from tqsearch.kvcache import format
from tqsearch.kvcache.history import History
from tqsearch.kvcache.layer import TurboQuantLayer
from tqsearch.kvcache.policy import LayerBits, PerLayer, Width
from tqsearch.kvcache.store import CompressedStates
from tqsearch.plan import BitPlan

if TYPE_CHECKING:
    from tqsearch.kvcache.cache import TurboQuantCache

# Attributes that layers get at their first update, and a fresh one lacks.
_LATE = {"dtype", "device"}
_OPTIONS = ("residual_length", "sink_length", "block_length", "seed", "outlier_channels", "codec")
_LATER = {"codec": "scalar"}  # options that older files lack, and what they mean


def save(cache: TurboQuantCache, path: str | os.PathLike[str]) -> None:
    """Writes a cache; see `format` for the file."""
    if cache.offloading and torch.cuda.is_available():
        torch.cuda.synchronize()  # what goes to the CPU may still be on its way
    tensors: dict[str, Tensor] = {}
    settings = next(layer.settings for layer in cache.layers if isinstance(layer, TurboQuantLayer))
    entries = []
    for index, layer in enumerate(cache.layers):
        entry: dict[str, Any] = {"kind": type(layer).__name__}
        attributes = dict(vars(layer))
        if isinstance(layer, TurboQuantLayer):
            for side, history in zip(("keys", "values"), layer.past or (), strict=False):
                parts = history.tensors()
                if "packed" in parts and history.codec is not None:
                    parts["packed"] = history.codec.filed(parts["packed"])
                tensors.update({f"{index}.{side}.{name}": part for name, part in parts.items()})
            entry["bits"] = [_width_out(width) for width in attributes.pop("settings").bits]
            for name in ("_past", "_window", "_fetched"):  # nothing waits in a file
                del attributes[name]
        entry["state"] = format.attributes_out(str(index), attributes, tensors)
        entries.append(entry)
    header = {name: getattr(settings, name) for name in _OPTIONS}
    format.write(path, {**header, "layers": entries}, tensors)


def load(
    cache_class: type[TurboQuantCache],
    path: str | os.PathLike[str],
    config: PretrainedConfig,
    device: str | torch.device,
    options: dict[str, Any],
) -> TurboQuantCache:
    """Reads a cache for a model; see `TurboQuantCache.load`."""
    header, tensors = format.read(path)
    place = as_device(device)
    try:
        entries = header["layers"]
        widths = [
            LayerBits(*map(_width_in, entry.get("bits", (None, None))))
            for entry in entries
            if "bits" in entry or entry["kind"] in ("DynamicLayer", "LinearAttentionAndFullAttentionLayer")
        ]
        saved = {name: {**_LATER, **header}[name] for name in _OPTIONS}
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFileError(f"{path} is altered: its header cannot be read ({error!r})") from error
    cache = cache_class(config, policy=_Saved(tuple(widths)), **saved, **options)
    kinds, wanted = [entry["kind"] for entry in entries], [type(layer).__name__ for layer in cache.layers]
    if kinds != wanted:
        raise InvalidInputError(
            f"the configuration must have the layers of {path}, {', '.join(kinds)}, got {', '.join(wanted)}"
        )
    for index, (layer, entry) in enumerate(zip(cache.layers, entries, strict=True)):
        attributes = format.attributes_in(entry["state"], tensors, place)
        if unknown := attributes.keys() - vars(layer).keys() - _LATE:
            raise CorruptFileError(f"{path} is altered: layer {index} has no attribute {', '.join(sorted(unknown))}")
        if isinstance(layer, TurboQuantLayer):
            sides = [_side(path, f"{index}.{side}.", tensors, place) for side in ("keys", "values")]
            if sides[0] and sides[1]:
                _restore(path, layer, *sides)
        vars(layer).update(attributes)
    return cache


class _Saved(PerLayer):
    """The widths of a file, of whatever number of layers: `load` compares the layers themselves, with a message."""

    def bits(self, layer: int, count: int) -> LayerBits:
        """See `Policy`."""
        return self.layers[layer] if len(self.layers) == count else LayerBits(8, 8)


def _side(path: Any, prefix: str, tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    names = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if names and not {"sinks", "recent"} <= names.keys():
        raise CorruptFileError(f"{path} is not consistent: it lacks tensors of {prefix.rstrip('.')}")
    return {name: tensor.to(device) for name, tensor in names.items()}


def _restore(path: Any, layer: TurboQuantLayer, keys: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    layer.lazy_initialization(keys["sinks"], values["sinks"])
    assert layer.past is not None
    past = []
    for history, parts in zip(layer.past, (keys, values), strict=True):
        compressed = None
        if "packed" in parts:
            names = ("packed", "scales", "offset", "order", "gain")
            compressed = CompressedStates(**{name: parts[name] for name in names if name in parts})
            compressed = _unfiled(path, history, compressed)
        past.append(History(parts["sinks"], compressed, parts["recent"], history.codec))
    layer.past = past[0], past[1]


def _unfiled(path: Any, history: History, compressed: CompressedStates) -> CompressedStates:
    """Compressed tokens as a codec reads them, their shapes checked."""
    scales = compressed.scales
    heads = history.sinks.shape[:2]
    codec = history.codec
    wanted = None if codec is None else codec.filed_shape(heads[0], heads[1], scales.shape[-1])
    if codec is None or scales.shape[:-1] != heads or tuple(compressed.packed.shape) != wanted:
        raise CorruptFileError(
            f"{path} is not consistent: codes of shape {tuple(compressed.packed.shape)}, where {wanted} is read"
        )
    return replace(compressed, packed=codec.unfiled(compressed.packed))


def _width_out(width: Width) -> Any:
    return [list(pair) for pair in width.pairs()] if isinstance(width, BitPlan) else width


def _width_in(width: Any) -> Width:
    return BitPlan.from_pairs(width) if isinstance(width, list) else width
