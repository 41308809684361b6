"""An index on a GPU: what it takes of both memories, and that it does what it does on a CPU."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from index_oracle import parse

from tqsearch.blocks import BLOCK_BYTES, encode_blocks
from tqsearch.index import TurboQuantIndex
from tqsearch.segments import MERGE_BYTES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

SavedOf = Callable[[TurboQuantIndex], bytes]
N, DIM = 1 << 18, 1024  # 1 GiB in float32, 132 MB in codes
PIECE = 2 << 20  # bytes


def rows(n: int, seed: int = 0, dim: int = DIM) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, dim), dtype=np.float32)


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    """Made on the GPU, as the host takes seconds for it."""
    return torch.randn(N, DIM, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).cpu().numpy()


def peak_of(work: Callable[[], object]) -> int:
    """Bytes that a call takes on the GPU at most, beyond what is taken before it."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def in_parts(index: TurboQuantIndex, vectors: np.ndarray, parts: int) -> None:
    for part in np.array_split(vectors, parts):
        index.add(part)


@pytest.mark.parametrize("parts", [1, 37])
def test_adding_takes_a_few_blocks_and_what_is_merged(vectors: np.ndarray, parts: int) -> None:
    """Not the codes twice, though they are merged on the way: only segments of up to MERGE_BYTES are copied."""
    index = TurboQuantIndex(DIM, 4, device="cuda")
    peak = peak_of(lambda: in_parts(index, vectors, parts))
    assert index.nbytes == N * index.bytes_per_vector
    assert torch.cuda.memory_allocated() >= index.nbytes
    assert peak <= index.nbytes + 5 * BLOCK_BYTES + (MERGE_BYTES if parts > 1 else 0)
    assert len(index._contents.rows.segments) <= 1 + np.log2(parts)


def test_parts_leave_no_holes_in_the_memory(vectors: np.ndarray) -> None:
    """What the allocator holds in the end beyond what is in use is no more than the blocks and a merge took."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    index = TurboQuantIndex(DIM, 4, device="cuda")
    in_parts(index, vectors, 37)
    torch.cuda.empty_cache()
    unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated() - before
    assert unused <= index.nbytes // 2


def test_parts_on_a_gpu_are_at_once(saved: SavedOf, vectors: np.ndarray) -> None:
    whole, parts = (TurboQuantIndex(DIM, 4, device="cuda") for _ in range(2))
    whole.add(vectors[:50_000])
    in_parts(parts, vectors[:50_000], 37)
    assert saved(whole) == saved(parts)


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("options", [{}, {"bits": 2.5}, {"rotation": "dense"}], ids=str)
def test_cpu_and_gpu_make_the_same_codes(saved: SavedOf, metric: Any, options: dict[str, Any]) -> None:
    """But for a value within float32's rounding of a boundary between levels: fewer than one byte in 100,000."""
    content = {}
    for device in ("cpu", "cuda"):
        index = TurboQuantIndex(192, metric=metric, device=device, **options)
        index.add(rows(6000, dim=192))
        content[device] = parse(saved(index))
    cpu, gpu = content["cpu"], content["cuda"]
    same = cpu.tensors["packed"] == gpu.tensors["packed"]
    assert (~same).sum() <= 1e-5 * same.size
    whole = same.all(axis=1)
    step = 2.0**-10 if metric == "cosine" else 2.0**-20  # of the scales: float16, and sums in float32
    np.testing.assert_allclose(cpu.tensors["scales"][whole], gpu.tensors["scales"][whole], rtol=step)


@pytest.mark.parametrize(
    ("metric", "codec"), [("ip", "scalar"), ("cosine", "scalar"), ("l2", "scalar"), ("l2", "trellis")]
)
def test_learnt_axes_on_a_gpu(metric: Any, codec: Any) -> None:
    """The same plan as a CPU learns, and of an index moved to the GPU the same top k in float32."""
    spread = np.linspace(0.2, 2, 96, dtype=np.float32)
    vectors = rows(3000, dim=96) * spread + 0.3
    made = {}
    for device in ("cpu", "cuda"):
        made[device] = TurboQuantIndex(96, bits=2, metric=metric, device=device, codec=codec)
        made[device].train(vectors)
        made[device].add(vectors[:500])
    assert made["cpu"].learnt == made["cuda"].learnt == "axes"
    assert made["cpu"].plan == made["cuda"].plan
    moved = made["cpu"]
    wanted: Any = moved.search(vectors[500:520], 10)
    got: Any = moved.to("cuda").search(vectors[500:520], 10, precision="exact")
    np.testing.assert_array_equal(got[1], wanted[1])
    np.testing.assert_allclose(got[0], wanted[0], rtol=1e-4, atol=1e-4)


