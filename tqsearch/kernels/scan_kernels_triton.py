"""The kernels of `scan_triton` that score: queries to int8, scores of tiles, scores of chosen tiles."""

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
def _parts(
    codes_ptr,
    rows,  # (TILE,) int64
    start,  # the first column
    tables_ptr,
    ROW: tl.constexpr,
    BAND: tl.constexpr,
    CONSTANTS: tl.constexpr,  # of the band; see `scan_kernel`
    ASSEMBLY: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EVEN_ROWS: tl.constexpr,
):
    """Some columns of a band of some rows, decoded."""
    WIDTH: tl.constexpr = CONSTANTS[0]
    COLUMNS: tl.constexpr = CONSTANTS[1]
    EVEN: tl.constexpr = COLUMNS % BLOCK_C == 0
    columns = start + tl.arange(0, BLOCK_C)
    valid = (columns < COLUMNS)[None, :]
    table = tables_ptr + BAND * 256
    if CONSTANTS[5] == 0:
        x, y = columns_of(codes_ptr, rows, ROW, columns, valid, WIDTH, CONSTANTS[2], CONSTANTS[3], EVEN, EVEN_ROWS)
        return decode(x, y, table, WIDTH, ASSEMBLY)
    else:
        base = codes_ptr + rows[:, None] * ROW
        # fmt: off
        return trellis_triton.decoded(
            base, columns, valid, table, CONSTANTS[5], WIDTH, COLUMNS, CONSTANTS[2], CONSTANTS[3], ASSEMBLY, EVEN)
        # fmt: on


