"""What a kernel knows of a plan: per band a size, a width and its tables."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

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
    """

    size: int
    width: int
    boundaries: Tensor
    levels: Tensor
    steps: tuple[int, ...]
    offset: float
    step: float

    @property
    def nbytes(self) -> int:
        """Bytes of a row's codes in this band."""
        return Band(self.size, self.width).nbytes


def row_bytes(bands: tuple[BandTable, ...]) -> int:
    """Bytes of one row of packed codes."""
    return sum(band.nbytes for band in bands)
