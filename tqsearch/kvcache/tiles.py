"""Attention in plain torch, a tile of keys and values at a time, joined by their log-sum-exp as in flash attention.

A long chunk of queries over a compressed past is attended so where no kernel runs: of the past one tile is decoded at
a time, never all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from tqsearch.kvcache.history import History

# Floats of a tile's keys.
TILE = 1 << 20
# Of a token that is not seen. Not minus infinity: what a padded query gets, which sees nothing, must not be NaN.
LEAST = torch.finfo(torch.float32).min


def attention(
    query: Tensor,
    tiles: Iterable[tuple[Tensor, Tensor]],
    length: int,
    *,
    scaling: float,
    mask: Tensor | None = None,
    causal: bool = True,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(scaling <q, k>) v of queries that are the last tokens.

    Args:
        query: (B, Hq, Tq, D).
        tiles: keys (B, H, n, D) and values (B, H, n, D') of all tokens in order.
        length: how many tokens the tiles have together.
        scaling, mask, softcap, s_aux, sliding_window: as for `kernels.attention`, but a mask may differ by head.
        causal: whether, without a mask, a query sees no later token.
        dropout: of the weights.

    Returns:
        (B, Tq, Hq, D') of the query's dtype; the values' mean for a query that sees nothing.
    """
    batch, query_heads, count, _ = query.shape
    places = torch.arange(length - count, length, device=query.device)[:, None]
    first = 0
    state: tuple[Tensor, Tensor, Tensor] | None = None  # maximum, sum and weighted values so far
    for keys, values in tiles:
        heads, tokens = keys.shape[1], keys.shape[2]
        if not tokens:
            continue
        rows = query.reshape(batch, heads, query_heads // heads * count, -1)
        scores = (rows @ keys.transpose(2, 3)).view(batch, query_heads, count, tokens).float() * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        here = torch.arange(first, first + tokens, device=query.device)
        if mask is not None:
            part = mask[..., first : first + tokens]
            scores = scores.masked_fill(~part, LEAST) if mask.dtype == torch.bool else scores + part
        elif causal:
            scores = scores.masked_fill(here > places, LEAST)
        if sliding_window is not None:
            scores = scores.masked_fill(here <= places - sliding_window, LEAST)
        first += tokens
        higher = scores.detach().amax(dim=3, keepdim=True)
        if state is not None:
            higher = torch.maximum(state[0], higher)
        weights = torch.exp(scores - higher)
        mass = weights.sum(dim=3, keepdim=True)
        weights = torch.nn.functional.dropout(weights, dropout).to(query.dtype)
        found = (weights.view(batch, heads, -1, tokens) @ values).view(batch, query_heads, count, -1).float()
        if state is not None:
            before = torch.exp(state[0] - higher)
            mass, found = mass + state[1] * before, found + state[2] * before
        state = higher, mass, found
    assert state is not None
    top, total, out = state
    if s_aux is not None:
        total = total + torch.exp(s_aux.float().view(1, -1, 1, 1) - top)
    return (out / total).to(query.dtype).transpose(1, 2).contiguous()


def tiles_of(keys: History, values: History) -> Iterator[tuple[Tensor, Tensor]]:
    """The tokens of two histories that are compressed alike, decoded a tile at a time."""
    yield keys.sinks, values.sinks
    if keys.codec is not None:
        batch, heads, _, dim = keys.recent.shape
        block = keys.codec.block_length
        step = max(TILE // (batch * heads * dim * block), 1) * block
        for start in range(0, keys.compressed_length, step):
            stop = min(start + step, keys.compressed_length)
            yield keys.decoded(start, stop), values.decoded(start, stop)
    yield keys.recent, values.recent
