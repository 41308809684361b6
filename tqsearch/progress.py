"""A progress bar where one can be shown."""

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, cast


class Bar(Protocol):
    """What is told of progress."""

    def update(self, n: int, /) -> object:
        """Move on by n units."""


class _NoBar:
    def update(self, n: int, /) -> None:
        """Show nothing."""


def progress(total: int | None, description: str, unit: str, *, shown: bool = True) -> AbstractContextManager[Bar]:
    """A tqdm bar on a terminal; nothing to see elsewhere, or where tqdm is not installed.

    Args:
        total: units in all, or None when unknown.
        description: what is going on.
        unit: `B` for bytes.
        shown: False for work too short to be worth a bar.
    """
    if not shown:
        return nullcontext(_NoBar())
    try:
        from tqdm import tqdm
    except ImportError:  # a bar is a courtesy: its absence changes no result
        return nullcontext(_NoBar())
    bar = tqdm(total=total, desc=description, unit=unit, unit_scale=True, disable=None, leave=False)
    return cast("AbstractContextManager[Bar]", bar)
