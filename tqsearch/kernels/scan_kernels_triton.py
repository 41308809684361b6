"""The kernels of `scan_triton`: queries to int8, scores of tiles, scores of chosen tiles, the best of those."""

from __future__ import annotations

import triton
import triton.language as tl

from tqsearch.kernels import trellis_triton
from tqsearch.kernels.decode_triton import decode


@triton.jit
def columns_of(
    codes_ptr,
    rows,
    row_stride,
    columns,
    valid,
    WIDTH: tl.constexpr,
    BYTE: tl.constexpr,
    PLANE: tl.constexpr,
    EVEN: tl.constexpr,
    EVEN_ROWS: tl.constexpr,
):
    """The tiles x and y that `decode` takes, (rows, columns)."""
    base = codes_ptr + rows[:, None] * row_stride + BYTE
    if WIDTH == 3 or WIDTH == 6:
        wide = base.to(tl.pointer_type(tl.uint16)) + columns[None, :]
        if EVEN and EVEN_ROWS:
            x = tl.load(wide)
            y = tl.load(base + PLANE + columns[None, :])
        else:
            y = tl.load(base + PLANE + columns[None, :], mask=valid, other=0)
            if EVEN_ROWS:
                x = tl.load(wide, mask=valid, other=0)
            else:
                low = tl.load(base + 2 * columns[None, :], mask=valid, other=0).to(tl.uint16)
                high = tl.load(base + 2 * columns[None, :] + 1, mask=valid, other=0).to(tl.uint16)
                x = low | (high << 8)
    else:
        x = tl.load(base + columns[None, :]) if EVEN else tl.load(base + columns[None, :], mask=valid, other=0)
        y = x
    return x, y


@triton.jit
def _band_scores(
    codes_ptr,
    rows,  # (TILE,) int64
    row_stride,
    queries_ptr,
    queries,  # (BLOCK_Q,), or one number
    alpha_ptr,
    beta_ptr,
    tables_ptr,
    SLOTS: tl.constexpr,
    COUNT: tl.constexpr,  # bands
    BAND: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BYTE: tl.constexpr,  # where the band begins in a row; along a trellis its path
    PLANE: tl.constexpr,  # bytes of its first plane; along a trellis where its planes of f begin
    SLOT: tl.constexpr,  # where it begins in the arranged queries
    TAPS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_Q: tl.constexpr,  # 0: one query, by sums in place of a matrix product
    BLOCK_C: tl.constexpr,
    EXACT: tl.constexpr,
    EVEN_ROWS: tl.constexpr,
):
    """What one band adds to the scores: (TILE, BLOCK_Q) float32, or (TILE,) for one query."""
    SCALAR: tl.constexpr = TAPS == 0
    FOUR: tl.constexpr = SCALAR and (WIDTH == 2 or WIDTH == 6)
    PARTS: tl.constexpr = 2 if SCALAR and WIDTH == 4 else (4 if FOUR else (1 if WIDTH == 8 else 8))
    DTYPE: tl.constexpr = tl.float32 if EXACT else tl.int32
    if BLOCK_Q == 0:
        acc = tl.zeros((TILE,), DTYPE)
    else:
        acc = tl.zeros((TILE, BLOCK_Q), DTYPE)
    for start in range(0, COLUMNS, BLOCK_C):
        columns = start + tl.arange(0, BLOCK_C)
        valid = (columns < COLUMNS)[None, :]
        if SCALAR:
            x, y = columns_of(
                codes_ptr, rows, row_stride, columns, valid, WIDTH, BYTE, PLANE, COLUMNS % BLOCK_C == 0, EVEN_ROWS
            )
            parts = decode(x, y, tables_ptr + BAND * 256, WIDTH, ASSEMBLY)
        else:
            base = codes_ptr + rows[:, None] * row_stride
            # fmt: off
            parts = trellis_triton.decoded(
                base, columns, valid, tables_ptr + BAND * 256, TAPS, WIDTH, COLUMNS, BYTE, PLANE, ASSEMBLY,
                COLUMNS % BLOCK_C == 0)
            # fmt: on
        for p in tl.static_range(PARTS):
            slots = SLOT + start * PARTS + p * BLOCK_C + tl.arange(0, BLOCK_C)
            if BLOCK_Q == 0:
                value = tl.load(queries_ptr + queries.to(tl.int64) * SLOTS + slots)
                acc += tl.sum(parts[p].to(DTYPE) * value.to(DTYPE)[None, :], axis=1)
            else:
                value = tl.load(queries_ptr + queries[:, None] * SLOTS + slots[None, :])
                if EXACT:
                    acc = tl.dot(parts[p], tl.trans(value), acc, input_precision="ieee")
                else:
                    acc = tl.dot(parts[p], tl.trans(value), acc, out_dtype=tl.int32)
    alpha = tl.load(alpha_ptr + queries * COUNT + BAND)
    beta = tl.load(beta_ptr + queries * COUNT + BAND)
    if BLOCK_Q == 0:
        return acc.to(tl.float32) * alpha + beta
    else:
        return acc.to(tl.float32) * alpha[None, :] + beta[None, :]


