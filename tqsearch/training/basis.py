"""Learnt coordinates: principal axes, and the standard deviation along each."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from tqsearch import codec as codecs
from tqsearch.codebook import MAX_BITS
from tqsearch.codec import Codec, Levels
from tqsearch.errors import InvalidInputError
from tqsearch.plan import Band, BitPlan


@dataclass(frozen=True)
class Basis:
    """The axes that a trained plan codes, and what it knows of all of them.

    With y = A z the coordinate y_i has variance sigma_i^2; y_i / sigma_i is coded by the fixed levels, and sigma_i is
    multiplied into the query. Products are made in float64, so that a row has the same codes whatever batch it comes
    in, up to rounding of float64.

    Attributes:
        plan: the widths of all `dim` coordinates, in the order of `deviations`.
        axes: (m, dim) float32, orthonormal rows: A, of the m coordinates of width above 0, in the plan's order.
        deviations: (dim,) float32, sigma, >= 0; above 0 where the width is.
        codec: of the coordinates.
        levels: of the scalar ones; "optimal" in files of versions 2 and 3.
        slopes: (dim,) float32, gamma, from 0 to 1: a query that a row is near to has, on average, gamma times the row's
            coordinates (`neighbours`); the same for all coordinates of width 0. None if that is not known.
    """

    plan: BitPlan
    axes: Tensor
    deviations: Tensor
    codec: Codec = "scalar"
    levels: Levels = "even"
    slopes: Tensor | None = None
    _on: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        rows, dim = sum(band.size for band in self.plan.bands if band.width), self.plan.dim
        if self.axes.shape != (rows, dim) or self.deviations.shape != (dim,):
            raise InvalidInputError(
                f"axes and deviations must have shapes ({rows}, {dim}) and ({dim},) for the plan {self.plan}, got "
                f"{tuple(self.axes.shape)} and {tuple(self.deviations.shape)}"
            )
        coded = self.deviations[torch.from_numpy(self._widths > 0)]
        if not (torch.isfinite(self.axes).all() and torch.isfinite(self.deviations).all() and (coded > 0).all()):
            raise InvalidInputError("axes and deviations must be finite, and the deviations of coded axes above 0")
        if self.slopes is not None and not (
            self.slopes.shape == (dim,) and bool(((self.slopes >= 0) & (self.slopes <= 1)).all())
        ):
            raise InvalidInputError(f"slopes must be {dim} numbers from 0 to 1, got {self.slopes}")

    @property
    def coded(self) -> int:
        """Number of coordinates of width above 0."""
        return len(self.axes)

    @property
    def even(self) -> bool:
        """Whether there are bands whose levels are even."""
        return self.levels == "even" and any(band.width > 4 for band in self.plan.bands)

    @property
    def nbytes(self) -> int:
        """Bytes of axes, deviations and slopes, kept once an index."""
        slopes = 0 if self.slopes is None else self.slopes.numel()
        return 4 * (self.axes.numel() + self.deviations.numel() + slopes)

    @cached_property
    def _widths(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return np.repeat([band.width for band in self.plan.bands], [band.size for band in self.plan.bands])

    @cached_property
    def scanned_bands(self) -> tuple[Band, ...]:
        """The coded bands as the kernels take them: those of 8 bits cut where sigma has fallen to half.

        A GPU rounds a query to int8 with one scale a band, and multiplied by sigma a query spans sigma's range. At 8
        bits that rounding would be the larger error; one plane a band makes a cut free, as the bytes stay the same.
        """
        bands, first = [], 0
        for band in self.plan.bands:
            cuts = [0]
            if band.width == MAX_BITS:
                sigma = self.deviations[first : first + band.size]
                step = 32 if band.size % 32 == 0 else 8
                for place in range(step, band.size, step):
                    if sigma[place] < 0.5 * sigma[cuts[-1]]:
                        cuts.append(place)
            first += band.size
            if band.width:
                bands += [Band(end - start, band.width) for start, end in pairwise([*cuts, band.size])]
        return tuple(bands)

    @cached_property
    def variance(self) -> float:
        """The expected |z|^2 of vectors like the sample: the sum of the squared deviations."""
        return float((self.deviations.double() ** 2).sum())

    @cached_property
    def distortion(self) -> float:
        """Expected |z - decoded|^2 over expected |z|^2; what is not coded is lost."""
        return float((self.deviations.double().numpy() ** 2 * self._errors).sum() / self.variance)

    @cached_property
    def coded_distortion(self) -> float:
        """`distortion` within the span of the coded axes."""
        kept = self._widths > 0
        squares = self.deviations.double().numpy()[kept] ** 2
        return float((squares * self._errors[kept]).sum()) / float(squares.sum())

    @cached_property
    def _errors(self) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """The expected squared error of each coordinate over its variance; without even levels of N(0, 1)."""
        law = self.coded if self.even else None
        return np.array([codecs.distortion(self.codec, int(width), law, self.levels) for width in self._widths])

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """A (m, dim) and the coded coordinates' sigma (m,), float64, on a device."""
        if device not in self._on:
            sigma = self.deviations[torch.from_numpy(self._widths > 0)]
            self._on[device] = (self.axes.to(device).double(), sigma.to(device).double())
        return self._on[device]

    def slopes_on(self, device: torch.device) -> tuple[Tensor, float]:
        """The coded coordinates' slopes, (m,) float64 on a device, and that of all others."""
        assert self.slopes is not None
        coded = torch.from_numpy(self._widths > 0)
        rest = self.slopes[~coded]
        return self.slopes[coded].to(device).double(), float(rest[0]) if len(rest) else 0.0

    def queries(self, queries: Tensor) -> Tensor:
        """What is scanned for queries: sigma A q, (q, dim) to (q, m) float32."""
        axes, sigma = self.tensors(queries.device)
        return ((queries.double() @ axes.t()) * sigma).float().contiguous()

    def invert(self, levels: Tensor) -> Tensor:
        """Vectors of scaled levels: A^T (sigma levels), (n, m) to (n, dim) float32."""
        axes, sigma = self.tensors(levels.device)
        return ((levels.double() * sigma) @ axes).float()
