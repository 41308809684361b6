"""The file of an index: what is in it, how it is written so that a crash leaves the old one whole, and how it is
verified.

A file is a safetensors container (8 bytes of header length, a JSON header, the tensors' bytes), so any safetensors
reader can open it, and loading runs no code. Its metadata are strings, in this order:

========== ==========================================================================================================
`format`   "tqsearch-index": the first entry, so that a file of ours begins, after its length, with a fixed text
`version`  "1", "2" for an index of learnt axes, "3" for one of trellis codes, "4" for one of learnt axes with
           slopes or even levels: the version of this specification that the file needs; a reader refuses a larger one
`header`   JSON, keys sorted: `dim`, `metric` ("ip", "cosine", "l2"), `plan` ([[size, width], ...]), `rotation`
           ("hadamard", "dense", "identity"), `seed`, `count` (vectors), `next_id` (one more than the largest id ever
           given); in version 2 also `learnt_plan` ([[size, width], ...], what the codes follow, `plan` being what was
           asked for) and `keeps_product` (whether there is a `bias` for another metric than "l2")
`sha256`   of the text of `header`, then for each tensor in the order of the file the text "name dtype [shape]" and its
           bytes; dtype as safetensors names it, the shape as JSON without spaces
========== ==========================================================================================================

The tensors, none if `count` is 0, in this order, without gaps:

========== ===== ===================== =================================================================================
`ids`      I64   [count]               only if the ids are not 0, 1, 2, ... in the order of the rows
`centre`   F32   [dim]                 only if the index was trained, also if `count` is 0: c, taken off every vector
`bias`     F32   [count]               for metric "l2": -|x - c|^2; for the others, if trained: <c, z>, where z = x - c
                                       (x / |x| - c for "cosine", and then F16)
`scales`   F16   [count]               F32 unless the metric is "cosine" and no band has 0 bits; see `quantizer`
`packed`   U8    [count, row bytes]    the codes, in the layout of `packing`
========== ===== ===================== =================================================================================

In version 1 the codec follows from `dim`, `plan`, `rotation` and `seed` alone: signs and permutations come from
`splitmix`, levels from `codebook`. A change of any of these that alters codes needs a new version.

Version 2 has learnt axes. Let m be the number of coordinates of width above 0 in `learnt_plan`. There are two tensors
more, after `centre`, which is always there, and `bias` and `scales` differ:

============ ===== =================== ===============================================================================
`axes`       F32   [m, dim]            A, orthonormal rows, in the order of the plan's coordinates of width above 0
`deviations` F32   [dim]               sigma, of all the plan's coordinates, >= 0
`bias`       F16   [count]             for "l2" -|z|^2 / t^2, where t^2 is the sum of the squared `deviations`; for the
                                       others, if `keeps_product`, <c, z> / (t max(t, |c|))
`scales`     F16   [count]             |A z|^2 / <A z, sigma levels>; 0 if A z is 0
============ ===== =================== ===============================================================================

The code of coordinate i is that of (A z)_i / sigma_i, all m of them scaled to squared norm m, by the levels of
dimension m; the bands of width 0 are left out.

Version 3 has trellis codes. The header has the entry `codec`, "trellis", and those of version 2 if axes were learnt, in
which case version 2's tensors hold. A row of `packed` is the codes of the bands of 1 to 4 bits, by `trellis`: its taps,
its levels, its `pack`; then those of the bands of 6 and 8 bits as before. What is coded is the same: the rotated
coordinates, scaled to squared norm `dim`, or those of learnt axes as in version 2. Widths are 0 to 4, 6 and 8.

Version 4 is version 2, or with the entry `codec` version 3, with one of two entries more, or both. `levels`, "even", if
there are bands of more than 4 bits: those are by `codebook.even` in place of `lloyd_max`. `slopes`, true: there is a
tensor after `deviations`, and `bias` and `scales` differ. With y = A z, h = sigma levels, gamma the slopes of the
coordinates of y, and g that of all others:

============ ===== =================== ===============================================================================
`slopes`     F32   [dim]               of all the plan's coordinates, from 0 to 1; equal for those of width 0
`bias`       F16   [count]             for "l2" (2 b - |z|^2) / t^2; for the others, if `keeps_product`, (<c, z> + b) /
                                       (t max(t, |c|)); b = sum of gamma_i y_i (y_i - s h_i) + g (|z|^2 - |y|^2), s
                                       being the row's scale
`scales`     F16   [count]             as in version 2 if there is a `bias`, else (<c, z> + sum of gamma_i y_i^2 + g
                                       (|z|^2 - |y|^2)) / (<A c, h> + sum of gamma_i y_i h_i), but at most twice version
                                       2's, and at least half, which it is also where the divisor is not above 0
============ ===== =================== ===============================================================================
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tqsearch import codec as codecs
from tqsearch import tensor_file
from tqsearch.errors import CorruptFileError, ForeignFileError, NewerFormatError
from tqsearch.estimator import bias_dtype
from tqsearch.plan import BitPlan
from tqsearch.segments import Columns

FORMAT = "tqsearch-index"
VERSION = 4
_PREFIX = b'{"__metadata__":{"format":"' + FORMAT.encode() + b'"'
_ORDER = ("ids", "centre", "axes", "deviations", "slopes", "bias", "scales", "packed")
_DTYPES = {dtype: tensor_file.DTYPES[dtype] for dtype in (torch.int64, torch.float32, torch.float16, torch.uint8)}


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
    learnt_plan: list[tuple[int, int]] | None = None
    keeps_product: bool | None = None
    codec: str | None = None  # None for "scalar"
    levels: str | None = None  # None for "optimal"
    slopes: bool | None = None  # None for none

    @property
    def version(self) -> int:
        """The version of the format that the index needs."""
        if self.levels is not None or self.slopes is not None:
            return 4
        if self.codec is not None:
            return 3
        return 1 if self.learnt_plan is None else 2

    def text(self) -> str:
        """The JSON text of the file."""
        fields = {name: value for name, value in asdict(self).items() if value is not None}
        return json.dumps(fields, sort_keys=True, separators=(",", ":"))


def write(
    path: str | os.PathLike[str],
    header: Header,
    segments: Sequence[Columns],
    constants: dict[str, Tensor] | None = None,
) -> None:
    """Writes an index, whole or not at all, a block at a time.

    Args:
        path: the file; an existing one is replaced once the new one is safe on the disk.
        header: the codec and the counts.
        segments: the columns of consecutive runs of rows, on any device.
        constants: `centre`, `axes`, `deviations` and `slopes`, as far as the index has them.

    Raises:
        OSError: there is no such folder, something else than a file is in the way, or the disk is full; a file that
            was there is as it was, and nothing is left beside it.
    """
    tensors = {name: [columns[name] for columns in segments] for name in (segments[0] if segments else ())}
    tensors.update((name, [tensor]) for name, tensor in (constants or {}).items())
    tensors = {name: tensors[name] for name in _ORDER if name in tensors}
    with tensor_file.replaced(path) as file:
        file.write(_head(header, tensors, "0" * 64))
        digest = hashlib.sha256(header.text().encode())
        for name, parts in tensors.items():
            digest.update(_label(name, parts))
            for chunk in tensor_file.chunks(parts):
                digest.update(chunk)
                file.write(chunk)
        file.seek(0)
        file.write(_head(header, tensors, digest.hexdigest()))


def _head(header: Header, tensors: dict[str, list[Tensor]], sha256: str) -> bytes:
    metadata = {"format": FORMAT, "version": str(header.version), "header": header.text(), "sha256": sha256}
    return tensor_file.head(metadata, tensors)


def _label(name: str, parts: Sequence[Tensor]) -> bytes:
    shape = json.dumps(tensor_file.shape_of(parts), separators=(",", ":"))
    return f"{name} {_DTYPES[parts[0].dtype]} {shape}".encode()


def read_header(path: str | os.PathLike[str]) -> Header:
    """The header of a file alone, unverified: for a look at what a file is.

    Raises:
        ForeignFileError, CorruptFileError, NewerFormatError: as `read`.
    """
    _check_prefix(Path(path))
    with _opened(path) as container:
        return _parsed(path, _metadata(path, container.metadata()))


def stored_bytes(path: str | os.PathLike[str]) -> int:
    """Bytes that a file keeps for all its vectors, ids apart, as the shapes of its tensors say; unverified.

    Raises:
        ForeignFileError, CorruptFileError, NewerFormatError: as `read`.
    """
    _check_prefix(Path(path))
    with _opened(path) as container:
        slices = {name: container.get_slice(name) for name in container.keys()}  # noqa: SIM118 (not a dict)
    sizes = {dtype: kind.itemsize for kind, dtype in _DTYPES.items()}
    kept = [part for name, part in slices.items() if name in ("bias", "scales", "packed")]
    return sum(sizes[part.get_dtype()] * math.prod(part.get_shape()) for part in kept)


def read(path: str | os.PathLike[str]) -> tuple[Header, Columns, dict[str, Tensor]]:
    """Reads and verifies an index: its header, its columns and its constants; the tensors stay memory-mapped.

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
            digest.update(_label(name, [columns[name]]))
            for chunk in tensor_file.chunks([columns[name]]):
                digest.update(chunk)
    if digest.hexdigest() != metadata["sha256"]:
        raise CorruptFileError(f"{path} is altered: its checksum does not match its content; restore it from a copy")
    header = _parsed(path, metadata)
    constants = {name: columns.pop(name) for name in ("centre", "axes", "deviations", "slopes") if name in columns}
    _check_constants(path, header, constants)
    _check_columns(path, header, columns, trained="centre" in constants)
    return header, columns, constants


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
    if not re.fullmatch("[1-9][0-9]{0,8}", metadata["version"]):
        raise CorruptFileError(f"{path} is altered: its version is {metadata['version']!r}; restore it from a copy")
    if int(metadata["version"]) > VERSION:
        raise NewerFormatError(
            f"{path} has format version {metadata['version']}, this package reads up to {VERSION}; upgrade tqsearch"
        )
    return metadata


