"""What is in an index: the columns of its vectors, the id of each, and the id that comes next.

Every change is made whole or not at all. What it needs is made beside what there is; then the ids' map is changed, and
one assignment replaces the rest. Where memory runs out or the user interrupts on the way, the contents are as before.

On a GPU a change begins when the device has done all its work, as searches that have returned may still run on streams
of their own, and it is taken over when its own work is done: a search on any stream then reads finished columns.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tqsearch.arrays import IdsLike, as_ids, as_numpy
from tqsearch.errors import DuplicateIdError, InvalidInputError, UnknownIdError
from tqsearch.ids import IdMap, Ids
from tqsearch.segments import Columns, SegmentedRows, put_back

LARGEST_ID = np.iinfo(np.int64).max


class Contents:
    """The vectors of an index, on one device. Not safe for several threads: the index holds a lock.

    Ids that are 0, 1, 2, ... in the order of the rows are not stored. Once others have come, a column "ids" has them.

    Attributes:
        rows: the columns.
        next_id: one more than the largest id there ever was.
        device: where the columns lie.
    """

    def __init__(self, device: torch.device) -> None:
        self.rows = SegmentedRows()
        self.next_id = 0
        self.device = device
        self._map = IdMap()
        self._plain = True  # row i has id i: no id is stored

    @classmethod
    def of(cls, columns: Columns, count: int, next_id: int, device: torch.device) -> Contents:
        """Contents of `count` rows whose columns lie on the CPU and, if there are "ids" among them, have those ids."""
        contents = cls(device)
        contents.next_id = next_id
        contents._plain = "ids" not in columns
        contents._map = IdMap(count) if contents._plain else IdMap.of(columns["ids"].numpy())
        if count:
            contents.rows.append(columns)
        if device.type != "cpu":
            contents.rows = contents.rows.to(device)
            contents._finish()
        return contents

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for columns and ids."""
        return self.rows.nbytes + self._map.nbytes

    @property
    def ids(self) -> Tensor:
        """The id of each row, (n,) int64 on the device."""
        return _ids_of(self.rows, self._plain, self.device)

    @property
    def in_order(self) -> bool:
        """Whether the ids are 0, 1, 2, ... in the order of the rows, stored or not."""
        return self._plain or torch.equal(self.ids, torch.arange(len(self), device=self.device))

    def rows_of(self, ids: Ids) -> Ids:
        """The row of each id, -1 where there is none."""
        return self._map.rows(ids)

    def known_rows(self, ids: Ids) -> Ids:
        """The row of each id.

        Raises:
            UnknownIdError: an id is not there.
        """
        rows = self._map.rows(ids)
        if (rows < 0).any():
            unknown = ids[rows < 0]
            raise UnknownIdError(f"ids must be in the index, got {unknown[0]}, which is not ({len(unknown)} such ids)")
        return rows

    def mask(self, allow: IdsLike) -> Tensor:
        """The rows that a filter allows, (n,) bool on the device; see `TurboQuantIndex.search`.

        Raises:
            InvalidInputError: neither ids nor a bool mask of the right length.
        """
        values = as_numpy(allow, "allow")
        if values.dtype == np.bool_:
            if values.shape != (self.next_id,):
                raise InvalidInputError(
                    f"a bool mask must have one entry for each id up to the largest there ever was, shape "
                    f"({self.next_id},), got {values.shape}"
                )
            return torch.from_numpy(values.copy()).to(self.device)[self.ids]  # any strides, read-only
        rows = self._map.rows(as_ids(values, "allow"))
        mask = torch.zeros(len(self), dtype=torch.bool, device="cpu")
        mask[torch.from_numpy(rows[rows >= 0])] = True
        return mask.to(self.device)

    def append(self, columns: Columns, ids: Ids | None) -> None:
        """Adds rows.

        Args:
            columns: on the device, of the rows' names but "ids"; their memory is taken over.
            ids: (m,) as `new_ids` gives them; None for the ids after the largest there ever was.

        Raises:
            DuplicateIdError: an id is there already.
            InvalidInputError: no ids are left after the largest.
        """
        start, count = len(self), len(columns["packed"])
        if ids is None:
            if self.next_id + count - 1 > LARGEST_ID:
                raise InvalidInputError("no ids are left after the largest; give ids explicitly")
            ids = self.next_id + np.arange(count, dtype=np.int64)
        elif len(taken := ids[self._map.rows(ids) >= 0]):
            raise DuplicateIdError(f"ids must be new, got {taken[0]}, which is in the index")
        next_id = max(self.next_id, int(ids.max()) + 1)
        self._finish()
        rows = self.rows.copy()
        if self._plain and int(ids[0]) == start and bool((np.diff(ids) == 1).all()):
            rows.append(columns)
            self._finish()
            self.rows, self._map, self.next_id = rows, IdMap(start + count), next_id
            return
        if self._plain:
            rows.add_column("ids", self.ids)
        rows.append({**columns, "ids": torch.from_numpy(ids).to(self.device)})
        self._replace(rows, next_id, ids, np.arange(start, start + count))

    def remove(self, ids: Ids) -> None:
        """Removes rows by their distinct ids and fills their places from the end.

        Raises:
            UnknownIdError: an id is not there.
        """
        removed = torch.from_numpy(self.known_rows(ids)).to(self.device)
        self._finish()
        rows = self.rows.copy()
        if self._plain:
            rows.add_column("ids", self.ids)
        moved, holes = rows.moves(removed)
        changed = np.concatenate([ids, rows.gather(moved)["ids"].cpu().numpy()])
        places = np.concatenate([np.full(len(ids), -1), holes.cpu().numpy()])
        overwritten = rows.values_at(holes)
        try:
            rows.move(moved, holes, len(self) - len(ids))
            self._replace(rows, self.next_id, changed, places)
        except BaseException:  # an interrupt, or no memory
            if self.rows is not rows:
                put_back(overwritten)
            raise

    def to(self, device: torch.device) -> Contents:
        """The same on another device."""
        self._finish()
        moved = Contents(device)
        moved.rows, moved.next_id = self.rows.to(device), self.next_id
        moved._map, moved._plain = self._map, self._plain
        moved._finish()
        return moved

    def _finish(self) -> None:
        """Waits until a GPU has done its work, on every stream."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _replace(self, rows: SegmentedRows, next_id: int, ids: Ids, places: Ids) -> None:
        """Takes over rows with a column of ids, of which these have new places (-1: none)."""
        before = self._map.rows(ids)
        try:
            self._finish()
            self._map.assign(ids, places)
            self.rows, self._plain, self.next_id = rows, False, next_id
        except BaseException:
            if self.rows is not rows:
                self._map.assign(ids, before)
            raise


def new_ids(values: IdsLike, count: int) -> Ids:
    """Ids for `count` new vectors, (count,) int64, checked but for what an index holds already.

    Raises:
        InvalidInputError: not integers, not one for each vector, or one below 0.
        DuplicateIdError: an id is given twice.
    """
    ids = as_ids(values, "ids")
    if len(ids) != count:
        raise InvalidInputError(f"ids must have one entry a vector, {count}, got {len(ids)}")
    if count and ids.min() < 0:
        raise InvalidInputError(f"ids must be at least 0, got {ids.min()}; -1 stands for a missing result")
    check_distinct(ids)
    return ids


def check_distinct(ids: Ids) -> None:
    """Refuses ids of which one is given twice."""
    values, counts = np.unique(ids, return_counts=True)
    if len(values) != len(ids):
        raise DuplicateIdError(f"ids must be distinct, got {values[counts > 1][0]} more than once")


def _ids_of(rows: SegmentedRows, plain: bool, device: torch.device) -> Tensor:
    if plain:
        return torch.arange(len(rows), device=device)
    parts = [columns["ids"] for _, columns in rows.runs()]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=device)
