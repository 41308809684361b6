"""Decoding steps recorded once and replayed: a CUDA graph of the model's whole forward.

A step of a large model at a small batch waits for the host, which launches its thousand operations one by one. Within
`replaying(model)` the model's `forward` records a step of one token and replays it for the tokens that follow, until a
block is to be compressed; then a step is recorded anew. What comes out is what the model computes step by step.

Any call that is not such a step runs as ever: a prompt, several tokens at once, a cache that is not compressed yet or
has layers of another kind, outputs beside logits, and all that follows a change of the cache between steps, as by
beams. A model that looks at numbers on the host which a recorded step has for good is found while recording: it runs as
ever too, and a warning says why.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from tqsearch.kernels.replay import record
from tqsearch.kvcache.attention import NAME as ATTENTION
from tqsearch.kvcache.cache import TurboQuantCache
from tqsearch.kvcache.layer import TurboQuantLayer
from tqsearch.kvcache.window import Counter, NotReplayable

_INPUTS = ("input_ids", "position_ids", "attention_mask", "past_key_values")


@contextmanager
def replaying(model: PreTrainedModel, recorder: Recorder | None = None) -> Iterator[None]:
    """Within, steps of one token over a `TurboQuantCache` are replayed where they can be.

    While a CUDA graph is recorded no other thread may synchronize the whole device.

    Args:
        model: whose `forward` is replaced meanwhile.
        recorder: of steps; None for CUDA graphs, on a GPU, and for none elsewhere.
    """
    if recorder is None and model.device.type == "cuda":
        recorder = GraphRecorder(model.device)
    if recorder is None or not _steady(model):
        yield
        return
    own: Callable[..., Any] = model.forward
    steps = Steps(own, recorder)

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return steps(*args, **kwargs)

    vars(model)["forward"] = forward
    try:
        yield
    finally:
        del vars(model)["forward"]
        steps.close()


def _steady(model: PreTrainedModel) -> bool:
    """Whether one step of the model may do the same as the next, as far as can be told before it runs."""
    if "forward" in vars(model) or hasattr(model, "_hf_hook") or model.training or model.config.is_encoder_decoder:
        return False
    if not getattr(model, "_can_compile_fullgraph", False) or getattr(model, "tp_size", None):
        return False
    if model.config.get_text_config(decoder=True)._attn_implementation != ATTENTION:
        return False
    return {part.device for part in model.parameters()} == {model.device}


class Recorder(Protocol):
    """Makes a call repeatable."""

    def record(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """A function that does what the call does, and returns what it returned, the tensors filled anew."""


class GraphRecorder:
    """Records calls as CUDA graphs, which share their memory: the latest is the one to be replayed."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._pool = device, torch.cuda.graph_pool_handle()
        self._latest: tuple[object, ...] = ()  # held until there is another, as their memory goes with the last

    def record(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """See `Recorder`; the call's work on the device is done when what is returned is called, not before."""
        out, graph, read = record(call, self._device, self._pool)
        self._latest = graph, read

        def replay() -> Any:
            graph.replay()
            return out

        return replay


@dataclass(frozen=True)
class Step:
    """The arguments of one call of a model's forward with one token a sequence.

    Attributes:
        ids: (B, 1).
        positions: (..., 1).
        mask: (B, T + 1), 0 for padding, or None.
        cache: T tokens.
        constants: all other arguments, none of them a tensor.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor | None
    cache: TurboQuantCache
    constants: dict[str, Any]

    @classmethod
    def of(cls, arguments: dict[str, Any]) -> Step | None:
        """The step that a call of these arguments is, or None."""
        ids, positions, mask, cache = (arguments.get(name) for name in _INPUTS)
        constants = {name: value for name, value in arguments.items() if name not in _INPUTS}
        if not isinstance(cache, TurboQuantCache) or torch.is_grad_enabled():
            return None
        if not isinstance(ids, Tensor) or not isinstance(positions, Tensor) or ids.shape[1:] != (1,):
            return None
        if positions.shape[-1] != 1 or not (mask is None or (isinstance(mask, Tensor) and mask.ndim == 2)):
            return None
        if not all(isinstance(value, bool | int | float | str | None) for value in constants.values()):
            return None
        if not constants.get("return_dict") or constants.get("use_cache") is False:
            return None
        if cache.offloading or any(type(layer) is not TurboQuantLayer for layer in cache.layers):
            return None
        return cls(ids, positions, mask, cache, constants)

    @property
    def compressed(self) -> bool:
        """Whether the cache has compressed tokens."""
        first: Any = self.cache.layers[0]
        return first.past is not None and any(history.compressed is not None for history in first.past)

    def like(self, other: Step) -> bool:
        """Whether another step differs in its token and the past's length alone."""
        return (
            self.cache is other.cache
            and self.ids.shape == other.ids.shape
            and self.positions.shape == other.positions.shape
            and (self.mask is None) == (other.mask is None)
            and self.constants == other.constants
        )


class Steps:
    """A model's forward that replays what it can of the thread that made it.

    Args:
        own: the forward.
        recorder: for steps.
    """

    def __init__(self, own: Callable[..., Any], recorder: Recorder) -> None:
        self._own, self._recorder, self._thread = own, recorder, threading.get_ident()
        self._kept: _Kept | None = None
        self._given_up, self._watched = False, False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The forward's result."""
        if threading.get_ident() != self._thread:  # of another generate, which has a cache of its own
            return self._own(*args, **kwargs)
        step = None if args or self._given_up else Step.of(kwargs)
        if self._kept is not None and not (step and self._kept.goes_on(step)):
            # What changes the cache between steps does so again and again: to record each would only take longer.
            self._give_up()
            step = None
        if step is not None and self._kept is None and step.compressed:
            self._kept = _Kept.of(step, self._own, self._recorder, self._watched)
            self._given_up = self._kept is None
        if step is None or self._kept is None:
            return self._own(*args, **kwargs)
        try:
            out = self._kept.run(step)
        except NotReplayable as error:
            self._give_up()
            warnings.warn(
                f"decoding steps are not recorded and replayed, since {error}: they run one by one, which is right "
                "but slower",
                stacklevel=2,
            )
            return self._own(*args, **kwargs)
        if self._kept.full:
            self.close()
        return out

    def _give_up(self) -> None:
        self.close()
        self._given_up = True

    def close(self) -> None:
        """Gives the cache's layers their tokens back."""
        if self._kept is not None:
            self._watched = self._kept.watched
            self._kept.close()
            self._kept = None


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Finds what cannot be recorded before it is: a recording that fails leaves torch's generators unusable."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation, if the host need not wait for what comes of it."""
        tensors = [part for part in tree_leaves((args, kwargs)) if isinstance(part, Tensor)]
        tags = set(func.tags)
        if func is torch.ops.aten.index.Tensor and not any(part.dtype == torch.bool for part in tensors[1:]):
            tags.clear()  # its result's shape is that of the indices
        if tags & {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}:
            raise NotReplayable(f"the model looks at numbers on the device, by {func}")
        out = func(*args, **(kwargs or {}))
        tensors += [part for part in tree_leaves(out) if isinstance(part, Tensor)]
        if len({part.device for part in tensors if part.ndim}) > 1:
            raise NotReplayable(f"the model copies between devices, by {func}")
        return out


class _Kept:
    """Steps over one cache until its next block is compressed: the first runs, and one of the next is recorded.

    Args:
        step: whose inputs are kept, as what recorded steps read.
        counter: of the layers' windows.
        own: the model's forward.
        recorder: of its steps.
        watched: whether a step of this model has been looked at already.
    """

    def __init__(
        self, step: Step, counter: Counter, own: Callable[..., Any], recorder: Recorder, watched: bool
    ) -> None:
        self.counter, self._own, self._recorder, self.watched = counter, own, recorder, watched
        self._step = Step(step.ids.clone(), step.positions.clone(), step.mask, step.cache, step.constants)
        # Of four axes, so that no model makes another of it; attention takes the counter's.
        self._mask = torch.ones((len(step.ids), 1, 1, 1), dtype=torch.bool, device=step.ids.device)
        self._replay: Callable[[], Any] | None = None
        self._ready = False

    @classmethod
    def of(cls, step: Step, own: Callable[..., Any], recorder: Recorder, watched: bool) -> _Kept | None:
        """With windows for all layers; None if the cache cannot have them."""
        first: Any = step.cache.layers[0]
        held, settings = first.past[0].recent.shape[2], first.settings
        room = settings.residual_length + settings.block_length
        length = first.get_seq_length()
        if held >= room or (step.mask is not None and step.mask.shape != (len(step.ids), length + 1)):
            return None
        mask = None
        if step.mask is not None and not bool(step.mask.all()):
            mask = torch.ones((len(step.ids), 1, 1, length + room - held), dtype=torch.bool, device=step.ids.device)
            mask[:, 0, 0, : length + 1] = step.mask
        kept = cls(step, Counter(held, room, step.ids.device, mask), own, recorder, watched)
        layers: Any = step.cache.layers
        if not all(layer.open_window(kept.counter) for layer in layers):
            kept.close()
            return None
        return kept

    @property
    def full(self) -> bool:
        """Whether a block is to be compressed."""
        return self.counter.held == self.counter.room

    def goes_on(self, step: Step) -> bool:
        """Whether a step follows those before."""
        layers: Any = step.cache.layers
        return self._step.like(step) and all(layer.counter is self.counter for layer in layers)

    def run(self, step: Step) -> Any:
        """The model's output."""
        self._step.ids.copy_(step.ids)
        self._step.positions.copy_(step.positions)
        if not self._ready:  # compiles kernels and sets up libraries, which cannot be recorded
            out, self._ready = self._forward(), True
        elif not self.watched:
            with Watch():  # type: ignore[no-untyped-call]
                out = self._forward()
            self.watched = True
        else:
            if self._replay is None:
                self._replay = self._recorded()
            out = self._replay()
        self.counter.held += 1
        return type(out)(**{**out, "logits": out["logits"].clone()})

    def _recorded(self) -> Callable[[], Any]:
        try:
            return self._recorder.record(self._forward)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise NotReplayable(f"a step cannot be recorded ({error})") from error

    def _forward(self) -> Any:
        step, self.counter.running = self._step, True
        self.counter.counts.add_(1)
        try:
            out = self._own(
                input_ids=step.ids,
                position_ids=step.positions,
                attention_mask=self._mask,
                past_key_values=step.cache,
                **step.constants,
            )
        finally:
            self.counter.running = False
        if others := out.keys() - {"logits", "past_key_values"}:
            raise NotReplayable(f"the model returns {', '.join(sorted(others))} too")
        return out

    def close(self) -> None:
        """Closes the windows."""
        for layer in self._step.cache.layers:
            if isinstance(layer, TurboQuantLayer) and layer.counter is self.counter:
                layer.close_window()
