"""Matrix products with packed keys and values: the two halves of the attention kernel's work on a block of tokens.

Both multiply a decoded tile, straight from registers, with the two int8 digits of 15-bit integers, hi * 128 + lo, whose
columns lie in turn. `attention_layout` says how tiles are cut.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tqsearch.kernels.attention_layout import ODD as ODD_BYTES
from tqsearch.kernels.decode_triton import decode

ODD = tl.constexpr(ODD_BYTES)


@triton.jit
def float_product(a, b):
    """a b of float32 by three products of the matrix units' short floats: relative rounding near 2^-21 an operand."""
    a_high, b_high = _short(a), _short(b)
    product = tl.dot(a - a_high, b_high, input_precision="tf32")
    product = tl.dot(a_high, b - b_high, product, input_precision="tf32")
    return tl.dot(a_high, b_high, product, input_precision="tf32")


@triton.jit
def _short(x):
    """A float32 cut to the 10 bits that the matrix units multiply."""
    return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def fill_registers(REGISTERS: tl.constexpr, first_ptr, second_ptr):
    """Declares and fills the registers that the assemblies name; see `attention_layout.registers`."""
    if REGISTERS != "":
        addresses = [first_ptr.to(tl.int64), second_ptr.to(tl.int64)]
        tl.inline_asm_elementwise(REGISTERS, "=r,l,l", addresses, tl.int32, False, 1)


