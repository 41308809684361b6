"""The codec, the file and the search again, from their written definitions, in numpy and float64.

Nothing here imports tqsearch, torch or safetensors. Where a definition is a loop, so is this code: it is meant to be
plainly right, not fast.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from container import kinds, take_apart
from scipy import optimize, special

Pairs = tuple[tuple[int, int], ...]  # (size, width) of each band

EPS = 2.0**-24  # half a unit in the last place of float32


# splitmix: words of a 64-bit counter-based generator


def _mix(value: int) -> int:
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
    return value ^ (value >> 31)


def words(seed: int, stream: int, count: int) -> list[int]:
    golden = 0x9E3779B97F4A7C15
    key = _mix((_mix((seed + golden) % 2**64) + stream * golden) % 2**64)
    return [_mix((key + (i + 1) * golden) % 2**64) for i in range(count)]


# rotation: rounds of signs and Hadamard blocks, a permutation between rounds


@lru_cache
def rotation(dim: int, seed: int) -> np.ndarray:
    """(dim, dim): the rotated coordinates of x are rotation @ x."""
    sizes = [2**bit for bit in range(14, -1, -1) if dim >> bit & 1]
    blocks, start = np.zeros((dim, dim)), 0
    for size in sizes:
        for i in range(size):
            for j in range(size):
                blocks[start + i, start + j] = (-1) ** (i & j).bit_count() / np.sqrt(size)
        start += size
    result = np.eye(dim)
    for index in range(3):
        if index and len(sizes) > 1:
            numbers = words(seed, 16 + index, dim)
            result = result[sorted(range(dim), key=numbers.__getitem__)]
        signs = np.array([-1.0 if word >> 63 else 1.0 for word in words(seed, index, dim)])
        result = blocks @ (signs[:, None] * result)
    return result


# codebook: Lloyd's iteration for sqrt(dim) times a coordinate of a random unit vector


@lru_cache
def levels(width: int, dim: int) -> np.ndarray:
    """(2**width,) the optimal levels; (1 + coordinate) / 2 has a Beta law with both parameters (dim - 1) / 2."""
    if width == 0:
        return np.zeros(1)
    a = (dim - 1) / 2
    found = special.betaincinv(a, a, (np.arange(2**width) + 0.5) / 2**width)
    for _ in range(20000):
        edges = np.concatenate([[0.0], (found[1:] + found[:-1]) / 2, [1.0]])
        # E[t; t < e] = E[t] P(t' < e), where t' has the Beta law of a + 1 and a.
        new = 0.5 * np.diff(special.betainc(a + 1, a, edges)) / np.diff(special.betainc(a, a, edges))
        done = np.abs(new - found).max() < 1e-13
        found = new
        if done:
            break
    return np.sqrt(dim) * (2 * found - 1)


def distortion(width: int, dim: int) -> float:
    """E (u - level)^2 by the identity 1 - E level^2, which holds where levels are means of their cells."""
    a, table = (dim - 1) / 2, levels(width, dim)
    edges = np.concatenate([[-1.0], (table[1:] + table[:-1]) / 2 / np.sqrt(dim), [1.0]])
    mass = np.diff(special.betainc(a, a, (1 + edges) / 2))
    return float(1 - (mass * table**2).sum())


@lru_cache
def even_levels(width: int, dim: int) -> tuple[np.ndarray, float]:
    """Levels of equal distance about zero of least E (u - level)^2, which is minimized as a number, and that error."""
    a, places = (dim - 1) / 2, np.arange(2**width) - (2**width - 1) / 2

    def error(step: float) -> float:
        edges = np.concatenate([[0.0], np.clip((1 + (places[1:] - 0.5) * step / np.sqrt(dim)) / 2, 0, 1), [1.0]])
        mass = np.diff(special.betainc(a, a, edges))
        first = np.sqrt(dim) * (np.diff(special.betainc(a + 1, a, edges)) - mass)  # of u = sqrt(dim) (2 t - 1)
        return float(1 - 2 * (places * step * first).sum() + ((places * step) ** 2 * mass).sum())

    best = optimize.minimize_scalar(
        error, bounds=(0, 2 * min(np.sqrt(dim), 10) / 2**width), method="bounded", options={"xatol": 1e-12}
    )
    return places * best.x, float(best.fun)


def mean_distortion(plan: Pairs) -> float:
    dim = sum(size for size, _ in plan)
    return sum(size * distortion(width, dim) for size, width in plan) / dim


# codes


def unpack(row: bytes, plan: Pairs) -> list[int]:
    """The codes of one row, field by field."""
    codes: list[int] = []
    start = 0
    for size, width in plan:
        band, shift = [0] * size, 0
        for plane in (8, 4, 2, 1):
            if not width & plane:
                continue
            for i in range(size):
                byte, field = divmod(i, 8 // plane)
                if plane == 1:
                    field = (0, 1, 4, 5, 2, 3, 6, 7).index(field)
                band[i] |= (row[start + byte] >> field * plane & 2**plane - 1) << shift
            shift += plane
            start += -(-size * plane // 8)
        codes += band
    assert start == len(row)
    return codes


def table_rows(codes: np.ndarray, plan: Pairs) -> np.ndarray:
    """(n, dim) codes to their levels."""
    dim = sum(size for size, _ in plan)
    widths = np.repeat([width for _, width in plan], [size for size, _ in plan])
    return np.stack([levels(int(width), dim)[codes[:, i]] for i, width in enumerate(widths)], axis=1)


def decode(packed: np.ndarray, scales: np.ndarray, plan: Pairs, seed: int) -> np.ndarray:
    """Rows of bytes to unbiased estimates of their vectors, (n, dim) float64."""
    codes = np.array([unpack(row.tobytes(), plan) for row in packed])
    return scales.astype(np.float64)[:, None] * table_rows(codes, plan) @ rotation(codes.shape[1], seed)


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1)


def estimate(vectors: np.ndarray, plan: Pairs, seed: int, metric: str, centre: np.ndarray | float = 0.0) -> np.ndarray:
    """What an index holds of vectors, as unbiased estimates less the centre: encode and decode, (n, dim) float64."""
    vectors = vectors.astype(np.float64)
    vectors = (unit_rows(vectors) if metric == "cosine" else vectors) - centre
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = unit_rows(vectors)
    dim = vectors.shape[1]
    rotated = np.sqrt(dim) * unit @ rotation(dim, seed).T
    codes, column = np.empty(vectors.shape, int), 0
    for size, width in plan:
        part = rotated[:, column : column + size]
        codes[:, column : column + size] = np.abs(part[:, :, None] - levels(width, dim)).argmin(axis=2)
        column += size
    found = table_rows(codes, plan) @ rotation(dim, seed)
    dots = (unit * found).sum(axis=1, keepdims=True)
    return lengths * np.where(lengths > 0, found / np.where(lengths > 0, dots, 1), 0)


# scores


def bias_of(vectors: np.ndarray, metric: str, centre: np.ndarray | None) -> np.ndarray:
    """The number kept beside each vector, (n,) float64, before it is rounded: see `similarity`."""
    c = np.zeros(vectors.shape[1]) if centre is None else centre.astype(np.float64)
    vectors = vectors.astype(np.float64)
    if metric == "l2":
        return -((vectors - c) ** 2).sum(1)
    return ((unit_rows(vectors) if metric == "cosine" else vectors) - c) @ c


def similarity(
    queries: np.ndarray,
    estimates: np.ndarray,
    bias: np.ndarray | None,
    metric: str,
    centre: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Scores (q, n) in float64, larger is nearer, and how far float32 may lie from them.

    Of vectors x it is given estimates of z = x - centre and, as bias, -|z|^2 for "l2" and <centre, z> otherwise.
    """
    queries = queries.astype(np.float64)
    if metric == "cosine":
        queries = unit_rows(queries)
    if centre is not None:
        if metric == "l2":
            queries = queries - centre
        else:
            assert bias is not None
            scores, slack = similarity(queries - centre, estimates, None, "ip")
            more = (queries.shape[1] + 64) * EPS * np.linalg.norm(queries, axis=1, keepdims=True)
            slack = slack + more * (1 + np.linalg.norm(centre)) + 4 * EPS * np.abs(bias)
            return scores + bias + (queries @ centre)[:, None], slack
    lengths = np.linalg.norm(queries, axis=1, keepdims=True)
    products = queries @ estimates.T
    # A sum of d products in float32, after a rotation by sums of a few more, with the levels and the scale rounded.
    slack = (queries.shape[1] + 64) * EPS * lengths * np.linalg.norm(estimates, axis=1)
    if metric != "l2":
        return products, slack
    assert bias is not None
    whole = lengths**2 - bias
    return 2 * products - whole, 2 * slack + (queries.shape[1] + 64) * EPS * whole


