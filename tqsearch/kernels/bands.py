"""What a kernel knows of a plan: per band a size, a width and its tables."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from tqsearch import trellis
from tqsearch.plan import Band


class BandTable(NamedTuple):
    """`size` consecutive rotated coordinates of one width.

    Attributes:
        size: number of coordinates.
        width: bits of a code.
        boundaries: (2**width - 1,) float32, ascending.
        levels: (2**width,) float32, ascending.
        steps: the levels for integer kernels: level = (step number - offset) * step, each number fitting int8.
        offset: see `steps`.
        step: see `steps`.
        codec: "scalar", or "trellis": `levels` and `steps` are then those of `trellis.trellis_codebook`, in ascending
            order, there are no boundaries, and a row is the codes of these bands by `trellis.pack`, then those of its
            scalar bands.
    """

    size: int
    width: int
    boundaries: Tensor
    levels: Tensor
    steps: tuple[int, ...]
    offset: float
    step: float
    codec: str = "scalar"

    @property
    def nbytes(self) -> int:
        """Bytes of a row's codes in this band, of codec "scalar"."""
        return Band(self.size, self.width).nbytes


def row_bytes(bands: tuple[BandTable, ...]) -> int:
    """Bytes of one row of packed codes."""
    return trellis.row_bytes(trellis_bands(bands)) + sum(band.nbytes for band in bands if band.codec == "scalar")


def along_trellis(bands: tuple[BandTable, ...]) -> bool:
    """Whether there are bands of codec "trellis"."""
    return any(band.codec == "trellis" for band in bands)


def trellis_bands(bands: tuple[BandTable, ...]) -> list[tuple[int, int]]:
    """The (size, bits) pairs that `trellis` takes: of the bands of its codec."""
    return [(band.size, band.width) for band in bands if band.codec == "trellis"]
