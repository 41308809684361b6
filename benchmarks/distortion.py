"""The codec's squared error and inner-product error beside the paper's theory: `python -m benchmarks distortion`.

Vectors are uniformly random unit vectors, so that every rotation gives the exact law of TurboQuant's lemma 1, and all
expectations below are exact, not asymptotic, unless said. D is the Lloyd-Max distortion of that law at b bits, D' at
b - 1 bits.

* MSE, norm scale: E |x - x_hat|^2 with the scale |x| / sqrt(d) of the paper's algorithm 1: D.
* MSE, decode: the package's `decode`, whose scale is unbiased and then shrunk by 1 - D: D (1 + O(1 / d)). At 3 bits and
  more it is below D, by about 2 % at d = 128, as the scale takes off the error's part along x.
* Inner-product error: <q, x> as estimated less <q, x>. Its mean is taken with queries at a cosine of about 0.7 to their
  vectors, where a biased scale would show; its variance with independent queries: D / (1 - D) / d for the mse form (up
  to a relative O(1 / d)), D' (pi / 2 - 1 / d) / d for the prod form with a Gaussian projection, D' (c^2 - 1) / d with
  an orthogonal one, c the constant of `qjl.QJL`.

One sample is one seed (rotation and projection) with its own vectors: samples are independent, and the confidence
interval of a mean is Student's over them. Its level makes the whole table, all three estimators of every row, miss zero
with probability 1 in 2,000 for a correct build. The run fails (status 1) where an interval misses zero, where the MSE
with the norm scale differs from D by more than 1 % (5 standard errors or more with these samples), or where decode's is
more than 1 % above D.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.environment import environment
from benchmarks.result_file import RESULTS, write
from tqsearch import TurboQuantizer, kernels
from tqsearch.codebook import lloyd_max

BITS = (1, 2, 3, 4, 5)
SAMPLES = {128: (32, 1280), 256: (24, 768), 1536: (10, 320)}  # dim: seeds, vectors a seed
TOLERANCE = 0.01
FAMILY_MISS = 1 / 2000  # probability that any interval of the table misses zero

COLUMNS = [
    "d",
    "bits",
    "MSE, norm scale",
    "MSE, decode",
    "Lloyd-Max, exact law",
    "Lloyd-Max, N(0, 1)",
    "paper's bound",
    "rate-distortion bound",
    "mse form: mean error",
    "mse form: ± interval",
    "mse form: variance x d",
    "mse form: D / (1 - D)",
    "prod, Gaussian: mean error",
    "prod, Gaussian: ± interval",
    "prod, Gaussian: variance x d",
    "prod, Gaussian: theory",
    "prod, orthogonal: mean error",
    "prod, orthogonal: ± interval",
    "prod, orthogonal: variance x d",
    "prod, orthogonal: theory",
    "prod: paper's bound",
]

Array = npt.NDArray[np.float64]


def unit_vectors(rng: np.random.Generator, count: int, dim: int) -> npt.NDArray[np.float32]:
    """Uniform on the sphere, (count, dim)."""
    rows = rng.standard_normal((count, dim))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.astype(np.float32)


def norm_scaled(quantizer: TurboQuantizer, vectors: npt.NDArray[np.float32]) -> Array:
    """The paper's algorithm 1: levels times |x| / sqrt(d), rotated back."""
    encoded = quantizer.encode_levels(torch.from_numpy(vectors))
    scales = encoded.norms / math.sqrt(quantizer.dim)
    estimate = kernels.reconstruct(encoded.packed, scales, quantizer.tables(scales.device))
    return np.asarray(quantizer.rotation.invert(estimate), dtype=np.float64)


def squared_error(estimate: Array, vectors: npt.NDArray[np.float32]) -> float:
    """Mean of |x - x_hat|^2 over the rows."""
    return float(((estimate - vectors) ** 2).sum(axis=1).mean())


def inner_product_errors(
    quantizer: TurboQuantizer, vectors: npt.NDArray[np.float32], queries: npt.NDArray[np.float32]
) -> tuple[float, float]:
    """Mean error of queries near their own vectors, and mean squared error of independent queries.

    `decode(unbiased=True)` is the vector whose inner product with any query is `inner_product`, so one product a pair
    is enough.
    """
    decoded = quantizer.decode(quantizer.encode(vectors), unbiased=True).double().numpy()
    difference = decoded - vectors
    near = vectors + queries
    near = near / np.linalg.norm(near, axis=1, keepdims=True)
    mean = (near * difference).sum(axis=1).mean()
    return float(mean), float(((queries * difference).sum(axis=1) ** 2).mean())


def forms(dim: int, bits: int, seed: int) -> list[TurboQuantizer]:
    """The three estimators of a row, in the order of the columns."""
    return [
        TurboQuantizer(dim, bits, seed=seed),
        TurboQuantizer(dim, bits, seed=seed, form="prod"),
        TurboQuantizer(dim, bits, seed=seed, form="prod", projection="orthogonal"),
    ]


