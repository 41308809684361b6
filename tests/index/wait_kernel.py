"""A kernel that waits for the host; imported where there is Triton."""

import triton
import triton.language as tl


@triton.jit
def wait_for(flag_ptr, seen_ptr, turns):
    """Reads a flag in pinned memory until it is set, so many times at most, and writes what it read last."""
    value = tl.load(flag_ptr)
    turn = 0
    while (value == 0) & (turn < turns):
        value = tl.load(flag_ptr, volatile=True)
        turn += 1
    tl.store(seen_ptr, value)
