"""How an index codes its vectors: what its constructor fixes, and what a sample teaches on top of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tqsearch.arrays import ArrayLike, as_matrix
from tqsearch.codec import Codec
from tqsearch.errors import InvalidInputError
from tqsearch.estimator import Estimator
from tqsearch.kernels.reference import unit_rows
from tqsearch.plan import BitPlan
from tqsearch.quantizer import TurboQuantizer
from tqsearch.training.basis import Basis
from tqsearch.training.choice import chosen
from tqsearch.training.learn import centre_of

Metric = Literal["ip", "cosine", "l2"]
METRICS = ("ip", "cosine", "l2")


@dataclass(frozen=True)
class Recipe:
    """The arguments of `TurboQuantIndex` that define its codes; training keeps them and adds what was learnt."""

    dim: int
    bits: float | BitPlan
    metric: Metric
    rotation: str
    seed: int
    codec: Codec
    backend: str

    @property
    def plan(self) -> BitPlan:
        """The widths asked for, before training."""
        return BitPlan.of(self.dim, self.bits)

    def estimator(
        self, centre: Tensor | None = None, basis: Basis | None = None, keeps_product: bool = False
    ) -> Estimator:
        """The codec, of a centre and a basis if they were learnt, and what is kept beside its codes.

        Args:
            centre: (dim,) float32, or None.
            basis: learnt axes, or None.
            keeps_product: whether <c, z> is kept; with a centre alone it should be.

        Raises:
            InvalidInputError: an argument of the recipe is out of range; the message says which.
        """
        if self.metric not in METRICS:
            raise InvalidInputError(f"metric must be one of {', '.join(map(repr, METRICS))}, got {self.metric!r}")
        quantizer = TurboQuantizer(
            self.dim,
            self.bits,
            rotation=self.rotation,
            seed=self.seed,
            centre=centre,
            unit=self.metric == "cosine",
            basis=basis,
            codec=self.codec,
            backend=self.backend,
        )
        return Estimator(self.metric, quantizer, keeps_product=keeps_product)

    def sample(self, rows: ArrayLike, name: str, device: torch.device) -> Tensor:
        """Checked rows to learn from, (n, dim) float32 on the device; unit rows for "cosine".

        Raises:
            InvalidInputError: no rows, or bad ones.
        """
        matrix = as_matrix(rows, self.dim, name, device)
        if not len(matrix):
            raise InvalidInputError(f"{name} must have at least one row, got shape {tuple(rows.shape)}")
        return unit_rows(matrix) if self.metric == "cosine" else matrix

    def taught(self, sample: Tensor, queries: Tensor | None, *, axes: bool) -> Estimator:
        """The estimator that a sample teaches; see `TurboQuantIndex.train`.

        Args:
            sample: (n, dim), as `self.sample` gives it.
            queries: (m, dim), likewise, or None.
            axes: whether axes are learnt, if they pay, or only the centre.

        Raises:
            InvalidInputError: the mean's squared norm overflows.
        """
        centre = centre_of(sample)
        if not torch.isfinite((centre * centre).sum()):
            raise InvalidInputError("sample must have a mean whose squared norm is finite in float32, got an overflow")
        if axes:
            return chosen(sample, queries, self.estimator(), self.estimator)
        return self.estimator(centre, None, True)
