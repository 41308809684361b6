"""Indexes of trellis codes: beside the oracle, in parts and at once, and their files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import golden_recipes
import numpy as np
import pytest
import torch
import trellis_oracle
from container import put_together
from index_oracle import check_top_k
from trellis_index_oracle import TrellisContent, parse_trellis

from tqsearch import blocks
from tqsearch.errors import CorruptFileError, InvalidInputError
from tqsearch.index import TurboQuantIndex
from tqsearch.plan import BitPlan

METRICS = ["ip", "cosine", "l2"]
DIM = 20
BANDS = BitPlan.from_pairs([(3, 4), (6, 0), (8, 3), (3, 1)])
SavedOf = Callable[[TurboQuantIndex], bytes]


def rows(n: int, seed: int = 0, dim: int = DIM) -> np.ndarray:
    spread = np.arange(1, dim + 1) ** -0.4
    return ((np.random.default_rng(seed).standard_normal((n, dim)) + 0.5) * spread).astype(np.float32)


def made(metric: Any, bits: Any = 2, learn: Any = None, n: int = 60, dim: int = DIM) -> TurboQuantIndex:
    index = TurboQuantIndex(dim, bits, metric, seed=7, codec="trellis")
    if learn is not None:
        index.train(rows(500, 1, dim), learn=learn)
    index.add(rows(n, 0, dim))
    return index


def check_codes(content: TrellisContent, vectors: np.ndarray) -> None:
    """The levels in the file are as near as any walk's, and the scales are theirs."""
    coordinates, scales = content.coordinates(vectors)
    least = [trellis_oracle.least_error(row, content.on_path) for row in coordinates]
    np.testing.assert_allclose(((coordinates - content.levels) ** 2).sum(1), least, rtol=1e-4)
    half = content.tensors["scales"].dtype == np.float16
    np.testing.assert_allclose(content.double("scales"), scales, rtol=2.0**-11 if half else 1e-5, atol=1e-7)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("learn", [None, "centre"])
@pytest.mark.parametrize("bits", [1, 2.5, BANDS], ids=str)
def test_results_equal_the_oracle(saved: SavedOf, metric: Any, learn: Any, bits: Any) -> None:
    index = made(metric, bits, learn)
    content = parse_trellis(saved(index))
    check_codes(content, rows(60))
    queries = rows(9, 2)
    scores = content.similarity(queries)
    for k in (1, 10, 61):
        got: Any = index.search(queries, k)
        check_top_k(got, *scores, content.ids, k, metric)
    chosen = np.arange(0, 60, 7)
    got = index.search(queries, 5, allow=chosen)
    check_top_k(got, *(part[:, chosen] for part in scores), chosen, 5, metric)
    shrunk = content.estimates * (1 - content.distortion) + content.tensors.get("centre", 0)
    np.testing.assert_allclose(index.reconstruct(np.arange(60)), shrunk, atol=1e-5 * np.abs(shrunk).max())
    assert index.bytes_per_vector == sum(
        content.tensors[name].nbytes // 60 for name in ("packed", "scales", "bias") if name in content.tensors
    )


@pytest.mark.parametrize("metric", METRICS)
def test_learnt_axes_go_along_a_trellis(saved: SavedOf, tmp_path: Path, metric: Any) -> None:
    """In so many dimensions of this spectrum axes pay, and none gets 6 or 8 bits, which lie beside the path."""
    dim = 20 if metric == "cosine" else 24
    index = made(metric, 2, "axes", 200, dim)
    assert (index.learnt, index.codec) == ("axes", "trellis")
    content = parse_trellis(saved(index))
    check_codes(content, rows(200, 0, dim))
    assert index.bytes_per_vector <= TurboQuantIndex(dim, 2, metric, codec="trellis").bytes_per_vector
    scores, ids = (np.asarray(part) for part in index.search(rows(9, 2, dim), 200))
    exact = content.residuals(rows(200, 0, dim))
    errors = content.estimates - exact
    assert np.square(errors).sum() < 0.2 * np.square(exact).sum()
    index.save(tmp_path / "axes")
    loaded_scores, loaded_ids = TurboQuantIndex.load(tmp_path / "axes").search(rows(9, 2, dim), 200)
    np.testing.assert_array_equal(loaded_scores, scores)
    np.testing.assert_array_equal(loaded_ids, ids)


@pytest.mark.parametrize("learn", [None, "centre", "axes"])
@pytest.mark.parametrize("metric", METRICS)
def test_adding_in_parts_equals_adding_at_once(
    saved: SavedOf, monkeypatch: pytest.MonkeyPatch, metric: Any, learn: Any
) -> None:
    whole = saved(made(metric, 2, learn))
    index = made(metric, 2, learn, 0)
    for part in np.split(rows(60), [1, 2, 33]):
        index.add(part)
    assert saved(index) == whole
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 4 * DIM * 7 * blocks._SLOWER)
    assert saved(made(metric, 2, learn)) == whole


