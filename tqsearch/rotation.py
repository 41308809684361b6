"""Seeded orthogonal transforms: randomized Hadamard for every dimension, dense orthogonal, and none.

A transform is described by plain tensors, which the kernels take, so that one description runs on every device.

**Randomized Hadamard.** A round is: multiply by random signs, then by Hadamard blocks. A dimension that is not a power
of two is split into the powers of two of its binary form, largest first (1536 = 1024 + 512, 100 = 64 + 32 + 4): each is
a Hadamard block of its own, nothing is padded and nothing more is stored. Blocks do not talk to each other within a
round, so there a random permutation goes before the second and third round: two passes more than a power of two's.

Three rounds are made, 3 d log2(d) additions a vector. One leaves a one-hot vector flat, all its coordinates of one
magnitude, the worst input for scalar levels; after two, its coordinates lie on a lattice of step 2 / sqrt(d), which
costs up to 40 % more distortion at d = 64 and 4 bits (measured). After three, such vectors are coded as well as any
from d = 128 on.

In float32 the transform is additions, subtractions and multiplications by fixed numbers in a fixed order, so its
results are bit for bit the same for any batch size, on any device.

**Dense.** The orthogonal factor of a Gaussian matrix with the signs of R's diagonal taken out (Haar distributed),
applied in float64: d^2 operations a vector and d^2 numbers of memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tqsearch import splitmix
from tqsearch.errors import InvalidInputError

MAX_DIM = 8192

# Streams of the seed's generator. Their numbers are part of the file format.
SIGN_STREAM = 0
PERMUTATION_STREAM = 16
DENSE_STREAM = 32


class Rotation(Protocol):
    """An orthogonal transform of R^dim."""

    name: str
    dim: int

    def apply(self, vectors: Tensor) -> Tensor:
        """The transform of each row: (n, dim) floating point to (n, dim) float32 (float64 for float64)."""

    def invert(self, vectors: Tensor) -> Tensor:
        """The inverse of `apply`, with the same shapes and dtypes."""


def hadamard_blocks(dim: int) -> list[int]:
    """The block sizes of a dimension: the powers of two of its binary form, largest first."""
    return [1 << bit for bit in range(dim.bit_length() - 1, -1, -1) if dim >> bit & 1]


def _butterflies(columns: Tensor) -> Tensor:
    """Unnormalised Hadamard blocks along the first axis of (d, n), in place in one of two buffers; returns the result.

    At span h, rows i and i + h of each aligned pair of spans are added and subtracted. Rows past the last whole pair
    are left alone, which is exactly the split of d into powers of two.
    """
    dim, count = columns.shape
    source, target = columns, torch.empty_like(columns)
    span = 1
    while 2 * span <= dim:
        whole = dim - dim % (2 * span)
        pairs = source[:whole].view(whole // (2 * span), 2, span * count)
        into = target[:whole].view(whole // (2 * span), 2, span * count)
        torch.add(pairs[:, 0], pairs[:, 1], out=into[:, 0])
        torch.sub(pairs[:, 0], pairs[:, 1], out=into[:, 1])
        if whole < dim:
            target[whole:] = source[whole:]
        source, target = target, source
        span *= 2
    return source


def hadamard_columns(columns: Tensor, factors: Tensor, orders: Tensor | None) -> Tensor:
    """The randomized Hadamard transform of each column.

    Args:
        columns: (dim, n), float32 or float64.
        factors, orders: as `Hadamard.tensors` gives them.

    Returns:
        (dim, n), of the same dtype.
    """
    for index, factor in enumerate(factors):
        if index and orders is not None:
            columns = columns[orders[index - 1]]
        columns = _butterflies(columns * factor[:, None])
    return columns


@dataclass
class Hadamard:
    """Seeded randomized Hadamard transform; see the module's docstring for its definition and cost.

    Args:
        dim: 1 to 8192.
        seed: any integer.

    Attributes:
        rounds: 3.
    """

    dim: int
    seed: int
    name: str = field(default="hadamard", init=False)

    def __post_init__(self) -> None:
        self.dim = _checked_dim(self.dim)
        blocks = hadamard_blocks(self.dim)
        self.rounds = 3
        norms = np.concatenate([np.full(size, size**-0.5) for size in blocks])
        factors = [splitmix.signs(self.seed, SIGN_STREAM + r, self.dim) * norms for r in range(self.rounds)]
        self._factors = torch.from_numpy(np.stack(factors))
        self._orders: Tensor | None = None
        if len(blocks) > 1:
            orders = [splitmix.permutation(self.seed, PERMUTATION_STREAM + r, self.dim) for r in (1, 2)]
            self._orders = torch.from_numpy(np.stack(orders))
        self._cache: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor | None]] = {}

    def tensors(self, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor | None]:
        """What the kernels take.

        Returns:
            factors: (rounds, dim): the sign of each coordinate times its block's normalisation, applied before the
                block.
            orders: (rounds - 1, dim) int64, or None for a power of two: before round r + 1, new coordinate i is old
                coordinate orders[r, i].
        """
        key = (device, dtype)
        if key not in self._cache:
            orders = None if self._orders is None else self._orders.to(device)
            self._cache[key] = (self._factors.to(device=device, dtype=dtype), orders)
        return self._cache[key]

    def apply(self, vectors: Tensor) -> Tensor:
        """The transform of each row: (n, dim) floating point to (n, dim) float32 (float64 for float64)."""
        columns = _working(vectors).t().contiguous()
        return hadamard_columns(columns, *self.tensors(columns.device, columns.dtype)).t()

    def invert(self, vectors: Tensor) -> Tensor:
        """The inverse of `apply`: each block is its own inverse up to the factor that `factors` holds."""
        columns = _working(vectors).t().clone(memory_format=torch.contiguous_format)  # the butterflies write into it
        factors, orders = self.tensors(columns.device, columns.dtype)
        for index in reversed(range(self.rounds)):
            columns = _butterflies(columns) * factors[index, :, None]
            if index and orders is not None:
                columns = torch.empty_like(columns).index_copy_(0, orders[index - 1], columns)
        return columns.t()


@dataclass
class Dense:
    """Dense orthogonal transform, Haar distributed; the same on every machine up to float64 rounding of the QR.

    Args:
        dim: 1 to 8192.
        seed: any integer.
    """

    dim: int
    seed: int
    name: str = field(default="dense", init=False)

    def __post_init__(self) -> None:
        self.dim = _checked_dim(self.dim)
        self._matrix = torch.from_numpy(orthogonal_matrix(self.dim, self.seed, DENSE_STREAM))
        self._cache: dict[torch.device, Tensor] = {}

    def matrix(self, device: torch.device) -> Tensor:
        """(dim, dim) float64; rows are the new axes."""
        if device not in self._cache:
            self._cache[device] = self._matrix.to(device)
        return self._cache[device]

    def apply(self, vectors: Tensor) -> Tensor:
        """vectors @ matrix.T, in float64, rounded to float32 (kept float64 for float64)."""
        working = _working(vectors)
        return (working.double() @ self.matrix(working.device).t()).to(working.dtype)

    def invert(self, vectors: Tensor) -> Tensor:
        """vectors @ matrix, in float64, rounded to float32 (kept float64 for float64)."""
        working = _working(vectors)
        return (working.double() @ self.matrix(working.device)).to(working.dtype)


@dataclass
class Identity:
    """No transform: for vectors whose coordinates are already alike."""

    dim: int
    seed: int = 0
    name: str = field(default="identity", init=False)

    def __post_init__(self) -> None:
        self.dim = _checked_dim(self.dim)

    def apply(self, vectors: Tensor) -> Tensor:
        """The rows themselves, float32 (float64 for float64)."""
        return _working(vectors)

    def invert(self, vectors: Tensor) -> Tensor:
        """The rows themselves, float32 (float64 for float64)."""
        return _working(vectors)


ROTATIONS: dict[str, type[Hadamard] | type[Dense] | type[Identity]] = {
    "dense": Dense,
    "hadamard": Hadamard,
    "identity": Identity,
}


def make_rotation(name: str, dim: int, seed: int) -> Rotation:
    """The transform of that name: "hadamard", "dense" or "identity"."""
    if name not in ROTATIONS:
        raise InvalidInputError(f"rotation must be one of {', '.join(map(repr, ROTATIONS))}, got {name!r}")
    return ROTATIONS[name](dim, seed)


def orthogonal_matrix(dim: int, seed: int, stream: int) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """A Haar-distributed orthogonal matrix, (dim, dim) float64."""
    gaussian = splitmix.gaussians(seed, stream, dim * dim).reshape(dim, dim)
    q, r = np.linalg.qr(gaussian)
    signs = np.where(np.diag(r) < 0.0, -1.0, 1.0)
    result: np.ndarray[tuple[int, int], np.dtype[np.float64]] = np.ascontiguousarray((q * signs).T)
    return result


def _checked_dim(dim: int) -> int:
    if isinstance(dim, bool) or not isinstance(dim, int | np.integer) or not 1 <= dim <= MAX_DIM:
        raise InvalidInputError(f"dim must be an integer from 1 to {MAX_DIM}, got {dim!r}")
    return int(dim)


def _working(vectors: Tensor) -> Tensor:
    return vectors if vectors.dtype == torch.float64 else vectors.float()
