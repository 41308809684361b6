"""An index driven at random beside a dictionary of numpy vectors, which the oracle encodes on its own."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from held_pool import DIM, KINDS, METRICS, POOL_ROWS, Held, held_pool
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from index_oracle import check_top_k

from tqsearch import segments
from tqsearch.errors import DuplicateIdError, InvalidInputError, UnknownIdError
from tqsearch.index import TurboQuantIndex

vectors = st.lists(st.integers(0, POOL_ROWS - 1), max_size=30)  # numbers of the pool's rows
some_ids = st.lists(st.integers(0, 60), max_size=12)
counts = st.integers(1, 40)


class IndexBesideNumpy(RuleBasedStateMachine):
    """`self.model` maps an id to the pool's row that was added with it."""

    @initialize(
        metric=st.sampled_from(METRICS),
        merge_bytes=st.sampled_from([0, 200, segments.MERGE_BYTES]),
        kind=st.sampled_from(KINDS),
    )
    def start(self, metric: Any, merge_bytes: int, kind: str) -> None:
        self.merge_bytes, segments.MERGE_BYTES = segments.MERGE_BYTES, merge_bytes
        self.folder = Path(tempfile.mkdtemp())
        self.metric = metric
        self.held: Held = held_pool(metric, kind)
        (self.folder / "empty").write_bytes(self.held.empty)
        self.index = TurboQuantIndex.load(self.folder / "empty")
        self.model: dict[int, int] = {}
        self.next_id = 0

    def teardown(self) -> None:
        segments.MERGE_BYTES = self.merge_bytes
        shutil.rmtree(self.folder)

    # Changes

    @rule(rows=vectors)
    def add(self, rows: list[int]) -> None:
        self.index.add(self.held.pool[rows])
        self._added(range(self.next_id, self.next_id + len(rows)), rows)

    @rule(rows=vectors, start=st.integers(0, 60), step=st.sampled_from([-1, 1, 3]))
    def add_with_ids(self, rows: list[int], start: int, step: int) -> None:
        ids = [start + step * i for i in range(len(rows))]
        if ids and (min(ids) < 0 or set(ids) & set(self.model)):
            with pytest.raises(InvalidInputError if min(ids) < 0 else DuplicateIdError):
                self.index.add(self.held.pool[rows], ids=ids)
        else:
            self.index.add(self.held.pool[rows], ids=np.array(ids, np.int64))
            self._added(ids, rows)

    def _added(self, ids: Any, rows: list[int]) -> None:
        self.model.update(zip(ids, rows, strict=True))
        self.next_id = max([self.next_id, *(id + 1 for id in ids)])

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        ids = data.draw(st.lists(st.sampled_from(sorted(self.model)), unique=True, max_size=25))
        self.index.remove(ids)
        for id in ids:
            del self.model[id]

    @precondition(lambda self: self.model)
    @rule(keep=st.integers(0, 2))
    def remove_most(self, keep: int) -> None:
        ids = sorted(self.model)[keep:]
        self.index.remove(ids)
        self.model = {id: row for id, row in self.model.items() if id not in ids}

    @rule(rows=vectors, bad=st.sampled_from(["nan", "wide", "twice", "taken", "negative"]))
    def add_badly(self, rows: list[int], bad: str) -> None:
        rows = [*rows, 1, 2]
        given, ids = self.held.pool[rows], [self.next_id + 5 + i for i in range(len(rows))]
        if bad == "nan":
            given[-1, 3] = np.nan
        elif bad == "wide":
            given = np.repeat(given, 2, axis=1)
        elif bad == "taken":
            ids[-1] = max(self.model, default=ids[0])
        else:
            ids[-1] = ids[0] if bad == "twice" else -3
        with pytest.raises(InvalidInputError):
            self.index.add(given, ids=ids)

    @rule(ids=some_ids)
    def remove_badly(self, ids: list[int]) -> None:
        ids = [*ids, *(list(self.model)[:1]), self.next_id]
        error = UnknownIdError if len(set(ids)) == len(ids) else DuplicateIdError
        with pytest.raises(error):
            self.index.remove(ids)

    @rule()
    def save_and_load(self) -> None:
        """The file alone says what is in the index; the loaded index goes on from there."""
        path = self.folder / "index"
        self.index.save(path)
        content = self.held.parse(path.read_bytes())
        assert (content.header["count"], content.header["next_id"]) == (len(self.model), self.next_id)
        estimates = content.estimates if self.model else []
        self._equals_model(dict(zip(content.ids.tolist(), estimates, strict=True)))
        self.index = TurboQuantIndex.load(path)
        self.index.save(self.folder / "again")
        assert (self.folder / "again").read_bytes() == path.read_bytes()

    # Look-ups

    @rule(queries=st.lists(st.integers(0, POOL_ROWS - 1), max_size=4), k=counts)
    def search(self, queries: list[int], k: int) -> None:
        self._check_search(queries, k, sorted(self.model), None)

    @rule(query=st.integers(0, POOL_ROWS - 1), k=counts, ids=some_ids, as_mask=st.booleans())
    def search_some(self, query: int, k: int, ids: list[int], as_mask: bool) -> None:
        allowed = sorted(set(ids) & set(self.model))
        allow: Any = ids
        if as_mask:
            allow = np.isin(np.arange(self.next_id), ids)
        self._check_search([query], k, allowed, allow)

    def _check_search(self, queries: list[int], k: int, candidates: list[int], allow: Any) -> None:
        given = self.held.pool[queries]
        wanted, slack = self.held.scores(given, [self.model[id] for id in candidates])
        got: Any = self.index.search(given, k, allow=allow)
        check_top_k(got, wanted, slack, np.array(candidates, np.int64), k, self.metric)

    def _equals_model(self, held: dict[int, np.ndarray]) -> None:
        assert set(held) == set(self.model)
        for id, row in self.model.items():
            wanted = self.held.estimates[row]
            np.testing.assert_allclose(held[id], wanted, rtol=0, atol=1e-3 * np.abs(wanted).max() + 1e-6)

    @invariant()
    def agrees(self) -> None:
        ids = sorted(self.model)
        assert len(self.index) == len(ids)
        np.testing.assert_array_equal(self.index.ids, np.array(ids, np.int64))
        assert all((id in self.index) == (id in self.model) for id in range(-1, 70))

    @rule()
    def reconstruct(self) -> None:
        ids = list(self.model)
        got = np.asarray(self.index.reconstruct(ids), np.float64) - self.held.centre
        self._equals_model(dict(zip(ids, got / (1 - self.held.distortion), strict=True)))


TestIndexBesideNumpy = IndexBesideNumpy.TestCase
TestIndexBesideNumpy.settings = settings(
    max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "trellis" not in kind])
def test_the_pool_is_in_general_position(metric: str, kind: str) -> None:
    """No coded coordinate lies so near a boundary that float32 could choose another code than the oracle."""
    held = held_pool(metric, kind)
    for coordinates, table in held.coded:
        boundaries = (table[1:] + table[:-1]) / 2
        assert np.abs(coordinates[1:, :, None] - boundaries).min() > 3e-6
    assert sum(coordinates.shape[1] for coordinates, _ in held.coded) > DIM // 2
