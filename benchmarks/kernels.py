"""`python -m benchmarks kernels`: the GPU scan beside exact search by matrix product, encoding, and the limits.

The rival is exact: float16 vectors, `queries @ vectors.T` in blocks of a million rows, `torch.topk` of each and of all.
Ours is `kernels.scan` of the codes of the same vectors, random normal numbers, from rotated float32 queries to scores
and rows, called again and again by `kernels.repeated` as an index calls it. "Index" is `TurboQuantIndex.search`, which
also checks, normalises and rotates the queries; they lie on the GPU. Medians by device events, of calls from Python and
of the same calls replayed from a CUDA graph, where the device does not wait for the host; ratios are of like with like.
Encoding counts the bytes read and the codes written. The limits are measured in the same run: a large device-to-device
copy, bytes read and written, and `torch._int_mm` of 8192 x 8192 x 8192 int8.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.environment import environment
from benchmarks.result_file import KERNEL_RESULTS, write
from tqsearch import TurboQuantIndex, TurboQuantizer, kernels
from tqsearch.rotation import Hadamard

K = 10
BATCHES = (1, 16, 64, 256, 1024)
# By result file: vectors, dimensions, widths, share of the rows that a filter allows.
Shapes = tuple[tuple[int, int, tuple[int, ...], float], ...]
RESULT_SHAPES: dict[str, Shapes] = {
    "kernels": ((4_000_000, 1024, (4, 3, 2, 1), 1.0),),
    "kernels-shapes": (
        (4_000_000, 768, (4,), 1.0),
        (4_000_000, 1536, (4,), 1.0),
        (10_000_000, 1024, (4,), 1.0),
        (40_000_000, 1024, (4,), 1.0),
        (4_000_000, 1024, (4,), 0.01),
    ),
}
QUICK_SHAPES: dict[str, Shapes] = {"kernels-quick": ((1_000_000, 256, (4, 1), 1.0),)}
TABLES = ("encode", *RESULT_SHAPES)
RIVAL_BLOCK = 1_000_000
COLUMNS = (
    "vectors",
    "d",
    "bits",
    "batch",
    "ours, ms",
    "float16 + topk, ms",
    "times as fast",
    "index, ms",
    "times as fast, index",
    "ours from a graph, ms",
    "float16 + topk from a graph, ms",
    "times as fast, from graphs",
    "codes, TB/s",
    "of the copy",
    "TOP/s",
    "of _int_mm",
    "extra memory, MB",
    "filter allows",
)
SHORT = (
    "bits",
    "batch",
    "ours, ms",
    "times as fast",
    "times as fast, index",
    "ours from a graph, ms",
    "times as fast, from graphs",
    "of the copy",
    "of _int_mm",
)


def milliseconds(action: Callable[[], object], budget: float = 0.3) -> float:
    """The median of a call by device events, after a warm-up, over about `budget` seconds."""
    for _ in range(3):
        action()
    times: list[float] = []
    while len(times) < 5 or (sum(times) < 1000 * budget and len(times) < 200):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        action()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def replayed(action: Callable[[], object]) -> float:
    """`milliseconds` of the action's work on the device, captured once; it must have run before."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        action()
    median = milliseconds(graph.replay)
    del graph
    torch.cuda.empty_cache()
    return median


