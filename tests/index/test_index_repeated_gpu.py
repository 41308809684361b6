"""Repeated searches on a GPU, whose launches are made again, see every change: they find what a CPU finds in the same
codes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tqsearch.errors import InvalidInputError
from tqsearch.index import TurboQuantIndex

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

DIM, K = 96, 10


def rows(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, DIM), dtype=np.float32) + np.float32(0.1)


class Checked:
    """An index on a GPU whose searches are compared with a CPU's of its file."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.path, self.seed = folder / "index", 0
        self.index = TurboQuantIndex(DIM, device="cuda", **options)

    def check(self, allow: Any = None) -> None:
        self.index.save(self.path)
        on_cpu = TurboQuantIndex.load(self.path)
        for count in (1, 5, 8, 5, 70):
            for k in (K, 40):
                for _ in range(4):
                    self.seed += 1
                    queries = rows(count, self.seed)
                    wanted: Any = on_cpu.search(queries, k + 1, allow=allow)
                    got: Any = self.index.search(queries, k, allow=allow, precision="exact")
                    self.compare(got, wanted, k)

    @staticmethod
    def compare(got: Any, wanted: Any, k: int) -> None:
        np.testing.assert_allclose(got[0], wanted[0][:, :k], rtol=1e-4, atol=1e-4)
        differs = got[1] != wanted[1][:, :k]
        gaps = np.abs(np.diff(wanted[0], axis=1))
        near = np.pad(gaps, ((0, 0), (1, 0)), constant_values=np.inf)[:, :k] < 1e-4
        assert (near | (gaps[:, :k] < 1e-4))[differs].all(), "another row, and not one of nearly the same score"


@pytest.mark.parametrize(
    ("options", "learn"),
    [
        ({"metric": "cosine"}, None),
        ({"metric": "ip", "bits": 2}, "centre"),
        ({"metric": "l2", "bits": 3}, "centre"),
        ({"metric": "l2", "bits": 2}, "axes"),
        ({"metric": "cosine", "rotation": "dense", "bits": 1}, None),
        ({"metric": "cosine", "codec": "trellis", "bits": 2}, None),
    ],
    ids=str,
)
def test_every_change_is_seen(tmp_path: Path, options: dict[str, Any], learn: Any) -> None:
    checked = Checked(tmp_path, **options)
    index = checked.index
    if learn:
        index.train(rows(1000, 7) * np.linspace(0.5, 2, DIM, dtype=np.float32), learn=learn)
    index.add(rows(700, 1))
    checked.check()
    index.add(rows(100, 2))
    checked.check()
    index.remove(np.arange(0, 300, 2))
    checked.check()
    index.add(rows(50, 3), ids=np.arange(5000, 5050))
    checked.check()
    index.to("cpu").to("cuda")
    checked.check()


def test_a_filter_is_seen_between_searches_without_one(tmp_path: Path) -> None:
    checked = Checked(tmp_path)
    checked.index.add(rows(900, 1))
    checked.check()
    for seed in range(3):
        checked.check(allow=np.random.default_rng(seed).random(900) < 0.5)
        checked.check()


def test_what_a_repeated_search_refuses() -> None:
    """A query that is not finite, in a search whose launches are made again; the next one is right."""
    index = TurboQuantIndex(DIM, 4, "l2", device="cuda")
    index.add(rows(900, 1))
    queries, bad, long = rows(4, 2), rows(4, 2), rows(4, 2)
    wanted: Any = index.search(queries, K)
    bad[2, 5], long[3] = np.nan, 1e30
    for _ in range(5):
        got: Any = index.search(queries, K)
        np.testing.assert_array_equal(got[0], wanted[0])
        np.testing.assert_array_equal(got[1], wanted[1])
        with pytest.raises(InvalidInputError, match="NaN, an infinity or an overflow in row 2"):
            index.search(bad, K)
        with pytest.raises(InvalidInputError, match="an overflow in row 3"):
            index.search(long, K)


def test_searches_of_many_shapes_leave_little_memory_behind() -> None:
    index = TurboQuantIndex(1024, 4, device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    index.add(torch.randn((1 << 20, 1024), device="cuda", generator=generator).half())
    queries = torch.randn((64, 1024), device="cuda", generator=generator)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before, held = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
    for count in (1, 2, 3, 7, 16, 33, 64):
        for k in (1, 10, 100):
            for _ in range(4):
                index.search(queries[:count], k)
    assert torch.cuda.memory_reserved() - before <= index.nbytes // 20 + (32 << 20)
    assert torch.cuda.memory_allocated() - held <= 1 << 20
