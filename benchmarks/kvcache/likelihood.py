"""Perplexity, KL divergence and top-1 agreement of a cache against the model's own dense cache.

Documents are fed in chunks, one forward pass a chunk, so that every chunk but the first reads the past from the cache:
what has left the recent window is read through the compressed path at every position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

HELD = 4 << 30  # bytes of the dense reference that are kept


@dataclass(frozen=True)
class Agreement:
    """What was measured at every position of every document; each field is (documents, positions) float32.

    Attributes:
        dense_nll: -log p(next token) with the dense cache, nats.
        nll: the same with the cache that is measured.
        kl: KL(dense || measured) of the next token's distribution, nats.
        top1: 1 where both have the same most likely token.
    """

    dense_nll: Tensor
    nll: Tensor
    kl: Tensor
    top1: Tensor

    @staticmethod
    def joined(parts: list[Agreement]) -> Agreement:
        """One record of several groups of documents."""
        names = ("dense_nll", "nll", "kl", "top1")
        return Agreement(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def chunked(model: Any, tokens: Tensor, cache: Any, chunk: int) -> Iterator[tuple[int, Tensor]]:
    """Log-probabilities of the next token, chunk after chunk.

    Args:
        tokens: (documents, length) int64, on the model's device.
        cache: an empty cache.

    Yields:
        The first position, and (documents, up to chunk, vocabulary) float32.
    """
    for start in range(0, tokens.shape[1], chunk):
        piece = tokens[:, start : start + chunk]
        logits = model(piece, past_key_values=cache, use_cache=True).logits
        yield start, torch.log_softmax(logits.float(), dim=-1)


@torch.inference_mode()
def dense_reference(model: Any, tokens: Tensor, chunk: int) -> Tensor:
    """Log-probabilities with the dense cache, (documents, length, vocabulary) float32."""
    from transformers import DynamicCache

    return torch.cat([part for _, part in chunked(model, tokens, DynamicCache(config=model.config), chunk)], dim=1)


@torch.inference_mode()
def agreement(model: Any, tokens: Tensor, reference: Tensor, cache: Any, chunk: int) -> Agreement:
    """Feed the documents through a cache and compare with the dense reference.

    Args:
        tokens: (documents, length) int64.
        reference: of `dense_reference`.
        cache: an empty cache.
    """
    found: dict[str, list[Tensor]] = {"dense_nll": [], "nll": [], "kl": [], "top1": []}
    for start, ours in chunked(model, tokens, cache, chunk):
        dense = reference[:, start : start + ours.shape[1]]
        targets = tokens[:, start + 1 : start + 1 + ours.shape[1]]
        predicted = targets.shape[1]
        found["dense_nll"].append(-dense[:, :predicted].gather(2, targets[..., None])[..., 0])
        found["nll"].append(-ours[:, :predicted].gather(2, targets[..., None])[..., 0])
        kl = (dense.exp() * (dense - ours)).sum(dim=-1)
        found["kl"].append(kl[:, :predicted])
        found["top1"].append((dense.argmax(dim=-1) == ours.argmax(dim=-1)).float()[:, :predicted])
    return Agreement(**{name: torch.cat(parts, dim=1).cpu() for name, parts in found.items()})


class Reference:
    """The dense cache's log-probabilities of documents, a group at a time.

    Groups are kept for the next cache up to `HELD` bytes; those beyond, of many documents or a large vocabulary, are
    computed again.

    Args:
        model: whose they are.
        tokens: (documents, length) int64, on the model's device.
        chunk: tokens fed at a time.
        batch: documents of a group.
    """

    def __init__(self, model: Any, tokens: Tensor, chunk: int, batch: int) -> None:
        self.model, self.chunk, self._groups = model, chunk, torch.split(tokens, batch)
        self._kept: dict[int, Tensor] = {}

    def groups(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each group's tokens with its log-probabilities, (documents, length, vocabulary) float32."""
        for number, tokens in enumerate(self._groups):
            dense = self._kept.get(number)
            if dense is None:
                dense = dense_reference(self.model, tokens, self.chunk)
                if sum(part.nbytes for part in self._kept.values()) + dense.nbytes <= HELD:
                    self._kept[number] = dense
            yield tokens, dense

    def agreement(self, make: Callable[[], Any]) -> Agreement:
        """`agreement` of a cache, of which `make` makes an empty one for each group, over all documents."""
        parts = [agreement(self.model, tokens, dense, make(), self.chunk) for tokens, dense in self.groups()]
        return Agreement.joined(parts)
