"""The file of a cache: what is in it, how it is written so that a crash leaves the old one whole, and how it is
verified.

A file is a safetensors container. Its metadata are strings:

========== ==========================================================================================================
`format`   "tqsearch-kvcache"
`version`  "1", or "2" with trellis codes: of this specification; a reader refuses a larger one
`header`   JSON, keys sorted: `residual_length`, `sink_length`, `block_length`, `seed`, `outlier_channels`, `codec`
           ("scalar" or "trellis"; the first files of version 1 lack it and are scalar), and `layers`, one entry a layer
           of the model: `kind` (the class of its cache); of a compressed layer `bits` (of keys and of values: a number,
           [[size, width], ...] of a plan, or null); `state`, the layer's other attributes
`sha256`   of the text of `header`, then for each tensor in the order of the names the text "name dtype [shape]" and
           its bytes, where dtype is torch's name and the shape JSON without spaces
========== ==========================================================================================================

A compressed layer n has the tensors `n.keys.sinks`, `n.keys.recent` and, if tokens are compressed, `n.keys.packed`,
`n.keys.scales`, `n.keys.offset` and, with outlier channels, `n.keys.order` and `n.keys.gain`, and the first four of
`values`: see `store`; but in `packed` the planes of a row follow each other: (B, H, C, row bytes) for keys, a row of a
block's codes for each coordinate for values. An attribute of a layer in `state` is [kind, content]: ["value", a
JSON value], ["tensor", its name], ["dtype", torch's name], ["device", null] or ["dict", [[key, attribute], ...]].

Codes follow from the widths, the codec, the seed and the shapes alone. A change that alters them needs a new version.
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tqsearch import tensor_file
from tqsearch.errors import CorruptFileError, ForeignFileError, InvalidInputError, NewerFormatError

FORMAT = "tqsearch-kvcache"
VERSION = 2


def write(path: str | os.PathLike[str], header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Writes a cache, whole or not at all.

    Args:
        path: the file; an existing one is replaced once the new one is safe on the disk.
        header: see the module's docstring.
        tensors: by name, on any device.

    Raises:
        OSError: it cannot be written; see `tensor_file.replaced`.
    """
    text = json.dumps(header, sort_keys=True, separators=(",", ":"))
    version = 2 if header["codec"] == "trellis" else 1
    metadata = {"format": FORMAT, "version": str(version), "header": text, "sha256": _digest(text, tensors)}
    # Wide elements first: so each tensor begins at a multiple of its own.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    with tensor_file.replaced(path) as file:
        file.write(tensor_file.head(metadata, {name: [tensors[name]] for name in order}))
        for name in order:
            for chunk in tensor_file.chunks([tensors[name]]):
                file.write(chunk)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads and verifies a cache: its header and its tensors, on the CPU.

    Raises:
        ForeignFileError: not a file of this format.
        CorruptFileError: truncated or altered.
        NewerFormatError: of a later version.
        OSError: the file cannot be opened.
    """
    with open(path, "rb") as file:
        ours = f'"{FORMAT}"'.encode() in file.read(1 << 16)
    try:
        with safe_open(os.fspath(path), framework="pt", device="cpu") as container:
            metadata = container.metadata() or {}
            tensors = {name: container.get_tensor(name) for name in container.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        if ours:
            raise CorruptFileError(f"{path} is truncated or altered ({error}); restore it from a copy") from error
        raise ForeignFileError(f"{path} is not a tqsearch cache: {error}") from error
    if metadata.get("format") != FORMAT:
        raise ForeignFileError(f"{path} is not a tqsearch cache: its format is {metadata.get('format')!r}")
    if not {"version", "header", "sha256"} <= metadata.keys() or not metadata["version"].isdecimal():
        raise CorruptFileError(f"{path} is altered: its metadata lack an entry; restore it from a copy")
    if int(metadata["version"]) > VERSION:
        raise NewerFormatError(
            f"{path} has format version {metadata['version']}, this package reads up to {VERSION}; upgrade tqsearch"
        )
    if _digest(metadata["header"], tensors) != metadata["sha256"]:
        raise CorruptFileError(f"{path} is altered: its checksum does not match its content; restore it from a copy")
    header: dict[str, Any] = json.loads(metadata["header"])
    return header, tensors


def _digest(header: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        shape = json.dumps(list(tensor.shape), separators=(",", ":"))
        digest.update(f"{name} {tensor.dtype} {shape}".encode())
        for chunk in tensor_file.chunks([tensor]):
            digest.update(chunk)
    return digest.hexdigest()


def attributes_out(prefix: str, attributes: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Attributes of a layer as JSON; their tensors go to `tensors` under names that begin with `prefix`.

    Raises:
        InvalidInputError: an attribute is of a kind that files do not hold.
    """
    return {name: _out(f"{prefix}.{name}", value, tensors) for name, value in attributes.items()}


def _out(name: str, value: Any, tensors: dict[str, Tensor]) -> list[Any]:
    if isinstance(value, Tensor):
        tensors[name] = value
        return ["tensor", name]
    if isinstance(value, torch.dtype):
        return ["dtype", str(value)]
    if isinstance(value, torch.device):
        return ["device", None]
    if isinstance(value, dict) and all(isinstance(key, int) for key in value):
        return ["dict", [[key, _out(f"{name}.{key}", entry, tensors)] for key, entry in value.items()]]
    if value is None or isinstance(value, bool | int | float | str):
        return ["value", value]
    raise InvalidInputError(f"{name} is a {type(value).__name__}, which cannot be saved; this model's cache cannot be")


def attributes_in(state: dict[str, Any], tensors: dict[str, Tensor], device: torch.device) -> dict[str, Any]:
    """The attributes that `attributes_out` wrote, on a device."""
    return {name: _in(entry, tensors, device) for name, entry in state.items()}


def _in(entry: list[Any], tensors: dict[str, Tensor], device: torch.device) -> Any:
    kind, content = entry
    if kind == "tensor":
        return tensors[content].to(device)
    if kind == "dtype":
        dtype = getattr(torch, content.removeprefix("torch."), None)
        if not isinstance(dtype, torch.dtype):
            raise CorruptFileError(f"{content!r} is no dtype of torch; restore the file from a copy")
        return dtype
    if kind == "device":
        return device
    if kind == "dict":
        return {key: _in(value, tensors, device) for key, value in content}
    return content
