"""Rows of named columns that grow without copying everything again and again, and shrink by filling holes from the end.

Rows live in a list of segments. An append makes a segment of exactly its size, so no capacity is held in reserve, and
small segments are merged as they gather, each row being copied O(log n) times, until a segment is large enough to stay.
A removal moves rows from the end into the holes; what it frees at the end is reused by the next append, and given back
once a segment is less than half full.

A change that is to be made whole or not at all is made on a `copy`, which shares the tensors. Of these an append writes
only what no copy uses; what a removal writes over, `values_at` keeps and `put_back` restores.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Columns = dict[str, Tensor]
Writes = list[tuple[Tensor, Tensor, Tensor]]  # a column, the places in it, and their values

MERGE_BYTES = 256 << 20  # segments are merged up to this size
MOVED_BYTES = 32 << 20  # rows move so many at a time


@dataclass
class Segment:
    """A run of rows: columns of one length, of which the first `size` rows are in use."""

    columns: Columns
    size: int

    @property
    def capacity(self) -> int:
        """Rows allocated."""
        return len(next(iter(self.columns.values())))

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(column.numel() * column.element_size() for column in self.columns.values())

    def used(self) -> Columns:
        """Views of the rows in use."""
        return {name: column[: self.size] for name, column in self.columns.items()}


class SegmentedRows:
    """Rows 0 .. n - 1 of named columns, all on one device."""

    def __init__(self) -> None:
        self.segments: list[Segment] = []

    def __len__(self) -> int:
        return sum(segment.size for segment in self.segments)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for all columns."""
        return sum(segment.nbytes for segment in self.segments)

    def runs(self) -> Iterator[tuple[int, Columns]]:
        """Each segment's first row number and the views of its rows."""
        start = 0
        for segment in self.segments:
            yield start, segment.used()
            start += segment.size

    def copy(self) -> SegmentedRows:
        """The same rows in the same tensors; a change of the one is not seen by the other, but for `move`."""
        copied = SegmentedRows()
        copied.segments = [Segment(dict(segment.columns), segment.size) for segment in self.segments]
        return copied

    def append(self, columns: Columns) -> None:
        """Adds rows at the end; the columns' memory is taken over, not copied, unless it fills freed space."""
        count = len(next(iter(columns.values())))
        if self.segments and (free := min(self.segments[-1].capacity - self.segments[-1].size, count)):
            last = self.segments[-1]
            for name, column in columns.items():
                last.columns[name][last.size : last.size + free] = column[:free]
            last.size += free
            columns = {name: column[free:].clone() for name, column in columns.items()}
            count -= free
        if count:
            self.segments.append(Segment({name: column.contiguous() for name, column in columns.items()}, count))
            self._merge()

    def _merge(self) -> None:
        """Merges the last segments while the last is at least half its neighbour's size and they are small enough."""
        first = len(self.segments) - 1
        size, nbytes = self.segments[first].size, self.segments[first].nbytes
        while first:
            left = self.segments[first - 1]
            if 2 * size < left.size or left.nbytes + nbytes > MERGE_BYTES:
                break
            first, size, nbytes = first - 1, left.size + size, left.nbytes + nbytes
        if first < len(self.segments) - 1:
            parts = [segment.used() for segment in self.segments[first:]]
            self.segments[first:] = [
                Segment({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, size)
            ]

    def add_column(self, name: str, values: Tensor) -> None:
        """Adds a column; `values` has a row for each row there is."""
        for start, segment in zip([start for start, _ in self.runs()], self.segments, strict=True):
            column = values.new_zeros((segment.capacity, *values.shape[1:]))
            column[: segment.size] = values[start : start + segment.size]
            segment.columns[name] = column

    def _inside(self, rows: Tensor) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        """Where rows lie: each segment's columns with their names, places in them, and which of `rows` lie there."""
        for start, columns in self.runs():
            size = len(next(iter(columns.values())))
            which = ((rows >= start) & (rows < start + size)).nonzero().flatten()
            places = rows[which] - start
            for name, column in columns.items():
                yield name, column, places, which

    def gather(self, rows: Tensor) -> Columns:
        """The rows of those numbers, (m,) int64 on the columns' device, in their order."""
        result: Columns = {}
        for name, column, places, which in self._inside(rows):
            if name not in result:
                result[name] = column.new_empty((len(rows), *column.shape[1:]))
            result[name][which] = column[places]
        return result

    def moves(self, removed: Tensor) -> tuple[Tensor, Tensor]:
        """How the places of removed rows are filled from the end.

        Args:
            removed: (m,) int64, distinct row numbers, on the columns' device.

        Returns:
            Old and new numbers of the rows that move, both int64; the new ones are places of removed rows.
        """
        left = len(self) - len(removed)
        at_end = torch.ones(len(removed), dtype=torch.bool, device=removed.device)
        at_end[removed[removed >= left] - left] = False
        return at_end.nonzero().flatten() + left, removed[removed < left]

    def values_at(self, rows: Tensor) -> Writes:
        """The values of rows, as `put_back` takes them."""
        return [(column, places, column[places]) for _, column, places, _ in self._inside(rows)]

    def move(self, old: Tensor, new: Tensor, left: int) -> None:
        """Moves rows as `moves` says, and drops those from number `left` on. Copies see the moved values too."""
        source = self.copy()
        self._truncate(left)
        size = max(1, MOVED_BYTES // max(1, source.nbytes // max(1, len(source))))
        for some, holes in zip(torch.split(old, size), torch.split(new, size), strict=True):
            values = source.gather(some)
            put_back([(column, places, values[name][which]) for name, column, places, which in self._inside(holes)])

    def _truncate(self, count: int) -> None:
        while self.segments and len(self) - self.segments[-1].size >= count:
            self.segments.pop()
        if not self.segments:
            return
        last = self.segments[-1]
        last.size -= len(self) - count
        if 2 * last.size < last.capacity:
            last.columns = {name: column.clone() for name, column in last.used().items()}

    def to(self, device: torch.device) -> SegmentedRows:
        """The same rows on another device, a segment at a time."""
        moved = SegmentedRows()
        for segment in self.segments:
            columns = {name: column.to(device) for name, column in segment.columns.items()}
            moved.segments.append(Segment(columns, segment.size))
        return moved


def put_back(writes: Writes) -> None:
    """Sets values. Takes no memory, so that it cannot fail for want of it."""
    for column, places, values in writes:
        column.index_copy_(0, places, values)