def test_removal_and_ids(saved: SavedOf) -> None:
    index = TurboQuantIndex(DIM, 3, "l2", seed=7, codec="trellis")
    index.add(rows(30), ids=np.arange(30) * 3)
    index.remove(np.arange(0, 30, 2) * 3)
    content = parse_trellis(saved(index))
    assert sorted(content.ids.tolist()) == (np.arange(1, 30, 2) * 3).tolist()
    check_codes(content, rows(30)[content.ids // 3])
    got: Any = index.search(rows(4, 2), 20)
    check_top_k(got, *content.similarity(rows(4, 2)), content.ids, 20, "l2")


def test_recall_is_above_the_scalar_codes() -> None:
    """200 queries of 10 neighbours: a difference has a standard error below 0.5 / sqrt(2000) sqrt(2)."""
    base, queries = (np.random.default_rng(seed).standard_normal((n, 96)) for seed, n in ((3, 1500), (4, 200)))
    true = (queries @ base.T).argsort(axis=1)[:, -10:]
    found = {}
    for codec in ("scalar", "trellis"):
        index = TurboQuantIndex(96, 2, "ip", codec=codec)  # type: ignore[arg-type]
        index.add(base)
        ids = np.asarray(index.search(queries, 10)[1])
        found[codec] = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(ids.tolist(), true.tolist(), strict=True)])
    assert found["trellis"] > found["scalar"] + 0.016


def test_refusals() -> None:
    with pytest.raises(InvalidInputError, match="codec must be one of"):
        TurboQuantIndex(DIM, 2, codec="tree")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="needs a band of 1 to 4 bits"):
        TurboQuantIndex(DIM, 6, codec="trellis")
    assert "codec='trellis'" in repr(TurboQuantIndex(DIM, 2, codec="trellis"))


# The file


@pytest.mark.parametrize("name", golden_recipes.TRELLIS_NAMES)
def test_golden_files(tmp_path: Path, name: str) -> None:
    """The frozen bytes mean what the specification says, and the same vectors make them for ever."""
    path = golden_recipes.FOLDER / f"{name}.tqindex"
    content, index = parse_trellis(path.read_bytes()), TurboQuantIndex.load(path)
    assert (index.codec, index.plan.pairs()) == ("trellis", content.plan)
    queries = golden_recipes.vectors(9, index.dim)[5:]
    got: Any = index.search(queries, 7)
    check_top_k(got, *content.similarity(queries), content.ids, 7, index.metric)
    for number, made_now in enumerate((index, golden_recipes.make(name))):
        made_now.save(tmp_path / str(number))
        assert (tmp_path / str(number)).read_bytes() == path.read_bytes()


FORGED: dict[str, tuple[dict[str, Any], str]] = {
    "version 1": ({}, "1"),
    "version 2": ({}, "2"),
    "no codec": ({"codec": None}, "3"),
    "a scalar codec": ({"codec": "scalar"}, "3"),
    "an unknown codec": ({"codec": "tree"}, "3"),
    "half of what is learnt": ({"keeps_product": True}, "3"),
    "a width that it lacks": ({"plan": [[12, 5]]}, "3"),
    "no coordinate along the path": ({"plan": [[12, 0]]}, "3"),
    "a plan of other bytes": ({"plan": [[12, 3]]}, "3"),
}


@pytest.mark.parametrize("case", FORGED)
def test_forged_files_are_refused(tmp_path: Path, case: str) -> None:
    index = TurboQuantIndex(12, 2, "ip", codec="trellis")
    index.add(rows(5, 0, 12))
    index.save(tmp_path / "good")
    content = parse_trellis((tmp_path / "good").read_bytes())
    change, version = FORGED[case]
    header = {key: value for key, value in {**content.header, **change}.items() if value is not None}
    (tmp_path / "forged").write_bytes(put_together(header, content.tensors, version))
    with pytest.raises(CorruptFileError, match="forged"):
        TurboQuantIndex.load(tmp_path / "forged")
    (tmp_path / "forged").write_bytes(put_together(content.header, content.tensors, "3"))
    assert len(TurboQuantIndex.load(tmp_path / "forged")) == 5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("metric", METRICS)
def test_an_index_on_a_gpu_is_the_same(saved: SavedOf, metric: Any) -> None:
    index = TurboQuantIndex(DIM, 2, metric, "cuda", seed=7, codec="trellis")
    index.add(rows(60))
    assert saved(index) == saved(made(metric))
    content = parse_trellis(saved(index))
    got: Any = index.search(rows(9, 2), 10, precision="exact")
    check_top_k(got, *content.similarity(rows(9, 2)), content.ids, 10, metric)
