"""One interface over everything that is measured: train, add, search, bytes per vector."""

import importlib
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]
Ids = NDArray[np.int64]


class Engine(Protocol):
    """What the runner times."""

    def train(self, sample: Vectors) -> None:
        """Learn from the sample; nothing for a codec that is not trained."""

    def add(self, vectors: Vectors) -> None:
        """Encode and keep the vectors; ids are 0, 1, 2, ..."""

    def search(self, queries: Vectors, k: int) -> Ids:
        """The ids of the k best for each query, best first."""

    @property
    def bytes_per_vector(self) -> float:
        """All that is kept for a vector: codes, scales, norms; not what is kept once for the index."""


class FaissEngine:
    """A FAISS index.

    Args:
        index: untrained.
        unit_rms: divide all vectors by the root mean square of the norms in the sample, for a codec that expects norm
            1; one factor for all changes no order of distances.
    """

    def __init__(self, index: Any, *, unit_rms: bool = False) -> None:
        self.index = index
        self._unit_rms = unit_rms
        self._factor = np.float32(1)

    def train(self, sample: Vectors) -> None:
        """FAISS's own training: some indexes learn much, some only draw a rotation."""
        if self._unit_rms:
            self._factor = np.float32(1 / np.sqrt(np.square(sample, dtype=np.float64).sum(axis=1).mean()))
        self.index.train(self._scaled(sample))

    def add(self, vectors: Vectors) -> None:
        """Encode and keep."""
        self.index.add(self._scaled(vectors))

    def search(self, queries: Vectors, k: int) -> Ids:
        """The ids of the k best."""
        ids: Ids = self.index.search(self._scaled(queries), k)[1]
        return ids

    def _scaled(self, vectors: Vectors) -> Vectors:
        return vectors * self._factor if self._unit_rms else vectors

    @property
    def bytes_per_vector(self) -> float:
        """The size of a code with the factors FAISS keeps beside it."""
        return int(self.index.sa_code_size())


class TurboQuantEngine:
    """The index of this package, on the CPU; `learn` is what it learns of the training sample, "" for nothing."""

    def __init__(
        self, dim: int, bits: float, metric: str, seed: int, *, learn: str = "", codec: str = "scalar"
    ) -> None:
        from tqsearch import TurboQuantIndex

        self.index = TurboQuantIndex(dim, bits=bits, metric=metric, seed=seed, codec=codec)  # type: ignore[arg-type]

        self._learn = learn

    def train(self, sample: Vectors) -> None:
        """Nothing is learned from data, unless it was asked for."""
        if self._learn:
            self.index.train(sample, learn=self._learn)  # type: ignore[arg-type]

    def add(self, vectors: Vectors) -> None:
        """Encode and keep."""
        self.index.add(vectors)

    def search(self, queries: Vectors, k: int) -> Ids:
        """The ids of the k best."""
        return np.asarray(self.index.search(queries, k=k)[1])

    @property
    def bytes_per_vector(self) -> float:
        """What the index says of itself."""
        return self.index.bytes_per_vector


class TurbovecEngine:
    """The PyPI package turbovec: inner product only, dimensions a multiple of 8.

    It does not say what it keeps for a vector, so that is measured: the growth of its serialized form.
    """

    GROWTH_ROWS = 2048

    def __init__(self, dim: int, bits: int) -> None:
        module = importlib.import_module("turbovec")
        self._new: Callable[[], Any] = lambda: module.TurboQuantIndex(dim, bits)
        self._dim = dim
        self.index = self._new()

    def train(self, sample: Vectors) -> None:
        """Not trained; its optional calibration is left off, as its documentation warns of it."""

    def add(self, vectors: Vectors) -> None:
        """Encode and keep."""
        self.index.add(vectors)
        self.index.prepare()

    def search(self, queries: Vectors, k: int) -> Ids:
        """The ids of the k best."""
        return np.asarray(self.index.search(queries, k)[1])

    @property
    def bytes_per_vector(self) -> float:
        """The growth of the serialized form."""
        rows = np.random.default_rng(0).standard_normal((self.GROWTH_ROWS, self._dim), dtype=np.float32)
        index = self._new()
        index.add(rows)
        small = len(index.to_bytes())
        index.add(rows)
        return (len(index.to_bytes()) - small) / self.GROWTH_ROWS
