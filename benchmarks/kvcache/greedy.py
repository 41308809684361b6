"""How long a greedy continuation stays the same as with the dense cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from benchmarks.kvcache.needle import continuation
from benchmarks.kvcache.summary import estimate


def dense_continuation(model: Any, prompts: Tensor, chunk: int, steps: int) -> Tensor:
    """What the dense cache continues with, (prompts, steps) int64."""
    from transformers import DynamicCache

    return continuation(model, prompts, DynamicCache(config=model.config), chunk, steps)


def match_lengths(dense: Tensor, ours: Tensor) -> Tensor:
    """The number of leading tokens that agree, (prompts,)."""
    return (dense == ours).long().cumprod(dim=1).sum(dim=1)


def matched(model: Any, prompts: Tensor, dense: Tensor, make: Callable[[], Any], chunk: int) -> dict[str, Any]:
    """Mean length of the common beginning, and how many continuations agree to the end."""
    ours = continuation(model, prompts, make(), chunk, dense.shape[1])
    lengths = match_lengths(dense, ours).float().cpu()
    return {
        "prompts": len(prompts),
        "prompt_tokens": prompts.shape[1],
        "steps": dense.shape[1],
        "matched_tokens": estimate(lengths),
        "whole": int((lengths == dense.shape[1]).sum()),
        "per_prompt": [int(length) for length in lengths],
    }