def _parsed(path: str | os.PathLike[str], metadata: dict[str, str]) -> Header:
    try:
        fields = json.loads(metadata["header"])
        new = {"learnt_plan", "keeps_product"}
        if new & fields.keys() not in (set(), new):
            raise ValueError("an entry of learnt axes is missing")
        for name in {"plan", "learnt_plan"} & fields.keys() | {"plan"}:
            fields[name] = [(int(size), int(width)) for size, width in fields[name]]
            plan = BitPlan.from_pairs(fields[name])
            if plan.dim != fields["dim"]:
                raise ValueError(f"its {name} covers {plan.dim} coordinates of {fields['dim']}")
        header = Header(**fields)
        if str(header.version) != metadata["version"]:
            raise ValueError(f"version {metadata['version']} does not go with its entries")
        if header.codec not in (None, "trellis"):
            raise ValueError(f"codec is {header.codec!r}")
        if header.slopes is not None and (header.slopes is not True or header.learnt_plan is None):
            raise ValueError(f"slopes is {header.slopes!r}")
        if header.levels not in (None, "even") or (header.levels and header.learnt_plan is None):
            raise ValueError(f"levels are {header.levels!r}")
        if type(header.keeps_product) not in (bool, type(None)):
            raise ValueError(f"keeps_product is {header.keeps_product!r}")
        if not all(type(n) is int for n in (header.dim, header.seed, header.count, header.next_id)):
            raise ValueError("a number is not an integer")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CorruptFileError(f"{path} is altered: its header cannot be read ({error})") from error
    return header


