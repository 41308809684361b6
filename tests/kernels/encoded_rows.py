"""Encoded rows whose levels are small integers, so that scores are exact in float32."""

import numpy as np
import torch

from tqsearch import kernels
from tqsearch.kernels import BandTable

PLANS = [[(8, 4)], [(1, 1)], [(63, 2)], [(65, 3)], [(100, 8)], [(24, 3), (40, 2)], [(7, 5), (9, 0), (30, 1), (3, 6)]]
PLANS += [[(16, 7)], [(5, 0), (4, 4)], [(128, 1)]]


class Rows:
    """Encoded rows of integer levels, with float64 copies of everything."""

    def __init__(self, oracle, pairs, count, seed=0, queries=5):
        rng = np.random.default_rng(seed)
        self.dim = sum(size for size, _ in pairs)
        self.bands, codes, levels, self.tables, start = [], [], [], [], 0
        for size, width in pairs:
            table = np.sort(rng.choice(np.arange(-128, 128), 2**width, replace=False)) if width else np.zeros(1)
            boundaries = (table[1:] + table[:-1]) / 2
            band = BandTable(size, width, as_float(boundaries), as_float(table), tuple(map(int, table)), 0.0, 1.0)
            self.bands.append(band)
            code = rng.integers(0, 2**width, (count, size))
            codes.append(code)
            levels.append(table[code].astype(np.float64))
            self.tables.append((slice(start, start + size), table, boundaries))
            start += size
        self.bands = tuple(self.bands)
        self.codes, self.levels = np.concatenate(codes, axis=1), np.concatenate(levels, axis=1)
        packed = b"".join(oracle.pack(row.tolist(), pairs) for row in self.codes)
        nbytes = len(oracle.pack([0] * self.dim, pairs))
        self.packed = torch.from_numpy(np.frombuffer(packed, np.uint8).reshape(count, nbytes).copy())
        self.scales = 2.0 ** rng.integers(-3, 3, count)
        self.queries = rng.integers(-8, 9, (queries, self.dim)).astype(np.float64)
        self.bias = rng.integers(-50, 50, count) / 2.0
        self.mask = rng.random(count) < 0.5
        self.products = self.queries @ self.levels.T * self.scales

    def scan(self, k, bias=False, mask=None):
        mask = None if mask is None else torch.from_numpy(np.asarray(mask))
        bias = as_float(self.bias) if bias else None
        arguments = (as_float(self.queries), self.packed, as_float(self.scales), bias, mask, self.bands, k)
        return [out.numpy() for out in kernels.scan(*arguments)]


def as_float(values):
    return torch.from_numpy(np.asarray(values, dtype=np.float32))
