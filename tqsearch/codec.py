"""What a plan's coordinates are coded by: optimal scalar levels ("scalar"), or levels along a trellis ("trellis").

The trellis (`trellis`) takes the bytes of the scalar levels (`codebook`) and has less error; encoding takes longer. It
has widths of 1 to 4 bits. Beside them a plan may have bands of 0, 6 and 8 bits, which learnt axes need: they are left
out of the path, and those of 6 and 8 bits are scalar codes, whose bytes follow the trellis's.

Scalar levels are "optimal", Lloyd and Max's, or "even": above 4 bits of equal distance, which a GPU decodes without a
table (decision 012). Indexes of learnt axes have even levels, but for those that older versions wrote.
"""

from __future__ import annotations

from typing import Literal

from tqsearch import trellis
from tqsearch.codebook import Codebook, even, lloyd_max
from tqsearch.errors import InvalidInputError
from tqsearch.plan import Band, BitPlan

Codec = Literal["scalar", "trellis"]
CODECS = ("scalar", "trellis")
Levels = Literal["optimal", "even"]

_BESIDE = (0, 6, 8)  # widths that a trellis's plan may have beside those of the trellis


def checked(codec: str, plan: BitPlan) -> Codec:
    """The codec, if it is one and has the plan's widths.

    Raises:
        InvalidInputError: an unknown name, or a width that the codec lacks.
    """
    if codec == "scalar":
        return "scalar"
    if codec != "trellis":
        raise InvalidInputError(f"codec must be one of {', '.join(map(repr, CODECS))}, got {codec!r}")
    wrong = [band.width for band in plan.bands if band.width > trellis.MAX_BITS and band.width not in _BESIDE]
    if wrong or not any(along_path("trellis", band.width) for band in plan.bands):
        got = f"{wrong[0]} bits" if wrong else f"the plan {plan}"
        raise InvalidInputError(
            f"codec 'trellis' needs a band of 1 to {trellis.MAX_BITS} bits, and may have others of 0, 6 and 8, got "
            f"{got}; use codec 'scalar'"
        )
    return "trellis"


def along_path(codec: Codec, width: int) -> bool:
    """Whether coordinates of a width are coded along the trellis."""
    return codec == "trellis" and width not in _BESIDE


def scalar_codebook(width: int, law_dim: int | None = None, levels: Levels = "optimal") -> Codebook:
    """The scalar levels of a width; `law_dim` as for `lloyd_max`."""
    return even(width, law_dim) if levels == "even" and width > 4 else lloyd_max(width, law_dim)


def distortion(codec: Codec, width: int, law_dim: int | None = None, levels: Levels = "optimal") -> float:
    """The expected squared error of a coordinate of variance 1.

    Args:
        codec: which.
        width: bits.
        law_dim: the law of a coordinate, as for `lloyd_max`; the trellis's levels are those of N(0, 1) in any case.
        levels: of scalar codes.
    """
    if along_path(codec, width):
        return trellis.trellis_codebook(width).distortion
    return scalar_codebook(width, law_dim, levels).distortion


def band_bytes(codec: Codec, size: int, width: int) -> int:
    """Bytes of a row's codes in a band, if all bands before it are of multiples of 8 coordinates."""
    return trellis.row_bytes([(size, width)]) if along_path(codec, width) else Band(size, width).nbytes


def row_bytes(codec: Codec, plan: BitPlan) -> int:
    """Bytes of a row of packed codes."""
    on_path = [band for band in plan.bands if along_path(codec, band.width)]
    beside = sum(band.nbytes for band in plan.bands if band not in on_path)
    return beside + trellis.row_bytes([(band.size, band.width) for band in on_path])


def plan_distortion(codec: Codec, plan: BitPlan, law_dim: int | None = None) -> float:
    """`BitPlan.distortion` of the codec: the mean over a plan's coordinates of equal variance."""
    return sum(band.size * distortion(codec, band.width, law_dim) for band in plan.bands) / plan.dim