@triton.jit
def _decode_words(
    base,
    second,
    table_ptr,
    START: tl.constexpr,
    STEP: tl.constexpr,
    INNER: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """3 bits by words: four parts of (rows, STEP), where `decode` makes eight half as wide.

    base, second: (rows, 1) pointers to the rows of the 2-bit plane and of the 1-bit plane. STEP: bytes of the former.
    INNER: see `attention_layout`.
    All inputs are loads, seen in other shapes: through anything else Triton carries no layout of the tensor cores.
    """
    columns = tl.arange(0, STEP)
    x = tl.load(base + START + columns[None, :])
    y = tl.load(second + START // 2 + tl.arange(0, STEP // 2)[None, :])
    ROWS: tl.constexpr = x.shape[0]
    FOURS: tl.constexpr = STEP // 8
    first, second = tl.split(tl.permute(tl.reshape(x, (ROWS, FOURS, 2, 4)), (0, 1, 3, 2)))
    y = tl.reshape(y, (ROWS, FOURS, 4))
    odd = tl.load(table_ptr + ODD + ((columns // 4 % 2) if INNER else (columns // (STEP // 2))))
    # fmt: off
    return tl.inline_asm_elementwise(
        ASSEMBLY, "=r,=r,=r,=r,r,r,r,r", [_twice(first, INNER), _twice(second, INNER), _twice(y, INNER), odd[None, :]],
        (tl.int8, tl.int8, tl.int8, tl.int8), True, 4)
    # fmt: on


@triton.jit
def _decode_halves(x, ASSEMBLY: tl.constexpr):
    """4 bits: two parts by the lower half of the table, then by the upper; see `attention_layout`."""
    return tl.inline_asm_elementwise(ASSEMBLY, "=r,=r,=r,=r,r", [x], (tl.int8, tl.int8, tl.int8, tl.int8), True, 4)


@triton.jit
def _twice(x, INNER: tl.constexpr):
    """Words (rows, n, 4) to (rows, 8 n): each twice in turn, or all and all again."""
    AXIS: tl.constexpr = 2 if INNER else 1
    SHAPE: tl.constexpr = (x.shape[0], x.shape[1], 2, 4) if INNER else (x.shape[0], 2, x.shape[1], 4)
    return tl.reshape(tl.broadcast_to(tl.expand_dims(x, AXIS), SHAPE), (x.shape[0], 8 * x.shape[1]))


@triton.jit
def _side_by_side(parts, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    """Parts (rows, columns) in groups of that depth or more: neighbours concatenated along the columns."""
    if COLUMNS >= DEPTH or len(parts) == 1:
        return parts
    else:
        rows: tl.constexpr = parts[0].shape[0]
        wide = ()
        for i in tl.static_range(len(parts) // 2):
            pair = tl.permute(tl.join(parts[2 * i], parts[2 * i + 1]), (0, 2, 1))
            wide += (tl.reshape(pair, (rows, 2 * COLUMNS)),)
        return _side_by_side(wide, 2 * COLUMNS, DEPTH)


@triton.jit
def digits_joined(value):
    """Integers hi * 128 + lo of (n, 2 r) products whose columns are hi and lo in turn: (n, r) float32."""
    hi, lo = tl.split(tl.reshape(value, (value.shape[0], value.shape[1] // 2, 2)))
    return (hi * 128 + lo).to(tl.float32)


@triton.jit
def digits_side_by_side(high, low):
    """Digits (tokens, r) to (tokens, 2 r), high and low in turn.

    Bits 3 and 6 of a token's row lie in one thread's registers; they are joined last, so that the digits of four tokens
    become a word.
    """
    BLOCK: tl.constexpr = high.shape[0]
    R: tl.constexpr = high.shape[1]
    if BLOCK < 128:
        return tl.reshape(tl.join(high, low), (BLOCK, 2 * R))
    else:
        a, b, c, d = _four_tokens(high)
        e, f, g, h = _four_tokens(low)
        even = tl.join(tl.join(a, e), tl.join(b, f))
        odd = tl.join(tl.join(c, g), tl.join(d, h))
        wide = tl.permute(tl.join(even, odd), (0, 5, 1, 6, 2, 3, 4))
        return tl.reshape(wide, (BLOCK, 2 * R))


@triton.jit
def _four_tokens(x):
    """The tokens with bits 6 and 3 of their rows 00, 10, 01, 11: (BLOCK / 128, 4, 8, r) each."""
    wide = tl.reshape(x, (x.shape[0] // 128, 2, 4, 2, 8, x.shape[1]))
    low, high = tl.split(tl.permute(wide, (0, 2, 4, 5, 1, 3)))
    a, b = tl.split(low)
    c, d = tl.split(high)
    return a, b, c, d


@triton.jit
def _columns(base, second, columns, valid, WIDTH: tl.constexpr, WHOLE: tl.constexpr, EVEN_ROWS: tl.constexpr):
    """The tiles x and y that `decode` takes, (rows, columns).

    base, second: (rows, 1) pointers to the rows of the planes, the second of 3 bits alone.
    """
    if WIDTH == 3:
        if WHOLE and EVEN_ROWS:
            x = tl.load(base.to(tl.pointer_type(tl.uint16)) + columns[None, :])
            y = tl.load(second + columns[None, :])
        else:
            low = tl.load(base + 2 * columns[None, :], mask=valid, other=0).to(tl.uint16)
            high = tl.load(base + 2 * columns[None, :] + 1, mask=valid, other=0).to(tl.uint16)
            x = low | (high << 8)
            y = tl.load(second + columns[None, :], mask=valid, other=0)
    else:
        x = tl.load(base + columns[None, :]) if WHOLE else tl.load(base + columns[None, :], mask=valid, other=0)
        y = x
    return x, y


@triton.jit
def _key_groups(
    codes_ptr,
    tokens,
    table_ptr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    BYTE: tl.constexpr,
    PLANE: tl.constexpr,
    FORM: tl.constexpr,
    START: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A step's groups of decoded coordinates, each (tokens, depth)."""
    base = codes_ptr + BYTE * BLOCK + tokens[:, None] * PLANE
    second = codes_ptr + (BYTE + PLANE) * BLOCK + tokens[:, None] * ((PLANE + 1) // 2)
    if FORM == 2:
        return _decode_words(base, second, table_ptr, START, STEP, False, ASSEMBLY)
    else:
        columns = START + tl.arange(0, STEP)
        valid = (columns < COLUMNS)[None, :]
        x, y = _columns(base, second, columns, valid, WIDTH, FORM > 0, PLANE % 2 == 0)
        if FORM == 3:
            return _decode_halves(x, ASSEMBLY)
        else:
            return _side_by_side(decode(x, y, table_ptr, WIDTH, ASSEMBLY), STEP, 32)


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
    SIZE: tl.constexpr,
    FORM: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """A block of decoded values, (coordinates, tokens): one tile, or those of the halves of the table."""
    base = codes_ptr + BYTE + rows[:, None] * PLANE
    second = codes_ptr + BYTE + SIZE * PLANE + rows[:, None] * (ROW - PLANE)
    if FORM == 2:
        parts = _decode_words(base, second, table_ptr, 0, COLUMNS, True, ASSEMBLY)
        return (_side_by_side(parts, COLUMNS, 4096)[0],)
    else:
        columns = tl.arange(0, COLUMNS)
        x, y = _columns(base, second, columns, (columns < COLUMNS)[None, :], WIDTH, True, True)
        if FORM == 3:
            a, b, c, d = _decode_halves(x, ASSEMBLY)
            return _side_by_side((a, b), COLUMNS, 4096)[0], _side_by_side((c, d), COLUMNS, 4096)[0]
        else:
            return (_side_by_side(decode(x, y, table_ptr, WIDTH, ASSEMBLY), COLUMNS, 4096)[0],)


@triton.jit
def key_products(
    codes_ptr,  # of the block
    tokens,  # (BLOCK,) int32, the order of the rows
    queries_ptr,  # (COLUMNS_N, SLOTS) int8
    table_ptr,
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
            codes_ptr, tokens, table_ptr, WIDTH, COLUMNS, STEP, BYTE, PLANE, FORM, start, ASSEMBLY, BLOCK
        )
        for g in tl.static_range(len(groups)):
            slots = (
                SLOT
                + start * FIELDS
                + (g % 2 if FORM == 3 else g) * groups[g].shape[1]
                + tl.arange(0, groups[g].shape[1])
            )
            digits = tl.load(queries_ptr + tl.arange(0, N)[:, None] * SLOTS + slots[None, :])
            acc = tl.dot(groups[g], tl.trans(digits), acc, out_dtype=tl.int32)
    return acc


@triton.jit
def value_products(
    codes_ptr,  # of the block
    weights,  # int8: twos, the tokens' bits in the order of the decoded ones, and the columns N
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
    decoded = _value_groups(codes_ptr, rows, table_ptr, ROW, WIDTH, COLUMNS, BYTE, PLANE, SIZE, FORM, ASSEMBLY)
    # Triton 3.6 fails to compile a matrix product of a reshaped operand; the casts keep the two apart.
    weights = tl.reshape(weights, (BLOCK, N)).to(tl.int16).to(tl.int8)
    acc = tl.dot(decoded[0], weights, out_dtype=tl.int32)
    for half in tl.static_range(1, len(decoded)):
        acc = tl.dot(decoded[half], weights, acc, out_dtype=tl.int32)
    return acc