@triton.jit
def scan_kernel(
    codes_ptr,  # (n, row_stride) uint8
    scales_ptr,  # (n,)
    bias_ptr,  # (n,) float32 or float16
    mask_ptr,  # (n,) uint8
    queries_ptr,  # (q, SLOTS)
    alpha_ptr,  # (q, len(BANDS)) float32
    beta_ptr,  # (q, len(BANDS)) float32
    tables_ptr,  # (len(BANDS), 256)
    out_ptr,  # (q, tiles), or (q, out_stride) scores
    n,
    q,
    row_stride,
    out_stride,
    SLOTS: tl.constexpr,
    BANDS: tl.constexpr,  # for each band (width, columns, byte offset, bytes of the first plane, slot offset, 0);
    # along a trellis (width, columns, offset of its path, of its planes of f, slot offset, `masks`)
    ASSEMBLIES: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    EXACT: tl.constexpr,
    MAXIMA: tl.constexpr,
    EVEN_ROWS: tl.constexpr,
):
    """Scores a tile of rows against a block of queries; writes their maxima, or the scores."""
    q_blocks = tl.cdiv(q, BLOCK_Q)
    tile = tl.program_id(0) // q_blocks
    q_block = tl.program_id(0) % q_blocks
    rows = tile.to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = rows < n
    safe = tl.where(inside, rows, n - 1)
    queries = q_block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q_inside = queries < q
    q_safe = tl.where(q_inside, queries, 0)
    score = tl.zeros((TILE, BLOCK_Q), tl.float32)
    for b in tl.static_range(len(BANDS)):
        # fmt: off
        score += _band_scores(
            codes_ptr, safe, row_stride, queries_ptr, q_safe, alpha_ptr, beta_ptr, tables_ptr, SLOTS, len(BANDS), b,
            BANDS[b][0], BANDS[b][1], BANDS[b][2], BANDS[b][3], BANDS[b][4], BANDS[b][5],
            tl.constexpr(ASSEMBLIES[b]),
            TILE, BLOCK_Q, BLOCK_C, EXACT, EVEN_ROWS)
        # fmt: on
    score *= tl.load(scales_ptr + safe).to(tl.float32)[:, None]
    if HAS_BIAS:
        score += tl.load(bias_ptr + safe).to(tl.float32)[:, None]
    if HAS_MASK:
        inside = inside & (tl.load(mask_ptr + safe) != 0)
    score = tl.where(inside[:, None], score, float("-inf"))
    if MAXIMA:
        tl.store(out_ptr + queries.to(tl.int64) * out_stride + tile, tl.max(score, axis=0), mask=q_inside)
    else:
        into = out_ptr + queries.to(tl.int64)[None, :] * out_stride + rows[:, None]
        tl.store(into, score, mask=q_inside[None, :] & (rows < n)[:, None])


