"""A kernel that waits for the host; imported where there is Triton."""

from typing import Any

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def wait_for(flag_ptr: Any, seen_ptr: Any, TURNS: Any) -> None:
    """Reads a flag in pinned memory until it is set, so many times at most, and writes what it read last."""
    value = tl.load(flag_ptr)
    turn = 0
    while (value == 0) & (turn < TURNS):
        value = tl.load(flag_ptr, volatile=True)
        turn += 1
    tl.store(seen_ptr, value)
