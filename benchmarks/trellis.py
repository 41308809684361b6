"""Trellis-coded beside scalar levels: squared error and recall at equal bytes: `python -m benchmarks.trellis SET ...`.

Both codes get the same rotated vectors, the same unbiased scale a vector (float16 for cosine) and float32 queries, so
that only the levels differ. The error is of coordinates of variance 1. `--fit` finds the levels of `tqsearch.trellis`
anew: Lloyd's iteration (code a sample, move each level to the mean of what is coded to it), then rounding to half
integers.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tqsearch import trellis
from tqsearch.codebook import lloyd_max
from tqsearch.datasets import Dataset, load_dataset
from tqsearch.datasets.truth import exact_neighbors
from tqsearch.recall import recall
from tqsearch.rotation import Hadamard

Levels = Callable[[Tensor], Tensor]


def scalar_levels(bits: int, dim: int) -> Levels:
    """The nearest Lloyd-Max level of each value."""
    book = lloyd_max(bits, dim)
    boundaries, levels = torch.from_numpy(book.boundaries).float(), torch.from_numpy(book.levels).float()
    return lambda values: levels[torch.bucketize(values, boundaries)]


def trellis_levels(bits: int) -> Levels:
    """The levels of the nearest walk."""
    return lambda values: trellis.decode(trellis.encode(values, bands := [(values.shape[1], bits)]), bands)


def compare(data: Dataset, rows: int, queries: int, centred: bool) -> None:
    """Print error and recall 10@10 of both codes at each width."""
    base, asked = torch.tensor(data.train[:rows], dtype=torch.float32), torch.tensor(data.test[:queries])
    truth = exact_neighbors(base.numpy(), asked.numpy(), 10, data.metric)
    if data.metric == "cosine":
        base, asked = (torch.nn.functional.normalize(part) for part in (base, asked))
    dim = base.shape[1]
    centre = base.mean(dim=0) if centred else torch.zeros(dim)
    rotation = Hadamard(dim, 0)
    norms = (base - centre).norm(dim=1)
    unit = (rotation.apply(base - centre) * (math.sqrt(dim) / norms.clamp(min=1e-30))[:, None]).contiguous()
    rotated = rotation.apply(asked)

    def found(levels: Tensor) -> NDArray[Any]:
        scales = norms * math.sqrt(dim) / (unit * levels).sum(dim=1)
        scales = scales.half().float() if data.metric == "cosine" else scales
        scores = (rotated @ levels.t()) * scales
        if data.metric == "l2":
            scores = 2 * (scores + (asked @ centre)[:, None]) - base.square().sum(dim=1)
        return np.asarray(scores.topk(10, dim=1).indices)

    for bits in range(trellis.MIN_BITS, trellis.MAX_BITS + 1):
        line = f"{data.name:<32}{'centred' if centred else 'plain':<9}{bits} bits"
        for name, code in (("scalar", scalar_levels(bits, dim)), ("trellis", trellis_levels(bits))):
            levels = code(unit)
            error = float((unit - levels).square().mean())
            line += f"   {name}: error {error:.5f}, recall {recall(found(levels), truth, 10, 10):.4f}"
        print(line, flush=True)


def fit(bits: int, rows: int = 256, dim: int = 1024, rounds: int = 25) -> None:
    """Print a width's step and the integers of its upper half, fitted to N(0, 1)."""
    book = trellis.trellis_codebook(bits)
    values = torch.randn((rows, dim), generator=torch.Generator().manual_seed(bits))
    bands, fine = [(dim, bits)], 1e-7  # levels on a fine grid while they move
    count, levels = len(book.integers), book.levels().double()
    for _ in range(rounds):
        integers = tuple(torch.round(levels / fine - 0.5).int().tolist())
        moved = dataclasses.replace(book, integers=integers, step=fine)
        numbers = trellis.level_numbers(trellis.encode(values, bands, [moved]), bands).flatten().long()
        sums = torch.zeros(count, dtype=torch.float64).index_add_(0, numbers, values.flatten().double())
        cells = torch.bincount(numbers, minlength=count).double()
        levels = (sums - sums.flip(0)) / (cells + cells.flip(0))
    half = 127.5 if bits == trellis.MAX_BITS else 63.5
    steps = float(levels[-1]) / half * torch.linspace(1.0, 1.12, 121, dtype=torch.float64)
    rounded = torch.round(levels / steps[:, None] - 0.5)
    lost = (((rounded + 0.5) * steps[:, None] - levels).square() * cells).sum(dim=1)
    best = int(lost.argmin())
    print(f"{bits} bits: step {float(steps[best]):.6g}, upper half {rounded[best, count // 2 :].int().tolist()}")


def main() -> None:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trellis", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("sets", nargs="*", help="data sets, by name or path")
    parser.add_argument("--rows", type=int, default=20_000, help="base vectors used (default 20000)")
    parser.add_argument("--queries", type=int, default=400, help="queries used (default 400)")
    parser.add_argument("--fit", action="store_true", help="fit the levels anew")
    chosen = parser.parse_args()
    for bits in range(trellis.MIN_BITS, trellis.MAX_BITS + 1) if chosen.fit else ():
        fit(bits)
    for name in chosen.sets:
        for centred in (False, True):
            compare(load_dataset(name), chosen.rows, chosen.queries, centred)


if __name__ == "__main__":
    main()
