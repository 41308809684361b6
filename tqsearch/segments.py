"""Rows of named columns that grow without copying everything again and again, and shrink by filling holes from the end.

Rows live in a list of segments. An append makes a segment of exactly its size, so no capacity is held in reserve, and
small segments are merged as they gather, each row being copied O(log n) times, until a segment is large enough to stay.
A removal moves rows from the end into the holes; what it frees at the end is reused by the next append, and given back
once a segment is less than half full.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Columns = dict[str, Tensor]

MERGE_BYTES = 256 << 20  # segments are merged up to this size


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
        while len(self.segments) > 1:
            left, right = self.segments[-2:]
            if 2 * right.size < left.size or left.nbytes + right.nbytes > MERGE_BYTES:
                return
            a, b = left.used(), right.used()
            merged = {name: torch.cat([a[name], b[name]]) for name in a}
            self.segments[-2:] = [Segment(merged, left.size + right.size)]

    def add_column(self, name: str, values: Tensor) -> None:
        """Adds a column; `values` has a row for each row there is."""
        for start, segment in zip([start for start, _ in self.runs()], self.segments, strict=True):
            column = values.new_zeros((segment.capacity, *values.shape[1:]))
            column[: segment.size] = values[start : start + segment.size]
            segment.columns[name] = column

    def gather(self, rows: Tensor) -> Columns:
        """The rows of those numbers, (m,) int64 on the columns' device, in their order."""
        result: Columns = {}
        for start, columns in self.runs():
            size = len(next(iter(columns.values())))
            inside = ((rows >= start) & (rows < start + size)).nonzero().flatten()
            for name, column in columns.items():
                if name not in result:
                    result[name] = column.new_empty((len(rows), *column.shape[1:]))
                result[name][inside] = column[rows[inside] - start]
        return result

    def remove(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Removes rows and fills their places from the end.

        Args:
            rows: (m,) int64, distinct row numbers, on the columns' device.

        Returns:
            Old and new numbers of the rows that moved, both int64.
        """
        left = len(self) - len(rows)
        holes = rows[rows < left]
        at_end = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        at_end[rows[rows >= left] - left] = False
        moved = at_end.nonzero().flatten() + left
        if len(moved):
            self._scatter(holes, self.gather(moved))
        self._truncate(left)
        return moved, holes

    def _scatter(self, rows: Tensor, values: Columns) -> None:
        for start, columns in self.runs():
            size = len(next(iter(columns.values())))
            inside = ((rows >= start) & (rows < start + size)).nonzero().flatten()
            for name, column in columns.items():
                column[rows[inside] - start] = values[name][inside]

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