def check_top_k(
    got: tuple[np.ndarray, np.ndarray],
    wanted: np.ndarray,
    slack: np.ndarray,
    ids: np.ndarray,
    k: int,
    metric: str,
) -> None:
    """Search results against the score of every candidate: ids through their scores, ties by distance.

    Args:
        got: scores and ids, (q, k).
        wanted, slack: (q, n), as `similarity` gives them, of the candidates only.
        ids: (n,) of the candidates.
        k: how many were asked for.
        metric: the index's.
    """
    scores, found = got
    queries, there = wanted.shape[0], min(k, len(ids))
    assert scores.shape == found.shape == (queries, k)
    assert (scores.dtype, found.dtype) == (np.float32, np.int64)
    assert (found[:, there:] == -1).all()
    assert (scores[:, there:] == (np.inf if metric == "l2" else -np.inf)).all()
    nearness = (-scores if metric == "l2" else scores)[:, :there].astype(np.float64)
    column = {id: place for place, id in enumerate(ids.tolist())}
    for row in range(queries):
        named = found[row, :there].tolist()
        assert len(set(named)) == there
        places = [column[id] for id in named]
        np.testing.assert_array_less(np.diff(nearness[row]), 1e-300)  # best first
        assert (np.abs(nearness[row] - wanted[row, places]) <= slack[row, places]).all()
        best = -np.sort(-wanted[row])[:there]
        assert (np.abs(nearness[row] - best) <= slack[row].max(initial=0.0)).all()


