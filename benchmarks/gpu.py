"""`python -m benchmarks gpu --dataset NAME_OR_PATH`: the index on a GPU: recall with int8 and exact queries, and speed.

Queries a second are of `TurboQuantIndex.search` from numpy to numpy, by the clock, the median of calls; its table puts
FAISS PQ at the same bytes beside it, on the CPU and threads of `python -m benchmarks search`: for scale, not as a race.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.environment import environment
from benchmarks.metrics import recalls
from benchmarks.result_file import KERNEL_RESULTS, write
from tqsearch import TurboQuantIndex
from tqsearch.datasets import Dataset, load_dataset
from tqsearch.demo import unit_rows

BITS = (1, 2, 3, 4)
BATCHES = (1, 32, 1000)
K = 10
COLUMNS = (
    "bits",
    "centred",
    "bytes",
    "recall 10@10",
    "with exact queries",
    "add s",
    "queries/s, 1 at a time",
    "by 32",
    "by 1000",
)


def per_second(index: TurboQuantIndex, queries: Any, batch: int) -> float:
    """Queries a second at a batch size, after two calls that do not count."""
    pool = np.resize(queries, (max(batch, len(queries)), queries.shape[1]))
    times = []
    for call in range(32):
        first = call * batch % (len(pool) - batch + 1)
        begin = time.perf_counter()
        index.search(pool[first : first + batch], K)
        times.append(time.perf_counter() - begin)
    return batch / statistics.median(times[2:])


def rows_of(data: Dataset, seed: int) -> list[list[Any]]:
    """A row for each width, with and without a centre."""
    train, test = unit_rows(data.train, data.metric), unit_rows(data.test, data.metric)
    truth = data.ground_truth(K)
    rows: list[list[Any]] = []
    for bits in BITS:
        for centred in (False, True):
            index = TurboQuantIndex(data.dim, bits, data.metric, "cuda", seed)
            if centred:
                index.train(train, learn="centre")
            begin = time.perf_counter()
            index.add(train)
            torch.cuda.synchronize()
            added = time.perf_counter() - begin
            found = {p: np.asarray(index.search(test, K, precision=p)[1]) for p in ("int8", "exact")}
            recall = {p: round(recalls(ids, truth)["10@10"], 4) for p, ids in found.items()}
            speeds = [round(per_second(index, test, batch)) for batch in BATCHES]
            shown = ["yes" if centred else "no", index.bytes_per_vector, recall["int8"], recall["exact"]]
            rows.append([bits, *shown, round(added, 3), *speeds])
    return rows


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__)
    parser.add_argument("--dataset", default="synthetic-embeddings", help="a name of tqsearch.datasets, or a file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=KERNEL_RESULTS, help="folder of the JSON file")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks gpu needs a CUDA GPU, and torch sees none")
        return 1
    data = load_dataset(options.dataset)
    result = {
        "benchmark": "gpu",
        "environment": environment(options.seed),
        "dataset": data.name,
        "columns": list(COLUMNS),
        "rows": rows_of(data, options.seed),
    }
    write(options.out / f"gpu-{data.name}.json", result)
    for row in result["rows"]:
        print("  ".join(f"{cell!s:>8}" for cell in row))
    return 0
