"""The modes of torch that a caller may be in, and the plain one in which the package computes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def plainly(function: Callable[P, R]) -> Callable[P, R]:
    """Lets a function compute as outside of inference mode and autocast, where its caller is in one.

    A tensor that is made in inference mode can never be changed in place outside of it, as an index's columns are, and
    autocast would round products to 16 bits.
    """

    @functools.wraps(function)
    def plain(*args: P.args, **kwargs: P.kwargs) -> R:
        if not (
            torch.is_inference_mode_enabled() or torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
        ):
            return function(*args, **kwargs)
        with _plain():
            return function(*args, **kwargs)

    return plain


@contextmanager
def _plain() -> Iterator[None]:
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
    ):
        yield