def copy_rate() -> float:
    """Bytes read and written a second, in TB/s."""
    source = torch.empty(4 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / milliseconds(lambda: target.copy_(source)) / 1e9


def int8_rate() -> float:
    """Of `torch._int_mm`, in TOP/s, on random numbers."""
    left, right = (torch.randint(-127, 128, (8192, 8192), dtype=torch.int8, device="cuda") for _ in range(2))
    return 2 * 8192**3 / milliseconds(lambda: torch._int_mm(left, right.t())) / 1e9


def exact_search(queries: Tensor, vectors: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The rival: float16 products and topk, a block at a time."""
    scores, rows = [], []
    for start in range(0, len(vectors), RIVAL_BLOCK):
        top = torch.topk(queries @ vectors[start : start + RIVAL_BLOCK].t(), k, dim=1)
        scores.append(top.values)
        rows.append(top.indices + start)
    best, place = torch.topk(torch.cat(scores, dim=1), k, dim=1)
    return best, torch.cat(rows, dim=1).gather(1, place)


def random_vectors(count: int, dim: int) -> Tensor:
    """(count, dim) float16, filled a block at a time."""
    vectors = torch.empty((count, dim), dtype=torch.float16, device="cuda")
    for block in vectors.split(RIVAL_BLOCK):
        block.normal_()
    return vectors


def rival_times(vectors: Tensor, queries: dict[int, Tensor]) -> dict[int, tuple[float, float]]:
    """Milliseconds of the rival by batch, called and replayed."""
    times = {}
    for batch, q in queries.items():

        def search(q: Tensor = q) -> object:
            return exact_search(q.half(), vectors, K)

        times[batch] = milliseconds(search), replayed(search)
    return times


def index_times(vectors: Tensor, bits: int, queries: dict[int, Tensor]) -> dict[int, float]:
    """Milliseconds of searches of an index by batch."""
    index = TurboQuantIndex(vectors.shape[1], bits, device="cuda")
    index.add(vectors)
    return {batch: milliseconds(partial(index.search, q, K)) for batch, q in queries.items()}


def codes_of(vectors: Tensor, quantizer: TurboQuantizer) -> tuple[Tensor, Tensor]:
    """Packed codes and scales, made a block at a time."""
    packed = torch.empty((len(vectors), quantizer.row_bytes), dtype=torch.uint8, device=vectors.device)
    scales = torch.empty(len(vectors), dtype=quantizer.scale_dtype, device=vectors.device)
    for start in range(0, len(vectors), RIVAL_BLOCK):
        block = slice(start, start + RIVAL_BLOCK)
        codes = quantizer.encode(vectors[block])
        packed[block], scales[block] = codes.packed, codes.scales
    return packed, scales


def rows_of(
    count: int, dim: int, widths: tuple[int, ...], share: float, limits: tuple[float, float]
) -> list[list[Any]]:
    """The table's rows of one shape."""
    mask = None if share == 1.0 else torch.rand(count, device="cuda") < share
    queries = {batch: torch.randn((batch, dim), device="cuda") for batch in BATCHES}
    vectors = random_vectors(count, dim)
    rival = rival_times(vectors, queries)
    rows: list[list[Any]] = []
    for bits in widths:
        searched = index_times(vectors, bits, queries) if mask is None else {}
        torch.cuda.empty_cache()
        quantizer = TurboQuantizer(dim, bits, unit=True)
        tables = quantizer.tables(vectors.device)
        packed, scales = codes_of(vectors, quantizer)

        def scan(q: Tensor, packed: Tensor = packed, scales: Tensor = scales, tables: Any = tables) -> Any:
            return kernels.scan(q, packed, scales, None, mask, tables, K)

        ours = kernels.repeated(scan, packed.device)
        for batch, q in queries.items():
            called_time, device_time = milliseconds(partial(ours, q)), replayed(partial(scan, q))
            index_time = searched.get(batch)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            ours(q)
            extra = torch.cuda.max_memory_allocated() - before
            bandwidth = packed.numel() / device_time / 1e9
            operations = 2 * batch * count * dim / device_time / 1e9
            called, graph = rival[batch]
            rows.append(
                [
                    count,
                    dim,
                    bits,
                    batch,
                    round(called_time, 3),
                    round(called, 3),
                    round(called / called_time, 2),
                    None if index_time is None else round(index_time, 3),
                    None if index_time is None else round(called / index_time, 2),
                    round(device_time, 3),
                    round(graph, 3),
                    round(graph / device_time, 2),
                    round(bandwidth, 2),
                    round(bandwidth / limits[0], 2),
                    round(operations),
                    round(operations / limits[1], 2),
                    round(extra / 1e6, 1),
                    "all" if share == 1.0 else f"{share:.0%}",
                ]
            )
        del ours, scan, packed
        torch.cuda.empty_cache()
    return rows


ENCODE_COLUMNS = ("vectors", "d", "dtype", "bits", "from", "ms", "million vectors/s", "TB/s", "of the copy")
# Vectors, dimensions, dtype, bits.
ENCODE_SHAPES: tuple[tuple[int, int, torch.dtype, float], ...] = (
    *((1 << 20, 1024, torch.float32, bits) for bits in (4, 3, 2, 1, 8, 2.5)),
    (1 << 20, 1024, torch.bfloat16, 4),
    *((1 << 20, dim, torch.float32, 4) for dim in (128, 384, 768, 1536, 4096)),
)


def encode_rows(limit: float, shapes: tuple[tuple[int, int, torch.dtype, float], ...]) -> list[list[Any]]:
    """Encoding from tensors on the GPU, and one addition to an index from host memory."""
    rows: list[list[Any]] = []

    def row(vectors: Tensor, bits: float, codes: int, source: str, spent: float) -> list[Any]:
        rate = (vectors.numel() * vectors.element_size() + codes) / spent / 1e9
        name = str(vectors.dtype).removeprefix("torch.")
        shape: list[Any] = [*vectors.shape, name, bits, source, round(spent, 3)]
        return [*shape, round(len(vectors) / spent / 1e3, 1), round(rate, 3), round(rate / limit, 3)]

    for count, dim, dtype, bits in tqdm(shapes, desc="encode", unit="shape"):
        quantizer = TurboQuantizer(dim, bits)
        vectors = torch.randn((count, dim), device="cuda").to(dtype)
        bands, tensors = quantizer.tables(vectors.device), Hadamard(dim, 0).tensors(vectors.device)

        def ours(vectors: Tensor = vectors, bands: Any = bands, tensors: Any = tensors) -> object:
            return kernels.encode(vectors, bands, *tensors)

        codes = count * quantizer.plan.bytes_per_vector
        rows.append(row(vectors, bits, codes, "GPU", milliseconds(ours)))
        del vectors
    host = torch.randn((1 << 20, 1024))
    for _ in range(2):  # the first one compiles
        index = TurboQuantIndex(1024, 4, device="cuda")
        begin = time.perf_counter()
        index.add(host)
        torch.cuda.synchronize()
        elapsed = 1e3 * (time.perf_counter() - begin)
    rows.append(row(host, 4, index.nbytes, "host memory, into an index", elapsed))
    return rows


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks kernels", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one small shape, in a file of its own")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES, help="which files are made")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=KERNEL_RESULTS, help="folder of the JSON file")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks kernels needs a CUDA GPU, and torch sees none")
        return 1
    torch.manual_seed(options.seed)
    limits = copy_rate(), int8_rate()
    torch.cuda.empty_cache()
    if "encode" in options.tables:
        encoded = {
            "environment": environment(options.seed),
            "copy, TB/s": round(limits[0], 2),
            "columns": list(ENCODE_COLUMNS),
            "rows": encode_rows(limits[0], ENCODE_SHAPES[:1] if options.quick else ENCODE_SHAPES),
        }
        write(options.out / f"kernels-encode{'-quick' if options.quick else ''}.json", encoded)
    asked = {name: shapes for name, shapes in RESULT_SHAPES.items() if name in options.tables}
    for name, shapes in (QUICK_SHAPES if options.quick else asked).items():
        result: dict[str, Any] = {
            "environment": environment(options.seed),
            "copy, TB/s": round(limits[0], 2),
            "_int_mm, TOP/s": round(limits[1]),
            "columns": list(COLUMNS),
            "views": {"short": list(SHORT)},
            "rows": [],
        }
        for count, dim, widths, share in tqdm(shapes, desc=name, unit="shape"):
            result["rows"] += rows_of(count, dim, widths, share, limits)
            # What is measured is kept, if the next shape does not fit.
            write(options.out / f"{name}.json", result)
        for row in result["rows"]:
            print("  ".join(f"{cell!s:>10}" for cell in row))
    print(f"copy {limits[0]:.2f} TB/s, _int_mm {limits[1]:.0f} TOP/s")
    return 0
