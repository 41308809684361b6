"""`python -m benchmarks attention`: decode attention from the codes beside the library's dense attention.

One step of a model with 32 query heads, 8 KV heads and head dimension 128, bfloat16. The rival is
`scaled_dot_product_attention` with `enable_gqa`, the faster of its flash and cuDNN backends, on dense keys and values
of the same length. Both are timed by device events over replays of a CUDA graph, without the launches of Python, and
again called one by one. Codes are random bytes: time does not depend on them. The limit is a large device-to-device
copy in the same run, bytes read and written; codes and scales at that rate are the least that a step can take. Logits
alone, of 4-bit keys, stand beside `torch.matmul` of float32 keys. A third result is the time against the context.
"""

import argparse
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.environment import environment
from benchmarks.kernels import copy_rate, milliseconds
from benchmarks.result_file import KERNEL_RESULTS, write
from tqsearch import TurboQuantizer, kernels
from tqsearch.kernels import Compressed, Context, Dense

QUERY_HEADS, HEADS, DIM, BLOCK = 32, 8, 128, 128
SINKS, RECENT = 4, 124
SHAPES = ((1, 131072), (8, 32768), (16, 32768))
CONTEXTS = tuple((8, 1024 * 2**power) for power in range(8))
QUICK_SHAPES = ((1, 8192),)
WIDTHS = ((4, 4), (3, 3), (2, 2), (4, 2))
# Of a result: its name, columns, what makes the rows of a batch and a context, and these.
Part = tuple[str, tuple[str, ...], Callable[[int, int], list[list[Any]]], tuple[tuple[int, int], ...]]
COLUMNS = (
    "batch",
    "tokens",
    "codes",
    "ours, ms",
    "dense, ms",
    "times as fast",
    "of the copy",
    "ours, one call, ms",
    "dense, one call, ms",
)
SHORT = ("batch", "tokens", "codes", "ours, ms", "dense, ms", "times as fast", "of the copy")
LOGIT_COLUMNS = ("batch", "tokens", "ours, ms", "float32 matmul, ms", "times as fast")
CONTEXT_COLUMNS = ("batch", "tokens", "codes", "ours, ms", "least, ms", "dense, ms")


def replayed(action: Callable[[], object], calls: int = 4) -> float:
    """The median time of a call in milliseconds, of several in a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            action()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            action()
    return milliseconds(graph.replay, 0.1) / calls


def context(batch: int, tokens: int, bits: tuple[int, int]) -> Context:
    """Random codes of so many tokens, sinks and recent ones among them."""
    compressed = (tokens - SINKS - RECENT) // BLOCK * BLOCK
    device = torch.device("cuda")

    def side(width: int) -> Compressed:
        quantizer = TurboQuantizer(DIM, width)
        rotation = quantizer.rotation.apply(torch.eye(DIM, device=device)).t().contiguous()
        shape = (batch, HEADS, compressed // BLOCK, BLOCK * DIM * width // 8)
        packed = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
        scales = (torch.rand((batch, HEADS, compressed), device=device) + 0.5).half()
        return Compressed(packed, scales, quantizer.tables(device), rotation)

    def dense(count: int) -> Dense:
        keys, values = (torch.randn((batch, HEADS, count, DIM), device=device).bfloat16() for _ in range(2))
        return Dense(keys, values)

    offset = torch.randn((HEADS, DIM), device=device)
    recent = dense(tokens - SINKS - compressed)
    return Context(dense(SINKS), side(bits[0]), side(bits[1]), recent, offset)


def rival_times(batch: int, tokens: int, query: Tensor) -> tuple[float, float]:
    """Milliseconds of the fastest dense backend, in a graph and called one by one."""
    keys, values = (torch.randn((batch, HEADS, tokens, DIM), device="cuda", dtype=torch.bfloat16) for _ in range(2))
    found = []
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):

        def dense(backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(query, keys, values, enable_gqa=True)

        found.append((replayed(dense), milliseconds(dense, 0.1)))
    return min(graph for graph, _ in found), min(call for _, call in found)


def least(past: Context, copy: float) -> float:
    """Milliseconds that reading codes and scales takes at the copy's rate."""
    nbytes = sum(part.numel() * part.element_size() for side in (past.keys, past.values) for part in side[:2])
    return nbytes / copy / 1e9


