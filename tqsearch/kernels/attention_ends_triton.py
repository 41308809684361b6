"""The two ends of decode attention: queries rotated and rounded before it, runs merged and rotated back after it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def prepare(
    query_ptr,  # (B, Hq, Tq, DK)
    rotation_ptr,  # (SLOTS, DK) float32: the rotation's rows in the order of the slots, zero where there is none
    offset_ptr,  # (H, DK) float32
    digits_ptr,  # (B H row blocks, 2 R, SLOTS) int8
    factors_ptr,  # (B H row blocks, 2 + bands, R) float32
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
    """Rotates R rows, and rounds them to |q| / 16256, which no coordinate exceeds: two digits, hi * 128 + lo."""
    WIDE: tl.constexpr = 16 if R < 16 else R
    COUNT: tl.constexpr = len(BANDS)
    task = tl.program_id(0)
    pair = (task // row_blocks).to(tl.int64)
    batch, head = pair // heads, pair % heads
    slot = tl.arange(0, WIDE)
    lane = (task % row_blocks) * R + slot
    held = (slot < R) & (lane < group * queries)
    row = tl.where(held, lane, 0)
    columns = tl.arange(0, DK2)
    at = query_ptr + batch * query_b + (head * group + row // queries) * query_h + (row % queries) * query_t
    query = tl.load(at[:, None] + columns[None, :], mask=held[:, None] & (columns < DK)[None, :], other=0.0)
    query = query.to(tl.float32)
    norm = tl.sqrt(tl.sum(query * query, axis=1))
    unit = tl.where(norm > 0.0, 16256.0, 0.0) / tl.where(norm > 0.0, norm, 1.0)
    factors = factors_ptr + task * ((2 + COUNT) * R) + slot
    bias = tl.zeros((WIDE,), tl.float32)
    for b in tl.static_range(COUNT):
        total = tl.zeros((WIDE,), tl.float32)
        for start in tl.static_range(0, tl.constexpr(BANDS[b][6]), CHUNK):
            slots = BANDS[b][5] + start + tl.arange(0, CHUNK)
            rotation = tl.load(
                rotation_ptr + slots[None, :] * DK + columns[:, None], mask=(columns < DK)[:, None], other=0.0
            )
            rounded = tl.floor(tl.dot(query, rotation, input_precision="tf32x3") * unit[:, None] + 0.5)
            high = tl.floor(rounded * 0.0078125 + 0.5)
            low = rounded - high * 128.0
            into = digits_ptr + (task.to(tl.int64) * (2 * R) + 2 * slot)[:, None] * SLOTS + slots[None, :]
            tl.store(into, high.to(tl.int8), mask=(slot < R)[:, None])
            tl.store(into + SLOTS, low.to(tl.int8), mask=(slot < R)[:, None])
            total += tl.sum(rounded, axis=1)
        scale = norm * (factor * STEPS[b] / 16256.0)
        tl.store(factors + (2 + b) * R, scale, mask=slot < R)
        bias -= scale * OFFSETS[b] * total
    tl.store(factors, bias, mask=slot < R)
    constant = tl.zeros((WIDE,), tl.float32)
    if HAS_OFFSET:
        offset = tl.load(offset_ptr + head * DK + columns, mask=columns < DK, other=0.0)
        constant = tl.sum(query * offset[None, :], axis=1) * factor
    tl.store(factors + R, constant, mask=slot < R)


@triton.jit
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
    WIDE: tl.constexpr = 16 if R < 16 else R
    task = tl.program_id(0)
    pair = task // row_blocks
    batch, head = pair // heads, pair % heads
    slot = tl.arange(0, WIDE)
    lane = (task % row_blocks) * R + slot
    held = (slot < R) & (lane < group * queries)
    every = tl.arange(0, RUNS2)
    base = task.to(tl.int64) * runs
    inside = (every < runs)[:, None] & (slot < R)[None, :]
    where = (base + every)[:, None] * R + slot[None, :]
    tops = tl.load(top_ptr + where, mask=inside, other=float("-inf"))
    totals = tl.load(total_ptr + where, mask=inside, other=0.0)
    highest = tl.max(tops, axis=0)
    if HAS_AUX:
        row = tl.where(held, lane, 0)
        aux = tl.load(s_aux_ptr + head * group + row // queries).to(tl.float32) * 1.4426950408889634
        highest = tl.maximum(highest, aux)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.sum(tl.exp2(tops - highest[None, :]) * totals, axis=0)
    if HAS_AUX:
        total += tl.exp2(aux - highest)
    columns = tl.arange(0, DV2)
    rotated = tl.zeros((WIDE, DV2), tl.float32)
    kept = (slot < R)[:, None] & (columns < DV)[None, :]
    for start in range(1, runs, SOME):
        run = start + tl.arange(0, SOME)
        there = (run < runs)[:, None] & (slot < R)[None, :]
        at = (base + run)[:, None] * R + slot[None, :]
        weight = tl.exp2(tl.load(top_ptr + at, mask=there, other=float("-inf")) - highest[None, :])
        part = tl.load(
            parts_ptr + at[:, :, None] * DV + columns[None, None, :],
            mask=there[:, :, None] & (columns < DV)[None, None, :],
            other=0.0,
        )
        rotated += tl.sum(part * weight[:, :, None], axis=0)
    chunk = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    rotation = tl.load(
        rotation_ptr + columns[:, None] * DV + chunk[None, :],
        mask=(columns < DV)[:, None] & (chunk < DV)[None, :],
        other=0.0,
    )
    out = tl.dot(tl.where(kept, rotated, 0.0), rotation, input_precision="tf32x3")
    dense = tl.load(
        parts_ptr + (base * R + slot)[:, None] * DV + chunk[None, :],
        mask=(slot < R)[:, None] & (chunk < DV)[None, :],
        other=0.0,
    )
    first = tl.exp2(tl.load(top_ptr + base * R + slot, mask=slot < R, other=float("-inf")) - highest)
    out = (out + dense * first[:, None]) * (tl.where(total > 0.0, 1.0, 0.0) / tl.where(total > 0.0, total, 1.0))[:, None]
    into = out_ptr + ((batch.to(tl.int64) * queries + lane % queries) * (heads * group) + head * group + lane // queries) * DV
    tl.store(
        into[:, None] + chunk[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=held[:, None] & (chunk < DV)[None, :],
    )
