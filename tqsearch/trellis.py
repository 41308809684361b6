"""Trellis-coded levels: several times the levels of a scalar code at the same number of bits.

A row is cut into bands, each with its own width of 1 to 4 bits. A coordinate of b bits has 2^(r + b - 1) levels,
numbered in ascending order and dealt into 2^r subsets by the number's low bits. The first bits of a row's codes, one a
coordinate, are its *path* p[0], p[1], ... Each of the r low bits of coordinate t's number is a parity of some of the
path's last nine bits p[t], p[t - 1] ... p[t - 8] (`TrellisCodebook.taps` says which; before the row's start the path is
zero). The code's other b - 1 bits, f, are the number's high bits:

    number[t] = 2^r f[t] + sum over i < r of 2^i (xor over j in taps[i] of p[t - j])

So every sequence of bits is a sequence of levels, any coordinate is decoded from nine bits of the path and b - 1 of its
own, and storage is b bits a coordinate. The path is a walk through a trellis of 256 states, and encoding finds the walk
whose levels are nearest to the row (`viterbi`). It runs on from band to band, because its start, from a known state,
costs as much error as about four coordinates more.

This is trellis-coded quantization (Marcellin and Fischer, 1990), with the code as a feed-forward shift register, so
that decoding needs no recursion. At 3 and 4 bits the taps are Ungerboeck's code of 256 states; at 1 and 2 bits three
parities do better than two, and theirs were found by a search. Expected squared error on N(0, 1):

    bits                        1       2        3        4
    best scalar levels        0.3634  0.1175   0.03454  0.00950
    trellis (`distortion`)    0.2742  0.0732   0.02172  0.00587
    no code can be below      0.25    0.0625   0.01563  0.00391

Levels are half integers times a step, so that integer kernels multiply the very levels that this module defines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from tqsearch.errors import InvalidInputError
from tqsearch.viterbi import STATES, Stage, best_paths

MIN_BITS, MAX_BITS = 1, 4

Bands = Sequence[tuple[int, int]]  # (size, bits) pairs, in the order of the coordinates
Search = Callable[[Tensor, Sequence[Stage]], Tensor]

_UNGERBOECK = ((1, 4, 5, 6, 7), (0, 2, 3, 6, 8))
_TAPS = {
    1: ((1, 3, 4, 6, 7), (1, 2, 3, 4, 7), (0, 1, 4, 6, 8)),
    2: ((2, 3, 5, 6, 7), (1, 3, 7), (0, 2, 3, 6, 8)),
    3: _UNGERBOECK,
    4: _UNGERBOECK,
}
# Step, expected squared error on N(0, 1), and the integers of the upper half of the levels; the lower half is ~i.
_LEVELS: dict[int, tuple[float, float, tuple[int, ...]]] = {
    1: (0.0252326, 0.27416, (10, 22, 25, 60)),
    2: (0.0339498, 0.07320, (2, 7, 12, 19, 24, 33, 41, 62)),
    3: (0.0393776, 0.02172, (2, 7, 12, 18, 24, 33, 45, 63)),
    4: (0.0243322, 0.005868, (1, 5, 8, 12, 16, 20, 24, 29, 34, 40, 47, 55, 65, 78, 95, 120)),
}


@dataclass(frozen=True)
class TrellisCodebook:
    """The levels of one width, optimal for N(0, 1) under the trellis.

    Attributes:
        bits: the width b.
        taps: of each of the r parities, lowest bit first: how many coordinates back its path bits lie.
        integers: 2^(r + b - 1) ascending values, antisymmetric about -1/2: level = (integer + 1/2) step. They lie in
            -64 .. 63, at 4 bits in -128 .. 127.
        step: see `integers`.
        distortion: the expected squared error of a coordinate of variance 1 in a long row.
    """

    bits: int
    taps: tuple[tuple[int, ...], ...]
    integers: tuple[int, ...]
    step: float
    distortion: float

    def subsets(self, device: torch.device | None = None) -> Tensor:
        """The levels by subset: (2^r, 2^(b - 1)) float32."""
        return self.levels(device).view(-1, 1 << len(self.taps)).t().contiguous()

    def levels(self, device: torch.device | None = None) -> Tensor:
        """(2^(r + b - 1),) float32, ascending."""
        integers = torch.tensor(self.integers, dtype=torch.float64, device="cpu")
        return ((integers + 0.5) * self.step).float().to(device)


@lru_cache(maxsize=MAX_BITS)
def trellis_codebook(bits: int) -> TrellisCodebook:
    """The trellis levels of a width.

    Args:
        bits: 1 to 4.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
        raise InvalidInputError(f"a trellis code has {MIN_BITS} to {MAX_BITS} bits a coordinate, got {bits!r}")
    step, distortion, upper = _LEVELS[bits]
    return TrellisCodebook(bits, _TAPS[bits], tuple(~i for i in reversed(upper)) + upper, step, distortion)


