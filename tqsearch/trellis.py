"""Trellis-coded levels: several times the levels of a scalar code at the same number of bits.

A coordinate of b bits has 2^(r + b - 1) levels, numbered in ascending order and dealt into 2^r subsets by the number's
low bits. The first bits of a row's codes, one a coordinate, are its *path* p[0], p[1], ... Each of the r low bits of
coordinate t's number is a parity of some of the path's last nine bits p[t], p[t - 1] ... p[t - 8] (`TrellisCodebook.
taps` says which; before the row's start the path is zero). The code's other b - 1 bits, f, are the number's high bits:

    number[t] = 2^r f[t] + sum over i < r of 2^i (xor over j in taps[i] of p[t - j])

So every sequence of bits is a sequence of levels, any coordinate is decoded from nine bits of the path and b - 1 of its
own, and storage is b bits a coordinate. The path is a walk through a trellis of 256 states. Encoding finds the walk
whose levels are nearest to the row, exactly, by dynamic programming (Viterbi).

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

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from tqsearch.errors import InvalidInputError

MIN_BITS, MAX_BITS = 1, 4
STATES = 256  # the path's last eight bits, the newest lowest

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

# Back pointers held at a time, one a state, coordinate and row. A GPU wants many rows a step, a CPU few in its cache.
_HELD_CPU = 1 << 24
_HELD_GPU = 1 << 31


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

    def levels(self, device: torch.device | None = None) -> Tensor:
        """(2^(r + b - 1),) float32, ascending."""
        return ((torch.tensor(self.integers, dtype=torch.float64) + 0.5) * self.step).float().to(device)


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


def row_bytes(dim: int, bits: int) -> int:
    """Bytes of a packed row: b planes of a bit a coordinate, each ending on a whole byte."""
    return bits * -(-dim // 8)


def encode(values: Tensor, bits: int) -> Tensor:
    """The codes whose levels are nearest to each row, of all sequences that the trellis allows.

    The sums run in float32 in a fixed order, so a row's codes are the same in any batch and on any device.

    Args:
        values: (n, d) float32, finite, of variance about 1 a coordinate.
        bits: 1 to 4.

    Returns:
        (n, d) uint8 codes below 2**bits: the path's bit, then f, the number within the subset, above it.
    """
    book = trellis_codebook(bits)
    return encode_with(values, book.levels(values.device), book.taps)


def encode_with(values: Tensor, levels: Tensor, taps: tuple[tuple[int, ...], ...]) -> Tensor:
    """`encode` with any levels and taps: how the levels are fitted.

    Args:
        values: as for `encode`.
        levels: (2^(r + b - 1),) float32, ascending.
        taps: as `TrellisCodebook.taps`, r of them.
    """
    subsets = levels.view(-1, 1 << len(taps)).t().contiguous()  # (subset, f)
    count, dim = values.shape
    codes = torch.empty((count, dim), dtype=torch.uint8, device=values.device)
    held = _HELD_CPU if values.device.type == "cpu" else _HELD_GPU
    size = max(held // (STATES * max(dim, 1)), 16)
    for start in range(0, count, size):
        rows = values[start : start + size]
        path = _best_path(rows.t().contiguous(), subsets, taps).t()
        codes[start : start + size] = path | (_nearest(rows, _subsets(path, taps), subsets) << 1)
    return codes


def level_numbers(codes: Tensor, bits: int) -> Tensor:
    """The number of each coordinate's level in `TrellisCodebook.levels`: (n, d) uint8 codes to (n, d) uint8."""
    taps = trellis_codebook(bits).taps
    return ((codes >> 1) << len(taps)) | _subsets(codes & 1, taps)


def decode(codes: Tensor, bits: int) -> Tensor:
    """The levels of codes: (n, d) uint8 to (n, d) float32."""
    numbers = level_numbers(codes, bits)
    levels = trellis_codebook(bits).levels(codes.device)
    return torch.index_select(levels, 0, numbers.flatten().int()).view(codes.shape)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes to rows of bytes: bit plane i holds bit i of every code, the path first.

    Within a plane, coordinate t is bit t % 8, from the low end, of byte t // 8; spare bits are zero.

    Args:
        codes: (n, d) uint8, below 2**bits.
        bits: 1 to 4.

    Returns:
        (n, row_bytes(d, bits)) uint8.
    """
    count, dim = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -dim % 8)).view(count, -1, 8)
    places = torch.arange(8, dtype=torch.uint8, device=codes.device)
    planes = [(((padded >> i) & 1) << places).sum(dim=2, dtype=torch.uint8) for i in range(bits)]
    return torch.cat(planes, dim=1)


def unpack(packed: Tensor, dim: int, bits: int) -> Tensor:
    """The inverse of `pack`: (n, row_bytes(dim, bits)) uint8 to (n, dim) uint8 codes."""
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    planes = ((packed.view(len(packed), bits, -1)[..., None] >> places) & 1).flatten(2)[..., :dim]
    codes = planes[:, 0].clone()
    for i in range(1, bits):
        codes |= planes[:, i] << i
    return codes


def _subsets(path: Tensor, taps: tuple[tuple[int, ...], ...]) -> Tensor:
    """The parities of each coordinate, as one number: (n, d) uint8 path to (n, d) uint8."""
    dim = path.shape[1]
    subsets = torch.zeros_like(path)
    for place, backs in enumerate(taps):
        for back in backs:
            if back < dim:
                subsets[:, back:] ^= path[:, : dim - back] << place
    return subsets


def _nearest(values: Tensor, subsets: Tensor, levels: Tensor) -> Tensor:
    """The number f of the level nearest to each value in its subset: (n, d) uint8. `levels` is (subset, f)."""
    boundaries = 0.5 * (levels[:, 1:] + levels[:, :-1])
    index = subsets.int().flatten()
    numbers = torch.zeros_like(subsets)
    for boundary in boundaries.t():
        numbers += values > torch.index_select(boundary, 0, index).view(values.shape)
    return numbers


def _best_path(columns: Tensor, levels: Tensor, taps: tuple[tuple[int, ...], ...]) -> Tensor:
    """The path bits of least squared error of each column: (d, n) float32 to (d, n) uint8; `levels` is (subset, f).

    A window is a state's bit that falls out, then the eight bits of the next state: window = 256 * fallen + next, and
    the state before is window >> 1. For each next state the cheaper of the two windows is kept.
    """
    dim, count = columns.shape
    device = columns.device
    windows = torch.arange(2 * STATES, dtype=torch.int32, device=device)
    subsets = torch.zeros_like(windows)
    for place, backs in enumerate(taps):
        for back in backs:
            subsets ^= ((windows >> back) & 1) << place
    subsets = subsets.view(2, STATES)
    cost = torch.full((STATES, count), torch.inf, device=device)
    cost[0] = 0.0
    fallen = torch.empty((dim, STATES, count), dtype=torch.bool, device=device)
    for t in range(dim):
        errors = (columns[t] - levels[:, :, None]).square().amin(dim=1)  # (subsets, n)
        before = cost.view(2, STATES // 2, 1, count)
        costs = [
            (torch.index_select(errors, 0, subsets[i]).view(-1, 2, count) + before[i]).view(STATES, count)
            for i in range(2)
        ]
        torch.lt(costs[1], costs[0], out=fallen[t])
        torch.minimum(costs[1], costs[0], out=cost)
    path = torch.empty((dim, count), dtype=torch.uint8, device=device)
    state = cost.argmin(dim=0)
    for t in range(dim - 1, -1, -1):
        path[t] = state & 1
        state = (state >> 1) + fallen[t].gather(0, state[None])[0] * (STATES // 2)
    return path
