"""An index of learnt axes taken apart by the specification of versions 2 and 4, in numpy and float64.

Like `index_oracle`, whose levels, bytes and top k it uses, this imports nothing of tqsearch.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from container import kinds, take_apart
from index_oracle import EPS, Pairs, distortion, even_levels, levels, unit_rows, unpack


def leaning(tensors: dict[str, np.ndarray], kept: np.ndarray, z: np.ndarray, h: np.ndarray) -> tuple[Any, Any]:
    """Of version 4: the scale that makes the score of the expected query exact, and b, what the bias gets; (n,) both.

    Args:
        tensors: of the file.
        kept: (dim,) bool, the coordinates that have codes.
        z: (n, dim), vectors less the centre.
        h: (n, m), their levels times sigma.
    """
    c, axes, slopes = (tensors[name].astype(np.float64) for name in ("centre", "axes", "slopes"))
    y, gamma = z @ axes.T, slopes[kept]
    outside = (np.append(slopes[~kept], 0.0)[0]) * ((z**2).sum(1) - (y**2).sum(1))
    dots = (y * h).sum(1)
    s = np.where(dots > 0, (y**2).sum(1) / np.where(dots > 0, dots, 1), 0)
    whole = h @ (axes @ c) + (gamma * y * h).sum(1)
    matched = (z @ c + (gamma * y**2).sum(1) + outside) / np.where(whole > 0, whole, np.inf)
    b = (gamma * y * (y - s.astype(np.float16).astype(np.float64)[:, None] * h)).sum(1) + outside
    return np.clip(matched, 0.5 * s, 2 * s), b


@dataclass
class Trained:
    """The header and the tensors of a file of version 2 or 4."""

    header: dict[str, Any]
    tensors: dict[str, np.ndarray]

    @property
    def plan(self) -> Pairs:
        """The bands that have codes."""
        return tuple((size, width) for size, width in self.header["learnt_plan"] if width)

    @property
    def widths(self) -> np.ndarray:
        pairs = self.header["learnt_plan"]
        return np.repeat([width for _, width in pairs], [size for size, _ in pairs])

    def double(self, name: str) -> np.ndarray:
        return self.tensors[name].astype(np.float64)

    def table(self, width: int) -> np.ndarray:
        """The levels of a width."""
        m = len(self.sigma)
        return even_levels(width, m)[0] if width > 4 and "levels" in self.header else levels(width, m)

    def distortion(self, width: int) -> float:
        """The expected squared error of a coordinate of variance 1."""
        m = len(self.sigma)
        return even_levels(width, m)[1] if width > 4 and "levels" in self.header else distortion(width, m)

    @property
    def sigma(self) -> np.ndarray:
        return self.double("deviations")[self.widths > 0]

    @property
    def ids(self) -> np.ndarray:
        return self.tensors.get("ids", np.arange(self.header["count"]))

    @property
    def unit(self) -> float:
        """What the bias is a part of."""
        length = np.sqrt((self.double("deviations") ** 2).sum())
        longest = length if self.header["metric"] == "l2" else max(length, np.linalg.norm(self.double("centre")))
        return float(length * longest)

    @property
    def estimates(self) -> np.ndarray:
        """Unbiased estimates of z = x - c within the axes, (n, dim)."""
        widths = np.repeat([width for _, width in self.plan], [size for size, _ in self.plan])
        codes = np.array([unpack(row.tobytes(), self.plan) for row in self.tensors["packed"]])
        found = np.stack([self.table(int(width))[codes[:, i]] for i, width in enumerate(widths)], axis=1)
        return self.double("scales")[:, None] * (found * self.sigma) @ self.double("axes")

    def residuals(self, vectors: np.ndarray) -> np.ndarray:
        vectors = vectors.astype(np.float64)
        return (unit_rows(vectors) if self.header["metric"] == "cosine" else vectors) - self.double("centre")

    def levels(self, vectors: np.ndarray) -> np.ndarray:
        """What the codes of vectors should mean, times sigma, (n, m)."""
        w = self.residuals(vectors) @ self.double("axes").T / self.sigma
        m, column = w.shape[1], 0
        lengths = np.linalg.norm(w, axis=1, keepdims=True)
        w = np.sqrt(m) * w / np.where(lengths > 0, lengths, 1)
        found = np.empty_like(w)
        for size, width in self.plan:
            part, table = w[:, column : column + size], self.table(width)
            found[:, column : column + size] = table[np.abs(part[:, :, None] - table).argmin(2)]
            column += size
        return found * self.sigma

    @property
    def has_bias(self) -> bool:
        return self.header["metric"] == "l2" or self.header["keeps_product"]

    def encode(self, vectors: np.ndarray) -> np.ndarray:
        """What `estimates` should be of vectors."""
        z, h = self.residuals(vectors), self.levels(vectors)
        y = z @ self.double("axes").T
        dots = (y * h).sum(1)
        scales = np.where(dots > 0, (y**2).sum(1) / np.where(dots > 0, dots, 1), 0)
        if "slopes" in self.tensors and not self.has_bias:
            scales = leaning(self.tensors, self.widths > 0, z, h)[0]
        return scales[:, None] * h @ self.double("axes")

    def encode_bias(self, vectors: np.ndarray) -> np.ndarray:
        """What the bias should be of vectors, in full."""
        z, h = self.residuals(vectors), self.levels(vectors)
        b = leaning(self.tensors, self.widths > 0, z, h)[1] if "slopes" in self.tensors else 0.0
        return 2 * b - (z**2).sum(1) if self.header["metric"] == "l2" else z @ self.double("centre") + b

    def similarity(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scores (q, n), larger is nearer, and how far float32 may lie from them."""
        queries, c, metric = queries.astype(np.float64), self.double("centre"), self.header["metric"]
        queries = unit_rows(queries) if metric == "cosine" else queries
        moved = queries - c if metric == "l2" or self.header["keeps_product"] else queries
        bias = self.double("bias") * self.unit if "bias" in self.tensors else np.zeros(self.header["count"])
        products = moved @ self.estimates.T
        many = (queries.shape[1] + 64) * EPS
        lengths = np.linalg.norm(moved, axis=1, keepdims=True)
        slack = many * lengths * np.linalg.norm(self.estimates, axis=1)
        if metric == "l2":
            constant = (moved**2).sum(1, keepdims=True)
            return 2 * products + bias - constant, 2 * slack + many * (np.abs(bias) + constant)
        constant = (queries @ c)[:, None]
        more = many * np.linalg.norm(queries, axis=1, keepdims=True) * (1 + np.linalg.norm(c))
        return products + bias + constant, slack + more + many * np.abs(bias)

    def expected_error(self, variances: np.ndarray, moments: np.ndarray) -> float:
        """E <q, z - estimate>^2 for independent Gaussian coordinates z_i of these variances, in the axes.

        With a the factor by which the estimates are longer than the codes' means, a coordinate's error has variance
        v (1 - 2 a (1 - D) + a^2 (1 - D)). Moments are the queries'. Both (dim,), in the order of the deviations.
        """
        known = {width: self.distortion(width) if width else 1.0 for width in {int(w) for w in self.widths}}
        d = np.array([known[int(width)] for width in self.widths])
        kept = self.widths > 0
        a = np.where(kept, variances[kept].sum() / (variances * (1 - d))[kept].sum(), 0.0)
        return float((moments * variances * (1 - 2 * a * (1 - d) + a**2 * (1 - d))).sum())


