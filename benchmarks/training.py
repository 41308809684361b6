"""`python -m benchmarks training`: learnt axes and trellis codes on a GPU: training, adding, scanning, and int8 recall.

The vectors are 1,000,000 x 1,024 Gaussians whose variance along coordinate i is 1 / i; axes are learnt from 100,000 of
them. Training and adding are by the clock, from vectors on the GPU. The scan is `kernels.scan`, replayed from a CUDA
graph, beside that of an untrained index of the same bytes. What compiles is run before on few rows. The rival in
training is product quantization at the same bytes, its k-means in torch on the same GPU.

With `--dataset` the recall of trained indexes: queries and levels rounded to int8 on the GPU, and exact on the CPU.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.environment import environment
from benchmarks.kernels import milliseconds, replayed
from benchmarks.metrics import recalls
from benchmarks.result_file import KERNEL_RESULTS, write
from tqsearch import TurboQuantIndex, kernels
from tqsearch.blocks import encode_blocks
from tqsearch.codec import Codec
from tqsearch.datasets import Dataset, load_dataset
from tqsearch.demo import unit_rows
from tqsearch.estimator import Estimator
from tqsearch.recipe import Recipe
from tqsearch.segments import Columns

COUNT, DIM, SAMPLE = 1_000_000, 1024, 100_000
BATCHES = (16, 256)
WIDTHS = (4, 2, 1)
K = 10
FEW = 1 << 14  # rows that compile what all rows need
PQ_ITERATIONS = 10
PQ_BLOCK = 20_000
COLUMNS = (
    "codec",
    "trained",
    "bits",
    "bytes",
    "train s",
    "add s",
    *(f"scan by {batch}, ms" for batch in BATCHES),
    *(f"of untrained scalar, by {batch}" for batch in BATCHES),
)
RECALL_COLUMNS = ("codec", "bits", "bytes", "int8, GPU", "exact, CPU")


@dataclass(frozen=True)
class Setting:
    """An index of the benchmark."""

    codec: Codec
    trained: bool
    bits: int

    def estimator(self, rows: Tensor) -> Estimator:
        """The codec, trained on rows if it is to be."""
        recipe = Recipe(rows.shape[1], self.bits, "cosine", "hadamard", 0, self.codec, "auto")
        sample = recipe.sample(rows, "sample", rows.device)
        return recipe.taught(sample, None, axes=True) if self.trained else recipe.estimator()


SETTINGS = (
    *(Setting("scalar", trained, bits) for trained in (False, True) for bits in WIDTHS),
    *(Setting("trellis", False, bits) for bits in WIDTHS),
    Setting("trellis", True, 2),
)


def vectors(count: int, seed: int) -> Tensor:
    """(count, DIM) float32 on the GPU."""
    generator = torch.Generator("cuda").manual_seed(seed)
    rows = torch.empty((count, DIM), device="cuda")
    deviations = torch.arange(1, DIM + 1, device="cuda") ** -0.5
    for block in torch.split(rows, SAMPLE):
        block.normal_(generator=generator).mul_(deviations)
    return rows


def scanning(estimator: Estimator, columns: Columns, queries: Tensor) -> Callable[[], object]:
    """The scan of encoded rows by queries, as an action."""
    scanned = estimator.scanned(queries).queries
    tables = estimator.quantizer.tables(queries.device)
    return lambda: kernels.scan(scanned, columns["packed"], columns["scales"], columns.get("bias"), None, tables, K)


def seconds(action: Callable[[], Any]) -> tuple[float, Any]:
    """By the clock, with what the action returns."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    result = action()
    torch.cuda.synchronize()
    return time.perf_counter() - begin, result


def speed_row(
    setting: Setting, estimator: Estimator, train: float, rows: Tensor, untrained: dict[int, list[float]]
) -> list[Any]:
    """One row; the scans' times of the untrained scalar codes are put into `untrained`, by bits."""
    encode_blocks(rows[:FEW], rows.device, estimator.encode)  # compiles
    add, columns = seconds(lambda: encode_blocks(rows, rows.device, estimator.encode))
    times = []
    for batch in BATCHES:
        action = scanning(estimator, columns, vectors(batch, 1))
        milliseconds(action, 0.05)
        times.append(replayed(action))
    if setting.codec == "scalar" and not setting.trained:
        untrained[setting.bits] = times
    ratios = [round(ours / theirs, 2) for ours, theirs in zip(times, untrained[setting.bits], strict=True)]
    named = [setting.codec, "yes" if setting.trained else "no", setting.bits, estimator.bytes_per_vector]
    return [*named, round(train, 2), round(add, 2), *(round(ms, 3) for ms in times), *ratios]


