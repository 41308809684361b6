"""`viterbi.best_paths` in Triton: one warp holds the 256 costs of each of its rows in registers.

A step splits the costs into the two halves from which each next state is reached, adds the errors of the two windows
and keeps the cheaper. Which one was kept is one bit a state, 32 bytes a step and row, written to scratch memory and
read back, last step first, when the row is done. Sums are in the reference's order without contraction to multiply-add,
so the paths are equal to its, bit for bit.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"
# The kernel alone is untyped: Triton has types of its own.
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
def viterbi_kernel(
    values_ptr,  # (n, d) float32
    levels_ptr,  # every stage's (subsets, f) float32, one after the other
    windows_ptr,  # (stages, 512) int32
    fallen_ptr,  # (n, d, 32) uint8
    paths_ptr,  # (n, d) uint8
    n,
    d,
    STAGES: tl.constexpr,  # (steps, f, offset of the levels) for each stage
    ROWS: tl.constexpr,
):
    """The best path of each row, and on the way the bit that fell out before each state of each step."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows = tl.minimum(rows, n - 1).to(tl.int64)
    state = tl.arange(0, 256)
    cost = tl.where(state == 0, 0.0, float("inf"))[None, :] + tl.zeros((ROWS, 256), tl.float32)
    value_at = values_ptr + rows * d
    fallen_at = fallen_ptr + rows * d * 32
    for s in tl.static_range(len(STAGES)):
        F: tl.constexpr = STAGES[s][1]
        first = levels_ptr + STAGES[s][2] + tl.load(windows_ptr + s * 512 + state) * F
        second = levels_ptr + STAGES[s][2] + tl.load(windows_ptr + s * 512 + 256 + state) * F
        for _ in range(STAGES[s][0]):
            value = tl.load(value_at)[:, None]
            kept = value - tl.load(first)[None, :]
            kept = kept * kept
            other = value - tl.load(second)[None, :]
            other = other * other
            for f in tl.static_range(1, F):
                error = value - tl.load(first + f)[None, :]
                kept = tl.minimum(kept, error * error)
                error = value - tl.load(second + f)[None, :]
                other = tl.minimum(other, error * error)
            low, high = tl.split(tl.permute(tl.reshape(cost, (ROWS, 2, 128)), (0, 2, 1)))
            kept += tl.reshape(tl.join(low, low), (ROWS, 256))
            other += tl.reshape(tl.join(high, high), (ROWS, 256))
            bits = (other < kept).to(tl.int32) << (state % 8)[None, :]
            bits = tl.sum(tl.reshape(bits, (ROWS, 32, 8)), axis=2)
            tl.store(fallen_at[:, None] + tl.arange(0, 32)[None, :], bits.to(tl.uint8))
            cost = tl.minimum(kept, other)
            value_at += 1
            fallen_at += 32
    tl.debug_barrier()  # what one thread wrote another reads
    last = tl.argmin(cost, axis=1)
    path_at = paths_ptr + rows * d + d
    for _ in range(d):
        path_at -= 1
        fallen_at -= 32
        tl.store(path_at, (last & 1).to(tl.uint8))
        byte = tl.load(fallen_at + (last >> 3)).to(tl.int32)
        last = (last >> 1) | (((byte >> (last & 7)) & 1) << 7)


def best_paths(values: Tensor, stages: Sequence[Stage]) -> Tensor:
    """See `viterbi.best_paths`; values on a GPU."""
    count, dim = values.shape
    values = values.contiguous()
    paths = torch.empty((count, dim), dtype=torch.uint8, device=values.device)
    shapes, offset = [], 0
    for stage in stages:
        shapes.append((stage.size, stage.levels.shape[1], offset))
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