def measure(dim: int, seed: int, seeds: int, count: int) -> dict[int, Array]:
    """For each width the measurements of every seed: two squared errors, then mean and square of the three forms."""
    measured: dict[int, list[list[float]]] = {bits: [] for bits in BITS}
    for number in range(seeds):
        rng = np.random.default_rng([seed, dim, number])
        vectors, queries = unit_vectors(rng, count, dim), unit_vectors(rng, count, dim)
        for bits in BITS:
            estimators = forms(dim, bits, seed + number)
            plain = estimators[0]
            decoded = plain.decode(plain.encode(vectors)).double().numpy()
            row = [squared_error(norm_scaled(plain, vectors), vectors), squared_error(decoded, vectors)]
            for estimator in estimators:
                row += inner_product_errors(estimator, vectors, queries)
            measured[bits].append(row)
    return {bits: np.array(rows) for bits, rows in measured.items()}


def student_quantile(miss: float, samples: int) -> float:
    """Half-width, in standard errors of the mean, of an interval that misses with probability `miss`."""
    from scipy.stats import t  # a development dependency

    return float(t.isf(miss / 2, samples - 1))


def table_row(dim: int, bits: int, measured: Array, quantile: float) -> list[float]:
    """One row, in the order of `COLUMNS`."""
    exact, lower = lloyd_max(bits, dim).distortion, lloyd_max(bits - 1, dim).distortion
    constant = math.sqrt(math.pi / dim) * math.exp(math.lgamma((dim + 1) / 2) - math.lgamma(dim / 2))
    theory = [exact / (1 - exact), lower * (math.pi / 2 - 1 / dim), lower * (constant**2 - 1)]
    means = measured.mean(axis=0)
    intervals = quantile * measured.std(axis=0, ddof=1) / math.sqrt(len(measured))
    row = [dim, bits, means[0], means[1], exact, lloyd_max(bits).distortion]
    row += [math.sqrt(3) * math.pi / 2 * 4.0**-bits, 4.0**-bits]
    for form, expected in enumerate(theory):
        row += [means[2 + 2 * form], intervals[2 + 2 * form], means[3 + 2 * form] * dim, expected]
    row.append(math.sqrt(3) * math.pi**2 * 4.0**-bits)
    return [int(value) if position < 2 else float(f"{value:.4g}") for position, value in enumerate(row)]


def failures(row: list[float]) -> list[str]:
    """What a row breaks, in words."""
    named = dict(zip(COLUMNS, row, strict=True))
    found, where = [], f"d = {row[0]}, {row[1]} bits"
    exact = named["Lloyd-Max, exact law"]
    for name, low in (("MSE, norm scale", 1 - TOLERANCE), ("MSE, decode", 0.0)):
        if not low <= named[name] / exact <= 1 + TOLERANCE:
            found.append(f"{where}: {name} is {named[name]}, more than 1 % from the exact-law value {exact}")
    for form in ("mse form", "prod, Gaussian", "prod, orthogonal"):
        mean, interval = named[f"{form}: mean error"], named[f"{form}: ± interval"]
        if not abs(mean) <= interval:
            found.append(f"{where}: {form}: the mean error {mean} ± {interval} misses zero")
    return found


def show(row: list[float]) -> str:
    """A row for the terminal."""
    return "  ".join(f"{value:>4}" if position < 2 else f"{value:>9.3g}" for position, value in enumerate(row))


def main(argv: list[str]) -> int:
    """Print the table and save it; 1 where theory is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks distortion", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of the vectors; rotations use it and the following ones")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")
    parser.add_argument("--output", type=Path, default=RESULTS / "distortion.json", help="where the JSON goes")
    parser.add_argument("--quick", action="store_true", help="d = 128 only, with fewer seeds")
    chosen = parser.parse_args(argv)
    torch.set_num_threads(chosen.threads)

    samples = {128: (8, 5120)} if chosen.quick else SAMPLES
    miss = FAMILY_MISS / (3 * len(BITS) * len(samples))
    rows, broken, started = [], [], time.perf_counter()
    print("\n".join(f"{position + 1:>2} {name}" for position, name in enumerate(COLUMNS)))
    for dim, (seeds, count) in samples.items():
        quantile = student_quantile(miss, seeds)
        for bits, measured in measure(dim, chosen.seed, seeds, count).items():
            rows.append(table_row(dim, bits, measured, quantile))
            broken += failures(rows[-1])
            print(show(rows[-1]), flush=True)
    result: dict[str, Any] = {
        "environment": environment(chosen.seed),
        "samples": [{"d": dim, "seeds": seeds, "vectors a seed": count} for dim, (seeds, count) in samples.items()],
        "interval level": 1 - miss,
        "views": {"mse": COLUMNS[:8], "products": COLUMNS[:2] + COLUMNS[8:]},
        "columns": COLUMNS,
        "rows": rows,
    }
    write(chosen.output, result)
    print(f"{time.perf_counter() - started:.0f} s; each interval holds with probability {1 - miss:.7f}")
    print("\n".join(broken) if broken else "no MSE misses the exact law's by more than 1 %, all intervals hold zero")
    return 1 if broken else 0
