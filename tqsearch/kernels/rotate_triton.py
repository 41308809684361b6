"""`rotate` in Triton: rows normalised, centred and turned by the randomized Hadamard transform, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tqsearch.kernels import hadamard_triton
from tqsearch.kernels.encode_triton import load_rows, normalised, row_sums
from tqsearch.kernels.hadamard_triton import transform
from tqsearch.kernels.launch import Launcher, variant


@triton.jit(do_not_specialize=["n"])
def rotate_kernel(
    vectors_ptr,  # (n, DIM) float32
    factors_ptr,  # (ROUNDS, PADDED) float32 and
    sources_ptr,  # (ROUNDS, PADDED) int32: see `hadamard_triton.tables`
    centre_ptr,  # (DIM,) float32
    values_ptr,  # (n, DIM) float32
    squares_ptr,  # (n,) float32
    products_ptr,  # (n,) float32
    n,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    LOG: tl.constexpr,  # bits of a coordinate's number
    ROWS: tl.constexpr,
    WARPS: tl.constexpr,
    ROUNDS: tl.constexpr,
    PERMUTED: tl.constexpr,
    HAS_CENTRE: tl.constexpr,
    UNIT: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """ROWS rows. They are turned at squared norm DIM, where the transform is nearly as good as float32's."""
    SIZE: tl.constexpr = ROWS * PADDED
    LINES: tl.constexpr = SIZE // (128 * WARPS)
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = first + tl.arange(0, ROWS)
    line = tl.arange(0, WARPS)[:, None, None] * LINES + tl.arange(0, LINES)[None, :, None]
    place = line * 128 + tl.arange(0, 128)[None, None, :]
    column = place % PADDED
    there = column < DIM
    root = tl.sqrt_rn(tl.full((ROWS,), DIM, tl.float32))
    x = load_rows(vectors_ptr + first * DIM, n - first, DIM, PADDED, LINES, WARPS)
    length = tl.zeros((ROWS,), tl.float32)
    if UNIT:
        x, length = normalised(x, ROWS, PADDED, DIM)
        x = tl.div_rn(x, tl.sqrt_rn(tl.full(x.shape, DIM, tl.float32)))
    if HAS_CENTRE:
        centre = tl.load(centre_ptr + column, mask=there, other=0.0)
        tl.store(products_ptr + row, row_sums(x * centre, ROWS, PADDED), mask=row < n)
        x = x - centre
    x, norm = normalised(x, ROWS, PADDED, DIM)
    norm = tl.where(length == length, norm, length)  # NaN, of a row that is not finite
    tl.store(squares_ptr + row, norm * norm, mask=row < n)
    x = transform(x, place, factors_ptr, sources_ptr, DIM, PADDED, LOG, SIZE, WARPS, ROUNDS, PERMUTED)
    x = tl.reshape(tl.reshape(x, (ROWS, PADDED)) * (FACTOR * tl.div_rn(norm, root))[:, None], x.shape)
    inside = there & (place // PADDED < n - first)
    tl.store(values_ptr + (first * DIM + place // PADDED * DIM + column), x, mask=inside)


_launch_rotate = Launcher(rotate_kernel)


def rotate(
    vectors: Tensor, factors: Tensor, orders: Tensor | None, centre: Tensor | None, unit: bool, factor: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See `kernels.rotate`."""
    count, dim = vectors.shape
    vectors = vectors.contiguous()
    values = vectors.new_empty((count, dim))
    squares = vectors.new_empty(count)
    products = None if centre is None else vectors.new_empty(count)
    if count == 0:
        return values, squares, products
    padded, rows, warps = hadamard_triton.shape_of(dim, orders is not None)
    turn, sources = hadamard_triton.tables(factors, orders, padded)
    none = squares
    ends = none if centre is None else centre, values, squares, none if products is None else products
    operands = (vectors, turn, sources, *ends)
    _launch_rotate(
        (-(-count // rows), 1, 1),
        (
            dim,
            len(factors),
            orders is not None,
            centre is not None,
            unit,
            factor,
            vectors.device,
            *variant(operands, ()),
        ),
        (*operands, count),
        lambda: {
            "DIM": dim,
            "PADDED": padded,
            "LOG": padded.bit_length() - 1,
            "ROWS": rows,
            "WARPS": warps,
            "ROUNDS": len(factors),
            "PERMUTED": orders is not None,
            "HAS_CENTRE": centre is not None,
            "UNIT": unit,
            "FACTOR": factor,
        },
        num_warps=warps,
        num_stages=1,
    )
    return values, squares, products
