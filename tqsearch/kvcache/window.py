"""The recent tokens of a layer in buffers of fixed places, so that one decoding step differs from the next in nothing
that the host knows.

A recorded step (see `replay`) has every address and every number in it for good. So while steps are replayed a layer's
recent tokens lie in buffers with room for a block more, a new token is written to the place that a counter on the
device names, and attention reads from the device how many there are. Compressed tokens stay as they are: when a block
of them is due, the windows are closed and the next step is recorded anew.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tqsearch.kvcache.history import History


class NotReplayable(Exception):
    """Something in a step depends on what a recorded step cannot know; the message says what."""


class Counter:
    """How many recent tokens the windows of all layers hold.

    Attributes:
        room: how many there may be.
        held: how many there are.
        counts: (2,) int64 on the device: the place of the newest token, and how many there are with it.
        mask: (B, 1, 1, T + room) bool of a batch with padding, all True past the present; None without.
        running: whether a step is being run or recorded.
    """

    def __init__(self, held: int, room: int, device: torch.device, mask: Tensor | None) -> None:
        self.room, self.held, self.mask, self.running = room, held, mask, False
        self.counts = torch.tensor([held - 1, held], device=device)


class Window:
    """One layer's recent tokens.

    Args:
        past: keys and values, of which both have compressed tokens and as many recent ones as the counter says.
        counter: shared by all layers.

    Attributes:
        full: keys and values with all of the buffers as recent tokens.
        states: what stands for them in attention.
    """

    def __init__(self, past: tuple[History, History], counter: Counter) -> None:
        self.counter, self._place = counter, counter.counts[:1]
        self._buffers = tuple(_with_room(history.recent, counter.room) for history in past)
        keys, values = (replace(history, recent=buffer) for history, buffer in zip(past, self._buffers, strict=True))
        self.full = keys, values
        self.states: tuple[Tensor, Tensor] = self._buffers[0], self._buffers[1]

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Writes one token's keys and values, (B, H, 1, D), to the place that the counter names; returns all."""
        for buffer, states in zip(self._buffers, (keys, values), strict=True):
            buffer.index_copy_(2, self._place, states)
        return self.states

    def past(self) -> tuple[History, History]:
        """Keys and values as they are now; their recent tokens are views."""
        if self.counter.running:
            raise NotReplayable("the model asks for the cache's states")
        keys, values = (replace(history, recent=history.recent[:, :, : self.counter.held]) for history in self.full)
        return keys, values

    def __len__(self) -> int:
        if self.counter.running:
            raise NotReplayable("the model asks for the cache's length")
        return len(self.full[0]) - self.counter.room + self.counter.held


def _with_room(states: Tensor, room: int) -> Tensor:
    buffer = states.new_zeros((*states.shape[:2], room, states.shape[3]))
    buffer[:, :, : states.shape[2]] = states
    return buffer
