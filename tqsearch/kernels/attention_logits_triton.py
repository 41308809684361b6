"""Attention logits alone, from packed keys: what `attention_triton` computes before its softmax, written out.

The measure of the paper's headline, and a way to look at attention; attention itself never writes logits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tqsearch.kernels.attention_layout import band_keys, registers
from tqsearch.kernels.attention_operands import Compressed
from tqsearch.kernels.attention_products_triton import digits_joined, fill_registers, key_products
from tqsearch.kernels.attention_triton import prepared


@triton.jit
def logits_kernel(
    digits_ptr,  # (B H row blocks, 2 R, SLOTS) int8
    factors_ptr,  # (B H row blocks, 1 + key bands + BIASES, R) float32
    keys_ptr,  # (B, H, C / BLOCK, BLOCK KEY_ROW) uint8
    scales_ptr,  # (B, H, C)
    tables_ptr,
    out_ptr,  # (B, H, group Tq, C) float32
    rows,  # group Tq
    row_blocks,
    count,  # C
    R: tl.constexpr,
    SLOTS: tl.constexpr,
    BIASES: tl.constexpr,
    BLOCK: tl.constexpr,
    KEY_ROW: tl.constexpr,
    KEY_BANDS: tl.constexpr,
    KEY_ASSEMBLIES: tl.constexpr,
    REGISTERS: tl.constexpr,
):
    """A block of tokens of one KV head, R rows of query heads and queries."""
    N: tl.constexpr = 2 * R
    COUNT: tl.constexpr = len(KEY_BANDS)
    fill_registers(REGISTERS, tables_ptr, tables_ptr)
    task = tl.program_id(1)
    pair = (task // row_blocks).to(tl.int64)
    tokens = tl.arange(0, BLOCK)
    at = pair * count + tl.program_id(0) * BLOCK
    factors = factors_ptr + task * ((1 + COUNT + BIASES) * R) + tl.arange(0, R)
    score = tl.zeros((BLOCK, R), tl.float32)
    for b in tl.static_range(COUNT):
        # fmt: off
        products = key_products(
            keys_ptr + at * KEY_ROW, tokens, digits_ptr + task.to(tl.int64) * (N * SLOTS),
            tables_ptr + b * 256, SLOTS, N, KEY_BANDS[b][0], KEY_BANDS[b][1], KEY_BANDS[b][2],
            KEY_BANDS[b][3], KEY_BANDS[b][4], KEY_BANDS[b][5], KEY_BANDS[b][7],
            tl.constexpr(KEY_ASSEMBLIES[b]), BLOCK)
        # fmt: on
        score += digits_joined(products) * tl.load(factors + (1 + b) * R)[None, :]
    bias = tl.zeros((R,), tl.float32)
    for i in range(BIASES):
        bias += tl.load(factors + (1 + COUNT + i) * R)
    scale = tl.load(scales_ptr + at + tokens).to(tl.float32)
    score = (score + bias[None, :]) * scale[:, None] + tl.load(factors)[None, :]
    lane = (task % row_blocks) * R + tl.arange(0, R)
    into = out_ptr + (pair * rows + lane)[None, :] * count + (tl.program_id(0) * BLOCK + tokens)[:, None]
    tl.store(into, score, mask=(lane < rows)[None, :])


def logits(query: Tensor, keys: Compressed, offset: Tensor | None, scaling: float) -> Tensor:
    """scaling <q, k> for all compressed keys.

    Args:
        query: (B, Hq, Tq, D) floating point.
        keys: C compressed tokens.
        offset: as in `Context`.
        scaling: what inner products are multiplied by.

    Returns:
        (B, Hq, Tq, C) float32.
    """
    batch, query_heads, queries, _ = query.shape
    heads, count = keys.scales.shape[1:]
    ready = prepared(query, keys, offset, scaling)
    out = torch.empty((batch, query_heads, queries, count), dtype=torch.float32, device=query.device)
    if out.numel():
        block = count // keys.packed.shape[2]
        logits_kernel[(count // block, batch * heads * ready.row_blocks)](
            ready.digits,
            ready.factors,
            keys.packed,
            keys.scales,
            ready.cut.tables,
            out,
            query_heads // heads * queries,
            ready.row_blocks,
            count,
            R=ready.rows,
            SLOTS=ready.digits.shape[2],
            BIASES=ready.factors.shape[1] - 1 - len(ready.cut.bands),
            BLOCK=block,
            KEY_ROW=keys.packed.shape[3] // block,
            KEY_BANDS=ready.cut.bands,
            KEY_ASSEMBLIES=ready.cut.assemblies,
            REGISTERS=registers(band_keys(keys.bands)) if any(ready.cut.assemblies) else "",
            num_warps=4,
        )
    return out
