"""How the attention kernels cut packed keys and values: constants, orders of coordinates and of tokens.

The kernel works on one block of tokens at a time. Keys are packed along the head dimension: a block of them decodes to
tiles (tokens, coordinates), each multiplied with the same coordinates of the query. Values are packed along the tokens:
a block decodes to tiles (coordinates, tokens), each multiplied with the same tokens' probabilities. A decoded part (see
`decode_triton`) holds a permuted choice of coordinates or tokens. Parts of keys narrower than 32, the least depth of an
int8 matrix product, are put side by side in groups; all parts of a block of values are.

Tokens may stand in any order within a block, so the rows of the scores are ordered to suit the first band of the
values: four tokens whose weights a tensor core leaves in one thread's registers stand together there, and their weights
become a word at once. Everything here is a permutation of the bits of a token's number, because every field order of
`packing` and of `decode` is.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import count
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tqsearch.kernels.bands import BandTable
from tqsearch.kernels.decode_triton import COLUMN_DIMS, PARTS, assembly, slot_dims
from tqsearch.plan import planes_of

COPY = 128  # bytes from a table of 4 bits or less to its copy
ODD = 64  # bytes from a table of 4 bits or less to the two that say whether bytes are odd, see `_word_dims`
DEPTH = 32  # the least depth of an int8 matrix product
HALVES = 3  # the form of a 4-bit band decoded to the halves of its table, see `_halves_4`
WORDS = 2  # the form of a 3-bit band decoded by words, see `_word_dims`; 1: steps are whole; 0: they are not

BandKey = tuple[int, int, tuple[int, ...], float, float]  # size, width, steps, step, offset


def band_keys(bands: tuple[BandTable, ...]) -> tuple[BandKey, ...]:
    """What of the tables the layouts depend on, hashable."""
    return tuple((band.size, band.width, band.steps, band.step, band.offset) for band in bands)


class KeyLayout(NamedTuple):
    """Keys: for each band with bits

    Attributes:
        bands: (width, columns, columns a step, byte offset, bytes of the first plane, slot offset, slots, form).
        assemblies: PTX, or "" for the portable body.
        slots: (slots,) int64, the rotated coordinate of each slot; D where there is none.
        tables: (bands, 256) int8, the numbers of the levels.
        steps, offsets: level = (number - offset) * step.
        serial: no other layout has it.
    """

    bands: tuple[tuple[int, ...], ...]
    assemblies: tuple[str, ...]
    slots: Tensor
    tables: Tensor
    steps: tuple[float, ...]
    offsets: tuple[float, ...]
    serial: int


class ValueLayout(NamedTuple):
    """Values: for each band with bits

    Attributes:
        bands: (width, columns, byte offset, bytes of a row, bytes of the first plane, first coordinate, size, form).
        orders: the permutation of the bits of a score's row, as axes of 2, to those of the decoded tokens; then the
            columns.
        assemblies, tables, steps, offsets: as for keys.
        tokens: (block,) int32, the token of each row of the scores.
        places: the same, as the permutation of axes of 2.
        serial: no other layout has it.
    """

    bands: tuple[tuple[int, ...], ...]
    orders: tuple[tuple[int, ...], ...]
    assemblies: tuple[str, ...]
    tables: Tensor
    steps: tuple[float, ...]
    offsets: tuple[float, ...]
    tokens: Tensor
    places: tuple[int, ...]
    serial: int


_serials = count()


def _tables(bands: list[BandKey], device: torch.device) -> Tensor:
    """The numbers of the levels, (bands, 256) int8; of 4 bits or less twice, and 0 and 1 at `ODD`."""
    rows = np.zeros((max(1, len(bands)), 256), np.int8)
    for row, (_, _, steps, _, _) in zip(rows, bands, strict=False):
        row[: len(steps)] = steps
        if len(steps) <= 16:
            row[ODD : ODD + 2] = 0, 1
            row[COPY:] = row[:COPY]
    return torch.from_numpy(rows).to(device)


def _columns_a_step(size: int, width: int) -> tuple[int, bool]:
    """Columns of a step, and whether steps of that many are whole."""
    columns = -(-size // COLUMN_DIMS[width])
    least = max(8, DEPTH // PARTS[width])
    for step in (128, 64, 32, 16, 8):
        if step >= least and columns % step == 0 and size % COLUMN_DIMS[width] == 0:
            return step, True
    return max(least, min(32, 1 << (columns - 1).bit_length())), False


def _aligned(width: int, plane: int) -> bool:
    """Whether the rows of all planes are, to 16 bytes: shorter ones may leave a thread fewer than four neighbours."""
    return plane % (32 if width == 3 else 16) == 0


@lru_cache(maxsize=64)
def key_layout(bands: tuple[BandKey, ...], assembled: bool, device: torch.device) -> KeyLayout:
    """The layout of keys' bands, with assembly or all portable."""
    dim = sum(band[0] for band in bands)
    constants, assemblies, slots = [], [], []
    first, byte, slot = 0, 0, 0
    kept = [band for band in bands if band[1]]
    for size, width, steps, _, _ in bands:
        if width:
            plane = -(-size * (2 if width == 3 else width) // 8)
            step, whole = _columns_a_step(size, width)
            columns = -(-size // COLUMN_DIMS[width])
            quad = assembled and whole and _aligned(width, plane)
            form, dims = int(whole), slot_dims(width, -(-columns // step) * step, quad)
            if width == 4 and quad and step >= DEPTH:
                form = HALVES
            if width == 3 and quad and step >= DEPTH // 2:
                form, step, columns = WORDS, 2 * step, 2 * columns
                dims = np.concatenate(
                    [4 * start + _word_dims(step, False) for start in range(0, columns, step)], axis=1
                )
            dims = dims.reshape(len(dims), -1, step).transpose(1, 0, 2).ravel()  # step by step, part by part
            constants.append((width, columns, step, byte, plane, slot, len(dims), form))
            assemblies.append(_assembly(width, steps, quad, form) if assembled else "")
            slots.append(np.where(dims < size, first + dims, dim))
            byte += plane + (-(-size // 8) if width == 3 else 0)
            slot += len(dims)
        first += size
    return KeyLayout(
        tuple(constants),
        tuple(assemblies),
        torch.from_numpy(np.concatenate(slots).astype(np.int64)).to(device),
        _tables(kept, device),
        tuple(band[3] for band in kept),
        tuple(band[4] for band in kept),
        next(_serials),
    )


def _assembly(width: int, steps: tuple[int, ...], quad: bool, form: int) -> str:
    """`decode_triton.assembly`, and the PTX of other forms; all with some words of the table in registers."""
    if form not in (WORDS, HALVES):
        return assembly(width, steps, quad, _register)
    words = [_word(steps, start) for start in range(0, len(steps), 4)]
    table = [f"{word:#x}" if place % 2 else _register(word) for place, word in enumerate(words)]
    return _words_3(*table) if form == WORDS else _halves_4(*table)


def _halves_4(*words: str) -> str:
    """Nibbles of $4 looked up in the lower half of the table, $0 and $1, and in the upper, $2 and $3: 0 in the other.

    A nibble's top bit makes prmt give 0, as the tables hold bytes below 128. The products with the two halves are
    added by the tensor cores.
    """
    lines = ["xor.b32 b, $4, 0x88888888;", f"prmt.b32 $0, {words[0]}, {words[1]}, $4;", "shr.u32 a, $4, 16;"]
    lines += [f"prmt.b32 $2, {words[2]}, {words[3]}, b;", "shr.u32 b, b, 16;"]
    lines += [f"prmt.b32 $1, {words[0]}, {words[1]}, a;", f"prmt.b32 $3, {words[2]}, {words[3]}, b;"]
    return "\n".join(["{ .reg .b32 a, b;", *lines, "}"])


def _word_dims(columns: int, inner: bool) -> npt.NDArray[np.int64]:
    """Which coordinate each entry of the four parts of `_decode_words` is: (4, columns) int64.

    Eight bytes of the 2-bit plane and four of the 1-bit plane are eight groups of four coordinates; their even bytes
    go to one column of words, their odd ones to another, next to it (`inner`) or half a step away.
    """
    column, part = np.arange(columns)[None, :], np.arange(4)[:, None]
    half = columns // 2
    odd, four = (column // 4 % 2, column // 8) if inner else (column // half, column % half // 4)
    place = column % 4
    return 8 * (4 * four + 2 * (part % 2) + place // 2) + 4 * odd + 2 * (place % 2) + part // 2


def _words_3(low: str, high: str) -> str:
    """Nibbles of two bits from $4 and $5 and a high one from $6, looked up in two words; $7: whether of odd bytes."""
    lines = ["setp.ne.b32 p, $7, 0;", "selp.b32 a, 0x7531, 0x6420, p;", "prmt.b32 a, $4, $5, a;"]
    for part, even, odd in ((0, 2, 0), (2, 1, 31)):
        lines += [f"selp.b32 b, {odd}, {even}, p;", "shf.l.wrap.b32 b, $6, $6, b;", f"shr.u32 c, a, {part};"]
        lines += ["and.b32 c, c, 0x33333333;", "lop3.b32 c, b, 0x44444444, c, 0xea;"]
        lines += [f"prmt.b32 ${part}, {low}, {high}, c;", "shr.u32 c, c, 16;"]
        lines += [f"prmt.b32 ${part + 1}, {low}, {high}, c;"]
    return "\n".join(["{ .reg .b32 a, b, c;", ".reg .pred p;", *lines, "}"])


def _words(width: int, steps: tuple[int, ...]) -> tuple[int, ...]:
    """The words of a table that are kept in registers: as constants they would be moved to one at each use."""
    return tuple(_word(steps, start) for start in range(0, len(steps), 8)) if width in (2, 3, 4) else ()


def _word(steps: tuple[int, ...], start: int) -> int:
    return int.from_bytes(bytes(steps[start : start + 4]), "little")


def _register(word: int) -> str:
    return f"table_{word:08x}"


def registers(*sides: tuple[BandKey, ...]) -> str:
    """PTX that declares the registers of all bands' tables and fills them.

    They are read from memory, $1 for the first side and so on, odd threads from a copy of the table: what the compiler
    knows to be constant, or the same for all threads, it keeps elsewhere and moves at each use.
    """
    lines: dict[int, str] = {}
    for side, bands in enumerate(sides, 1):
        for place, (_, width, steps, _, _) in enumerate(band for band in bands if band[1]):
            for index, word in enumerate(_words(width, steps)):
                name, at = _register(word), f"table_at_{side}+{256 * place + 8 * index}"
                lines.setdefault(word, f".reg .b32 {name};\nld.global.b32 {name}, [{at}];")
    if not lines:
        return ""
    first = [".reg .b64 table_copy;", "mov.u32 $0, %tid.x;", "and.b32 $0, $0, 1;"]
    first += ["cvt.u64.u32 table_copy, $0;", f"shl.b64 table_copy, table_copy, {COPY.bit_length() - 1};"]
    for side in range(1, len(sides) + 1):
        first += [f".reg .b64 table_at_{side};", f"add.s64 table_at_{side}, table_copy, ${side};"]
    return "\n".join([*first, *lines.values()])


def _token_of_bits(dims: npt.NDArray[np.int64], block: int) -> list[int]:
    """For each bit of a place among the parts side by side, low first, the bit of the token."""
    flat = dims.ravel()
    return [int(flat[1 << bit]).bit_length() - 1 for bit in range(block.bit_length() - 1)]


@lru_cache(maxsize=64)
def value_layout(bands: tuple[BandKey, ...], block: int, assembled: bool, device: torch.device) -> ValueLayout:
    """The layout of values' bands in blocks of so many tokens (a power of two)."""
    log = block.bit_length() - 1
    kept = [band for band in bands if band[1]]
    rows: list[int] = []  # for each bit of a score's row, low first, the bit of the token
    constants, orders, assemblies = [], [], []
    first, byte = 0, 0
    for size, width, steps, _, _ in bands:
        if width:
            nbytes = sum(-(-block * plane // 8) for plane in planes_of(width))
            plane = block * (2 if width == 3 else width) // 8
            columns, form = block // COLUMN_DIMS[width], 1
            quad = assembled and columns % 4 == 0 and _aligned(width, plane)
            dims = slot_dims(width, columns, quad)
            if width == 4 and quad:
                form = HALVES
            if width == 3 and quad and columns >= DEPTH // 2:
                form, columns = WORDS, 2 * columns
                dims = _word_dims(columns, True)
            bits = _token_of_bits(dims, block)
            if not rows:
                rows = _rows_for(bits, log)
            # Axes of a reshape to twos count from the highest bit.
            orders.append((*(log - 1 - rows.index(token) for token in reversed(bits)), log))
            constants.append((width, columns, byte, nbytes, plane, first, size, form))
            assemblies.append(_assembly(width, steps, quad, form) if assembled else "")
            byte += size * nbytes
        first += size
    tokens = np.zeros(block, np.int32)
    for bit, token in enumerate(rows):
        tokens |= ((np.arange(block) >> bit & 1) << token).astype(np.int32)
    return ValueLayout(
        tuple(constants),
        tuple(orders),
        tuple(assemblies),
        _tables(kept, device),
        tuple(band[3] for band in kept),
        tuple(band[4] for band in kept),
        torch.from_numpy(tokens).to(device),
        tuple(log - 1 - token for token in reversed(rows)),
        next(_serials),
    )


def _rows_for(bits: list[int], log: int) -> list[int]:
    """The bit of the token for each bit of a score's row: the lowest places on the bits that one thread holds."""
    held = [bit for bit in (3, *range(6, log)) if bit < log][:2]
    rows = [0] * log
    order = held + [bit for bit in range(log) if bit not in held]
    for bit, token in zip(order, bits, strict=True):
        rows[bit] = token
    return rows
