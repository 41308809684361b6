"""`encode` in Triton: a row is read once, and its codes, norm and dot are written once; all between stays on the chip.

A program holds whole rows, padded to a power of two, in the layout of `hadamard_triton`, which rotates them. The code
of a number is found by one look-up and one comparison: the range of numbers is cut into cells so small that no two
boundaries lie in one.

What bounds it is arithmetic, not memory: see `docs/GPU.md`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tqsearch.kernels import hadamard_triton
from tqsearch.kernels.bands import BandTable, row_bytes
from tqsearch.kernels.hadamard_triton import transform
from tqsearch.plan import planes_of

_BYTE = 8  # coordinates whose planes end on whole bytes, whatever their width
_ROUND = tl.constexpr(1.5 * 2**23)  # plus a number below 2^22: its last bits are the integer nearest to the number


@triton.jit
def normalised(x, ROWS: tl.constexpr, PADDED: tl.constexpr, DIM: tl.constexpr):
    """Rows scaled to squared norm DIM, and their norms; squares neither overflow nor vanish, zero rows stay zero.

    Where some row needs it rows are first divided by powers of two, which changes no other bits. A row that is not
    finite becomes zero, of norm NaN: products with the zeros of a matrix must not carry it into other rows.
    """
    rows = tl.reshape(x, (ROWS, PADDED))
    squares = tl.sum(rows * rows, axis=1)
    power = tl.full((ROWS,), 1.0, tl.float32)
    if tl.max(tl.where((squares > 1e-24) & (squares < 1e24), 0, 1), axis=0) > 0:
        field = (tl.max(tl.abs(rows), axis=1).to(tl.int32, bitcast=True) >> 23) & 255
        exponent = tl.minimum(tl.maximum(field - 126, -125), 126)
        rows = rows * ((127 - exponent) << 23).to(tl.float32, bitcast=True)[:, None]
        squares = tl.sum(rows * rows, axis=1)
        finite = squares < float("inf")
        rows = tl.where(finite[:, None], rows, 0.0)
        squares = tl.where(finite, squares, 0.0)
        power = tl.where(finite, ((127 + exponent) << 23).to(tl.float32, bitcast=True), float("nan"))
    length = tl.sqrt_rn(squares)
    root = tl.sqrt_rn(tl.full((ROWS,), DIM, tl.float32))
    factor = tl.where(length != 0.0, tl.div_rn(root, tl.where(length != 0.0, length, 1.0)), 0.0)
    return tl.reshape(rows * factor[:, None], x.shape), length * power


@triton.jit
def row_sums(x, ROWS: tl.constexpr, PADDED: tl.constexpr):
    """The sum of each row, (ROWS,)."""
    return tl.sum(tl.reshape(x, (ROWS, PADDED)), axis=1)


@triton.jit
def load_rows(vectors_ptr, n, DIM: tl.constexpr, PADDED: tl.constexpr, LINES: tl.constexpr, WARPS: tl.constexpr):
    """Rows as float32, (WARPS, LINES, 128); each thread holds the same four numbers of a line, whatever their type."""
    four = tl.arange(0, 32)[:, None, None, None] * 4 + tl.arange(0, 4)[None, None, None, :]
    line = tl.arange(0, WARPS)[None, :, None, None] * LINES + tl.arange(0, LINES)[None, None, :, None]
    place = line * 128 + four
    row, column = place // PADDED, place % PADDED
    x = tl.load(vectors_ptr + row * DIM + column, mask=(row < n) & (column < DIM), other=0.0).to(tl.float32)
    return tl.reshape(tl.permute(x, (1, 2, 0, 3)), (WARPS, LINES, 128))


@triton.jit
def _lanes_first(x, SIZE: tl.constexpr, WARPS: tl.constexpr):
    """(WARPS, lines, 128) in the shape in which a look-up, too, leaves numbers in the threads that hold them."""
    y = tl.permute(tl.reshape(x, (WARPS, SIZE // (128 * WARPS), 32, 4)), (2, 0, 1, 3))
    return tl.reshape(y, (32, WARPS, SIZE // (32 * WARPS)))


@triton.jit
def _lanes_last(x, SIZE: tl.constexpr, WARPS: tl.constexpr):
    """The inverse of `_lanes_first`."""
    y = tl.permute(tl.reshape(x, (32, WARPS, SIZE // (128 * WARPS), 4)), (1, 2, 0, 3))
    return tl.reshape(y, (WARPS, SIZE // (128 * WARPS), 128))


@triton.jit(do_not_specialize=["n"])
def encode_kernel(
    vectors_ptr,  # (n, DIM) float32, float16 or bfloat16
    factors_ptr,  # (ROUNDS, PADDED) float32 and
    sources_ptr,  # (ROUNDS, PADDED) int32: see `hadamard_triton.tables`
    centre_ptr,  # (DIM,) float32
    cells_ptr,  # (bands, 2, CELLS) int64: see `_cells`
    bands_ptr,  # (PADDED,) int32: where the cells of each coordinate's band begin
    places_ptr,  # (PLACES,) int32: the coordinate at each place once bands begin at whole bytes; DIM where none is
    packed_ptr,  # (n, row bytes) uint8
    norms_ptr,  # (n,) float32
    dots_ptr,  # (n,) float32
    products_ptr,  # (n,) float32
    n,
    packed_stride,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    LOG: tl.constexpr,  # bits of a coordinate's number
    ROWS: tl.constexpr,
    WARPS: tl.constexpr,
    ROUNDS: tl.constexpr,
    SCALE: tl.constexpr,  # cells in an interval of length 1
    CELLS: tl.constexpr,
    PLANES: tl.constexpr,  # for each plane: its first place, its field's bits and shift, its first byte and its bytes
    PLACES: tl.constexpr,
    ONE_BAND: tl.constexpr,
    MOVED: tl.constexpr,  # whether places differ from coordinates
    PERMUTED: tl.constexpr,
    HAS_CENTRE: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Codes of ROWS rows."""
    SIZE: tl.constexpr = ROWS * PADDED
    LINES: tl.constexpr = SIZE // (128 * WARPS)
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = first + tl.arange(0, ROWS)
    line = tl.arange(0, WARPS)[:, None, None] * LINES + tl.arange(0, LINES)[None, :, None]
    place = line * 128 + tl.arange(0, 128)[None, None, :]
    column = place % PADDED
    there = column < DIM
    x = load_rows(vectors_ptr + first * DIM, n - first, DIM, PADDED, LINES, WARPS)
    if UNIT:
        x, length = normalised(x, ROWS, PADDED, DIM)
        x = tl.div_rn(x, tl.sqrt_rn(tl.full(x.shape, DIM, tl.float32)))
    if HAS_CENTRE:
        centre = tl.load(centre_ptr + column, mask=there, other=0.0)
        x = x - centre
        tl.store(products_ptr + row, row_sums(x * centre, ROWS, PADDED), mask=row < n)
    x, norm = normalised(x, ROWS, PADDED, DIM)
    if UNIT:
        norm = tl.where(length == length, norm, length)
    tl.store(norms_ptr + row, norm, mask=row < n)
    x = transform(x, place, factors_ptr, sources_ptr, DIM, PADDED, LOG, SIZE, WARPS, ROUNDS, PERMUTED)

    y = _lanes_first(x, SIZE, WARPS)
    cell = tl.fma(y, SCALE, _ROUND).to(tl.int32, bitcast=True) & (CELLS - 1)
    if not ONE_BAND:
        cell += _lanes_first(tl.load(bands_ptr + column), SIZE, WARPS)
    word, levels = tl.load(cells_ptr + cell), tl.load(cells_ptr + CELLS + cell)
    above = y > (word >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    level = tl.where(above, (levels >> 32).to(tl.int32), levels.to(tl.int32)).to(tl.float32, bitcast=True)
    code = _lanes_last(word.to(tl.int32) + above.to(tl.int32), SIZE, WARPS)
    product = tl.where(there, x * _lanes_last(level, SIZE, WARPS), 0.0)
    tl.store(dots_ptr + row, row_sums(product, ROWS, PADDED), mask=row < n)

    code = tl.reshape(tl.where(there, code, 0), (ROWS, PADDED))
    if MOVED:
        move = tl.load(places_ptr + tl.arange(0, PLACES))
        moved = tl.gather(code, tl.broadcast_to(tl.where(move < DIM, move, 0)[None, :], (ROWS, PLACES)), axis=1)
        code = tl.where((move < DIM)[None, :], moved, 0)
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

    cells: Tensor
    bands: Tensor
    places: Tensor
    scale: float
    planes: tuple[tuple[int, int, int, int, int], ...]
    moved: bool


def _cells(bands: tuple[BandTable, ...]) -> tuple[Tensor, float]:
    """Cells of one length, a power of two, in which no band has two boundaries, for all that a number can be.

    Returns:
        (bands, 2, cells) int64, a cell at the nearest integer to its numbers divided by the length, modulo the cells:
            first its boundary, infinite for none, and the code of the numbers up to that; then the levels above and up
            to it. Of each pair the first is in the upper 32 bits.
        The inverse of the length.

    Raises:
        ValueError: boundaries so close together that the cells would not fit into memory.
    """

    def cell(values: Tensor) -> Tensor:
        """As the kernel finds it. It never falls where values grow: other cells lie on one side of a boundary."""
        numbers: Tensor = (values * scale + _ROUND.value).view(torch.int32)
        return numbers - torch.tensor(_ROUND.value, dtype=torch.float32, device="cpu").view(torch.int32)

    scale, largest = 1.0, 1.01 * sum(band.size for band in bands) ** 0.5
    tables = [(band.boundaries.cpu(), band.levels.cpu()) for band in bands]
    while any((cell(boundaries).diff() == 0).any() for boundaries, _ in tables):
        scale *= 2.0
        if scale * largest > 1 << 20:
            raise ValueError("boundaries must be further apart than a millionth of the largest coordinate")
    half = triton.next_power_of_2(int(scale * largest) + 2)
    number = torch.arange(-half, half, dtype=torch.int32, device="cpu")
    found = torch.empty((len(bands), 2, 2 * half, 2), dtype=torch.int32, device="cpu")
    for (boundaries, levels), words in zip(tables, found, strict=True):
        code = torch.searchsorted(cell(boundaries), number)
        here = torch.nn.functional.pad(cell(boundaries), (0, 1), value=half)[code] == number
        boundary = torch.nn.functional.pad(boundaries, (0, 1), value=torch.inf)[code]
        words[0, :, 0] = code
        words[0, :, 1] = torch.where(here, boundary, torch.inf).view(torch.int32)
        words[1, :, 0] = levels[code].view(torch.int32)
        words[1, :, 1] = levels[(code + 1).clamp(max=len(levels) - 1)].view(torch.int32)
    return found.roll(half, dims=2).view(torch.int64)[..., 0], scale


@lru_cache(maxsize=256)
def _layout(bands: tuple[BandTable, ...]) -> Layout:
    """The layout of bands; tensors compare by identity, and a quantizer's tables stay the same objects."""
    device = bands[0].levels.device
    cells, scale = _cells(bands)
    dim = sum(band.size for band in bands)
    starts: list[int] = []
    places: list[int] = []
    planes = []
    first, byte = 0, 0
    for number, band in enumerate(bands):
        starts += [number * cells[0].numel()] * band.size
        shift = 0
        for bits in planes_of(band.width):
            nbytes = -(-band.size * bits // 8)
            planes.append((len(places), bits, shift, byte, nbytes))
            shift, byte = shift + bits, byte + nbytes
        places += range(first, first + band.size)
        places += [dim] * (-band.size % _BYTE)
        first += band.size
    padded = max(_BYTE, triton.next_power_of_2(dim))
    starts += [0] * (padded - dim)
    moved = places[:dim] != list(range(dim))
    places += [dim] * ((triton.next_power_of_2(len(places)) if moved else padded) - len(places))
    where, what = (torch.tensor(values, dtype=torch.int32, device=device) for values in (starts, places))
    return Layout(cells.to(device), where, what, scale, tuple(planes), moved)


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
    padded, rows, warps = hadamard_triton.shape_of(dim, orders is not None)
    none = norms
    turn, sources = (none, layout.bands) if factors is None else hadamard_triton.tables(factors, orders, padded)
    encode_kernel[(triton.cdiv(count, rows),)](
        vectors,
        turn,
        sources,
        none if centre is None else centre,
        layout.cells,
        layout.bands,
        layout.places,
        packed,
        norms,
        dots,
        products,
        count,
        packed.stride(0),
        DIM=dim,
        PADDED=padded,
        LOG=padded.bit_length() - 1,
        ROWS=rows,
        WARPS=warps,
        ROUNDS=0 if factors is None else len(factors),
        SCALE=layout.scale,
        CELLS=layout.cells.shape[2],
        PLANES=layout.planes,
        PLACES=len(layout.places),
        ONE_BAND=len(bands) == 1,
        MOVED=layout.moved,
        PERMUTED=orders is not None,
        HAS_CENTRE=centre is not None,
        UNIT=unit,
        num_warps=warps,
        num_stages=1,
        enable_fp_fusion=False,  # which of two products an addition takes in would depend on a row's place
    )
    return packed, norms, dots, products
