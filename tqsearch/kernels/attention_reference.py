"""`attention` in plain torch: the specification. It decodes everything and attends in float32.

`kernels.attention` documents the arguments.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tqsearch.kernels.attention_operands import Compressed, Context
from tqsearch.kernels.bands import BandTable
from tqsearch.kernels.reference import decode
from tqsearch.packing import by_rows


def decoded_keys(keys: Compressed, offset: Tensor | None) -> Tensor:
    """The estimates of compressed keys: (B, H, C, D) float32."""
    blocks = keys.packed.flatten(0, 2)
    pairs = [(band.size, band.width) for band in keys.bands]
    rows = by_rows(blocks, pairs, keys.scales.numel() // max(len(blocks), 1)).flatten(0, 1)
    levels = decode(rows, keys.bands).view(*keys.scales.shape, len(keys.rotation))
    estimate = (levels * keys.scales.float()[..., None]) @ keys.rotation
    return estimate if offset is None else estimate + offset[:, None]


def decoded_values(values: Compressed) -> Tensor:
    """The estimates of compressed values: (B, H, C, D) float32."""
    batch, heads, count = values.scales.shape
    blocks = values.packed.shape[2]
    block = count // blocks if blocks else 8
    columns, byte = [], 0
    for band in values.bands:
        row = block_row(band, block)
        size = band.size * row.nbytes
        whole = values.packed[..., byte : byte + size].reshape(batch * heads * blocks, size)
        rows = by_rows(whole, [(block, band.width)], band.size).flatten(0, 1)
        columns.append(decode(rows, (row,)).view(batch, heads, blocks, band.size, block))
        byte += size
    levels = torch.cat(columns, dim=3).transpose(3, 4).reshape(batch, heads, count, len(values.rotation))
    return (levels * values.scales.float()[..., None]) @ values.rotation


def block_row(band: BandTable, block: int) -> BandTable:
    """A band of values turned around: one coordinate's codes of a block of tokens."""
    return band._replace(size=block)


def visible(
    length: int, queries: int, window: int | None, causal: bool, device: torch.device, held: Tensor | None = None
) -> Tensor:
    """Which of `length` tokens each of the last `queries` may see: (queries, length) bool.

    Query i stands at position length - queries + i. With a window it sees the tokens less than `window` before it.
    Where only the first `held` tokens, (1,) int64, are there yet, the queries are the last of those.
    """
    place = torch.arange(length - queries, length, device=device)[:, None]
    if held is not None:
        place = place - length + held
    token = torch.arange(length, device=device)[None, :]
    allowed = token <= place if causal else torch.ones((queries, length), dtype=torch.bool, device=device)
    if held is not None:
        allowed = allowed & (token < held)
    return allowed if window is None else allowed & (token > place - window)


def attention(
    query: Tensor,
    context: Context,
    scaling: float,
    mask: Tensor | None,
    softcap: float | None,
    s_aux: Tensor | None,
    sliding_window: int | None,
) -> Tensor:
    """See `kernels.attention`."""
    batch, query_heads, count, _ = query.shape
    sinks, recent = context.sinks, context.recent
    keys = torch.cat([sinks.keys.float(), decoded_keys(context.keys, context.offset), recent.keys.float()], dim=2)
    values = torch.cat([sinks.values.float(), decoded_values(context.values), recent.values.float()], dim=2)
    heads = keys.shape[1]
    rows = query.float().reshape(batch, heads, query_heads // heads, count, -1)
    scores = rows @ keys[:, :, None].transpose(-1, -2) * scaling  # (B, H, G, Tq, T)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    held = None
    if context.recents is not None:
        held = context.length - recent.keys.shape[2] + context.recents
        values = torch.where(torch.arange(context.length, device=query.device)[:, None] < held, values, 0.0)
    allowed = visible(context.length, count, sliding_window, mask is None, query.device, held)
    if mask is not None and mask.dtype == torch.bool:
        allowed = allowed & mask[:, :, None]
    elif mask is not None:
        scores = scores + mask[:, :, None].float()
    scores = scores.masked_fill(~allowed, -math.inf)
    highest = scores.amax(dim=-1, keepdim=True)
    if s_aux is not None:
        sink_logits = s_aux.float().view(1, heads, -1, 1, 1)
        highest = torch.maximum(highest, sink_logits)
    highest = highest.masked_fill(highest == -math.inf, 0.0)
    weights = torch.exp(scores - highest)
    total = weights.sum(dim=-1, keepdim=True)
    if s_aux is not None:
        total = total + torch.exp(sink_logits - highest)
    weights = torch.where(total > 0, weights / total, 0.0)
    out = weights @ values[:, :, None]
    return out.flatten(1, 2).transpose(1, 2).to(query.dtype).contiguous()
