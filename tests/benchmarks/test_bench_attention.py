"""What the report makes of the results of `benchmarks attention`."""

import json
from pathlib import Path

import pytest

from benchmarks import report

ENVIRONMENT = {"device": "a CPU + a GPU", "threads": 2, "versions": {}, "commit": "abc", "date": "2026-01-01"}
COLUMNS = ["batch", "tokens", "codes", "ours, ms", "least, ms", "dense, ms"]
ROWS = [
    [8, tokens, codes, round(0.01 + tokens * bits / 3e7, 4), round(tokens * bits / 4e7, 4), round(tokens / 1e5, 4)]
    for tokens in (1024, 2048, 4096)
    for codes, bits in (("K4V4", 4), ("K2V2", 2))
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "benchmarks" / "results" / "kernels"
    folder.mkdir(parents=True)
    result = {"environment": ENVIRONMENT, "copy, TB/s": 4.2, "columns": COLUMNS, "rows": ROWS}
    (folder / "attention-context.json").write_text(json.dumps(result))
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "attention.md").write_text("# B\n<!-- table:attention-context -->\n<!-- end -->\n")
    return tmp_path


def test_the_table_and_the_figure_come_from_the_result(root: Path) -> None:
    assert report.main([], root) == 0
    page = (root / "docs" / "attention.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith("| 8 ")]
    assert len(lines) == len(ROWS)
    assert [cell.strip() for cell in lines[0].strip("|").split("|")][2:] == ["K4V4", "0.0101", "0.0001", "0.0102"]
    assert (root / "docs" / "figures" / "attention-context.png").read_bytes().startswith(b"\x89PNG")
    assert report.main(["--check"], root) == 0


def test_a_missing_figure_is_named(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report.main([], root)
    (root / "docs" / "figures" / "attention-context.png").unlink()
    assert report.main(["--check"], root) == 1
    assert "docs/figures/attention-context.png is missing" in capsys.readouterr().err


def test_every_width_and_its_limit_are_drawn(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib.axes

    drawn: list[tuple[list[float], list[float]]] = []
    plot = matplotlib.axes.Axes.plot

    def recorded(axes, x, y, *rest, **more):  # type: ignore[no-untyped-def]
        drawn.append((list(x), list(y)))
        return plot(axes, x, y, *rest, **more)

    monkeypatch.setattr(matplotlib.axes.Axes, "plot", recorded)
    report.main([], root)
    for codes in ("K4V4", "K2V2"):
        for column in ("ours, ms", "least, ms"):
            mine = [row for row in ROWS if row[2] == codes]
            curve = [row[1] for row in mine], [1e3 * row[COLUMNS.index(column)] for row in mine]
            assert curve in drawn
