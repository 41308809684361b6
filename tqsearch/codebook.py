"""Optimal scalar levels (Lloyd-Max) for one rotated coordinate, their distortion, and their form on an integer grid.

Two laws of a coordinate u with variance 1:

* `normal`: N(0, 1), the limit for large d;
* `beta`: sqrt(d) times a coordinate of a uniformly random unit vector of R^d, with density proportional to
  (1 - u^2 / d)^((d - 3) / 2) on [-sqrt(d), sqrt(d)] (TurboQuant, arXiv 2504.19874, lemma 1). It is exact, and matters
  for small d.

A quantizer is optimal for mean squared error when each boundary lies halfway between its levels and each level is the
mean of its cell. Both laws are symmetric, so only the positive half is solved, by Newton's method on the tridiagonal
system, in float64, to rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tqsearch.errors import InvalidInputError

Array = npt.NDArray[np.float64]

MAX_BITS = 8
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(48)


class Law(Protocol):
    """A symmetric law with variance 1, by what the solver asks of it."""

    top: float  # the supremum of the support, or a point beyond which nothing is left in float64

    def density(self, x: Array) -> Array:
        """The density at x."""

    def moments(self, edges: Array) -> tuple[Array, Array]:
        """Mass and first moment of each cell between consecutive edges (ascending, >= 0)."""


class NormalLaw:
    """N(0, 1)."""

    top = math.inf

    def density(self, x: Array) -> Array:
        """exp(-x^2 / 2) / sqrt(2 pi); 0 at infinity."""
        result: Array = np.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi)
        return result

    def moments(self, edges: Array) -> tuple[Array, Array]:
        """By erfc and the density, in closed form."""
        tail = np.array([0.5 * math.erfc(edge / math.sqrt(2.0)) for edge in edges])
        return tail[:-1] - tail[1:], -np.diff(self.density(edges))


class BetaLaw:
    """sqrt(d) times a coordinate of a uniformly random unit vector of R^d, d >= 2.

    With u = sqrt(d) sin(a) the density of the angle a is K cos(a)^(d - 2): smooth for every d, where the density of u
    itself is singular at d = 2. First moments are closed, masses are Gauss-Legendre sums.
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.top = math.sqrt(dim)
        log_k = math.lgamma(dim / 2) - math.lgamma((dim - 1) / 2) - 0.5 * math.log(math.pi)
        self._k = math.exp(log_k)
        self._last = min(math.pi / 2, 40.0 / math.sqrt(dim))  # beyond it cos^(d-2) < exp(-700)

    def density(self, x: Array) -> Array:
        """K / sqrt(d) (1 - x^2 / d)^((d - 3) / 2); 0 at the ends of the support (where d = 2 diverges)."""
        inside = np.maximum(1.0 - x * x / self.dim, 0.0)
        with np.errstate(divide="ignore"):
            power = np.where(inside > 0.0, np.exp(0.5 * (self.dim - 3) * np.log(inside)), 0.0)
        result: Array = self._k / math.sqrt(self.dim) * power
        return result

    def moments(self, edges: Array) -> tuple[Array, Array]:
        """Masses by quadrature over the angle, first moments -K sqrt(d) / (d - 1) cos^(d - 1), in closed form."""
        angles = np.minimum(np.arcsin(np.clip(edges / math.sqrt(self.dim), 0.0, 1.0)), self._last)
        middle, half = 0.5 * (angles[:-1] + angles[1:]), 0.5 * np.diff(angles)
        points = middle[:, None] + half[:, None] * _NODES
        mass = self._k * half * (np.cos(points) ** (self.dim - 2) @ _WEIGHTS)
        primitive = np.cos(angles) ** (self.dim - 1)
        return mass, self._k * math.sqrt(self.dim) / (self.dim - 1) * -np.diff(primitive)


@dataclass(frozen=True)
class Codebook:
    """The optimal levels of one width.

    Attributes:
        bits: the width b; there are 2**b levels.
        levels: (2**b,) float64, ascending, antisymmetric.
        boundaries: (2**b - 1,) float64, ascending: x has code i when boundaries[i - 1] < x <= boundaries[i].
        distortion: the expected squared error of a coordinate of variance 1.
    """

    bits: int
    levels: Array
    boundaries: Array
    distortion: float


