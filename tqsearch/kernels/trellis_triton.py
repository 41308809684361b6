"""Trellis codes to small integers in registers: `decode_triton` for the bit planes of `trellis.pack`.

A band is read in columns: a column is a byte of each of its planes, eight coordinates. A tile of columns decodes to
eight tiles of the same shape, its *parts*; each entry is the integer of a coordinate's level, an int8:

    level = (entry - offset) step,   with `offset(bits)` and the codebook's step.

There are two bodies. The portable one takes, beside the path's bytes, those one column before, and deals coordinate p
of a column to that column of part p. The one for NVIDIA GPUs works on words of four neighbouring columns, 32
coordinates: a word of parities is an exclusive or of words shifted into it from the word before, four columns before;
four bits from four planes side by side select from a table of 16 bytes by two byte permutes. It permutes coordinates
among its four columns, for which the query is arranged in turn (`slot_dims`), and is right only where a thread holds
four neighbouring columns side by side. At the row's first column, or four, what is before is zero.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import triton
import triton.language as tl

from tqsearch.trellis import trellis_codebook

PARTS = 8
_EACH = 0x11111111  # the low bit of each nibble
_CHOOSE = "0xE4"  # of a and b by the bits of c: a where set
_PARITY = "0x96"  # a ^ b ^ c


def offset(bits: int) -> float:
    """What is taken off an entry: 63.5 where entries are 0 to 127; -1/2 at 4 bits, where they are -128 to 127."""
    return 63.5 if bits < 4 else -0.5


def steps(bits: int) -> tuple[int, ...]:
    """The entries by number of level, ascending."""
    return tuple(integer + int(offset(bits) + 0.5) for integer in trellis_codebook(bits).integers)


def masks(bits: int) -> int:
    """The taps as masks of the sixteen bits (byte, byte before), of coordinate 0: bit 8 is its own path bit.

    The mask of parity i begins at bit 16 i of the number.
    """
    return sum(1 << (16 * i + 8 - back) for i, backs in enumerate(trellis_codebook(bits).taps) for back in backs)


def slot_dims(columns: int, quad: bool) -> npt.NDArray[np.int64]:
    """Which coordinate of the band each entry of the parts is: (8, columns) int64; `quad` for the assembly."""
    part, column = np.arange(PARTS)[:, None], np.arange(columns)[None, :]
    if quad:
        return 32 * (column // 4) + 16 * (part % 2) + 4 * (column % 4) + part // 2
    return 8 * column + part


def assembly(bits: int) -> str:
    """The PTX: $0 to $7 are the parts, $8 the path, $9 the path four columns before, $10 ... the planes of f."""
    lines, planes = _parity_words(bits)
    table, flip = list(steps(bits)), ""
    if len(planes) == 5:  # 32 levels: the upper plane complements the number and, by symmetry, the entry
        flip = planes.pop()
        lines += [f"xor.b32 g{i}, {plane}, {flip};" for i, plane in enumerate(planes)]
        planes = [f"g{i}" for i in range(4)]
        table = [~entry for entry in table[:16]]
    words = [f"{int.from_bytes(bytes(table[i : i + 4]), 'little'):#x}" for i in range(0, len(table), 4)]
    for place in range(4):  # the coordinates at this place of each nibble of the words
        lines += _nibbles(planes, place)
        if len(planes) == 4:
            lines.append(
                f"xor.b32 e, d, {8 * _EACH:#x};"
            )  # a nibble's top bit makes prmt give 0: entries are below 128
        if flip:
            lines += [f"shr.u32 m, {flip}, {place};", f"and.b32 m, m, {_EACH:#x};"]
        for half in range(2):
            if half:
                used = ["d", *["e"] * (len(planes) == 4), *["m"] * bool(flip)]
                lines += [f"shr.u32 {name}, {name}, 16;" for name in used]
            if len(planes) < 4:
                lines.append(f"prmt.b32 ${2 * place + half}, {words[0]}, {words[1]}, d;")
                continue
            lines += [f"prmt.b32 a, {words[0]}, {words[1]}, d;", f"prmt.b32 b, {words[2]}, {words[3]}, e;"]
            if flip:
                lines += ["or.b32 a, a, b;", "prmt.b32 b, 0xff, 0, m;", f"xor.b32 ${2 * place + half}, a, b;"]
            else:
                lines.append(f"or.b32 ${2 * place + half}, a, b;")
    registers = ", ".join(["a", "b", "d", "e", "m", *(f"{kind}{i}" for kind in "gtz" for i in range(9))])
    return "\n".join([f"{{ .reg .b32 {registers};", *lines, "}"])


def _parity_words(bits: int) -> tuple[list[str], list[str]]:
    """The lines that make words of parities, and the planes of the number's bits, lowest first."""
    taps = trellis_codebook(bits).taps
    lines = [f"shf.l.wrap.b32 t{back}, $9, $8, {back};" for back in sorted({b for backs in taps for b in backs} - {0})]
    for i, backs in enumerate(taps):
        first, *rest = [f"t{back}" if back else "$8" for back in backs]
        while rest:  # the numbers of taps are odd
            lines.append(f"lop3.b32 z{i}, {first}, {rest[0]}, {rest[1]}, {_PARITY};")
            first, rest = f"z{i}", rest[2:]
    return lines, [f"z{i}" for i in range(len(taps))] + [f"${10 + i}" for i in range(bits - 1)]


