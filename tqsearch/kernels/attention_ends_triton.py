"""The two ends of decode attention: queries rotated and rounded; then dense tokens, runs merged and rotated back."""

from __future__ import annotations

import triton
import triton.language as tl

from tqsearch.kernels.attention_dense_triton import attend_dense
from tqsearch.kernels.attention_products_triton import float_product


@triton.jit(do_not_specialize=["heads", "group", "queries", "row_blocks"])
def prepare(
    query_ptr,  # (B, Hq, Tq, DK)
    rotation_ptr,  # (SLOTS, DK) float32: the rotation's rows in the order of the slots, zero where there is none
    offset_ptr,  # (H, DK) float32
    digits_ptr,  # (B H row blocks, 2 R, SLOTS) int8
    factors_ptr,  # (B H row blocks, 1 + bands + chunks, R) float32: offset's term, bands' factors, chunks' biases
    heads,
    group,
    queries,
    row_blocks,
    factor,
    query_b,
    query_h,
    query_t,
    R: tl.constexpr,
    SLOTS: tl.constexpr,
    BANDS: tl.constexpr,  # of keys: slot offset [5], slots [6]
    STEPS: tl.constexpr,
    OFFSETS: tl.constexpr,
    DK: tl.constexpr,
    DK2: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    CHUNK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Rotates R rows to CHUNK slots, and rounds them to |q| / 16256, which no coordinate exceeds: two digits."""
    WIDE: tl.constexpr = 16 if R < 16 else R
    COUNT: tl.constexpr = len(BANDS)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()  # not earlier: those who come read what others wrote before this call
    task, chunk = tl.program_id(0), tl.program_id(1)
    pair = (task // row_blocks).to(tl.int64)
    batch, head = pair // heads, pair % heads
    slot = tl.arange(0, WIDE)
    lane = (task % row_blocks) * R + slot
    held = (slot < R) & (lane < group * queries)
    row = tl.where(held, lane, 0)
    columns = tl.arange(0, DK2)
    at = query_ptr + batch * query_b + (head * group + row // queries) * query_h + (row % queries) * query_t
    query = tl.load(at[:, None] + columns[None, :], mask=held[:, None] & (columns < DK)[None, :], other=0.0)
    slots = chunk * CHUNK + tl.arange(0, CHUNK)
    rotation = tl.load(rotation_ptr + slots[None, :] * DK + columns[:, None], mask=(columns < DK)[:, None], other=0.0)
    query = query.to(tl.float32)
    norm = tl.sqrt(tl.sum(query * query, axis=1))
    unit = tl.where(norm > 0.0, 16256.0, 0.0) / tl.where(norm > 0.0, norm, 1.0)
    rounded = tl.floor(float_product(query, rotation) * unit[:, None] + 0.5)
    high = tl.floor(rounded * 0.0078125 + 0.5)
    low = rounded - high * 128.0
    into = digits_ptr + (task.to(tl.int64) * (2 * R) + 2 * slot)[:, None] * SLOTS + slots[None, :]
    tl.store(into, high.to(tl.int8), mask=(slot < R)[:, None])
    tl.store(into + SLOTS, low.to(tl.int8), mask=(slot < R)[:, None])
    factors = factors_ptr + task * ((1 + COUNT + SLOTS // CHUNK) * R) + slot
    share = 0.0
    for b in tl.static_range(COUNT):
        scale = norm * (factor * STEPS[b] / 16256.0)
        if chunk == 0:
            tl.store(factors + (1 + b) * R, scale, mask=slot < R)
        mine = (chunk * CHUNK >= BANDS[b][5]) & (chunk * CHUNK < BANDS[b][5] + BANDS[b][6])
        share = tl.where(mine, factor * STEPS[b] / 16256.0 * OFFSETS[b], share)
    tl.store(factors + (1 + COUNT + chunk) * R, -share * norm * tl.sum(rounded, axis=1), mask=slot < R)
    if chunk == 0:
        constant = tl.zeros((WIDE,), tl.float32)
        if HAS_OFFSET:
            offset = tl.load(offset_ptr + head * DK + columns, mask=columns < DK, other=0.0)
            constant = tl.sum(query * offset[None, :], axis=1) * factor
        tl.store(factors, constant, mask=slot < R)


# What grows with the context must not have variants of the kernel compiled for its divisors.
@triton.jit(
    do_not_specialize=[
        *("heads", "group", "queries", "row_blocks", "runs", "compressed", "sinks", "recents", "window"),
        *("mask_b", "mask_t"),
    ]
)
def merge(
    query_ptr,  # (B, Hq, Tq, DK)
    sink_keys_ptr,
    sink_values_ptr,
    recent_keys_ptr,
    recent_values_ptr,
    mask_ptr,  # (B, 1, Tq, T)
    rotation_ptr,  # (DV, DV) float32
    s_aux_ptr,  # (Hq,)
    parts_ptr,  # (B H row blocks, runs, R, DV) float32, rotated; then maxima and sums
    out_ptr,  # (B, Tq, Hq, DV)
    heads,
    group,
    queries,
    row_blocks,
    runs,
    compressed,
    sinks,
    recents,
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
    DK: tl.constexpr,
    DK2: tl.constexpr,
    DV: tl.constexpr,
    DV2: tl.constexpr,
    RUNS2: tl.constexpr,
    SOME: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    HAS_AUX: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ASSEMBLED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Attends ROWS rows to the dense tokens and joins the runs to them by their log-sum-exp: CHUNK coordinates."""
    COPIES: tl.constexpr = 16 // ROWS  # of each row, for a matrix product needs 16
    if recents.dtype.is_ptr():  # counted on the device: a graph's steps differ in nothing else
        recents = tl.load(recents).to(tl.int32)
    task = tl.program_id(0)
    pair = (task // row_blocks).to(tl.int64)
    batch, head = pair // heads, pair % heads
    length = sinks + compressed + recents
    columns = tl.arange(0, DV2)
    chunk = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    first = tl.program_id(2) * ROWS
    wide = tl.arange(0, 16)
    row = first + wide // COPIES
    lane = (task % row_blocks) * R + row
    held = lane < group * queries
    known = tl.where(held, lane, 0)
    coordinates = tl.arange(0, DK2)
    at = query_ptr + batch * query_b + (head * group + known // queries) * query_h + (known % queries) * query_t
    query = tl.load(at[:, None] + coordinates[None, :], mask=held[:, None] & (coordinates < DK)[None, :], other=0.0)
    if not ASSEMBLED:  # the interpreter multiplies no bfloat16
        query = query.to(tl.float32)
    place = length - queries + known % queries
    # fmt: off
    dense_top, dense_total, dense = attend_dense(
        query, place, chunk, sink_keys_ptr + batch * sink_kb + head * sink_kh,
        sink_values_ptr + batch * sink_vb + head * sink_vh, recent_keys_ptr + batch * recent_kb + head * recent_kh,
        recent_values_ptr + batch * recent_vb + head * recent_vh, sink_kt, sink_vt, recent_kt, recent_vt, sinks,
        compressed, recents, factor, cap, mask_ptr + batch * mask_b, (known % queries)[:, None] * mask_t, mask_k,
        window, DK, DV, DK2, TOKENS, MASK, CAUSAL, SOFTCAP, ASSEMBLED)
    # fmt: on
    rotation = tl.load(
        rotation_ptr + columns[:, None] * DV + chunk[None, :],
        mask=(columns < DV)[:, None] & (chunk < DV)[None, :],
        other=0.0,
    )
    if DEPENDENT:  # all above is older than this call
        tl.extra.cuda.gdc_wait()
    # All loads but those of many runs come before anything waits for one.
    slot = first + tl.arange(0, ROWS)
    base = task.to(tl.int64) * runs
    rows = tl.num_programs(0).to(tl.int64) * runs * R
    tops_ptr, totals_ptr = parts_ptr + rows * DV, parts_ptr + rows * (DV + 1)
    run = tl.arange(0, SOME)
    at = (base + run)[:, None] * R + slot[None, :]
    there = (run < runs)[:, None] & (slot < R)[None, :]
    some_tops = tl.load(tops_ptr + at, mask=there, other=float("-inf"))
    inside = there[:, :, None] & (columns < DV)[None, None, :]
    some = tl.load(parts_ptr + at[:, :, None] * DV + columns[None, None, :], mask=inside, other=0.0)
    every = tl.arange(0, RUNS2)
    where = (base + every)[:, None] * R + row[None, :]
    tops = tl.load(tops_ptr + where, mask=(every < runs)[:, None], other=float("-inf"))
    totals = tl.load(totals_ptr + where, mask=(every < runs)[:, None], other=0.0)
    top = tl.maximum(tl.max(tops, axis=0), dense_top)
    if HAS_AUX:
        aux = tl.load(s_aux_ptr + head * group + tl.minimum(lane, group * queries - 1) // queries).to(tl.float32)
        aux *= 1.4426950408889634
        top = tl.maximum(top, aux)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(totals * tl.exp2(tops - top[None, :]), axis=0) + dense_total * tl.exp2(dense_top - top)
    if HAS_AUX:
        total += tl.exp2(aux - top)
    inverse = tl.where(total > 0.0, 1.0, 0.0) / tl.where(total > 0.0, total, 1.0)
    highest = tl.max(tl.reshape(top, (ROWS, COPIES)), axis=1)
    # Several runs side by side, summed once at the end: nothing in the loop waits for anything but its loads.
    sums = some * tl.exp2(some_tops - highest[None, :])[:, :, None]
    for start in range(SOME, runs, SOME):
        run = start + tl.arange(0, SOME)
        at = (base + run)[:, None] * R + slot[None, :]
        there = (run < runs)[:, None] & (slot < R)[None, :]
        weight = tl.exp2(tl.load(tops_ptr + at, mask=there, other=float("-inf")) - highest[None, :])
        inside = there[:, :, None] & (columns < DV)[None, None, :]
        sums += (
            tl.load(parts_ptr + at[:, :, None] * DV + columns[None, None, :], mask=inside, other=0.0)
            * weight[:, :, None]
        )
    back = tl.sum(tl.sum(sums, axis=0)[:, :, None] * rotation[None, :, :], axis=1)
    back = tl.reshape(tl.broadcast_to(back[:, None, :], (ROWS, COPIES, CHUNK)), (16, CHUNK))
    out = (back + dense * tl.exp2(dense_top - top)[:, None]) * inverse[:, None]
    place = (batch * queries + lane % queries) * (heads * group) + head * group + lane // queries
    into = out_ptr + place[:, None] * DV + chunk[None, :]
    mask = held[:, None] & (wide % COPIES == 0)[:, None] & (chunk < DV)[None, :]
    tl.store(into, out.to(out_ptr.dtype.element_ty), mask=mask)
