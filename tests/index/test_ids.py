"""The map from ids to rows beside a dictionary."""

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tqsearch.ids import IdMap

LARGE = 2**63 - 1


class MapBesideADictionary(RuleBasedStateMachine):
    @initialize(count=st.sampled_from([0, 1, 50, 5000]), plain=st.booleans())
    def start(self, count: int, plain: bool) -> None:
        ids = np.arange(count) if plain else np.random.default_rng(0).permutation(3 * count)[:count]
        self.map = IdMap(count) if plain else IdMap.of(ids)
        self.model = {id: row for row, id in enumerate(ids.tolist())}
        self.most = count

    def _assign(self, ids: list[int], rows: list[int]) -> None:
        self.map.assign(np.array(ids, np.int64), np.array(rows, np.int64))
        self.model.update(zip(ids, rows, strict=True))
        self.model = {id: row for id, row in self.model.items() if row >= 0}

    @rule(
        ids=st.lists(st.integers(0, 60) | st.integers(0, LARGE), unique=True, max_size=20), first=st.integers(-1, 9999)
    )
    def assign_few(self, ids: list[int], first: int) -> None:
        """Row -1 takes an id out, whether it is there or not."""
        self._assign(ids, [-1 if first < 0 else first + i for i in range(len(ids))])

    @rule(start=st.integers(0, 4000), count=st.integers(800, 1500), step=st.sampled_from([1, 3, -1]), out=st.booleans())
    def assign_many(self, start: int, count: int, step: int, out: bool) -> None:
        """Enough that they are sorted in."""
        ids = [start + abs(step) * i for i in range(count)][:: 1 if step > 0 else -1]
        self._assign(ids, [-1] * count if out else list(range(count)))

    @rule(count=st.integers(1, 400))
    def swap(self, count: int) -> None:
        """What a removal does: some ids go, others take their rows."""
        ids = sorted(self.model)
        gone, moved = ids[:count], ids[count : 2 * count]
        rows = [self.model[id] for id in gone[: len(moved)]]
        self._assign(gone, [-1] * len(gone))
        self._assign(moved, rows)

    @rule(ids=st.lists(st.integers(-5, 6000) | st.integers(-(2**63), LARGE), max_size=50))
    def look_up(self, ids: list[int]) -> None:
        found = self.map.rows(np.array(ids, np.int64))
        assert found.dtype == np.int64
        assert found.tolist() == [self.model.get(id, -1) for id in ids]

    @invariant()
    def all_there(self) -> None:
        ids = np.fromiter(self.model, np.int64, len(self.model))
        assert self.map.rows(ids).tolist() == list(self.model.values())

    @invariant()
    def small(self) -> None:
        """At most 16 bytes for each id there was at one time, and changes for a quarter of them."""
        self.most = max(self.most, len(self.model))
        assert self.map.nbytes <= 16 * self.most + 100 * max(1024, self.most // 4)


TestMapBesideADictionary = MapBesideADictionary.TestCase
TestMapBesideADictionary.settings = settings(max_examples=40, stateful_step_count=15, deadline=None)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2000), st.lists(st.integers(-3, 2500), max_size=30))
def test_plain_ids_cost_nothing(count: int, asked: list[int]) -> None:
    plain = IdMap(count)
    assert plain.nbytes == 0
    assert plain.rows(np.array(asked, np.int64)).tolist() == [id if 0 <= id < count else -1 for id in asked]


def test_few_are_left_of_many() -> None:
    for left in range(4):
        ids = IdMap.of(np.arange(3000))
        ids.assign(np.arange(left, 3000), np.full(3000 - left, -1))
        assert ids.rows(np.arange(5)).tolist() == [id if id < left else -1 for id in range(5)]
        assert ids.rows(np.array([LARGE, -1])).tolist() == [-1, -1]


def test_many_cycles_do_not_leave_dead_ids_behind() -> None:
    """Ids that come and go for ever: the map's size follows those that are there."""
    ids: Any = IdMap()
    for cycle in range(200):
        new = np.arange(100) + 100 * cycle
        ids.assign(new, np.arange(100))
        assert ids.rows(new).tolist() == list(range(100))
        ids.assign(new, np.full(100, -1))
        assert (ids.rows(new) == -1).all()
        assert ids.nbytes <= 100 * 1024 + 16 * 1024
