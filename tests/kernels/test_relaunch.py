"""Launches made again give what the function gives: other inputs, several threads and streams, a recording."""

import threading

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from tqsearch.kernels.launch import Launcher, variant  # noqa: E402
from tqsearch.kernels.relaunch import Relaunched  # noqa: E402

DIM = 64
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@triton.jit(do_not_specialize=["factor"])
def product_kernel(rows_ptr, table_ptr, out_ptr, factor, DIM: tl.constexpr, POWER: tl.constexpr):
    """rows * table^POWER * factor."""
    place = tl.arange(0, DIM)
    row = tl.load(rows_ptr + tl.program_id(0) * DIM + place)
    table = tl.load(table_ptr + place)
    for _ in tl.static_range(POWER):
        row = row * table
    tl.store(out_ptr + tl.program_id(0) * DIM + place, row * factor)


class Work:
    """Two launches, the first into memory of its own; counts its calls."""

    def __init__(self, device):
        self.table = torch.linspace(0.5, 2.0, DIM, device=device)
        self.launch, self.calls, self.between = Launcher(product_kernel), 0, None

    def __call__(self, rows, factor=3, power=1):
        self.calls += 1
        half, out, count = torch.empty_like(rows), torch.empty_like(rows), torch.empty(1, device=rows.device)
        for source, target, number in ((rows, half, 1), (half, out, factor)):
            tensors = (source, self.table, target)
            constants = lambda: {"DIM": DIM, "POWER": power}  # noqa: E731
            self.launch((len(rows), 1, 1), (power, *variant(tensors, ())), (*tensors, number), constants)
            if self.between:
                half = self.between(half)
        return out, count.view(1)

    def expected(self, rows, factor=3, power=1):
        return rows * self.table ** (2 * power) * factor


def rows_of(count, seed, device):
    return torch.randn((count, DIM), device=device, generator=torch.Generator(device).manual_seed(seed))


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_cpu_calls_the_function_every_time(device):
    if device.type != "cpu":
        pytest.skip("of a CPU")
    work = Work(device)
    repeated = Relaunched(work)
    for seed in range(4):
        rows = rows_of(3, seed, device)
        close(repeated(rows, 5, 2)[0], work.expected(rows, 5, 2))
    assert work.calls == 4


@on_gpu
def test_launches_are_made_again_and_outputs_are_not_shared(device):
    work = Work(device)
    repeated, found, wanted = Relaunched(work), [], []
    for turn in range(6):
        for count in (1, 3, 200):
            for settings in ((5, 1), (9, 2)):
                rows = rows_of(count, turn, device)
                found.append(repeated(rows, *settings)[0])
                wanted.append(work.expected(rows, *settings))
    for one, other in zip(found, wanted, strict=True):  # after all calls: none wrote over what an earlier one returned
        close(one, other)
    assert work.calls == 3 * 2 * 2, "the third call of a shape and those that follow were to be launched again"


@on_gpu
def test_other_rows_than_whole_ones(device):
    """Parts of a larger tensor, at addresses of other alignments, and rows that are not contiguous."""
    work = Work(device)
    repeated, many = Relaunched(work), rows_of(9, 0, device)
    for _ in range(4):
        for rows in (many[1:4], many.flatten()[3 : 3 + 3 * DIM].view(3, DIM)):
            close(repeated(rows)[0], work.expected(rows))
        columns = many.t().contiguous().t()
        close(Relaunched(lambda rows: work(rows.contiguous()))(columns)[0], work.expected(columns))


@on_gpu
def test_what_is_read_besides_is_read_at_each_launch_and_held(device):
    work = Work(device)
    repeated, rows = Relaunched(work), rows_of(2, 0, device)
    for _ in range(4):
        work.table.mul_(1.25)
        close(repeated(rows)[0], work.expected(rows))
    wanted = work.expected(rows)
    work.table = None
    junk = [torch.full((DIM,), -1.0, device=device) for _ in range(4096)]
    close(repeated(rows)[0], wanted)
    del junk


@on_gpu
@pytest.mark.parametrize("between", [lambda half: half * 2, lambda half: half.add_(1)], ids=["new", "in place"])
def test_a_function_that_does_other_work_is_called(device, between):
    work = Work(device)
    work.between = between
    repeated, calls = Relaunched(work), 0
    for turn in range(5):
        rows = rows_of(2, turn, device)
        found = repeated(rows)[0]
        calls += 1
        assert work.calls == calls
        wanted = work(rows)[0]
        calls += 1
        assert torch.equal(found, wanted)


@on_gpu
def test_within_a_recording_of_the_callers(device):
    work = Work(device)
    repeated, rows = Relaunched(work), rows_of(4, 0, device)
    for _ in range(4):
        repeated(rows)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = repeated(rows)
    rows.copy_(rows_of(4, 1, device))
    graph.replay()
    close(out, work.expected(rows))


@on_gpu
@pytest.mark.parametrize("streams", [1, 3])
def test_threads(device, streams):
    """Each of three threads, on streams of their own or shared, gets its own rows' results."""
    work = Work(device)
    repeated, wrong = Relaunched(work), []
    places = [torch.cuda.Stream() for _ in range(streams)]
    cases = [[(rows_of(count, seed, device), 3 + seed) for count in (1, 6, 33)] for seed in range(3)]
    wanted = [[work(rows, factor)[0] for rows, factor in case] for case in cases]
    torch.cuda.synchronize()

    def call(number):
        with torch.cuda.stream(places[number % streams]):
            for turn in range(200):
                for (rows, factor), result in zip(cases[number], wanted[number], strict=True):
                    if not torch.equal(repeated(rows, factor)[0], result):
                        wrong.append((number, turn))

    threads = [threading.Thread(target=call, args=(number,), daemon=True) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a thread hangs"
    assert not wrong
