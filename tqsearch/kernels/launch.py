"""Launching a compiled Triton kernel again at little cost to the host.

At each launch Triton hashes every argument, constants of a hundred words among them, to find the variant to run, and
asks the driver about every tensor: longer than a short kernel runs. Here the caller names the variant by a key of its
own, and Triton's launcher gets addresses, which it takes as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel

from tqsearch.kernels.relaunch import Launch, hooked, launched

MOST = 1024  # variants kept of a kernel


class Launcher:
    """A kernel, and its compiled variants by key.

    Args:
        kernel: a `triton.jit` function whose constants come last.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._known: dict[Hashable, tuple[CompiledKernel, tuple[Any, ...]]] = {}

    def __contains__(self, key: Hashable) -> bool:
        """Whether the variant of a key is compiled."""
        return key in self._known

    def __call__(
        self,
        grid: tuple[int, int, int],
        key: Hashable,
        arguments: tuple[Any, ...],
        constants: Callable[[], dict[str, Any]],
        **options: Any,
    ) -> None:
        """Launches the kernel on the current stream.

        Args:
            grid: programs.
            key: equal keys, equal constants, options and device, and arguments for which Triton compiles one variant:
                see `variant`.
            arguments: all that are not constant, in order; the first one is a tensor on the current device.
            constants: makes those, by name; called when the key is new.
            **options: of the compiler.
        """
        known = self._known.get(key)
        if known is not None and not hooked():
            compiled, made_before = known
            addresses = [value.data_ptr() if isinstance(value, Tensor) else value for value in arguments]
            stream = torch._C._cuda_getCurrentRawStream(arguments[0].device.index)
            middle = compiled.function, compiled.packed_metadata, None, None, None  # and no hooks
            compiled.run(*grid, stream, *middle, *addresses, *made_before)
            launched(Launch(compiled.run, grid, middle, arguments, made_before))
            return
        launched(None)
        made = constants()
        compiled = self._kernel[grid](*arguments, **made, **options)
        if isinstance(compiled, CompiledKernel):  # the interpreter compiles nothing
            if len(self._known) >= MOST:
                self._known.clear()
            names = self._kernel.arg_names[len(arguments) :]
            self._known[key] = (compiled, tuple(made[name] for name in names))


def variant(tensors: Sequence[Tensor], numbers: Sequence[int]) -> tuple[Hashable, ...]:
    """What of tensors, and of the integers that a kernel specializes on, Triton compiles variants for."""
    return (
        *[(tensor.dtype, tensor.data_ptr() % 16) for tensor in tensors],
        *[-1 if number == 1 else number % 16 + (number >> 31 << 4) for number in numbers],
    )
