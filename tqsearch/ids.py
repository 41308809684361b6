"""Which row an id lies in.

Ids that are simply 0, 1, 2, ... in the order of the rows cost nothing: row i has id i. Anything else is a sorted array
with a row for each id, and a small dictionary of the changes since it was sorted; once the changes are many, they are
sorted in. So a single change costs a dictionary entry, and a batch of look-ups one binary search.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]


class IdMap:
    """A map from ids (int64, >= 0) to row numbers; -1 stands for "not there"."""

    def __init__(self, count: int = 0) -> None:
        self._plain = count  # ids 0 .. count - 1 lie in the rows of their number, unless `_changes` says otherwise
        self._sorted: tuple[Ids, Ids] | None = None  # ids ascending and their rows; replaces `_plain`
        self._changes: dict[int, int] = {}

    @classmethod
    def of(cls, ids: Ids) -> IdMap:
        """The map of rows whose ids are given in the order of the rows."""
        result = cls()
        result.assign(ids, np.arange(len(ids)))
        return result

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays, and about a hundred for each change."""
        arrays = sum(part.nbytes for part in self._sorted) if self._sorted else 0
        return arrays + 100 * len(self._changes)

    def rows(self, ids: Ids) -> Ids:
        """The row of each id, -1 where there is none."""
        if self._sorted is None:
            rows = np.where((ids >= 0) & (ids < self._plain), ids, -1)
        else:
            keys, values = self._sorted
            places = np.minimum(np.searchsorted(keys, ids), max(len(keys) - 1, 0))
            rows = np.where(keys[places] == ids, values[places], -1) if len(keys) else np.full(ids.shape, -1)
        if self._changes:
            for place, key in enumerate(ids.tolist()):
                rows[place] = self._changes.get(key, rows[place])
        return rows.astype(np.int64, copy=False)

    def assign(self, ids: Ids, rows: Ids) -> None:
        """Sets the rows of distinct ids; row -1 takes the id out."""
        size = self._plain if self._sorted is None else len(self._sorted[0])
        if len(ids) + len(self._changes) <= min(max(1024, size // 4), 1 << 20):
            self._changes.update(zip(ids.tolist(), rows.tolist(), strict=True))
            return
        old = np.arange(self._plain) if self._sorted is None else self._sorted[0]
        every = np.unique(np.concatenate([old, np.fromiter(self._changes, np.int64, len(self._changes)), ids]))
        places = self.rows(every)
        places[np.searchsorted(every, ids)] = rows
        kept = places >= 0
        self._sorted, self._changes, self._plain = (every[kept], places[kept]), {}, 0
