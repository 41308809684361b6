import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks import search
from benchmarks.environment import environment
from benchmarks.metrics import RECALLS, recalls
from benchmarks.threads import environment_variables, requested_threads, usable_cores
from benchmarks.worker import BATCHES

pytest.importorskip("faiss")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    np.save(tmp_path / "small-base.npy", generator.standard_normal((300, 32), dtype=np.float32))
    return tmp_path


def no_paths(value: Any) -> bool:
    if isinstance(value, dict):
        return all(no_paths(key) and no_paths(item) for key, item in value.items())
    if isinstance(value, list):
        return all(no_paths(item) for item in value)
    return not (isinstance(value, str) and value.startswith("/"))


def as_data(monkeypatch: pytest.MonkeyPatch, rows: np.ndarray, metric: str = "cosine") -> None:
    from tqsearch.datasets import Dataset

    data = Dataset(name="small", metric=metric, train=rows, test=rows[:20].copy())  # type: ignore[arg-type]
    monkeypatch.setattr(search, "load_dataset", lambda _: data)


def test_the_result_file(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    as_data(monkeypatch, np.load(folder / "small-base.npy"))
    monkeypatch.setattr(search, "plan", lambda *_, **__: ({1: 6}, [("exact", 32), ("FAISS SQ", 4)], {"x": "why"}))
    assert search.main(["--quick", "--threads", "1", "--out", str(folder)]) == 0
    result = json.loads((folder / "search-small-quick.json").read_text())
    assert result["dataset"] == {"name": "small", "metric": "cosine", "dim": 32, "vectors": 300, "queries": 20}
    assert {"device", "cores", "threads", "python", "versions", "seed", "commit", "date"} <= set(result["environment"])
    assert result["environment"]["threads"] == 1
    assert no_paths(result)
    exact, scalar = result["runs"]
    assert exact["recall"] == dict.fromkeys(RECALLS, 1.0)
    assert scalar["bytes_per_vector"] == 16
    assert scalar["setting"] == "SQ4"
    for run in (exact, scalar):
        assert set(run["qps"]) == set(run["call_seconds"]) == {str(batch) for batch in BATCHES}
        assert all(rate > 0 for rate in run["qps"].values())
    assert "left out: x: why" in capsys.readouterr().out


def test_a_data_set_that_is_not_there_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "pin", lambda _: None)  # of this process
    assert command.main(["search", "--threads", "1", "--dataset", "no-such-set"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("benchmarks search: no data set is called 'no-such-set'")
    assert said.count("\n") == 1


def test_a_crash_is_a_row_and_a_failure(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    as_data(monkeypatch, np.load(folder / "small-base.npy"))
    runs = [("FAISS SQ", 5), ("exact", 32)]
    monkeypatch.setattr(search, "plan", lambda *_, **__: ({1: 6}, runs, {}))
    crash = [sys.executable, "-c", "import os, sys; print('the reason', file=sys.stderr); os.abort()"]
    real = search.subprocess.run

    def first_crashes(command: list[str], **options: Any) -> Any:
        return real(crash if command[-1].endswith("/0.json") else command, **options)

    monkeypatch.setattr(search.subprocess, "run", first_crashes)
    assert search.main(["--quick", "--out", str(folder)]) == 1
    failed, fine = json.loads((folder / "search-small-quick.json").read_text())["runs"]
    assert "the reason" in failed["error"]
    assert "recall" in fine
    assert "1 of 2 runs failed" in capsys.readouterr().err


def test_update_measures_the_families_named_and_keeps_the_rest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_data(monkeypatch, np.load(folder / "small-base.npy"))
    runs = [("TurboQuant", 1), ("exact", 32)]
    monkeypatch.setattr(search, "plan", lambda *_, **__: ({1: 6}, runs, {}))
    assert search.main(["--quick", "--out", str(folder)]) == 0
    path = folder / "search-small-quick.json"
    before = json.loads(path.read_text())
    kept = {**before["runs"][0], "add_seconds": 99.0}
    path.write_text(json.dumps(before | {"runs": [kept, {**before["runs"][1], "recall": {}}]}))
    assert search.main(["--quick", "--out", str(folder), "--only", "exact", "--update"]) == 0
    after = json.loads(path.read_text())
    assert {row["family"]: row for row in after["runs"]}["TurboQuant"] == kept
    assert {row["family"]: row for row in after["runs"]}["exact"]["recall"] == before["runs"][1]["recall"]
    assert list(after["again"]) == ["exact"]
    with pytest.raises(SystemExit):
        search.main(["--quick", "--out", str(folder), "--update"])


def test_kept_times_and_those_there_are_none_to_keep(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_data(monkeypatch, np.load(folder / "small-base.npy"))
    monkeypatch.setattr(search, "plan", lambda *_, **__: ({1: 6}, [("FAISS SQ", 4)], {}))
    assert search.main(["--quick", "--out", str(folder)]) == 0
    path = folder / "search-small-quick.json"
    before = json.loads(path.read_text())
    kept = {**before["runs"][0], "qps": {str(batch): 77.0 for batch in BATCHES}, "recall": {}}
    path.write_text(json.dumps(before | {"runs": [kept]}))
    monkeypatch.setattr(search, "plan", lambda *_, **__: ({1: 6}, [("FAISS SQ", 4), ("FAISS SQ", 8)], {}))
    assert search.main(["--quick", "--out", str(folder), "--only", "FAISS SQ", "--update", "--keep-times"]) == 0
    again, new = json.loads(path.read_text())["runs"]
    assert (again["qps"], again["recall"]) == (kept["qps"], before["runs"][0]["recall"])
    assert set(new["qps"]) == {str(batch) for batch in BATCHES}
    assert 77.0 not in new["qps"].values()


def test_recalls_of_narrow_results() -> None:
    ids = np.arange(40).reshape(2, 20)
    assert recalls(ids, ids) == {"1@1": 1.0, "1@10": 1.0, "10@10": 1.0}


def test_fewer_rows_forget_the_stored_neighbours() -> None:
    from tqsearch.datasets import Dataset

    rows = np.eye(30, dtype=np.float32)
    data = Dataset("x", "ip", rows, rows, neighbors=np.arange(30)[:, None])
    effort = search.Effort(base_rows=10, queries=5, training_rows=1, pq_iterations=1, time_limit=1)
    less = search.smaller(data, effort)
    assert less.neighbors is None
    assert (len(less.train), len(less.test)) == (10, 5)
    kept = search.smaller(data, search.Effort(None, 5, 1, 1, 1))
    assert kept.neighbors is not None
    assert len(kept.neighbors) == len(kept.test) == 5


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [(["--threads", "3"], 3), (["--quick", "--threads=5"], 5), ([], None), (["--threads", "none"], None)],
)
def test_threads_are_read_before_the_parser(arguments: list[str], expected: int | None) -> None:
    assert requested_threads(arguments) == (expected or usable_cores())


def test_every_pool_is_pinned() -> None:
    variables = environment_variables(7)
    assert {variables[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")} == {"7"}
    assert variables["OPENBLAS_NUM_THREADS"] == "1"


def test_the_environment_is_plain_json() -> None:
    record = environment(seed=5)
    assert json.loads(json.dumps(record)) == record
    assert record["seed"] == 5
    assert record["versions"]["numpy"] == np.__version__
    assert no_paths(record)
