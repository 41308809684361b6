import numpy as np
import pytest

from benchmarks.contestants import FAMILIES, QUICK_WIDTHS, TOO_LARGE, WIDTHS, Problem, plan
from benchmarks.engines import FaissEngine

faiss = pytest.importorskip("faiss")

DIM = 48
ROWS = 64  # a multiple of the blocks of 32 of the fast-scan codes


def vectors(count: int, dim: int = DIM) -> np.ndarray:
    rows = np.random.default_rng(3).standard_normal((count, dim), dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def setting(family: str, width: int) -> object:
    chosen = FAMILIES[family]
    return width * DIM // 8 + 2 if chosen.choices is None else width


FAISS_FAMILIES = [name for name in FAMILIES if name.startswith("FAISS")]


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("family", FAISS_FAMILIES)
def test_bytes_are_what_the_serialized_index_grows_by(family: str, metric: str) -> None:
    width = 4
    engine = FAMILIES[family].build(Problem(DIM, metric, 0, 1), setting(family, width))
    assert isinstance(engine, FaissEngine)
    rows = vectors(2 * ROWS)
    engine.train(vectors(300))
    engine.add(rows[:ROWS])
    small = len(faiss.serialize_index(engine.index))
    engine.add(rows[ROWS:])
    growth = (len(faiss.serialize_index(engine.index)) - small) / ROWS
    assert engine.bytes_per_vector == growth
    assert engine.bytes_per_vector == FAMILIES[family].size(DIM, setting(family, width))
    assert engine.search(rows[:3], 5).shape == (3, 5)


@pytest.mark.parametrize("bits", [1, 2, 3, 5])
@pytest.mark.parametrize("family", ["FAISS RaBitQ", "FAISS RaBitQ fast scan", "FAISS EDEN"])
@pytest.mark.parametrize("dim", [40, 96, 100])
def test_sizes_by_width_agree_with_faiss(family: str, bits: int, dim: int) -> None:
    engine = FAMILIES[family].build(Problem(dim, "l2", 0, 1), bits)
    assert FAMILIES[family].size(dim, bits) == engine.bytes_per_vector


def test_turbovec_is_measured_by_its_own_growth() -> None:
    pytest.importorskip("turbovec")
    for bits in (2, 3, 4):
        engine = FAMILIES["turbovec"].build(Problem(DIM, "cosine", 0, 1), bits)
        assert engine.bytes_per_vector == FAMILIES["turbovec"].size(DIM, bits)


def test_turboquant_keeps_what_it_says() -> None:
    rows = vectors(20_000)
    for metric in ("cosine", "l2"):
        engine = FAMILIES["TurboQuant"].build(Problem(DIM, metric, 0, 1), 2.5)
        engine.add(rows)
        said = engine.bytes_per_vector * len(rows)
        assert said <= engine.index.nbytes <= 1.5 * said  # type: ignore[attr-defined]


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("dim", [96, 384, 784])
def test_a_rival_gets_the_budget_or_the_next_larger_setting(dim: int, metric: str) -> None:
    budgets, runs, left_out = plan(dim, metric, quick=False)
    assert tuple(budgets) == WIDTHS
    assert len(runs) == len(set(runs))
    assert ("turbovec" in left_out) == (metric == "l2")
    for name, family in FAMILIES.items():
        mine = [choice for family_name, choice in runs if family_name == name]
        if name in left_out or name in ("exact", "TurboQuant", "TurboQuant centred"):
            continue
        for width, budget in budgets.items():
            if family.widths is not None and width not in family.widths:
                continue
            if family.choices is None:
                assert budget > dim or budget in mine
                continue
            possible = [size for choice in family.choices if (size := family.size(dim, choice)) >= budget]
            if possible and min(possible) <= TOO_LARGE * budget:
                assert min(possible) in [family.size(dim, choice) for choice in mine]


def test_quick_runs_fewer() -> None:
    budgets, quick, _ = plan(384, "cosine", quick=True)
    assert tuple(budgets) == QUICK_WIDTHS
    assert set(quick) < set(plan(384, "cosine", quick=False)[1])


def test_pq_describes_every_coordinate_at_any_number_of_bytes() -> None:
    """The zeros put in for a dimension that m does not divide leave no sub-quantizer without coordinates."""
    for code_bytes in (5, 7, 26, 47):
        index = FAMILIES["FAISS PQ"].build(Problem(DIM, "l2", 0, 1), code_bytes).index  # type: ignore[attr-defined]
        assert index.sa_code_size() == code_bytes
        spread = index.chain.at(0).apply(np.ones((1, DIM), dtype=np.float32))
        assert (spread.reshape(code_bytes, -1).sum(axis=1) > 0).all()
        assert spread.sum() == DIM
