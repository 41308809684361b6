"""Work on a GPU whose launches are remembered, and made again for other inputs.

What a small scan costs the host is mostly Python's: shapes, keys and sizes that are the same at each call. Here a call
is watched once: the kernels it launches, the memory it allocates, and which argument lies in which memory. A later call
with inputs of the same shape allocates its scratch at one go and launches the same kernels with new addresses. Nothing
is shared between calls, so threads and streams need no care.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs

Outputs = tuple[Tensor, ...]

_MOST = 64  # programs of a function
_ALIGNED = 512  # bytes, as torch's allocator does
_NEW, _SEEN, _CALLED = "new", "seen", "called"  # in place of a program: the second call of a shape is watched
_EMPTY = {torch.ops.aten.empty.memory_format, torch.ops.aten.new_empty.default, torch.ops.aten.empty_like.default}

_watching = threading.local()  # its `launches`: those of the call that is watched in this thread


class Launch(NamedTuple):
    """One launch: `run` of a compiled kernel takes the grid, the stream, the middle, then arguments and constants."""

    run: Callable[..., None]
    grid: tuple[int, int, int]
    middle: tuple[Any, ...]
    arguments: tuple[Any, ...]
    constants: tuple[Any, ...]


def launched(launch: Launch | None) -> None:
    """Notes a launch that has been made, if its thread's call is watched; None for one that cannot be made again."""
    launches = getattr(_watching, "launches", None)
    if launches is not None:
        launches.append(launch)


def hooked() -> bool:
    """Whether somebody, such as a profiler, is to be told of each launch: Triton does that."""
    hook = knobs.runtime.launch_enter_hook
    return bool(getattr(hook, "calls", hook))


class Relaunched:
    """A function of rows on a GPU whose launches are made again, where it does nothing but allocate and launch.

    A function that does other work on tensors is called each time; so is any on a CPU.

    Args:
        function: of contiguous rows (q, d) and hashable settings. All its kernels are launched by a
            `launch.Launcher`, and what they read besides the rows stays where it is. It returns tensors it has made.
    """

    def __init__(self, function: Callable[..., Outputs]) -> None:
        self._function = function
        self._programs: dict[Hashable, _Program | object] = {}

    def __call__(self, rows: Tensor, *settings: Hashable) -> Outputs:
        """What the function returns for rows and settings."""
        if not (rows.is_cuda and rows.is_contiguous()) or hooked():
            return self._function(rows, *settings)
        key = (rows.shape, rows.dtype, rows.data_ptr() % 16, settings)
        program = self._programs.get(key, _NEW)
        if isinstance(program, _Program):
            if rows.device.index == torch.cuda.current_device():
                return program(rows)
            with torch.cuda.device(rows.device):
                return program(rows)
        if program is _NEW:  # at the first call kernels are compiled and tables made
            if len(self._programs) >= _MOST:
                self._programs.clear()
            self._programs[key] = _SEEN
        if program is not _SEEN:
            return self._function(rows, *settings)
        outputs, self._programs[key] = _watched(self._function, rows, settings)
        return outputs


class _Watch(TorchDispatchMode):
    """Collects the tensors that are allocated, and sees whether anything else is done."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: list[Tensor] = []
        self.others = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _EMPTY:
            self.made.append(out)
        elif not func.is_view:
            self.others = True
        return out


def _watched(
    function: Callable[..., Outputs], rows: Tensor, settings: tuple[Hashable, ...]
) -> tuple[Outputs, _Program | str]:
    """A call's outputs and its program, or what is in place of one."""
    launches: list[Launch | None] = []
    _watching.launches = launches
    try:
        with _Watch() as watch:
            outputs = function(rows, *settings)
    finally:
        _watching.launches = None
    whole = [launch for launch in launches if launch is not None]
    if len(whole) < len(launches):
        return outputs, _SEEN
    made = {tensor.data_ptr() for tensor in watch.made}
    if watch.others or not all(out.data_ptr() in made and out.is_contiguous() and out.numel() for out in outputs):
        return outputs, _CALLED
    return outputs, _Program(rows, outputs, watch.made, whole)


class _Program:
    """Launches of which some arguments lie in the rows, in scratch memory, or in outputs, and move with them."""

    def __init__(self, rows: Tensor, outputs: Outputs, made: list[Tensor], launches: list[Launch]) -> None:
        self._device, self._index = rows.device, rows.device.index
        self._outputs = [(tuple(out.shape), out.dtype) for out in outputs]
        homes = [(rows.data_ptr(), rows.nbytes, 0, 0)]  # address, bytes, which base (rows, scratch, outputs), offset
        homes += [(out.data_ptr(), out.nbytes, 2 + number, 0) for number, out in enumerate(outputs)]
        given = {out.data_ptr() for out in outputs}
        size = 0
        for tensor in made:
            if tensor.data_ptr() not in given:
                homes.append((tensor.data_ptr(), tensor.nbytes, 1, size))
                size += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
        self._scratch = size
        self._held: list[Tensor] = []  # what stays where it is
        self._launches = []
        for run, grid, middle, arguments, constants in launches:
            tensors = [(place, value) for place, value in enumerate(arguments) if isinstance(value, Tensor)]
            found = [(place, value, _home(value, homes)) for place, value in tensors]
            moving = [(place, *home) for place, _, home in found if home is not None]
            self._held += [value for _, value, home in found if home is None]
            fixed = [value.data_ptr() if isinstance(value, Tensor) else value for value in arguments]
            self._launches.append((run, grid, middle, fixed, moving, constants))

    def __call__(self, rows: Tensor) -> Outputs:
        """The outputs for other rows of the shape."""
        stream = torch._C._cuda_getCurrentRawStream(self._index)
        outputs: Outputs = ()
        bases = [rows.data_ptr(), 0]
        if self._scratch:
            scratch = torch.empty(self._scratch, dtype=torch.uint8, device=self._device)
            bases[1] = scratch.data_ptr()
        for run, grid, middle, fixed, moving, constants in self._launches:
            arguments = fixed.copy()
            for place, base, offset in moving:
                if base >= len(bases):  # as late as can be: the device is at work already
                    outputs = self._empty()
                    bases += [out.data_ptr() for out in outputs]
                arguments[place] = bases[base] + offset
            run(*grid, stream, *middle, *arguments, *constants)
        return outputs or self._empty()

    def _empty(self) -> Outputs:
        return tuple([torch.empty(shape, dtype=dtype, device=self._device) for shape, dtype in self._outputs])


def _home(tensor: Tensor, homes: list[tuple[int, int, int, int]]) -> tuple[int, int] | None:
    """The base and the offset from it at which a tensor lies; None if it stays where it is."""
    address = tensor.data_ptr()
    for first, nbytes, base, offset in homes:
        if first <= address < first + nbytes:
            return base, offset + address - first
    return None
