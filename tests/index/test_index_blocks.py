"""Vectors are encoded a block at a time: the blocks change nothing but the memory held."""

from typing import Any

import numpy as np
import pytest
import torch

from tqsearch import blocks
from tqsearch.errors import InvalidInputError
from tqsearch.index import TurboQuantIndex

DIM = 24


def rows(n: int) -> np.ndarray:
    return np.random.default_rng(5).standard_normal((n, DIM)).astype(np.float32)


@pytest.fixture(params=[1, 7, 50])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 4 * DIM * request.param)


@pytest.mark.parametrize("metric", ["ip", "cosine", "l2"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int16])
def test_blocks_give_the_same_index(saved: Any, monkeypatch: pytest.MonkeyPatch, metric: Any, dtype: Any) -> None:
    given = (100 * rows(50)).astype(dtype)
    whole, parted = (TurboQuantIndex(DIM, 3, metric) for _ in range(2))
    whole.add(given)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 4 * DIM * 9)
    shown = []
    monkeypatch.setattr(blocks, "check_finite", lambda *_: shown.append(1))
    parted.add(given)
    assert saved(parted) == saved(whole)
    assert not shown


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_row_of_a_later_block_is_named_and_nothing_is_added(saved: Any, bad: float) -> None:
    index = TurboQuantIndex(DIM, 3, "ip")
    index.add(rows(5))
    before = saved(index)
    given = rows(50)
    given[41, 3], given[44, 0] = bad, -bad
    with pytest.raises(InvalidInputError, match=r"in row 41; 2 such rows of 50"):
        index.add(given)
    assert saved(index) == before


@pytest.mark.usefixtures("block")
def test_an_overflow_of_a_later_block_is_named(saved: Any) -> None:
    index = TurboQuantIndex(DIM, 3, "l2")
    index.add(rows(5))
    before = saved(index)
    given = rows(50)
    given[33] = 1e30
    with pytest.raises(InvalidInputError, match=r"squared norms .* overflow in row 33"):
        index.add(torch.from_numpy(given))
    assert saved(index) == before
