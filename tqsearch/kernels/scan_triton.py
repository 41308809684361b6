"""`scan` in Triton: the top k of estimated scores, without writing the score matrix.

Three steps. (1) One program for each tile of rows and of queries decodes the codes to int8 in registers, multiplies
them with int8 queries on the tensor cores, and writes one number: the tile's best score for each query. (2) The k tiles
of largest maximum hold the top k; `torch.topk` picks them. (3) Those tiles' rows are scored once more, by the same
integer arithmetic, and the k best of them are the result. Where the tiles are not many times k, step 1 writes the
scores themselves.

Trellis codes (`trellis_triton`) go through the same steps: their columns are loaded and decoded in another way.

The queries are rounded to int8 with a scale for each query and band. With `precision="exact"` levels and queries stay
float32.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from tqsearch.kernels import trellis_triton
from tqsearch.kernels.bands import BandTable, along_trellis
from tqsearch.kernels.decode_triton import COLUMN_DIMS, assembly, decode, slot_dims
from tqsearch.kernels.reference import merge_top_k
from tqsearch.plan import planes_of
from tqsearch.trellis import row_bytes

INTERPRETED = bool(triton.knobs.runtime.interpret)
TILE = 128  # rows a program scores, and of which it keeps one maximum
_BEST_K = 32  # the largest k whose best candidates one program picks


class Config(NamedTuple):
    """How a step is cut: queries a program, columns a step of its loop, warps, stages of the software pipeline."""

    block_q: int
    block_c: int
    num_warps: int
    num_stages: int


class Arranged(NamedTuple):
    """Queries as the kernels read them.

    Attributes:
        values: (q, slots) int8 (float32 when exact), each band's coordinates in the order of its parts, zeros where
            none is.
        alpha: (q, bands) float32, what a band's product is multiplied by.
        beta: (q, bands) float32, what is then added.
    """

    values: Tensor
    alpha: Tensor
    beta: Tensor


@triton.jit
def _columns(
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
    if WIDTH == 3:
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
    PARTS: tl.constexpr = 2 if SCALAR and WIDTH == 4 else (4 if SCALAR and WIDTH == 2 else (1 if WIDTH == 8 else 8))
    DTYPE: tl.constexpr = tl.float32 if EXACT else tl.int32
    if BLOCK_Q == 0:
        acc = tl.zeros((TILE,), DTYPE)
    else:
        acc = tl.zeros((TILE, BLOCK_Q), DTYPE)
    for start in range(0, COLUMNS, BLOCK_C):
        columns = start + tl.arange(0, BLOCK_C)
        valid = (columns < COLUMNS)[None, :]
        if SCALAR:
            x, y = _columns(
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
    BANDS: tl.constexpr,  # for each band (width, columns, byte offset, offset of the 1-bit plane, slot offset, 0);
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


class Layout(NamedTuple):
    """How bands are cut into columns and slots.

    Attributes:
        bands: what the kernels call BANDS.
        assemblies: what they call ASSEMBLIES.
        slots: (slots,) int32, the coordinate of each slot; the number of coordinates where there is none.
        ends: the end of each band's slots.
        tables: (bands, 256) int8, or float32 when exact.
        steps: (bands, 2) float32, each band's step and offset; see `BandTable`.
    """

    bands: tuple[tuple[int, int, int, int, int, int], ...]
    assemblies: tuple[str, ...]
    slots: Tensor
    ends: tuple[int, ...]
    tables: Tensor
    steps: Tensor


@lru_cache(maxsize=64)
def _layout(
    bands: tuple[tuple[int, int, str, tuple[float, ...], float, float], ...],
    block_c: int,
    exact: bool,
    aligned: bool,
    device: torch.device,
) -> Layout:
    """The layout of bands given as (size, width, codec, integers or levels by number, step, offset)."""
    assembled = not (exact or INTERPRETED or torch.version.cuda is None)
    on_path = [(size, width) for size, width, codec, *_ in bands if codec == "trellis"]
    if on_path:
        whole = all(size % 32 == 0 for size, _ in on_path)
    else:
        whole = all(size * p % (8 * block_c) == 0 for size, width, *_ in bands for p in planes_of(width))
    quad = assembled and aligned and whole
    dim = sum(size for size, *_ in bands)
    constants, assemblies, slots, tables = [], [], [], []
    first, slot = 0, 0
    path, f_plane, byte = 0, -(-sum(size for size, _ in on_path) // 8), row_bytes(on_path)
    for size, width, codec, values, _, _ in bands:
        if codec == "trellis":
            columns = -(-size // 8)
            constants.append((width, columns, path, f_plane, slot, trellis_triton.masks(width)))
            assemblies.append(trellis_triton.assembly(width) if quad else "")
            dims = trellis_triton.slot_dims(-(-columns // block_c) * block_c, quad)
            path += columns
            f_plane += columns * (width - 1)
        elif width:
            columns = -(-size // COLUMN_DIMS[width])
            padded = -(-columns // block_c) * block_c
            plane = -(-size * (2 if width == 3 else width) // 8)
            constants.append((width, columns, byte, plane, slot, 0))
            assemblies.append(assembly(width, [int(v) for v in values], quad) if assembled else "")
            dims = slot_dims(width, padded, quad)
            byte += plane + (-(-size // 8) if width == 3 else 0)
        if width:
            dims = dims.reshape(len(dims), -1, block_c).transpose(1, 0, 2).ravel()  # chunk by chunk, part by part
            slots.append(np.where(dims < size, first + dims, dim))
            tables.append(np.pad(np.array(values, np.float32 if exact else np.int8), (0, 256 - len(values))))
            slot += len(dims)
        first += size
    return Layout(
        tuple(constants),
        tuple(assemblies),
        torch.from_numpy(np.concatenate(slots).astype(np.int32)).to(device),
        tuple(np.cumsum([len(part) for part in slots]).tolist()),
        torch.from_numpy(np.stack(tables)).to(device),
        torch.tensor([[step, offset] for _, width, _, _, step, offset in bands if width], device=device),
    )


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


def _arrange(queries: Tensor, layout: Layout, exact: bool) -> Arranged:
    """Rotated queries (q, d) float32 in the order of the slots, rounded to int8 unless exact."""
    count, bands = len(queries), len(layout.bands)
    if exact:
        padded = torch.cat([queries, queries.new_zeros((count, 1))], dim=1)
        return Arranged(padded[:, layout.slots], queries.new_ones((count, bands)), queries.new_zeros((count, bands)))
    slots = len(layout.slots)
    values = torch.empty((count, slots), dtype=torch.int8, device=queries.device)
    factors = torch.empty((2, count, bands), dtype=torch.float32, device=queries.device)
    widest = max(end - band[4] for end, band in zip(layout.ends, layout.bands, strict=True))
    arrange_kernel[(count,)](
        queries.contiguous(),
        layout.slots,
        layout.steps,
        values,
        factors[0],
        factors[1],
        queries.shape[1],
        BANDS=layout.bands,
        ENDS=layout.ends,
        SLOTS=slots,
        BLOCK=triton.next_power_of_2(widest),
        num_warps=4,
    )
    return Arranged(values, factors[0], factors[1])


# Chosen on an H200 among twelve cuts a row; by the widest band's width and the queries a program, up to so many.
_CONFIGS: dict[int, tuple[tuple[int, Config], ...]] = {
    1: ((16, Config(16, 128, 4, 3)), (64, Config(64, 128, 4, 2)), (128, Config(128, 128, 4, 2))),
    2: ((16, Config(16, 64, 4, 3)), (64, Config(64, 64, 4, 3)), (128, Config(128, 64, 4, 3))),
    3: ((16, Config(16, 64, 4, 3)), (64, Config(64, 32, 4, 3)), (128, Config(128, 32, 4, 2))),
    4: (
        (1, Config(16, 128, 8, 3)),
        (16, Config(16, 128, 4, 3)),
        (64, Config(64, 64, 4, 3)),
        (128, Config(128, 128, 4, 2)),
    ),
    8: ((16, Config(16, 64, 4, 3)), (64, Config(64, 64, 4, 3)), (128, Config(128, 64, 4, 3))),
}
_EXACT = Config(16, 32, 4, 2)


# The same along a trellis.
_TRELLIS_CONFIGS: dict[int, tuple[tuple[int, Config], ...]] = {
    1: ((16, Config(16, 128, 4, 2)), (64, Config(64, 64, 4, 2)), (128, Config(128, 32, 4, 2))),
    2: ((16, Config(16, 32, 4, 3)), (64, Config(64, 32, 4, 3)), (128, Config(128, 32, 4, 2))),
    3: ((16, Config(16, 32, 4, 3)), (64, Config(64, 64, 4, 2)), (128, Config(128, 32, 4, 2))),
    4: ((16, Config(16, 32, 4, 3)), (64, Config(64, 64, 4, 2)), (128, Config(128, 32, 4, 2))),
}


def config_for(queries: int, bands: tuple[BandTable, ...], exact: bool) -> Config:
    """How a scan of so many queries is cut; the columns a step divide the planes' bytes where 32 or more can."""
    if exact:
        return _EXACT
    along = along_trellis(bands)
    widest = max(band.width for band in bands if band.codec == "trellis" or not along)
    choices = (_TRELLIS_CONFIGS if along else _CONFIGS)[widest]
    config = next((config for most, config in choices if queries <= most), choices[-1][1])
    planes = [band.size // 8 for band in bands if band.codec == "trellis"]
    if not along:
        planes = [band.size * plane // 8 for band in bands for plane in planes_of(band.width)]
    whole = next((c for c in (128, 64, 32) if c <= config.block_c and all(plane % c == 0 for plane in planes)), None)
    return config._replace(block_c=whole or min(config.block_c, 32 if along else 64))


def _entries(band: BandTable, exact: bool) -> tuple[tuple[float, ...], float, float]:
    """What a band's table holds, and what its products are multiplied by and less of: step and offset."""
    if exact:
        return tuple(band.levels.tolist()), band.step, band.offset
    if band.codec == "trellis":
        return trellis_triton.steps(band.width), band.step, trellis_triton.offset(band.width)
    return band.steps, band.step, band.offset


class Scanner:
    """One batch of queries over one run of rows: the steps of `scan`, with all that they share."""

    def __init__(
        self,
        queries: Tensor,
        packed: Tensor,
        scales: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        bands: tuple[BandTable, ...],
        exact: bool,
        config: Config | None = None,
    ) -> None:
        self.packed, self.scales, self.bias, self.exact = packed, scales, bias, exact
        self.mask = None if mask is None else mask.view(torch.uint8)
        self.config = config or config_for(len(queries), bands, exact)
        key = tuple((b.size, b.width, b.codec, *_entries(b, exact)) for b in bands)
        aligned = packed.stride(0) % 16 == 0 and packed.data_ptr() % 16 == 0
        self.layout = _layout(key, self.config.block_c, exact, aligned, packed.device)
        self.queries = _arrange(queries, self.layout, exact)

    def _shared(self, queries: slice, rows: slice) -> tuple[tuple[object, ...], dict[str, object]]:
        columns: tuple[Tensor | None, ...] = (self.packed, self.scales, self.bias, self.mask)
        parts = tuple(self.queries)
        if rows != slice(0, len(self.packed)):  # views are not free: a search by few queries is bound by the host
            columns = tuple(None if column is None else column[rows] for column in columns)
        if queries != slice(0, len(parts[0])):
            parts = tuple(part[queries] for part in parts)
        none = self.layout.tables
        arguments = (*(none if column is None else column for column in columns), *parts, none)
        constants = {
            "SLOTS": self.queries.values.shape[1],
            "BANDS": self.layout.bands,
            "ASSEMBLIES": self.layout.assemblies,
            "TILE": TILE,
            "BLOCK_C": self.config.block_c,
            "HAS_BIAS": self.bias is not None,
            "HAS_MASK": self.mask is not None,
            "EXACT": self.exact,
            "EVEN_ROWS": self.packed.stride(0) % 2 == 0 and all(band[2] % 2 == 0 for band in self.layout.bands),
            "num_warps": self.config.num_warps,
        }
        return arguments, constants

    def score(self, queries: slice, rows: slice, maxima: bool) -> Tensor:
        """Step 1: (q, tiles) maxima, or (q, rows) scores, float32."""
        count, n = queries.stop - queries.start, rows.stop - rows.start
        tiles = -(-n // TILE)
        out = torch.empty((count, tiles if maxima else n), dtype=torch.float32, device=self.packed.device)
        arguments, constants = self._shared(queries, rows)
        grid = (tiles * -(-count // self.config.block_q),)
        scan_kernel[grid](
            *arguments,
            out,
            n,
            count,
            self.packed.stride(0),
            out.stride(0),
            BLOCK_Q=self.config.block_q,
            MAXIMA=maxima,
            num_stages=self.config.num_stages,
            **constants,
        )
        return out

    def rescore(self, queries: slice, tiles: Tensor) -> Tensor:
        """Step 3: (q, k * TILE) float32, the scores of the rows of chosen tiles (q, k) int64."""
        out = torch.empty((tiles.shape[0], tiles.shape[1] * TILE), dtype=torch.float32, device=self.packed.device)
        arguments, constants = self._shared(queries, slice(0, len(self.packed)))
        rescore_kernel[(tiles.numel(),)](
            *arguments, tiles, out, len(self.packed), tiles.shape[1], self.packed.stride(0), **constants
        )
        return out


def scan(
    queries: Tensor,
    packed: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    bands: tuple[BandTable, ...],
    k: int,
    precision: str = "int8",
) -> tuple[Tensor, Tensor]:
    """See `kernels.scan`."""
    n, count = len(packed), len(queries)
    k = min(k, n)
    if count == 0 or n == 0:
        return queries.new_empty((count, k)), torch.empty((count, k), dtype=torch.int64, device=packed.device)
    scanner = Scanner(queries, packed, scales, bias, mask, bands, precision == "exact")
    floats = _numbers_held(packed)
    tiles = -(-n // TILE)
    if tiles < 4 * k:
        parts = [_top_of_scores(scanner, part, k, floats) for part in _split(count, max(1, floats // min(n, 1 << 16)))]
    else:
        parts = [_top_of_tiles(scanner, part, k, floats) for part in _split(count, max(1, floats // tiles))]
    scores, rows = parts[0] if len(parts) == 1 else (torch.cat(column) for column in zip(*parts, strict=True))
    return scores, rows


def _numbers_held(packed: Tensor) -> int:
    """How many float32 a step may hold at once: 2.5 % of the codes, and 4 MB."""
    return packed.numel() // 160 + (1 << 20)


def _split(count: int, most: int) -> list[slice]:
    """0 .. count in runs of at most `most`, rounded down to whole blocks of a program where there are any."""
    for block in (128, 64, 16):
        if most >= block:
            most -= most % block
            break
    return [slice(start, min(start + most, count)) for start in range(0, count, most)]


def _top_of_scores(scanner: Scanner, queries: slice, k: int, floats: int) -> tuple[Tensor, Tensor]:
    count = queries.stop - queries.start
    best = None
    for part in _split(len(scanner.packed), max(TILE, floats // count)):
        scores, rows = torch.topk(scanner.score(queries, part, False), min(k, part.stop - part.start), dim=1)
        found = (scores, rows + part.start)
        best = found if best is None else merge_top_k(*best, *found, k)
    assert best is not None
    return best[0], best[1].masked_fill(best[0] == -math.inf, -1)


def _top_of_tiles(scanner: Scanner, queries: slice, k: int, floats: int) -> tuple[Tensor, Tensor]:
    maxima = scanner.score(queries, slice(0, len(scanner.packed)), True)
    chosen = torch.topk(maxima, k, dim=1).indices
    scores, rows = [], []
    for part in _split(len(chosen), max(1, floats // (k * TILE))):
        tiles = chosen[part]
        candidates = scanner.rescore(slice(queries.start + part.start, queries.start + part.stop), tiles)
        top, row = _best(candidates, tiles) if k <= _BEST_K else _sorted(candidates, tiles)
        scores.append(top)
        rows.append(row)
    return (scores[0], rows[0]) if len(rows) == 1 else (torch.cat(scores), torch.cat(rows))


def _best(candidates: Tensor, tiles: Tensor) -> tuple[Tensor, Tensor]:
    """The top k of candidates (q, k * TILE) of tiles (q, k), k at most _BEST_K: scores and rows, -1 where -inf."""
    count, k = tiles.shape
    scores = torch.empty((count, k), dtype=torch.float32, device=tiles.device)
    rows = torch.empty_like(tiles)
    block = triton.next_power_of_2(k * TILE)
    best_kernel[(count,)](
        candidates, tiles, scores, rows, k, TILE=TILE, BLOCK=block, num_warps=max(1, min(8, block // 256))
    )
    return scores, rows


def _sorted(candidates: Tensor, tiles: Tensor) -> tuple[Tensor, Tensor]:
    """`_best` for any k."""
    scores, place = torch.topk(candidates, tiles.shape[1], dim=1)
    rows = tiles.gather(1, place // TILE) * TILE + place % TILE
    return scores, rows.masked_fill(scores == -math.inf, -1)
