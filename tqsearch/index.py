"""TurboQuantIndex: approximate nearest-neighbour search over vectors kept as codes of a few bits a dimension."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tqsearch import format as file_format
from tqsearch import kernels
from tqsearch.arrays import ArrayLike, IdsLike, as_ids, as_matrix, like
from tqsearch.errors import CorruptFileError, DuplicateIdError, InvalidInputError, UnknownIdError
from tqsearch.ids import IdMap, Ids
from tqsearch.kernels.reference import merge_top_k
from tqsearch.locks import ReadWriteLock
from tqsearch.plan import BitPlan
from tqsearch.quantizer import Codes, TurboQuantizer
from tqsearch.segments import Columns, SegmentedRows

Metric = Literal["ip", "cosine", "l2"]
METRICS = ("ip", "cosine", "l2")

_GATHER_SHARE = 8  # a filter that allows less than one row in this many is scanned by gathering those rows
_GATHER_BLOCK = 1 << 16
_LARGEST_ID = np.iinfo(np.int64).max


class TurboQuantIndex:
    """Vectors as TurboQuant codes, searched without decompressing them. Nothing needs training.

    A vector costs `bytes_per_vector`: its codes, a scale (2 bytes for cosine, else 4), for l2 its squared norm (4), and
    for a trained index of another metric its product with the centre (2 bytes for cosine, else 4).

    Scores estimate the metric of the vectors given, without bias over the choice of the seed.

    Several threads may search at once; a change waits for the searches under way and holds back new ones.

    Args:
        dim: 1 to 8192.
        bits: width a coordinate: an integer from 1 to 8, a fraction (2.5), or a `BitPlan`.
        metric: "cosine" and "ip": larger is nearer; "l2": squared Euclidean distance, smaller is nearer.
        device: where the codes live; None for the CPU.
        seed: any integer: which random rotation.
        rotation: "hadamard", "dense" or "identity"; see `tqsearch.rotation`.
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
        backend: str = "auto",
    ) -> None:
        if metric not in METRICS:
            raise InvalidInputError(f"metric must be one of {', '.join(map(repr, METRICS))}, got {metric!r}")
        self.metric: Metric = metric
        self._quantizer = _quantizer(dim, bits, metric, rotation, seed, backend, None)
        self._device = torch.device("cpu" if device is None else device)
        kernels.select(backend, self._device)
        self._rows = SegmentedRows()
        self._ids = IdMap()
        self._plain_ids = True  # row i has id i: no id is stored
        self._next_id = 0
        self._lock = ReadWriteLock()

    def __repr__(self) -> str:
        return (
            f"TurboQuantIndex({len(self)} vectors, dim={self.dim}, metric={self.metric!r}, plan={self.plan}, "
            f"device={str(self.device)!r})"
        )

    # What it is

    @property
    def dim(self) -> int:
        """Width of a vector."""
        return self._quantizer.dim

    @property
    def plan(self) -> BitPlan:
        """The widths of the rotated coordinates."""
        return self._quantizer.plan

    @property
    def seed(self) -> int:
        """The seed of the rotation."""
        return self._quantizer.seed

    @property
    def device(self) -> torch.device:
        """Where the codes live."""
        return self._device

    @property
    def bytes_per_vector(self) -> int:
        """Bytes kept for each vector, ids apart (0, 1, 2, ... cost nothing; any others 8 bytes and a look-up table)."""
        dtype = file_format.bias_dtype(self.metric, trained=self._quantizer.centre is not None)
        return self._quantizer.bytes_per_vector + (0 if dtype is None else dtype.itemsize)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for all vectors and ids, counted from the storages."""
        with self._lock.read():
            return self._rows.nbytes + self._ids.nbytes

    def __len__(self) -> int:
        with self._lock.read():
            return len(self._rows)

    def __contains__(self, id: object) -> bool:
        if not isinstance(id, int | np.integer) or isinstance(id, bool) or not 0 <= id <= _LARGEST_ID:
            return False
        with self._lock.read():
            return bool(self._ids.rows(np.array([id], dtype=np.int64))[0] >= 0)

    @property
    def ids(self) -> npt.NDArray[np.int64]:
        """The ids in the index, ascending."""
        with self._lock.read():
            return np.sort(self._ids_of_rows().cpu().numpy())

    # Changes

    def train(self, sample: ArrayLike) -> None:
        """Learns the centre of the vectors to come, the mean of a sample; optional, and only while the index is empty.

        What is coded is then z = x - c. For l2 it costs no bytes a vector; for cosine and ip <c, z> is kept beside the
        code (2 or 4 bytes), so that only <q - c, z> is estimated: <q, x> = <q, c> + <c, z> + <q - c, z>. It helps where
        the mean is far from zero: pixels, descriptors such as SIFT, and most embeddings.

        Args:
            sample: (n, dim), as for `add`; a few thousand rows drawn at random from the vectors to come.

        Raises:
            InvalidInputError: no rows, bad rows, or the index holds vectors already; it is unchanged.
        """
        matrix = as_matrix(sample, self.dim, "sample", self._device)
        if not len(matrix):
            raise InvalidInputError(f"sample must have at least one row, got shape {tuple(sample.shape)}")
        if self.metric == "cosine":
            matrix = _unit(matrix)
        centre = matrix.double().mean(dim=0).float()
        if not torch.isfinite((centre * centre).sum()):
            raise InvalidInputError("sample must have a mean whose squared norm is finite in float32, got an overflow")
        with self._lock.write():
            old = self._quantizer
            if len(self._rows):
                raise InvalidInputError(f"train must come before add, got an index of {len(self._rows)} vectors")
            self._quantizer = _quantizer(
                self.dim, self.plan, self.metric, old.rotation.name, old.seed, old.backend, centre
            )

    @property
    def centre(self) -> npt.NDArray[np.float32] | None:
        """What is taken off every vector before it is coded, (dim,) float32; None unless trained."""
        return None if self._quantizer.centre is None else self._quantizer.centre.numpy().copy()

    def add(self, vectors: ArrayLike, ids: IdsLike | None = None) -> None:
        """Adds vectors. Adding in parts makes the same index, byte for byte, as adding at once.

        Args:
            vectors: (n, dim) numpy or torch, floating point or integer, any strides, finite.
            ids: (n,) integers >= 0, each new; None continues after the largest id there ever was, from 0.

        Raises:
            InvalidInputError: wrong shape or dtype, or a value that is not finite (the first such row is named).
            DuplicateIdError: an id is given twice or is in the index. In every case the index is unchanged.
        """
        matrix = as_matrix(vectors, self.dim, "vectors", self._device)
        given = None if ids is None else self._new_ids(ids, len(matrix))
        if not len(matrix):
            return
        quantizer = self._quantizer
        columns = self._encode(matrix)
        with self._lock.write():
            if self._quantizer is not quantizer:  # another thread has called `train` meanwhile
                columns = self._encode(matrix)
            if given is None:
                first = self._next_id
                if first + len(matrix) - 1 > _LARGEST_ID:
                    raise InvalidInputError("no ids are left after the largest; give ids explicitly")
                assigned = first + np.arange(len(matrix), dtype=np.int64)
            else:
                assigned = given
                taken = assigned[self._ids.rows(assigned) >= 0]
                if len(taken):
                    raise DuplicateIdError(f"ids must be new, got {taken[0]}, which is in the index")
            self._append(columns, assigned)

    def _new_ids(self, ids: IdsLike, count: int) -> Ids:
        array = as_ids(ids, "ids")
        if len(array) != count:
            raise InvalidInputError(f"ids must have one entry a vector, {count}, got {len(array)}")
        if count and array.min() < 0:
            raise InvalidInputError(f"ids must be at least 0, got {array.min()}; -1 stands for a missing result")
        values, counts = np.unique(array, return_counts=True)
        if len(values) != count:
            raise DuplicateIdError(f"ids must be distinct, got {values[counts > 1][0]} more than once")
        return array

    def _encode(self, matrix: Tensor) -> Columns:
        encoded = self._quantizer.encode_levels(matrix)
        squares = encoded.norms * encoded.norms if self.metric == "l2" else encoded.norms
        if not torch.isfinite(squares).all():
            row = int((~torch.isfinite(squares)).nonzero()[0])
            what = "squared norms" if self.metric == "l2" else "norms"
            raise InvalidInputError(
                f"vectors must have {what} that are finite in float32, got an overflow in row {row}"
            )
        columns = {"packed": encoded.packed, "scales": self._quantizer.unbiased_scales(encoded.norms, encoded.dots)}
        dtype = file_format.bias_dtype(self.metric, trained=self._quantizer.centre is not None)
        if dtype is not None:
            bias = -squares if self.metric == "l2" else encoded.centre_products
            if not torch.isfinite(bias).all():
                row = int((~torch.isfinite(bias)).nonzero()[0])
                raise InvalidInputError(
                    "vectors must have products with the centre that are finite in float32, got an overflow in row "
                    f"{row}"
                )
            columns["bias"] = bias.to(dtype)
        return columns

    def _append(self, columns: Columns, ids: Ids) -> None:
        start = len(self._rows)
        if self._plain_ids and int(ids[0]) == start and bool((np.diff(ids) == 1).all()):
            self._ids.extend_plain(len(ids))
        else:
            self._store_ids()
            columns["ids"] = torch.from_numpy(ids).to(self._device)
            self._ids.assign(ids, np.arange(start, start + len(ids)))
        self._rows.append(columns)
        self._next_id = max(self._next_id, int(ids.max()) + 1)

    def _store_ids(self) -> None:
        """Gives every row its id in a column, once ids are no longer the row numbers."""
        if self._plain_ids:
            self._rows.add_column("ids", torch.arange(len(self._rows), device=self._device))
            self._plain_ids = False

    def _ids_of_rows(self) -> Tensor:
        if self._plain_ids:
            return torch.arange(len(self._rows), device=self._device)
        parts = [columns["ids"] for _, columns in self._rows.runs()]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=self._device)

    def remove(self, ids: IdsLike) -> None:
        """Removes vectors; their space is filled from the end and reused.

        Args:
            ids: (m,) integers, distinct and in the index.

        Raises:
            UnknownIdError: an id is not in the index.
            DuplicateIdError: an id is given twice. In both cases the index is unchanged.
        """
        array = as_ids(ids, "ids")
        if len(np.unique(array)) != len(array):
            values, counts = np.unique(array, return_counts=True)
            raise DuplicateIdError(f"ids must be distinct, got {values[counts > 1][0]} more than once")
        with self._lock.write():
            rows = self._known_rows(array)
            if not len(array):
                return
            self._store_ids()
            moved, holes = self._rows.remove(torch.from_numpy(rows).to(self._device))
            self._ids.assign(array, np.full(len(array), -1))
            if len(moved):
                moved_ids = self._rows.gather(holes)["ids"].cpu().numpy()
                self._ids.assign(moved_ids, holes.cpu().numpy())

    def _known_rows(self, ids: Ids) -> Ids:
        rows = self._ids.rows(ids)
        if (rows < 0).any():
            unknown = ids[rows < 0]
            raise UnknownIdError(f"ids must be in the index, got {unknown[0]}, which is not ({len(unknown)} such ids)")
        return rows

    # Look-ups

    def reconstruct(self, ids: IdsLike) -> Tensor | npt.NDArray[np.float32]:
        """Approximate vectors of ids, with the least squared error the codes allow.

        Args:
            ids: (m,) integers in the index.

        Returns:
            (m, dim) float32: torch on the index's device for torch ids, else numpy. For metric "cosine" the vectors are
            those given divided by their norms, which are not kept.

        Raises:
            UnknownIdError: an id is not in the index.
        """
        array = as_ids(ids, "ids")
        with self._lock.read():
            rows = torch.from_numpy(self._known_rows(array)).to(self._device)
            columns = self._rows.gather(rows) if len(self._rows) else None
            quantizer = self._quantizer
        if columns is None:
            vectors = torch.empty((0, self.dim), device=self._device)
        else:
            vectors = quantizer.decode(Codes(columns["packed"], columns["scales"]))
        return vectors if isinstance(ids, Tensor) else vectors.cpu().numpy()

    def search(
        self, queries: ArrayLike, k: int = 10, *, allow: IdsLike | None = None, precision: str = "int8"
    ) -> tuple[ArrayLike, ArrayLike]:
        """The k nearest vectors of each query, by scores estimated from the codes.

        Args:
            queries: (q, dim) or (dim,), numpy or torch, as for `add`.
            k: how many, >= 1.
            allow: which vectors may be returned: integer ids (those not in the index allow nothing), or a bool mask
                indexed by id, whose length is one more than the largest id there ever was; None for all.
            precision: "int8" lets a GPU round queries and levels to int8, "exact" keeps them float32 and is slower; a
                CPU is exact in any case.

        Returns:
            scores: (q, k) or (k,) float32. "ip" and "cosine": estimates of the inner product or cosine, largest first;
                "l2": of the squared distance, smallest first (being unbiased it can be a little below 0). Where fewer
                than k
                vectors are allowed: -inf, for "l2" inf.
            ids: (q, k) or (k,) int64; -1 where missing.
            Both numpy for numpy queries, else torch on the queries' device.

        Raises:
            InvalidInputError: wrong shape or dtype, a value that is not finite, k < 1, or for "ip" and "l2" a query
                whose squared norm overflows float32.
        """
        if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
            raise InvalidInputError(f"k must be an integer of at least 1, got {k!r}")
        matrix = as_matrix(queries, self.dim, "queries", self._device, one=True)
        with self._lock.read():
            mask = None if allow is None else self._mask(allow)
            scores, ids = self._search(matrix, int(k), mask, precision)
        if queries.ndim == 1:
            scores, ids = scores[0], ids[0]
        return like(scores, queries), like(ids, queries)

    def _mask(self, allow: IdsLike) -> Tensor:
        """The allowed rows, (n,) bool on the index's device."""
        values = allow.detach().cpu().numpy() if isinstance(allow, Tensor) else np.asarray(allow)
        if values.dtype == np.bool_:
            if values.shape != (self._next_id,):
                raise InvalidInputError(
                    f"a bool mask must have one entry for each id up to the largest there ever was, shape "
                    f"({self._next_id},), got {values.shape}"
                )
            return torch.from_numpy(values.copy()).to(self._device)[self._ids_of_rows()]  # any strides, read-only
        rows = self._ids.rows(as_ids(values, "allow"))
        mask = torch.zeros(len(self._rows), dtype=torch.bool)
        mask[torch.from_numpy(rows[rows >= 0])] = True
        return mask.to(self._device)

    def _search(self, queries: Tensor, k: int, mask: Tensor | None, precision: str) -> tuple[Tensor, Tensor]:
        if self.metric == "cosine":
            queries = _unit(queries)
        constant = torch.zeros(1, device=self._device)
        if self._quantizer.centre is not None:  # what is scanned estimates products with x - centre
            centre = self._quantizer.centre.to(self._device)
            constant = (queries @ centre)[:, None]
            queries = queries - centre
        squares = (queries * queries).sum(dim=1, keepdim=True)
        if not torch.isfinite(squares).all():  # products would overflow, and infinities of both signs make NaN
            row = int((~torch.isfinite(squares)).nonzero()[0, 0])
            raise InvalidInputError(
                f"queries must have squared norms that are finite in float32, got an overflow in row {row}"
            )
        if self.metric == "l2":
            constant = -squares
        rotated = self._quantizer.rotation.apply(2.0 * queries if self.metric == "l2" else queries).contiguous()
        scores = torch.full((len(queries), k), -math.inf, device=self._device)
        ids = torch.full((len(queries), k), -1, dtype=torch.int64, device=self._device)
        for start, columns in self._rows.runs():
            allowed = None if mask is None else mask[start : start + len(columns["packed"])]
            for rows, part, part_mask in _parts(columns, allowed):
                found, places = kernels.scan(
                    rotated,
                    part["packed"],
                    part["scales"],
                    part.get("bias"),
                    part_mask,
                    self._quantizer.tables(self._device),
                    k,
                    precision=precision,
                    backend=self._quantizer.backend,
                )
                local = places if rows is None else rows[places]
                named = columns["ids"][local] if "ids" in columns else local + start
                scores, ids = merge_top_k(scores, ids, found, named.masked_fill(places < 0, -1), k)
        scores += constant
        return (-scores if self.metric == "l2" else scores), ids

    # Elsewhere

    def to(self, device: str | torch.device) -> TurboQuantIndex:
        """Moves the index to a device, in place, and returns it."""
        target = torch.device(device)
        kernels.select(self._quantizer.backend, target)
        with self._lock.write():
            self._rows = self._rows.to(target)
            self._device = target
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the index to a file, whole or not at all; see `tqsearch.format` for what is in it."""
        with self._lock.read():
            header = file_format.Header(
                dim=self.dim,
                metric=self.metric,
                plan=self.plan.pairs(),
                rotation=self._quantizer.rotation.name,
                seed=self.seed,
                count=len(self._rows),
                next_id=self._next_id,
            )
            segments = [columns for _, columns in self._rows.runs()]
            if torch.equal(self._ids_of_rows(), torch.arange(len(self._rows), device=self._device)):
                for columns in segments:
                    columns.pop("ids", None)  # of the views, not of the index
            file_format.write(path, header, segments, self._quantizer.centre)

    @classmethod
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
        kernels.select(backend, torch.device("cpu" if device is None else device))
        header, columns, centre = file_format.read(path)
        try:
            plan = BitPlan.from_pairs(header.plan)
            metric: Metric = header.metric  # type: ignore[assignment]  # checked by the constructor
            index = cls(header.dim, plan, metric, device, header.seed, rotation=header.rotation, backend=backend)
        except InvalidInputError as error:
            raise CorruptFileError(f"{path} is not consistent: its header asks for what cannot be ({error})") from error
        if centre is not None:
            index._quantizer = _quantizer(
                header.dim, plan, metric, header.rotation, header.seed, backend, centre.clone()
            )
        index._next_id = header.next_id
        if "ids" in columns:
            index._plain_ids = False
            index._ids = IdMap.of(columns["ids"].numpy())
        else:
            index._ids = IdMap(header.count)
        if header.count:
            index._rows.append(columns)
        if index._device.type != "cpu":
            index._rows = index._rows.to(index._device)
        return index


def _quantizer(
    dim: int,
    bits: float | BitPlan,
    metric: Metric,
    rotation: str,
    seed: int,
    backend: str,
    centre: Tensor | None,
) -> TurboQuantizer:
    """The codec of an index."""
    return TurboQuantizer(
        dim,
        bits,
        rotation=rotation,
        seed=seed,
        centre=centre,
        unit=metric == "cosine",
        backend=backend,
    )


def _unit(vectors: Tensor) -> Tensor:
    """Rows divided by their norms; zero rows stay zero."""
    largest = vectors.abs().amax(dim=1, keepdim=True) if vectors.shape[0] else vectors[:, :1]
    vectors = vectors / torch.where(largest > 0, largest, 1.0)  # so that squares neither overflow nor vanish
    norms = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    return vectors / torch.where(norms > 0, norms, 1.0)


def _parts(columns: Columns, mask: Tensor | None) -> Iterator[tuple[Tensor | None, Columns, Tensor | None]]:
    """What to scan of a segment: all of it under its mask or, where the mask allows few rows, those rows in blocks.

    Yields:
        Row numbers of the columns' rows (None: all in order), the columns, and their mask.
    """
    rows = None if mask is None else mask.nonzero().flatten()
    if mask is None or rows is None or len(rows) * _GATHER_SHARE >= len(mask):
        yield None, columns, mask
        return
    for block in torch.split(rows, _GATHER_BLOCK):
        if len(block):
            yield block, {name: column[block] for name, column in columns.items()}, None
