"""`allow`: ids or a mask by id; few rows are gathered, many are masked, and both are the search of what is allowed."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from index_oracle import Parsed, check_top_k

from tqsearch.errors import InvalidInputError
from tqsearch.index import TurboQuantIndex

ParsedOf = Callable[[TurboQuantIndex], Parsed]
N, DIM = 400, 12


def rows(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, DIM)).astype(np.float32)


def made(metric: Any = "l2", *, plain: bool) -> TurboQuantIndex:
    """An index in several segments; unless plain, with ids that are neither dense nor in order."""
    index = TurboQuantIndex(DIM, 4, metric)
    vectors, start = rows(N), 0
    ids = np.arange(N) if plain else np.random.default_rng(1).permutation(3 * N)[:N]
    for size in (200, 90, 70, 30, 10):
        index.add(vectors[start : start + size], ids=ids[start : start + size])
        start += size
    assert len(index._contents.rows.segments) > 1
    return index


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.1, 0.13, 0.5, 1.0])
def test_every_form_of_a_filter(parsed: ParsedOf, metric: str, share: float, plain: bool) -> None:
    index = made(metric, plain=plain)
    content = parsed(index)
    there = content.ids
    chosen = np.random.default_rng(2).permutation(N)[: int(share * N)]
    wanted, slack = (part[:, chosen] for part in content.similarity(rows(6, 3)))
    next_id = there.max() + 1
    mask = np.zeros(next_id, bool)
    mask[there[chosen]] = True
    absent = np.setdiff1d(np.arange(next_id), there)
    mask_of_absent = mask.copy()
    mask_of_absent[absent] = True
    strided = np.zeros(2 * next_id, bool)
    strided[::2] = mask
    backwards = mask[::-1].copy()[::-1]
    read_only = mask.copy()
    read_only.setflags(write=False)
    unknown = np.concatenate([there[chosen], absent, [next_id, 2**62, -1, -5]])
    forms: list[Any] = [
        there[chosen],
        there[chosen].tolist(),
        there[chosen].astype(np.uint16),
        torch.from_numpy(there[chosen]),
        np.concatenate([there[chosen], there[chosen]]),
        unknown,
        mask,
        mask.tolist(),
        torch.from_numpy(mask),
        mask_of_absent,
        strided[::2],
        backwards,
        read_only,
    ]
    for form in forms:
        for k in (3, N):
            check_top_k(index.search(rows(6, 3), k, allow=form), wanted, slack, there[chosen], k, metric)  # type: ignore[arg-type]


@pytest.mark.parametrize("metric", ["ip", "cosine", "l2"])
def test_gathered_rows_score_as_masked_rows(metric: Any) -> None:
    """The same ids allowed, scanned both ways: once few among many, once alone in an index of their own."""
    many, few = TurboQuantIndex(DIM, 3, metric), TurboQuantIndex(DIM, 3, metric)
    many.add(rows(N))
    chosen = np.arange(5, N, 17)
    few.add(rows(N)[chosen], ids=chosen)
    mask = np.isin(np.arange(N), chosen)
    gathered, masked = many.search(rows(4, 3), 8, allow=chosen), few.search(rows(4, 3), 8)
    np.testing.assert_array_equal(many.search(rows(4, 3), 8, allow=mask)[0], gathered[0])
    np.testing.assert_allclose(gathered[0], masked[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(gathered[1], masked[1])


def test_gather_in_blocks(parsed: ParsedOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tqsearch.scanning._GATHER_BLOCK", 7)
    index = made(plain=False)
    content = parsed(index)
    chosen = np.arange(0, N, 9)
    wanted, slack = (part[:, chosen] for part in content.similarity(rows(6, 3)))
    check_top_k(
        index.search(rows(6, 3), 20, allow=content.ids[chosen]),  # type: ignore[arg-type]
        wanted,
        slack,
        content.ids[chosen],
        20,
        "l2",
    )


def test_a_mask_covers_the_ids_there_ever_were() -> None:
    index = made(plain=True)
    index.remove([N - 1])
    assert index.search(rows(1), 1, allow=np.ones(N, bool))[1][0, 0] >= 0
    for length in (N - 1, N + 1, 0):
        with pytest.raises(InvalidInputError, match=rf"\({N},\), got \({length},\)"):
            index.search(rows(1), 1, allow=np.ones(length, bool))


@pytest.mark.parametrize("allow", [[1.5], np.ones(3), "12", [None], [[1, 2]], np.zeros((2, N), bool), [2**70]])
def test_what_is_no_filter(allow: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"^(allow|a bool mask) must"):
        made(plain=True).search(rows(1), 1, allow=allow)
