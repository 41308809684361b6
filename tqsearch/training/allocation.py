"""The optimal widths of coordinates of unequal weight under a budget of bytes.

A coordinate of weight w stored at b bits contributes w D(b) to the expected squared error of a score, where D is the
distortion of the levels for unit variance ("even" ones, see `codec`) and w the coordinate's variance times the second
moment of the queries in it. Coordinates are given widths in blocks of consecutive ones, so that planes stay aligned.
The problem is

    minimise  sum_j W_j D(b_j)   over b_j in {0, 1, 2, 3, 4, 6, 8},   subject to  sum_j bytes_j(b_j) <= budget,

with W_j the sum of the weights in block j: a knapsack with one choice a block.

**Why it is the optimum.** Let F(j, r) be the least cost of blocks j, j + 1, ... within r bytes. Whatever width b
block j takes in an optimal choice, the blocks after it are served optimally by the r - bytes_j(b) bytes left, else
exchanging their widths for the better ones would lower the cost. So F(j, r) = min over b of W_j D(b) + F(j + 1, r -
bytes_j(b)), with F = 0 after the last block, and the table is filled from the end: blocks x budget x widths additions.
No greedy rule is used: the steps from 4 to 6 and to 8 bits cost two bytes at once, and greedy choices can miss more.

**Why bands come out.** If the weights descend and two blocks of one size have W_1 >= W_2, b_1 < b_2, exchanging their
widths changes the cost by (W_1 - W_2) (D(b_2) - D(b_1)) <= 0 and no byte. So some optimum has descending widths, at
most one band for each. Only a last, smaller block may break the order, where its bytes are cheaper.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from tqsearch.codec import Codec, band_bytes, distortion
from tqsearch.errors import InvalidInputError
from tqsearch.plan import BitPlan

WIDTHS = (0, 1, 2, 3, 4, 6, 8)  # those that every scan decodes

Array = npt.NDArray[np.float64]


def allocate(weights: Array, budget: int, block: int = 8, codec: Codec = "scalar") -> BitPlan:
    """The plan of least expected error within a budget; see the module's docstring.

    Args:
        weights: (dim,) float64, >= 0, in the order of the coordinates: descending for one band a width.
        budget: bytes a row of codes may take, >= 0.
        block: coordinates that get one width, a multiple of 8.
        codec: of the coordinates.

    Returns:
        A plan of `dim` coordinates of at most `budget` bytes. Bits that would lower no error are not spent.

    Raises:
        InvalidInputError: no weights, one that is negative or not finite, a budget below 0, or a block that is not a
            multiple of 8.
    """
    if weights.ndim != 1 or not len(weights) or not (np.isfinite(weights) & (weights >= 0)).all():
        raise InvalidInputError(f"weights must be finite numbers of at least 0, shape (dim,), got {weights!r}")
    if budget < 0 or block < 8 or block % 8:
        raise InvalidInputError(f"budget must be at least 0 and block a multiple of 8, got {budget} and {block}")
    sizes = [min(block, len(weights) - start) for start in range(0, len(weights), block)]
    widths = _optimal_widths(np.add.reduceat(weights, np.arange(0, len(weights), block)), sizes, budget, codec)
    pairs: list[tuple[int, int]] = []
    for size, width in zip(sizes, widths, strict=True):
        if pairs and pairs[-1][1] == width:
            pairs[-1] = (pairs[-1][0] + size, width)
        else:
            pairs.append((size, width))
    return BitPlan.from_pairs(pairs)


def _optimal_widths(block_weights: Array, sizes: list[int], budget: int, codec: Codec) -> list[int]:
    """The recursion of the module's docstring, from the last block to the first, and the way back."""
    least = np.zeros(budget + 1)  # F(j + 1, r) for every r
    choices = np.zeros((len(sizes), budget + 1), dtype=np.uint8)
    for j in reversed(range(len(sizes))):
        current = np.full(budget + 1, math.inf)
        for width in WIDTHS:
            nbytes = band_bytes(codec, sizes[j], width)
            if nbytes > budget:  # in a small block a wider code can be the shorter: 3 bits are two planes
                continue
            cost = np.full(budget + 1, math.inf)
            cost[nbytes:] = least[: budget + 1 - nbytes] + block_weights[j] * distortion(codec, width, levels="even")
            better = cost < current  # strictly: of equal costs the narrower width
            current[better] = cost[better]
            choices[j, better] = width
        least = current
    widths, left = [], budget
    for j, size in enumerate(sizes):
        widths.append(int(choices[j, left]))
        left -= band_bytes(codec, size, widths[-1])
    return widths


def expected_error(weights: Array, plan: BitPlan, codec: Codec = "scalar") -> float:
    """sum_i w_i D(b_i), what `allocate` makes least."""
    widths = np.repeat([band.width for band in plan.bands], [band.size for band in plan.bands])
    return float(
        sum(weights[widths == width].sum() * distortion(codec, int(width), levels="even") for width in set(widths))
    )
