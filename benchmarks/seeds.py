"""`python -m benchmarks seeds --dataset NAME`: what training gains on a set of few queries, and how far that is chance.

Vectors and queries are put together and parted anew, at random, as many queries as the set has; each split has a seed
of its own for the rotation. Recall 10@10 of an index without and with training, means over the splits, and the mean
difference with its standard error over the splits.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.environment import environment
from benchmarks.metrics import recalls
from benchmarks.result_file import RESULTS, write
from tqsearch import TurboQuantIndex
from tqsearch.codec import Codec
from tqsearch.datasets import Dataset, load_dataset
from tqsearch.datasets.truth import exact_neighbors
from tqsearch.demo import unit_rows

K = 10
COLUMNS = ("codec", "bits", "untrained", "trained", "gain", "its standard error")
CODECS: tuple[Codec, ...] = ("scalar", "trellis")
WIDTHS = (1, 2, 3, 3.5, 4)


def gain(data: Dataset, codec: Codec, bits: float, split: int) -> tuple[float, float]:
    """Recall without and with training, of one split."""
    everything = unit_rows(np.concatenate([data.train, data.test]), data.metric)
    order = np.random.default_rng(split).permutation(len(everything))
    queries, vectors = everything[order[: len(data.test)]], everything[order[len(data.test) :]]
    truth = exact_neighbors(vectors, queries, K, data.metric)
    found = []
    for trained in (False, True):
        index = TurboQuantIndex(data.dim, bits, data.metric, seed=split, codec=codec)
        if trained:
            index.train(vectors)
        index.add(vectors)
        found.append(recalls(np.asarray(index.search(queries, K)[1]), truth)["10@10"])
    return found[0], found[1]


def row(data: Dataset, codec: Codec, bits: float, splits: int) -> list[Any]:
    """One row of the table."""
    pairs = [gain(data, codec, bits, split) for split in range(splits)]
    without, trained = (statistics.mean(pair[side] for pair in pairs) for side in (0, 1))
    error = statistics.stdev(pair[1] - pair[0] for pair in pairs) / splits**0.5
    return [codec, bits, *(round(value, 4) for value in (without, trained, trained - without, error))]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks seeds", description=__doc__)
    parser.add_argument("--dataset", required=True, help="a name of tqsearch.datasets, or a file")
    parser.add_argument("--splits", type=int, default=24, help="at least 2 (default 24)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    options = parser.parse_args(arguments)
    data = load_dataset(options.dataset)
    table: list[list[Any]] = []
    for codec, bits in tqdm([(codec, bits) for codec in CODECS for bits in WIDTHS], disable=None):
        table.append(row(data, codec, bits, options.splits))
        print(*table[-1], flush=True)
        result = {"environment": environment(0), "splits": options.splits, "columns": list(COLUMNS), "rows": table}
        write(options.out / f"seeds-{data.name}.json", result)
    return 0
