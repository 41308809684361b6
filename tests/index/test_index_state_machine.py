"""An index driven at random beside a dictionary of numpy vectors, which the oracle encodes on its own."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from index_oracle import bias_of, check_top_k, estimate, levels, mean_distortion, parse, rotation, similarity, unit_rows

from tqsearch import segments
from tqsearch.errors import DuplicateIdError, InvalidInputError, UnknownIdError
from tqsearch.index import TurboQuantIndex

DIM, SEED, BITS = 12, 5, 2.5
PLAN = ((8, 3), (4, 2))
POOL = np.random.default_rng(0).standard_normal((64, DIM)).astype(np.float32)
POOL[0] = 0
POOL[1:4] *= np.array([[1e-6], [1e3], [1e6]], np.float32)
METRICS = ("ip", "cosine", "l2")
SAMPLE = POOL[4:20] + 1
CENTRES = {metric: (unit_rows(SAMPLE.astype(float)) if metric == "cosine" else SAMPLE).mean(0) for metric in METRICS}
HELD = {
    (metric, trained): estimate(POOL, PLAN, SEED, metric, CENTRES[metric] if trained else 0)
    for metric in METRICS
    for trained in (False, True)
}

vectors = st.lists(st.integers(0, len(POOL) - 1), max_size=30)  # numbers of the pool's rows
some_ids = st.lists(st.integers(0, 60), max_size=12)
counts = st.integers(1, 40)


class IndexBesideNumpy(RuleBasedStateMachine):
    """`self.model` maps an id to the pool's row that was added with it."""

    @initialize(
        metric=st.sampled_from(METRICS),
        merge_bytes=st.sampled_from([0, 200, segments.MERGE_BYTES]),
        trained=st.booleans(),
    )
    def start(self, metric: Any, merge_bytes: int, trained: bool) -> None:
        self.merge_bytes, segments.MERGE_BYTES = segments.MERGE_BYTES, merge_bytes
        self.folder = Path(tempfile.mkdtemp())
        self.metric = metric
        self.index = TurboQuantIndex(DIM, BITS, metric, seed=SEED)
        self.centre = CENTRES[metric].astype(np.float64) if trained else None
        if trained:
            self.index.train(SAMPLE, learn="centre")
        self.held = HELD[metric, trained]
        self.bias = bias_of(POOL, self.metric, self.centre)
        self.model: dict[int, int] = {}
        self.next_id = 0

    def teardown(self) -> None:
        segments.MERGE_BYTES = self.merge_bytes
        shutil.rmtree(self.folder)

    # Changes

    @rule(rows=vectors)
    def add(self, rows: list[int]) -> None:
        self.index.add(POOL[rows])
        self._added(range(self.next_id, self.next_id + len(rows)), rows)

    @rule(rows=vectors, start=st.integers(0, 60), step=st.sampled_from([-1, 1, 3]))
    def add_with_ids(self, rows: list[int], start: int, step: int) -> None:
        ids = [start + step * i for i in range(len(rows))]
        if ids and (min(ids) < 0 or set(ids) & set(self.model)):
            with pytest.raises(InvalidInputError if min(ids) < 0 else DuplicateIdError):
                self.index.add(POOL[rows], ids=ids)
        else:
            self.index.add(POOL[rows], ids=np.array(ids, np.int64))
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
        given, ids = POOL[rows], [self.next_id + 5 + i for i in range(len(rows))]
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
        content = parse(path.read_bytes())
        assert (content.header["count"], content.header["next_id"]) == (len(self.model), self.next_id)
        assert content.plan == PLAN
        held = dict(zip(content.ids.tolist(), content.estimates, strict=True))
        self._equals_model(held)
        self.index = TurboQuantIndex.load(path)
        self.index.save(self.folder / "again")
        assert (self.folder / "again").read_bytes() == path.read_bytes()

    # Look-ups

    @rule(queries=st.lists(st.integers(0, len(POOL) - 1), max_size=4), k=counts)
    def search(self, queries: list[int], k: int) -> None:
        self._check_search(queries, k, sorted(self.model), None)

    @rule(query=st.integers(0, len(POOL) - 1), k=counts, ids=some_ids, as_mask=st.booleans())
    def search_some(self, query: int, k: int, ids: list[int], as_mask: bool) -> None:
        allowed = sorted(set(ids) & set(self.model))
        allow: Any = ids
        if as_mask:
            allow = np.isin(np.arange(self.next_id), ids)
        self._check_search([query], k, allowed, allow)

    def _check_search(self, queries: list[int], k: int, candidates: list[int], allow: Any) -> None:
        places = [self.model[id] for id in candidates]
        given = POOL[queries]
        held = self.held[places]
        wanted, slack = similarity(given, held, self.bias[places], self.metric, self.centre)
        # The oracle's scales are not rounded: to float16 for "cosine", else to float32.
        rounding = 2.0**-10 if self.metric == "cosine" else 2.0**-19
        lengths = 1 if self.metric == "cosine" else np.linalg.norm(given, axis=1)[:, None] + 10
        slack = slack + rounding * (lengths * np.linalg.norm(held, axis=1) + np.abs(self.bias[places]))
        got: Any = self.index.search(given, k, allow=allow)
        check_top_k(got, wanted, slack, np.array(candidates, np.int64), k, self.metric)

    def _equals_model(self, held: dict[int, np.ndarray]) -> None:
        assert set(held) == set(self.model)
        for id, row in self.model.items():
            wanted = self.held[row]
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
        got = np.asarray(self.index.reconstruct(ids), np.float64) - (0 if self.centre is None else self.centre)
        self._equals_model(dict(zip(ids, got / (1 - mean_distortion(PLAN)), strict=True)))


TestIndexBesideNumpy = IndexBesideNumpy.TestCase
TestIndexBesideNumpy.settings = settings(
    max_examples=30, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("trained", [False, True])
def test_the_pool_is_in_general_position(metric: str, trained: bool) -> None:
    """No rotated coordinate lies so near a boundary that float32 could choose another code than the oracle."""
    vectors = POOL[1:].astype(np.float64)
    vectors = (unit_rows(vectors) if metric == "cosine" else vectors) - (CENTRES[metric] if trained else 0)
    rotated = np.sqrt(DIM) * unit_rows(vectors) @ rotation(DIM, SEED).T
    for columns, width in ((slice(0, 8), 3), (slice(8, 12), 2)):
        table = levels(width, DIM)
        boundaries = (table[1:] + table[:-1]) / 2
        assert np.abs(rotated[:, columns, None] - boundaries).min() > 3e-6
