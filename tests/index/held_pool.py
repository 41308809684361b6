"""A pool of vectors and what an index of each kind holds of them, by the oracles: what the state machine draws from.

For scalar codes the oracles encode the pool themselves. Along a trellis several walks may be as good: there they read
the codes of a file of the whole pool, and check that no walk is better.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import trellis_oracle
from index_oracle import EPS, bias_of, estimate, levels, mean_distortion, parse, rotation, unit_rows
from trained_oracle import parse_trained
from trellis_index_oracle import DISTORTION, parse_trellis

from tqsearch.index import TurboQuantIndex

DIM, SEED, BITS = 12, 5, 2.5
PLAN = ((8, 3), (4, 2))
METRICS = ("ip", "cosine", "l2")
KINDS = ("plain", "centre", "axes", "trellis", "trellis centre", "trellis axes")
POOL_ROWS = 64
# The error of the levels of N(0, 1), Max 1960: what an index expects of learnt axes.
NORMAL = {0: 1.0, 1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.002499, 6: 0.000640, 8: 0.00004}


def rows(n: int, seed: int, dim: int, power: float) -> np.ndarray:
    spread = np.arange(1, dim + 1) ** -power
    return ((np.random.default_rng(seed).standard_normal((n, dim)) + 0.5) * spread).astype(np.float32)


@dataclass
class Held:
    """What an index of one kind and metric holds of the pool.

    Attributes:
        pool: (n, dim) the vectors; the first is zero, the next three are of other lengths.
        empty: the file of such an index before anything was added.
        estimates: (n, dim) unbiased, of z = x - centre.
        bias: (n,) -|z|^2 for "l2"; else <centre, z>, or 0 where an index does not keep it.
        centre: (dim,), 0 unless learnt.
        moved: whether z is scored against q - centre.
        rounding: how far scales and biases may be rounded, as a part of them.
        distortion: of the codes, by which reconstructions are shorter than the estimates.
        parse: reads a file of such an index.
        coded: of scalar codes, the coordinates of each band with their levels.
    """

    metric: str
    pool: np.ndarray
    empty: bytes
    estimates: np.ndarray
    bias: np.ndarray
    centre: np.ndarray
    moved: bool
    rounding: float
    distortion: float
    parse: Callable[[bytes], Any]
    coded: list[tuple[np.ndarray, np.ndarray]]

    def scores(self, queries: np.ndarray, places: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Scores (q, m) of vectors of the pool, larger is nearer, and how far an index's may lie from them."""
        queries = queries.astype(np.float64)
        queries = unit_rows(queries) if self.metric == "cosine" else queries
        moved = queries - self.centre if self.moved else queries
        found, bias = self.estimates[places], self.bias[places]
        products = moved @ found.T
        sizes = np.linalg.norm(moved, axis=1, keepdims=True) * np.linalg.norm(found, axis=1)
        # A sum of d products in float32, after a rotation by sums of a few more, with levels and scales rounded.
        part = (queries.shape[1] + 64) * EPS
        if self.metric == "l2":
            constant = -(moved**2).sum(1, keepdims=True)
            slack = (part + self.rounding) * (2 * sizes + np.abs(bias)) + part * np.abs(constant)
            return 2 * products + bias + constant, slack + 1e-6
        constant = (queries @ self.centre)[:, None]
        lengths = np.linalg.norm(queries, axis=1, keepdims=True) * np.linalg.norm(self.centre)
        slack = (part + self.rounding) * (sizes + np.abs(bias)) + part * lengths
        return products + bias + constant, slack + 1e-6 * (self.rounding > 1e-4)


@cache
def held_pool(metric: Any, kind: str) -> Held:
    """What the oracles say of an index of a kind, of which the package has made the empty file and the axes."""
    learn: Any = kind.split()[-1] if kind.split()[-1] in ("centre", "axes") else None
    trellis = kind.startswith("trellis")
    # Such that axes pay and, along a trellis, no band has 8 bits.
    dim = (20 if metric == "cosine" else 24) if kind == "trellis axes" else DIM
    power = 0.8 if kind == "axes" else 0.4
    pool = rows(POOL_ROWS, 0, dim, power)
    pool[0] = 0
    pool[1:4] *= np.array([[1e-2], [3], [8]] if learn == "axes" else [[1e-6], [1e3], [1e6]], np.float32)
    bits = 2 if learn == "axes" else BITS
    index = TurboQuantIndex(dim, bits, metric, seed=SEED, codec="trellis" if trellis else "scalar")
    if learn:
        index.train(rows(500, 1, dim, power), learn=learn)
        assert index.learnt == learn
    reader: Any = parse_trellis if trellis else parse_trained if learn == "axes" else parse
    empty = saved(index)
    before = reader(empty)
    centre = before.tensors.get("centre", np.zeros(dim)).astype(np.float64)
    keeps = metric == "l2" or before.header.get("keeps_product", learn is not None)
    bias = bias_of(pool, metric, centre) if keeps else np.zeros(POOL_ROWS)
    half = metric == "cosine" or learn == "axes"
    coded: list[tuple[np.ndarray, np.ndarray]] = []
    if trellis:
        index.add(pool)
        content = parse_trellis(saved(index))
        coordinates, _ = content.coordinates(pool)
        least = [trellis_oracle.least_error(row, content.on_path) for row in coordinates]
        np.testing.assert_allclose(((coordinates - content.levels) ** 2).sum(1), least, rtol=1e-4)
        estimates, distortion = content.estimates, content.distortion
        if keeps:
            bias = bias + content.lean(pool)
        if learn == "axes":
            squares = content.double("deviations") ** 2
            widths = np.repeat([width for _, width in content.plan], [size for size, _ in content.plan])
            distortion = shares(squares, widths, DISTORTION)
    elif learn == "axes":
        content = parse_trained(empty)
        estimates = content.encode(pool)
        bias = content.encode_bias(pool) if keeps else bias
        even = {width: content.distortion(width) for _, width in content.plan}
        errors = even if "levels" in content.header else NORMAL
        distortion = shares(content.double("deviations") ** 2, content.widths, errors)
        w = content.residuals(pool) @ content.double("axes").T / content.sigma
        coded = bands(w, content.plan, content.table)
    else:
        estimates = estimate(pool, PLAN, SEED, metric, centre)
        distortion = mean_distortion(PLAN)
        vectors = pool.astype(np.float64)
        vectors = (unit_rows(vectors) if metric == "cosine" else vectors) - centre
        coded = bands(vectors @ rotation(DIM, SEED).T, PLAN, lambda width: levels(width, DIM))
    rounding = 2.0**-10 if half else 2.0**-19
    moved = metric == "l2" or keeps
    return Held(metric, pool, empty, estimates, bias, centre, moved, rounding, distortion, reader, coded)


def bands(rows: np.ndarray, plan: Any, table: Callable[[int], np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows scaled to squared norm m, cut into the plan's bands, with the levels of each."""
    m, start, found = rows.shape[1], 0, []
    rows = np.sqrt(m) * unit_rows(rows)
    for size, width in plan:
        found.append((rows[:, start : start + size], table(width)))
        start += size
    return found


def shares(squares: np.ndarray, widths: np.ndarray, errors: dict[int, float]) -> float:
    """The error of coded coordinates as a part of their variance."""
    lost = sum(square * errors[int(width)] for square, width in zip(squares, widths, strict=True) if width)
    return float(lost / squares[widths > 0].sum())


def saved(index: TurboQuantIndex) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        index.save(Path(folder) / "index")
        return (Path(folder) / "index").read_bytes()
