"""TurboQuantIndex: approximate nearest-neighbour search over vectors kept as codes of a few bits a dimension."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tqsearch import index_file, kernels
from tqsearch.arrays import ArrayLike, IdsLike, as_device, as_ids, as_rows, like
from tqsearch.blocks import encode_blocks
from tqsearch.codec import Codec
from tqsearch.codes import Codes
from tqsearch.contents import LARGEST_ID, Contents, check_distinct, new_ids
from tqsearch.errors import InvalidInputError
from tqsearch.estimator import Estimator
from tqsearch.locks import ReadWriteLock
from tqsearch.modes import plainly
from tqsearch.plan import BitPlan
from tqsearch.quantizer import TurboQuantizer
from tqsearch.recipe import Metric, Recipe
from tqsearch.scanning import Searcher
from tqsearch.segments import Columns
from tqsearch.splitmix import permutation

AUTO_ROWS = 4096  # the first add of at least so many rows trains an index of train="auto"
_AUTO_SAMPLE = 1 << 16  # rows it draws
_SAMPLE_STREAM = 64  # of the seed's generator
_MOST_RESULTS = (1 << 31) - 1  # of one query


class TurboQuantIndex:
    """Vectors as TurboQuant codes, searched without decompressing them. Nothing needs training; `train` helps.

    A vector costs `bytes_per_vector`: its codes, a scale (2 bytes for cosine, else 4), and for l2 its squared norm (4).
    Learnt axes need 2 bytes for each of these, and what is saved goes to the codes: the sum is not more. An index that
    has learnt its centre alone keeps for cosine and ip also a product with the centre (2 bytes for cosine, else 4).

    Scores estimate the metric of the vectors given, without bias over the choice of the seed.

    Several threads may search at once; a change waits for the searches under way and holds back new ones.

    Args:
        dim: 1 to 8192.
        bits: width a coordinate: an integer from 1 to 8, a fraction (2.5), or a `BitPlan`; along a trellis 1 to 4.
        metric: "cosine" and "ip": larger is nearer; "l2": squared Euclidean distance, smaller is nearer.
        device: where the codes live; None for the CPU.
        seed: any integer: which random rotation.
        rotation: "hadamard", "dense" or "identity"; see `tqsearch.rotation`.
        train: "off", or "auto": the first `add` calls `train` with a sample of its own rows if it has at least 4,096.
            The codes then depend on what was added first. An index whose first rows are fewer stays untrained.
        codec: "scalar", or "trellis": codes of the same bytes and a quarter to two fifths less squared error, see
            `tqsearch.trellis`. They take longer: a CPU core encodes about 0.9 million coordinates a second.
        backend: which kernels; see `tqsearch.kernels.select`.

    Raises:
        InvalidInputError: an argument is out of range; the message says which.
    """

    def __init__(
        self,
        dim: int,
        bits: float | BitPlan = 4,
        metric: Metric = "cosine",
        device: str | torch.device | None = None,
        seed: int = 0,
        *,
        rotation: str = "hadamard",
        train: Literal["off", "auto"] = "off",
        codec: Codec = "scalar",
        backend: str = "auto",
    ) -> None:
        if train not in ("off", "auto"):
            raise InvalidInputError(f"train must be 'off' or 'auto', got {train!r}")
        place = as_device(device)
        kernels.select(backend, place)
        recipe = Recipe(dim, bits, metric, rotation, seed, codec, backend)
        self._become(recipe, recipe.estimator(), Contents(place), auto=train == "auto")

    def _become(self, recipe: Recipe, estimator: Estimator, contents: Contents, *, auto: bool) -> None:
        self._recipe = recipe
        self._estimator = estimator
        self._contents = contents
        self._auto = auto
        self._lock = ReadWriteLock()
        self._searcher: Searcher | None = None  # of the estimator and contents as they are

    def __repr__(self) -> str:
        codec = "" if self.codec == "scalar" else f"codec={self.codec!r}, "
        return (
            f"TurboQuantIndex({len(self)} vectors, dim={self.dim}, metric={self.metric!r}, plan={self.plan} = "
            f"{self._quantizer.row_bytes} bytes, {codec}device={str(self.device)!r})"
        )

    # What it is

    @property
    def _quantizer(self) -> TurboQuantizer:
        return self._estimator.quantizer

    @property
    def metric(self) -> Metric:
        """What scores estimate: "ip", "cosine" or "l2"."""
        return self._recipe.metric

    @property
    def dim(self) -> int:
        """Width of a vector."""
        return self._quantizer.dim

    @property
    def plan(self) -> BitPlan:
        """The widths of the rotated coordinates; with learnt axes, of those, with the distortion expected of them."""
        return self._quantizer.plan

    @property
    def codec(self) -> Codec:
        """What codes the coordinates: "scalar" or "trellis"."""
        return self._quantizer.codec

    @property
    def seed(self) -> int:
        """The seed of the rotation."""
        return self._quantizer.seed

    @property
    def device(self) -> torch.device:
        """Where the codes live."""
        return self._contents.device

    @property
    def bytes_per_vector(self) -> int:
        """Bytes kept for each vector, ids apart (0, 1, 2, ... cost nothing; any others 8 bytes and a look-up table)."""
        return self._estimator.bytes_per_vector

    @property
    def nbytes(self) -> int:
        """Bytes allocated for all vectors and ids, counted from the storages, and once for learnt axes."""
        with self._lock.read():
            basis = self._quantizer.basis
            return self._contents.nbytes + (0 if basis is None else basis.nbytes)

    def __len__(self) -> int:
        with self._lock.read():
            return len(self._contents)

    def __contains__(self, id: object) -> bool:
        if isinstance(id, np.ndarray | Tensor) and id.ndim == 0:  # as one of the ids that a search returns
            id = id.item()
        if not isinstance(id, int | np.integer) or isinstance(id, bool) or not 0 <= id <= LARGEST_ID:
            return False
        with self._lock.read():
            return bool(self._contents.rows_of(np.array([id], dtype=np.int64))[0] >= 0)

    @property
    def ids(self) -> npt.NDArray[np.int64]:
        """The ids in the index, ascending."""
        with self._lock.read():
            return np.sort(self._contents.ids.cpu().numpy())

    @property
    def centre(self) -> npt.NDArray[np.float32] | None:
        """What is taken off every vector before it is coded, (dim,) float32; None unless trained."""
        return None if self._quantizer.centre is None else self._quantizer.centre.numpy().copy()

    @property
    def learnt(self) -> Literal["nothing", "centre", "axes"]:
        """What `train` has learnt; "axes" includes the centre."""
        if self._quantizer.basis is not None:
            return "axes"
        return "nothing" if self._quantizer.centre is None else "centre"

    # Changes

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Holds the lock alone, and forgets what searches have prepared of the rows as they were."""
        with self._lock.write():
            self._searcher = None
            yield

    @plainly
    def train(
        self, sample: ArrayLike, queries: ArrayLike | None = None, *, learn: Literal["axes", "centre"] = "axes"
    ) -> None:
        """Learns from a sample how to code the vectors to come; optional, and only while the index is empty.

        What is coded is then z = x - c, c the sample's mean, in the sample's principal axes, with more bits for the
        axes that matter more to scores: see `tqsearch.training`. A vector costs not more bytes than untrained. The axes
        are kept once, 4 bytes a number, at most dim^2 numbers. A quarter of the sample is held out first: where axes
        would estimate its scores worse than the centre alone, or with fewer than 90 rows, only the centre is learnt.

        With the centre alone z is rotated as without training, and for cosine and ip <c, z> is kept beside the code (2
        or 4 bytes more), so that only <q - c, z> is estimated: <q, x> = <q, c> + <c, z> + <q - c, z>.

        Args:
            sample: (n, dim), as for `add`; rows drawn at random from the vectors to come, a few times dim of them.
            queries: (m, dim), such queries as will be asked, a few hundred; None if unknown.
            learn: "axes", or "centre" for the centre alone: seconds less, and the codes' error does not depend on how
                like the sample a vector is.

        Raises:
            InvalidInputError: no rows, bad rows, or the index holds vectors already; it is unchanged.
        """
        if learn not in ("axes", "centre"):
            raise InvalidInputError(f"learn must be 'axes' or 'centre', got {learn!r}")
        rows = self._recipe.sample(sample, "sample", self.device)
        asked = None if queries is None else self._recipe.sample(queries, "queries", self.device)
        taught = self._recipe.taught(rows, asked, axes=learn == "axes")
        with self._changing():
            if len(self._contents):
                raise InvalidInputError(f"train must come before add, got an index of {len(self._contents)} vectors")
            self._estimator = taught

    @plainly
    def add(self, vectors: ArrayLike, ids: IdsLike | None = None) -> None:
        """Adds vectors. Adding in parts makes the same index, byte for byte, as adding at once, unless train="auto".

        Whatever is raised, `torch.OutOfMemoryError` and an interrupt included, the index is as it was before.

        Args:
            vectors: (n, dim) numpy or torch, floating point or integer, any strides, finite, on any device. A GPU that
                they are not on holds a few blocks of them at a time, 64 MB each.
            ids: (n,) integers from 0 to 2^63 - 1, a sequence, numpy or torch, each new; None continues after the
                largest id there ever was, from 0.

        Raises:
            InvalidInputError: wrong shape or dtype, or a value that is not finite (the first such row is named), or
                with "ip" and "l2" a norm that overflows float32.
            DuplicateIdError: an id is given twice or is in the index.
        """
        rows = as_rows(vectors, self.dim, "vectors")
        given = None if ids is None else new_ids(ids, len(rows))
        if not len(rows):
            return
        before, device = self._estimator, self.device
        estimator = self._taught_by_first(rows) or before
        columns = self._encode(rows, estimator, device)
        with self._changing():
            # Another thread may have called `train` or `to` meanwhile, or `add`, which makes these rows not the first.
            late = estimator is not before and len(self._contents)
            if self._estimator is not before or self.device != device or late:
                estimator = before = self._estimator
                columns = self._encode(rows, estimator, self.device)
            try:
                self._estimator = estimator
                self._contents.append(columns, given)
            except BaseException:
                self._estimator = before
                raise

    def _taught_by_first(self, rows: Tensor) -> Estimator | None:
        """What train="auto" learns from the rows of an add; None if the index is trained, holds vectors or they do not
        suffice. Bad rows are left to the encoder, which names them.
        """
        if not self._auto or len(rows) < AUTO_ROWS or self.learnt != "nothing" or len(self):
            return None
        numbers = np.sort(permutation(self.seed, _SAMPLE_STREAM, len(rows))[:_AUTO_SAMPLE])
        some = rows[torch.from_numpy(numbers).to(rows.device)].float()
        if not torch.isfinite(some.sum(dtype=torch.float64)):
            return None
        return self._recipe.taught(self._recipe.sample(some, "vectors", self.device), None, axes=True)

    def _encode(self, rows: Tensor, estimator: Estimator, device: torch.device) -> Columns:
        return encode_blocks(rows, device, estimator.encode, slow=self.codec == "trellis")

    @plainly
    def remove(self, ids: IdsLike) -> None:
        """Removes vectors; their space is filled from the end and reused.

        No more rows move than are removed. If ids were the row numbers so far, they are stored from then on: 8 bytes a
        vector, and a look-up table of 16 on the host. Whatever is raised, the index is as it was before.

        Args:
            ids: (m,) integers, distinct and in the index; a sequence, numpy or torch.

        Raises:
            UnknownIdError: an id is not in the index.
            DuplicateIdError: an id is given twice.
            InvalidInputError: ids that are not integers.
        """
        array = as_ids(ids, "ids")
        check_distinct(array)
        with self._changing():
            if len(array):
                self._contents.remove(array)

    # Look-ups

    @plainly
    def reconstruct(self, ids: IdsLike) -> Tensor | npt.NDArray[np.float32]:
        """Approximate vectors of ids, with the least squared error the codes allow.

        Args:
            ids: (m,) integers in the index, in any order, also repeated; a sequence, numpy or torch.

        Returns:
            (m, dim) float32: torch on the index's device for torch ids, else numpy. For metric "cosine" the vectors are
            those given divided by their norms, which are not kept.

        Raises:
            UnknownIdError: an id is not in the index.
        """
        array = as_ids(ids, "ids")
        with self._lock.read():
            rows = torch.from_numpy(self._contents.known_rows(array)).to(self.device)
            columns = self._contents.rows.gather(rows) if len(self._contents) else None
            quantizer = self._quantizer
        if columns is None:
            vectors = torch.empty((0, self.dim), dtype=torch.float32, device=self.device)
        else:
            vectors = quantizer.decode(Codes(columns["packed"], columns["scales"]))
        return vectors if isinstance(ids, Tensor) else vectors.cpu().numpy()

    @plainly
    def search(
        self, queries: ArrayLike, k: int = 10, *, allow: IdsLike | None = None, precision: str = "int8"
    ) -> tuple[ArrayLike, ArrayLike]:
        """The k nearest vectors of each query, by scores estimated from the codes.

        Args:
            queries: (q, dim) or (dim,), numpy or torch, as for `add`.
            k: how many, from 1 to 2^31 - 1.
            allow: which vectors may be returned: integer ids (those not in the index allow nothing), or a bool mask
                indexed by id, whose length is one more than the largest id there ever was; None for all.
            precision: "int8" lets a GPU round queries and levels to int8: scores were off by up to 0.0024 |q| |x| in
                trials. "exact" keeps them float32 and is slower. A CPU is exact in any case.

        Returns:
            scores: (q, k) or (k,) float32. "ip" and "cosine": estimates of the inner product or cosine, largest first;
                "l2": of the squared distance, smallest first (being unbiased it can be a little below 0). Where fewer
                than k vectors are allowed: -inf, for "l2" inf.
            ids: (q, k) or (k,) int64; -1 where missing.
            Both numpy for numpy queries, else torch on the queries' device.

        Raises:
            InvalidInputError: wrong shape or dtype, a value that is not finite, k out of range, an unknown precision, a
                mask of another length, or for "ip" and "l2" a query whose squared norm overflows float32.
        """
        if isinstance(k, bool) or not isinstance(k, int | np.integer) or not 1 <= k <= _MOST_RESULTS:
            raise InvalidInputError(f"k must be an integer from 1 to {_MOST_RESULTS}, got {k!r}")
        if precision not in kernels.PRECISIONS:
            raise InvalidInputError(f"precision must be 'int8' or 'exact', got {precision!r}")
        rows = as_rows(queries, self.dim, "queries", one=True)
        with self._lock.read():
            mask = None if allow is None else self._contents.mask(allow)
            matrix = rows.to(device=self.device, dtype=torch.float32)
            searcher = self._searcher
            if searcher is None:
                searcher = self._searcher = Searcher(self._estimator, self._contents.rows, self.device)
            scores, ids = searcher.top_k(matrix, int(k), mask, precision)
        if queries.ndim == 1:
            scores, ids = scores[0], ids[0]
        return like(scores, queries), like(ids, queries)

    # Elsewhere

    @plainly
    def to(self, device: str | torch.device) -> TurboQuantIndex:
        """Moves the index to a device, in place, and returns it."""
        target = as_device(device)
        kernels.select(self._recipe.backend, target)
        with self._changing():
            self._contents = self._contents.to(target)
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the index to a file, whole or not at all; see `tqsearch.format` for what is in it."""
        with self._lock.read():
            index_file.write(path, self._recipe.plan, self._estimator, self._contents)

    @classmethod
    @plainly
    def load(
        cls, path: str | os.PathLike[str], device: str | torch.device | None = None, *, backend: str = "auto"
    ) -> TurboQuantIndex:
        """Reads an index from a file; on a CPU the codes stay memory-mapped.

        Args:
            path: the file.
            device: where the codes go; None for the CPU.
            backend: as for the constructor.

        Raises:
            ForeignFileError, CorruptFileError, NewerFormatError: the file is not such a file, is truncated or altered,
                or is from a newer version.
            OSError: the file cannot be read.
        """
        place = as_device(device)
        kernels.select(backend, place)
        index = cls.__new__(cls)
        index._become(*index_file.read(path, place, backend), auto=False)
        return index
