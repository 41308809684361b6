"""Adding and removing: what is there afterwards, in which bytes, and in how many of them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from index_oracle import Parsed, check_top_k, estimate

from tqsearch.index import TurboQuantIndex
from tqsearch.plan import BitPlan

METRICS = ["ip", "cosine", "l2"]
DIM = 20
SavedOf = Callable[[TurboQuantIndex], bytes]
ParsedOf = Callable[[TurboQuantIndex], Parsed]


def rows(n: int, seed: int = 0, dim: int = DIM) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)


def holds(content: Parsed, vectors: dict[int, np.ndarray]) -> None:
    """The file has exactly these ids, each with the codes of its vector."""
    assert sorted(content.ids.tolist()) == sorted(vectors)
    wanted = np.stack([vectors[id] for id in content.ids.tolist()])
    held = estimate(wanted, content.plan, content.header["seed"], content.header["metric"])
    np.testing.assert_allclose(content.estimates, held, atol=2e-3 * np.abs(held).max())


class TestParts:
    @pytest.mark.parametrize("metric", METRICS)
    @pytest.mark.parametrize("bits", [3, 2.5, BitPlan.from_pairs([(9, 4), (4, 0), (7, 1)])], ids=str)
    @pytest.mark.parametrize("plain", [True, False])
    def test_in_parts_is_at_once(self, saved: SavedOf, metric: Any, bits: Any, plain: bool) -> None:
        n = 150
        vectors = rows(n) * np.random.default_rng(5).uniform(1e-3, 1e3, (n, 1)).astype(np.float32)
        vectors[[7, 140]] = 0
        ids = None if plain else np.random.default_rng(1).permutation(1000)[:n]
        whole = TurboQuantIndex(DIM, bits, metric)
        whole.add(vectors, ids=ids)
        wanted = saved(whole)
        cuts = [np.sort(np.random.default_rng(s).integers(0, n + 1, s)) for s in (1, 3, 10)]
        for cut in [*cuts, np.arange(1, n)]:
            index = TurboQuantIndex(DIM, bits, metric)
            for part in np.split(np.arange(n), cut):
                index.add(vectors[part], ids=None if ids is None else ids[part])
            assert saved(index) == wanted

    @settings(max_examples=20, deadline=None)
    @given(st.lists(st.integers(0, 40), max_size=12), st.sampled_from([1, 5, 16, 33]))
    def test_any_split_and_dimension(self, sizes: list[int], dim: int) -> None:
        whole, parts = TurboQuantIndex(dim, 4, "l2"), TurboQuantIndex(dim, 4, "l2")
        vectors = rows(sum(sizes), dim=dim)
        whole.add(vectors)
        for part in np.split(vectors, np.cumsum(sizes)[:-1] if sizes else []):
            parts.add(part)
        assert len(parts) == len(vectors)
        np.testing.assert_array_equal(parts.ids, np.arange(len(vectors)))
        for name in ("packed", "scales", "bias"):
            joined = [
                torch.cat([c[name] for _, c in index._contents.rows.runs()]) if sum(sizes) else 0
                for index in (whole, parts)
            ]
            np.testing.assert_array_equal(*joined)

    def test_blocks_of_the_encoder_do_not_matter(self, saved: SavedOf, monkeypatch: pytest.MonkeyPatch) -> None:
        wanted, vectors = None, rows(500)
        for block in (1 << 19, 64 * DIM, 37 * DIM, 1):
            monkeypatch.setattr("tqsearch.kernels.reference.ENCODE_BLOCK", block)
            index = TurboQuantIndex(DIM, 4)
            index.add(vectors)
            wanted = wanted or saved(index)
            assert saved(index) == wanted

    def test_the_given_arrays_are_not_kept(self, saved: SavedOf) -> None:
        vectors, ids = rows(9), np.arange(9)[::-1].copy()
        index = TurboQuantIndex(DIM, 4)
        index.add(vectors, ids=ids)
        before = saved(index)
        vectors[:], ids[:] = 0, 0
        assert saved(index) == before


class TestIds:
    def test_auto_ids_continue_after_the_largest_ever(self) -> None:
        index = TurboQuantIndex(DIM, 4)
        index.add(rows(3))
        index.add(rows(2), ids=[100, 50])
        index.add(rows(2))
        assert index.ids.tolist() == [0, 1, 2, 50, 100, 101, 102]
        index.remove([102, 101, 2])
        index.add(rows(1))
        assert index.ids.tolist() == [0, 1, 50, 100, 103]
        index.remove(index.ids)
        index.add(rows(1))
        assert index.ids.tolist() == [104]

    def test_an_id_can_return(self, parsed: ParsedOf) -> None:
        index, vectors = TurboQuantIndex(DIM, 4), rows(10)
        index.add(vectors)
        index.remove([4, 9])
        index.add(rows(2, 1), ids=[9, 4])
        vectors[[9, 4]] = rows(2, 1)
        holds(parsed(index), dict(enumerate(vectors)))

    def test_in(self) -> None:
        index = TurboQuantIndex(DIM, 4)
        index.add(rows(3))
        index.add(rows(1), ids=[2**63 - 1])
        index.remove([1])
        inside: list[Any] = [0, 2, np.int32(2), np.uint64(2), 2**63 - 1]
        outside: list[Any] = [1, 3, -1, -(2**70), 2**63, 2**70, np.uint64(2**63), True, 0.0, "0", None, [0]]
        assert [id in index for id in inside] == [True] * len(inside)
        assert [id in index for id in outside] == [False] * len(outside)

    def test_the_last_id_there_is(self) -> None:
        index = TurboQuantIndex(DIM, 4)
        index.add(rows(1), ids=[2**63 - 2])
        index.add(rows(1))
        assert index.ids.tolist() == [2**63 - 2, 2**63 - 1]
        index.add(rows(0))
        with pytest.raises(ValueError, match="no ids are left"):
            index.add(rows(1))
        index.add(rows(1), ids=[0])
        assert np.asarray(index.search(rows(1)[0], 3)[1]).tolist()[-1] >= 0

    @pytest.mark.parametrize("dtype", ["i1", "i4", "u8", ">i8", "list", "torch"])
    def test_kinds_of_ids(self, dtype: str) -> None:
        kinds: dict[str, Any] = {"list": list, "torch": torch.tensor}
        kind = kinds.get(dtype, lambda ids: np.array(ids, dtype))
        index = TurboQuantIndex(DIM, 4)
        index.add(rows(3), ids=kind([5, 3, 9]))
        np.testing.assert_array_equal(np.asarray(index.search(rows(3), 1)[1])[:, 0], [5, 3, 9])
        index.remove(kind([3, 5]))
        assert index.ids.tolist() == [9]


class TestRemoval:
    @pytest.mark.parametrize("metric", METRICS)
    @pytest.mark.parametrize("sizes", [[100], [50, 20, 20, 10], [1] * 100], ids=lambda sizes: f"{len(sizes)} parts")
    def test_removed_is_gone_and_the_rest_is_there(self, parsed: ParsedOf, metric: Any, sizes: list[int]) -> None:
        index, vectors = TurboQuantIndex(DIM, 4, metric), rows(100)
        for part in np.split(vectors, np.cumsum(sizes)[:-1]):
            index.add(part)
        rest = dict(enumerate(vectors))
        rng = np.random.default_rng(3)
        for removed in np.split(rng.permutation(100), [1, 4, 30, 31, 70, 90]):
            index.remove(removed)
            for id in removed.tolist():
                del rest[id]
            assert len(index) == len(rest)
            if not rest:
                break
            content = parsed(index)
            holds(content, rest)
            assert not set(removed.tolist()) & set(index.ids.tolist())
            got: Any = index.search(rows(4, 1), 100)
            check_top_k(got, *content.similarity(rows(4, 1)), content.ids, 100, metric)
            some = rng.permutation(list(rest))[:10]
            np.testing.assert_allclose(
                np.asarray(index.reconstruct(some)),
                np.asarray(index.reconstruct(sorted(rest)))[np.searchsorted(sorted(rest), some)],
            )
        assert (np.asarray(index.search(rows(4, 1), 3)[1]) == -1).all()

    def test_of_nothing(self, saved: SavedOf) -> None:
        index = TurboQuantIndex(DIM, 4)
        index.remove([])
        index.add(rows(5))
        before = saved(index), index.nbytes
        index.remove(np.empty(0, np.int64))
        assert (saved(index), index.nbytes) == before

    def test_plain_ids_are_not_stored_in_the_file(self, parsed: ParsedOf) -> None:
        """Removing the last rows leaves 0, 1, 2, ... in the order of the rows, which the file does not list."""
        index = TurboQuantIndex(DIM, 4)
        index.add(rows(10))
        index.remove([9, 7, 8])
        content = parsed(index)
        assert "ids" not in content.tensors
        assert (content.header["count"], content.header["next_id"]) == (7, 10)
        assert index.ids.tolist() == list(range(7))
        index.remove([0])
        assert parsed(index).ids.tolist() == [6, 1, 2, 3, 4, 5]


class TestSpace:
    @pytest.mark.parametrize("metric", METRICS)
    @pytest.mark.parametrize("bits", [1, 4, 2.5], ids=str)
    def test_plain_ids_cost_nothing(self, parsed: ParsedOf, metric: Any, bits: float) -> None:
        index = TurboQuantIndex(DIM, bits, metric)
        for count in (1, 63, 200):
            index.add(rows(count))
            held = sum(tensor.nbytes for tensor in parsed(index).tensors.values())
            assert index.nbytes == index.bytes_per_vector * len(index) == held
            storages = [c.untyped_storage().nbytes() for s in index._contents.rows.segments for c in s.columns.values()]
            assert index.nbytes == sum(storages)

    def test_freed_space_is_reused(self) -> None:
        """After as many cycles as one likes an index takes a bounded multiple of what it holds."""
        index, rng = TurboQuantIndex(DIM, 4, "l2"), np.random.default_rng(0)
        index.add(rows(2000))
        row = index.bytes_per_vector + 8
        for cycle in range(60):
            index.remove(rng.permutation(index.ids)[: rng.integers(1, 1200)])
            index.add(rows(2000 - len(index), cycle))
            # Rows, an id map of 16 bytes a row, and at most 1024 changes of it at 100 bytes each.
            assert row * 2000 <= index.nbytes <= (row + 16) * 2000 + 1024 * 100
        index.remove(index.ids[:1990])
        assert sum(segment.nbytes for segment in index._contents.rows.segments) <= 2 * row * 10 + row

    def test_removal_does_not_touch_what_stays(self) -> None:
        """Removing one of many rows moves one row: the big columns stay where they are."""
        index = TurboQuantIndex(DIM, 4)
        index.add(rows(1000))
        index.remove([10])
        before = [segment.columns["packed"].data_ptr() for segment in index._contents.rows.segments]
        index.remove([20, 999])
        assert [segment.columns["packed"].data_ptr() for segment in index._contents.rows.segments] == before
