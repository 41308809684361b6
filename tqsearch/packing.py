"""Codes to bytes and back: the layout of a row of packed codes.

A row holds its bands one after the other; a band holds the planes of its width one after the other (`plan.planes_of`: 3
bits are a 2-bit plane, then a 1-bit plane), and each plane ends on a whole byte, its spare bits zero. The widest plane
holds the low bits of each code.

Within a plane of p-bit fields, with 8 / p fields a byte, coordinate i of the band lies in byte i // (8 / p). Its field
is number i % (8 / p) from the low end, except in 1-bit planes, where the eight coordinates of a byte lie in the order
0, 1, 4, 5, 2, 3, 6, 7 from the low end. With that order the nibbles of a 1-bit plane line up with those of a 2-bit
plane, and a GPU decodes 3 bits in registers by shifts and masks of whole words; 1-bit codes alone decode as easily
either way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tqsearch.plan import Band, BitPlan, planes_of

# From the low end of a byte, the fields' coordinates within their group of 8 / p.
FIELD_ORDER = {8: (0,), 4: (0, 1), 2: (0, 1, 2, 3), 1: (0, 1, 4, 5, 2, 3, 6, 7)}


def pack(codes: Tensor, plan: BitPlan) -> Tensor:
    """Packs codes into rows of bytes.

    Args:
        codes: (n, dim) uint8, each below 2**width of its coordinate's band.
        plan: the widths.

    Returns:
        (n, plan.bytes_per_vector) uint8.
    """
    return pack_columns(codes.t(), plan).t().contiguous()


def pack_columns(codes: Tensor, plan: BitPlan) -> Tensor:
    """`pack` with vectors as columns: (dim, n) uint8 to (bytes_per_vector, n) uint8."""
    packed = torch.empty((plan.bytes_per_vector, codes.shape[1]), dtype=torch.uint8, device=codes.device)
    row, byte = 0, 0
    for band in plan.bands:
        shift = 0
        for plane in planes_of(band.width):
            fields = (codes[row : row + band.size] >> shift) & ((1 << plane) - 1)
            size = -(-band.size * plane // 8)
            _fold(fields, plane, packed[byte : byte + size])
            byte += size
            shift += plane
        row += band.size
    return packed


def by_planes(rows: Tensor, bands: Sequence[tuple[int, int]]) -> Tensor:
    """Blocks of packed rows, each row's planes one after the other, to blocks where each plane's rows lie together.

    Args:
        rows: (n, count, row bytes) uint8.
        bands: (size, width) of each band.

    Returns:
        (n, count * row bytes) uint8.
    """
    planes = _plane_bytes(bands)
    if len(planes) < 2:
        return rows.flatten(1)
    return torch.cat([part.flatten(1) for part in torch.split(rows, planes, dim=2)], dim=1)


def by_rows(blocks: Tensor, bands: Sequence[tuple[int, int]], count: int) -> Tensor:
    """The inverse of `by_planes`: (n, count * row bytes) to (n, count, row bytes)."""
    planes = _plane_bytes(bands)
    if len(planes) < 2:
        return blocks.reshape(len(blocks), count, sum(planes))
    parts = zip(torch.split(blocks, [count * nbytes for nbytes in planes], dim=1), planes, strict=True)
    return torch.cat([part.view(len(blocks), count, nbytes) for part, nbytes in parts], dim=2)


def _plane_bytes(bands: Sequence[tuple[int, int]]) -> list[int]:
    return [-(-size * plane // 8) for size, width in bands for plane in planes_of(width)]


def _fold(fields: Tensor, plane: int, out: Tensor) -> None:
    """Fields (m, n) of `plane` bits into bytes (ceil(m plane / 8), n)."""
    per_byte = 8 // plane
    spare = -fields.shape[0] % per_byte
    if spare:
        fields = torch.cat([fields, fields.new_zeros((spare, fields.shape[1]))])
    groups = fields.view(len(fields) // per_byte, per_byte, fields.shape[1])
    out.copy_(groups[:, FIELD_ORDER[plane][0]])
    for position, coordinate in enumerate(FIELD_ORDER[plane][1:], start=1):
        out |= groups[:, coordinate] << (position * plane)


def unpack(packed: Tensor, plan: BitPlan) -> Tensor:
    """Codes from rows of bytes, the inverse of `pack`.

    Args:
        packed: (n, plan.bytes_per_vector) uint8.
        plan: the widths.

    Returns:
        (n, dim) uint8.
    """
    bands, byte = [], 0
    for band in plan.bands:
        bands.append(unpack_band(packed[:, byte : byte + band.nbytes], band))
        byte += band.nbytes
    return torch.cat(bands, dim=1)


def unpack_band(packed: Tensor, band: Band) -> Tensor:
    """The codes of one band: (n, band.nbytes) uint8 to (n, band.size) uint8."""
    codes = torch.zeros((packed.shape[0], band.size), dtype=torch.uint8, device=packed.device)
    byte, shift = 0, 0
    for plane in planes_of(band.width):
        size = -(-band.size * plane // 8)
        order = FIELD_ORDER[plane]
        places = [order.index(i) * plane for i in range(len(order))]
        shifts = torch.tensor(places, dtype=torch.uint8, device="cpu").to(packed.device)
        fields = (packed[:, byte : byte + size, None] >> shifts) & ((1 << plane) - 1)
        codes |= fields.flatten(1)[:, : band.size] << shift
        byte += size
        shift += plane
    return codes
