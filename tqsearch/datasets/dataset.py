"""A data set: base vectors, queries, a metric, and who the true neighbours are."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tqsearch.datasets.metric import METRICS, Metric
from tqsearch.datasets.truth import exact_neighbors
from tqsearch.errors import InvalidInputError


@dataclass(frozen=True, eq=False)
class Dataset:
    """Base vectors to index and queries to search for.

    Attributes:
        name: of the registry, or the stem of the file.
        metric: `cosine`, `l2` or `ip` (larger inner products are nearer).
        train: the base, (n, dim), as stored: usually float32, uint8 in some files. An array read from a file is mapped,
            not loaded, where the format allows, and then read-only.
        test: the queries, (q, dim), float32.
        neighbors: ids of true neighbours, nearest first, (q, k) of an integer type; None when not known.
        distances: to those neighbours, (q, k), as stored by whoever made the file; None when not known.

    Raises:
        InvalidInputError: the arrays do not fit each other.
    """

    name: str
    metric: Metric
    train: NDArray[Any]
    test: NDArray[np.float32]
    neighbors: NDArray[Any] | None = None
    distances: NDArray[Any] | None = None

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise InvalidInputError(f"metric must be one of {', '.join(METRICS)}, got {self.metric!r}")
        for field, array in (("train", self.train), ("test", self.test)):
            if array.ndim != 2 or 0 in array.shape or array.dtype.kind not in "fiu":
                raise InvalidInputError(
                    f"{field} must be a matrix of numbers with at least one row and column,"
                    f" got shape {array.shape}, dtype {array.dtype}"
                )
        if self.test.shape[1] != self.dim:
            raise InvalidInputError(f"test must have shape (q, {self.dim}) as train has, got {self.test.shape}")
        if self.test.dtype != np.float32:
            raise InvalidInputError(f"test must be float32, got {self.test.dtype}")
        self._check_neighbors()

    def _check_neighbors(self) -> None:
        rows = len(self.test)
        ids = self.neighbors
        if ids is not None:
            if ids.ndim != 2 or len(ids) != rows or ids.dtype.kind not in "iu":
                raise InvalidInputError(f"neighbors must be integers ({rows}, k), got {ids.shape}, {ids.dtype}")
            if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < len(self.train):
                raise InvalidInputError(
                    f"neighbors must be in 0 to {len(self.train) - 1}, got {ids.min()} to {ids.max()}"
                )
        far = self.distances
        if far is not None and (ids is None or far.shape != ids.shape):
            wanted = "None without neighbors" if ids is None else f"of the shape of neighbors, {ids.shape}"
            raise InvalidInputError(f"distances must be {wanted}, got {far.shape}")

    @property
    def dim(self) -> int:
        """Coordinates of a vector."""
        return int(self.train.shape[1])

    def ground_truth(self, k: int) -> NDArray[np.int64]:
        """The ids of the k true neighbours of every query.

        They are those of `neighbors` when it has that many columns, and are computed exactly otherwise: seconds for a
        hundred thousand vectors, minutes for millions. Nothing is remembered: keep the result.

        Args:
            k: neighbours a query, from 1 to the number of base vectors.

        Returns:
            (q, k) int64, nearest first; where computed, equal scores are in the order of ids.

        Raises:
            InvalidInputError: k is out of range.
        """
        if not 1 <= k <= len(self.train):
            raise InvalidInputError(f"k must be from 1 to {len(self.train)}, the number of base vectors, got {k}")
        if self.neighbors is not None and self.neighbors.shape[1] >= k:
            return self.neighbors[:, :k].astype(np.int64)
        return exact_neighbors(self.train, self.test, k, self.metric)
