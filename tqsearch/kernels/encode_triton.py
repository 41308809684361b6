"""`encode` in Triton: a row is read once, and its codes, norm and dot are written once; all between stays on the chip.

A program holds whole rows, padded to a power of two. The randomized Hadamard transform is a chain of butterflies over
the bits of a coordinate's number. The blocks of a dimension that is no power of two need no care of their own: they
begin at multiples of twice their size, so the butterflies of a bit are those of the coordinates below the largest
multiple of twice that bit's value. Bits are taken upwards and downwards in turn, so that a round begins with those that
the last one left within a thread.

What bounds it is arithmetic, not memory: see `docs/GPU.md`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tqsearch.kernels.bands import BandTable, row_bytes
from tqsearch.plan import planes_of

_PROGRAM = 1024  # numbers a warp holds: 32 a thread
_PROGRAMS = 1 << 12  # at most, where rows are permuted through scratch memory: each then goes from block to block
_BYTE = 8  # coordinates whose planes end on whole bytes, whatever their width


@triton.jit
def _butterfly(x, ROWS: tl.constexpr, PADDED: tl.constexpr, DIM: tl.constexpr, BIT: tl.constexpr):
    """Sums and differences of the pairs of coordinates that differ in one bit, where a block has that bit."""
    PREFIX: tl.constexpr = (DIM >> (BIT + 1)) << (BIT + 1)
    if PREFIX == 0:
        return x
    else:
        y = tl.permute(tl.reshape(x, (ROWS, PADDED >> (BIT + 1), 2, 1 << BIT)), (0, 1, 3, 2))
        low, high = tl.split(y)
        y = tl.reshape(tl.permute(tl.join(low + high, low - high), (0, 1, 3, 2)), (ROWS, PADDED))
        if PREFIX == PADDED:
            return y
        else:
            return tl.where((tl.arange(0, PADDED) < PREFIX)[None, :], y, x)


@triton.jit
def _normalised(x, DIM: tl.constexpr):
    """Rows scaled to squared norm DIM, and their norms; squares neither overflow nor vanish, zero rows stay zero."""
    field = (tl.max(tl.abs(x), axis=1).to(tl.int32, bitcast=True) >> 23) & 255
    exponent = tl.minimum(tl.maximum(field - 126, -125), 126)
    x = x * ((127 - exponent) << 23).to(tl.float32, bitcast=True)[:, None]
    length = tl.sqrt_rn(tl.sum(x * x, axis=1))
    root = tl.sqrt_rn(tl.full(length.shape, DIM, tl.float32))
    factor = tl.where(length != 0.0, tl.div_rn(root, tl.where(length != 0.0, length, 1.0)), 0.0)
    return x * factor[:, None], length * ((127 + exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _first_bits(x, boundaries_ptr, WIDTH: tl.constexpr):
    """The first three steps of the search for a code, among boundaries held as numbers: no look-up for each x."""
    HALF: tl.constexpr = 1 << (WIDTH - 1)
    first = x > tl.load(boundaries_ptr + HALF - 1)
    code = tl.where(first, HALF, 0)
    if WIDTH > 1:
        QUARTER: tl.constexpr = HALF // 2
        low, high = tl.load(boundaries_ptr + QUARTER - 1), tl.load(boundaries_ptr + HALF + QUARTER - 1)
        second = x > tl.where(first, high, low)
        code += tl.where(second, QUARTER, 0)
    if WIDTH > 2:
        EIGHTH: tl.constexpr = HALF // 4
        a, b = tl.load(boundaries_ptr + EIGHTH - 1), tl.load(boundaries_ptr + 3 * EIGHTH - 1)
        c, d = tl.load(boundaries_ptr + 5 * EIGHTH - 1), tl.load(boundaries_ptr + 7 * EIGHTH - 1)
        code += tl.where(x > tl.where(first, tl.where(second, d, c), tl.where(second, b, a)), EIGHTH, 0)
    return code


@triton.jit(do_not_specialize=["n"])
def encode_kernel(
    vectors_ptr,  # (n, DIM) float32, float16 or bfloat16
    factors_ptr,  # (ROUNDS, DIM) float32
    orders_ptr,  # (ROUNDS - 1, DIM) int32
    centre_ptr,  # (DIM,) float32
    boundaries_ptr,  # (bands, 1 << WIDTH) float32, ascending, infinite behind a band's own
    levels_ptr,  # (bands, 1 << WIDTH) float32
    rows_ptr,  # (PADDED,) int32: where each coordinate's band begins in the two tables
    places_ptr,  # (PLACES,) int32: the coordinate at each place once bands begin at whole bytes; DIM where none is
    packed_ptr,  # (n, row bytes) uint8
    norms_ptr,  # (n,) float32
    dots_ptr,  # (n,) float32
    products_ptr,  # (n,) float32
    scratch_ptr,  # (programs, ROWS, DIM) float32
    n,
    packed_stride,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    LOG: tl.constexpr,  # bits of a coordinate's number
    ROWS: tl.constexpr,
    ROUNDS: tl.constexpr,
    WIDTH: tl.constexpr,
    PLANES: tl.constexpr,  # for each plane: its first place, its field's bits and shift, its first byte and its bytes
    PLACES: tl.constexpr,
    ONE_BAND: tl.constexpr,
    MOVED: tl.constexpr,  # whether places differ from coordinates
    PERMUTED: tl.constexpr,
    HAS_CENTRE: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Codes of every ROWS rows in so many programs."""
    for block in range(tl.program_id(0), tl.cdiv(n, ROWS), tl.num_programs(0)):
        row = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        column = tl.arange(0, PADDED)
        there = column < DIM
        inside = (row < n)[:, None] & there[None, :]
        pointers = vectors_ptr + row[:, None] * DIM + column[None, :]
        x = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
        if UNIT:
            x, _ = _normalised(x, DIM)
            x = tl.div_rn(x, tl.sqrt_rn(tl.full(x.shape, DIM, tl.float32)))
        if HAS_CENTRE:
            centre = tl.load(centre_ptr + column, mask=there, other=0.0)[None, :]
            x = x - centre
            tl.store(products_ptr + row, tl.sum(x * centre, axis=1), mask=row < n)
        x, norm = _normalised(x, DIM)
        tl.store(norms_ptr + row, norm, mask=row < n)
        for r in tl.static_range(ROUNDS):
            if PERMUTED and r > 0:
                # Through memory that stays in the cache: a gather within a warp takes a shuffle for every two numbers.
                own = scratch_ptr + (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None] * DIM
                tl.debug_barrier()
                tl.store(own + column[None, :], x, mask=there[None, :])
                tl.debug_barrier()
                order = tl.load(orders_ptr + (r - 1) * DIM + column, mask=there, other=0)
                x = tl.load(own + order[None, :], mask=there[None, :], other=0.0)
            x = x * tl.load(factors_ptr + r * DIM + column, mask=there, other=0.0)[None, :]
            for i in tl.static_range(LOG):
                if r % 2 == 0:
                    x = _butterfly(x, ROWS, PADDED, DIM, i)
                else:
                    x = _butterfly(x, ROWS, PADDED, DIM, LOG - 1 - i)
        code = tl.zeros((ROWS, PADDED), tl.int32)
        if ONE_BAND:
            table = code
            code = _first_bits(x, boundaries_ptr, WIDTH)
        else:
            table = tl.broadcast_to(tl.load(rows_ptr + column)[None, :], (ROWS, PADDED))
        for b in tl.static_range(min(WIDTH, 3) if ONE_BAND else 0, WIDTH):
            middle = code + (1 << (WIDTH - 1 - b))
            code = tl.where(x > tl.load(boundaries_ptr + table + middle - 1), middle, code)
        level = tl.load(levels_ptr + table + code)
        tl.store(dots_ptr + row, tl.sum(tl.where(there[None, :], x * level, 0.0), axis=1), mask=row < n)
        code = tl.where(there[None, :], code, 0)
        if MOVED:
            place = tl.load(places_ptr + tl.arange(0, PLACES))
            moved = tl.gather(code, tl.broadcast_to(tl.where(place < DIM, place, 0)[None, :], (ROWS, PLACES)), axis=1)
            code = tl.where((place < DIM)[None, :], moved, 0)
        for p in tl.static_range(len(PLANES)):
            _store_plane(
                packed_ptr + row * packed_stride,
                row < n,
                code,
                PLANES[p][0],
                PLANES[p][1],
                PLANES[p][2],
                PLANES[p][3],
                PLANES[p][4],
                ROWS,
                PLACES,
            )


