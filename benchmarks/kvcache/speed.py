"""Tokens per second of greedy decoding behind a long context."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


@torch.inference_mode()
def decoding(model: Any, tokens: Tensor, make: Callable[[], Any], chunk: int, steps: int) -> dict[str, Any]:
    """Prefill in chunks, then decode one token at a time; every row of the batch decodes its own.

    Args:
        tokens: (batch, context) int64, on the model's device.
        make: an empty cache.
        chunk: tokens fed at a time while the context is read.
        steps: tokens decoded, of which the first few are not timed.

    Returns:
        Tokens per second in all rows together, of prefill and of decoding, and the median seconds of a step.
    """
    cache, warm = make(), 4
    started = now(tokens.device)
    for start in range(0, tokens.shape[1], chunk):
        logits = model(tokens[:, start : start + chunk], past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    prefill = now(tokens.device) - started
    times = []
    for _ in range(warm + steps):
        following = logits[:, -1].argmax(dim=-1, keepdim=True)
        started = now(tokens.device)
        logits = model(following, past_key_values=cache, use_cache=True).logits
        times.append(now(tokens.device) - started)
    median = sorted(times[warm:])[steps // 2]
    return {
        "batch": tokens.shape[0],
        "context": tokens.shape[1],
        "steps": steps,
        "decode_tokens_per_second": round(tokens.shape[0] / median, 1),
        "seconds_per_step": round(median, 6),
        "prefill_tokens_per_second": round(tokens.numel() / prefill, 1),
    }


def now(device: torch.device) -> float:
    """Seconds, once everything queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
