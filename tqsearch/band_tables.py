"""The tables that the kernels have for a plan's bands: boundaries, levels, and the levels as small integers."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from tqsearch import codec as codecs
from tqsearch.codebook import Codebook, on_grid
from tqsearch.codec import Codec, Levels
from tqsearch.kernels import BandTable
from tqsearch.plan import Band
from tqsearch.trellis import trellis_codebook

_ALIKE = {2: 29.5, 3: 42.5, 4: 63.5}  # half the number of steps across a table


def band_tables(
    bands: Iterable[Band], codec: Codec, law_dim: int, levels: Levels, device: torch.device
) -> tuple[BandTable, ...]:
    """The bands with their tables on a device, as the kernels take them.

    Args:
        bands: in the order of the coordinates.
        codec: of the coordinates.
        law_dim: of which dimension's law the scalar levels are; see `codebook.lloyd_max`.
        levels: of scalar bands of more than 4 bits.
        device: where the tables go.
    """
    bands = tuple(bands)
    several = sum(band.width > 0 for band in bands) > 1
    return tuple(_table(band, codec, law_dim, levels, several, device) for band in bands)


def _table(band: Band, codec: Codec, law_dim: int, levels: Levels, several: bool, device: torch.device) -> BandTable:
    if codecs.along_path(codec, band.width):
        none = torch.empty(0, dtype=torch.float32, device=device)
        along = trellis_codebook(band.width)
        return BandTable(band.size, band.width, none, along.levels(device), along.integers, -0.5, along.step, "trellis")
    book = codecs.scalar_codebook(band.width, law_dim, levels)
    boundaries, values = (torch.from_numpy(table).float().to(device) for table in (book.boundaries, book.levels))
    integers = _even_integers(book) if levels == "even" and band.width > 4 else _integers(book, law_dim, several)
    return BandTable(band.size, band.width, boundaries, values, *integers)


def _integers(book: Codebook, law_dim: int, several: bool = False) -> tuple[tuple[int, ...], float, float]:
    """`BandTable.steps`, `offset` and `step` of a codebook.

    1 bit is its own code; up to 4 bits the numbers are 0 to 127, which a byte permute can look up without signs. Of
    several bands those of 2, 3 and 4 bits have steps of about one size, as a scan may add their products.
    """
    if book.bits == 0:
        return (0,), 0.0, 0.0
    if book.bits == 1:
        return (0, 1), 0.5, 2.0 * float(book.levels[-1])
    if book.bits <= 4:
        grid = on_grid(book, _ALIKE[book.bits] if several else 63.5, law_dim)
        return tuple(grid.steps.tolist()), grid.offset, grid.step
    grid = on_grid(book, 127.0, law_dim)
    return tuple((grid.steps - 127).tolist()), 0.0, grid.step


def _even_integers(book: Codebook) -> tuple[tuple[int, ...], float, float]:
    """`_integers` of levels of equal distance: the code, less 128 at 8 bits."""
    first = -128 if book.bits == 8 else 0
    numbers = tuple(range(first, first + 2**book.bits))
    return numbers, 0.5 * (numbers[0] + numbers[-1]), float(book.levels[1] - book.levels[0])
