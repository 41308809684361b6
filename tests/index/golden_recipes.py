"""How the golden files were made: from vectors by a formula, so that they can be made again without a file of vectors.

The files are never made anew: they say what versions 1 and 3 of the format mean. A change that alters them needs a new
version, new files beside these, and a reader that still takes these.
"""

from pathlib import Path

import numpy as np

from tqsearch.index import TurboQuantIndex
from tqsearch.plan import BitPlan

FOLDER = Path(__file__).parent / "golden"
NAMES = ["l2-fraction-own-ids", "cosine-plain", "ip-bands-negative-seed", "empty", "l2-trained", "empty-trained"]
TRELLIS_NAMES = ["trellis-cosine", "trellis-l2-bands"]  # of version 3


def vectors(n: int, dim: int) -> np.ndarray:
    i, j = np.mgrid[:n, :dim]
    return ((i * i * 37 + j * 101 + i * j * 13) % 61 - 30).astype(np.float32) / 8


def make(name: str) -> TurboQuantIndex:
    """The index of a golden file, made by the present code."""
    if name == "l2-fraction-own-ids":
        index = TurboQuantIndex(12, 2.5, "l2", seed=3)
        index.add(vectors(6, 12), ids=[40, 7, 2**40, 0, 11, 5])
        index.remove([7])
    elif name == "cosine-plain":
        index = TurboQuantIndex(16, 4, "cosine", seed=0)
        values = vectors(5, 16)
        values[3] = 0
        index.add(values)
    elif name == "ip-bands-negative-seed":
        index = TurboQuantIndex(21, BitPlan.from_pairs([(5, 4), (7, 0), (9, 1)]), "ip", seed=-123456789012345678901)
        index.add(vectors(4, 21) * np.float32(1000))
    elif name == "l2-trained":
        index = TurboQuantIndex(9, 3, "l2", seed=1)
        index.train(vectors(8, 9), learn="centre")
        index.add(np.concatenate([vectors(4, 9), vectors(8, 9).mean(0, keepdims=True)]), ids=[3, 1, 4, 15, 9])
    elif name == "trellis-cosine":
        index = TurboQuantIndex(24, 2.5, "cosine", seed=5, codec="trellis")
        values = vectors(6, 24)
        values[2] = 0
        index.add(values)
    elif name == "trellis-l2-bands":
        plan = BitPlan.from_pairs([(5, 4), (7, 0), (9, 1), (8, 3)])
        index = TurboQuantIndex(29, plan, "l2", seed=-2, codec="trellis")
        index.train(vectors(8, 29), learn="centre")
        index.add(vectors(5, 29), ids=[3, 1, 4, 15, 9])
    elif name == "empty-trained":
        index = TurboQuantIndex(7, 2, "ip")
        index.train(vectors(2, 7), learn="centre")
    else:
        index = TurboQuantIndex(8, 1, "ip")
        index.add(vectors(3, 8))
        index.remove([0, 1, 2])
    return index
