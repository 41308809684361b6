"""One index, several threads: searches beside each other, and beside changes."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from index_oracle import parse

from tqsearch.index import TurboQuantIndex
from tqsearch.kernels import reference

DIM = 16


@pytest.fixture(autouse=True)
def threads_take_turns_often() -> Iterator[None]:
    """So that an unguarded step is cut in the middle within a second, not once a year."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def rows(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, DIM)).astype(np.float32)


def run(*targets: Callable[[], None]) -> None:
    """Runs them at once and raises what any of them raised."""
    errors: list[BaseException] = []

    def guarded(target: Callable[[], None]) -> None:
        try:
            target()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(target,), daemon=True) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    if errors:
        raise errors[0]


def test_searches_beside_each_other_equal_searches_alone() -> None:
    index = TurboQuantIndex(DIM, 4, "l2")
    for part in np.split(rows(3000), [2000, 2700, 2900]):
        index.add(part)
    index.remove(np.arange(0, 3000, 7))
    mask = np.arange(3000) % 2 == 0
    batches = [rows(5, seed) for seed in range(1, 9)]
    wanted = [(index.search(q, 20), index.search(q, 20, allow=mask)) for q in batches]
    got: dict[int, Any] = {}

    def searcher(number: int) -> None:
        for _ in range(10):
            q = batches[number]
            got[number] = (index.search(q, 20), index.search(q, 20, allow=mask))
            for pair, other in zip(got[number], wanted[number], strict=True):
                np.testing.assert_array_equal(pair[0], other[0])
                np.testing.assert_array_equal(pair[1], other[1])

    run(*[lambda number=number: searcher(number) for number in range(8)])  # type: ignore[misc]
    assert len(got) == 8


def test_a_fresh_index_may_be_searched_by_many_at_once() -> None:
    """Whatever is made at the first use (tables, transforms) is made right under contention."""
    for seed in range(5):
        index, alone = (TurboQuantIndex(24, 3, "cosine", seed=seed) for _ in range(2))
        vectors = np.random.default_rng(seed).standard_normal((40, 24)).astype(np.float32)
        add_at_once(index, vectors)
        alone.add(vectors)
        np.testing.assert_array_equal(index.reconstruct(range(40)), alone.reconstruct(range(40)))


def add_at_once(index: TurboQuantIndex, vectors: np.ndarray) -> None:
    barrier = threading.Barrier(4, timeout=20)

    def adder(ids: np.ndarray) -> None:
        barrier.wait()
        index.add(vectors[ids], ids=ids)

    run(*[lambda ids=ids: adder(ids) for ids in np.split(np.arange(40), 4)])  # type: ignore[misc]


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_searches_beside_changes(metric: Any, tmp_path: Path) -> None:
    """A hundred vectors stay, others come and go. Each search sees a whole state: the ones that stay with their scores,
    of the others whole groups or nothing, no NaN, and no id that was never there."""
    index = TurboQuantIndex(DIM, 4, metric)
    index.add(rows(100))
    groups = [np.arange(1000 * g, 1000 * g + 50) for g in range(1, 6)]
    query = rows(1, 9)[0]
    alone = {id: score for score, id in zip(*map(np.ndarray.tolist, index.search(query, 100)), strict=True)}  # type: ignore[arg-type]
    done, seen = threading.Event(), []
    allowed = set(range(100)) | {id for group in groups for id in group.tolist()}

    def changer() -> None:
        try:
            rng = np.random.default_rng(0)
            for step in range(25):
                for group in rng.permutation(5)[:3]:
                    index.add(rows(50, step), ids=groups[group])
                    time.sleep(0)
                    index.remove(rng.permutation(groups[group]))
        finally:
            done.set()

    def searcher() -> None:
        while not done.is_set():
            scores, ids = (np.asarray(part) for part in index.search(query, 400))
            there = set(ids[ids >= 0].tolist())
            assert there <= allowed
            assert not np.isnan(scores).any()
            assert (np.isfinite(scores) == (ids >= 0)).all()
            assert len(there) == (ids >= 0).sum()
            assert len(there) % 50 == 0
            assert all(len(there & set(group.tolist())) in (0, 50) for group in groups)
            found = {id: score for id, score in zip(ids.tolist(), scores.tolist(), strict=True) if 0 <= id < 100}
            assert found.keys() == alone.keys()
            np.testing.assert_allclose(list(found.values()), [alone[id] for id in found], rtol=1e-5, atol=1e-4)
            seen.append(len(there))

    def looker() -> None:
        before = np.asarray(index.reconstruct(range(100)))
        while not done.is_set():
            assert len(index) % 50 == 0
            assert index.nbytes >= 100 * index.bytes_per_vector
            assert 3 in index
            assert 7777 not in index
            assert len(index.ids) % 50 == 0
            np.testing.assert_array_equal(index.reconstruct(range(100)), before)

    def saver() -> None:
        while not done.is_set():
            index.save(tmp_path / "index")
            content = parse((tmp_path / "index").read_bytes())
            assert content.header["count"] % 50 == 0
            assert set(range(100)) <= set(content.ids.tolist()) <= allowed

    run(changer, searcher, searcher, looker, saver)
    assert len(seen) > 5
    assert len(index) == 100


def test_adds_beside_each_other_give_each_its_own_ids() -> None:
    index = TurboQuantIndex(DIM, 8, "l2")
    batches = [rows(10, seed) for seed in range(40)]

    def adder(number: int) -> None:
        for batch in batches[number::4]:
            index.add(batch)

    run(*[lambda number=number: adder(number) for number in range(4)])  # type: ignore[misc]
    np.testing.assert_array_equal(index.ids, np.arange(400))
    # Each batch lies in ten consecutive ids, in its order.
    nearest = np.asarray(index.search(np.concatenate(batches), 1)[1]).reshape(40, 10)
    np.testing.assert_array_equal(nearest - nearest[:, :1], np.tile(np.arange(10), (40, 1)))
    np.testing.assert_array_equal(np.sort(nearest[:, 0]), np.arange(0, 400, 10))


def test_a_change_waits_for_the_search_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """A removal that starts in the middle of a search is done after it; the search sees the vectors as they were."""
    index = TurboQuantIndex(DIM, 4, "l2")
    index.add(rows(50))
    query, scan = rows(1, 9)[0], reference.scan
    wanted = np.asarray(index.search(query, 50)[0])
    removal = threading.Thread(target=index.remove, args=(list(range(25)),), daemon=True)
    waited = []

    def scan_beside_removal(*args: Any, **options: Any) -> Any:
        removal.start()
        removal.join(0.2)  # time enough to be done, if nothing held it back
        waited.append(removal.is_alive())
        return scan(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(reference, "scan", scan_beside_removal)
        scores = np.asarray(index.search(query, 50)[0])
    removal.join(10)
    assert waited == [True]
    np.testing.assert_array_equal(scores, wanted)
    assert index.ids.tolist() == list(range(25, 50))
