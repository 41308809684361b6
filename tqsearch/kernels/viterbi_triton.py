"""`viterbi.best_paths` in Triton: one warp holds the 256 costs of each of its rows in registers.

A step splits the costs into the two halves from which each next state is reached, adds the errors of the two windows
and keeps the cheaper. Which one was kept is one bit a state, 32 bytes a step and row, written to scratch memory and
read back, last step first, when the row is done. Sums are in the reference's order without contraction to multiply-add,
so the paths are equal to its, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tqsearch.viterbi import STATES, Stage

_ROWS = 2  # a program
_SCRATCH = 1 << 28  # bytes


@triton.jit
def _stage(
    cost,  # (ROWS, 256) float32
    values_ptr,
    levels_ptr,  # (subsets, F) float32
    windows_ptr,  # (512,) int32
    fallen_ptr,
    rows,
    d,
    start,
    STEPS: tl.constexpr,
    F: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The costs after the steps of one stage."""
    state = tl.arange(0, 256)
    first = tl.load(windows_ptr + state) * F
    second = tl.load(windows_ptr + 256 + state) * F
    for t in range(start, start + STEPS):
        value = tl.load(values_ptr + rows * d + t)[:, None]
        kept = value - tl.load(levels_ptr + first)[None, :]
        kept = kept * kept
        other = value - tl.load(levels_ptr + second)[None, :]
        other = other * other
        for f in tl.static_range(1, F):
            error = value - tl.load(levels_ptr + f + first)[None, :]
            kept = tl.minimum(kept, error * error)
            error = value - tl.load(levels_ptr + f + second)[None, :]
            other = tl.minimum(other, error * error)
        low, high = tl.split(tl.permute(tl.reshape(cost, (ROWS, 2, 128)), (0, 2, 1)))
        kept += tl.reshape(tl.join(low, low), (ROWS, 256))
        other += tl.reshape(tl.join(high, high), (ROWS, 256))
        bits = (other < kept).to(tl.int32) << (state % 8)[None, :]
        bits = tl.sum(tl.reshape(bits, (ROWS, 32, 8)), axis=2)
        into = fallen_ptr + (rows * d + t)[:, None] * 32 + tl.arange(0, 32)[None, :]
        tl.store(into, bits.to(tl.uint8))
        cost = tl.minimum(kept, other)
    return cost


@triton.jit
def viterbi_kernel(
    values_ptr,  # (n, d) float32
    levels_ptr,  # every stage's (subsets, f) float32, one after the other
    windows_ptr,  # (stages, 512) int32
    fallen_ptr,  # (n, d, 32) uint8
    paths_ptr,  # (n, d) uint8
    n,
    d,
    STAGES: tl.constexpr,  # (first step, steps, f, offset of the levels) for each stage
    ROWS: tl.constexpr,
):
    """The best path of each row, and on the way the bit that fell out before each state of each step."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows = tl.minimum(rows, n - 1).to(tl.int64)
    cost = tl.where(tl.arange(0, 256) == 0, 0.0, float("inf"))[None, :] + tl.zeros((ROWS, 256), tl.float32)
    for s in tl.static_range(len(STAGES)):
        # fmt: off
        cost = _stage(
            cost, values_ptr, levels_ptr + STAGES[s][3], windows_ptr + s * 512, fallen_ptr, rows, d,
            STAGES[s][0], STAGES[s][1], STAGES[s][2], ROWS)
        # fmt: on
    tl.debug_barrier()  # what one thread wrote another reads
    last = tl.argmin(cost, axis=1)
    for i in range(d):
        step = rows * d + (d - 1 - i)
        tl.store(paths_ptr + step, (last & 1).to(tl.uint8))
        byte = tl.load(fallen_ptr + step * 32 + (last >> 3)).to(tl.int32)
        last = (last >> 1) | (((byte >> (last & 7)) & 1) << 7)


def best_paths(values: Tensor, stages: Sequence[Stage]) -> Tensor:
    """See `viterbi.best_paths`; values on a GPU."""
    count, dim = values.shape
    values = values.contiguous()
    paths = torch.empty((count, dim), dtype=torch.uint8, device=values.device)
    shapes, step, offset = [], 0, 0
    for stage in stages:
        shapes.append((step, stage.size, stage.levels.shape[1], offset))
        step += stage.size
        offset += stage.levels.numel()
    levels = torch.cat([stage.levels.flatten() for stage in stages])
    windows = torch.cat([stage.windows for stage in stages])
    size = min(max(_SCRATCH // (max(dim, 1) * STATES // 8), 1), count)
    fallen = torch.empty((size, dim, STATES // 8), dtype=torch.uint8, device=values.device)
    for start in range(0, count, max(size, 1)):
        block = values[start : start + size]
        viterbi_kernel[(triton.cdiv(len(block), _ROWS),)](
            block,
            levels,
            windows,
            fallen,
            paths[start : start + size],
            len(block),
            dim,
            STAGES=tuple(shapes),
            ROWS=_ROWS,
            num_warps=1,
            enable_fp_fusion=False,
        )
    return paths
