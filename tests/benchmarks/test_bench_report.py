import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import figures, report, tables

ENVIRONMENT = {"device": "a CPU", "threads": 2, "versions": {"faiss": "1.15.1"}, "commit": "abc", "date": "2026-01-01"}


def run(family: str, setting: str, parameter: float, size: float, recall: float, **more: Any) -> dict[str, Any]:
    return {
        "family": family,
        "setting": setting,
        "parameter": parameter,
        "bytes_per_vector": size,
        "recall": {"1@1": recall / 2, "1@10": recall, "10@10": recall, "100@100": recall},
        "train_seconds": 0.0,
        "add_seconds": 12.34,
        "qps": {"1": 12.0, "32": 345.6, "1000": 123456.0},
        **more,
    }


RESULT = {
    "benchmark": "search",
    "environment": ENVIRONMENT,
    "dataset": {"name": "tiny", "metric": "cosine", "dim": 64, "vectors": 100, "queries": 10},
    "effort": {"quick": False, "training_rows": 20000, "pq_iterations": 25},
    "budgets": {"1": 10, "2.5": 22, "4": 34},
    "left_out": {"slow": "too slow"},
    "notes": {"FAISS PQ": "a note"},
    "runs": [
        run("exact", "Flat", 32, 256, 1.0),
        run("TurboQuant", "1 bit", 1, 10, 0.6),
        run("TurboQuant", "2.5 bits", 2.5, 22, 0.8),
        run("TurboQuant", "4 bits", 4, 34, 0.951),
        run("FAISS PQ", "PQ10x8", 10, 10, 0.61),
        run("FAISS PQ", "PQ34x8", 34, 34, 0.93),
        {"family": "FAISS PQ", "setting": "PQ22x8", "parameter": 22, "error": "exit status 1: out of luck"},
        run("FAISS SQ", "SQ4", 4, 32, 0.9),
    ],
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (results / "search-tiny.json").write_text(json.dumps(RESULT))
    generic = {"columns": ["d", "theory", "who"], "rows": [[128, 0.36338, "us"], [1536, 0.11748, "them"]]}
    (results / "distortion.json").write_text(json.dumps(generic))
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("# A\n<!-- table:search-tiny -->\nold\n<!-- end -->\ntail\n")
    (tmp_path / "docs" / "more.md").write_text(
        "<!-- table:distortion -->\n<!-- end -->\nand\n<!-- table:search-tiny-full -->\n<!-- end -->\n"
    )
    return tmp_path


def test_written_pages_pass_the_check(root: Path) -> None:
    assert report.main([], root) == 0
    assert report.main(["--check"], root) == 0
    readme = (root / "README.md").read_text()
    assert readme.startswith("# A\n")
    assert readme.endswith("<!-- end -->\ntail\n")
    assert "| 4 bits, 34 B | **TurboQuant, 4 bits** | **34** | **0.951** |" in readme
    assert "PQ34x8" in readme
    assert "123,000" in readme
    assert "2.5 bits" not in readme
    more = (root / "docs" / "more.md").read_text()
    assert "| 1,536 | 0.1175 | them |" in more or "| 1536 | 0.1175 | them |" in more
    assert "2.5 bits" in more
    assert "out of luck" in more
    assert "slow is left out: too slow" in more
    for name in figures.names(RESULT):
        assert (root / "docs" / "figures" / name).read_bytes().startswith(b"\x89PNG")


def test_writing_twice_changes_nothing(root: Path) -> None:
    report.main([], root)
    first = (root / "README.md").read_text()
    report.main([], root)
    assert (root / "README.md").read_text() == first


def test_a_changed_cell_is_named(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report.main([], root)
    page = root / "README.md"
    page.write_text(page.read_text().replace("0.951", "0.991"))
    assert report.main(["--check"], root) == 1
    assert "README.md: table:search-tiny differs" in capsys.readouterr().err
    assert "0.991" in page.read_text()


def test_a_changed_result_is_seen(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report.main([], root)
    path = root / "benchmarks" / "results" / "distortion.json"
    path.write_text(path.read_text().replace("0.36338", "0.46338"))
    assert report.main(["--check"], root) == 1
    assert "table:distortion differs" in capsys.readouterr().err


def test_a_missing_figure_and_a_marker_without_result_are_named(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report.main([], root)
    name = figures.names(RESULT)[0]
    (root / "docs" / "figures" / name).unlink()
    page = root / "README.md"
    page.write_text(page.read_text() + "<!-- table:nothing -->\nkept\n<!-- end -->\n")
    capsys.readouterr()
    assert report.main(["--check"], root) == 1
    said = capsys.readouterr().err
    assert f"docs/figures/{name} is missing" in said
    assert "table:nothing has no result" in said
    assert report.main([], root) == 1
    assert "kept" in page.read_text()


def test_without_pages_or_results_all_is_well(tmp_path: Path) -> None:
    assert report.main(["--check"], tmp_path) == 0
    (tmp_path / "README.md").write_text("no markers")
    assert report.main(["--check"], tmp_path) == 0


def test_a_rival_is_shown_at_the_budget_or_just_below_it() -> None:
    runs = [run("r", str(size), 1, size, 0.5) for size in (5, 9.5, 11, 20)]
    assert [shown["bytes_per_vector"] for shown in tables.at_budget(runs, 10)] == [9.5, 11]
    assert [shown["bytes_per_vector"] for shown in tables.at_budget(runs, 12)] == [11]
    assert [shown["bytes_per_vector"] for shown in tables.at_budget(runs, 15)] == [20]
    assert tables.at_budget(runs, 30) == []


def test_of_equal_bytes_the_better_is_shown() -> None:
    runs = [run("r", "worse", 3, 10, 0.5), run("r", "better", 4, 10, 0.6)]
    for budget in (10, 10.5):
        assert [shown["setting"] for shown in tables.at_budget(runs, budget)] == ["better"]


def test_the_table_of_training_names_the_best_rival_of_nearly_the_same_bytes() -> None:
    runs = [
        *RESULT["runs"],
        run("TurboQuant trained", "1 bit", 1, 10, 0.7),
        run("TurboQuant trained trellis", "1 bit", 1, 10, 0.75),
        run("near", "n", 1, 11.5, 0.62),
        run("far", "f", 1, 11.6, 0.99),
    ]
    text = tables.trained({"search-tiny": RESULT | {"runs": runs}, "distortion": {}})
    assert text is not None
    assert text.splitlines()[2:] == [
        "| tiny | 1 | 10 | 0.600 | 0.700 |  | 0.750 | 0.620 | near, 11.5 B |",
        "|  | 2.5 | 22 | 0.800 |  |  |  | 0.990 | far, 11.6 B |",
        "|  | 4 | 34 | 0.951 |  |  |  | 0.990 | far, 11.6 B |",
    ]
    assert tables.trained({"distortion": {}}) is None


def test_the_gpu_table_puts_pq_of_as_many_bytes_after_each_width() -> None:
    rows = [[1, "no", 10, 0.6, 0.61, 0.2, 1000, 20000, 300000], [1, "yes", 10, 0.7, 0.71, 0.2, 1000, 20000, 300000]]
    lines = tables.gpu({"environment": ENVIRONMENT, "rows": rows}, RESULT).splitlines()
    assert lines[2] == "| TurboQuant, 1 bit | GPU | 10 | 0.600 | 0.610 | 0.2 | 1,000 | 20,000 | 300,000 |"
    assert lines[3].startswith("| TurboQuant centred, 1 bit | GPU | 10 | 0.700 | 0.710 ")
    assert lines[4] == "| FAISS PQ, `PQ10x8` | CPU | 10 | 0.610 |  | 12 | 12 | 346 | 123,000 |"
    assert len(lines) == 7
    alone = tables.gpu({"environment": ENVIRONMENT, "rows": rows}, None)
    assert "FAISS" not in alone