def parse_trained(content: bytes) -> Trained:
    """Takes a file of version 2 or 4 apart, and checks every statement of its specification."""
    version, header, tensors = take_apart(content)
    wide = any(width > 4 for _, width in header["learnt_plan"])
    more = {"levels", "slopes"} & header.keys()
    assert version == ("4" if more else "2")
    assert header.get("slopes", True) is True
    assert "levels" not in more or (wide and header["levels"] == "even")
    names = {"count", "dim", "keeps_product", "learnt_plan", "metric", "next_id", "plan", "rotation", "seed"}
    assert header.keys() == names | more
    plan, count, dim = header["learnt_plan"], header["count"], header["dim"]
    assert sum(size for size, _ in plan) == dim
    coded = sum(size for size, width in plan if width)
    row_bytes = sum(-(-size * plane // 8) for size, width in plan for plane in (8, 4, 2, 1) if width & plane)
    wanted = [("centre", "F32", (dim,)), ("axes", "F32", (coded, dim)), ("deviations", "F32", (dim,))]
    if "slopes" in more:
        wanted.append(("slopes", "F32", (dim,)))
        outside = tensors["slopes"][np.repeat([width == 0 for _, width in plan], [size for size, _ in plan])]
        assert ((tensors["slopes"] >= 0) & (tensors["slopes"] <= 1)).all()
        assert len(set(outside.tolist())) <= 1
    if "ids" in tensors:
        wanted.insert(0, ("ids", "I64", (count,)))
    if count and (header["metric"] == "l2" or header["keeps_product"]):
        wanted.append(("bias", "F16", (count,)))
    if count:
        wanted += [("scales", "F16", (count,)), ("packed", "U8", (count, row_bytes))]
    assert kinds(tensors) == wanted
    return Trained(header, tensors)