@dataclass(frozen=True)
class GridCodebook:
    """Levels rounded to a uniform grid of integers, as the integer kernels multiply them.

    level[i] = (steps[i] - offset) * step, with steps[i] an integer from 0 to 2 * offset.

    Attributes:
        steps: (2**b,) int64.
        offset: half the number of steps across the table: 127.0 (the values fit int8 after the offset is taken off) or
            63.5 (the bare steps fit 0 .. 127, which a byte permute can look up without sign handling).
        step: the size of one step.
        distortion: the expected squared error with the rounded levels and the codebook's own boundaries.
    """

    steps: npt.NDArray[np.int64]
    offset: float
    step: float
    distortion: float


def _check_bits(bits: int) -> None:
    if not (isinstance(bits, int | np.integer) and 0 <= bits <= MAX_BITS):
        raise InvalidInputError(f"a width must be an integer from 0 to {MAX_BITS}, got {bits!r}")


def law_of(dim: int | None) -> Law:
    """The law of a coordinate: `BetaLaw(dim)`, or `NormalLaw()` for `dim=None`."""
    return NormalLaw() if dim is None else BetaLaw(dim)


@lru_cache(maxsize=256)
def lloyd_max(bits: int, dim: int | None = None) -> Codebook:
    """The mean-squared-error optimal levels of a coordinate of variance 1.

    Args:
        bits: width, 0 (the one level 0) to 8.
        dim: the exact law of a coordinate of a random unit vector of R^dim, times sqrt(dim); None for N(0, 1).

    Returns:
        The codebook, converged to rounding in float64. For N(0, 1) the distortions at 1 to 4 bits are 0.3634, 0.1175,
        0.03454 and 0.009497 (Max, "Quantizing for minimum distortion", 1960).
    """
    _check_bits(bits)
    if dim is not None and dim < 1:
        raise InvalidInputError(f"dim must be at least 1, got {dim}")
    if bits == 0:
        return Codebook(0, np.zeros(1), np.zeros(0), 1.0)
    if dim == 1:  # the only unit vectors are -1 and 1: any table that holds both is exact
        levels = np.linspace(-1.0, 1.0, 2**bits)
        return Codebook(bits, levels, 0.5 * (levels[1:] + levels[:-1]), 0.0)
    law = law_of(dim)
    half = _solve_half(law, 2 ** (bits - 1))
    levels = np.concatenate([-half[::-1], half])
    boundaries = 0.5 * (levels[1:] + levels[:-1])
    boundaries[len(half) - 1] = 0.0
    return Codebook(bits, levels, boundaries, _distortion(law, half))


@lru_cache(maxsize=64)
def even(bits: int, dim: int | None = None) -> Codebook:
    """The levels of equal distance, symmetric about zero, of least mean squared error: decoded without a table.

    level[i] = (i - (2**bits - 1) / 2) step. Boundaries lie halfway, and the outermost cells reach to the law's end. As
    a boundary's place does not matter to first order, the best step is where the sum over cells of (i - (2**bits - 1) /
    2) E (u - level[i]; u in cell i) vanishes. At 6 and 8 bits of N(0, 1) the distortion is 1.04e-3 and 8.77e-5, where
    `lloyd_max` has 6.44e-4 and 4.12e-5.

    Args:
        bits: width, 1 to 8.
        dim: as for `lloyd_max`.
    """
    _check_bits(bits)
    if dim == 1:
        return lloyd_max(bits, dim)
    law, places = law_of(dim), np.arange(2 ** (bits - 1)) + 0.5
    low, high = 0.0, min(law.top, 10.0) / float(places[-1])  # there the outermost level lies too far out
    while (step := 0.5 * (low + high)) not in (low, high):  # by halves, to rounding
        mass, first = law.moments(_edges(law, places * step))
        if float((places * (first - places * step * mass)).sum()) > 0.0:
            low = step
        else:
            high = step
    half = places * step
    levels = np.concatenate([-half[::-1], half])
    return Codebook(bits, levels, np.arange(1 - 2 ** (bits - 1), 2 ** (bits - 1)) * step, _distortion(law, half))


