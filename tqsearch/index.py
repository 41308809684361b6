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
from tqsearch.arrays import ArrayLike, IdsLike, as_ids, as_matrix, as_rows, like
from tqsearch.blocks import encode_blocks
from tqsearch.codec import Codec
from tqsearch.errors import CorruptFileError, DuplicateIdError, InvalidInputError, UnknownIdError
from tqsearch.estimator import Estimator
from tqsearch.ids import IdMap, Ids
from tqsearch.kernels.reference import merge_top_k
from tqsearch.locks import ReadWriteLock
from tqsearch.plan import BitPlan
from tqsearch.quantizer import Codes, TurboQuantizer
from tqsearch.segments import Columns, SegmentedRows
from tqsearch.splitmix import permutation
from tqsearch.training.basis import Basis
from tqsearch.training.choice import chosen
from tqsearch.training.learn import centre_of

Metric = Literal["ip", "cosine", "l2"]
METRICS = ("ip", "cosine", "l2")

AUTO_ROWS = 4096  # the first add of at least so many rows trains an index of train="auto"
_AUTO_SAMPLE = 1 << 16  # rows it draws
_SAMPLE_STREAM = 64  # of the seed's generator
_GATHER_SHARE = 8  # a filter that allows less than one row in this many is scanned by gathering those rows
_GATHER_BLOCK = 1 << 16
_LARGEST_ID = np.iinfo(np.int64).max


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
        if metric not in METRICS:
            raise InvalidInputError(f"metric must be one of {', '.join(map(repr, METRICS))}, got {metric!r}")
        if train not in ("off", "auto"):
            raise InvalidInputError(f"train must be 'off' or 'auto', got {train!r}")
        self._auto = train == "auto"
        self.metric: Metric = metric
        self._untrained = _estimator(dim, bits, metric, rotation, seed, backend, codec)
        self._estimator = self._untrained
        self._device = torch.device("cpu" if device is None else device)
        kernels.select(backend, self._device)
        self._rows = SegmentedRows()
        self._ids = IdMap()
        self._plain_ids = True  # row i has id i: no id is stored
        self._next_id = 0
        self._lock = ReadWriteLock()

    def __repr__(self) -> str:
        codec = "" if self.codec == "scalar" else f"codec={self.codec!r}, "
        return (
            f"TurboQuantIndex({len(self)} vectors, dim={self.dim}, metric={self.metric!r}, plan={self.plan}, {codec}"
            f"device={str(self.device)!r})"
        )

    # What it is

    @property
    def _quantizer(self) -> TurboQuantizer:
        return self._estimator.quantizer

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
        return self._device

    @property
    def bytes_per_vector(self) -> int:
        """Bytes kept for each vector, ids apart (0, 1, 2, ... cost nothing; any others 8 bytes and a look-up table)."""
        return self._estimator.bytes_per_vector

    @property
    def nbytes(self) -> int:
        """Bytes allocated for all vectors and ids, counted from the storages, and once for learnt axes."""
        with self._lock.read():
            basis = self._quantizer.basis
            return self._rows.nbytes + self._ids.nbytes + (0 if basis is None else basis.nbytes)

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

    def train(
        self, sample: ArrayLike, queries: ArrayLike | None = None, *, learn: Literal["axes", "centre"] = "axes"
    ) -> None:
        """Learns from a sample how to code the vectors to come; optional, and only while the index is empty.

        What is coded is then z = x - c, c the sample's mean, in the sample's principal axes, with more bits for the
        axes that matter more to scores: see `tqsearch.training`. A vector costs not more bytes than untrained. The axes
        are kept once, 4 bytes a number, at most dim^2 numbers. Half the sample is held out first: where axes would
        estimate its scores worse than the centre alone, or with fewer than 64 rows, only the centre is learnt.

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
        matrix = self._sample(sample, "sample")
        asked = None if queries is None else self._sample(queries, "queries")
        trained = self._learnt(matrix, asked, axes=learn == "axes")
        with self._lock.write():
            if len(self._rows):
                raise InvalidInputError(f"train must come before add, got an index of {len(self._rows)} vectors")
            self._estimator = trained

    def _sample(self, rows: ArrayLike, name: str) -> Tensor:
        matrix = as_matrix(rows, self.dim, name, self._device)
        if not len(matrix):
            raise InvalidInputError(f"{name} must have at least one row, got shape {tuple(rows.shape)}")
        return _unit(matrix) if self.metric == "cosine" else matrix

    def _learnt(self, sample: Tensor, queries: Tensor | None, *, axes: bool) -> Estimator:
        """The estimator that a checked sample teaches."""
        centre = centre_of(sample)
        if not torch.isfinite((centre * centre).sum()):
            raise InvalidInputError("sample must have a mean whose squared norm is finite in float32, got an overflow")
        if axes:
            return chosen(sample, queries, self._untrained, self._made)
        return self._made(centre, None, True)

    def _made(self, centre: Tensor, basis: Basis | None, keeps_product: bool) -> Estimator:
        """An estimator like the untrained one, of a centre and a basis."""
        old = self._untrained.quantizer
        return _estimator(
            self.dim,
            old.plan,
            self.metric,
            old.rotation.name,
            old.seed,
            old.backend,
            old.codec,
            centre,
            basis,
            keeps_product,
        )

    def _train_on_first(self, vectors: Tensor) -> None:
        """What train="auto" does with the rows of an add, unless the index is trained or holds vectors."""
        if len(vectors) < AUTO_ROWS or self._estimator is not self._untrained or len(self):
            return
        rows = np.sort(permutation(self.seed, _SAMPLE_STREAM, len(vectors))[:_AUTO_SAMPLE])
        sample = self._sample(vectors[torch.from_numpy(rows).to(vectors.device)], "vectors")
        trained = self._learnt(sample, None, axes=True)
        with self._lock.write():
            if not len(self._rows) and self._estimator is self._untrained:
                self._estimator = trained

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

    def add(self, vectors: ArrayLike, ids: IdsLike | None = None) -> None:
        """Adds vectors. Adding in parts makes the same index, byte for byte, as adding at once, unless train="auto".

        Args:
            vectors: (n, dim) numpy or torch, floating point or integer, any strides, finite.
            ids: (n,) integers >= 0, each new; None continues after the largest id there ever was, from 0.

        Raises:
            InvalidInputError: wrong shape or dtype, or a value that is not finite (the first such row is named).
            DuplicateIdError: an id is given twice or is in the index. In every case the index is unchanged.
        """
        rows = as_rows(vectors, self.dim, "vectors")
        given = None if ids is None else self._new_ids(ids, len(rows))
        if not len(rows):
            return
        if self._auto:
            self._train_on_first(rows)
        quantizer = self._quantizer
        columns = self._encode(rows)
        with self._lock.write():
            if self._quantizer is not quantizer:  # another thread has called `train` meanwhile
                columns = self._encode(rows)
            if given is None:
                first = self._next_id
                if first + len(rows) - 1 > _LARGEST_ID:
                    raise InvalidInputError("no ids are left after the largest; give ids explicitly")
                assigned = first + np.arange(len(rows), dtype=np.int64)
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

    def _encode(self, rows: Tensor) -> Columns:
        return encode_blocks(rows, self._device, self._estimator.encode, slow=self.codec == "trellis")

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
        scanned = self._estimator.scanned(queries)
        scores = torch.full((len(queries), k), -math.inf, device=self._device)
        ids = torch.full((len(queries), k), -1, dtype=torch.int64, device=self._device)
        for start, columns in self._rows.runs():
            allowed = None if mask is None else mask[start : start + len(columns["packed"])]
            for rows, part, part_mask in _parts(columns, allowed):
                found, places = kernels.scan(
                    scanned.queries,
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
        scores = scores.mul_(scanned.unit).add_(scanned.constant)
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
                plan=self._untrained.quantizer.plan.pairs(),
                rotation=self._quantizer.rotation.name,
                seed=self.seed,
                count=len(self._rows),
                next_id=self._next_id,
                learnt_plan=None if self._quantizer.basis is None else self.plan.pairs(),
                keeps_product=None if self._quantizer.basis is None else self._estimator.keeps_product,
                codec=None if self.codec == "scalar" else self.codec,
            )
            segments = [columns for _, columns in self._rows.runs()]
            if torch.equal(self._ids_of_rows(), torch.arange(len(self._rows), device=self._device)):
                for columns in segments:
                    columns.pop("ids", None)  # of the views, not of the index
            basis, constants = self._quantizer.basis, {}
            if self._quantizer.centre is not None:
                constants["centre"] = self._quantizer.centre
            if basis is not None:
                constants.update(axes=basis.axes, deviations=basis.deviations)
            file_format.write(path, header, segments, constants)

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
        header, columns, constants = file_format.read(path)
        try:
            plan = BitPlan.from_pairs(header.plan)
            metric: Metric = header.metric  # type: ignore[assignment]  # checked by the constructor
            codec: Codec = header.codec or "scalar"  # type: ignore[assignment]  # likewise
            index = cls(
                header.dim, plan, metric, device, header.seed, rotation=header.rotation, codec=codec, backend=backend
            )
            if constants:
                basis = None
                if header.learnt_plan is not None:
                    learnt_plan = BitPlan.from_pairs(header.learnt_plan)
                    basis = Basis(learnt_plan, constants["axes"].clone(), constants["deviations"].clone(), codec)
                index._estimator = index._made(constants["centre"].clone(), basis, header.keeps_product is not False)
        except InvalidInputError as error:
            raise CorruptFileError(f"{path} is not consistent: its header asks for what cannot be ({error})") from error
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


def _estimator(
    dim: int,
    bits: float | BitPlan,
    metric: Metric,
    rotation: str,
    seed: int,
    backend: str,
    codec: Codec,
    centre: Tensor | None = None,
    basis: Basis | None = None,
    keeps_product: bool = False,
) -> Estimator:
    """The codec of an index and what it keeps; without a basis a centre's product is always kept."""
    quantizer = TurboQuantizer(
        dim,
        bits,
        rotation=rotation,
        seed=seed,
        centre=centre,
        unit=metric == "cosine",
        basis=basis,
        codec=codec,
        backend=backend,
    )
    return Estimator(metric, quantizer, keeps_product=keeps_product)


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
