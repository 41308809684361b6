"""One contestant at one setting, in a process of its own: `python -m benchmarks.worker JOB.json`.

A process each keeps the thread pools of torch, FAISS and turbovec apart, gives the memory back, and turns a crash in
native code into an error row. The job is a JSON file; the results are `JOB.out.json` (times) and `JOB.ids.npy` (ids).
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contestants import FAMILIES, Problem
from benchmarks.engines import Engine, Ids, Vectors
from benchmarks.threads import pin_loaded, pools

BATCHES = (1, 32, 1000)
MOST_CALLS = {1: 200, 32: 30, 1000: 3}
SECONDS_PER_BATCH = 2.0  # no new call is started after this
SEARCH_ROWS = 250
K = 10


def seconds(action: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    action()
    return clock() - start


def time_calls(engine: Engine, queries: Vectors, batch: int) -> list[float]:
    """Seconds of every call with a batch of queries and k = 10, after one call that does not count."""
    pool = np.ascontiguousarray(np.resize(queries, (max(batch, len(queries)), queries.shape[1])))
    engine.search(pool[: min(batch, 32)], K)
    times: list[float] = []
    while len(times) < MOST_CALLS[batch] and sum(times) < SECONDS_PER_BATCH:
        start = (len(times) * batch) % (len(pool) - batch + 1)
        chunk = pool[start : start + batch]
        times.append(seconds(lambda chunk=chunk: engine.search(chunk, K)))  # type: ignore[misc]
    return times


def find(engine: Engine, queries: Vectors, k: int) -> Ids:
    """The ids of the k best of every query, (q, k), searched in blocks."""
    blocks = [engine.search(queries[start : start + SEARCH_ROWS], k) for start in range(0, len(queries), SEARCH_ROWS)]
    return np.concatenate(blocks)


def run(job: dict[str, Any]) -> tuple[dict[str, Any], Ids]:
    """Train, add, search, time.

    Args:
        job: `family`, `setting`, `problem`, `train` and `test` (files of float32), `training_rows`, `k`, `threads`, and
            `timed`: False on a busy machine: searches are not timed, and seconds are those of the processor.

    Returns:
        The raw row and the ids found.
    """
    problem = Problem(**job["problem"])
    family = FAMILIES[job["family"]]
    train, test = np.load(job["train"]), np.load(job["test"])
    rows = min(len(train), job["training_rows"]) if family.trained else len(train)
    chosen = np.sort(np.random.default_rng(problem.seed).permutation(len(train))[:rows])
    sample = np.ascontiguousarray(train[chosen]) if rows < len(train) else train
    engine = family.build(problem, job["setting"])
    pin_loaded(job["threads"])
    clock = time.perf_counter if job["timed"] else time.process_time
    train_seconds = seconds(lambda: engine.train(sample), clock)
    add_seconds = seconds(lambda: engine.add(train), clock)
    found = find(engine, test, min(job["k"], len(train)))
    row: dict[str, Any] = {
        "bytes_per_vector": engine.bytes_per_vector,
        "training_rows": rows if family.trained else None,
        "train_seconds": round(train_seconds, 4),
        "add_seconds": round(add_seconds, 4),
    }
    if not job["timed"]:
        return row, found
    calls = {batch: time_calls(engine, test, batch) for batch in BATCHES}
    row |= {
        "call_seconds": {str(batch): [float(f"{value:.4g}") for value in times] for batch, times in calls.items()},
        "qps": {str(batch): round(batch / statistics.median(times), 1) for batch, times in calls.items()},
        "pools": pools(),
    }
    return row, found


def main(path: Path) -> None:
    row, found = run(json.loads(path.read_text()))
    np.save(path.with_suffix(".ids.npy"), found.astype(np.int32))
    path.with_suffix(".out.json").write_text(json.dumps(row))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