def _edges(law: Law, half: Array) -> Array:
    return np.concatenate([[0.0], 0.5 * (half[1:] + half[:-1]), [law.top]])


def _solve_half(law: Law, count: int) -> Array:
    """The `count` positive levels: a few Lloyd steps from the asymptotic point density, then Newton to rounding."""
    quantiles = (np.arange(count) + 0.5) / (2 * count) + 0.5
    half = math.sqrt(3.0) * np.array([NormalDist().inv_cdf(float(q)) for q in quantiles])  # density ~ f^(1/3)
    if half[-1] >= law.top:
        half = law.top * (np.arange(count) + 0.5) / count
    best, best_residual = half, math.inf
    for iteration in range(200):
        edges = _edges(law, half)
        mass, first = law.moments(edges)
        centroid = first / mass
        residual = float(np.abs(half - centroid).max())
        if residual < best_residual:
            best, best_residual = centroid, residual
        elif residual < 1e-12:
            break
        if iteration < 20:
            half = centroid
            continue
        density = law.density(edges)
        by_left = density[:-1] * (centroid - edges[:-1]) / mass
        by_right = np.append(density[1:-1] * (edges[1:-1] - centroid[:-1]) / mass[:-1], 0.0)
        by_left[0] = 0.0  # the first edge is fixed at 0
        diagonal = 1.0 - 0.5 * (by_left + by_right)
        half = half - _solve_tridiagonal(-0.5 * by_left, diagonal, -0.5 * by_right, half - centroid)
    return best


def _solve_tridiagonal(below: Array, diagonal: Array, above: Array, right: Array) -> Array:
    """x with below[i] x[i - 1] + diagonal[i] x[i] + above[i] x[i + 1] = right[i], by elimination without exchanges.

    In plain numbers: 128 of them at most, and a library's dense solution waits for its threads where a machine has more
    cores than it lends, for a minute each time.
    """
    count = len(diagonal)
    factors, values = [0.0] * count, [0.0] * (count + 1)
    factor = value = 0.0
    rows = zip(below.tolist(), diagonal.tolist(), above.tolist(), right.tolist(), strict=True)
    for i, (low, middle, high, wanted) in enumerate(rows):
        pivot = middle - low * factor
        factor, value = high / pivot, (wanted - low * value) / pivot
        factors[i], values[i] = factor, value
    for i in reversed(range(count)):
        values[i] -= factors[i] * values[i + 1]
    return np.array(values[:count])


def _distortion(law: Law, half: Array) -> float:
    """E (u - level)^2 of the positive levels and their own cells."""
    return _expected_error(*law.moments(_edges(law, half)), half)


def _expected_error(mass: Array, first: Array, half: Array) -> float:
    """E (u - level)^2 for variance 1, from the positive cells' masses and first moments and their levels."""
    return float(1.0 + 2.0 * np.sum(half * (half * mass - 2.0 * first)))


def on_grid(codebook: Codebook, offset: float = 127.0, dim: int | None = None) -> GridCodebook:
    """The codebook's levels rounded to a uniform integer grid, of the step that distorts least.

    Args:
        codebook: levels to round, of width >= 1.
        offset: 127.0 for int8 values of -127 to 127, 63.5 for steps of 0 to 127.
        dim: the law of the coordinate, as for `lloyd_max`.
    """
    half = codebook.levels[len(codebook.levels) // 2 :]
    if dim == 1:  # all the mass lies on the outermost levels, -1 and 1
        mass = np.where(np.arange(len(half)) == len(half) - 1, 0.5, 0.0)
        first = mass
    else:
        law = law_of(dim)
        mass, first = law.moments(_edges(law, half))
    best: GridCodebook | None = None
    # A wider step aligns the inner levels and leaves the outer steps unused.
    for stretch in np.linspace(1.0, 1.25, 501):
        step = float(half[-1]) / offset * float(stretch)
        upper = np.rint(half / step + offset).astype(np.int64)
        rounded: Array = (upper.astype(np.float64) - offset) * step
        distortion = _expected_error(mass, first, rounded)
        if best is None or distortion < best.distortion:
            best = GridCodebook(np.concatenate([int(2 * offset) - upper[::-1], upper]), offset, step, distortion)
    assert best is not None
    return best
