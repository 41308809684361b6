"""Recording what a call does on a GPU, as a CUDA graph: to do it again costs the host one launch.

While a graph is recorded, no other thread of the process may synchronize the whole device.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import torch

T = TypeVar("T")

_recording = threading.local()  # its `kept`: what a recording in progress must keep
_capturing = threading.Lock()  # one at a time, all on one stream of a device: a stream costs memory for good
_capture_streams: dict[torch.device, torch.cuda.Stream] = {}


def kept(value: T) -> T:
    """The value, which a recording that is being made keeps as long as itself: a graph reads what a cache may drop."""
    values = getattr(_recording, "kept", None)
    if values is not None:
        values.append(value)
    return value


def record(call: Callable[[], T], device: torch.device, pool: Any) -> tuple[T, torch.cuda.CUDAGraph, list[object]]:
    """Records what a call does on a GPU.

    Args:
        call: does nothing that the host has to wait for, and was run before: what is made on first use exists.
        device: the GPU.
        pool: of memory, from `torch.cuda.graph_pool_handle`; after a recording that failed it takes no other.

    Returns:
        What the call returned, whose tensors are filled at each replay; the graph; and what it reads, to be held as
        long as the graph.

    Raises:
        RuntimeError: the call, or another thread, did what cannot be recorded.
    """
    with _capturing:
        if device not in _capture_streams:
            _capture_streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream = _capture_streams[device]
        graph = torch.cuda.CUDAGraph()
        read: list[object] = []
        _recording.kept = read
        try:
            with torch.cuda.stream(stream):
                # Not `torch.cuda.graph`, which waits for the device and empties the allocator's cache first.
                graph.capture_begin(pool, "thread_local")
                try:
                    out = call()
                    graph.capture_end()
                except BaseException:
                    with suppress(RuntimeError):  # the same again: what failed has spoilt the recording
                        graph.capture_end()
                    # Then torch's allocator still waits for its end, and takes no other recording into this pool; the
                    # generator does too, and would refuse to draw.
                    generator = torch.cuda.default_generators[stream.device_index]
                    generator.graphsafe_set_state(generator.clone_state())
                    raise
            return out, graph, read
        finally:
            _recording.kept = None
