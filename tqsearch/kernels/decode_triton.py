"""Packed codes to small integers in registers: the one piece that every Triton kernel over codes shares.

A band is read in columns. A column is a byte of the plane, except at 3 and 6 bits, where it is a group of coordinates:
at 3 bits eight, two bytes of the 2-bit plane and one of the 1-bit plane; at 6 bits four, two bytes of the 4-bit plane
and one of the 2-bit plane. A tile of columns decodes to several tiles of the same shape, its *parts*: 8 / p of them for
one plane of p-bit fields, 8 for 3 bits, 4 for 6. Each entry of a part is the number of a coordinate's level,
`BandTable.steps`, an int8.

There are three bodies. The portable one shifts, masks and looks up in a table. The two for NVIDIA GPUs decode four
columns at once in 32-bit registers with the byte permute `prmt`, a look-up of four nibbles in a table of eight bytes.
"single" deals each column's coordinates to that column of the parts, as the portable body does, at about two
instructions a coordinate. "quad" permutes the coordinates of four neighbouring columns, for which the query is arranged
in turn (`slot_dims`), and so needs one instruction a coordinate at 4 bits and a half at 2 and 1. It is right only where
a thread holds four neighbouring columns side by side: where rows are aligned to 16 bytes, and loads are whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import triton
import triton.language as tl

from tqsearch.packing import FIELD_ORDER

WIDTHS = (1, 2, 3, 4, 6, 8)
PARTS = {1: 8, 2: 4, 3: 8, 4: 2, 6: 4, 8: 1}
COLUMN_DIMS = {1: 8, 2: 4, 3: 8, 4: 2, 6: 4, 8: 1}
EVEN = {6: tuple(range(64)), 8: tuple(range(-128, 128))}  # the numbers of levels of equal distance


def slot_dims(width: int, columns: int, quad: bool) -> npt.NDArray[np.int64]:
    """Which coordinate of the band each entry of the parts is: (parts, columns) int64."""
    parts, per_column = PARTS[width], COLUMN_DIMS[width]
    column = np.arange(columns)
    if quad and width in (2, 3, 4):
        four, place = column // 4, column % 4
        if width == 4:
            return np.stack([8 * four + 4 * part + place for part in range(2)])
        if width == 2:  # parts: even crumbs of the low half word, of the high one, odd crumbs likewise
            return np.stack([16 * four + 8 * (part % 2) + 2 * place + part // 2 for part in range(4)])
        # 3 bits: part = 4 (byte of the group) + 2 (crumb of the nibble) + half word
        return np.stack(
            [
                8 * (4 * four + 2 * (part % 2) + place // 2) + 4 * (part // 4) + 2 * (place % 2) + part // 2 % 2
                for part in range(8)
            ]
        )
    order = FIELD_ORDER[1] if width == 1 else tuple(range(parts))
    return np.stack([per_column * column + order[part] for part in range(parts)])


def assembly(width: int, steps: Sequence[int], quad: bool, register: Callable[[int], str] | None = None) -> str:
    """The PTX that decodes four columns of a width; "" for 6 and 8 bits where numbers are not the code, less 128 at 8.

    The table's words are constants, but every other one from the first on is the register that `register` names.
    """
    words = [int.from_bytes(bytes(steps[i : i + 4]), "little") for i in range(0, len(steps), 4) if width in (2, 3, 4)]
    table = [f"{word:#x}" if register is None or i % 2 else register(word) for i, word in enumerate(words)]
    if width == 1 and steps[1] == -128:  # shifts to the left run beside the masks, on another unit
        lines = ["and.b32 $7, $8, 0x80808080;"]
        for part in range(7):
            lines += [f"shl.b32 a, $8, {7 - part};", f"and.b32 ${part}, a, 0x80808080;"]
    elif width == 1:  # 0 or a power of two: the code's bit in its place
        place, mask = steps[1].bit_length() - 1, f"{0x01010101 * steps[1]:#x}"
        lines = []
        for part in range(8):
            shift = f"shl.b32 a, $8, {place - part};" if part <= place else f"shr.u32 a, $8, {part - place};"
            lines += [shift, f"and.b32 ${part}, a, {mask};"]
    elif width in (6, 8):
        if tuple(steps) != EVEN[width]:
            return ""
        lines = _single_6() if width == 6 else ["xor.b32 $0, $1, 0x80808080;"]
    elif quad:
        lines = {2: _quad_2, 3: _quad_3, 4: _quad_4}[width](table)
    else:
        lines = {2: _single_2, 3: _single_3, 4: _single_4}[width](table)
    return "\n".join(["{ .reg .b32 a, b, c, d;", *lines, "}"])


def _quad_4(table: list[str]) -> list[str]:
    return [
        "xor.b32 c, $2, 0x88888888;",  # a nibble's top bit makes prmt give 0: the tables hold bytes below 128
        f"prmt.b32 a, {table[0]}, {table[1]}, $2;",
        f"prmt.b32 b, {table[2]}, {table[3]}, c;",
        "shr.u32 d, $2, 16;",
        "shr.u32 c, c, 16;",
        "or.b32 $0, a, b;",
        f"prmt.b32 a, {table[0]}, {table[1]}, d;",
        f"prmt.b32 b, {table[2]}, {table[3]}, c;",
        "or.b32 $1, a, b;",
    ]


def _quad_2(table: list[str]) -> list[str]:
    return [
        f"mov.b32 c, {table[0]};",
        "and.b32 a, $4, 0x33333333;",
        "shr.u32 b, $4, 2;",
        "and.b32 b, b, 0x33333333;",
        "prmt.b32 $0, c, c, a;",
        "shr.u32 a, a, 16;",
        "prmt.b32 $2, c, c, b;",
        "shr.u32 b, b, 16;",
        "prmt.b32 $1, c, c, a;",
        "prmt.b32 $3, c, c, b;",
    ]


def _quad_3(table: list[str]) -> list[str]:
    lines = ["prmt.b32 a, $8, $9, 0x6420;", "prmt.b32 b, $8, $9, 0x7531;"]  # the groups' first bytes, and their second
    for part in range(0, 8, 2):
        byte, field = part // 4, part // 2 % 2
        shift = 2 - (2 * byte + field)
        lines += [
            f"shr.u32 c, {'b' if byte else 'a'}, {2 * field};",
            f"{'shl.b32' if shift >= 0 else 'shr.u32'} d, $10, {abs(shift)};",
            "and.b32 c, c, 0x33333333;",
            "and.b32 d, d, 0x44444444;",
            "or.b32 c, c, d;",
            f"prmt.b32 ${part}, {table[0]}, {table[1]}, c;",
            "shr.u32 c, c, 16;",
            f"prmt.b32 ${part + 1}, {table[0]}, {table[1]}, c;",
        ]
    return lines


# The codes of four columns, one a byte of a, to the four nibbles of its low half.
_NIBBLES = ["shr.u32 b, a, 4;", "or.b32 a, a, b;", "prmt.b32 a, a, a, 0x0020;"]


def _single_4(table: list[str]) -> list[str]:
    lines = []
    for part in range(2):
        lines += [
            f"shr.u32 a, $2, {4 * part};",
            "and.b32 a, a, 0x0f0f0f0f;",
            *_NIBBLES,
            "xor.b32 b, a, 0x8888;",
            f"prmt.b32 c, {table[0]}, {table[1]}, a;",
            f"prmt.b32 d, {table[2]}, {table[3]}, b;",
            f"or.b32 ${part}, c, d;",
        ]
    return lines


def _single_2(table: list[str]) -> list[str]:
    lines = []
    for part in range(4):
        lines += [f"shr.u32 a, $4, {2 * part};", "and.b32 a, a, 0x03030303;", *_NIBBLES]
        lines += [f"prmt.b32 ${part}, {table[0]}, {table[0]}, a;"]
    return lines


def _single_3(table: list[str]) -> list[str]:
    lines = []
    for part in range(8):
        lines += [
            f"prmt.b32 a, $8, $9, {'0x7531' if part // 4 else '0x6420'};",
            f"shr.u32 a, a, {2 * (part % 4)};",
            "and.b32 a, a, 0x03030303;",
            f"shr.u32 b, $10, {FIELD_ORDER[1].index(part)};",
            "and.b32 b, b, 0x01010101;",
            "shl.b32 b, b, 2;",
            "or.b32 a, a, b;",
            *_NIBBLES,
            f"prmt.b32 ${part}, {table[0]}, {table[1]}, a;",
        ]
    return lines


def _single_6() -> list[str]:
    lines = []
    for part in range(4):
        lines.append("shr.u32 a, a, 4;" if part % 2 else f"prmt.b32 a, $4, $5, {'0x7531' if part else '0x6420'};")
        shift = 4 - 2 * part
        lines += [
            f"{'shl.b32' if shift >= 0 else 'shr.u32'} b, $6, {abs(shift)};",
            "and.b32 b, b, 0x30303030;",
            "and.b32 c, a, 0x0f0f0f0f;",
            f"or.b32 ${part}, b, c;",
        ]
    return lines


@triton.jit
def decode(x, y, table_ptr, WIDTH: tl.constexpr, ASSEMBLY: tl.constexpr):
    """The parts of a tile of columns.

    x: the plane's bytes, uint8; at 3 and 6 bits the groups' two bytes of the wider plane, uint16.
    y: at 3 and 6 bits the groups' bytes of the narrower plane, uint8; else anything.
    table_ptr: the levels by code, of the type of the parts; the portable body, 6 and 8 bits read it.
    """
    # fmt: off
    if WIDTH == 8:
        if ASSEMBLY != "":
            return (tl.inline_asm_elementwise(ASSEMBLY, "=r,r", [x], tl.int8, True, 4),)
        else:
            return (tl.load(table_ptr + x.to(tl.int32)),)
    elif WIDTH == 6 and ASSEMBLY != "":
        return tl.inline_asm_elementwise(
            ASSEMBLY, "=r,=r,=r,=r,r,r,r", [x, y], (tl.int8, tl.int8, tl.int8, tl.int8), True, 4)
    elif WIDTH == 6:
        c = x.to(tl.int32)
        b = y.to(tl.int32)
        return (tl.load(table_ptr + ((c & 15) | ((b & 3) << 4))),
                tl.load(table_ptr + (((c >> 4) & 15) | (((b >> 2) & 3) << 4))),
                tl.load(table_ptr + (((c >> 8) & 15) | (((b >> 4) & 3) << 4))),
                tl.load(table_ptr + ((c >> 12) | ((b >> 6) << 4))))
    elif WIDTH == 4:
        if ASSEMBLY != "":
            return tl.inline_asm_elementwise(ASSEMBLY, "=r,=r,r", [x], (tl.int8, tl.int8), True, 4)
        else:
            c = x.to(tl.int32)
            return (tl.load(table_ptr + (c & 15)), tl.load(table_ptr + (c >> 4)))
    elif WIDTH == 2:
        if ASSEMBLY != "":
            return tl.inline_asm_elementwise(
                ASSEMBLY, "=r,=r,=r,=r,r", [x], (tl.int8, tl.int8, tl.int8, tl.int8), True, 4)
        else:
            c = x.to(tl.int32)
            return (tl.load(table_ptr + (c & 3)), tl.load(table_ptr + ((c >> 2) & 3)),
                    tl.load(table_ptr + ((c >> 4) & 3)), tl.load(table_ptr + (c >> 6)))
    elif WIDTH == 1:
        if ASSEMBLY != "":
            return tl.inline_asm_elementwise(
                ASSEMBLY, "=r,=r,=r,=r,=r,=r,=r,=r,r", [x],
                (tl.int8, tl.int8, tl.int8, tl.int8, tl.int8, tl.int8, tl.int8, tl.int8), True, 4)
        else:
            c = x.to(tl.int32)
            return (tl.load(table_ptr + (c & 1)), tl.load(table_ptr + ((c >> 1) & 1)),
                    tl.load(table_ptr + ((c >> 2) & 1)), tl.load(table_ptr + ((c >> 3) & 1)),
                    tl.load(table_ptr + ((c >> 4) & 1)), tl.load(table_ptr + ((c >> 5) & 1)),
                    tl.load(table_ptr + ((c >> 6) & 1)), tl.load(table_ptr + (c >> 7)))
    else:
        tl.static_assert(WIDTH == 3)
        if ASSEMBLY != "":
            return tl.inline_asm_elementwise(
                ASSEMBLY, "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r", [x, y],
                (tl.int8, tl.int8, tl.int8, tl.int8, tl.int8, tl.int8, tl.int8, tl.int8), True, 4)
        else:
            c = x.to(tl.int32)
            b = y.to(tl.int32)
            return (tl.load(table_ptr + ((c & 3) | ((b & 1) << 2))),
                    tl.load(table_ptr + (((c >> 2) & 3) | (((b >> 1) & 1) << 2))),
                    tl.load(table_ptr + (((c >> 4) & 3) | (((b >> 4) & 1) << 2))),
                    tl.load(table_ptr + (((c >> 6) & 3) | (((b >> 5) & 1) << 2))),
                    tl.load(table_ptr + (((c >> 8) & 3) | (((b >> 2) & 1) << 2))),
                    tl.load(table_ptr + (((c >> 10) & 3) | (((b >> 3) & 1) << 2))),
                    tl.load(table_ptr + (((c >> 12) & 3) | (((b >> 6) & 1) << 2))),
                    tl.load(table_ptr + (((c >> 14) & 3) | (((b >> 7) & 1) << 2))))
    # fmt: on
