"""Many rows to columns, a block at a time: what a device holds of vectors that lie elsewhere is bounded by the block.

From host memory to a GPU the copies overlap with the work: a block is copied to pinned memory and sent by a stream of
its own while the one before is encoded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tqsearch.arrays import check_finite
from tqsearch.progress import progress
from tqsearch.segments import Columns

BLOCK_BYTES = 64 << 20  # of a block's rows in float32
_SHOWN_BYTES = 1 << 30  # of the vectors whose addition shows a progress bar
_SLOWER = 64  # by so much an encoder that is slow takes longer


def encode_blocks(
    rows: Tensor, device: torch.device, encode: Callable[[Tensor, int], Columns], *, slow: bool = False
) -> Columns:
    """The columns of all rows.

    Args:
        rows: (n, dim) real numbers, on any device, n >= 1.
        device: where they are encoded and the columns lie.
        encode: takes a block, (m, dim) float32 on `device`, and the number of its first row.
        slow: on a CPU it takes minutes for what others do in seconds: the progress bar is shown earlier.

    Raises:
        InvalidInputError: a number is not finite in float32, or `encode` raises it.
    """
    count, dim = rows.shape
    slower = _SLOWER if slow and device.type == "cpu" else 1
    size = max(1, BLOCK_BYTES // slower // (4 * dim))
    result: Columns = {}
    with progress(count, "adding", "vectors", shown=4 * count * dim * slower >= _SHOWN_BYTES) as bar:
        for first, block in _moved(rows, device, size):
            # One reduction finds a bad value: nan and inf survive a sum. To name the row takes a look at all rows.
            if not torch.isfinite(block.sum(dtype=torch.float64)):
                check_finite(rows.float(), "vectors")
            columns = encode(block, first)
            if len(block) == count:
                return columns
            for name, column in columns.items():
                if first == 0:
                    result[name] = column.new_empty((count, *column.shape[1:]))
                result[name][first : first + len(block)] = column
            bar.update(len(block))
    return result


def _moved(rows: Tensor, device: torch.device, size: int) -> Iterator[tuple[int, Tensor]]:
    """Blocks of rows as float32 on the device, each with the number of its first row."""
    if rows.device.type == "cpu" and device.type == "cuda":
        yield from _sent(rows, device, size)
        return
    for first in range(0, len(rows), size):
        yield first, rows[first : first + size].to(device=device, dtype=torch.float32)


def _sent(rows: Tensor, device: torch.device, size: int) -> Iterator[tuple[int, Tensor]]:
    """`_moved` from host memory to a GPU: two buffers on each side, so that a copy and the work overlap."""
    size = min(size, len(rows))
    shape = (size, rows.shape[1])
    pinned = [torch.empty(shape, dtype=rows.dtype, device="cpu", pin_memory=True) for _ in range(2)]
    staged = [torch.empty(shape, dtype=rows.dtype, device=device) for _ in range(2)]
    sent, used = ([torch.cuda.Event() for _ in range(2)] for _ in range(2))  # type: ignore[no-untyped-call]
    copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    work = torch.cuda.current_stream(device)
    copies.wait_stream(work)  # the buffers' memory may still be in use there

    def send(first: int, slot: int) -> None:
        block = rows[first : first + size]
        sent[slot].synchronize()  # the pinned buffer is free again
        pinned[slot][: len(block)].copy_(block)
        with torch.cuda.stream(copies):
            copies.wait_event(used[slot])
            staged[slot][: len(block)].copy_(pinned[slot][: len(block)], non_blocking=True)
            sent[slot].record(copies)

    starts = range(0, len(rows), size)
    send(0, 0)
    for number, first in enumerate(starts):
        slot = number % 2
        if first + size < len(rows):
            send(first + size, 1 - slot)
        work.wait_event(sent[slot])
        yield first, staged[slot][: min(size, len(rows) - first)].float()
        used[slot].record(work)
    work.wait_stream(copies)
