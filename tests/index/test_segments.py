"""Rows in segments beside a python list; and how often a row is copied."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch.overrides import TorchFunctionMode

from tqsearch import segments
from tqsearch.segments import Columns, SegmentedRows


def columns(values: list[int], *, tagged: bool = False) -> Columns:
    """Two columns of different widths and dtypes that both say the value; a third if tagged."""
    numbers = torch.tensor(values, dtype=torch.int64)
    made = {"wide": torch.stack([numbers, -numbers, 2 * numbers], dim=1), "narrow": numbers.to(torch.float32)}
    return {**made, "tag": numbers % 251} if tagged else made


def values_of(found: Columns) -> list[int]:
    numbers = found["narrow"].long()
    assert torch.equal(found["wide"], torch.stack([numbers, -numbers, 2 * numbers], dim=1))
    assert torch.equal(found["tag"], numbers % 251) if "tag" in found else True
    return [int(value) for value in numbers]


class RowsBesideAList(RuleBasedStateMachine):
    @initialize(merge_bytes=st.sampled_from([0, 500, segments.MERGE_BYTES]))
    def start(self, merge_bytes: int) -> None:
        self.before, segments.MERGE_BYTES = segments.MERGE_BYTES, merge_bytes
        self.rows, self.model, self.tagged, self.next = SegmentedRows(), [], False, 0  # type: ignore[var-annotated]

    def teardown(self) -> None:
        segments.MERGE_BYTES = self.before

    @rule(count=st.integers(1, 40))
    def append(self, count: int) -> None:
        new = list(range(self.next, self.next + count))
        self.rows.append(columns(new, tagged=self.tagged))
        self.model += new
        self.next += count

    @precondition(lambda self: not self.tagged)
    @rule()
    def add_column(self) -> None:
        self.rows.add_column("tag", torch.tensor([value % 251 for value in self.model], dtype=torch.int64))
        self.tagged = True

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        removed = data.draw(st.lists(st.integers(0, len(self.model) - 1), unique=True, max_size=len(self.model)))
        moves = self.rows.moves(torch.tensor(removed, dtype=torch.int64))
        old, new = (part.tolist() for part in moves)
        left = len(self.model) - len(removed)
        self.rows.move(*moves, left)
        # What moves: the rows past the new end that stay, into the holes before it.
        assert sorted(old) == [row for row in range(left, len(self.model)) if row not in removed]
        assert sorted(new) == sorted(row for row in removed if row < left)
        assert len(old) == len(new)
        for source, target in zip(old, new, strict=True):
            self.model[target] = self.model[source]
        del self.model[left:]

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def gather(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.integers(0, len(self.model) - 1), max_size=30))
        found = self.rows.gather(torch.tensor(chosen, dtype=torch.int64))
        assert values_of(found) == [self.model[row] for row in chosen]
        found["narrow"].fill_(-1)  # a copy: the rows do not change

    @rule()
    def to_the_same_device(self) -> None:
        self.rows = self.rows.to(torch.device("cpu"))

    @invariant()
    def equal(self) -> None:
        assert len(self.rows) == len(self.model)
        found: list[int] = []
        for start, run in self.rows.runs():
            assert start == len(found)
            found += values_of(run)
            assert values_of(run), "an empty segment"
        assert found == self.model

    @invariant()
    def compact(self) -> None:
        """Only the last segment has free space, and never more than it uses."""
        *full, last = self.rows.segments or [None]
        assert all(segment.size == segment.capacity for segment in full)  # type: ignore[union-attr]
        assert last is None or last.capacity <= 2 * last.size
        # No column is a view that keeps more memory alive than is counted.
        assert self.rows.nbytes == sum(
            column.untyped_storage().nbytes() for segment in self.rows.segments for column in segment.columns.values()
        )
        assert self.rows.nbytes == sum(
            column.numel() * column.element_size()
            for segment in self.rows.segments
            for column in segment.columns.values()
        )


TestRowsBesideAList = RowsBesideAList.TestCase
TestRowsBesideAList.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


class CountCopies(TorchFunctionMode):
    """Counts the rows that `torch.cat` and `clone` write: the only ways a row is copied as rows are appended."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.cat, torch.Tensor.clone, torch.Tensor.contiguous):
            moved = func is not torch.Tensor.contiguous or result.data_ptr() != args[0].data_ptr()
            self.rows += len(result) * moved
        return result


@settings(max_examples=25, deadline=None)
@given(st.one_of(st.just([1] * 3000), st.lists(st.integers(1, 500), min_size=1, max_size=60)))
def test_appends_copy_each_row_a_logarithmic_number_of_times(sizes: list[int]) -> None:
    """Each copy multiplies the size of a row's segment by 3/2 or more, but for rows of an append larger than the
    segments before it, which may be copied once for each of these."""
    rows, total = SegmentedRows(), 0
    with CountCopies() as copies:
        for size in sizes:
            rows.append({"x": torch.arange(total, total + size)})
            total += size
            # Each segment is more than twice as large as the next.
            found = [segment.size for segment in rows.segments]
            assert all(left > 2 * right for left, right in itertools.pairwise(found))
            assert len(found) <= math.log2(total) + 1
    assert copies.rows <= total * (math.log(total, 1.5) + math.log2(total) + 1)
    assert torch.equal(torch.cat([run["x"] for _, run in rows.runs()]), torch.arange(total))


def test_the_count_of_copies_counts() -> None:
    with CountCopies() as copies:
        torch.cat([torch.zeros(3), torch.zeros(4)])
        torch.zeros(5).clone()
    assert copies.rows == 12


def test_one_append_is_not_copied() -> None:
    rows, given = SegmentedRows(), columns(list(range(100)))
    rows.append(given)
    assert all(rows.segments[0].columns[name].data_ptr() == given[name].data_ptr() for name in given)


def test_large_segments_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past `MERGE_BYTES` a segment is not copied again, and the number of segments is what that size makes it."""
    monkeypatch.setattr(segments, "MERGE_BYTES", 800)
    rows, seen = SegmentedRows(), {}
    for start in range(0, 3000, 10):
        rows.append({"x": torch.arange(start, start + 10)})
        for segment in rows.segments:
            pointer = segment.columns["x"].data_ptr()
            if segment.nbytes > 400:
                seen.setdefault(id(segment), pointer)
                assert seen[id(segment)] == pointer
    assert all(segment.nbytes <= 800 for segment in rows.segments)
    assert len(rows.segments) <= 2 * 24000 / 800 + math.log2(100)
    assert torch.equal(torch.cat([run["x"] for _, run in rows.runs()]), torch.arange(3000))
