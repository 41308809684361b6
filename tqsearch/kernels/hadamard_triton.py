"""The randomized Hadamard transform of rows that a program of a Triton kernel holds.

`transform` is what `rotation.hadamard_columns` is, for numbers that stay on the chip. A row is padded with zeros to a
power of two, a warp holds 1,024 numbers, 32 a thread: several rows, one, or a part of one. A number's *place* is where
it lies in the program's rows, one after the other.

A Hadamard matrix is a chain of butterflies, one for each bit of a column's number. Of the bits 0 to 6 most have their
partners in other threads, and to fetch those costs more than to add. So four bits at a time are one product with a
16 x 16 matrix of ones and minus ones on the tensor cores, whose rule for which thread holds what brings the partners
together; after two such products every number is back in the thread that it came from. They are nearly float32: a
number is the sum of two float16, to 2^-24 of itself; ones are exact; sums are float32. From bit 8 on partners are in
one thread.

A dimension that is no power of two has blocks, which begin at multiples of twice their size: the butterflies of a bit
are those of the columns below the largest multiple of twice that bit's value. A bit that all columns have can go into a
product. The permutations between rounds go through shared memory.

A row of more than 1,024 columns has several warps, and the bits that say which, its last, are exchanged in every round
with as many others, which till then were in one thread.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

WARP_BITS = 10  # of the place within a warp's numbers


def shape_of(dim: int, permuted: bool) -> tuple[int, int, int]:
    """Columns of a padded row, rows of a program, and its warps.

    A row that is permuted is given a program of at least two warps: in one warp a gather is made of shuffles.
    """
    padded = max(8, triton.next_power_of_2(dim))
    warps = max(2 if permuted else 1, padded >> WARP_BITS)
    return padded, max(1, (warps << WARP_BITS) // padded), warps


@lru_cache(maxsize=256)
def tables(factors: Tensor, orders: Tensor | None, padded: int) -> tuple[Tensor, Tensor]:
    """What `transform` reads, on the device of the factors; cached, as a rotation's tensors stay the same objects.

    Returns:
        factors: (rounds, padded) float32, in the order in which a round finds the columns, zero behind the dimension.
        sources: (rounds, padded) int32: the place in the row from which a column takes its number before a round.
    """
    rounds, dim = factors.shape
    spread = max(0, padded.bit_length() - 1 - WARP_BITS)
    exchange = torch.arange(padded, device="cpu").view(1 << spread, 1 << spread, -1).transpose(0, 1).flatten()
    wide = torch.nn.functional.pad(factors.cpu(), (0, padded - dim))
    sources = torch.arange(padded, device="cpu").repeat(rounds, 1)
    if orders is None:
        wide[1::2] = wide[1::2, exchange]
    else:
        sources[1:, :dim] = orders.cpu()
        sources = exchange[sources]
    return wide.to(factors.device), sources.to(factors.device, torch.int32)


@triton.jit
def transform(
    x,  # (WARPS, lines, 128) float32, in the order of places
    place,  # (WARPS, lines, 128) int32
    factors_ptr,  # (ROUNDS, PADDED) float32
    sources_ptr,  # (ROUNDS, PADDED) int32
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    LOG: tl.constexpr,  # bits of a column's number
    SIZE: tl.constexpr,
    WARPS: tl.constexpr,
    ROUNDS: tl.constexpr,
    PERMUTED: tl.constexpr,
):
    """The transform of each row."""
    SPREAD: tl.constexpr = max(0, LOG - 10)  # bits of a column's number that say which of the row's warps holds it
    INNER: tl.constexpr = LOG - SPREAD
    MOVING: tl.constexpr = INNER - SPREAD  # the first of as many bits, which they are exchanged with in each round
    column = place % PADDED
    low, middle, high = column % (1 << MOVING), (column >> MOVING) % (1 << SPREAD), column >> INNER
    exchanged = (middle << INNER) + (high << MOVING) + low
    FIRST: tl.constexpr = _whole(DIM, (0, 2, 3, 1))
    NEXT: tl.constexpr = _whole(DIM, (4, 5, 6, 7 if MOVING > 7 else 7 + SPREAD))
    for r in tl.static_range(ROUNDS):
        if r > 0 and PERMUTED:
            index = place - column + tl.load(sources_ptr + r * PADDED + column)
            x = tl.reshape(tl.gather(tl.reshape(x, (SIZE,)), tl.reshape(index, (SIZE,)), 0), x.shape)
        x = x * tl.load(factors_ptr + r * PADDED + column)
        if FIRST > 0:
            x = _first_bits(x, SIZE, WARPS, FIRST)
        for bit in tl.static_range(MOVING, INNER):
            x = _butterfly(x, column, SIZE, PADDED, _prefix(DIM, bit), bit)
        x = _exchange(x, SIZE, PADDED, SPREAD)
        if NEXT > 0:
            x = _next_bits(x, SIZE, WARPS, NEXT)
        for bit in tl.static_range(INNER):
            if bit < MOVING:
                if bit > 7 or DIM % (2 << bit) != 0:
                    x = _butterfly(x, exchanged, SIZE, PADDED, _prefix(DIM, bit), bit)
            elif bit > 7 or DIM % (2 << (bit + SPREAD)) != 0:
                x = _butterfly(x, exchanged, SIZE, PADDED, _prefix(DIM, bit + SPREAD), bit)
    if PERMUTED or ROUNDS % 2 == 1:
        x = _exchange(x, SIZE, PADDED, SPREAD)
    return x


@triton.jit
def _exchange(x, SIZE: tl.constexpr, PADDED: tl.constexpr, SPREAD: tl.constexpr):
    """The bits that say which of a row's warps holds a column, and the next as many, in each other's place.

    Numbers move when an operation whose layout the compiler gives follows: a product, or a look-up.
    """
    if SPREAD == 0:
        return x
    else:
        y = tl.reshape(x, (SIZE // PADDED, 1 << SPREAD, 1 << SPREAD, PADDED >> (2 * SPREAD)))
        return tl.reshape(tl.permute(y, (0, 2, 1, 3)), x.shape)


@triton.constexpr_function
def _whole(dim, bits):
    """Which of the bits have partners for all columns, as a mask."""
    return sum(int(dim % (2 << bit) == 0) << i for i, bit in enumerate(bits))


@triton.constexpr_function
def _prefix(dim, bit):
    """How many columns have partners in a bit."""
    return (dim >> (bit + 1)) << (bit + 1)


@triton.jit
def _butterfly(x, column, SIZE: tl.constexpr, PADDED: tl.constexpr, PREFIX: tl.constexpr, BIT: tl.constexpr):
    """Sums and differences of the pairs of places that differ in one bit, for columns below PREFIX."""
    if PREFIX == 0:
        return x
    else:
        y = tl.reshape(x, (SIZE >> (BIT + 1), 2, 1 << BIT))
        total = tl.sum(y, axis=1, keep_dims=True)
        y = tl.reshape(tl.where(tl.arange(0, 2)[None, :, None] == 0, total, tl.fma(y, -2.0, total)), x.shape)
        if PREFIX == PADDED:
            return y
        else:
            return tl.where(column < PREFIX, y, x)


@triton.jit
def _first_bits(x, SIZE: tl.constexpr, WARPS: tl.constexpr, BITS: tl.constexpr):
    """Butterflies of the bits 0 to 3 of a place: of 0, 2, 3 and 1, as the mask BITS says.

    A thread's first numbers differ in the bits 0, 1 and 7 and up. The order of indices below, here and in `_next_bits`,
    is the one in which a product takes and leaves each number in the thread that holds it. It is right whatever the
    compiler's layouts are, but in other orders numbers have to move.
    """
    y = tl.reshape(x, (WARPS, SIZE // (128 * WARPS), 8, 2, 2, 2, 2))
    y = tl.reshape(tl.permute(y, (5, 3, 4, 6, 1, 0, 2)), (16, SIZE // 16))
    y = tl.reshape(_product(y, BITS), (2, 2, 2, 2, SIZE // (128 * WARPS), WARPS, 8))
    return tl.reshape(tl.permute(y, (5, 4, 6, 1, 2, 0, 3)), x.shape)


@triton.jit
def _next_bits(x, SIZE: tl.constexpr, WARPS: tl.constexpr, BITS: tl.constexpr):
    """Butterflies of the bits 4 to 7 of a place, as the mask BITS says."""
    y = tl.reshape(x, (WARPS, SIZE // (256 * WARPS), 2, 8, 4, 2, 2))
    y = tl.reshape(tl.permute(y, (2, 3, 1, 5, 0, 4, 6)), (16, SIZE // 16))
    y = tl.reshape(_product(y, BITS), (2, 8, SIZE // (256 * WARPS), 2, WARPS, 4, 2))
    return tl.reshape(tl.permute(y, (4, 2, 0, 1, 5, 3, 6)), x.shape)


@triton.jit
def _product(x, BITS: tl.constexpr):
    """The Hadamard matrix over the bits of BITS, and the identity over the others, times (16, n)."""
    i = tl.arange(0, 16)
    odd = 0x6996 >> (i[:, None] & i[None, :] & BITS)  # its last bit: whether they have an odd number of ones in common
    same = ((i[:, None] ^ i[None, :]) & (15 ^ BITS)) == 0
    matrix = tl.where(same, 0x3C00 | (odd << 15), 0).to(tl.int16).to(tl.float16, bitcast=True)  # 1 and its sign
    high = x.to(tl.float16)
    return tl.dot(matrix, high, acc=tl.dot(matrix, (x - high.to(tl.float32)).to(tl.float16)))
