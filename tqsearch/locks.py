"""A lock that many readers share and one writer holds alone."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class ReadWriteLock:
    """Searches share it, changes hold it alone. First come, first served: neither can be starved by the other.

    It is not reentrant: a reader that becomes a writer would wait for itself, and so may one that reads again.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._queue: deque[object] = deque()  # who waits, in the order of arrival
        self._readers = 0
        self._writing = False

    @contextmanager
    def read(self) -> Iterator[None]:
        """Holds the lock together with other readers."""
        with self._condition:
            self._wait_until(lambda: not self._writing)
            self._readers += 1
        try:
            yield
        finally:
            with self._condition:
                self._readers -= 1
                self._condition.notify_all()

    @contextmanager
    def write(self) -> Iterator[None]:
        """Holds the lock alone."""
        with self._condition:
            self._wait_until(lambda: not self._writing and not self._readers)
            self._writing = True
        try:
            yield
        finally:
            with self._condition:
                self._writing = False
                self._condition.notify_all()

    def _wait_until(self, free: Callable[[], bool]) -> None:
        """Waits in the queue, with the condition held, until this thread is its head and the lock is free for it."""
        place = object()
        self._queue.append(place)
        try:
            self._condition.wait_for(lambda: self._queue[0] is place and free())
        finally:
            self._queue.remove(place)
            self._condition.notify_all()
