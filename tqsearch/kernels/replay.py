"""Work on a GPU that is recorded once, as a CUDA graph, and replayed: a call costs the host a copy and a launch.

Launching the kernels of a small search one by one takes the host longer than some of them run.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import Any, TypeVar

import torch
from torch import Tensor

MOST_ROWS = 64  # of a call that is replayed: what more rows cost the device hides what they cost the host
_CALLS_BEFORE = 2  # calls of a shape that are not recorded: many shapes come once
_MOST_STREAMS = 2  # that have recordings; on others every call launches its kernels
_MOST_RECORDINGS = 16  # of a stream; the one that was not used for longest goes
_MOST_COUNTED = 1024  # shapes of a stream whose calls are counted

Outputs = tuple[Tensor, ...]
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
        pool: of memory, from `torch.cuda.graph_pool_handle`.

    Returns:
        What the call returned, whose tensors are filled at each replay; the graph; and what it reads, to be held as
        long as the graph.
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
                except BaseException:
                    with suppress(RuntimeError):  # the same again: what failed has spoilt the recording
                        graph.capture_end()
                    raise
                graph.capture_end()
            return out, graph, read
        finally:
            _recording.kept = None


class Replayed:
    """A function of rows that is replayed where that is possible, and called where not; the results are the same.

    It is replayed for up to `MOST_ROWS` rows on a GPU, from the third call on with the same arguments but for the rows'
    values, rounded up to a power of two in number. What is replayed on two streams shares no memory; calls from several
    threads are put in order for as long as it takes to launch them. Outputs are memory of their own.

    Args:
        function: of rows (q, d) float32, and of hashable settings; its outputs have q rows, each of which depends on
            one row only. Between calls the tensors that it reads besides stay where they are. It must not wait for the
            device.
    """

    def __init__(self, function: Callable[..., Outputs]) -> None:
        self._function = function
        self._streams: dict[int, _Stream] = {}

    def __call__(self, rows: Tensor, *settings: Hashable) -> Outputs:
        """What the function returns for rows (q, d) and settings."""
        stream = self._stream(rows)
        if stream is None:
            return self._function(rows, *settings)
        key = (1 << (len(rows) - 1).bit_length(), rows.shape[1], *settings)
        with stream.lock:
            recording = stream.recordings.get(key)
            if recording is None and stream.counted(key) > _CALLS_BEFORE:
                recording = _Recording(self._function, rows, key, stream.pool)
                stream.keep(key, recording)
            if recording is not None:
                stream.recordings.move_to_end(key)
                return recording.replay(rows)
        return self._function(rows, *settings)

    def _stream(self, rows: Tensor) -> _Stream | None:
        """The current stream's recordings; None where nothing is replayed."""
        if not (rows.is_cuda and 1 <= len(rows) <= MOST_ROWS) or torch.cuda.is_current_stream_capturing():
            return None
        number = torch.cuda.current_stream(rows.device).cuda_stream
        if number not in self._streams and len(self._streams) < _MOST_STREAMS:
            self._streams[number] = _Stream()
        return self._streams.get(number)


class _Stream:
    """The recordings of a stream.

    Between replays nothing in their memory is needed, so they share it; the lock keeps replays apart until the outputs'
    copies are launched too.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.pool = torch.cuda.graph_pool_handle()
        self.recordings: OrderedDict[Hashable, _Recording] = OrderedDict()
        self._calls: Counter[Hashable] = Counter()

    def counted(self, key: Hashable) -> int:
        """How many calls there were of a key, this one included."""
        if len(self._calls) > _MOST_COUNTED:
            self._calls.clear()
        self._calls[key] += 1
        return self._calls[key]

    def keep(self, key: Hashable, recording: _Recording) -> None:
        """Adds a recording, and drops the one that was not used for longest where they are too many."""
        self.recordings[key] = recording
        if len(self.recordings) > _MOST_RECORDINGS:
            oldest, _ = self.recordings.popitem(last=False)
            self._calls.pop(oldest, None)


class _Recording:
    """The work of a function on rows of one number, which are copied to where it reads them."""

    def __init__(self, function: Callable[..., Outputs], rows: Tensor, key: tuple[Any, ...], pool: Any) -> None:
        count, dim, *settings = key
        with torch.inference_mode(False), torch.no_grad():
            self._rows = torch.zeros((count, dim), dtype=rows.dtype, device=rows.device)
            function(self._rows, *settings)  # what is made on first use, compiled kernels and tables, is made here
            self._outputs, self._graph, self._kept = record(lambda: function(self._rows, *settings), rows.device, pool)

    def replay(self, rows: Tensor) -> Outputs:
        """The outputs for such rows, or fewer."""
        self._rows[: len(rows)].copy_(rows)
        self._graph.replay()
        return tuple(output[: len(rows)].clone() for output in self._outputs)