def _check_constants(path: str | os.PathLike[str], header: Header, constants: dict[str, Tensor]) -> None:
    shapes: dict[str, tuple[int, ...]] = {"centre": (header.dim,)} if "centre" in constants else {}
    if header.learnt_plan is not None:
        coded = sum(size for size, width in header.learnt_plan if width)
        shapes = {"centre": (header.dim,), "axes": (coded, header.dim), "deviations": (header.dim,)}
        if header.slopes:
            shapes["slopes"] = (header.dim,)
    wanted = {name: (torch.float32, shape) for name, shape in shapes.items()}
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in constants.items()}
    if found != wanted:
        raise CorruptFileError(f"{path} is not consistent: its header asks for constants {wanted}, it holds {found}")


def _check_columns(path: str | os.PathLike[str], header: Header, columns: Columns, *, trained: bool) -> None:
    count, learnt = header.count, header.learnt_plan is not None
    wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    if count:
        codes = BitPlan.from_pairs(header.plan if header.learnt_plan is None else header.learnt_plan)
        half = learnt or (header.metric == "cosine" and all(width for _, width in header.plan))
        wanted["scales"] = (torch.float16 if half else torch.float32, (count,))
        wanted["packed"] = (torch.uint8, (count, codecs.row_bytes("trellis" if header.codec else "scalar", codes)))
        keeps_product = trained if header.keeps_product is None else header.keeps_product
        bias = bias_dtype(header.metric, keeps_product, learnt_axes=learnt)
        if bias is not None:
            wanted["bias"] = (bias, (count,))
        if "ids" in columns:
            wanted["ids"] = (torch.int64, (count,))
    found = {name: (column.dtype, tuple(column.shape)) for name, column in columns.items()}
    if found != wanted:
        raise CorruptFileError(f"{path} is not consistent: its header asks for tensors {wanted}, it holds {found}")
    ids = columns.get("ids", torch.tensor([count - 1], device="cpu"))
    if count and (ids.min() < 0 or ids.max() >= header.next_id or len(ids.unique()) != len(ids)):
        raise CorruptFileError(f"{path} is not consistent: its ids are not distinct numbers below {header.next_id}")
