"""The modes of torch that a caller may be in, and the plain one in which the package computes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Lets a function compute as outside of autocast, where its caller is in it.

    Autocast would round products to 16 bits, and joins no float16 tensors where it is for bfloat16.
    """

    @functools.wraps(function)
    def plain(*args: P.args, **kwargs: P.kwargs) -> R:
        if not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):
            return function(*args, **kwargs)
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)

    return plain


def plainly(function: Callable[P, R]) -> Callable[P, R]:
    """Lets a function compute as outside of autocast and of inference mode; without gradients, if in the latter.

    A tensor that is made in inference mode can never be changed in place outside of it, as an index's columns are.
    """
    function = without_autocast(function)

    @functools.wraps(function)
    def plain(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return plain