@triton.jit
def _query_pieces(values_ptr, queries, SLOTS: tl.constexpr, BLOCK_C: tl.constexpr):
    """The arranged queries, BLOCK_C slots a piece: loaded once, they stay in shared memory."""
    pieces = ()
    for piece in tl.static_range(SLOTS // BLOCK_C):
        slots = piece * BLOCK_C + tl.arange(0, BLOCK_C)
        value = tl.load(values_ptr + queries[:, None] * SLOTS + slots[None, :])
        pieces = pieces + (value,)  # type: ignore[assignment]  # noqa: RUF005
    return pieces


@triton.jit
def _product(part, queries, acc, EXACT: tl.constexpr):
    if EXACT:
        return tl.dot(part, tl.trans(queries), acc, input_precision="ieee")
    else:
        return tl.dot(part, tl.trans(queries), acc, out_dtype=tl.int32)


@triton.jit
def _band_products(
    codes_ptr,
    rows,
    values_ptr,
    query,
    pieces,
    acc,  # (TILE, BLOCK_Q)
    tables_ptr,
    ROW: tl.constexpr,
    SLOTS: tl.constexpr,
    BAND: tl.constexpr,
    CONSTANTS: tl.constexpr,  # of the band; see `scan_kernel`
    ASSEMBLY: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
    RESIDENT: tl.constexpr,
    EXACT: tl.constexpr,
    EVEN_ROWS: tl.constexpr,
):
    """Adds the sums over one band of levels times query to `acc`; a function, as bands differ in their types."""
    SLOT: tl.constexpr = CONSTANTS[4]
    # fmt: off
    if RESIDENT:
        for c in tl.static_range((CONSTANTS[1] + BLOCK_C - 1) // BLOCK_C):
            parts = _parts(codes_ptr, rows, c * BLOCK_C, tables_ptr, ROW, BAND, CONSTANTS, ASSEMBLY, BLOCK_C, EVEN_ROWS)
            for p in tl.static_range(len(parts)):
                acc = _product(parts[p], pieces[SLOT // BLOCK_C + c * len(parts) + p], acc, EXACT)
    else:
        for start in tl.range(0, CONSTANTS[1], BLOCK_C, num_stages=STAGES):
            parts = _parts(codes_ptr, rows, start, tables_ptr, ROW, BAND, CONSTANTS, ASSEMBLY, BLOCK_C, EVEN_ROWS)
            for p in tl.static_range(len(parts)):
                slots = SLOT + start * len(parts) + p * BLOCK_C + tl.arange(0, BLOCK_C)
                value = tl.load(values_ptr + query[:, None] * SLOTS + slots[None, :])
                acc = _product(parts[p], value, acc, EXACT)
    # fmt: on
    return acc


@triton.jit
def _band_sums(
    codes_ptr,
    rows,
    values_ptr,
    query,
    acc,  # (ROWS,)
    tables_ptr,
    ROW: tl.constexpr,
    SLOTS: tl.constexpr,
    BAND: tl.constexpr,
    CONSTANTS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EXACT: tl.constexpr,
    EVEN_ROWS: tl.constexpr,
):
    """`_band_products` for one query, by sums in place of a matrix product."""
    DTYPE: tl.constexpr = tl.float32 if EXACT else tl.int32
    for start in range(0, CONSTANTS[1], BLOCK_C):
        parts = _parts(codes_ptr, rows, start, tables_ptr, ROW, BAND, CONSTANTS, ASSEMBLY, BLOCK_C, EVEN_ROWS)
        for p in tl.static_range(len(parts)):
            slots = CONSTANTS[4] + start * len(parts) + p * BLOCK_C + tl.arange(0, BLOCK_C)
            value = tl.load(values_ptr + query * SLOTS + slots)
            acc += tl.sum(parts[p].to(DTYPE) * value.to(DTYPE)[None, :], axis=1)
    return acc


@triton.jit
def _row_terms(scales_ptr, bias_ptr, mask_ptr, rows, inside, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr):
    """What the sums of rows are multiplied by, and what is then added, -inf where no score is wanted."""
    bias = tl.where(inside, 0.0, float("-inf"))
    if HAS_BIAS:
        bias += tl.load(bias_ptr + rows).to(tl.float32)
    if HAS_MASK:
        bias = tl.where(tl.load(mask_ptr + rows) != 0, bias, float("-inf"))
    return tl.load(scales_ptr + rows).to(tl.float32), bias


@triton.jit
def _score_tile(
    tile,
    pieces,  # of `_query_pieces` if RESIDENT
    codes_ptr,
    scales_ptr,
    bias_ptr,
    mask_ptr,
    values_ptr,
    alpha_ptr,
    beta_ptr,
    tables_ptr,
    out_ptr,
    first_row,
    n,
    query,  # (BLOCK_Q,)
    lane,  # (BLOCK_Q,), counted from the first query
    q,
    alpha_stride,
    out_stride,
    ROW: tl.constexpr,
    SLOTS: tl.constexpr,
    BANDS: tl.constexpr,
    ASSEMBLIES: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
    RESIDENT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    EXACT: tl.constexpr,
    MAXIMA: tl.constexpr,
    EVEN_ROWS: tl.constexpr,
):
    """Scores one tile of rows against a block of queries; writes their maxima, or the scores."""
    place = tile * TILE + tl.arange(0, TILE)
    inside = place < n
    rows = (first_row + tl.where(inside, place, n - 1)).to(tl.int64)
    score = tl.zeros((TILE, BLOCK_Q), tl.float32)
    for run in tl.static_range(BANDS[len(BANDS) - 1][6] + 1):
        acc = tl.zeros((TILE, BLOCK_Q), tl.float32 if EXACT else tl.int32)
        for b in tl.static_range(len(BANDS)):
            if BANDS[b][6] == run:
                # fmt: off
                acc = _band_products(
                    codes_ptr, rows, values_ptr, query, pieces, acc, tables_ptr, ROW, SLOTS, b, tl.constexpr(BANDS[b]),
                    tl.constexpr(ASSEMBLIES[b]), BLOCK_C, STAGES, RESIDENT, EXACT, EVEN_ROWS)
                # fmt: on
        product = acc.to(tl.float32) * tl.load(alpha_ptr + run * alpha_stride + query)[None, :]
        score = product if run == 0 else score + product
    scale, bias = _row_terms(scales_ptr, bias_ptr, mask_ptr, rows, inside, HAS_BIAS, HAS_MASK)
    score = (score + tl.load(beta_ptr + query)[None, :]) * scale[:, None] + bias[:, None]
    if MAXIMA:
        tl.store(out_ptr + lane * out_stride + tile, tl.max(score, axis=0), mask=lane < q)
    else:
        into = out_ptr + lane.to(tl.int64)[None, :] * out_stride + place[:, None]
        tl.store(into, score, mask=(lane < q)[None, :] & inside[:, None])


@triton.jit(do_not_specialize=["first_row", "n", "q", "out_stride", "programs"])
def scan_kernel(
    codes_ptr,  # (rows, ROW) uint8
    scales_ptr,  # (rows,)
    bias_ptr,  # (rows,) float32 or float16
    mask_ptr,  # (rows,) uint8
    values_ptr,  # (queries, SLOTS)
    alpha_ptr,  # (runs, alpha_stride) float32
    beta_ptr,  # (alpha_stride,) float32
    tables_ptr,  # (len(BANDS), 256)
    out_ptr,  # (q, out_stride) float32: maxima of tiles, or scores
    first_row,
    n,  # rows from first_row on
    first_query,  # a multiple of 16
    q,  # queries from there on; there is memory of queries beyond, BLOCK_Q more
    alpha_stride,  # a multiple of 16
    out_stride,
    programs,  # for each block of queries
    ROW: tl.constexpr,  # bytes from one row to the next
    SLOTS: tl.constexpr,
    BANDS: tl.constexpr,  # for each band (width, columns, byte offset, bytes of the first plane, slot offset, 0, run);
    # along a trellis (width, columns, offset of its path, of its planes of f, slot offset, `masks`, run)
    ASSEMBLIES: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
    RESIDENT: tl.constexpr,  # queries stay in shared memory, and codes are loaded some tiles ahead
    MANY: tl.constexpr,  # a program takes every so many tiles; else there is one for each
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    EXACT: tl.constexpr,
    MAXIMA: tl.constexpr,
    EVEN_ROWS: tl.constexpr,
):
    """Scores tiles of rows against a block of queries; writes their maxima, or the scores."""
    q_blocks = tl.cdiv(q, BLOCK_Q)
    program = tl.program_id(0) // q_blocks
    lane = tl.program_id(0) % q_blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    query = first_query + lane
    # fmt: off
    if MANY:
        pieces = _query_pieces(values_ptr, query, SLOTS if RESIDENT else 0, BLOCK_C)
        turns = tl.cdiv(tl.cdiv(n, TILE) - program, programs)
        for turn in tl.range(0, turns, num_stages=STAGES if RESIDENT else 1):
            _score_tile(
                program + turn * programs, pieces, codes_ptr, scales_ptr, bias_ptr, mask_ptr, values_ptr, alpha_ptr,
                beta_ptr, tables_ptr, out_ptr, first_row, n, query, lane, q, alpha_stride, out_stride, ROW, SLOTS,
                BANDS, ASSEMBLIES, TILE, BLOCK_Q, BLOCK_C, STAGES, RESIDENT, HAS_BIAS, HAS_MASK, EXACT, MAXIMA,
                EVEN_ROWS)
    else:
        _score_tile(
            program, (), codes_ptr, scales_ptr, bias_ptr, mask_ptr, values_ptr, alpha_ptr, beta_ptr, tables_ptr,
            out_ptr, first_row, n, query, lane, q, alpha_stride, out_stride, ROW, SLOTS, BANDS, ASSEMBLIES, TILE,
            BLOCK_Q, BLOCK_C, STAGES, RESIDENT, HAS_BIAS, HAS_MASK, EXACT, MAXIMA, EVEN_ROWS)
    # fmt: on


@triton.jit(do_not_specialize=["first_query", "n", "k", "alpha_stride"])
def rescore_kernel(
    codes_ptr,  # (rows, ROW) uint8
    scales_ptr,  # (rows,)
    bias_ptr,  # (rows,) float32 or float16
    mask_ptr,  # (rows,) uint8
    values_ptr,  # (queries, SLOTS)
    alpha_ptr,  # (runs, alpha_stride) float32
    beta_ptr,  # (alpha_stride,) float32
    tables_ptr,  # (len(BANDS), 256)
    tiles_ptr,  # (q, k) int64, the chosen tiles
    out_ptr,  # (q, k, TILE) float32
    first_query,
    n,
    k,
    alpha_stride,
    ROW: tl.constexpr,
    SLOTS: tl.constexpr,
    BANDS: tl.constexpr,
    ASSEMBLIES: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,  # of a program, a part of a tile
    BLOCK_C: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    EXACT: tl.constexpr,
    EVEN_ROWS: tl.constexpr,
):
    """Scores rows of one chosen tile against one query, by sums in place of a matrix product."""
    chosen = tl.program_id(0) // (TILE // ROWS)
    within = tl.program_id(0) % (TILE // ROWS) * ROWS + tl.arange(0, ROWS)
    query = (first_query + chosen // k).to(tl.int64)
    place = tl.load(tiles_ptr + chosen.to(tl.int64)) * TILE + within
    inside = place < n
    rows = tl.where(inside, place, n - 1)
    score = tl.zeros((ROWS,), tl.float32)
    for run in tl.static_range(BANDS[len(BANDS) - 1][6] + 1):
        acc = tl.zeros((ROWS,), tl.float32 if EXACT else tl.int32)
        for b in tl.static_range(len(BANDS)):
            if BANDS[b][6] == run:
                # fmt: off
                acc = _band_sums(
                    codes_ptr, rows, values_ptr, query, acc, tables_ptr, ROW, SLOTS, b, tl.constexpr(BANDS[b]),
                    tl.constexpr(ASSEMBLIES[b]), BLOCK_C, EXACT, EVEN_ROWS)
                # fmt: on
        product = acc.to(tl.float32) * tl.load(alpha_ptr + run * alpha_stride + query)
        score = product if run == 0 else score + product
    scale, bias = _row_terms(scales_ptr, bias_ptr, mask_ptr, rows, inside, HAS_BIAS, HAS_MASK)
    score = (score + tl.load(beta_ptr + query)) * scale + bias
    tl.store(out_ptr + chosen.to(tl.int64) * TILE + within, score)


@triton.jit
def _in_slots(queries_ptr, slots_ptr, query, there, dim, FIRST: tl.constexpr, END: tl.constexpr, BLOCK: tl.constexpr):
    """The coordinates of a query in a band's slots, (BLOCK,), and which slots these are."""
    slots = FIRST + tl.arange(0, BLOCK)
    coordinate = tl.load(slots_ptr + slots, mask=slots < END, other=dim)
    return tl.load(queries_ptr + query * dim + coordinate, mask=coordinate < there, other=0.0), slots


@triton.jit(do_not_specialize=["q", "dim", "alpha_stride"])
def arrange_kernel(
    queries_ptr,  # (q, dim) float32, rotated
    slots_ptr,  # (SLOTS,) int32, the coordinate of each slot, dim where there is none
    steps_ptr,  # (bands, 2) float32: step and offset of each band
    values_ptr,  # (q, SLOTS) int8
    alpha_ptr,  # (runs, alpha_stride) float32
    beta_ptr,  # (alpha_stride,) float32
    q,
    dim,
    alpha_stride,
    BANDS: tl.constexpr,
    ENDS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rounds one query to int8 in the order of the slots, a unit for each run; zeros where there is no query.

    A band's largest coordinate, of 127 parts, times its step is the least unit that it can have; a run's is the largest
    of these.
    """
    query = tl.program_id(0).to(tl.int64)
    there = tl.where(query < q, dim, 0)  # coordinates
    beta = 0.0
    for run in tl.static_range(BANDS[len(BANDS) - 1][6] + 1):
        unit = 0.0
        for b in tl.static_range(len(BANDS)):
            if BANDS[b][6] == run:
                value, slots = _in_slots(queries_ptr, slots_ptr, query, there, dim, BANDS[b][4], ENDS[b], BLOCK)
                least = tl.max(tl.abs(value), axis=0) / 127.0 * tl.abs(tl.load(steps_ptr + 2 * b))
                unit = tl.maximum(unit, least)
        for b in tl.static_range(len(BANDS)):
            if BANDS[b][6] == run:
                value, slots = _in_slots(queries_ptr, slots_ptr, query, there, dim, BANDS[b][4], ENDS[b], BLOCK)
                step = tl.load(steps_ptr + 2 * b)
                scale = tl.max(tl.abs(value), axis=0) / 127.0
                scale = tl.where(scale * tl.abs(step) == unit, scale, unit / tl.abs(step))
                rounded = tl.floor(value / tl.where(scale > 0.0, scale, 1.0) + 0.5)
                rounded = tl.where(step < 0.0, -rounded, rounded)
                tl.store(values_ptr + query * SLOTS + slots, rounded.to(tl.int8), mask=slots < ENDS[b])
                beta -= unit * tl.load(steps_ptr + 2 * b + 1) * tl.sum(rounded, axis=0)
        tl.store(alpha_ptr + run * alpha_stride + query, unit)
    tl.store(beta_ptr + query, beta)
