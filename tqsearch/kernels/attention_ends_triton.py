"""The two ends of decode attention: queries rotated and rounded before it, runs merged and rotated back after it."""

from __future__ import annotations

import triton
import triton.language as tl


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
):
    """Rotates R rows to CHUNK slots, and rounds them to |q| / 16256, which no coordinate exceeds: two digits."""
    WIDE: tl.constexpr = 16 if R < 16 else R
    COUNT: tl.constexpr = len(BANDS)
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
    rounded = tl.floor(tl.dot(query, rotation, input_precision="tf32x3") * unit[:, None] + 0.5)
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


@triton.jit(do_not_specialize=["heads", "group", "queries", "row_blocks", "runs"])
def merge(
    parts_ptr,  # (B H row blocks, runs, R, DV) float32; run 0 is dense, the others are rotated
    top_ptr,  # (B H row blocks, runs, R) float32
    total_ptr,  # the same
    rotation_ptr,  # (DV, DV) float32
    s_aux_ptr,  # (Hq,)
    out_ptr,  # (B, Tq, Hq, DV)
    heads,
    group,
    queries,
    row_blocks,
    runs,
    R: tl.constexpr,
    DV: tl.constexpr,
    DV2: tl.constexpr,
    RUNS2: tl.constexpr,
    SOME: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_AUX: tl.constexpr,
):
    """Joins the runs of R rows by their log-sum-exp, and rotates CHUNK coordinates back."""
    task = tl.program_id(0)
    pair = task // row_blocks
    batch, head = pair // heads, pair % heads
    slot = tl.arange(0, R)
    columns = tl.arange(0, DV2)
    chunk = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    base = task.to(tl.int64) * runs
    rotation = tl.load(
        rotation_ptr + columns[:, None] * DV + chunk[None, :],
        mask=(columns < DV)[:, None] & (chunk < DV)[None, :],
        other=0.0,
    )
    dense = tl.load(parts_ptr + (base * R + slot)[:, None] * DV + chunk[None, :], mask=(chunk < DV)[None, :], other=0.0)
    every = tl.arange(0, RUNS2)
    where = (base + tl.minimum(every, runs - 1))[:, None] * R + slot[None, :]
    tops = tl.where((every < runs)[:, None], tl.load(top_ptr + where), float("-inf"))
    top = tl.max(tops, axis=0)
    if HAS_AUX:
        row = tl.minimum((task % row_blocks) * R + slot, group * queries - 1)
        aux = tl.load(s_aux_ptr + head * group + row // queries).to(tl.float32) * 1.4426950408889634
        top = tl.maximum(top, aux)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.load(total_ptr + where) * tl.exp2(tops - top[None, :]), axis=0)
    if HAS_AUX:
        total += tl.exp2(aux - top)
    dense *= tl.exp2(tl.load(top_ptr + base * R + slot) - top)[:, None]
    # Several runs side by side, summed once at the end: nothing in the loop waits for anything but its loads.
    sums = tl.zeros((SOME, R, DV2), tl.float32)
    for start in range(1, runs, SOME):
        run = start + tl.arange(0, SOME)
        at = (base + tl.minimum(run, runs - 1))[:, None] * R + slot[None, :]
        weight = tl.where((run < runs)[:, None], tl.exp2(tl.load(top_ptr + at) - top[None, :]), 0.0)
        into = parts_ptr + at[:, :, None] * DV + columns[None, None, :]
        sums += tl.load(into, mask=(columns < DV)[None, None, :], other=0.0) * weight[:, :, None]
    rotated = tl.sum(sums, axis=0)
    inverse = tl.where(total > 0.0, 1.0, 0.0) / tl.where(total > 0.0, total, 1.0)
    if R < 16:  # too few rows for a matrix product
        back = tl.sum(rotated[:, :, None] * rotation[None, :, :], axis=1)
    else:
        back = tl.dot(rotated, rotation, input_precision="tf32x3")
    lane = (task % row_blocks) * R + slot
    out = (back + dense) * inverse[:, None]
    place = (batch.to(tl.int64) * queries + lane % queries) * (heads * group) + head * group + lane // queries
    into = out_ptr + place[:, None] * DV + chunk[None, :]
    held = (lane < group * queries)[:, None] & (chunk < DV)[None, :]
    tl.store(into, out.to(out_ptr.dtype.element_ty), mask=held)