def rows_of(batch: int, tokens: int, widths: tuple[tuple[int, int], ...], copy: float) -> list[list[Any]]:
    """The table's rows of one shape."""
    query = torch.randn((batch, QUERY_HEADS, 1, DIM), device="cuda", dtype=torch.bfloat16)
    dense, dense_call = rival_times(batch, tokens, query)
    rows: list[list[Any]] = []
    for bits in widths:
        torch.cuda.empty_cache()
        past = context(batch, tokens, bits)

        def ours(past: Context = past) -> Tensor:
            return kernels.attention(query, past, scaling=1 / math.sqrt(DIM))

        time = replayed(ours)
        rows.append(
            [
                batch,
                tokens,
                f"K{bits[0]}V{bits[1]}",
                round(time, 4),
                round(dense, 4),
                round(dense / time, 2),
                round(least(past, copy) / time, 2),
                round(milliseconds(ours, 0.1), 4),
                round(dense_call, 4),
            ]
        )
        del past
    return rows


def context_rows(batch: int, tokens: int, copy: float) -> list[list[Any]]:
    """Time against context: rows of one shape."""
    query = torch.randn((batch, QUERY_HEADS, 1, DIM), device="cuda", dtype=torch.bfloat16)
    dense, _ = rival_times(batch, tokens, query)
    rows: list[list[Any]] = []
    for bits in WIDTHS[:3]:
        torch.cuda.empty_cache()
        past = context(batch, tokens, bits)

        def ours(past: Context = past) -> Tensor:
            return kernels.attention(query, past, scaling=1 / math.sqrt(DIM))

        times = [round(time, 4) for time in (replayed(ours), least(past, copy), dense)]
        rows.append([batch, tokens, f"K{bits[0]}V{bits[1]}", *times])
        del past
    return rows


def logit_rows(batch: int, tokens: int) -> list[list[Any]]:
    """Logits of 4-bit keys beside float32 ones."""
    from tqsearch.kernels.attention_logits_triton import logits

    torch.cuda.empty_cache()
    query = torch.randn((batch, QUERY_HEADS, 1, DIM), device="cuda")
    exact = torch.randn((batch, HEADS, tokens, DIM), device="cuda")
    grouped = query.view(batch, HEADS, QUERY_HEADS // HEADS, DIM)
    rival = replayed(lambda: torch.matmul(grouped, exact.transpose(2, 3)))
    past = context(batch, tokens + SINKS + RECENT, (4, 4))
    time = replayed(lambda: logits(query, past.keys, past.offset, 1 / math.sqrt(DIM)))
    return [[batch, tokens, round(time, 4), round(rival, 4), round(rival / time, 2)]]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks attention", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one small shape, in a file of its own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=KERNEL_RESULTS, help="folder of the JSON file")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks attention needs a CUDA GPU, and torch sees none")
        return 1
    torch.manual_seed(options.seed)
    copy = copy_rate()
    torch.cuda.empty_cache()
    shapes = QUICK_SHAPES if options.quick else SHAPES
    contexts = shapes if options.quick else CONTEXTS
    parts: tuple[Part, ...] = (
        ("attention", COLUMNS, partial(rows_of, widths=WIDTHS, copy=copy), shapes),
        ("attention-logits", LOGIT_COLUMNS, logit_rows, shapes),
        ("attention-context", CONTEXT_COLUMNS, partial(context_rows, copy=copy), contexts),
    )
    for name, columns, measure, measured in parts:
        rows = [row for batch, tokens in measured for row in measure(batch, tokens)]
        about = {"environment": environment(options.seed), "copy, TB/s": round(copy, 2)}
        views = {"views": {"short": list(SHORT)}} if name == "attention" else {}
        result = {**about, "columns": list(columns), **views, "rows": rows}
        write(options.out / f"{name}{'-quick' if options.quick else ''}.json", result)
        for row in rows:
            print("  ".join(f"{cell!s:>8}" for cell in row))
    print(f"copy {copy:.2f} TB/s")
    return 0
