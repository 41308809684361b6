"""The file of an index: what is in it, how it is written so that a crash leaves the old one whole, and how it is
verified.

A file is a safetensors container (8 bytes of header length, a JSON header, the tensors' bytes), so any safetensors
reader can open it, and loading runs no code. Its metadata are strings, in this order:

========== ==========================================================================================================
`format`   "tqsearch-index": the first entry, so that a file of ours begins, after its length, with a fixed text
`version`  "1": the version of this specification; a reader refuses a larger one
`header`   JSON, keys sorted: `dim`, `metric` ("ip", "cosine", "l2"), `plan` ([[size, width], ...]), `rotation`
           ("hadamard", "dense", "identity"), `seed`, `count` (vectors), `next_id` (one more than the largest id ever
           given)
`sha256`   of the text of `header`, then for each tensor in the order of the file the text "name dtype [shape]" and its
           bytes; dtype as safetensors names it, the shape as JSON without spaces
========== ==========================================================================================================

The tensors, none if `count` is 0, in this order, without gaps:

========== ===== ===================== =================================================================================
`ids`      I64   [count]               only if the ids are not 0, 1, 2, ... in the order of the rows
`bias`     F32   [count]               only for metric "l2": -|x|^2
`scales`   F16   [count]               F32 unless the metric is "cosine"; see `quantizer`
`packed`   U8    [count, row bytes]    the codes, in the layout of `packing`
========== ===== ===================== =================================================================================

The codec follows from `dim`, `plan`, `rotation` and `seed` alone: signs and permutations come from `splitmix`, levels
from `codebook`. A change of any of these that alters codes needs a new version.

`write` writes a temporary file in the same folder, syncs it, renames it over the target and syncs the folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tqsearch.errors import CorruptFileError, ForeignFileError, NewerFormatError
from tqsearch.plan import BitPlan
from tqsearch.segments import Columns

FORMAT = "tqsearch-index"
VERSION = 1
_PREFIX = b'{"__metadata__":{"format":"' + FORMAT.encode() + b'"'
_ORDER = ("ids", "bias", "scales", "packed")
_DTYPES = {torch.int64: "I64", torch.float32: "F32", torch.float16: "F16", torch.uint8: "U8"}
_CHUNK = 32 << 20  # bytes hashed and written at a time


@dataclass(frozen=True)
class Header:
    """The codec and the counts of an index; see the module's docstring."""

    dim: int
    metric: str
    plan: list[tuple[int, int]]
    rotation: str
    seed: int
    count: int
    next_id: int

    def text(self) -> str:
        """The JSON text of the file."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))


def write(path: str | os.PathLike[str], header: Header, segments: Sequence[Columns]) -> None:
    """Writes an index, whole or not at all, a block at a time.

    Args:
        path: the file; an existing one is replaced once the new one is safe on the disk.
        header: the codec and the counts.
        segments: the columns of consecutive runs of rows, on any device.
    """
    target = Path(path)
    names = [name for name in _ORDER if segments and name in segments[0]]
    entries = {name: (_DTYPES[segments[0][name].dtype], [header.count, *segments[0][name].shape[1:]]) for name in names}
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(_head(header, entries, segments, "0" * 64))
            digest = hashlib.sha256(header.text().encode())
            for name, (dtype, shape) in entries.items():
                digest.update(_label(name, dtype, shape))
                for chunk in _chunks([columns[name] for columns in segments]):
                    digest.update(chunk)
                    file.write(chunk)
            file.seek(0)
            file.write(_head(header, entries, segments, digest.hexdigest()))
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, _permissions(target))
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _sync_folder(target.parent)


def _permissions(target: Path) -> int:
    """The mode of the file that is replaced, or of a new one; a temporary file's own is 0600."""
    if target.exists():
        return target.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _head(header: Header, entries: dict[str, tuple[str, list[int]]], segments: Sequence[Columns], sha256: str) -> bytes:
    metadata = {"format": FORMAT, "version": str(VERSION), "header": header.text(), "sha256": sha256}
    content: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    for name, (dtype, shape) in entries.items():
        size = sum(columns[name].numel() * columns[name].element_size() for columns in segments)
        content[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _label(name: str, dtype: str, shape: Sequence[int]) -> bytes:
    return f"{name} {dtype} {json.dumps(list(shape), separators=(',', ':'))}".encode()


def _chunks(tensors: Sequence[Tensor]) -> Iterator[memoryview]:
    """The bytes of tensors, some rows at a time, brought to the CPU as they are needed."""
    for tensor in tensors:
        rows = max(1, _CHUNK // max(1, tensor[:1].numel() * tensor.element_size()))
        for block in torch.split(tensor, rows):
            yield memoryview(block.contiguous().cpu().numpy().data).cast("B")


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_header(path: str | os.PathLike[str]) -> Header:
    """The header of a file alone, unverified: for a look at what a file is.

    Raises:
        ForeignFileError, CorruptFileError, NewerFormatError: as `read`.
    """
    _check_prefix(Path(path))
    with _opened(path) as container:
        return _parsed(path, _metadata(path, container.metadata()))


def read(path: str | os.PathLike[str]) -> tuple[Header, Columns]:
    """Reads and verifies an index; the tensors stay memory-mapped.

    Raises:
        ForeignFileError: not a file of this format.
        CorruptFileError: truncated or altered.
        NewerFormatError: of a later version.
        OSError: the file cannot be opened.
    """
    _check_prefix(Path(path))
    with _opened(path) as container:
        metadata = _metadata(path, container.metadata())
        columns = {name: container.get_tensor(name) for name in container.keys()}  # noqa: SIM118 (not a dict)
    digest = hashlib.sha256(metadata["header"].encode())
    for name in _ORDER:
        if name in columns and columns[name].dtype in _DTYPES:
            digest.update(_label(name, _DTYPES[columns[name].dtype], columns[name].shape))
            for chunk in _chunks([columns[name]]):
                digest.update(chunk)
    if digest.hexdigest() != metadata["sha256"]:
        raise CorruptFileError(f"{path} is altered: its checksum does not match its content; restore it from a copy")
    header = _parsed(path, metadata)
    _check_columns(path, header, columns)
    return header, columns


def _check_prefix(path: Path) -> None:
    with open(path, "rb") as file:
        start = file.read(8 + len(_PREFIX))
    if start[8:] != _PREFIX[: max(len(start) - 8, 0)] or not start:
        raise ForeignFileError(f"{path} is not a tqsearch index: it does not begin as one")
    if len(start) < 8 + len(_PREFIX):
        raise CorruptFileError(f"{path} is truncated: it ends after {len(start)} bytes; restore it from a copy")


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[safe_open]:
    try:
        with safe_open(os.fspath(path), framework="pt", device="cpu") as container:
            yield container
    except SafetensorError as error:
        raise CorruptFileError(
            f"{path} is truncated or altered: its parts do not add up ({error}); restore it from a copy"
        ) from error


def _metadata(path: str | os.PathLike[str], metadata: dict[str, str] | None) -> dict[str, str]:
    wanted = {"format", "version", "header", "sha256"}
    if metadata is None or metadata.get("format") != FORMAT or not wanted <= metadata.keys():
        raise CorruptFileError(f"{path} is altered: its metadata lack an entry; restore it from a copy")
    if not metadata["version"].isascii() or not metadata["version"].isdigit():
        raise CorruptFileError(f"{path} is altered: its version is {metadata['version']!r}; restore it from a copy")
    if int(metadata["version"]) > VERSION:
        raise NewerFormatError(
            f"{path} has format version {metadata['version']}, this package reads up to {VERSION}; upgrade tqsearch"
        )
    return metadata


def _parsed(path: str | os.PathLike[str], metadata: dict[str, str]) -> Header:
    try:
        fields = json.loads(metadata["header"])
        plan = [(int(size), int(width)) for size, width in fields.pop("plan")]
        header = Header(plan=plan, **fields)
        BitPlan.from_pairs(plan)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CorruptFileError(f"{path} is altered: its header cannot be read ({error})") from error
    return header


def _check_columns(path: str | os.PathLike[str], header: Header, columns: Columns) -> None:
    wanted: dict[str, tuple[int, ...]] = {}
    if header.count:
        row_bytes = BitPlan.from_pairs(header.plan).bytes_per_vector
        wanted = {"scales": (header.count,), "packed": (header.count, row_bytes)}
        if header.metric == "l2":
            wanted["bias"] = (header.count,)
        if "ids" in columns:
            wanted["ids"] = (header.count,)
    found = {name: tuple(column.shape) for name, column in columns.items()}
    if found != wanted:
        raise CorruptFileError(f"{path} is not consistent: its header asks for tensors {wanted}, it holds {found}")
