"""How the attention kernels cut packed keys and values: constants, orders of coordinates and of tokens.

The kernel works on one block of tokens at a time. Keys are packed along the head dimension: a block of them decodes to
tiles (tokens, coordinates), each multiplied with the same coordinates of the query. Values are packed along the tokens:
a block decodes to tiles (coordinates, tokens), each multiplied with the same tokens' probabilities. A decoded part (see
`decode_triton`) holds a permuted choice of coordinates or tokens; parts narrower than 32, the least depth of an int8
matrix product, are put side by side in groups.

Tokens may stand in any order within a block, so the rows of the scores are ordered to suit the first band of the
values: the tokens that a group needs lie where a tensor core leaves them in one thread's registers. Everything here is
a permutation of the bits of a token's number, because every field order of `packing` and of `decode` is.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tqsearch.kernels.bands import BandTable
from tqsearch.kernels.decode_triton import COLUMN_DIMS, PARTS, assembly, slot_dims
from tqsearch.plan import planes_of

DEPTH = 32  # the least depth of an int8 matrix product
BYTES = (
    2  # the form of a 3-bit band whose columns are the bytes of its 2-bit plane; 1: steps are whole; 0: they are not
)

BandKey = tuple[int, int, tuple[int, ...], float, float]  # size, width, steps, step, offset


def band_keys(bands: tuple[BandTable, ...]) -> tuple[BandKey, ...]:
    """What of the tables the layouts depend on, hashable."""
    return tuple((band.size, band.width, band.steps, band.step, band.offset) for band in bands)


class KeyLayout(NamedTuple):
    """Keys: for each band with bits

    Attributes:
        bands: (width, columns, columns a step, byte offset, bytes of the first plane, slot offset, slots, form).
        assemblies: PTX, or "" for the portable body.
        slots: (slots,) int64, the rotated coordinate of each slot; D where there is none.
        tables: (bands, 256) int8, the numbers of the levels.
        steps, offsets: level = (number - offset) * step.
    """

    bands: tuple[tuple[int, ...], ...]
    assemblies: tuple[str, ...]
    slots: Tensor
    tables: Tensor
    steps: tuple[float, ...]
    offsets: tuple[float, ...]


class ValueLayout(NamedTuple):
    """Values: for each band with bits

    Attributes:
        bands: (width, columns, byte offset, bytes of a row, bytes of the first plane, first coordinate, size, form).
        orders: the permutation of the bits of a score's row, as axes of 2, to (bits of the depth, the columns, bits of
            the group).
        assemblies, tables, steps, offsets: as for keys.
        tokens: (block,) int32, the token of each row of the scores.
    """

    bands: tuple[tuple[int, ...], ...]
    orders: tuple[tuple[int, ...], ...]
    assemblies: tuple[str, ...]
    tables: Tensor
    steps: tuple[float, ...]
    offsets: tuple[float, ...]
    tokens: Tensor


def _tables(bands: list[BandKey], device: torch.device) -> Tensor:
    rows = [np.pad(np.array(steps, np.int8), (0, 256 - len(steps))) for _, _, steps, _, _ in bands]
    return torch.from_numpy(np.stack(rows) if rows else np.zeros((1, 256), np.int8)).to(device)


def _columns_a_step(size: int, width: int) -> tuple[int, bool]:
    """Columns of a step, and whether steps of that many are whole."""
    columns = -(-size // COLUMN_DIMS[width])
    least = max(8, DEPTH // PARTS[width])
    for step in (128, 64, 32, 16, 8):
        if step >= least and columns % step == 0 and size % COLUMN_DIMS[width] == 0:
            return step, True
    return max(least, min(32, 1 << (columns - 1).bit_length())), False


@lru_cache(maxsize=64)
def key_layout(bands: tuple[BandKey, ...], assembled: bool, device: torch.device) -> KeyLayout:
    """The layout of keys' bands, with assembly or all portable."""
    dim = sum(band[0] for band in bands)
    row = sum(-(-size * plane // 8) for size, width, *_ in bands for plane in planes_of(width))
    constants, assemblies, slots = [], [], []
    first, byte, slot = 0, 0, 0
    kept = [band for band in bands if band[1]]
    for size, width, steps, _, _ in bands:
        if width:
            plane = -(-size * (2 if width == 3 else width) // 8)
            step, whole = _columns_a_step(size, width)
            columns = -(-size // COLUMN_DIMS[width])
            quad = assembled and whole and all(offset % 16 == 0 for offset in (row, byte, plane))
            form = int(whole)
            if width == 3 and whole and step >= DEPTH // 2 and quad == assembled:
                form, step, columns = BYTES, 2 * step, 2 * columns
            dims = slot_dims(2 if form == BYTES else width, -(-columns // step) * step, quad)
            dims = dims.reshape(len(dims), -1, step).transpose(1, 0, 2).ravel()  # step by step, part by part
            constants.append((width, columns, step, byte, plane, slot, len(dims), form))
            assemblies.append(_assembly(width, steps, quad, form) if assembled else "")
            slots.append(np.where(dims < size, first + dims, dim))
            byte += plane + (-(-size // 8) if width == 3 else 0)
            slot += len(dims)
        first += size
    return KeyLayout(
        tuple(constants),
        tuple(assemblies),
        torch.from_numpy(np.concatenate(slots).astype(np.int64)).to(device),
        _tables(kept, device),
        tuple(band[3] for band in kept),
        tuple(band[4] for band in kept),
    )


def _assembly(width: int, steps: tuple[int, ...], quad: bool, form: int) -> str:
    """`decode_triton.assembly`, and the PTX of 3 bits by bytes."""
    if form != BYTES:
        return assembly(width, list(steps), quad)
    return _bytes_3(*(f"{int.from_bytes(bytes(steps[i : i + 4]), 'little'):#x}" for i in (0, 4)))


def _bytes_3(low: str, high: str) -> str:
    """Nibbles of two low bits from $4 and a high bit from $5, looked up in two words."""
    lines = ["shl.b32 a, $5, 2;", "lop3.b32 a, a, 0x00440044, 0, 0xc0;", "lop3.b32 a, $5, 0x44004400, a, 0xea;"]
    lines += ["lop3.b32 a, $4, 0x33333333, a, 0xea;", f"prmt.b32 $0, {low}, {high}, a;", "shr.u32 a, a, 16;"]
    lines += [f"prmt.b32 $1, {low}, {high}, a;", "shl.b32 a, $5, 1;", "lop3.b32 a, a, 0x00440044, 0, 0xc0;"]
    lines += ["shr.u32 b, $5, 1;", "lop3.b32 a, b, 0x44004400, a, 0xea;", "shr.u32 b, $4, 2;"]
    lines += ["lop3.b32 a, b, 0x33333333, a, 0xea;", f"prmt.b32 $2, {low}, {high}, a;", "shr.u32 a, a, 16;"]
    return "\n".join(["{ .reg .b32 a, b;", *lines, f"prmt.b32 $3, {low}, {high}, a;", "}"])


def _token_of_bits(width: int, columns: int, block: int, quad: bool) -> tuple[list[int], int]:
    """For each bit of (group, place in the group's depth), low first, the bit of the token; and the bits of the place.

    A group holds neighbouring parts side by side, so that its depth is at least 32.
    """
    flat = slot_dims(width, columns, quad).ravel()
    depth = max(columns, min(DEPTH, block))
    bits = [int(flat[1 << bit]).bit_length() - 1 for bit in range(block.bit_length() - 1)]
    return bits, depth.bit_length() - 1


@lru_cache(maxsize=64)
def value_layout(bands: tuple[BandKey, ...], block: int, assembled: bool, device: torch.device) -> ValueLayout:
    """The layout of values' bands in blocks of so many tokens (a power of two)."""
    log = block.bit_length() - 1
    kept = [band for band in bands if band[1]]
    rows: list[int] = []  # for each bit of a score's row, low first, the bit of the token
    constants, orders, assemblies = [], [], []
    first, byte = 0, 0
    for size, width, steps, _, _ in bands:
        if width:
            nbytes = sum(-(-block * plane // 8) for plane in planes_of(width))
            plane = block * (2 if width == 3 else width) // 8
            columns, form = block // COLUMN_DIMS[width], 1
            quad = assembled and columns % 4 == 0 and nbytes % 16 == 0 and plane % 16 == 0
            if width == 3 and columns >= DEPTH // 2 and quad == assembled:
                form, columns = BYTES, 2 * columns
            bits, places = _token_of_bits(2 if form == BYTES else width, columns, block, quad)
            if not rows:
                rows = _rows_for(bits, places, log)
            # Axes of a reshape to twos count from the highest bit.
            axes = [log - 1 - rows.index(token) for token in bits]
            orders.append((*reversed(axes[:places]), log, *reversed(axes[places:])))
            constants.append((width, columns, byte, nbytes, plane, first, size, form))
            assemblies.append(_assembly(width, steps, quad, form) if assembled else "")
            byte += size * nbytes
        first += size
    tokens = np.zeros(block, np.int32)
    for bit, token in enumerate(rows):
        tokens |= ((np.arange(block) >> bit & 1) << token).astype(np.int32)
    return ValueLayout(
        tuple(constants),
        tuple(orders),
        tuple(assemblies),
        _tables(kept, device),
        tuple(band[3] for band in kept),
        tuple(band[4] for band in kept),
        torch.from_numpy(tokens).to(device),
    )


def _rows_for(bits: list[int], places: int, log: int) -> list[int]:
    """The bit of the token for each bit of a score's row: groups on the bits that one thread holds, 3 and 6 upwards."""
    held = [bit for bit in (*range(6, log), 3) if bit < log]
    groups = sorted(held[: log - places])
    rows = [0] * log
    for bit, token in zip(groups, bits[places:], strict=True):
        rows[bit] = token
    for bit, token in zip([bit for bit in range(log) if bit not in groups], bits[:places], strict=True):
        rows[bit] = token
    return rows
