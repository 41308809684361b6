"""`scan` in Triton: the top k of estimated scores, without writing the score matrix.

Four steps. (1) Programs take tiles of rows and a block of queries, decode the codes to int8 in registers, multiply them
with int8 queries on the tensor cores, and write one number for each tile and query: the tile's best score. (2) The k
tiles of largest maximum hold the top k. They are picked among the tiles of the k runs of tiles of largest maximum.
(3) Those tiles' rows are scored once more, by the same integer arithmetic, and (4) the k best of them are the result.
Where the tiles are not many times k, step 1 writes the scores themselves.

Trellis codes (`trellis_triton`) go through the same steps: their columns are loaded and decoded in another way.

The queries are rounded to int8 with a scale for each query and band, where bands share a run (`scan_layout`) such that
their products have one unit. With `precision="exact"` levels and queries stay float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from tqsearch.kernels import scan_bands, scan_hopper
from tqsearch.kernels.bands import BandTable
from tqsearch.kernels.launch import Launcher, variant
from tqsearch.kernels.reference import merge_top_k
from tqsearch.kernels.scan_bands import BandScan
from tqsearch.kernels.scan_cuts import Config, Shapes, config_for
from tqsearch.kernels.scan_kernels_triton import arrange_kernel, rescore_kernel, scan_kernel
from tqsearch.kernels.scan_layout import Layout, keyed, layout_of
from tqsearch.kernels.scan_top_triton import best_kernel, choose_kernel, group_kernel

_FEW = 32  # the largest k whose best tiles and rows one program picks
_FEW_QUERIES = 16  # so few that a program for each of their best tiles would leave most of a GPU idle

_launch_arrange, _launch_scan, _launch_group, _launch_choose, _launch_rescore, _launch_best = map(
    Launcher, (arrange_kernel, scan_kernel, group_kernel, choose_kernel, rescore_kernel, best_kernel)
)


class Arranged(NamedTuple):
    """Queries as the kernels read them.

    Attributes:
        values: (more than q, slots) int8 (float32 when exact), each band's coordinates in the order of its parts,
            zeros where none is, and in rows from q on.
        alpha: (runs, more than q) float32, what the sums of a run of bands are multiplied by; see `scan_layout`.
        beta: (more than q,) float32, what is then added.
    """

    values: Tensor
    alpha: Tensor
    beta: Tensor


def _power(number: int) -> int:
    """The power of two that is the number or follows it."""
    return 1 << max(0, number - 1).bit_length()


def _shapes(bands: tuple[BandTable, ...]) -> Shapes:
    return tuple([(band.size, band.width, band.codec) for band in bands])


def _arrange(queries: Tensor, layout: Layout, exact: bool, beyond: int) -> Arranged:
    """Rotated queries (q, d) float32 in the order of the slots, rounded to int8 unless exact; `beyond` more, zeros."""
    (count, dim), runs, device = queries.shape, layout.runs[-1] + 1, queries.device
    rows = -(-(count + beyond) // 16) * 16
    if exact:
        padded = queries.new_zeros((rows, dim + 1))
        padded[:count, :dim] = queries
        return Arranged(padded[:, layout.slots], queries.new_ones((runs, rows)), queries.new_zeros(rows))
    slots = len(layout.slots)
    values = torch.empty((rows, slots), dtype=torch.int8, device=device)
    alpha = torch.empty((runs, rows), dtype=torch.float32, device=device)
    beta = torch.empty(rows, dtype=torch.float32, device=device)

    def constants() -> dict[str, object]:
        widest = max(end - band[4] for end, band in zip(layout.ends, layout.bands, strict=True))
        return {
            "BANDS": layout.bands,
            "ENDS": layout.ends,
            "SLOTS": slots,
            "BLOCK": _power(widest),
        }

    queries = queries.contiguous()
    _launch_arrange(
        (rows, 1, 1),
        (layout.serial, *variant((queries,), ())),
        (queries, layout.slots, layout.steps, values, alpha, beta, count, dim, rows),
        constants,
        num_warps=4,
    )
    return Arranged(values, alpha, beta)


@lru_cache(maxsize=64)
def _multiprocessors(device: torch.device) -> tuple[int, int]:
    """How many the device has, and the bytes of shared memory of each that a program may take."""
    if device.type != "cuda":
        return 2, 232_448
    found = torch.cuda.get_device_properties(device)
    return found.multi_processor_count, getattr(found, "shared_memory_per_block_optin", 1 << 16)  # not on AMD


class Scanner:
    """One batch of queries over a run of rows: the steps of `scan`, with all that they share."""

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
        self.rows, self.device, self.exact = len(packed), packed.device, exact
        aligned = packed.stride(0) % 16 == 0 and packed.data_ptr() % 16 == 0
        key, cut = keyed(bands, exact), None
        if config is None:
            shapes, shared = _shapes(bands), _multiprocessors(self.device)[1]
            config = config_for(len(queries), shapes, exact, shared)
            if aligned and not exact and scan_hopper.available(self.device):
                config = scan_hopper.config_for(len(queries), shapes, shared) or config
            if not exact and scan_bands.available(self.device) and scan_bands.decodable(key):
                cut = scan_bands.cut_of(len(queries), key, packed.stride(0), packed.data_ptr() % 16, shared)
                config = config if cut is None else scan_bands.RESCORED
        self.config = config
        self._rescored = min(config.tile, 16) if len(queries) <= _FEW_QUERIES else config.tile  # rows a program
        self.layout = layout = layout_of(key, config.block_c, exact, aligned, packed.device)
        values, alpha, beta = _arrange(queries, layout, exact, config.block_q)
        none = layout.tables
        self._operands = (
            packed,
            scales,
            none if bias is None else bias,
            none if mask is None else mask.view(torch.uint8),
            values,
            alpha,
            beta,
            none,
        )
        self._alpha_stride = alpha.shape[1]
        self._row, self._has_bias, self._has_mask = packed.stride(0), bias is not None, mask is not None
        self._bands: BandScan | None = None
        if cut is not None:
            steps = scan_bands.steps_of(key, cut.columns, layout, self._row, packed.device)
            stepped = (*self._operands[:4], *_arrange(queries, steps.layout, exact, cut.block_q))
            self._bands = BandScan(cut, steps, stepped, self._has_bias, self._has_mask)
        self._key = (layout.serial, config, self._row, self._has_bias, self._has_mask, *variant(self._operands[:4], ()))

    def _constants(self) -> dict[str, object]:
        row, config = self._row, self.config
        return {
            "ROW": row,
            "SLOTS": len(self.layout.slots),
            "BANDS": self.layout.bands,
            "ASSEMBLIES": self.layout.assemblies,
            "TILE": config.tile,
            "BLOCK_C": config.block_c,
            "HAS_BIAS": self._has_bias,
            "HAS_MASK": self._has_mask,
            "EXACT": self.exact,
            "EVEN_ROWS": row % 2 == 0 and all(band[2] % 2 == 0 for band in self.layout.bands),
        }

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def scores(self, queries: slice, rows: slice) -> Tensor:
        """(q, rows) float32."""
        out = self._empty(queries.stop - queries.start, rows.stop - rows.start)
        self._scan(queries, rows, out, False)
        return out

    def maxima(self, queries: slice) -> Tensor:
        """Step 1: the best score of each tile, (q, tiles) float32."""
        out = self._empty(queries.stop - queries.start, -(-self.rows // self.config.tile))
        self._scan(queries, slice(0, self.rows), out, True)
        return out

    def compiled(self) -> bool:
        """Whether the kernel of step 1 is compiled; in the interpreter nothing is."""
        if self._bands is not None:
            return self._bands.compiled()
        launch = scan_hopper.launcher() if self.config.groups else _launch_scan
        return (True, *self._key) in launch

    def _scan(self, queries: slice, rows: slice, out: Tensor, maxima: bool) -> None:
        (count, stride), n, config = out.shape, rows.stop - rows.start, self.config
        if maxima and self._bands is not None:
            self._bands.launch(out, queries.start, _multiprocessors(self.device)[0])
            return
        if maxima and config.groups:
            limits, terms = _multiprocessors(self.device), (self._has_bias, self._has_mask)
            key = (True, *self._key)
            scan_hopper.launch(config, self.layout, self._operands, terms, out, queries.start, key, limits)
            return
        blocks, tiles = -(-count // config.block_q), -(-n // config.tile)
        programs = tiles
        if config.programs:
            programs = max(1, min(tiles, _multiprocessors(self.device)[0] * config.programs // blocks))
        _launch_scan(
            (programs * blocks, 1, 1),
            (maxima, *self._key),
            (*self._operands, out, rows.start, n, queries.start, count, self._alpha_stride, stride, programs),
            lambda: {
                "BLOCK_Q": config.block_q,
                "STAGES": config.num_stages,
                "RESIDENT": config.resident,
                "MANY": config.programs > 0,
                "MAXIMA": maxima,
                **self._constants(),
            },
            num_warps=config.num_warps,
        )

    def choose(self, maxima: Tensor, k: int) -> Tensor:
        """Step 2: the k tiles of largest maximum, (q, k) int64."""
        if k > _FEW:
            return torch.topk(maxima, k, dim=1).indices
        count, tiles = maxima.shape
        group = max(64, _power(tiles // 4096))
        ends = -(-tiles // group)
        groups = self._empty(count, ends)
        chosen = torch.empty((count, k), dtype=torch.int64, device=self.device)
        block = max(1, 1024 // group)
        _launch_group(
            (count * -(-ends // block), 1, 1),
            (group, self.device),
            (maxima, groups, tiles, ends),
            lambda: {"GROUP": group, "BLOCK": block},
            num_warps=4,
        )
        spans, most = max(16, _power(ends)), max(2, _power(k))
        _launch_choose(
            (count, 1, 1),
            (group, spans, most, self.device),
            (maxima, groups, chosen, k, tiles, ends),
            lambda: {"GROUP": group, "GROUPS": spans, "K": most},
            num_warps=4,
        )
        return chosen

    def rescore(self, first_query: int, tiles: Tensor) -> Tensor:
        """Step 3: (q, k * tile) float32, the scores of the rows of chosen tiles (q, k) int64."""
        count, k = tiles.shape
        out = self._empty(count, k * self.config.tile)
        _launch_rescore(
            (count * k * (self.config.tile // self._rescored), 1, 1),
            (self._rescored, *self._key, *variant((tiles,), ())),
            (*self._operands, tiles, out, first_query, self.rows, k, self._alpha_stride),
            lambda: {"ROWS": self._rescored, **self._constants()},
            num_warps=4,
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
    tiles = -(-n // scanner.config.tile)
    if tiles < 4 * k:
        parts = [_top_of_scores(scanner, part, k, floats) for part in _split(count, max(16, floats // min(n, 1 << 16)))]
    else:
        if packed.is_cuda and not scanner.compiled() and not torch.cuda.is_current_stream_capturing():
            _compile_together(scanner, tiles, k)
        parts = [_top_of_tiles(scanner, part, k, floats) for part in _split(count, max(16, floats // tiles))]
    scores, rows = parts[0] if len(parts) == 1 else (torch.cat(column) for column in zip(*parts, strict=True))
    return scores, rows


def _compile_together(scanner: Scanner, tiles: int, k: int) -> None:
    """Runs the steps side by side, for one query and on numbers of no meaning: a compiler takes a second for each."""
    stream = torch.cuda.current_stream(scanner.device)
    chosen = torch.zeros((1, k), dtype=torch.int64, device=scanner.device)
    numbers = torch.zeros((1, max(tiles, k * scanner.config.tile)), dtype=torch.float32, device=scanner.device)

    def choose_and_sort() -> None:
        scanner.choose(numbers[:, :tiles], k)
        if k <= _FEW:
            _best(numbers, chosen, scanner.config.tile)

    def run(step: Callable[[], object]) -> None:
        with torch.cuda.device(scanner.device), torch.cuda.stream(stream):
            step()

    with ThreadPoolExecutor() as threads:
        steps = (lambda: scanner.maxima(slice(0, 1)), lambda: scanner.rescore(0, chosen), choose_and_sort)
        list(threads.map(run, steps))


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
    for part in _split(scanner.rows, max(scanner.config.tile, floats // count)):
        scores, rows = torch.topk(scanner.scores(queries, part), min(k, part.stop - part.start), dim=1)
        found = (scores, rows + part.start)
        best = found if best is None else merge_top_k(*best, *found, k)
    assert best is not None
    return best[0], best[1].masked_fill(best[0] == -math.inf, -1)


def _top_of_tiles(scanner: Scanner, queries: slice, k: int, floats: int) -> tuple[Tensor, Tensor]:
    chosen = scanner.choose(scanner.maxima(queries), k)
    tile = scanner.config.tile
    scores, rows = [], []
    for part in _split(len(chosen), max(1, floats // (k * tile))):
        tiles = chosen if part == slice(0, len(chosen)) else chosen[part]
        candidates = scanner.rescore(queries.start + part.start, tiles)
        top, row = _best(candidates, tiles, tile) if k <= _FEW else _sorted(candidates, tiles, tile)
        scores.append(top)
        rows.append(row)
    return (scores[0], rows[0]) if len(rows) == 1 else (torch.cat(scores), torch.cat(rows))


def _best(candidates: Tensor, tiles: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """The top k of candidates (q, k * tile) of tiles (q, k), k at most _FEW: scores and rows, -1 where -inf."""
    count, k = tiles.shape
    scores = torch.empty((count, k), dtype=torch.float32, device=tiles.device)
    rows = torch.empty_like(tiles)
    block = _power(k * tile)
    _launch_best(
        (count, 1, 1),
        (tile, block, tiles.device, *variant((tiles,), ())),
        (candidates, tiles, scores, rows, k),
        lambda: {"TILE": tile, "BLOCK": block},
        num_warps=max(1, min(8, block // 256)),
    )
    return scores, rows


def _sorted(candidates: Tensor, tiles: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """`_best` for any k."""
    scores, place = torch.topk(candidates, tiles.shape[1], dim=1)
    rows = tiles.gather(1, place // tile) * tile + place % tile
    return scores, rows.masked_fill(scores == -math.inf, -1)
