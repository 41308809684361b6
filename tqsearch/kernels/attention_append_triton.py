"""Encoding whole blocks of keys or values in Triton: offset, rotation, levels, scales and packing in one launch.

What `kernels.encode` does in many, for the states of an attention layer in their own layout. Nothing waits for the
device. The rotation is a matrix product here, in float32, so a code may differ from the reference's where a rotated
coordinate lies within rounding of a boundary.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from tqsearch.kernels.attention_products_triton import float_product
from tqsearch.kernels.bands import BandTable
from tqsearch.plan import planes_of

TOKENS = 16  # of a program


@triton.jit
def _code(value, boundaries_ptr, WIDTH: tl.constexpr):
    """How many of the ascending 2^WIDTH - 1 boundaries are below the value, by halving."""
    code = tl.zeros(value.shape, tl.int32)
    for bit in tl.static_range(WIDTH):
        middle = code + (1 << (WIDTH - 1 - bit))
        code = tl.where(tl.load(boundaries_ptr + middle - 1) < value, middle, code)
    return code


@triton.jit
def _fold(fields, SIZE: tl.constexpr):
    """Fields (n, m) of SIZE bits to bytes (n, m SIZE / 8), in the order of `packing` along the second axis."""
    COUNT: tl.constexpr = 8 // SIZE
    place = tl.arange(0, COUNT)
    if SIZE == 1:  # 0, 1, 4, 5, 2, 3, 6, 7 from the low end: the middle and the high bit of the place change roles
        place = (place & 1) | ((place & 2) << 1) | ((place & 4) >> 1)
    wide = tl.reshape(fields, (fields.shape[0], fields.shape[1] // COUNT, COUNT))
    return tl.sum(wide << (place * SIZE)[None, None, :], axis=2).to(tl.uint8)


@triton.jit
def _store_plane(
    codes,  # (CHUNK, TOKENS) along the tokens, else (TOKENS, CHUNK)
    out_ptr,  # of the plane, in the block
    coordinate,  # the chunk's first, in its band
    token,  # the program's first, in its block
    row,  # bytes from one coordinate, or token, to the next
    SHIFT: tl.constexpr,
    SIZE: tl.constexpr,
    BAND: tl.constexpr,
    ALONG_TOKENS: tl.constexpr,
):
    """One plane of a chunk's codes."""
    packed = _fold((codes >> SHIFT) & ((1 << SIZE) - 1), SIZE)
    first = tl.arange(0, packed.shape[0])[:, None]
    second = tl.arange(0, packed.shape[1])[None, :]
    if ALONG_TOKENS:
        into = out_ptr + (coordinate + first) * row + token * SIZE // 8 + second
        inside = coordinate + first < BAND
    else:
        into = out_ptr + (token + first) * row + coordinate * SIZE // 8 + second
        inside = coordinate * SIZE // 8 + second < BAND * SIZE // 8
    tl.store(into, packed, mask=inside)


