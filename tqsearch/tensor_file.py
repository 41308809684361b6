"""A safetensors file, written a block at a time, whole or not at all.

The container is 8 bytes of header length, a JSON header, and the tensors' bytes, so any safetensors reader can open it.
Readers want each tensor to begin at a multiple of its element size: the caller's order of tensors sees to that.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

# The dtypes by the names that safetensors has for them.
DTYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
CHUNK = 32 << 20  # bytes brought to the CPU at a time
_BINARY = getattr(os, "O_BINARY", 0)  # on Windows


@contextlib.contextmanager
def replaced(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of `path` once it is whole and safe on the disk.

    It is a temporary file in the same folder: synced, renamed over the target, and the folder synced.

    Args:
        path: an existing file keeps its permissions, a link stays one.

    Raises:
        OSError: there is no such folder, something else than a file is in the way, or the disk is full. After this, and
            after any error of the block, a file that was there is as it was, and nothing is left beside it.
    """
    target = _target(path)
    mode = target.stat().st_mode & 0o777 if target.exists() else None
    temporary = target.parent / f".tqsearch-{secrets.token_hex(4)}.tmp"
    # The system takes the umask off a new file's mode: to ask for the umask is to set it, for all threads.
    handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | _BINARY, 0o666 if mode is None else 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if mode is not None:
            os.chmod(temporary, mode)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _sync_folder(target.parent)


def _target(path: str | os.PathLike[str]) -> Path:
    """Where to write, behind any links: a file, or nothing yet."""
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such folder to save to; make it first", str(target.parent))
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it can be saved to a file, and this is a folder", str(target))
    if target.exists() and not target.is_file():  # a device or a pipe would be replaced
        raise OSError(errno.EINVAL, "it can be saved to a regular file, and this is none", str(target))
    return target


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def head(metadata: dict[str, str], tensors: dict[str, list[Tensor]]) -> bytes:
    """What goes before the tensors' bytes; each tensor is given as parts, consecutive runs of its rows."""
    content: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    for name, parts in tensors.items():
        size = sum(part.nbytes for part in parts)
        content[name] = {
            "dtype": DTYPES[parts[0].dtype],
            "shape": shape_of(parts),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def shape_of(parts: Sequence[Tensor]) -> list[int]:
    """The shape of the parts' rows together."""
    if not parts[0].ndim:
        return []
    return [sum(len(part) for part in parts), *parts[0].shape[1:]]


def chunks(parts: Sequence[Tensor]) -> Iterator[memoryview]:
    """The bytes of the parts, some at a time, brought to the CPU as they are needed."""
    for part in parts:
        for block in torch.split(part.detach().reshape(-1), max(1, CHUNK // part.element_size())):
            yield block.contiguous().cpu().view(torch.uint8).numpy().data