def check_searches(index: Any, content: Any, queries: np.ndarray) -> None:
    """Top k of an index, all and some of its vectors, against the content of its file.

    Args:
        index: of n vectors; its `search` is called.
        content: has `ids` and `similarity`.
        queries: (q, dim).
    """
    wanted, slack = content.similarity(queries)
    for k in (1, 10, len(content.ids) + 1):
        check_top_k(index.search(queries, k), wanted, slack, content.ids, k, index.metric)
    some = np.arange(0, len(content.ids), 13)
    allowed = content.ids[some]
    got = index.search(queries, 20, allow=allowed)
    check_top_k(got, wanted[:, some], slack[:, some], allowed, 20, index.metric)


# the file


@dataclass
class Parsed:
    """An index file, taken apart by hand."""

    header: dict[str, Any]
    tensors: dict[str, np.ndarray]

    @property
    def plan(self) -> Pairs:
        return tuple((size, width) for size, width in self.header["plan"])

    @property
    def ids(self) -> np.ndarray:
        return self.tensors.get("ids", np.arange(self.header["count"]))

    @property
    def estimates(self) -> np.ndarray:
        """Unbiased estimates of the vectors less the centre, in the order of the rows."""
        if not self.header["count"]:
            return np.empty((0, self.header["dim"]))
        return decode(self.tensors["packed"], self.tensors["scales"], self.plan, self.header["seed"])

    def similarity(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        bias = self.tensors["bias"].astype(np.float64) if "bias" in self.tensors else None
        if not self.header["count"]:
            bias = np.empty(0)
        return similarity(queries, self.estimates, bias, self.header["metric"], self.tensors.get("centre"))


def parse(content: bytes) -> Parsed:
    """Takes a file of version 1 apart by the specification, and checks every statement of it."""
    version, header, tensors = take_apart(content)
    assert version == "1"
    assert header.keys() == {"dim", "metric", "plan", "rotation", "seed", "count", "next_id"}
    count, plan = header["count"], header["plan"]
    row_bytes = sum(-(-size * plane // 8) for size, width in plan for plane in (8, 4, 2, 1) if width & plane)
    half = header["metric"] == "cosine" and all(width for _, width in plan)
    wanted: list[tuple[str, str, tuple[int, ...]]] = []
    if "ids" in tensors:
        wanted.append(("ids", "I64", (count,)))
        assert tensors["ids"].tolist() != list(range(count)), "plain ids are not stored"
        assert len(set(tensors["ids"].tolist())) == count
        assert tensors["ids"].max() < header["next_id"]
    if "centre" in tensors:
        wanted.append(("centre", "F32", (header["dim"],)))
    if count and (header["metric"] == "l2" or "centre" in tensors):
        wanted.append(("bias", "F16" if header["metric"] == "cosine" else "F32", (count,)))
    if count:
        wanted += [("scales", "F16" if half else "F32", (count,)), ("packed", "U8", (count, row_bytes))]
    assert kinds(tensors) == wanted
    return Parsed(header, tensors)
