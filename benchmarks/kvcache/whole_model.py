"""`python -m benchmarks kvcache --speed`: a whole model's decoding on a GPU, compressed cache beside dense.

A model of Llama-3.1-8B's shape with random weights, bfloat16. Caches are filled with random states, layer by layer, so
that no prompt has to be read; time does not depend on them. Then `generate` goes on for some tokens, greedily. A step
is the time between two tokens, as a stopping criterion sees it once the device is done. The dense cache is the
library's `DynamicCache` with its "sdpa" attention, timed with torch's choice of a backend and without cuDNN, the median
of some steps; ours is compared with the faster. Ours is `TurboQuantCache` in a model that `compress` was called for,
whose steps are recorded and replayed: the mean over as many steps as a block has tokens, so that compressing a block
and recording anew are in it, and the median beside it. "Step by step" is without replay, the median.
Beside it stands how long the device works in a step, by the profiler, not replayed: the rest of the step it waits for
the host, which launches a model's many small operations one by one. An append is the compression of a block.

Memory is the allocator's: the most that was allocated while generating, weights and caches included.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicCache

from benchmarks.environment import environment
from benchmarks.kvcache.speed import now
from benchmarks.result_file import KERNEL_RESULTS, write
from tqsearch.kvcache import TurboQuantCache, compress

CONTEXTS = (1024, 2048, 8192, 32768, 131072)
BATCHES = (1, 8)
LARGE = 8192  # the context from which on batches that just fit are measured, and at which rivals and variants are
BLOCK = 128  # tokens, the default of our cache
STEPS, WARM = 10, 3
SLOW_STEPS = 2  # of a cache whose steps take seconds
ROOM = 256  # tokens of a context left for warm-up and steps
FILL = 8192  # tokens filled at a time
DENSE_TOKENS = 260  # sinks and recent tokens of our cache
SPARE = 5e9  # bytes left for logits, activations and one layer's second copy
DENSE = "DynamicCache"
NO_CUDNN = ", no cuDNN"
OFFLOADED = ", offloaded"
SINGLE = ", step by step"
TRELLIS = ", trellis"
QUANTO = "QuantizedCache, quanto, 4 bits"
DEVICE = "cuda"
COLUMNS = (
    "context",
    "batch",
    "cache",
    "tokens/s",
    "ms a step",
    "device, ms",
    "peak memory, GB",
    "times as fast",
    "device, times",
    "append, ms a token",
)


def model_of(layers: int) -> Any:
    """Llama-3.1-8B's shape."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        bos_token_id=None,
        eos_token_id=None,
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(DEVICE):
            model: Any = LlamaForCausalLM(config)
            return model.eval()
    finally:
        torch.set_default_dtype(default)


class Clock(StoppingCriteria):
    """Never stops, and notes the time."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """False for every row."""
        self.times.append(now(input_ids.device))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@torch.no_grad()
def compressed_cache(config: Any, batch: int, tokens: int, **options: Any) -> TurboQuantCache:
    """Random keys and values, compressed once and copied to every layer."""
    cache = TurboQuantCache(config, **options)
    heads, dim = config.num_key_value_heads, config.head_dim
    layers: list[Any] = cache.layers
    first, *others = layers
    for start in range(0, tokens, FILL):
        shape = (batch, heads, min(FILL, tokens - start), dim)
        first.update(*(torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(2)))
    for layer in others:
        none = torch.empty((batch, heads, 0, dim), device=DEVICE, dtype=torch.bfloat16)
        layer.update(none, none)
        layer.past = tuple(
            replace(
                history,
                sinks=history.sinks.clone(),
                compressed=history.compressed.copied(),
                recent=history.recent.clone(),
            )
            for history in first.past
        )
        if cache.offloading:
            layer.offload()
    return cache


def dense_cache(config: Any, batch: int, tokens: int, offloading: bool) -> DynamicCache:
    """The library's, filled with random keys and values."""
    cache = DynamicCache(config=config, offloading=offloading)
    shape = (batch, config.num_key_value_heads, tokens, config.head_dim)
    layer: Any
    for layer in cache.layers:
        none = torch.empty((batch, shape[1], 0, shape[3]), device=DEVICE, dtype=torch.bfloat16)
        layer.update(none, none)
        layer.keys, layer.values = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
        if offloading and layer is not cache.layers[0]:  # the library expects the first where it is needed
            layer.offload()
    return cache