@triton.jit
def _store_plane(
    rows_ptr,  # (ROWS,) pointers to packed rows
    inside,  # (ROWS,) bool
    code,  # (ROWS, PLACES) int32
    PLACE: tl.constexpr,
    BITS: tl.constexpr,
    SHIFT: tl.constexpr,
    BYTE: tl.constexpr,
    BYTES: tl.constexpr,
    ROWS: tl.constexpr,
    PLACES: tl.constexpr,
):
    """Writes one plane of one band; see `packing` for the order within a byte."""
    FIELDS: tl.constexpr = 8 // BITS
    field = tl.reshape((code >> SHIFT) & ((1 << BITS) - 1), (ROWS, PLACES // FIELDS, FIELDS))
    i = tl.arange(0, FIELDS)
    if BITS == 1:
        i = (i & 1) | ((i >> 1) & 2) | ((i << 1) & 4)
    byte = tl.sum(field << (i * BITS)[None, None, :], axis=2).to(tl.uint8)
    column = tl.arange(0, PLACES // FIELDS) - PLACE // FIELDS
    mask = inside[:, None] & ((column >= 0) & (column < BYTES))[None, :]
    tl.store(rows_ptr[:, None] + BYTE + column[None, :], byte, mask=mask)


class Layout(NamedTuple):
    """What the kernel knows of a plan; its arguments and constants of these names."""

    boundaries: Tensor
    levels: Tensor
    rows: Tensor
    places: Tensor
    width: int
    planes: tuple[tuple[int, int, int, int, int], ...]
    moved: bool


@lru_cache(maxsize=64)
def _layout(bands: tuple[BandTable, ...]) -> Layout:
    """The layout of bands; tensors compare by identity, and a quantizer's tables stay the same objects."""
    width = max(band.width for band in bands)
    device = bands[0].levels.device
    boundaries = torch.full((len(bands), 1 << width), torch.inf)
    levels = torch.zeros((len(bands), 1 << width))
    dim = sum(band.size for band in bands)
    rows: list[int] = []
    places: list[int] = []
    planes = []
    first, byte = 0, 0
    for number, band in enumerate(bands):
        boundaries[number, : len(band.boundaries)] = band.boundaries.cpu()
        levels[number, : len(band.levels)] = band.levels.cpu()
        rows += [number << width] * band.size
        shift = 0
        for bits in planes_of(band.width):
            nbytes = -(-band.size * bits // 8)
            planes.append((len(places), bits, shift, byte, nbytes))
            shift, byte = shift + bits, byte + nbytes
        places += range(first, first + band.size)
        places += [dim] * (-band.size % _BYTE)
        first += band.size
    padded = max(_BYTE, triton.next_power_of_2(dim))
    rows += [0] * (padded - dim)
    moved = places[:dim] != list(range(dim))
    places += [dim] * ((triton.next_power_of_2(len(places)) if moved else padded) - len(places))
    where, what = (torch.tensor(values, dtype=torch.int32, device=device) for values in (rows, places))
    return Layout(boundaries.to(device), levels.to(device), where, what, width, tuple(planes), moved)


def encode(
    vectors: Tensor,
    bands: tuple[BandTable, ...],
    factors: Tensor | None,
    orders: Tensor | None,
    centre: Tensor | None,
    unit: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `kernels.encode`."""
    count, dim = vectors.shape
    packed = torch.empty((count, row_bytes(bands)), dtype=torch.uint8, device=vectors.device)
    norms = torch.empty(count, dtype=torch.float32, device=vectors.device)
    dots = torch.empty_like(norms)
    products = torch.zeros_like(norms) if centre is None else torch.empty_like(norms)
    if count == 0:
        return packed, norms, dots, products
    if not vectors.is_contiguous() or vectors.data_ptr() % 16:
        # Another alignment would be another compiled kernel, with sums in another order: a row's codes must not depend
        # on where it lies.
        vectors = vectors.clone(memory_format=torch.contiguous_format)
    layout = _layout(bands)
    padded = max(_BYTE, triton.next_power_of_2(dim))
    rows = max(1, _PROGRAM // padded)
    programs = triton.cdiv(count, rows)
    if orders is not None:
        programs = min(programs, _PROGRAMS)  # which bounds the scratch memory
    none = layout.levels
    encode_kernel[(programs,)](
        vectors,
        none if factors is None else factors,
        layout.rows if orders is None else orders.int(),
        none if centre is None else centre,
        layout.boundaries,
        layout.levels,
        layout.rows,
        layout.places,
        packed,
        norms,
        dots,
        products,
        none if orders is None else torch.empty((programs, rows, dim), device=vectors.device),
        count,
        packed.stride(0),
        DIM=dim,
        PADDED=padded,
        LOG=padded.bit_length() - 1,
        ROWS=rows,
        ROUNDS=0 if factors is None else len(factors),
        WIDTH=layout.width,
        PLANES=layout.planes,
        PLACES=len(layout.places),
        ONE_BAND=len(bands) == 1,
        MOVED=layout.moved,
        PERMUTED=orders is not None,
        HAS_CENTRE=centre is not None,
        UNIT=unit,
        num_warps=max(1, padded // _PROGRAM),
    )
    return packed, norms, dots, products
