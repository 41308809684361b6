"""Every op in plain torch, on any device: the specification. `kernels/__init__.py` documents the signatures.

It is also what a CPU runs, so it works in blocks of rows that stay in the cache: memory is bounded by the block
whatever the size of the index.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from tqsearch import trellis
from tqsearch.kernels import trellis_lookup
from tqsearch.kernels.bands import BandTable, along_trellis, row_bytes, trellis_bands
from tqsearch.packing import pack_columns, unpack_band
from tqsearch.plan import Band, BitPlan
from tqsearch.rotation import hadamard_columns
from tqsearch.viterbi import best_paths

ENCODE_BLOCK = 1 << 19  # floats of a block while encoding
_TRELLIS_BLOCK = 1 << 24  # the same on a GPU along a trellis, whose rows run side by side
SCAN_BLOCK = 1 << 21  # floats of a decoded block while scanning
_GROUP = 32  # rows of a group whose maximum stands for them in the first step of the top k


def encode(
    vectors: Tensor,
    bands: tuple[BandTable, ...],
    factors: Tensor | None,
    orders: Tensor | None,
    centre: Tensor | None,
    unit: bool,
    search: trellis.Search = best_paths,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `kernels.encode`; `search` finds a trellis's paths."""
    count, dim = vectors.shape
    floats = _TRELLIS_BLOCK if along_trellis(bands) and vectors.device.type == "cuda" else ENCODE_BLOCK
    packed = torch.empty((count, row_bytes(bands)), dtype=torch.uint8, device=vectors.device)
    norms = torch.empty(count, dtype=torch.float32, device=vectors.device)
    dots = torch.empty_like(norms)
    centre_products = torch.zeros_like(norms)
    for block in _blocks(count, floats // dim):
        columns = vectors[block].t().contiguous()
        if unit:
            columns = _normalise(columns)[0] / math.sqrt(dim)
        if centre is not None:
            columns = columns - centre[:, None]
            centre_products[block] = _column_sums(columns * centre[:, None])
        columns, norms[block] = _normalise(columns)
        if factors is not None:
            columns = hadamard_columns(columns, factors, orders)
        packed[block], levels = _trellis(columns, bands, search) if along_trellis(bands) else _scalar(columns, bands)
        dots[block] = _column_sums(columns * levels)
    return packed, norms, dots, centre_products


def rotate(
    vectors: Tensor, factors: Tensor | None, orders: Tensor | None, centre: Tensor | None, unit: bool, factor: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See `kernels.rotate`."""
    if unit:
        vectors = unit_rows(vectors)
    products = None if centre is None else vectors @ centre
    if centre is not None:
        vectors = vectors - centre
    squares = (vectors * vectors).sum(dim=1)
    if factor != 1.0:
        vectors = factor * vectors
    if factors is not None:
        vectors = hadamard_columns(vectors.t().contiguous(), factors, orders).t()
    return vectors.contiguous(), squares, products


def unit_rows(vectors: Tensor) -> Tensor:
    """Rows, (n, dim) float32, divided by their norms; zero rows stay zero."""
    largest = vectors.abs().amax(dim=1, keepdim=True) if vectors.shape[0] else vectors[:, :1]
    vectors = vectors / torch.where(largest > 0, largest, 1.0)  # so that squares neither overflow nor vanish
    norms = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    return vectors / torch.where(norms > 0, norms, 1.0)


def _blocks(count: int, size: int) -> Iterator[slice]:
    size = max(size, 1)
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _column_sums(values: Tensor) -> Tensor:
    """Sums of the columns of (d, n), by halving: the order of additions does not depend on n, as a library's may."""
    while values.shape[0] > 1:
        half = values.shape[0] // 2
        folded = values[:half] + values[half : 2 * half]
        if values.shape[0] % 2:
            folded[0] += values[-1]
        values = folded
    return values[0]


def _normalise(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Columns scaled to squared norm d, and their norms; squares never overflow or vanish, zero stays zero."""
    _, exponent = torch.frexp(columns.abs().amax(dim=0))
    exponent = exponent.clamp(-125, 126)
    columns = columns * torch.ldexp(torch.ones_like(exponent, dtype=columns.dtype), -exponent)  # exact
    length = _column_sums(columns * columns).sqrt()
    factor = math.sqrt(columns.shape[0]) / torch.where(length > 0, length, math.inf)
    return columns * factor, torch.ldexp(length, exponent)


def _scalar(unit: Tensor, bands: tuple[BandTable, ...]) -> tuple[Tensor, Tensor]:
    """Packed codes of columns (d, n), (n, row bytes) uint8, and their levels (d, n) float32."""
    codes = torch.empty(unit.shape, dtype=torch.uint8, device=unit.device)
    levels = torch.empty_like(unit)
    row = 0
    for band in bands:
        rows = slice(row, row + band.size)
        index = torch.bucketize(unit[rows], band.boundaries, out_int32=True)
        codes[rows] = index
        levels[rows] = torch.index_select(band.levels, 0, index.flatten()).view(index.shape)
        row += band.size
    return pack_columns(codes, BitPlan(tuple(Band(b.size, b.width) for b in bands))).t(), levels


def _trellis(unit: Tensor, bands: tuple[BandTable, ...], search: trellis.Search) -> tuple[Tensor, Tensor]:
    """`_scalar` where some bands go along a trellis."""
    pairs, others = trellis_bands(bands), _others(bands)
    on_path, beside = _places(bands, unit.device)
    codes = trellis.encode(unit[on_path].t().contiguous(), pairs, search=search)
    levels = torch.zeros_like(unit).index_copy_(0, on_path, trellis.decode(codes, pairs).t())
    packed = trellis.pack(codes, pairs)
    if others:
        more, found = _scalar(unit[beside], others)
        packed, levels = torch.cat([packed, more], dim=1), levels.index_copy_(0, beside, found)
    return packed, levels


def _others(bands: tuple[BandTable, ...]) -> tuple[BandTable, ...]:
    """The scalar bands."""
    return tuple(band for band in bands if band.codec == "scalar")


def _places(bands: tuple[BandTable, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The coordinates along a trellis, and the others."""
    on_path = torch.tensor([band.codec == "trellis" for band in bands for _ in range(band.size)], device=device)
    return on_path.nonzero().flatten(), (~on_path).nonzero().flatten()


def decode(packed: Tensor, bands: tuple[BandTable, ...]) -> Tensor:
    """The levels of the codes: (n, row bytes) uint8 to (n, d) float32."""
    return _decode_trellis(packed, bands) if along_trellis(bands) else _decode_scalar(packed, bands)


def _decode_trellis(packed: Tensor, bands: tuple[BandTable, ...]) -> Tensor:
    pairs, others = trellis_bands(bands), _others(bands)
    cut = trellis.row_bytes(pairs)
    found = _decode_path(packed[:, :cut], pairs)
    if not others:
        return found
    on_path, beside = _places(bands, packed.device)
    levels = found.new_empty((len(packed), sum(band.size for band in bands)))
    levels.index_copy_(1, on_path, found)
    return levels.index_copy_(1, beside, _decode_scalar(packed[:, cut:], others))


def _decode_path(packed: Tensor, pairs: list[tuple[int, int]]) -> Tensor:
    if any(size % 8 for size, _ in pairs[:-1]):  # a band begins within a byte of the path
        return trellis.decode(trellis.unpack(packed, pairs), pairs)
    byte = -(-sum(size for size, _ in pairs) // 8)
    path, column, parts = torch.nn.functional.pad(packed[:, :byte], (1, 0)), 0, []
    for size, bits in pairs:
        columns = -(-size // 8)
        planes = list(torch.split(packed[:, byte : byte + columns * (bits - 1)], columns, dim=1)) if bits > 1 else []
        window = path[:, column : column + columns + 1]
        index = trellis_lookup.indices(window[:, 1:], window[:, :-1], planes, trellis_lookup.GROUP[bits])
        parts.append(_look_up(trellis_lookup.table(bits, packed.device), index)[:, :size])
        column += columns
        byte += columns * (bits - 1)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _decode_scalar(packed: Tensor, bands: tuple[BandTable, ...]) -> Tensor:
    parts, byte = [], 0
    for band in bands:
        parts.append(_decode_band(packed[:, byte : byte + band.nbytes], band))
        byte += band.nbytes
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _decode_band(packed: Tensor, band: BandTable) -> Tensor:
    if band.width == 0:
        return torch.zeros((packed.shape[0], band.size), dtype=torch.float32, device=packed.device)
    if band.width in (1, 2, 4, 8):  # one look-up a byte
        per_byte = 8 // band.width
        every = torch.arange(256, dtype=torch.uint8, device=packed.device)[:, None]
        table = band.levels[unpack_band(every, Band(per_byte, band.width)).long()]
        return _look_up(table, packed)[:, : band.size]
    if band.width == 3:
        return _decode_3(packed, band)
    codes = unpack_band(packed, Band(band.size, band.width))
    return torch.index_select(band.levels, 0, codes.flatten().int()).view(codes.shape)


def _decode_3(packed: Tensor, band: BandTable) -> Tensor:
    """Four coordinates a look-up: a byte of the 2-bit plane and their four bits of the 1-bit plane."""
    groups = -(-band.size // 8)
    plane = band.nbytes - groups
    crumbs = torch.nn.functional.pad(packed[:, :plane], (0, 2 * groups - plane)).int().view(-1, groups, 2)
    bits = packed[:, plane:].int()
    # The 1-bit plane's order within a byte is 0, 1, 4, 5, 2, 3, 6, 7: see `packing`.
    first = (bits & 0x3) | ((bits >> 2) & 0xC)
    second = ((bits >> 2) & 0x3) | ((bits >> 4) & 0xC)
    every = torch.arange(4096, device=packed.device)[:, None]
    place = torch.arange(4, device=packed.device)
    table = band.levels[((every >> (2 * place)) & 3) | (((every >> (8 + place)) & 1) << 2)]
    index = crumbs | (torch.stack([first, second], dim=2) << 8)
    return _look_up(table, index.flatten(1))[:, : band.size]


def _look_up(table: Tensor, packed: Tensor) -> Tensor:
    """table (t, m) float32 at each number of (n, w): (n, w m) float32; entries move as one element where they can."""
    wide = {1: torch.float32, 2: torch.int64, 4: torch.complex128}.get(table.shape[1])
    width = packed.shape[1] * table.shape[1]
    index = packed.flatten().int()
    if wide is None:
        return torch.index_select(table, 0, index).view(len(packed), width)
    return torch.index_select(table.view(wide).flatten(), 0, index).view(torch.float32).view(len(packed), width)


def reconstruct(packed: Tensor, scales: Tensor, bands: tuple[BandTable, ...]) -> Tensor:
    """See `kernels.reconstruct`."""
    return decode(packed, bands) * scales.float()[:, None]


def inner_products(queries: Tensor, packed: Tensor, scales: Tensor, bands: tuple[BandTable, ...]) -> Tensor:
    """See `kernels.inner_products`."""
    out = torch.empty((queries.shape[0], packed.shape[0]), dtype=torch.float32, device=queries.device)
    for block in _blocks(packed.shape[0], SCAN_BLOCK // queries.shape[1]):
        out[:, block] = (queries @ decode(packed[block], bands).t()) * scales[block].float()
    return out


def scan(
    queries: Tensor,
    packed: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    bands: tuple[BandTable, ...],
    k: int,
) -> tuple[Tensor, Tensor]:
    """See `kernels.scan`."""
    best_scores = torch.empty((queries.shape[0], 0), dtype=torch.float32, device=queries.device)
    best_rows = torch.empty((queries.shape[0], 0), dtype=torch.int64, device=queries.device)
    columns = queries.t().contiguous()
    size = max(SCAN_BLOCK // queries.shape[1] // _GROUP, 1) * _GROUP
    for block in _blocks(packed.shape[0], size):
        scores = (decode(packed[block], bands) @ columns).mul_(scales[block].float()[:, None])
        if bias is not None:
            scores += bias[block][:, None]
        if mask is not None:
            scores.masked_fill_(~mask[block][:, None], -math.inf)
        found, rows = _candidates(scores, k, best_scores[:, -1] if best_scores.shape[1] == k else None)
        if found.shape[1]:
            best_scores, best_rows = merge_top_k(best_scores, best_rows, found, rows + block.start, k)
    return best_scores, best_rows.masked_fill(best_scores == -math.inf, -1)


def merge_top_k(scores: Tensor, rows: Tensor, more_scores: Tensor, more_rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of two lists a query, (q, a) and (q, b), descending: (q, min(k, a + b))."""
    scores, rows = torch.cat([scores, more_scores], dim=1), torch.cat([rows, more_rows], dim=1)
    scores, order = torch.topk(scores, min(k, scores.shape[1]), dim=1)
    return scores, rows.gather(1, order)


def _candidates(scores: Tensor, k: int, least: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of each column of (n, q) scores the rows that may be among its top k; `least` (q,) is its k-th best so far.

    The k groups of rows of largest maximum hold the top k, and a group whose maximum is not above `least` adds nothing:
    once some blocks are done few groups are looked into.

    Returns:
        (q, m) scores and their row numbers; each row at most once.
    """
    count, queries = scores.shape
    groups = count // _GROUP
    whole = scores[: groups * _GROUP].view(groups, _GROUP, queries)
    tail = torch.arange(groups * _GROUP, count, device=scores.device).expand(queries, -1)
    maxima = whole.amax(dim=1).t()  # (q, groups)
    wanted = min(k, groups)
    if least is not None and wanted and queries:
        wanted = min(wanted, int((maxima > least[:, None]).sum(dim=1).max()))
    if 4 * wanted > groups:
        rows = torch.topk(scores, min(k, count), dim=0).indices.t()
    else:
        chosen = torch.topk(maxima, wanted, dim=1).indices
        rows = (chosen[:, :, None] * _GROUP + torch.arange(_GROUP, device=scores.device)).flatten(1)
        rows = torch.cat([rows, tail], dim=1)
    return scores[rows, torch.arange(queries, device=scores.device)[:, None]], rows