def nearest(rows: Tensor, centroids: Tensor) -> Tensor:
    """The nearest of 256 centroids in each part of each row: (n, d) and (parts, 256, d / parts) to (parts, n)."""
    parts = rows.reshape(len(rows), len(centroids), -1).transpose(0, 1)
    return torch.baddbmm(centroids.square().sum(2)[:, None], parts, centroids.transpose(1, 2), alpha=-2).argmin(2)


def product_quantizer(sample: Tensor, parts: int) -> Tensor:
    """Centroids by k-means in each part of the coordinates, from 256 random rows: (parts, 256, d / parts)."""
    first = sample[torch.randperm(len(sample), device=sample.device)[:256]]
    centroids = first.reshape(256, parts, -1).transpose(0, 1).contiguous()
    for _ in range(PQ_ITERATIONS):
        total, count = torch.zeros_like(centroids), torch.zeros_like(centroids[:, :, :1])
        for block in torch.split(sample, PQ_BLOCK):
            codes = nearest(block, centroids)[:, :, None]
            total.scatter_add_(
                1, codes.expand(-1, -1, centroids.shape[2]), block.reshape(len(block), parts, -1).transpose(0, 1)
            )
            count.scatter_add_(1, codes, torch.ones_like(codes, dtype=count.dtype))
        centroids = torch.where(count > 0, total / count.clamp(min=1), centroids)
    return centroids


def pq_row(bits: int, rows: Tensor) -> list[Any]:
    """Training and coding by product quantization of `bits` a coordinate."""
    parts = DIM * bits // 8
    product_quantizer(rows[:PQ_BLOCK], parts)  # the first call prepares the libraries
    train, centroids = seconds(lambda: product_quantizer(rows[:SAMPLE], parts))
    add, _ = seconds(lambda: [nearest(block, centroids).to(torch.uint8) for block in torch.split(rows, PQ_BLOCK)])
    return [f"PQ, {parts} x 8", "yes", bits, parts, round(train, 2), round(add, 2), *[None] * (2 * len(BATCHES))]


def speed(settings: tuple[Setting, ...], keep: Callable[[list[list[Any]]], None]) -> None:
    """The rows of the settings, and of product quantization; what is measured is given to `keep` row by row."""
    rows = vectors(COUNT, 0)
    for setting in settings:
        setting.estimator(rows[:FEW])  # compiles, and the first calls prepare libraries
    table: list[list[Any]] = []
    untrained: dict[int, list[float]] = {}
    for setting in settings:
        train, estimator = seconds(partial(setting.estimator, rows[:SAMPLE]))
        table.append(speed_row(setting, estimator, train if setting.trained else 0, rows, untrained))
        keep(table)
    for bits in WIDTHS:
        table.append(pq_row(bits, rows))
        keep(table)


def recall_row(data: Dataset, codec: Codec, bits: int) -> list[Any]:
    """Recall 10@10 of a trained index on the GPU, and of the same codes on the CPU."""
    train, test = unit_rows(data.train, data.metric), unit_rows(data.test, data.metric)
    truth = data.ground_truth(K)
    index = TurboQuantIndex(data.dim, bits, data.metric, "cuda", codec=codec)
    index.train(train)
    index.add(train)
    found = [recalls(np.asarray(index.search(test, K)[1]), truth)["10@10"]]
    found.append(recalls(np.asarray(index.to("cpu").search(test, K)[1]), truth)["10@10"])
    return [codec, bits, index.bytes_per_vector, *(round(value, 4) for value in found)]


def recall(data: Dataset) -> list[list[Any]]:
    """`recall_row` at every width."""
    codecs: tuple[Codec, ...] = ("scalar", "trellis")
    return [recall_row(data, codec, bits) for codec in codecs for bits in reversed(WIDTHS)]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks training", description=__doc__)
    parser.add_argument("--dataset", help="a name of tqsearch.datasets, or a file: its recall, and no speed")
    parser.add_argument("--out", type=Path, default=KERNEL_RESULTS, help="folder of the JSON file")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks training needs a CUDA GPU, and torch sees none")
        return 1

    def keep(rows: list[list[Any]]) -> None:
        print(*rows[-1], flush=True)
        result = {"environment": environment(0), "columns": columns, "rows": rows}
        write(options.out / f"{name}.json", result)

    name, columns = "training", list(COLUMNS)
    if options.dataset:
        data = load_dataset(options.dataset)
        name, columns = f"training-{data.name}", list(RECALL_COLUMNS)
        keep(recall(data))
    else:
        speed(SETTINGS, keep)
    return 0