@triton.jit
def append_kernel(
    states_ptr,  # (B, H, n, D)
    offset_ptr,  # (H, D) float32
    rotation_ptr,  # (D, D) float32
    boundaries_ptr,  # (bands, 256) float32
    levels_ptr,  # (bands, 256) float32
    packed_ptr,  # uint8
    scales_ptr,  # (B, H, n) float32
    heads,
    count,
    states_b,
    states_h,
    states_t,
    DIM: tl.constexpr,
    DIM2: tl.constexpr,
    BANDS: tl.constexpr,  # (size, width, first coordinate, byte offset, bytes of a row and of all of the first plane)
    BYTES: tl.constexpr,  # of a block
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    ALONG_TOKENS: tl.constexpr,
):
    """TOKENS tokens of one head."""
    runs = count // TOKENS
    pair = (tl.program_id(0) // runs).to(tl.int64)
    first = (tl.program_id(0) % runs) * TOKENS
    batch, head = pair // heads, pair % heads
    tokens = first + tl.arange(0, TOKENS)
    columns = tl.arange(0, DIM2)
    at = states_ptr + batch * states_b + head * states_h + tokens[:, None].to(tl.int64) * states_t + columns[None, :]
    states = tl.load(at, mask=(columns < DIM)[None, :], other=0.0).to(tl.float32)
    if HAS_OFFSET:
        states -= tl.load(offset_ptr + head * DIM + columns, mask=columns < DIM, other=0.0)[None, :]
    largest = tl.max(tl.abs(states), axis=1)
    states /= tl.where(largest > 0.0, largest, 1.0)[:, None]  # so that no square overflows or vanishes
    length = tl.sqrt(tl.sum(states * states, axis=1))
    states *= (tl.sqrt(DIM * 1.0) / tl.where(length > 0.0, length, 1.0))[:, None]
    product = tl.zeros((TOKENS,), tl.float32)
    for b in tl.static_range(len(BANDS)):
        for start in tl.static_range(0, tl.constexpr(BANDS[b][0]), CHUNK):
            chunk = start + tl.arange(0, CHUNK)
            inside = chunk < BANDS[b][0]
            rotation = tl.load(
                rotation_ptr + (BANDS[b][2] + chunk)[None, :] * DIM + columns[:, None],
                mask=inside[None, :] & (columns < DIM)[:, None],
                other=0.0,
            )
            rotated = float_product(states, rotation)
            codes = _code(rotated, boundaries_ptr + b * 256, BANDS[b][1])
            codes = tl.where(inside[None, :], codes, 0)
            level = tl.load(levels_ptr + b * 256 + codes)
            product += tl.sum(tl.where(inside[None, :], rotated * level, 0.0), axis=1)
            if ALONG_TOKENS:
                codes = tl.trans(codes)
            out = packed_ptr + (pair * (count // BLOCK) + first // BLOCK) * BYTES + BANDS[b][3]
            token = first % BLOCK
            # fmt: off
            if BANDS[b][1] == 3:
                _store_plane(codes, out, start, token, BANDS[b][4], 0, 2, BANDS[b][0], ALONG_TOKENS)
                _store_plane(
                    codes, out + BANDS[b][5], start, token, BANDS[b][4] // 2, 2, 1, BANDS[b][0], ALONG_TOKENS)
            else:
                _store_plane(codes, out, start, token, BANDS[b][4], 0, BANDS[b][1], BANDS[b][0], ALONG_TOKENS)
            # fmt: on
    scale = largest * length * (tl.sqrt(DIM * 1.0) / tl.where(product > 0.0, product, float("inf")))
    tl.store(scales_ptr + pair * count + tokens, scale)


@lru_cache(maxsize=64)
def _cut(bands: tuple[tuple[int, int], ...], block: int, along_tokens: bool) -> tuple[tuple[tuple[int, ...], ...], int]:
    """BANDS and BYTES of bands given as (size, width)."""
    constants, first, byte = [], 0, 0
    for size, width in bands:
        if width:
            rows, codes = (size, block) if along_tokens else (block, size)
            row = codes * planes_of(width)[0] // 8
            constants.append((size, width, first, byte, row, rows * row))
        byte += size * block * width // 8
        first += size
    return tuple(constants), byte


def encode_blocks(
    states: Tensor,
    bands: tuple[BandTable, ...],
    rotation: Tensor,
    offset: Tensor | None,
    block: int,
    along_tokens: bool,
) -> tuple[Tensor, Tensor]:
    """Codes and scales of whole blocks of tokens.

    Args:
        states: (B, H, n, D) of any floating dtype, finite, the last axis dense; n a multiple of `block`.
        bands: tables of the rotated coordinates, sizes multiples of 8, widths 0 to 4 or 8.
        rotation: (D, D) float32; the rotated vector of x is rotation x.
        offset: (H, D) float32 taken off first, or None.
        block: tokens of a block, a multiple of 32.
        along_tokens: whether codes lie along the tokens of a block, as values do, or along D, as keys do.

    Returns:
        packed: as `Compressed.packed`.
        scales: (B, H, n) float32, |z| sqrt(D) / <R z sqrt(D) / |z|, levels>; 0 for z = 0.
    """
    batch, heads, count, dim = states.shape
    constants, nbytes = _cut(tuple((band.size, band.width) for band in bands), block, along_tokens)
    packed = torch.empty((batch, heads, count // block, nbytes), dtype=torch.uint8, device=states.device)
    scales = torch.empty((batch, heads, count), dtype=torch.float32, device=states.device)
    if scales.numel():
        boundaries, levels = _stacked(bands)
        append_kernel[(batch * heads * (count // TOKENS),)](
            states,
            rotation if offset is None else offset,
            rotation,
            boundaries,
            levels,
            packed,
            scales,
            heads,
            count,
            states.stride(0),
            states.stride(1),
            states.stride(2),
            DIM=dim,
            DIM2=max(16, triton.next_power_of_2(dim)),
            BANDS=constants,
            BYTES=nbytes,
            BLOCK=block,
            TOKENS=TOKENS,
            CHUNK=32,
            HAS_OFFSET=offset is not None,
            ALONG_TOKENS=along_tokens,
            num_warps=4,
        )
    return packed, scales


_tables: dict[tuple[int, ...], tuple[tuple[BandTable, ...], Tensor, Tensor]] = {}


def _stacked(bands: tuple[BandTable, ...]) -> tuple[Tensor, Tensor]:
    """Boundaries and levels of the bands that have bits, (bands, 256) float32; kept while the bands' tables live."""
    key = tuple(id(band.levels) for band in bands)
    kept = _tables.get(key)
    if kept is None:
        rows = [band for band in bands if band.width]
        boundaries, levels = (
            torch.stack([torch.nn.functional.pad(part, (0, 256 - len(part))) for part in parts])
            for parts in ([band.boundaries for band in rows], [band.levels for band in rows])
        )
        if len(_tables) >= 64:
            _tables.clear()
        kept = _tables[key] = (bands, boundaries, levels)  # holding the bands keeps their ids theirs
    return kept[1], kept[2]
