"""A change that is cut short, at whatever line or for want of memory, is made whole or not at all."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from tqsearch import segments
from tqsearch.index import TurboQuantIndex

DIM = 8
CUT = {"index.py", "contents.py", "segments.py", "ids.py"}  # the files in whose lines the interrupt comes


def rows(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, DIM)).astype(np.float32)


def made(*, own_ids: bool) -> TurboQuantIndex:
    """Several segments, the last with free space."""
    index = TurboQuantIndex(DIM, 4, "l2")
    for start, count in ((0, 20), (20, 8), (28, 3)):
        ids = np.arange(start, start + count) * 3 if own_ids else None
        index.add(rows(count, start), ids=ids)
    if own_ids:
        index.remove([90, 87])
    return index


CHANGES: dict[str, Callable[[TurboQuantIndex], object]] = {
    "add": lambda index: index.add(rows(12, 1)),
    "add with ids": lambda index: index.add(rows(5, 1), ids=[1000, 701, 1001, 500, 304]),
    "remove few": lambda index: index.remove(index.ids[[3, 25, 11]]),
    "remove most": lambda index: index.remove(index.ids[3:26]),
}


@contextmanager
def interrupted(at: int) -> Iterator[None]:
    """Raises KeyboardInterrupt before the line of that number, as Ctrl-C does."""
    count = 0

    def trace(frame: Any, event: str, argument: object) -> Any:
        nonlocal count
        path = Path(frame.f_code.co_filename)
        if path.name not in CUT or path.parent.name != "tqsearch":
            return None
        if event == "line":
            count += 1
            if count == at:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def state(index: TurboQuantIndex) -> tuple[Any, ...]:
    """All that an index holds: its ids, where each is found, its vectors, and what it is asked to give."""
    ids = index.ids
    found = np.asarray(index.reconstruct(ids))
    contents = index._contents
    runs = [(name, column.numpy().tobytes()) for _, run in contents.rows.runs() for name, column in run.items()]
    scores = np.asarray(index.search(rows(3, 9), 50)[0])
    return ids.tobytes(), found.tobytes(), contents.next_id, len(index), runs, scores.tobytes()


class MemoryEnds(TorchFunctionMode):
    """From the call of that number on, no function of torch finds memory, but the one that takes none."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.count = at, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count >= self.at and func is not torch.Tensor.index_copy_:
            raise torch.OutOfMemoryError("no memory")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("change", "own_ids"),
    [("add", False), ("add", True), ("add with ids", False), ("remove few", False), ("remove most", True)],
)
@pytest.mark.parametrize("cause", ["interrupt", "memory"])
def test_every_cut(monkeypatch: pytest.MonkeyPatch, cause: str, change: str, own_ids: bool) -> None:
    monkeypatch.setattr(segments, "MERGE_BYTES", 200)
    index = made(own_ids=own_ids)
    assert len(index._contents.rows.segments) > 1
    before = state(index)
    CHANGES[change](index)
    after = state(index)
    assert before != after
    index, cuts = made(own_ids=own_ids), 0
    for at in range(1, 10_000):
        try:
            with interrupted(at) if cause == "interrupt" else MemoryEnds(at):
                CHANGES[change](index)
            break
        except (KeyboardInterrupt, torch.OutOfMemoryError):
            pass
        now = state(index)
        assert now in (before, after), at
        cuts += now == before
        if now == after:
            index = made(own_ids=own_ids)
    assert cuts > 5
    assert state(index) == after
