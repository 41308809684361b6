"""The container of an index file by its specification: taken apart and put together, with hashlib, json and struct."""

import hashlib
import json
import struct
from typing import Any

import numpy as np

DTYPES = {"I64": "<i8", "I32": "<i4", "F64": "<f8", "F32": "<f4", "F16": "<f2", "U8": "|u1"}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

Tensors = dict[str, np.ndarray]


def take_apart(content: bytes) -> tuple[str, dict[str, Any], Tensors]:
    """The version, the header and the tensors in the file's order; checks every statement that holds in any version."""
    (length,) = struct.unpack("<Q", content[:8])
    text, data = content[8 : 8 + length], content[8 + length :]
    assert text.startswith(b'{"__metadata__":{"format":"tqsearch-index"')
    assert length % 8 == 0
    container = json.loads(text)
    metadata = container.pop("__metadata__")
    assert list(metadata) == ["format", "version", "header", "sha256"]
    header = json.loads(metadata["header"])
    assert list(header) == sorted(header)
    digest = hashlib.sha256(metadata["header"].encode())
    tensors, end = {}, 0
    for name, entry in container.items():
        first, last = entry["data_offsets"]
        assert first == end, "a gap"
        end = last
        digest.update(_label(name, entry["dtype"], entry["shape"]) + data[first:last])
        tensors[name] = np.frombuffer(data[first:last], DTYPES[entry["dtype"]]).reshape(entry["shape"])
    assert end == len(data)
    assert digest.hexdigest() == metadata["sha256"]
    return metadata["version"], header, tensors


def put_together(header: dict[str, Any], tensors: Tensors, version: str) -> bytes:
    """A file with a right checksum, and other white space in the JSON than the package writes."""
    text = json.dumps(header, sort_keys=True)
    digest, container, data = hashlib.sha256(text.encode()), {}, b""
    for name, tensor in tensors.items():
        dtype, shape = NAMES[tensor.dtype.str], list(tensor.shape)
        digest.update(_label(name, dtype, shape) + tensor.tobytes())
        container[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + tensor.nbytes]}
        data += tensor.tobytes()
    metadata = {"format": "tqsearch-index", "version": version, "header": text, "sha256": digest.hexdigest()}
    whole = json.dumps({"__metadata__": metadata, **container}, separators=(",", ":")).encode()
    whole += b" " * (-len(whole) % 8)
    return struct.pack("<Q", len(whole)) + whole + data


def kinds(tensors: Tensors) -> list[tuple[str, str, tuple[int, ...]]]:
    """What the specification says of tensors: names in order, dtypes and shapes."""
    return [(name, NAMES[tensor.dtype.str], tensor.shape) for name, tensor in tensors.items()]


def _label(name: str, dtype: str, shape: list[int]) -> bytes:
    return f"{name} {dtype} {json.dumps(shape, separators=(',', ':'))}".encode()
