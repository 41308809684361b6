"""An oracle of compressed caches that shares no code with them: the library's dense layers, where old tokens become
their dequantized values, computed in numpy float64 from the definitions.

Everything a cache can be asked (crop, reorder, select, ...) is then the library's own slicing of dense tensors.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from kv_trellis_oracle import nearest_levels
from transformers.cache_utils import DynamicCache, DynamicLayer, LinearAttentionAndFullAttentionLayer

# Float32 against float64, relative to a vector's norm.
ROUNDING = 2e-5


def pairs_of(bits, dim):
    """(size, width) of the bands: fractions take the wide one first, its size a multiple of 8."""
    low = int(bits)
    wide = min(8 * round((bits - low) * dim / 8), dim)
    return [(size, width) for size, width in ((wide, low + 1), (dim - wide, low)) if size]


def inverse_rotation(oracle, dim, seed):
    """The matrix by which rotated rows are multiplied to rotate them back: the rotation is orthogonal."""
    return oracle.rotate(np.eye(dim), seed).T


def dequantize(oracle, rows, pairs, seed, offset=None, codec="scalar"):
    """Rows (n, d) encoded and decoded in float64.

    Returns:
        the estimates, and for each row by how much rounding alone may move its estimate: where a coordinate lies within
        rounding of a boundary, two walks through a trellis are equally good, or the scale is near a tie of float16.
    """
    dim = rows.shape[1]
    shift = 0.0 if offset is None else offset
    rest = rows - shift
    unit = oracle.unit(rest, seed)
    levels, slack = nearest_levels(unit, pairs) if codec == "trellis" else scalar_levels(oracle, unit, pairs)
    norms, dots = np.linalg.norm(rest, axis=1), (unit * levels).sum(axis=1)
    exact = np.where(dots > 0, norms * math.sqrt(dim) / np.where(dots > 0, dots, 1.0), 0.0)
    with np.errstate(over="ignore"):
        scales, ends = exact.astype(np.float16), [(exact * f).astype(np.float16) for f in (1 - 1e-5, 1 + 1e-5)]
    estimate = scales.astype(float)[:, None] * levels @ inverse_rotation(oracle, dim, seed)
    slack = slack * exact + np.abs(ends[1].astype(float) - ends[0]) * np.linalg.norm(levels, axis=1)
    return estimate + shift, slack + ROUNDING * (
        np.linalg.norm(rows, axis=1) + np.linalg.norm(np.broadcast_to(shift, rows.shape), axis=1)
    )


def scalar_levels(oracle, unit, pairs):
    """The nearest level of each coordinate, and for each row the gaps of those at a boundary."""
    levels, slack = np.zeros_like(unit), np.zeros(len(unit))
    for band, table, boundaries in oracle.tables(pairs, unit.shape[1]):
        index = np.searchsorted(boundaries, unit[:, band], side="left")
        levels[:, band] = table[index]
        if len(boundaries):
            gap = np.abs(unit[:, band, None] - boundaries).min(axis=2)
            slack += (gap < 1e-4).sum(axis=1) * np.diff(table).max()
    return levels, slack


@dataclass(frozen=True)
class Shape:
    """What the oracle must know of a cache."""

    key_bits: float | None = 4
    value_bits: float | None = 4
    residual: int = 8
    sinks: int = 4
    block: int = 8
    seed: int = 0
    codec: str = "scalar"


class FakeQuantMixin:
    """A dense layer whose tokens become their dequantized values as they get old."""

    def prepare(self, oracle, shape):
        self.oracle, self.shape = oracle, shape
        self.old, self.offset = 0, None
        self.slack = None  # (B, H, T) of keys and of values
        return self

    def update(self, key_states, value_states, *args, **kwargs):
        before = DynamicLayer.get_seq_length(self)
        keys, values = DynamicLayer.update(self, key_states, value_states)
        fresh = [torch.zeros(states.shape[:3], dtype=torch.float64) for states in (key_states, value_states)]
        self.slack = fresh if not before else [torch.cat(both, dim=2) for both in zip(self.slack, fresh, strict=True)]
        self.seen = [part.clone() for part in self.slack]
        length = keys.shape[2]
        shape = self.shape
        start = shape.sinks + self.old
        count = (length - start - shape.residual) // shape.block * shape.block
        if count > 0:
            if not self.old:
                recent = keys[:, :, start:].double()
                self.offset = recent.mean(dim=(0, 2)).float()
            self.keys, self.values = keys.clone(), values.clone()
            stop = start + count
            for which, (states, bits, seed) in enumerate(
                ((self.keys, shape.key_bits, shape.seed), (self.values, shape.value_bits, shape.seed + 1))
            ):
                if bits is None:
                    continue
                for head in range(states.shape[1]):
                    rows = states[:, head, start:stop].double().numpy()
                    offset = self.offset[head].double().numpy() if which == 0 else None
                    pairs = pairs_of(bits, rows.shape[2])
                    codec = "scalar" if bits == 8 else shape.codec
                    flat = rows.reshape(-1, rows.shape[2])
                    estimate, slack = dequantize(self.oracle, flat, pairs, seed, offset, codec)
                    states[:, head, start:stop] = torch.from_numpy(estimate.reshape(rows.shape)).to(states.dtype)
                    self.slack[which][:, head, start:stop] += torch.from_numpy(slack.reshape(rows.shape[:2]))
            self.old += count
        return keys, values

    def crop(self, tokens_to_remove):
        DynamicLayer.crop(self, tokens_to_remove)
        if not self.is_initialized:
            return
        length = DynamicLayer.get_seq_length(self)
        self.slack = [part[:, :, :length] for part in self.slack]
        self.old = min(self.old, max(length - self.shape.sinks, 0) // self.shape.block * self.shape.block)

    def index(self, change):
        if self.slack is not None:
            self.slack = [change(part) for part in self.slack]

    def reorder_cache(self, beam_idx):
        super().reorder_cache(beam_idx)
        self.index(lambda part: part[beam_idx])

    def batch_select_indices(self, indices):
        super().batch_select_indices(indices)
        self.index(lambda part: part[indices])

    def batch_repeat_interleave(self, repeats):
        super().batch_repeat_interleave(repeats)
        self.index(lambda part: part.repeat_interleave(repeats, dim=0))

    def reset(self):
        super().reset()
        self.keys = self.values = None
        self.is_initialized = False
        self.prepare(self.oracle, self.shape)


class FakeQuantLayer(FakeQuantMixin, DynamicLayer):
    pass


class FakeQuantHybridLayer(FakeQuantMixin, LinearAttentionAndFullAttentionLayer):
    pass


def fake_cache(oracle, config, shape):
    """The oracle for a whole model."""
    cache = DynamicCache(config=config)
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[index] = FakeQuantLayer().prepare(oracle, shape)
        elif type(layer) is LinearAttentionAndFullAttentionLayer:
            cache.layers[index] = FakeQuantHybridLayer(layer.number_of_states).prepare(oracle, shape)
    return cache


def check_states(actual, expected, slack):
    """Decoded states (B, H, T, D) equal the oracle's within each token's slack, and exactly where it has none."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    distance = (actual.double() - expected.double()).norm(dim=3)
    worst = (distance - slack).max() if distance.numel() else torch.tensor(0.0)
    assert worst <= 0, f"a token is off by {float(worst):.2e} more than rounding explains"
