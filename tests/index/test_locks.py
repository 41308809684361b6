"""The lock of an index: writers alone, readers together, nobody starved."""

import linecache
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tqsearch.locks import ReadWriteLock

LONG = 10.0  # seconds until a test says that a thread hangs; none waits for it


def start(*targets: Callable[[], None]) -> list[threading.Thread]:
    threads = [threading.Thread(target=target, daemon=True) for target in targets]
    for thread in threads:
        thread.start()
    return threads


def join(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.join(LONG)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"


def test_readers_share() -> None:
    """All three are inside at once, or the barrier breaks."""
    lock, barrier, met = ReadWriteLock(), threading.Barrier(3, timeout=LONG), []

    def reader() -> None:
        with lock.read():
            barrier.wait()
            met.append(1)

    join(start(reader, reader, reader))
    assert len(met) == 3


def test_a_writer_is_alone() -> None:
    """Two numbers that only writers change, apart and then together: nobody ever sees them differ."""
    lock, pair, seen = ReadWriteLock(), [0, 0], []
    inside = {"writers": 0}

    def writer() -> None:
        for _ in range(150):
            with lock.write():
                inside["writers"] += 1
                first = pair[0]
                time.sleep(0)  # lets the others run
                pair[0] = first + 1
                time.sleep(0)
                pair[1] += 1
                seen.append(inside["writers"] == 1)
                inside["writers"] -= 1

    def reader() -> None:
        for _ in range(150):
            with lock.read():
                first = pair[0]
                time.sleep(0)
                seen.append(first == pair[1] and inside["writers"] == 0)

    join(start(writer, writer, writer, reader, reader, reader))
    assert pair == [450, 450]
    assert len(seen) == 900
    assert all(seen)


def test_a_waiting_writer_holds_back_new_readers() -> None:
    lock, order = ReadWriteLock(), []
    release = threading.Event()

    def first_reader() -> None:
        with lock.read():
            assert release.wait(LONG)
            order.append("first reader")

    def writer() -> None:
        with lock.write():
            order.append("writer")

    def second_reader() -> None:
        with lock.read():
            order.append("second reader")

    threads = []
    for target in (first_reader, writer, second_reader):
        threads += start(target)
        time.sleep(0.05)  # it waits, or holds the lock
    assert order == []
    release.set()
    join(threads)
    assert order == ["first reader", "writer", "second reader"]


@pytest.mark.parametrize("starved", ["reader", "writer"])
def test_nobody_is_starved(starved: str) -> None:
    """Threads take the lock again and again, overlapping so that it is never free; one other wants it ten times."""
    lock, done = ReadWriteLock(), threading.Event()
    rounds = [0]

    def greedy() -> None:
        while not done.is_set():
            with lock.write() if starved == "reader" else lock.read():
                time.sleep(0.002)
                rounds[0] += 1

    def patient() -> None:
        for _ in range(10):
            with lock.read() if starved == "reader" else lock.write():
                pass
        done.set()

    greedy_threads = start(greedy, greedy, greedy)
    time.sleep(0.02)
    (waiting,) = start(patient)
    waiting.join(4.0)
    served = done.is_set()
    done.set()
    join([*greedy_threads, waiting])
    assert served, f"a {starved} got nothing while others had {rounds[0]} turns"


@pytest.mark.parametrize("kind", ["read", "write"])
def test_an_error_inside_releases_the_lock(kind: str) -> None:
    lock = ReadWriteLock()
    with pytest.raises(KeyError), getattr(lock, kind)():
        raise KeyError("x")
    passed = []

    def both() -> None:
        with lock.write():
            passed.append("write")
        with lock.read():
            passed.append("read")

    join(start(both))
    assert passed == ["write", "read"]


@pytest.mark.parametrize("ahead", [False, True], ids=["alone", "behind a writer"])
def test_one_who_gives_up_waiting_does_not_block_the_rest(monkeypatch: pytest.MonkeyPatch, ahead: bool) -> None:
    """An interrupt while waiting (Ctrl-C) takes that waiter out of the queue, and not the one before it."""
    lock, passed = ReadWriteLock(), []
    holds, release, interrupt = threading.Event(), threading.Event(), threading.Event()

    def holder() -> None:
        with lock.read():
            holds.set()
            assert release.wait(LONG)

    def interrupted() -> None:
        wait_for = lock._condition.wait_for

        def interrupted_wait(predicate: Callable[[], bool]) -> None:
            monkeypatch.setattr(lock._condition, "wait_for", wait_for)
            wait_for(predicate, timeout=0.02)
            raise KeyboardInterrupt

        monkeypatch.setattr(lock._condition, "wait_for", interrupted_wait)
        with pytest.raises(KeyboardInterrupt), lock.write():
            pass
        interrupt.set()

    def writer() -> None:
        with lock.write():
            passed.append("writer")

    def reader() -> None:
        with lock.read():
            passed.append("reader")

    threads = start(holder)
    assert holds.wait(LONG)
    if ahead:
        threads += start(writer)
        time.sleep(0.05)  # it waits
    threads += start(interrupted)
    assert interrupt.wait(LONG)
    threads += start(reader)
    if not ahead:
        threads[-1].join(LONG)
        assert passed == ["reader"], "the reader waits for one who has gone"
    release.set()
    join(threads)
    assert passed == (["writer", "reader"] if ahead else ["reader"])


@pytest.mark.parametrize("kind", ["read", "write"])
def test_an_interrupt_on_the_way_in_leaves_the_lock_free(kind: str) -> None:
    """At every line until it is held, as Ctrl-C comes; those who come later are served.

    But for the end of a `with`, where Python itself lets no signal in before `__exit__` is called.
    """

    def line(frame: Any, event: str, argument: object) -> Any:
        nonlocal count
        if Path(frame.f_code.co_filename).name != "locks.py":
            return None
        text = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        if event == "line" and not text.lstrip().startswith("with "):
            count += 1
            if count == at:
                raise KeyboardInterrupt
        return line

    before = sys.gettrace()
    for number in range(1, 100):
        lock, at, count = ReadWriteLock(), number, 0
        held = getattr(lock, kind)()
        sys.settrace(line)
        try:
            held.__enter__()
            break
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        join(start(lambda lock=lock: take_both(lock)))  # type: ignore[misc]
    assert number > 5


def take_both(lock: ReadWriteLock) -> None:
    with lock.read():
        pass
    with lock.write():
        pass
