"""`python -m benchmarks search`: recall, bytes and speed of every contestant at equal bytes per vector."""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.contestants import FAMILIES, Problem, plan
from benchmarks.environment import REPOSITORY, environment
from benchmarks.metrics import recalls
from benchmarks.result_file import RESULTS, replace
from benchmarks.tables import OURS
from benchmarks.threads import usable_cores
from tqsearch.datasets import Dataset, load_dataset
from tqsearch.demo import first_queries, unit_rows

DEPTH = 100
SEED = 0
BUSY = "train and add in seconds of the processor, searches timed in an earlier run"


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much is done; stated in the result."""

    base_rows: int | None
    queries: int
    training_rows: int
    pq_iterations: int
    time_limit: int


FULL = Effort(base_rows=None, queries=1000, training_rows=12_000, pq_iterations=10, time_limit=1200)
QUICK = Effort(base_rows=20_000, queries=200, training_rows=10_000, pq_iterations=5, time_limit=300)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks search", description=__doc__)
    parser.add_argument("--dataset", default="synthetic-embeddings", help="a name of tqsearch.datasets, or a file")
    parser.add_argument(
        "--quick", action="store_true", help="20,000 rows, 200 queries, fewer contestants: a few minutes"
    )
    parser.add_argument("--threads", type=int, default=usable_cores(), help="for all contestants; all cores by default")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    parser.add_argument("--only", action="append", choices=list(FAMILIES), help="run only this family; may be repeated")
    parser.add_argument(
        "--update", action="store_true", help="with --only: measure these families again, keep the file's other rows"
    )
    parser.add_argument(
        "--keep-times", action="store_true", help="with --update, on a busy machine: times of searches there are stay"
    )
    parser.add_argument(
        "--bits", type=float, action="append", help="run TurboQuant only at this width; may be repeated"
    )
    options = parser.parse_args(arguments)
    if options.update and not options.only:
        parser.error("--update needs --only: which families to measure again")
    if options.keep_times and not options.update:
        parser.error("--keep-times needs --update")
    return options


def smaller(data: Dataset, effort: Effort) -> Dataset:
    """The first rows and queries; the stored neighbours do not hold for fewer rows."""
    queries = min(effort.queries, len(data.test))
    if effort.base_rows is not None and effort.base_rows < len(data.train):
        train, test = data.train[: effort.base_rows], data.test[:queries]
        return dataclasses.replace(data, train=train, test=test, neighbors=None, distances=None)
    return first_queries(data, queries)


def run_one(job: dict[str, Any], folder: Path, name: str, limit: int) -> dict[str, Any]:
    """The raw row of one contestant with its recall, or a row with `error`."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps(job))
    command = [sys.executable, "-m", "benchmarks.worker", str(path)]
    try:
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"stopped after {limit} seconds"}
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING clustering")]
        return {"error": f"exit status {done.returncode}: " + (last[-1][-300:] if last else "no message")}
    row: dict[str, Any] = json.loads(path.with_suffix(".out.json").read_text())
    row["recall"] = recalls(np.load(path.with_suffix(".ids.npy")), np.load(job["truth"]))
    return row


def save(path: Path, result: dict[str, Any]) -> None:
    """Write a result, each run on a line of its own: lists of times are long."""
    rest = {name: value for name, value in result.items() if name != "runs"}
    head = json.dumps(rest | {"runs": []}, indent=1)
    runs = ",\n".join("  " + json.dumps(run) for run in result["runs"])
    replace(path, head.removesuffix("[]\n}") + f"[\n{runs}\n ]\n}}\n")


