"""What a plan's coordinates are coded by: optimal scalar levels ("scalar"), or levels along a trellis ("trellis").

The trellis (`trellis`) takes the bytes of the scalar levels (`codebook`) and has less error; encoding takes longer. Its
widths are 0 to 4: coordinates of width 0 are left out of the path.
"""

from __future__ import annotations

from typing import Literal

from tqsearch import trellis
from tqsearch.codebook import lloyd_max
from tqsearch.errors import InvalidInputError
from tqsearch.plan import Band, BitPlan

Codec = Literal["scalar", "trellis"]
CODECS = ("scalar", "trellis")


def checked(codec: str, plan: BitPlan) -> Codec:
    """The codec, if it is one and has the plan's widths.

    Raises:
        InvalidInputError: an unknown name, or a width that the codec lacks.
    """
    if codec == "scalar":
        return "scalar"
    if codec != "trellis":
        raise InvalidInputError(f"codec must be one of {', '.join(map(repr, CODECS))}, got {codec!r}")
    wide = [band.width for band in plan.bands if band.width > trellis.MAX_BITS]
    if wide:
        raise InvalidInputError(
            f"codec 'trellis' has widths from 0 to {trellis.MAX_BITS}, got {wide[0]} bits; use codec 'scalar'"
        )
    return "trellis"


def distortion(codec: Codec, width: int, law_dim: int | None = None) -> float:
    """The expected squared error of a coordinate of variance 1.

    Args:
        codec: which.
        width: bits.
        law_dim: the law of a coordinate, as for `lloyd_max`; the trellis's levels are those of N(0, 1) in any case.
    """
    if codec == "scalar" or not width:
        return lloyd_max(width, law_dim).distortion
    return trellis.trellis_codebook(width).distortion


def band_bytes(codec: Codec, size: int, width: int) -> int:
    """Bytes of a row's codes in a band, if all bands before it are of multiples of 8 coordinates."""
    return Band(size, width).nbytes if codec == "scalar" or not width else trellis.row_bytes([(size, width)])


def row_bytes(codec: Codec, plan: BitPlan) -> int:
    """Bytes of a row of packed codes."""
    if codec == "scalar":
        return plan.bytes_per_vector
    return trellis.row_bytes([(band.size, band.width) for band in plan.bands if band.width])


def plan_distortion(codec: Codec, plan: BitPlan, law_dim: int | None = None) -> float:
    """`BitPlan.distortion` of the codec: the mean over a plan's coordinates of equal variance."""
    return sum(band.size * distortion(codec, band.width, law_dim) for band in plan.bands) / plan.dim