def test_a_move_while_rows_are_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread takes the index to the GPU between the encoding on the CPU and the storing."""
    index = TurboQuantIndex(64, 4, "l2")

    def slowly(*arguments: Any, **options: Any) -> Any:
        columns = encode_blocks(*arguments, **options)
        if index.device.type == "cpu":  # not again under the lock, where the rows are encoded anew
            index.to("cuda")
        return columns

    index.add(rows(100, dim=64))
    monkeypatch.setattr("tqsearch.index.encode_blocks", slowly)
    index.add(rows(100, 1, dim=64))
    assert index.device.type == "cuda"
    found = np.asarray(index.search(np.concatenate([rows(100, dim=64), rows(100, 1, dim=64)]), 1)[1])[:, 0]
    np.testing.assert_array_equal(found, np.arange(200))


def test_removing_takes_what_moves(vectors: np.ndarray) -> None:
    """A third of the rows is removed at random places: two ninths move, and ids are stored from then on."""
    index = TurboQuantIndex(DIM, 4, device="cuda")
    index.add(vectors)
    before = index.nbytes
    peak = peak_of(lambda: index.remove(np.arange(0, N, 3)))
    assert peak <= before * 2 / 9 + 8 * 16 * N + (128 << 20)
    assert len(index) == N - len(range(0, N, 3))
    chosen = vectors[1:2000:3]
    np.testing.assert_array_equal(np.asarray(index.search(chosen, 1)[1])[:, 0], np.arange(1, 2000, 3))


def test_a_filter_copies_no_codes(vectors: np.ndarray) -> None:
    index = TurboQuantIndex(DIM, 4, device="cuda")
    index.add(vectors)
    queries = vectors[:16]
    plain = peak_of(lambda: index.search(queries, 10))
    for allow in (np.arange(N) % 2 == 0, np.arange(0, N, 2), np.arange(0, N, 101)):
        peak = peak_of(lambda allow=allow: index.search(queries, 10, allow=allow))  # type: ignore[misc]
        few = index.bytes_per_vector * len(range(0, N, 101))  # gathered, where the filter allows few
        assert peak <= plain + few + 16 * N


def filled() -> list[torch.Tensor]:
    """All that is left to the allocator, in pieces."""
    pieces = []
    try:
        while True:
            pieces.append(torch.empty(PIECE, dtype=torch.uint8, device="cuda"))
    except torch.OutOfMemoryError:
        return pieces


def test_without_memory_an_add_changes_nothing(vectors: np.ndarray) -> None:
    """All that the allocator holds is taken but for a little: of an add some step fails, and the index is as it was."""
    index = TurboQuantIndex(DIM, 4, device="cuda")
    index.add(vectors[: N // 2])
    wanted = index.search(vectors[:16], 10)
    more = torch.from_numpy(vectors[N // 2 :]).cuda()
    total = torch.cuda.get_device_properties(0).total_memory
    failed = 0
    try:
        for free in (8 << 20, 100 << 20, 200 << 20):
            for ids in (None, np.arange(N, N + len(more))):
                torch.cuda.empty_cache()
                torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
                taken = filled()
                del taken[: free // PIECE]
                try:
                    index.add(more, ids=ids)
                except torch.OutOfMemoryError:
                    failed += 1
                    continue
                torch.cuda.set_per_process_memory_fraction(1.0)
                index.remove(index.ids[N // 2 :])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert failed >= 2
    np.testing.assert_array_equal(index.ids, np.arange(N // 2))
    for a, b in zip(index.search(vectors[:16], 10), wanted, strict=True):
        np.testing.assert_array_equal(a, b)
    index.add(more[:100], ids=np.arange(10 * N, 10 * N + 100))
    np.testing.assert_array_equal(
        np.asarray(index.search(vectors[N // 2 :][:100], 1)[1])[:, 0] - 10 * N, np.arange(100)
    )


def test_two_threads_on_two_streams(vectors: np.ndarray) -> None:
    index = TurboQuantIndex(DIM, 4, device="cuda")
    index.add(vectors[:50_000])
    queries = vectors[:64]
    wanted, wrong = index.search(queries, 10), []

    def search(part: int) -> None:
        with stream():
            for turn in range(30):
                allow = np.arange(50_000) if turn % 2 else None
                scores, ids = index.search(queries[part::2], 10, allow=allow)
                same = np.array_equal(scores, wanted[0][part::2]) and np.array_equal(ids, wanted[1][part::2])
                if not same:
                    wrong.append((part, turn))

    run_beside(lambda: search(0), lambda: search(1))
    assert not wrong


def test_adding_on_one_stream_and_searching_on_another(vectors: np.ndarray) -> None:
    index, whole = (TurboQuantIndex(DIM, 4, device="cuda") for _ in range(2))
    whole.add(vectors[:60_000])
    index.add(vectors[:20_000])
    queries, wrong = vectors[:64], []
    on_device = torch.from_numpy(vectors[:60_000]).cuda()
    torch.cuda.synchronize()

    def add() -> None:
        with stream():
            for start in range(20_000, 60_000, 2000):
                index.add(on_device[start : start + 2000])

    def search() -> None:
        with stream():
            for turn in range(60):
                if not np.array_equal(np.asarray(index.search(queries, 1)[1])[:, 0], np.arange(64)):
                    wrong.append(turn)

    run_beside(add, search)
    assert not wrong
    for a, b in zip(index.search(queries, 10), whole.search(queries, 10), strict=True):
        np.testing.assert_array_equal(a, b)


def stream() -> Any:
    """A new stream, as a context."""
    return torch.cuda.stream(torch.cuda.Stream())  # type: ignore[no-untyped-call]


def run_beside(*targets: Callable[[], None]) -> None:
    threads = [threading.Thread(target=target, daemon=True) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a thread hangs"


def test_a_search_releases_the_gil(vectors: np.ndarray) -> None:
    """A kernel before the search waits for a flag that only another thread of Python sets, while the search waits."""
    from wait_kernel import wait_for

    index = TurboQuantIndex(DIM, 4, device="cuda")
    index.add(vectors[:10_000])
    queries = vectors[:16]
    wanted = index.search(queries, 10)
    flag = torch.zeros(1, dtype=torch.int32).pin_memory()
    seen = torch.zeros(1, dtype=torch.int32, device="cuda")
    wait_for[(1,)](flag, seen, 10)  # compiled before the clock runs
    torch.cuda.synchronize()
    started, got = threading.Event(), []

    def search() -> None:
        with stream():
            wait_for[(1,)](flag, seen, 1_000_000)  # some five seconds; then it gives up
            started.set()
            got.append(index.search(queries, 10))

    thread = threading.Thread(target=search, daemon=True)
    thread.start()
    started.wait()
    time.sleep(0.2)  # the search has its work queued, and waits for the kernel
    assert not got
    flag[0] = 1
    thread.join(60)
    assert seen.item() == 1, "the kernel gave up: nothing ran while the search waited"
    np.testing.assert_array_equal(got[0][1], wanted[1])


HOST_MEMORY = """
import json, resource, sys, threading, torch
from tqsearch import TurboQuantIndex
def anonymous():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) * 1024
index = TurboQuantIndex(1024, 8, device="cuda")
for seed in range(4):
    index.add(torch.randn(1 << 18, 1024, device="cuda"))
index.search(torch.randn(1, 1024, device="cuda"), 10)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
index.save(sys.argv[1])
saving = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
found, done, before = [0], threading.Event(), anonymous()
def watch():
    while not done.wait(0.002):
        found.append(anonymous() - before)
watcher = threading.Thread(target=watch)
watcher.start()
loaded = TurboQuantIndex.load(sys.argv[1], device="cuda")
done.set()
watcher.join()
print(json.dumps({"bytes": index.nbytes, "saving": saving, "loading": max(found), "samples": len(found),
                  "same": len(loaded) == len(index)}))
"""


def test_saving_and_loading_take_little_of_the_host(tmp_path: Path) -> None:
    """A gigabyte of codes. Loading maps the file, whose pages the system takes back: they are not counted."""
    done = subprocess.run(
        [sys.executable, "-c", HOST_MEMORY, str(tmp_path / "index")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["same"]
    assert found["bytes"] > 1 << 30
    assert found["saving"] <= 200 << 20
    assert found["samples"] > 10
    assert found["loading"] <= 200 << 20
