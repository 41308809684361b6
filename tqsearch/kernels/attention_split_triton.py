"""Attention of one KV head's queries to a run of its tokens, straight from the codes.

A program holds all query heads of one KV head as columns. For a block of tokens it decodes the keys to int8 in
registers, multiplies them with both digits of the queries on the tensor cores, scales, and takes the block's maximum;
the probabilities times the values' scales become 15-bit integers of two digits in turn, and multiply the decoded
values. Both products are integers, so the digits are joined without error. A further program a head attends to the
tokens that are dense.
"""

from __future__ import annotations

import triton
import triton.language as tl

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
    keys_ptr,  # (B, H, C / BLOCK, BLOCK KEY_ROW) uint8
    key_scales_ptr,  # (B, H, C)
    values_ptr,  # (B, H, C / BLOCK, VALUE_BYTES) uint8
    value_scales_ptr,  # (B, H, C)
    sink_keys_ptr,
    sink_values_ptr,
    recent_keys_ptr,
    recent_values_ptr,
    mask_ptr,  # (B, 1, Tq, T)
    digits_ptr,  # (B H row blocks, 2 R, SLOTS) int8
    factors_ptr,  # (B H row blocks, 1 + key bands + BIASES, R) float32: see `prepare`
    key_tables_ptr,
    value_tables_ptr,
    tokens_ptr,  # (BLOCK,) int32
    out_ptr,  # (B H row blocks, splits + 1, R, DV) float32, then maxima and sums, a row each
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
    DK: tl.constexpr,
    DV: tl.constexpr,
    DK2: tl.constexpr,
    DV2: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    CAUSAL_DENSE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ASSEMBLED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """A run of compressed blocks, or the dense tokens, of one KV head and R rows of query heads and queries."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    if recents.dtype.is_ptr():  # counted on the device
        recents = tl.load(recents).to(tl.int32)
    top_ptr = out_ptr + tl.num_programs(0).to(tl.int64) * (R * DV)
    total_ptr = top_ptr + tl.num_programs(0).to(tl.int64) * R
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
            sinks + compressed, factor, cap, mask_rows, mask_row, mask_k, window, DK, DV, DK2, DV2, 16, MASK,
            CAUSAL_DENSE, SOFTCAP, ASSEMBLED)
        # fmt: on
        if DEPENDENT:
            tl.extra.cuda.gdc_wait()
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
        begin = first_block + split * blocks_a_split
        end = tl.minimum(begin + blocks_a_split, compressed // BLOCK)
        # Scales are few bytes, loaded a block ahead: the software pipeline leaves them out.
        for block in tl.range(begin, end, num_stages=STAGES):
            at = pair * compressed + block * BLOCK
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
            score = _capped(score * key_scale[:, None] + constant[None, :], cap, SOFTCAP)
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
