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
        self._readers: set[object] = set()
        self._writer: object | None = None

    @contextmanager
    def read(self) -> Iterator[None]:
        """Holds the lock together with other readers."""
        me = object()
        try:
            with self._condition:
                self._wait_until(me, lambda: self._writer is None)
                self._readers.add(me)
            yield
        finally:  # also of one who was interrupted on the way in
            self._leave(me)

    @contextmanager
    def write(self) -> Iterator[None]:
        """Holds the lock alone."""
        me = object()
        try:
            with self._condition:
                self._wait_until(me, lambda: self._writer is None and not self._readers)
                self._writer = me
            yield
        finally:
            self._leave(me)

    def _wait_until(self, me: object, free: Callable[[], bool]) -> None:
        """Waits in the queue, with the condition held, until it is one's turn and the lock is free."""
        self._queue.append(me)
        self._condition.wait_for(lambda: self._queue[0] is me and free())
        self._queue.popleft()
        self._condition.notify_all()  # who is next may be free to enter too

    def _leave(self, me: object) -> None:
        """Takes one out of wherever one is."""
        with self._condition:
            self._readers.discard(me)
            if self._writer is me:
                self._writer = None
            if me in self._queue:
                self._queue.remove(me)
            self._condition.notify_all()
