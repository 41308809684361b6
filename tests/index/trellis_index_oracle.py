"""An index of trellis codes taken apart by the specifications of versions 3 and 4, in numpy and float64.

Like `index_oracle`, whose rotation and top k it uses, this imports nothing of tqsearch.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import trellis_oracle
from container import kinds, take_apart
from index_oracle import rotation, similarity, unit_rows
from trained_oracle import leaning

# What `trellis` says of the error of a coordinate.
DISTORTION = {0: 1.0, 1: 0.27416, 2: 0.07320, 3: 0.02172, 4: 0.005868}


@dataclass
class TrellisContent:
    """The header and the tensors of a file of version 3 or 4 without bands of 8 bits."""

    header: dict[str, Any]
    tensors: dict[str, np.ndarray]

    @property
    def learnt(self) -> bool:
        return "learnt_plan" in self.header

    @property
    def plan(self) -> list[tuple[int, int]]:
        return [(size, width) for size, width in self.header["learnt_plan" if self.learnt else "plan"]]

    @property
    def on_path(self) -> list[tuple[int, int]]:
        return [(size, width) for size, width in self.plan if width]

    @property
    def kept(self) -> np.ndarray:
        return np.repeat([width > 0 for _, width in self.plan], [size for size, _ in self.plan])

    @property
    def distortion(self) -> float:
        return sum(size * DISTORTION[width] for size, width in self.plan) / self.header["dim"]

    @property
    def ids(self) -> np.ndarray:
        return self.tensors.get("ids", np.arange(self.header["count"]))

    def double(self, name: str) -> np.ndarray:
        return self.tensors[name].astype(np.float64)

    @property
    def levels(self) -> np.ndarray:
        """Of the coordinates of width above 0, (n, m)."""
        rows = [trellis_oracle.unpack(row.tobytes(), self.on_path) for row in self.tensors["packed"]]
        return np.array([trellis_oracle.levels_of(row, self.on_path) for row in rows])

    def turn(self) -> np.ndarray:
        """(m, dim): what the levels are of, but for a factor; sigma is multiplied into the learnt axes."""
        if self.learnt:
            return self.double("deviations")[self.kept, None] * self.double("axes")
        return rotation(self.header["dim"], self.header["seed"])[self.kept]

    @property
    def estimates(self) -> np.ndarray:
        """Unbiased estimates of z = x - c, (n, dim)."""
        return self.double("scales")[:, None] * self.levels @ self.turn()

    def residuals(self, vectors: np.ndarray) -> np.ndarray:
        vectors = vectors.astype(np.float64)
        vectors = unit_rows(vectors) if self.header["metric"] == "cosine" else vectors
        return vectors - (self.double("centre") if "centre" in self.tensors else 0.0)

    def coordinates(self, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What is coded of vectors, (n, m), and their scales with the levels of the file."""
        z = self.residuals(vectors)
        if self.learnt:
            sigma, y = self.double("deviations")[self.kept], z @ self.double("axes").T
            w, square, dots = y / sigma, (y**2).sum(1), (y * sigma * self.levels).sum(1)
            length = np.linalg.norm(w, axis=1, keepdims=True)
        else:
            w, square = z @ self.turn().T, (z**2).sum(1)
            length, dots = np.linalg.norm(z, axis=1, keepdims=True), (w * self.levels).sum(1)
        size = self.header["dim"] if not self.learnt else w.shape[1]
        scales = np.where(square > 0, square / np.where(square > 0, dots, 1.0), 0.0)
        if "slopes" in self.tensors and not self.has_bias:
            scales = leaning(self.tensors, self.kept, z, self.double("deviations")[self.kept] * self.levels)[0]
        return np.sqrt(size) * w / np.where(length > 0, length, 1.0), scales

    @property
    def has_bias(self) -> bool:
        return bool(self.header["metric"] == "l2" or self.header.get("keeps_product", "centre" in self.tensors))

    def lean(self, vectors: np.ndarray) -> np.ndarray | float:
        """What version 4 adds to the bias of vectors, in full."""
        if "slopes" not in self.tensors:
            return 0.0
        h = self.double("deviations")[self.kept] * self.levels
        b = leaning(self.tensors, self.kept, self.residuals(vectors), h)[1]
        return np.asarray(2 * b if self.header["metric"] == "l2" else b)

    def similarity(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scores and slack, without learnt axes."""
        assert not self.learnt
        bias = self.double("bias") if "bias" in self.tensors else None
        return similarity(queries, self.estimates, bias, self.header["metric"], self.tensors.get("centre"))


def parse_trellis(content: bytes) -> TrellisContent:
    """Takes a file of version 3 or 4 apart, and checks every statement of its specification."""
    version, header, tensors = take_apart(content)
    sloping = {"slopes"} & header.keys()
    assert version == ("4" if sloping else "3")
    assert header.get("slopes", True) is True
    assert header["codec"] == "trellis"
    more = {"learnt_plan", "keeps_product"} & header.keys()
    assert len(more) in (0, 2)
    assert header.keys() == {"codec", "count", "dim", "metric", "next_id", "plan", "rotation", "seed"} | more | sloping
    found = TrellisContent(header, tensors)
    count, dim = header["count"], header["dim"]
    assert sum(size for size, _ in found.plan) == dim
    half = bool(more) or (header["metric"] == "cosine" and found.kept.all())
    wanted: list[tuple[str, str, tuple[int, ...]]] = []
    if "ids" in tensors:
        wanted.append(("ids", "I64", (count,)))
    if "centre" in tensors or more:
        wanted.append(("centre", "F32", (dim,)))
    if more:
        wanted += [("axes", "F32", (int(found.kept.sum()), dim)), ("deviations", "F32", (dim,))]
    if sloping:
        wanted.append(("slopes", "F32", (dim,)))
    if count and found.has_bias:
        wanted.append(("bias", "F16" if more or header["metric"] == "cosine" else "F32", (count,)))
    if count:
        wanted.append(("scales", "F16" if half else "F32", (count,)))
        wanted.append(("packed", "U8", (count, trellis_oracle.row_bytes(found.on_path))))
    assert kinds(tensors) == wanted
    return found
