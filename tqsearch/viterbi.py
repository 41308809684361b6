"""The walk of least squared error through a trellis of 256 states, by dynamic programming (Viterbi).

A state is the last eight bits of a path, the newest lowest. Each step adds a bit: its window is the state and the new
bit, nine bits, and the window names the subset of levels from which the step's value takes the nearest.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

STATES = 256

# Back pointers held at a time, one a state, step and row. A GPU wants many rows a step, a CPU few in its cache.
_HELD_CPU = 1 << 26
_HELD_GPU = 1 << 31
# On a CPU a step is so short that torch's threads would mostly wait for one another: so many rows keep its operations
# below the size at which torch divides them, and blocks of rows run side by side instead.
_ROWS_CPU = 127


class Stage(NamedTuple):
    """`size` consecutive steps with the same levels.

    Attributes:
        size: number of steps.
        levels: (subsets, f) float32.
        windows: (2 * STATES,) int32, the subset of each window.
    """

    size: int
    levels: Tensor
    windows: Tensor


def best_paths(values: Tensor, stages: Sequence[Stage]) -> Tensor:
    """The path bits of each row, from state 0 to any state, whose levels are nearest to the row.

    The sums run in float32 in a fixed order, so a row's path is the same in any batch and on any device.

    Args:
        values: (n, d) float32, finite.
        stages: sizes summing to d.

    Returns:
        (n, d) uint8, 0 or 1.
    """
    count, dim = values.shape
    paths = torch.empty((count, dim), dtype=torch.uint8, device=values.device)
    on_cpu = values.device.type == "cpu"
    size = min(max((_HELD_CPU if on_cpu else _HELD_GPU) // (STATES * max(dim, 1)), 16), max(count, 1))
    if on_cpu and torch.get_num_threads() > 1:
        size = min(size, _ROWS_CPU)
    starts = range(0, count, size)
    workers = min(torch.get_num_threads(), len(starts)) if on_cpu else 1

    def find(worker: int) -> None:
        fallen = torch.empty((dim, STATES, size), dtype=torch.bool, device=values.device)
        for start in starts[worker :: max(workers, 1)]:
            rows = slice(start, start + size)
            paths[rows] = _best_columns(values[rows].t().contiguous(), stages, fallen).t()

    if workers <= 1:
        find(0)
    else:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(find, range(workers)))
    return paths


def _best_columns(columns: Tensor, stages: Sequence[Stage], fallen: Tensor) -> Tensor:
    """`best_paths` of columns, (d, n) float32 to (d, n) uint8; `fallen` is (d, STATES, n or more) bool, to write to.

    A window is a bit that falls out, then the next state: window = 256 * fallen + next, and the state before is window
    >> 1. For each next state the cheaper of its two windows is kept.
    """
    dim, count = columns.shape
    cost = torch.full((STATES, count), torch.inf, dtype=torch.float32, device=columns.device)
    cost[0] = 0.0
    fallen = fallen.view(-1)[: dim * STATES * count].view(dim, STATES, count)
    step = 0
    for stage in stages:
        subsets = stage.windows.view(2, STATES)
        for value, choice in zip(columns[step : step + stage.size], fallen[step : step + stage.size], strict=True):
            errors = (value - stage.levels[:, :, None]).square().amin(dim=1)  # (subsets, n)
            before = cost.view(2, STATES // 2, 1, count)
            kept, other = (
                (torch.index_select(errors, 0, subsets[i]).view(-1, 2, count) + before[i]).view(STATES, count)
                for i in range(2)
            )
            torch.lt(other, kept, out=choice)
            torch.minimum(other, kept, out=cost)
        step += stage.size
    path = torch.empty((dim, count), dtype=torch.uint8, device=columns.device)
    state = cost.argmin(dim=0)
    for t in range(dim - 1, -1, -1):
        path[t] = state & 1
        state = (state >> 1) + fallen[t].gather(0, state[None])[0] * (STATES // 2)
    return path
