"""Replayed work gives what the function gives: under changing inputs, streams, threads and recordings of others."""

import threading

import pytest
import torch

from tqsearch.kernels.replay import MOST_ROWS, Replayed, kept

N, DIM = 3000, 64
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Work:
    """Products with a table, the largest k of each row; counts how often it is called."""

    def __init__(self, device):
        self.table = torch.randn((N, DIM), device=device, generator=torch.Generator(device).manual_seed(0))
        self.calls = 0

    def __call__(self, rows, k=5, sign=1):
        self.calls += 1
        scores = (rows[:, None, :] * self.table).sum(dim=2) * sign
        return torch.topk(scores, k, dim=1)


def rows_of(count, seed, device):
    return torch.randn((count, DIM), device=device, generator=torch.Generator(device).manual_seed(seed))


def same(found, wanted):
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_cpu_calls_the_function_every_time():
    work = Work(torch.device("cpu"))
    replayed = Replayed(work)
    for seed in range(5):
        rows = rows_of(3, seed, torch.device("cpu"))
        assert same(replayed(rows, 4, -1), Work(rows.device)(rows, 4, -1))
    assert work.calls == 5
    assert kept(work) is work


@on_gpu
def test_replays_give_what_the_function_gives_and_keep_no_outputs(device):
    work = Work(device)
    replayed, found, wanted = Replayed(work), [], []
    for turn in range(6):
        for count in (1, 3, 4, 7, 64, MOST_ROWS + 1, 2, 5):
            for settings in ((5, 1), (9, -1)):
                rows = rows_of(count, turn, device)
                found.append(replayed(rows, *settings))
                wanted.append(work(rows, *settings))
    assert all(map(same, found, wanted))  # after all calls: none has written over what an earlier one returned
    calls = work.calls
    for count in (1, 3, 4, 7, 64):
        replayed(rows_of(count, 9, device), 5, 1)
    assert work.calls == calls, "these shapes were to be replayed"


@on_gpu
def test_what_the_function_reads_is_read_at_each_replay(device):
    work = Work(device)
    replayed, rows = Replayed(work), rows_of(2, 0, device)
    for turn in range(6):
        work.table.mul_(-1.5)
        assert same(replayed(rows), work(rows)), turn


@on_gpu
def test_what_a_cache_drops_is_kept(device):
    cache = {}

    def function(rows):
        if "table" not in cache:
            cache["table"] = torch.arange(DIM, device=device, dtype=torch.float32)
        return (rows * kept(cache["table"]),)

    replayed, rows = Replayed(function), rows_of(4, 0, device)
    wanted = rows * torch.arange(DIM, device=device)
    for _ in range(4):
        assert torch.equal(replayed(rows)[0], wanted)
    cache.clear()
    torch.cuda.synchronize()
    junk = [torch.full((DIM,), -1.0, device=device) for _ in range(4096)]
    assert torch.equal(replayed(rows)[0], wanted)
    del junk


@on_gpu
def test_more_settings_than_are_kept(device):
    work = Work(device)
    replayed, rows = Replayed(work), rows_of(3, 0, device)
    for _ in range(5):
        for k in range(1, 40):
            assert same(replayed(rows, k), work(rows, k))


@on_gpu
def test_within_a_recording_of_the_callers(device):
    work = Work(device)
    replayed, rows = Replayed(work), rows_of(4, 0, device)
    for _ in range(5):
        replayed(rows)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = replayed(rows)
    rows.copy_(rows_of(4, 1, device))
    graph.replay()
    assert same(out, work(rows))


@on_gpu
def test_in_inference_mode_and_out_of_it(device):
    work = Work(device)
    replayed, rows = Replayed(work), rows_of(4, 0, device)
    for turn in range(8):
        with torch.inference_mode(turn % 2 == 0):
            assert same(replayed(rows), work(rows))


@on_gpu
@pytest.mark.parametrize("streams", [1, 2, 3])
def test_threads(device, streams):
    """Each of three threads, on streams of their own or shared, gets its own rows' results; some record meanwhile."""
    work = Work(device)
    replayed, wrong = Replayed(work), []
    places = [torch.cuda.Stream() for _ in range(streams)]
    cases = [[(rows_of(count, seed, device), 3 + seed) for count in (1, 6, 33)] for seed in range(3)]
    wanted = [[work(rows, k) for rows, k in case] for case in cases]
    torch.cuda.synchronize()

    def search(number):
        with torch.cuda.stream(places[number % streams]):
            for turn in range(60):
                for (rows, k), result in zip(cases[number], wanted[number], strict=True):
                    if not same(replayed(rows, k), result):
                        wrong.append((number, turn))

    threads = [threading.Thread(target=search, args=(number,), daemon=True) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a thread hangs"
    assert not wrong