@triton.jit
def rescore_kernel(
    codes_ptr,  # (n, row_stride) uint8
    scales_ptr,  # (n,)
    bias_ptr,  # (n,) float32 or float16
    mask_ptr,  # (n,) uint8
    queries_ptr,  # (q, SLOTS)
    alpha_ptr,  # (q, len(BANDS)) float32
    beta_ptr,  # (q, len(BANDS)) float32
    tables_ptr,  # (len(BANDS), 256)
    tiles_ptr,  # (q, k) int64, the chosen tiles
    out_ptr,  # (q, k, TILE) float32
    n,
    k,
    row_stride,
    SLOTS: tl.constexpr,
    BANDS: tl.constexpr,
    ASSEMBLIES: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    EXACT: tl.constexpr,
    EVEN_ROWS: tl.constexpr,
):
    """Scores one chosen tile of rows against one query."""
    query = tl.program_id(0) // k
    tile = tl.load(tiles_ptr + tl.program_id(0).to(tl.int64))
    rows = tile * TILE + tl.arange(0, TILE)
    inside = rows < n
    safe = tl.where(inside, rows, n - 1)
    score = tl.zeros((TILE,), tl.float32)
    for b in tl.static_range(len(BANDS)):
        # fmt: off
        score += _band_scores(
            codes_ptr, safe, row_stride, queries_ptr, query, alpha_ptr, beta_ptr, tables_ptr, SLOTS, len(BANDS), b,
            BANDS[b][0], BANDS[b][1], BANDS[b][2], BANDS[b][3], BANDS[b][4], BANDS[b][5],
            tl.constexpr(ASSEMBLIES[b]),
            TILE, 0, BLOCK_C, EXACT, EVEN_ROWS)
        # fmt: on
    score *= tl.load(scales_ptr + safe).to(tl.float32)
    if HAS_BIAS:
        score += tl.load(bias_ptr + safe).to(tl.float32)
    if HAS_MASK:
        inside = inside & (tl.load(mask_ptr + safe) != 0)
    score = tl.where(inside, score, float("-inf"))
    tl.store(out_ptr + tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE), score)


@triton.jit
def best_kernel(
    candidates_ptr,  # (q, k, TILE) float32
    tiles_ptr,  # (q, k) int64, the candidates' tiles
    scores_ptr,  # (q, k) float32
    rows_ptr,  # (q, k) int64
    k,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The k best candidates of one query, one after the other: a launch in place of a sort and six small ones."""
    query = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    scores = tl.load(candidates_ptr + query * k * TILE + place, mask=place < k * TILE, other=float("-inf"))
    for i in range(k):
        best, at = tl.max(scores, axis=0, return_indices=True)
        row = tl.load(tiles_ptr + query * k + at // TILE) * TILE + at % TILE
        tl.store(scores_ptr + query * k + i, best)
        tl.store(rows_ptr + query * k + i, tl.where(best > float("-inf"), row, -1))
        scores = tl.where(place == at, float("-inf"), scores)


@triton.jit
def arrange_kernel(
    queries_ptr,  # (q, dim) float32, rotated
    slots_ptr,  # (SLOTS,) int32, the coordinate of each slot, dim where there is none
    steps_ptr,  # (bands, 2) float32: step and offset of each band
    values_ptr,  # (q, SLOTS) int8
    alpha_ptr,  # (q, bands) float32
    beta_ptr,  # (q, bands) float32
    dim,
    BANDS: tl.constexpr,
    ENDS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rounds one query to int8 in the order of the slots, a scale for each band."""
    query = tl.program_id(0).to(tl.int64)
    for b in tl.static_range(len(ENDS)):
        slots = BANDS[b][4] + tl.arange(0, BLOCK)
        inside = slots < ENDS[b]
        coordinate = tl.load(slots_ptr + slots, mask=inside, other=dim)
        value = tl.load(queries_ptr + query * dim + coordinate, mask=coordinate < dim, other=0.0)
        scale = tl.max(tl.abs(value), axis=0) / 127.0
        rounded = tl.floor(value / tl.where(scale > 0.0, scale, 1.0) + 0.5)
        tl.store(values_ptr + query * SLOTS + slots, rounded.to(tl.int8), mask=inside)
        alpha = scale * tl.load(steps_ptr + 2 * b)
        tl.store(alpha_ptr + query * len(ENDS) + b, alpha)
        tl.store(beta_ptr + query * len(ENDS) + b, -alpha * tl.load(steps_ptr + 2 * b + 1) * tl.sum(rounded, axis=0))
