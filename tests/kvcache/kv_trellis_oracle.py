"""The nearest walk through the trellis for many rows at once, in numpy float64, and how near the next best comes.

The definition a coordinate at a time, and all constants, are in `trellis_oracle`.
"""

import numpy as np
from trellis_oracle import POLYNOMIALS, level_table, widths_of

# Squared errors closer than this (of rows of squared norm d) may compare otherwise in float32.
NEAR = 1e-4


def lows(bits):
    """The number's low bits of every window of nine path bits."""
    return np.array(
        [sum((window & taps).bit_count() % 2 << i for i, taps in enumerate(POLYNOMIALS[bits])) for window in range(512)]
    )


def nearest_levels(unit, pairs):
    """The levels of least squared error of each row (n, d), of all walks, and how far apart equally good ones are.

    Each state keeps its two best walks: the best of all, and the best of all others.
    """
    count, dim = unit.shape
    errors = np.full((count, 256, 2), np.inf)
    errors[:, 0, 0] = 0.0
    back = np.zeros((dim, count, 256, 2), dtype=np.uint8)
    tables, widths = {bits: (level_table(bits), lows(bits)) for _, bits in pairs}, widths_of(pairs)
    every = np.arange(512)
    for t, bits in enumerate(widths):
        table, low = tables[bits]
        by_subset = np.square(unit[:, t, None, None] - table.reshape(-1, 1 << len(POLYNOMIALS[bits])).T).min(axis=2)
        after = errors[:, every >> 1] + by_subset[:, low][:, :, None]  # (n, windows, rank)
        candidates = after.reshape(count, 2, 256, 2).transpose(0, 2, 1, 3).reshape(count, 256, 4)
        back[t] = np.argsort(candidates, axis=2, kind="stable")[:, :, :2]
        errors = np.take_along_axis(candidates, back[t].astype(int), axis=2)
    ends = np.argsort(errors.reshape(count, 512), axis=1, kind="stable")[:, :2]
    best, second = (walk(unit, ends[:, i], back, widths, tables) for i in range(2))
    margin = np.diff(np.take_along_axis(errors.reshape(count, 512), ends, axis=1))[:, 0]
    slack = np.where(margin < NEAR, np.linalg.norm(best[0] - second[0], axis=1), 0.0)
    return best[0], slack + best[1]


def walk(unit, ends, back, widths, tables):
    """The levels along a walk from its end, and the sum of gaps to levels of the same subset as near as the nearest."""
    rows, state, rank = np.arange(len(ends)), ends // 2, ends % 2
    levels, slack = np.empty_like(unit), np.zeros(len(ends))
    for t in reversed(range(len(widths))):
        choice = back[t][rows, state, rank].astype(int)
        window, rank = state + 256 * (choice // 2), choice % 2
        table, low = tables[widths[t]]
        step = 1 << len(POLYNOMIALS[widths[t]])
        own = table.reshape(-1, step).T[low[window]]  # (n, levels of the subset)
        errors = np.square(unit[:, t, None] - own)
        order = np.argsort(errors, axis=1)
        levels[:, t] = own[rows, order[:, 0]]
        if own.shape[1] > 1:
            two = np.take_along_axis(errors, order[:, :2], axis=1)
            gap = np.abs(np.diff(np.take_along_axis(own, order[:, :2], axis=1)))[:, 0]
            slack += np.where(two[:, 1] - two[:, 0] < NEAR, gap, 0.0)
        state = window >> 1
    return levels, slack