def describe(row: dict[str, Any]) -> str:
    """One line for the terminal."""
    title = f"{row['family']:<24}{row['setting']:<18}"
    if "error" in row:
        return f"{title}FAILED: {row['error']}"
    recall, qps = row["recall"], row["qps"]
    ten = recall.get("10@10", float("nan"))
    return (
        f"{title}{row['bytes_per_vector']:>7g} B  10@10 {ten:.4f}  1@1 {recall['1@1']:.4f}"
        f"  train {row['train_seconds']:>7.2f} s  add {row['add_seconds']:>6.2f} s"
        f"  queries/s {qps['1']:>7.0f} {qps['32']:>7.0f} {qps['1000']:>7.0f}"
    )


def main(arguments: list[str]) -> int:
    from tqdm import tqdm

    options = parse(arguments)
    effort = QUICK if options.quick else FULL
    data = smaller(load_dataset(options.dataset), effort)
    budgets, runs, left_out = plan(data.dim, data.metric, quick=options.quick)
    problem = Problem(data.dim, data.metric, SEED, effort.pq_iterations)
    result: dict[str, Any] = {
        "benchmark": "search",
        "environment": environment(SEED) | {"threads": options.threads},
        "dataset": {
            "name": data.name,
            "metric": data.metric,
            "dim": data.dim,
            "vectors": len(data.train),
            "queries": len(data.test),
        },
        "effort": dataclasses.asdict(effort) | {"quick": options.quick},
        "budgets": {f"{width:g}": size for width, size in budgets.items()},
        "left_out": left_out,
        "notes": {name: FAMILIES[name].note for name, _ in runs if FAMILIES[name].note},
        "runs": [],
    }
    target = options.out / f"search-{data.name}{'-quick' if options.quick else ''}.json"
    old: list[dict[str, Any]] = []
    timed: dict[tuple[str, str], dict[str, Any]] = {}  # rows whose times stay
    if options.update:
        before = json.loads(target.read_text())
        old = [row for row in before["runs"] if row["family"] not in options.only]
        timed = {(row["family"], row["setting"]): row for row in before["runs"] if options.keep_times}
        made = result["environment"] | ({"times": BUSY} if options.keep_times else {})
        again = before.get("again", {}) | dict.fromkeys(options.only, made)
        result |= {"environment": before["environment"], "again": again, "notes": before["notes"] | result["notes"]}
    runs = [run for run in runs if not options.only or run[0] in options.only]
    runs = [run for run in runs if not options.bits or run[0] not in OURS or run[1] in options.bits]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        files: dict[str, NDArray[Any]] = {
            "train": unit_rows(data.train, data.metric),
            "test": unit_rows(data.test, data.metric),
            "truth": data.ground_truth(min(DEPTH, len(data.train))),
        }
        for name, array in files.items():
            np.save(folder / f"{name}.npy", array)
        job = {name: str(folder / f"{name}.npy") for name in files} | {
            "problem": dataclasses.asdict(problem),
            "training_rows": effort.training_rows,
            "threads": options.threads,
            "k": DEPTH,
        }
        del files
        bar = tqdm(runs, unit="run", disable=None)
        for number, (name, setting) in enumerate(bar):
            label = FAMILIES[name].label(setting)
            bar.set_description(f"{name} {label}")
            times = timed.get((name, label), {})
            asked = {"family": name, "setting": setting, "timed": "qps" not in times}
            measured = run_one(job | asked, folder, str(number), effort.time_limit)
            row = {"family": name, "setting": label, "parameter": setting} | times | measured
            result["runs"].append(row)
            save(target, result | {"runs": [*result["runs"], *old]})
            tqdm.write(describe(row))
        result["runs"] += old
    return summary(result, target)


def summary(result: dict[str, Any], target: Path) -> int:
    """Say where the result is and what went wrong; the exit status."""
    for name, reason in result["left_out"].items():
        print(f"left out: {name}: {reason}")
    failed = [row for row in result["runs"] if "error" in row]
    print(f"{len(result['runs'])} runs, written to {target}")
    for row in failed:
        print(describe(row), file=sys.stderr)
    if failed:
        print(f"{len(failed)} of {len(result['runs'])} runs failed", file=sys.stderr)
    return 1 if failed else 0
