"""Decode attention from packed keys and values in Triton: one program for a KV head and a run of its tokens.

Three launches. (1) `attention_ends_triton.prepare` rotates the queries and rounds them to 15 bits, as two int8 digits.
(2) Here, each program holds all query heads of one KV head as columns. For a block of tokens it decodes the keys to
int8 in registers, multiplies them with both digits on the tensor cores, scales, and takes the block's maximum; the
probabilities times the values' scales become 15-bit integers of two digits in turn, and multiply the decoded values.
Both products are integers, so the digits are joined without error. A further program a head attends to the tokens that
are dense. (3) `attention_ends_triton.merge` joins the runs by their log-sum-exp and rotates back once.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from tqsearch.kernels.attention_ends_triton import merge, prepare
from tqsearch.kernels.attention_layout import KeyLayout, ValueLayout, band_keys, key_layout, value_layout
from tqsearch.kernels.attention_operands import Context
from tqsearch.kernels.bands import BandTable
from tqsearch.kernels.decode_triton import decode
from tqsearch.kernels.scan_triton import _columns

INTERPRETED = bool(triton.knobs.runtime.interpret)
LOG2_E = math.log2(math.e)


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
def _zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.zeros((ROWS, COLUMNS), tl.float32)


@triton.jit
def _log2(x, ASSEMBLED: tl.constexpr):
    """By the special function unit where there is one: any error of it cancels, as its result is only ever undone."""
    if ASSEMBLED:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        return tl.log2(x)


@triton.jit
def _digits(value):
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
        x, y = _columns(codes_ptr, tokens, ROW, columns, valid, WIDTH, BYTE, PLANE, FORM == 1, EVEN_ROWS)
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
        x, y = _columns(codes_ptr, rows, ROW, columns, (columns < COLUMNS)[None, :], WIDTH, BYTE, PLANE, True, True)
        return _side_by_side(decode(x, y, table_ptr, WIDTH, ASSEMBLY), COLUMNS)


@triton.jit
def _key_products(
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
def _value_products(
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


@triton.jit
def _allowed(score, position, place, mask_ptr, mask_t, mask_k, MASK: tl.constexpr, CAUSAL: tl.constexpr, window):
    """Scores (tokens, rows) or (rows, tokens) in base 2 with the mask applied; `position` and `place` broadcast."""
    if MASK == 1:
        score = tl.where(tl.load(mask_ptr + mask_t + position.to(tl.int64) * mask_k) != 0, score, float("-inf"))
    if MASK == 2:
        score += tl.load(mask_ptr + mask_t + position.to(tl.int64) * mask_k).to(tl.float32) * 1.4426950408889634
    if CAUSAL:
        score = tl.where((position <= place) & (position > place - window), score, float("-inf"))
    return score


@triton.jit
def _capped(score, cap, SOFTCAP: tl.constexpr):
    """Scores in base 2; with a cap they come as 2 log2(e) / softcap times the logits, and cap is log2(e) softcap."""
    if SOFTCAP:
        return cap - 2.0 * cap / (tl.exp2(score) + 1.0)
    else:
        return score


@triton.jit
def _dense_run(
    state,  # maximum (R,), sum (R,), output (R, DV)
    query,  # (R, DK)
    place,  # (R,) int32
    keys_ptr,
    values_ptr,
    key_stride,
    value_stride,
    count,
    first,
    factor,
    cap,
    mask_ptr,
    mask_t,
    mask_k,
    window,
    DK: tl.constexpr,
    DV: tl.constexpr,
    DK2: tl.constexpr,
    DV2: tl.constexpr,
    TOKENS: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ASSEMBLED: tl.constexpr,
):
    """Attention to dense tokens, flash style."""
    top, total, out = state
    for start in range(0, count, TOKENS):
        tokens = start + tl.arange(0, TOKENS)
        inside = tokens < count
        columns = tl.arange(0, DK2)
        key = tl.load(
            keys_ptr + tokens[None, :].to(tl.int64) * key_stride + columns[:, None],
            mask=inside[None, :] & (columns < DK)[:, None],
            other=0.0,
        )
        if not ASSEMBLED:  # the interpreter multiplies no bfloat16
            key = key.to(tl.float32)
        score = _capped(tl.dot(query, key, input_precision="ieee") * factor, cap, SOFTCAP)
        safe = tl.where(inside, first + tokens, first)
        score = _allowed(score, safe[None, :], place[:, None], mask_ptr, mask_t, mask_k, MASK, CAUSAL, window)
        score = tl.where(inside[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, axis=1))
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(score - finite[:, None])
        scale = tl.exp2(top - finite)
        lanes = tl.arange(0, DV2)
        value = tl.load(
            values_ptr + tokens[:, None].to(tl.int64) * value_stride + lanes[None, :],
            mask=inside[:, None] & (lanes < DV)[None, :],
            other=0.0,
        )
        if not ASSEMBLED:
            value = value.to(tl.float32)
        total = total * scale + tl.sum(weight, axis=1)
        out = out * scale[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        top = higher
    return top, total, out


# What grows with the context must not have variants of the kernel compiled for its divisors.
@triton.jit(
    do_not_specialize=[
        *("heads", "group", "queries", "row_blocks", "compressed", "sinks", "recents", "splits", "blocks_a_split"),
        *("first_block", "window", "mask_b", "mask_t"),
    ]
)
def split_kernel(
    query_ptr,  # (B, Hq, Tq, DK)
    digits_ptr,  # (B H row blocks, 2 R, SLOTS) int8
    factors_ptr,  # (B H row blocks, 1 + key bands + BIASES, R) float32: see `prepare`
    keys_ptr,  # (B, H, C, KEY_ROW) uint8
    key_scales_ptr,  # (B, H, C)
    key_tables_ptr,
    values_ptr,  # (B, H, C / BLOCK, VALUE_BYTES) uint8
    value_scales_ptr,  # (B, H, C)
    value_tables_ptr,
    tokens_ptr,  # (BLOCK,) int32
    sink_keys_ptr,
    sink_values_ptr,
    recent_keys_ptr,
    recent_values_ptr,
    mask_ptr,  # (B, 1, Tq, T)
    out_ptr,  # (B H row blocks, splits + 1, R, DV) float32
    top_ptr,  # (B H row blocks, splits + 1, R) float32
    total_ptr,  # the same
    heads,
    group,
    queries,  # Tq
    row_blocks,
    compressed,  # C
    sinks,
    recents,
    splits,
    blocks_a_split,
    first_block,
    window,
    factor,
    cap,
    query_b,
    query_h,
    query_t,
    sink_kb,
    sink_kh,
    sink_kt,
    sink_vb,
    sink_vh,
    sink_vt,
    recent_kb,
    recent_kh,
    recent_kt,
    recent_vb,
    recent_vh,
    recent_vt,
    mask_b,
    mask_t,
    mask_k,
    R: tl.constexpr,
    SLOTS: tl.constexpr,
    BIASES: tl.constexpr,
    BLOCK: tl.constexpr,
    KEY_ROW: tl.constexpr,
    VALUE_BYTES: tl.constexpr,
    KEY_BANDS: tl.constexpr,
    KEY_ASSEMBLIES: tl.constexpr,
    VALUE_BANDS: tl.constexpr,
    VALUE_ASSEMBLIES: tl.constexpr,
    VALUE_ORDERS: tl.constexpr,
    VALUE_ROWS: tl.constexpr,
    VALUE_STEPS: tl.constexpr,
    VALUE_OFFSETS: tl.constexpr,
    TWOS: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    DK2: tl.constexpr,
    DV2: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    CAUSAL_DENSE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ASSEMBLED: tl.constexpr,
):
    """A run of compressed blocks, or the dense tokens, of one KV head and R rows of query heads and queries."""
    split = tl.program_id(0) % (splits + 1) - 1
    task = tl.program_id(0) // (splits + 1)
    pair = (task // row_blocks).to(tl.int64)
    batch, head = pair // heads, pair % heads
    length = sinks + compressed + recents
    lane = (task % row_blocks) * R + tl.arange(0, R)
    place = length - queries + lane % queries
    mask_rows = mask_ptr + batch * mask_b
    part = task.to(tl.int64) * (splits + 1) + split + 1
    if split < 0:
        WIDE: tl.constexpr = 16 if R < 16 else R
        wide = (task % row_blocks) * R + tl.arange(0, WIDE)
        held = (tl.arange(0, WIDE) < R) & (wide < group * queries)
        row = tl.where(held, wide, 0)
        columns = tl.arange(0, DK2)
        at = query_ptr + batch * query_b + (head * group + row // queries) * query_h + (row % queries) * query_t
        query = tl.load(at[:, None] + columns[None, :], mask=held[:, None] & (columns < DK)[None, :], other=0.0)
        if not ASSEMBLED:
            query = query.to(tl.float32)
        state = (
            tl.full((WIDE,), float("-inf"), tl.float32),
            tl.zeros((WIDE,), tl.float32),
            tl.zeros((WIDE, DV2), tl.float32),
        )
        seen = length - queries + row % queries
        mask_row = (row % queries)[:, None] * mask_t
        # fmt: off
        state = _dense_run(
            state, query, seen, sink_keys_ptr + batch * sink_kb + head * sink_kh,
            sink_values_ptr + batch * sink_vb + head * sink_vh, sink_kt, sink_vt, sinks, 0, factor, cap, mask_rows,
            mask_row, mask_k, window, DK, DV, DK2, DV2, 16, MASK, CAUSAL_DENSE, SOFTCAP,
            ASSEMBLED)
        state = _dense_run(
            state, query, seen, recent_keys_ptr + batch * recent_kb + head * recent_kh,
            recent_values_ptr + batch * recent_vb + head * recent_vh, recent_kt, recent_vt, recents,
            sinks + compressed, factor, cap, mask_rows, mask_row, mask_k, window, DK, DV, DK2, DV2, 32, MASK,
            CAUSAL_DENSE, SOFTCAP, ASSEMBLED)
        # fmt: on
        slot = tl.arange(0, WIDE)
        lanes = tl.arange(0, DV2)
        tl.store(
            out_ptr + (part * R + slot)[:, None] * DV + lanes[None, :],
            state[2],
            mask=(slot < R)[:, None] & (lanes < DV)[None, :],
        )
        tl.store(top_ptr + part * R + slot, state[0], mask=slot < R)
        tl.store(total_ptr + part * R + slot, state[1], mask=slot < R)
    else:
        N: tl.constexpr = 2 * R
        COUNT: tl.constexpr = len(KEY_BANDS)
        tokens = tl.load(tokens_ptr + tl.arange(0, BLOCK))
        factors = factors_ptr + task * ((1 + COUNT + BIASES) * R) + tl.arange(0, R)
        constant = tl.load(factors)
        bias = tl.zeros((R,), tl.float32)
        for i in range(BIASES):
            bias += tl.load(factors + (1 + COUNT + i) * R)
        top = tl.full((R,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK, R), tl.float32)
        mass = tl.zeros((BLOCK, R), tl.float32)
        outs = ()
        for b in tl.static_range(len(VALUE_BANDS)):
            outs += (_zeros(VALUE_ROWS[b], R),)
        begin = first_block + split * blocks_a_split
        end = tl.minimum(begin + blocks_a_split, compressed // BLOCK)
        # Scales are few bytes, loaded a block ahead: the software pipeline leaves them out.
        scales_at = pair * compressed + begin * BLOCK + tokens
        next_key_scale = tl.load(key_scales_ptr + scales_at)
        next_value_scale = tl.load(value_scales_ptr + scales_at)
        for block in range(begin, end):
            at = pair * compressed + block * BLOCK
            key_scale = next_key_scale.to(tl.float32)
            value_scale = _log2(tl.maximum(next_value_scale.to(tl.float32), 1e-30), ASSEMBLED)
            scales_at = pair * compressed + tl.minimum(block + 1, end - 1) * BLOCK + tokens
            next_key_scale = tl.load(key_scales_ptr + scales_at)
            next_value_scale = tl.load(value_scales_ptr + scales_at)
            score = tl.zeros((BLOCK, R), tl.float32)
            for b in tl.static_range(COUNT):
                # fmt: off
                products = _key_products(
                    keys_ptr + at * KEY_ROW, tokens, digits_ptr + task.to(tl.int64) * (N * SLOTS),
                    key_tables_ptr + b * 256, KEY_ROW, SLOTS, N, KEY_BANDS[b][0], KEY_BANDS[b][1], KEY_BANDS[b][2],
                    KEY_BANDS[b][3], KEY_BANDS[b][4], KEY_BANDS[b][5], KEY_BANDS[b][7],
                    tl.constexpr(KEY_ASSEMBLIES[b]), BLOCK)
                # fmt: on
                score += _digits(products) * tl.load(factors + (1 + b) * R)[None, :]
            score = _capped((score + bias[None, :]) * key_scale[:, None] + constant[None, :], cap, SOFTCAP)
            position = (sinks + block * BLOCK + tokens)[:, None]
            mask_row = (lane % queries)[None, :] * mask_t
            score = _allowed(score, position, place[None, :], mask_rows, mask_row, mask_k, MASK, CAUSAL, window)
            # The value's scale goes into the exponent: weights are then at most 1, whatever the scales.
            score += value_scale[:, None]
            here = tl.max(score, axis=0)
            here = tl.where(here == float("-inf"), -1e30, here)
            higher = tl.maximum(top, here)
            old, new = tl.exp2(top - higher), tl.exp2(here - higher)
            weight = tl.exp2(score - here[None, :])
            total = total * old[None, :] + weight * (new[None, :] * tl.exp2(-value_scale)[:, None])
            # Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits: no conversion is needed.
            weight *= 127.0
            high_bits = weight + 12582912.0
            high = high_bits - 12582912.0
            low_bits = (weight - high) * 128.0 + 12582912.0
            mass = mass * old[None, :] + (high * 128.0 + (low_bits - 12582912.0)) * new[None, :]
            digits = tl.join(
                high_bits.to(tl.int32, bitcast=True).to(tl.int8), low_bits.to(tl.int32, bitcast=True).to(tl.int8)
            )
            digits = tl.reshape(digits, (BLOCK, N))
            fresh = ()
            for b in tl.static_range(len(VALUE_BANDS)):
                # fmt: off
                products = _value_products(
                    values_ptr + (pair * (compressed // BLOCK) + block) * VALUE_BYTES,
                    tl.permute(tl.reshape(digits, TWOS), VALUE_ORDERS[b]),
                    value_tables_ptr + b * 256, N, VALUE_BANDS[b][0], VALUE_BANDS[b][1], VALUE_BANDS[b][2],
                    VALUE_BANDS[b][3], VALUE_BANDS[b][4], VALUE_BANDS[b][6], VALUE_ROWS[b], VALUE_BANDS[b][7],
                    tl.constexpr(VALUE_ASSEMBLIES[b]), BLOCK)
                # fmt: on
                fresh += (outs[b] * old[None, :] + _digits(products) * new[None, :],)
            outs = fresh
            top = higher
        whole = tl.sum(mass, axis=0)
        tl.store(top_ptr + part * R + tl.arange(0, R), tl.where(top < -1e29, float("-inf"), top))
        tl.store(total_ptr + part * R + tl.arange(0, R), tl.sum(total, axis=0))
        for b in tl.static_range(len(VALUE_BANDS)):
            rows = tl.arange(0, VALUE_ROWS[b])
            found = (outs[b] - VALUE_OFFSETS[b] * whole[None, :]) * (VALUE_STEPS[b] / 16256.0)
            into = out_ptr + (part * R + tl.arange(0, R))[None, :] * DV + VALUE_BANDS[b][5] + rows[:, None]
            tl.store(into, found, mask=(rows < VALUE_BANDS[b][6])[:, None])


@lru_cache(maxsize=16)
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _splits(programs: int, blocks: int, device: torch.device) -> int:
    """Blocks a program takes: so few that there are some programs for each place on the device."""
    wanted = max(1, _PROGRAMS * _processors(device) // programs)
    return max(1, -(-blocks // wanted))


_PROGRAMS = 4  # programs a multiprocessor to aim at
_CHUNK = 32  # slots a program prepares; divides those of a band
_WARPS, _STAGES = 4, 3
_REGISTERS: int | None = None


def _power(value: int, least: int = 16) -> int:
    return max(least, 1 << (value - 1).bit_length())


def attention(
    query: Tensor,
    context: Context,
    scaling: float,
    mask: Tensor | None,
    softcap: float | None,
    s_aux: Tensor | None,
    sliding_window: int | None,
) -> Tensor:
    """See `kernels.attention`."""
    batch, query_heads, count, key_dim = query.shape
    sinks, keys, values, recent, offset = context
    heads, compressed = keys.scales.shape[1], context.compressed
    group, value_dim = query_heads // heads, recent.values.shape[3]
    block = compressed // values.packed.shape[2] if compressed else 128
    device = query.device
    assembled = not (INTERPRETED or torch.version.cuda is None)
    key_cut, value_cut = _cuts(keys.bands, values.bands, block, assembled, device)
    rows = min(16, _power(group * count, 4))
    row_blocks = -(-group * count // rows)
    tasks = batch * heads * row_blocks
    first_seen = 0 if sliding_window is None else max(0, context.length - count - sliding_window + 1)
    first_block = min(max(0, first_seen - sinks.keys.shape[2]), compressed) // block
    blocks = compressed // block - first_block
    blocks_a_split = _splits(tasks, blocks, device) if blocks else 1
    splits = -(-blocks // blocks_a_split)

    slots = len(key_cut.slots)
    digits = torch.empty((tasks, 2 * rows, slots), dtype=torch.int8, device=device)
    biases = slots // _CHUNK
    factors = torch.empty((tasks, 1 + len(key_cut.bands) + biases, rows), dtype=torch.float32, device=device)
    allocate = torch.zeros if any(band.width == 0 for band in values.bands) else torch.empty
    parts = allocate((tasks, splits + 1, rows, value_dim), dtype=torch.float32, device=device)
    tops = torch.empty((2, tasks, splits + 1, rows), dtype=torch.float32, device=device)
    out = torch.empty((batch, count, query_heads, value_dim), dtype=query.dtype, device=device)
    factor = scaling * (LOG2_E if softcap is None else 2.0 * LOG2_E / softcap)
    cap = 0.0 if softcap is None else softcap * LOG2_E
    if splits:
        prepare[(tasks, biases)](
            query,
            _slot_rotation(keys.rotation, key_cut.slots),
            query if offset is None else offset,
            digits,
            factors,
            heads,
            group,
            count,
            row_blocks,
            factor,
            query.stride(0),
            query.stride(1),
            query.stride(2),
            R=rows,
            SLOTS=slots,
            BANDS=key_cut.bands,
            STEPS=key_cut.steps,
            OFFSETS=key_cut.offsets,
            DK=key_dim,
            DK2=_power(key_dim),
            HAS_OFFSET=offset is not None,
            CHUNK=_CHUNK,
        )
    if mask is not None:
        mask = mask.expand(batch, -1, count, context.length)
        if mask.dtype == torch.bool:
            mask = mask.view(torch.uint8)
    first_place = context.length - count
    split_kernel[(tasks * (splits + 1),)](
        query,
        digits,
        factors,
        keys.packed,
        keys.scales,
        key_cut.tables,
        values.packed,
        values.scales,
        value_cut.tables,
        value_cut.tokens,
        sinks.keys,
        sinks.values,
        recent.keys,
        recent.values,
        query if mask is None else mask,
        parts,
        tops[0],
        tops[1],
        heads,
        group,
        count,
        row_blocks,
        compressed,
        sinks.keys.shape[2],
        recent.keys.shape[2],
        splits,
        blocks_a_split,
        first_block,
        context.length + 1 if sliding_window is None else sliding_window,
        factor,
        cap,
        query.stride(0),
        query.stride(1),
        query.stride(2),
        *(stride for part in (*sinks, *recent) for stride in part.stride()[:3]),
        *((0, 0, 0) if mask is None else (mask.stride(0), mask.stride(2), mask.stride(3))),
        R=rows,
        SLOTS=slots,
        BIASES=biases,
        BLOCK=block,
        KEY_ROW=keys.packed.shape[3],
        VALUE_BYTES=values.packed.shape[3],
        KEY_BANDS=key_cut.bands,
        KEY_ASSEMBLIES=key_cut.assemblies,
        VALUE_BANDS=value_cut.bands,
        VALUE_ASSEMBLIES=value_cut.assemblies,
        VALUE_ORDERS=value_cut.orders,
        VALUE_ROWS=tuple(_power(band[6]) for band in value_cut.bands),
        VALUE_STEPS=value_cut.steps,
        VALUE_OFFSETS=value_cut.offsets,
        TWOS=(2,) * (block.bit_length() - 1) + (2 * rows,),
        DK=key_dim,
        DV=value_dim,
        DK2=_power(key_dim),
        DV2=_power(value_dim),
        MASK=0 if mask is None else (1 if mask.dtype == torch.uint8 else 2),
        CAUSAL=sliding_window is not None or (mask is None and sinks.keys.shape[2] + compressed > first_place + 1),
        CAUSAL_DENSE=sliding_window is not None or mask is None,
        SOFTCAP=softcap is not None,
        ASSEMBLED=assembled,
        num_warps=_WARPS,
        num_stages=_STAGES,
        maxnreg=_REGISTERS,
    )
    chunk = 32 if rows < 16 else 64
    merge[(tasks, -(-value_dim // chunk))](
        parts,
        tops[0],
        tops[1],
        values.rotation,
        query if s_aux is None else s_aux,
        out,
        heads,
        group,
        count,
        row_blocks,
        splits + 1,
        R=rows,
        DV=value_dim,
        DV2=_power(value_dim),
        RUNS2=triton.next_power_of_2(max(splits + 1, 16)),
        SOME=max(1, 8192 // (rows * _power(value_dim))),
        CHUNK=chunk,
        HAS_AUX=s_aux is not None,
        num_warps=8,
    )
    return out


_known_cuts: dict[tuple[object, ...], tuple[object, object, KeyLayout, ValueLayout]] = {}


def _cuts(
    key_bands: tuple[BandTable, ...],
    value_bands: tuple[BandTable, ...],
    block: int,
    assembled: bool,
    device: torch.device,
) -> tuple[KeyLayout, ValueLayout]:
    """The layouts of both, found by the identity of the bands: hashing their tables at each step takes long."""
    key = (id(key_bands), id(value_bands), block, assembled, device)
    known = _known_cuts.get(key)
    if known is None:
        if len(_known_cuts) >= 64:
            _known_cuts.clear()
        known = _known_cuts[key] = (
            key_bands,  # held, so that their ids stay theirs
            value_bands,
            key_layout(band_keys(key_bands), assembled, device),
            value_layout(band_keys(value_bands), block, assembled, device),
        )
    return known[2], known[3]


_rotations: dict[tuple[int, int, torch.device], tuple[Tensor, Tensor]] = {}


def _slot_rotation(rotation: Tensor, slots: Tensor) -> Tensor:
    """The rotation's rows in the order of the slots, and a zero row where there is none; kept for both tensors."""
    key = (id(rotation), id(slots), slots.device)
    kept = _rotations.get(key)
    if kept is None or kept[0] is not rotation:
        padded = torch.cat([rotation, rotation.new_zeros((1, rotation.shape[1]))])
        kept = (rotation, padded[slots].contiguous())
        if len(_rotations) >= 64:
            _rotations.clear()
        _rotations[key] = kept
    return kept[1]
