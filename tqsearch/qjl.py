"""QJL: the signs of a random projection of a vector, and the unbiased inner product they give (arXiv 2406.03482)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from tqsearch import splitmix
from tqsearch.errors import InvalidInputError
from tqsearch.packing import pack, unpack
from tqsearch.plan import BitPlan
from tqsearch.rotation import orthogonal_matrix

GAUSSIAN_STREAM = 48
ORTHOGONAL_STREAM = 49


class QJL:
    """d signs of S r and the norm |r|; |r| c / d <S y, sign(S r)> estimates <y, r> without bias.

    With Gaussian S (independent N(0, 1) entries) c = sqrt(pi / 2). With orthogonal S, times sqrt(d), c is
    1 / E|u| for u of the Beta law of a coordinate, sqrt(pi / d) Gamma((d + 1) / 2) / Gamma(d / 2): the Gaussian
    constant would be biased for small d.

    Args:
        dim: d.
        seed: any integer.
        projection: "gaussian" (the paper's) or "orthogonal" (Haar; less noise). Both keep a dense (d, d) matrix.
    """

    def __init__(self, dim: int, seed: int, projection: Literal["gaussian", "orthogonal"]) -> None:
        if projection == "gaussian":
            matrix = splitmix.gaussians(seed, GAUSSIAN_STREAM, dim * dim).reshape(dim, dim)
            constant = math.sqrt(math.pi / 2)
        elif projection == "orthogonal":
            matrix = math.sqrt(dim) * orthogonal_matrix(dim, seed, ORTHOGONAL_STREAM)
            constant = math.sqrt(math.pi / dim) * math.exp(math.lgamma((dim + 1) / 2) - math.lgamma(dim / 2))
        else:
            raise InvalidInputError(f"projection must be 'gaussian' or 'orthogonal', got {projection!r}")
        self.projection = projection
        self._factor = constant / dim
        self._plan = BitPlan.of(dim, 1)
        self._matrix = torch.from_numpy(matrix).float()
        self._cache: dict[torch.device, Tensor] = {}

    @property
    def bytes_per_vector(self) -> int:
        """Bytes of the signs and of the norm."""
        return self._plan.bytes_per_vector + 4

    def _on(self, device: torch.device) -> Tensor:
        if device not in self._cache:
            self._cache[device] = self._matrix.to(device)
        return self._cache[device]

    def encode(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Packed signs (n, ceil(d / 8)) uint8 and norms (n,) float32 of (n, d) float32."""
        projected = vectors @ self._on(vectors.device).t()
        norms = torch.linalg.vector_norm(vectors, dim=1, dtype=torch.float64).float()  # float32 squares may overflow
        return pack((projected >= 0).to(torch.uint8), self._plan), norms

    def decode(self, signs: Tensor, norms: Tensor) -> Tensor:
        """The vectors (n, d) whose inner products `inner_product` gives."""
        plus_minus = 2.0 * unpack(signs, self._plan).float() - 1.0
        return (norms * self._factor)[:, None] * (plus_minus @ self._on(signs.device))

    def inner_product(self, queries: Tensor, signs: Tensor, norms: Tensor) -> Tensor:
        """Estimates (q, n) of <query, vector> for queries (q, d) float32."""
        plus_minus = 2.0 * unpack(signs, self._plan).float() - 1.0
        return (queries @ self._on(signs.device).t()) @ plus_minus.t() * (norms * self._factor)