def _nibbles(planes: list[str], place: int) -> list[str]:
    """The lines that put a bit of each plane side by side into the nibbles of d."""
    lines = []
    for i, plane in enumerate(planes):
        shift = f"shl.b32 a, {plane}, {i - place};" if i >= place else f"shr.u32 a, {plane}, {place - i};"
        lines.append(shift)
        lower = _EACH * ((1 << i) - 1)  # the bits that are there already
        lines.append(f"lop3.b32 d, d, a, {lower:#x}, {_CHOOSE};" if i else "mov.b32 d, a;")
    if len(planes) < 4:
        lines.append(f"and.b32 d, d, {_EACH * ((1 << len(planes)) - 1):#x};")
    return lines


@triton.jit
def decoded(
    base,  # (rows, 1) pointers to the rows' codes
    columns,  # (columns,)
    valid,  # (1, columns)
    table_ptr,
    TAPS: tl.constexpr,
    BITS: tl.constexpr,
    COLUMNS: tl.constexpr,  # of the band
    FIRST: tl.constexpr,  # where its path begins in a row
    PLANE: tl.constexpr,  # where its planes of f do
    ASSEMBLY: tl.constexpr,
    EVEN: tl.constexpr,  # all columns are valid
):
    """The parts of a tile of columns of a band, from rows of `trellis.pack`."""
    BACK: tl.constexpr = 1 if ASSEMBLY == "" else 4
    at = base + columns[None, :]
    inside = (columns >= BACK - FIRST)[None, :]
    if EVEN:
        path = tl.load(at + FIRST)
        before = tl.load(at + FIRST - BACK, mask=inside, other=0)
    else:
        path = tl.load(at + FIRST, mask=valid, other=0)
        before = tl.load(at + FIRST - BACK, mask=inside & valid, other=0)
    f1 = path
    f2 = path
    f3 = path
    if BITS >= 2:
        f1 = tl.load(at + PLANE) if EVEN else tl.load(at + PLANE, mask=valid, other=0)
    if BITS >= 3:
        f2 = tl.load(at + PLANE + COLUMNS) if EVEN else tl.load(at + PLANE + COLUMNS, mask=valid, other=0)
    if BITS >= 4:
        f3 = tl.load(at + PLANE + 2 * COLUMNS) if EVEN else tl.load(at + PLANE + 2 * COLUMNS, mask=valid, other=0)
    return decode(path, before, f1, f2, f3, table_ptr, TAPS, BITS, ASSEMBLY)


@triton.jit
def _part(path, f1, f2, f3, table_ptr, TAPS: tl.constexpr, BITS: tl.constexpr, PLACE: tl.constexpr):
    """The entries of coordinate PLACE of each column; `path` holds the column's byte above that before it."""
    COUNT: tl.constexpr = 2 if TAPS < 4294967296 else 3
    number = tl.zeros_like(path)
    for i in tl.static_range(COUNT):
        parity = (path >> PLACE) & ((TAPS >> (16 * i)) & 0xFFFF)
        parity ^= parity >> 8
        parity ^= parity >> 4
        parity ^= parity >> 2
        parity ^= parity >> 1
        number |= (parity & 1) << i
    if BITS >= 2:
        number |= ((f1.to(tl.int32) >> PLACE) & 1) << COUNT
    if BITS >= 3:
        number |= ((f2.to(tl.int32) >> PLACE) & 1) << (COUNT + 1)
    if BITS >= 4:
        number |= ((f3.to(tl.int32) >> PLACE) & 1) << (COUNT + 2)
    return tl.load(table_ptr + number)


@triton.jit
def decode(path, before, f1, f2, f3, table_ptr, TAPS: tl.constexpr, BITS: tl.constexpr, ASSEMBLY: tl.constexpr):
    """The parts of a tile of columns.

    path, f1, f2, f3: the planes' bytes, uint8; those of f that the width does not have may be anything.
    before: the path's bytes four columns before with assembly, one column before without; zero before the row.
    table_ptr: `steps` as int8; the portable body reads it.
    TAPS: `masks`.
    """
    # fmt: off
    if ASSEMBLY == "":
        w = (path.to(tl.int32) << 8) | before.to(tl.int32)
        return (_part(w, f1, f2, f3, table_ptr, TAPS, BITS, 0),
                _part(w, f1, f2, f3, table_ptr, TAPS, BITS, 1),
                _part(w, f1, f2, f3, table_ptr, TAPS, BITS, 2),
                _part(w, f1, f2, f3, table_ptr, TAPS, BITS, 3),
                _part(w, f1, f2, f3, table_ptr, TAPS, BITS, 4),
                _part(w, f1, f2, f3, table_ptr, TAPS, BITS, 5),
                _part(w, f1, f2, f3, table_ptr, TAPS, BITS, 6),
                _part(w, f1, f2, f3, table_ptr, TAPS, BITS, 7))
    elif BITS == 1:
        return tl.inline_asm_elementwise(ASSEMBLY, "=r,=r,=r,=r,=r,=r,=r,=r,r,r", [path, before],
            (tl.int8, tl.int8, tl.int8, tl.int8, tl.int8, tl.int8, tl.int8, tl.int8), True, 4)
    elif BITS == 2:
        return tl.inline_asm_elementwise(ASSEMBLY, "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r", [path, before, f1],
            (tl.int8, tl.int8, tl.int8, tl.int8, tl.int8, tl.int8, tl.int8, tl.int8), True, 4)
    elif BITS == 3:
        return tl.inline_asm_elementwise(ASSEMBLY, "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r", [path, before, f1, f2],
            (tl.int8, tl.int8, tl.int8, tl.int8, tl.int8, tl.int8, tl.int8, tl.int8), True, 4)
    else:
        return tl.inline_asm_elementwise(ASSEMBLY, "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r,r", [path, before, f1, f2, f3],
            (tl.int8, tl.int8, tl.int8, tl.int8, tl.int8, tl.int8, tl.int8, tl.int8), True, 4)
    # fmt: on
