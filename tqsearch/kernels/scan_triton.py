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
from torch import Tensor

from tqsearch.kernels import trellis_triton
from tqsearch.kernels.bands import BandTable, along_trellis
from tqsearch.kernels.decode_triton import COLUMN_DIMS, assembly, slot_dims
from tqsearch.kernels.reference import merge_top_k
from tqsearch.kernels.scan_kernels_triton import arrange_kernel, best_kernel, rescore_kernel, scan_kernel
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
            planes = [-(-size * plane // 8) for plane in planes_of(width)]
            constants.append((width, columns, byte, planes[0], slot, 0))
            assemblies.append(assembly(width, [int(v) for v in values], quad) if assembled else "")
            dims = slot_dims(width, padded, quad)
            byte += sum(planes)
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
    6: ((16, Config(16, 64, 4, 3)), (64, Config(64, 32, 4, 3)), (128, Config(128, 32, 4, 2))),
    8: ((16, Config(16, 64, 4, 3)), (64, Config(64, 64, 4, 3)), (128, Config(128, 64, 4, 3))),
}
# Of several bands: two accumulators are alive, and whatever is wider spills registers.
_SEVERAL = ((16, Config(16, 32, 8, 3)), (32, Config(32, 32, 8, 2)))
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
    if sum(band.width > 0 for band in bands) > 1:
        choices = _SEVERAL
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