def row_bytes(bands: Bands) -> int:
    """Bytes of a packed row: with sizes that are multiples of 8, those of the scalar codes of the same widths."""
    return -(-sum(size for size, _ in bands) // 8) + sum((bits - 1) * -(-size // 8) for size, bits in bands)


def encode(
    values: Tensor, bands: Bands, books: Sequence[TrellisCodebook] | None = None, search: Search = best_paths
) -> Tensor:
    """The codes whose levels are nearest to each row, of all sequences that the trellis allows.

    Args:
        values: (n, d) float32, finite, of variance about 1 a coordinate.
        bands: sizes summing to d.
        books: a codebook a band, in place of `trellis_codebook` of its width; how codebooks are fitted.
        search: what finds the walk: `viterbi.best_paths`, or a kernel that finds the same.

    Returns:
        (n, d) uint8 codes below 2**bits: the path's bit, then f, the number within the subset, above it. They are the
        same in any batch and on any device.
    """
    books = _books(values, bands) if books is None else books
    stages = [
        Stage(size, book.subsets(values.device), _window_subsets(book.taps, values.device))
        for (size, _), book in zip(bands, books, strict=True)
    ]
    path = search(values, stages)
    codes, first = path.clone(), 0
    for stage, book in zip(stages, books, strict=True):
        columns = slice(first, first + stage.size)
        codes[:, columns] |= _nearest(values[:, columns], _parities(path, columns, book.taps), stage.levels) << 1
        first += stage.size
    return codes


def level_numbers(codes: Tensor, bands: Bands) -> Tensor:
    """The number of each coordinate's level in `TrellisCodebook.levels`: (n, d) uint8 codes to (n, d) uint8."""
    books = _books(codes, bands)
    path, numbers, first = codes & 1, torch.empty_like(codes), 0
    for (size, _), book in zip(bands, books, strict=True):
        columns = slice(first, first + size)
        numbers[:, columns] = ((codes[:, columns] >> 1) << len(book.taps)) | _parities(path, columns, book.taps)
        first += size
    return numbers


def decode(codes: Tensor, bands: Bands) -> Tensor:
    """The levels of codes: (n, d) uint8 to (n, d) float32."""
    numbers, first = level_numbers(codes, bands).int(), 0
    levels = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    for size, bits in bands:
        part = numbers[:, first : first + size]
        table = trellis_codebook(bits).levels(codes.device)
        levels[:, first : first + size] = torch.index_select(table, 0, part.flatten()).view(part.shape)
        first += size
    return levels


def pack(codes: Tensor, bands: Bands) -> Tensor:
    """Codes to rows of bytes: planes of one bit a coordinate.

    The first plane is the path, of all bands together. Then, band by band, come the planes of f, lowest bit first.
    Within a plane its t-th coordinate is bit t % 8, from the low end, of byte t // 8; spare bits are zero.

    Args:
        codes: (n, d) uint8, each below 2**bits.
        bands: sizes summing to d.

    Returns:
        (n, row_bytes(bands)) uint8.
    """
    planes, first = [_pack_plane(codes & 1)], 0
    for size, bits in bands:
        planes += [_pack_plane((codes[:, first : first + size] >> i) & 1) for i in range(1, bits)]
        first += size
    return torch.cat(planes, dim=1)


def unpack(packed: Tensor, bands: Bands) -> Tensor:
    """The inverse of `pack`: (n, row_bytes(bands)) uint8 to (n, d) uint8 codes."""
    dim = sum(size for size, _ in bands)
    byte = -(-dim // 8)
    codes, first = _unpack_plane(packed[:, :byte], dim), 0
    for size, bits in bands:
        for i in range(1, bits):
            end = byte - (-size // 8)
            codes[:, first : first + size] |= _unpack_plane(packed[:, byte:end], size) << i
            byte = end
        first += size
    return codes


def _pack_plane(bits: Tensor) -> Tensor:
    count, size = bits.shape
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    padded = torch.nn.functional.pad(bits, (0, -size % 8)).view(count, -(-size // 8), 8)
    return (padded << places).sum(dim=2, dtype=torch.uint8)


def _unpack_plane(plane: Tensor, size: int) -> Tensor:
    places = torch.arange(8, dtype=torch.uint8, device=plane.device)
    return ((plane[..., None] >> places) & 1).flatten(1)[:, :size]


def _books(rows: Tensor, bands: Bands) -> list[TrellisCodebook]:
    books = [trellis_codebook(bits) for _, bits in bands]
    dim = sum(size for size, _ in bands)
    if rows.ndim != 2 or rows.shape[1] != dim:
        raise InvalidInputError(f"rows must have shape (n, {dim}), as their bands have, got {tuple(rows.shape)}")
    return books


def _window_subsets(taps: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """The subset of every window of nine path bits, the newest lowest: (512,) int32."""
    windows = torch.arange(2 * STATES, dtype=torch.int32, device=device)
    subsets = torch.zeros_like(windows)
    for place, backs in enumerate(taps):
        for back in backs:
            subsets ^= ((windows >> back) & 1) << place
    return subsets


def _parities(path: Tensor, columns: slice, taps: tuple[tuple[int, ...], ...]) -> Tensor:
    """The parities of some coordinates as one number, their subset: (n, d) uint8 path to (n, columns) uint8."""
    subsets = torch.zeros_like(path[:, columns])
    for place, backs in enumerate(taps):
        for back in backs:
            missing = max(back - columns.start, 0)  # coordinates whose bit lies before the row, where the path is zero
            if missing < subsets.shape[1]:
                subsets[:, missing:] ^= path[:, columns.start + missing - back : columns.stop - back] << place
    return subsets


def _nearest(values: Tensor, subsets: Tensor, levels: Tensor) -> Tensor:
    """The number f of the level nearest to each value in its subset: (n, d) uint8. `levels` is (subset, f)."""
    boundaries = 0.5 * (levels[:, 1:] + levels[:, :-1])
    index = subsets.flatten().int()
    numbers = torch.zeros_like(subsets)
    for boundary in boundaries.t():
        numbers += values > torch.index_select(boundary, 0, index).view(values.shape)
    return numbers
