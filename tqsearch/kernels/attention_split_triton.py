"""Attention of one KV head's queries to a run of its tokens, straight from the codes.

A program holds all query heads of one KV head as columns. For a block of tokens it decodes the keys to int8 in
registers, multiplies them with both digits of the queries on the tensor cores, scales, and takes the block's maximum;
the probabilities times the values' scales become 15-bit integers of two digits in turn, and multiply the decoded
values. Both products are integers, so the digits are joined without error.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tqsearch.kernels.attention_dense_triton import allowed, capped
from tqsearch.kernels.attention_products_triton import (
    digits_joined,
    digits_side_by_side,
    fill_registers,
    key_products,
    value_products,
)


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
def _reciprocal(x, ASSEMBLED: tl.constexpr):
    """By the special function unit where there is one."""
    if ASSEMBLED:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        return 1.0 / x


@triton.jit
def _scales(scales_ptr, start, BLOCK: tl.constexpr, LOG: tl.constexpr):
    """A block's scales in the order of its rows, float32; two of float16 are read as a word, as a copy must be."""
    if scales_ptr.dtype.element_ty == tl.float16:
        words = tl.load((scales_ptr + start).to(tl.pointer_type(tl.int32)) + tl.arange(0, BLOCK // 2))
        scales = (words[:, None] >> (16 * tl.arange(0, 2))[None, :]).to(tl.int16).to(tl.float16, bitcast=True)
    else:
        scales = tl.load(scales_ptr + start + tl.arange(0, BLOCK))
    return tl.reshape(scales, (2,) * LOG)


# What grows with the context must not have variants of the kernel compiled for its divisors.
@triton.jit(
    do_not_specialize=[
        *("heads", "group", "queries", "row_blocks", "compressed", "sinks", "recents", "splits", "blocks_a_split"),
        *("first_block", "window", "mask_b", "mask_t"),
    ]
)
def split_kernel(
    keys_ptr,  # (B, H, C / BLOCK, BLOCK KEY_ROW) uint8
    key_scales_ptr,  # (B, H, C)
    values_ptr,  # (B, H, C / BLOCK, VALUE_BYTES) uint8
    value_scales_ptr,  # (B, H, C)
    mask_ptr,  # (B, 1, Tq, T)
    digits_ptr,  # (B H row blocks, 2 R, SLOTS) int8
    factors_ptr,  # (B H row blocks, 1 + key bands + BIASES, R) float32: see `prepare`
    key_tables_ptr,
    value_tables_ptr,
    tokens_ptr,  # (BLOCK,) int32
    out_ptr,  # (B H row blocks, splits, R, DV) float32, then maxima and sums, a row each
    heads,
    group,
    queries,  # Tq
    row_blocks,
    compressed,  # C
    sinks,
    recents,  # a number, or a pointer to it
    splits,
    blocks_a_split,
    first_block,
    window,
    cap,
    mask_k,
    mask_b,
    mask_t,
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
    REGISTERS: tl.constexpr,
    TWOS: tl.constexpr,
    VALUE_PLACES: tl.constexpr,
    STAGES: tl.constexpr,
    DV: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ASSEMBLED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """A run of compressed blocks of one KV head and R rows of query heads and queries."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    if recents.dtype.is_ptr():  # counted on the device
        recents = tl.load(recents).to(tl.int32)
    top_ptr = out_ptr + tl.num_programs(0).to(tl.int64) * (R * DV)
    total_ptr = top_ptr + tl.num_programs(0).to(tl.int64) * R
    split, task = tl.program_id(0) % splits, tl.program_id(0) // splits
    pair = (task // row_blocks).to(tl.int64)
    batch = pair // heads
    length = sinks + compressed + recents
    lane = (task % row_blocks) * R + tl.arange(0, R)
    place = length - queries + lane % queries
    mask_rows = mask_ptr + batch * mask_b
    part = task.to(tl.int64) * splits + split
    begin = first_block + split * blocks_a_split
    end = tl.minimum(begin + blocks_a_split, compressed // BLOCK)
    N: tl.constexpr = 2 * R
    COUNT: tl.constexpr = len(KEY_BANDS)
    LOG: tl.constexpr = len(TWOS) - 1
    fill_registers(REGISTERS, key_tables_ptr, value_tables_ptr)
    tokens = tl.load(tokens_ptr + tl.arange(0, BLOCK))
    if DEPENDENT:  # all above is older than this call
        tl.extra.cuda.gdc_wait()
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
    # Scales are few bytes, loaded a block ahead: the software pipeline leaves them out.
    for block in tl.range(begin, end, num_stages=STAGES):
        at = tl.multiple_of(pair * compressed + block * BLOCK, BLOCK)  # so that copies may be of 16 bytes
        key_scale = tl.permute(_scales(key_scales_ptr, at, BLOCK, LOG), VALUE_PLACES[0])
        key_scale = tl.reshape(key_scale, (BLOCK,)).to(tl.float32)
        value_scale = tl.permute(_scales(value_scales_ptr, at, BLOCK, LOG), VALUE_PLACES[0])
        value_scale = tl.maximum(tl.reshape(value_scale, (BLOCK,)).to(tl.float32), 1e-30)
        inverse_scale = _reciprocal(value_scale, ASSEMBLED)
        value_scale = _log2(value_scale, ASSEMBLED)
        score = tl.broadcast_to(bias[None, :], (BLOCK, R))
        for b in tl.static_range(COUNT):
            # fmt: off
            products = key_products(
                keys_ptr + at * KEY_ROW, tokens, digits_ptr + task.to(tl.int64) * (N * SLOTS),
                key_tables_ptr + b * 256, SLOTS, N, KEY_BANDS[b][0], KEY_BANDS[b][1], KEY_BANDS[b][2],
                KEY_BANDS[b][3], KEY_BANDS[b][4], KEY_BANDS[b][5], KEY_BANDS[b][7],
                tl.constexpr(KEY_ASSEMBLIES[b]), BLOCK)
            # fmt: on
            score += digits_joined(products) * tl.load(factors + (1 + b) * R)[None, :]
        score = capped(score * key_scale[:, None] + constant[None, :], cap, SOFTCAP)
        position = (sinks + block * BLOCK + tokens)[:, None]
        mask_row = (lane % queries)[None, :] * mask_t
        score = allowed(score, position, place[None, :], mask_rows, mask_row, mask_k, MASK, CAUSAL, window)
        # The value's scale goes into the exponent: weights are then at most 1, whatever the scales.
        score += value_scale[:, None]
        here = tl.max(score, axis=0)
        here = tl.where(here == float("-inf"), -1e30, here)
        higher = tl.maximum(top, here)
        old, new = tl.exp2(top - higher), tl.exp2(here - higher)
        weight = tl.exp2(score - here[None, :])
        total = total * old[None, :] + weight * (new[None, :] * inverse_scale[:, None])
        # Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits: no conversion is needed.
        weight *= 127.0
        high_bits = weight + 12582912.0
        high = high_bits - 12582912.0
        low_bits = (weight - high) * 128.0 + 12582912.0
        mass = mass * old[None, :] + (high * 128.0 + (low_bits - 12582912.0)) * new[None, :]
        digits = digits_side_by_side(
            high_bits.to(tl.int32, bitcast=True).to(tl.int8), low_bits.to(tl.int32, bitcast=True).to(tl.int8)
        )
        fresh = ()
        for b in tl.static_range(len(VALUE_BANDS)):
            # fmt: off
            products = value_products(
                values_ptr + (pair * (compressed // BLOCK) + block) * VALUE_BYTES,
                tl.permute(tl.reshape(digits, TWOS), VALUE_ORDERS[b]),
                value_tables_ptr + b * 256, N, VALUE_BANDS[b][0], VALUE_BANDS[b][1], VALUE_BANDS[b][2],
                VALUE_BANDS[b][3], VALUE_BANDS[b][4], VALUE_BANDS[b][6], VALUE_ROWS[b], VALUE_BANDS[b][7],
                tl.constexpr(VALUE_ASSEMBLIES[b]), BLOCK)
            # fmt: on
            fresh += (outs[b] * old[None, :] + digits_joined(products) * new[None, :],)
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