@torch.no_grad()
def quanto_cache(config: Any, batch: int, tokens: int) -> Any:
    """The library's quantized cache, filled with random keys and values."""
    from transformers import QuantizedCache

    cache: Any = QuantizedCache("quanto", config, nbits=4)
    shape = (batch, config.num_key_value_heads, tokens, config.head_dim)
    for layer in range(config.num_hidden_layers):
        cache.update(*(torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(2)), layer)
    return cache


@torch.inference_mode()
def measured(model: Any, make: Callable[[], Any], batch: int, context: int, steps: int) -> dict[str, Any]:
    """One cache at one batch and context; steps are replayed, where they can be, if there are as many as in a block."""
    replayed = steps == BLOCK
    gc.collect()
    torch.cuda.empty_cache()
    cache = make()
    tokens = torch.randint(0, model.config.vocab_size, (batch, context - ROOM + 1), device=DEVICE)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    clock = Clock()
    model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        past_key_values=cache,
        max_new_tokens=WARM + steps + 1,
        do_sample=False,
        disable_compile=not replayed,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    intervals = [later - earlier for earlier, later in zip(clock.times, clock.times[1:], strict=False)][WARM:]
    median = sorted(intervals)[len(intervals) // 2]
    step = sum(intervals) / len(intervals) if replayed else median
    held = torch.cuda.memory_allocated() - sum(part.nbytes for part in model.parameters())
    peak = torch.cuda.max_memory_allocated()
    return {
        "batch": batch,
        "context": context,
        "tokens_per_second": round(batch / step, 1),
        "step_ms": round(step * 1e3, 3),
        "median_step_ms": round(median * 1e3, 3),
        "slowest_step_ms": round(max(intervals) * 1e3, 3),
        "busy_ms": busy(model, cache, batch),
        "append_ms": append_time(cache) if isinstance(cache, TurboQuantCache) and not cache.offloading else None,
        "peak_gb": round(peak / 1e9, 2),
        "reserved_gb": round(torch.cuda.max_memory_reserved() / 1e9, 2),
        "held_gb": round(held / 1e9, 2),
    }


def busy(model: Any, cache: Any, batch: int, steps: int = 1) -> float:
    """Milliseconds of a step in which the device works: the sum over its kernels and copies, by the profiler."""
    token = torch.zeros((batch, 1), dtype=torch.int64, device=DEVICE)
    model(token, past_key_values=cache, logits_to_keep=1)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(steps):
            model(token, past_key_values=cache, logits_to_keep=1)
        torch.cuda.synchronize()
    total = float(sum(event.self_device_time_total for event in seen.key_averages()))
    return round(total / steps / 1000, 3)


def append_time(cache: TurboQuantCache) -> float:
    """Milliseconds that compressing a block of new tokens takes in all layers."""
    layers: list[Any] = cache.layers
    shape = [*layers[0].past[0].sinks.shape]
    shape[2] = layers[0].settings.block_length
    states = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)

    def append() -> None:
        for layer in layers:
            for history in layer.past:
                history.append(states, 0).compress(layer.settings.residual_length)

    append()
    started = now(torch.device(DEVICE))
    append()
    return round((now(torch.device(DEVICE)) - started) * 1e3, 3)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks kvcache --speed", description=__doc__)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--contexts", type=lambda text: [int(part) for part in text.split(",")], default=CONTEXTS)
    parser.add_argument("--batches", type=lambda text: [int(part) for part in text.split(",")], default=BATCHES)
    parser.add_argument("--largest", action=argparse.BooleanOptionalAction, default=True, help="batches that just fit")
    parser.add_argument("--quanto", action="store_true", help="the library's quantized cache too")
    parser.add_argument("--offloading", action="store_true", help="caches that wait on the CPU, at the smallest size")
    parser.add_argument("--trellis", action="store_true", help="trellis codes too, at the largest of the batches")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=KERNEL_RESULTS, help="folder of the JSON file")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks kvcache --speed needs a CUDA GPU, and torch sees none")
        return 1
    torch.manual_seed(options.seed)
    model = model_of(options.layers)
    config: Any = model.config
    torch.cuda.empty_cache()
    room = torch.cuda.mem_get_info()[0] - SPARE
    dense_token = 4 * options.layers * config.num_key_value_heads * config.head_dim
    ours_token = dense_token * (options.bits / 16 + 1 / config.head_dim)
    ours = f"TurboQuantCache, K{options.bits}V{options.bits}"
    result: dict[str, Any] = {
        "benchmark": "whole model",
        "environment": {**environment(options.seed), "transformers": importlib.metadata.version("transformers")},
        "model": {"parameters": sum(part.numel() for part in model.parameters()), "layers": options.layers},
        "columns": list(COLUMNS),
        "rows": [],
        "runs": [],
    }

    def make(name: str, batch: int, tokens: int) -> Any:
        offloading = name.endswith(OFFLOADED)
        if name.startswith(DENSE):
            return dense_cache(config, batch, tokens, offloading)
        if name == QUANTO:
            return quanto_cache(config, batch, tokens)
        return compressed_cache(config, batch, tokens, offloading=offloading, **kind_of(name))

    def kind_of(name: str) -> dict[str, Any]:
        return {"bits": options.bits, "codec": "trellis" if name.endswith(TRELLIS) else "scalar"}

    for context in options.contexts:
        batches = list(options.batches)
        if options.largest and context >= LARGE:
            bytes_of = [context * dense_token, context * ours_token + DENSE_TOKENS * dense_token]
            fits = [int(room / (each * (1 + 2 / options.layers))) for each in bytes_of]
            batches += [batch for batch in fits if batch not in batches]
        baseline: dict[tuple[int, bool], dict[str, Any]] = {}
        for batch in batches:
            contestants = [(DENSE + NO_CUDNN, dense_token), (ours, ours_token)]
            if batch in options.batches:
                contestants = [(DENSE, dense_token), *contestants, (ours + SINGLE, ours_token)]
            if options.quanto and context == LARGE and batch in options.batches:
                contestants.append((QUANTO, ours_token))
            if options.trellis and context == LARGE and batch == max(options.batches):
                contestants.append((ours + TRELLIS, ours_token))
            if options.offloading and context == LARGE and batch == min(options.batches):
                contestants += [(DENSE + OFFLOADED, dense_token), (ours + OFFLOADED, ours_token)]
            for name, each in contestants:
                if context * batch * each > room:
                    continue
                compress(model, None)
                if name.startswith(ours):
                    compress(model, **kind_of(name))
                torch.backends.cuda.enable_cudnn_sdp(not name.endswith(NO_CUDNN))
                try:
                    steps = BLOCK if name == ours else SLOW_STEPS if name.endswith(TRELLIS) else STEPS
                    run = measured(model, partial(make, name, batch, context - ROOM), batch, context, steps)
                except torch.cuda.OutOfMemoryError:
                    print(f"{name}: {batch} x {context} does not fit", flush=True)
                    continue
                kind = batch, name.endswith(OFFLOADED)
                if name.startswith(DENSE) and (kind not in baseline or run["step_ms"] < baseline[kind]["step_ms"]):
                    baseline[kind] = run
                row = _row(name, run, baseline.get(kind))
                result["runs"].append({"cache": name, **run})
                result["rows"] = sorted([*result["rows"], row], key=lambda row: row[:2])
                print(*row, run["slowest_step_ms"], sep="\t", flush=True)
                write(options.out / "whole-model.json", result)
    return 0


def _row(name: str, run: dict[str, Any], dense: dict[str, Any] | None) -> list[Any]:
    """A row of the table."""
    times, device_times = None, None
    if dense is not None and not name.startswith(DENSE):
        times = round(run["tokens_per_second"] / dense["tokens_per_second"], 2)
        if dense["busy_ms"] and run["busy_ms"]:
            device_times = round(dense["busy_ms"] / run["busy_ms"], 2)
    return [
        run["context"],
        run["batch"],
        name,
        run["tokens_per_second"],
        run["step_ms"],
        run["busy_ms"],
        run["peak_gb"],
        times,
        device_times,
        None if run["append_ms"] is None else round(run["append_ms"] / BLOCK, 4),
    ]
