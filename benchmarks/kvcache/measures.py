"""What is measured of a cache, one function a part: quality, needles, greedy match, bytes, tokens per second."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.kvcache import documents, greedy, likelihood, needle, speed, storage, summary
from benchmarks.kvcache.build import Built
from benchmarks.kvcache.configurations import Configuration

MEASURED_FROM = 320  # residual 128, four sinks, the largest block and a chunk
NEEDLE_LENGTHS = (1024, 2048, 4096)
NEEDLE_DEPTHS = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
BYTES_LENGTHS = (2048, 3968)  # apart by whole blocks, and by whole periods of the window of quanto and hqq

Group = list[tuple[Configuration, Built]]
Keep = Callable[[Configuration, str, dict[str, Any]], None]


@dataclass(frozen=True)
class Scene:
    """What the measures share.

    Attributes:
        model: loaded.
        tokenizer: of the model.
        texts: their tokens, by name.
        rows: the documents, (documents, length) int64, on the model's device.
        names: the text each document is from.
        options: of the command line.
    """

    model: Any
    tokenizer: Any
    texts: dict[str, Tensor]
    rows: Tensor
    names: list[str]
    options: argparse.Namespace


def quality(group: Group, keep: Keep, scene: Scene) -> None:
    """Perplexity, KL and top-1 agreement."""
    started = time.perf_counter()
    dense = likelihood.Reference(scene.model, scene.rows, scene.options.chunk, scene.options.batch)
    for one, made in group:
        keep(one, "quality", summary.summarize(dense.agreement(made.make), scene.names, MEASURED_FROM))
    print(f"quality of {len(group)} configurations: {time.perf_counter() - started:.0f} s", flush=True)


def needles(group: Group, keep: Keep, scene: Scene) -> None:
    options = scene.options
    lengths = (512,) if options.quick else NEEDLE_LENGTHS
    prose = next(iter(scene.texts.values()))
    asked = {
        length: needle.prompts(scene.tokenizer, prose, length, NEEDLE_DEPTHS, options.needles, options.seed)
        for length in lengths
    }
    for one, made in group:
        by_length = {
            str(length): needle.retrieval(scene.model, scene.tokenizer, prompts, made.make, options.chunk)
            for length, prompts in asked.items()
        }
        keep(one, "needle", {"residual": one.residual, "by_length": by_length})


def greedy_match(group: Group, keep: Keep, scene: Scene) -> None:
    options = scene.options
    prompts = scene.rows[:, : scene.options.length // 2]
    dense = greedy.dense_continuation(scene.model, prompts, options.chunk, options.steps)
    for one, made in group:
        keep(one, "greedy", greedy.matched(scene.model, prompts, dense, made.make, options.chunk))


def bytes_held(group: Group, keep: Keep, scene: Scene) -> None:
    shorter, longer = BYTES_LENGTHS
    text = next(iter(scene.texts.values()))
    recorded = storage.states(scene.model, text[:longer].to(scene.options.device), torch.bfloat16)
    for one, made in group:
        if made.formula is not None:
            found = made.formula(longer)
        else:
            found = storage.measured_bytes(recorded, made.make, scene.options.chunk, shorter, longer)
        keep(one, "bytes", found)


def tokens_per_second(group: Group, keep: Keep, scene: Scene) -> None:
    """Decoding behind 4,096 tokens, one document at a time and several."""
    options = scene.options
    text = next(iter(scene.texts.values()))
    rows = documents.windows(text, options.batch, 4096).to(options.device)
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16  # bfloat16 is slow on most CPUs
    scene.model.to(dtype)
    for one, made in group:
        runs = [speed.decoding(scene.model, rows[:batch], made.make, 512, 32) for batch in sorted({1, options.batch})]
        keep(one, "speed", {"runs": runs, "dtype": str(dtype).removeprefix("torch.")})
    scene.model.to(torch.float32)


MEASURES: dict[str, Callable[[Group, Keep, Scene], None]] = {
    "quality": quality,
    "needle": needles,
    "greedy": greedy_match,
    "bytes": bytes_held,
    "speed": tokens_per_second,
}


def headline(part: str, found: dict[str, Any]) -> str:
    """One line for the terminal."""
    if part == "quality":
        change, kl, top1 = found["perplexity_percent"], found["kl"], found["top1_percent"]
        return (
            f"perplexity {change['mean']:+.2f} ± {change['plus_minus']:.2f} %, KL {kl['mean']:.5f} ±"
            f" {kl['plus_minus']:.5f} (99 %: {found['kl_p99']:.4f}),"
            f" top-1 {top1['mean']:.2f} ± {top1['plus_minus']:.2f} %"
        )
    if part == "needle":
        return ", ".join(f"{length}: {one['exact']}/{one['asked']}" for length, one in found["by_length"].items())
    if part == "greedy":
        return f"{found['matched_tokens']['mean']:.1f} of {found['steps']} tokens, {found['whole']} whole"
    if part == "bytes":
        return f"{found['per_token']:g} a token, {found['ratio_per_token']:.3f} of {found['dtype']} ({found['from']})"
    return ", ".join(f"{one['batch']}: {one['decode_tokens_per_second']:g} tokens/s" for one in found["runs"])
