"""How many bits each rotated coordinate gets: bands of coordinates, each with its own width.

A plan fixes the storage exactly: `bytes_per_vector` is the length of a row of packed scalar codes, and no more is kept
for codes. Along a trellis it is `codec.row_bytes`, the same where bands are multiples of 8.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from tqsearch.codebook import MAX_BITS, lloyd_max
from tqsearch.errors import InvalidInputError

NUMBER = (int, float, np.integer, np.floating)

# A width is stored as planes, each of whose fields divides a byte: 3 bits are a 2-bit plane and a 1-bit plane.
_PLANES = {width: tuple(p for p in (8, 4, 2, 1) if width & p) for width in range(MAX_BITS + 1)}


def planes_of(width: int) -> tuple[int, ...]:
    """The field sizes that store a width, widest first; the widest holds the low bits of the code."""
    return _PLANES[width]


@dataclass(frozen=True)
class Band:
    """`size` consecutive rotated coordinates stored at `width` bits each (0: not stored, estimated as zero)."""

    size: int
    width: int

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 <= self.width <= MAX_BITS:
            raise InvalidInputError(
                f"a band needs size >= 1 and width from 0 to {MAX_BITS}, got size {self.size}, width {self.width}"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of a row's codes in this band; each plane ends on a whole byte."""
        return sum(-(-self.size * plane // 8) for plane in planes_of(self.width))


@dataclass(frozen=True)
class BitPlan:
    """The widths of all rotated coordinates, as contiguous bands.

    Build one with `BitPlan.of(dim, bits)` for a uniform or fractional width, or from bands:

        BitPlan.from_pairs([(96, 4), (200, 2), (88, 0)])

    Attributes:
        bands: in the order of the coordinates.
        expected_distortion: of a trained plan, the expected |z - decoded|^2 over |z|^2; None where it follows from the
            widths alone, see `distortion`. Plans are equal where their bands are.
    """

    bands: tuple[Band, ...]
    expected_distortion: float | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not self.bands:
            raise InvalidInputError("a plan needs at least one band, got none")

    @classmethod
    def from_pairs(cls, pairs: Iterable[Sequence[int]]) -> BitPlan:
        """A plan from (size, width) pairs of integers in the order of the coordinates.

        Raises:
            InvalidInputError: no pairs of integers, none at all, or a size or a width that is out of range.
        """
        pairs = [tuple(pair) if isinstance(pair, Iterable) else (pair,) for pair in pairs]
        if not all(len(pair) == 2 and all(isinstance(part, int | np.integer) for part in pair) for pair in pairs):
            raise InvalidInputError(f"a plan needs pairs of integers, (size, width), got {pairs}")
        return cls(tuple(Band(int(size), int(width)) for size, width in pairs))

    @classmethod
    def of(cls, dim: int, bits: float | BitPlan) -> BitPlan:
        """The plan of a width.

        Args:
            dim: number of coordinates.
            bits: an integer from 0 to 8, a fraction between, or a plan of `dim` coordinates, returned as it is. A
                fraction f becomes two bands of the neighbouring widths, the wide one first, as TurboQuant's 2.5 and 3.5
                bits (arXiv 2504.19874, section 4.3): after a rotation any coordinates may be the wide ones. The wide
                band's size is (f - floor f) dim rounded to a multiple of 8, so that no byte is wasted between the
                bands.
        """
        if isinstance(bits, BitPlan):
            if bits.dim != dim:
                raise InvalidInputError(f"the plan must cover {dim} coordinates, got one for {bits.dim}")
            return bits
        if isinstance(bits, bool) or not isinstance(bits, NUMBER) or not 0 <= bits <= MAX_BITS:
            raise InvalidInputError(f"bits must be a number from 0 to {MAX_BITS} or a BitPlan, got {bits!r}")
        low = int(bits)
        wide = min(8 * round((bits - low) * dim / 8), dim)
        return cls.from_pairs([(size, width) for size, width in ((wide, low + 1), (dim - wide, low)) if size])

    @property
    def dim(self) -> int:
        """Number of coordinates."""
        return sum(band.size for band in self.bands)

    @property
    def bytes_per_vector(self) -> int:
        """Bytes of one row of packed scalar codes; of either codec's: `codec.row_bytes`."""
        return sum(band.nbytes for band in self.bands)

    @property
    def bits_per_dim(self) -> float:
        """Mean width of a coordinate."""
        return sum(band.size * band.width for band in self.bands) / self.dim

    def distortion(self, law_dim: int | None = None) -> float:
        """Expected squared error per unit of squared norm, when all coordinates have equal variance.

        Args:
            law_dim: the law of a coordinate, as for `lloyd_max`.
        """
        return sum(band.size * lloyd_max(band.width, law_dim).distortion for band in self.bands) / self.dim

    def pairs(self) -> list[tuple[int, int]]:
        """The (size, width) pairs, as `from_pairs` takes them."""
        return [(band.size, band.width) for band in self.bands]

    def __str__(self) -> str:
        bands = " + ".join(f"{band.size} x {band.width} bit" for band in self.bands)
        known = self.expected_distortion
        return bands if known is None else f"{bands}, expected distortion {known:.3g}"
