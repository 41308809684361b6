"""Matrix products with packed keys and values: the two halves of the attention kernel's work on a block of tokens.

Both multiply a decoded tile, straight from registers, with the two int8 digits of 15-bit integers, hi * 128 + lo, whose
columns lie in turn. `attention_layout` says how tiles are cut.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tqsearch.kernels.decode_triton import decode
from tqsearch.kernels.scan_kernels_triton import columns_of


@triton.jit
def _decode_bytes(
    base, table_ptr, PLANE: tl.constexpr, START: tl.constexpr, STEP: tl.constexpr, ASSEMBLY: tl.constexpr
):
    """3 bits by bytes of the 2-bit plane: four parts of (rows, STEP), where `decode` makes eight half as wide.

    base: (rows, 1) pointers to the band's rows. Each byte of the 1-bit plane goes with two of the 2-bit plane.
    """
    columns = START + tl.arange(0, STEP)
    x = tl.load(base + columns[None, :])
    y = tl.load(base + PLANE + START // 2 + tl.arange(0, STEP // 2)[None, :])
    y = tl.broadcast_to(y[:, :, None], (y.shape[0], STEP // 2, 2))
    y = tl.reshape(y, (y.shape[0], STEP))
    if ASSEMBLY != "":
        return tl.inline_asm_elementwise(
            ASSEMBLY, "=r,=r,=r,=r,r,r", [x, y], (tl.int8, tl.int8, tl.int8, tl.int8), True, 4
        )
    else:
        c = x.to(tl.int32)
        b = (y.to(tl.int32) >> (2 * (columns % 2))[None, :]) << 2
        return (
            tl.load(table_ptr + ((c & 3) | (b & 4))),
            tl.load(table_ptr + (((c >> 2) & 3) | ((b >> 1) & 4))),
            tl.load(table_ptr + (((c >> 4) & 3) | ((b >> 4) & 4))),
            tl.load(table_ptr + ((c >> 6) | ((b >> 5) & 4))),
        )


@triton.jit
def _side_by_side(parts, COLUMNS: tl.constexpr):
    """Parts (rows, columns) in groups of depth 32 or more: neighbours concatenated along the columns."""
    if COLUMNS >= 32 or len(parts) == 1:
        return parts
    else:
        rows: tl.constexpr = parts[0].shape[0]
        wide = ()
        for i in tl.static_range(len(parts) // 2):
            pair = tl.permute(tl.join(parts[2 * i], parts[2 * i + 1]), (0, 2, 1))
            wide += (tl.reshape(pair, (rows, 2 * COLUMNS)),)
        return _side_by_side(wide, 2 * COLUMNS)


@triton.jit
def digits_joined(value):
    """Integers hi * 128 + lo of (n, 2 r) products whose columns are hi and lo in turn: (n, r) float32."""
    hi, lo = tl.split(tl.reshape(value, (value.shape[0], value.shape[1] // 2, 2)))
    return (hi * 128 + lo).to(tl.float32)


@triton.jit
def _split_groups(value, GROUPS: tl.constexpr):
    """(depth, columns, groups) to a tuple of (depth, columns); the group's low bit is taken by the first split."""
    if GROUPS == 1:
        # Triton 3.6 fails to compile a matrix product of a reshaped operand; the casts keep the two apart.
        return (tl.reshape(value.to(tl.int16), (value.shape[0], value.shape[1])).to(tl.int8),)
    elif GROUPS == 2:
        return tl.split(value)
    else:
        even, odd = tl.split(tl.reshape(value, (value.shape[0], value.shape[1], GROUPS // 2, 2)))
        evens = _split_groups(even, GROUPS // 2)
        odds = _split_groups(odd, GROUPS // 2)
        out = ()
        for i in tl.static_range(GROUPS // 2):
            out += (evens[i], odds[i])
        return out


@triton.jit
def _key_groups(
    codes_ptr,
    tokens,
    table_ptr,
    ROW: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    BYTE: tl.constexpr,
    PLANE: tl.constexpr,
    FORM: tl.constexpr,
    START: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """A step's groups of decoded coordinates, each (tokens, depth)."""
    if FORM == 2:
        return _decode_bytes(codes_ptr + BYTE + tokens[:, None] * ROW, table_ptr, PLANE, START, STEP, ASSEMBLY)
    else:
        columns = START + tl.arange(0, STEP)
        EVEN_ROWS: tl.constexpr = ROW % 2 == 0 and BYTE % 2 == 0
        valid = (columns < COLUMNS)[None, :]
        x, y = columns_of(codes_ptr, tokens, ROW, columns, valid, WIDTH, BYTE, PLANE, FORM == 1, EVEN_ROWS)
        return _side_by_side(decode(x, y, table_ptr, WIDTH, ASSEMBLY), STEP)


@triton.jit
def _value_groups(
    codes_ptr,
    rows,
    table_ptr,
    ROW: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BYTE: tl.constexpr,
    PLANE: tl.constexpr,
    FORM: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """A block's groups of decoded values, each (coordinates, depth)."""
    if FORM == 2:
        return _decode_bytes(codes_ptr + BYTE + rows[:, None] * ROW, table_ptr, PLANE, 0, COLUMNS, ASSEMBLY)
    else:
        columns = tl.arange(0, COLUMNS)
        x, y = columns_of(codes_ptr, rows, ROW, columns, (columns < COLUMNS)[None, :], WIDTH, BYTE, PLANE, True, True)
        return _side_by_side(decode(x, y, table_ptr, WIDTH, ASSEMBLY), COLUMNS)


@triton.jit
def key_products(
    codes_ptr,  # of the block's first row
    tokens,  # (BLOCK,) int32
    queries_ptr,  # (COLUMNS_N, SLOTS) int8
    table_ptr,
    ROW: tl.constexpr,
    SLOTS: tl.constexpr,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    BYTE: tl.constexpr,
    PLANE: tl.constexpr,
    SLOT: tl.constexpr,
    FORM: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One band's products with the queries' digits: (BLOCK, N) int32."""
    FIELDS: tl.constexpr = 4 if FORM == 2 else (8 if WIDTH == 3 else 8 // WIDTH)
    acc = tl.zeros((BLOCK, N), tl.int32)
    for start in tl.static_range(0, COLUMNS, STEP):
        groups = _key_groups(
            codes_ptr, tokens, table_ptr, ROW, WIDTH, COLUMNS, STEP, BYTE, PLANE, FORM, start, ASSEMBLY
        )
        for g in tl.static_range(len(groups)):
            slots = SLOT + start * FIELDS + g * groups[g].shape[1] + tl.arange(0, groups[g].shape[1])
            digits = tl.load(queries_ptr + tl.arange(0, N)[:, None] * SLOTS + slots[None, :])
            acc = tl.dot(groups[g], tl.trans(digits), acc, out_dtype=tl.int32)
    return acc


@triton.jit
def value_products(
    codes_ptr,  # of the block
    weights,  # int8: twos, their bits in the order of depth, columns N, group
    table_ptr,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BYTE: tl.constexpr,
    ROW: tl.constexpr,
    PLANE: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    FORM: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One band's products with the weights' digits: (ROWS, N) int32, of which SIZE rows count."""
    rows = tl.arange(0, ROWS)
    if ROWS != SIZE:
        rows = tl.minimum(rows, SIZE - 1)
    groups = _value_groups(codes_ptr, rows, table_ptr, ROW, WIDTH, COLUMNS, BYTE, PLANE, FORM, ASSEMBLY)
    DEPTH: tl.constexpr = groups[0].shape[1]
    split = _split_groups(tl.reshape(weights, (DEPTH, N, BLOCK // DEPTH)), BLOCK // DEPTH)
    acc = tl.zeros((ROWS, N), tl.int32)
    for g in tl.static_range(len(groups)):
        acc = tl.dot(groups[g], split[g], acc, out_dtype=tl.int32)
    return acc
