"""Attention to dense tokens in Triton, and what it shares with that to compressed ones: the mask and the cap."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def allowed(score, position, place, mask_ptr, mask_t, mask_k, MASK: tl.constexpr, CAUSAL: tl.constexpr, window):
    """Scores (tokens, rows) or (rows, tokens) in base 2 with the mask applied; `position` and `place` broadcast."""
    if MASK == 1:
        score = tl.where(tl.load(mask_ptr + mask_t + position.to(tl.int64) * mask_k) != 0, score, float("-inf"))
    if MASK == 2:
        score += tl.load(mask_ptr + mask_t + position.to(tl.int64) * mask_k).to(tl.float32) * 1.4426950408889634
    if CAUSAL:
        score = tl.where((position <= place) & (position > place - window), score, float("-inf"))
    return score


@triton.jit
def capped(score, cap, SOFTCAP: tl.constexpr):
    """Scores in base 2; with a cap they come as 2 log2(e) / softcap times the logits, and cap is log2(e) softcap."""
    if SOFTCAP:
        return cap - 2.0 * cap / (tl.exp2(score) + 1.0)
    else:
        return score


@triton.jit
def _rows(
    first_ptr, second_ptr, first_stride, second_stride, tokens, firsts, count, columns, inside, ASSEMBLED: tl.constexpr
):
    """Rows of two tables that follow each other, by token; zero from `count` on. tokens, columns: (n, 1) and (1, d)."""
    wide = tokens.to(tl.int64)
    rows = tl.load(first_ptr + wide * first_stride + columns, mask=(tokens < firsts) & inside, other=0.0)
    rest = second_ptr + (wide - firsts) * second_stride + columns
    rows += tl.load(rest, mask=(tokens >= firsts) & (tokens < count) & inside, other=0.0)
    if not ASSEMBLED:  # the interpreter multiplies no bfloat16
        rows = rows.to(tl.float32)
    return rows


@triton.jit
def attend_dense(
    query,  # (R, DK2)
    place,  # (R,) int32
    lanes,  # the coordinates of values wanted
    sink_keys_ptr,
    sink_values_ptr,
    recent_keys_ptr,
    recent_values_ptr,
    sink_kt,
    sink_vt,
    recent_kt,
    recent_vt,
    sinks,
    compressed,
    recents,
    factor,
    cap,
    mask_ptr,
    mask_t,
    mask_k,
    window,
    DK: tl.constexpr,
    DV: tl.constexpr,
    DK2: tl.constexpr,
    TOKENS: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ASSEMBLED: tl.constexpr,
):
    """Attention to sinks and recent tokens, flash style: maximum (R,), sum (R,), output (R, lanes)."""
    top = tl.full((query.shape[0],), float("-inf"), tl.float32)
    total = tl.zeros((query.shape[0],), tl.float32)
    out = tl.zeros((query.shape[0], lanes.shape[0]), tl.float32)
    count = sinks + recents
    columns = tl.arange(0, DK2)[None, :]
    for start in tl.range(0, count, TOKENS, num_stages=1):
        tokens = start + tl.arange(0, TOKENS)
        # fmt: off
        key = _rows(
            sink_keys_ptr, recent_keys_ptr, sink_kt, recent_kt, tokens[:, None], sinks, count, columns, columns < DK,
            ASSEMBLED)
        value = _rows(
            sink_values_ptr, recent_values_ptr, sink_vt, recent_vt, tokens[:, None], sinks, count, lanes[None, :],
            lanes[None, :] < DV, ASSEMBLED)
        # fmt: on
        score = capped(tl.dot(query, tl.trans(key), input_precision="ieee") * factor, cap, SOFTCAP)
        inside = tokens < count
        position = tl.where(tokens < sinks, tokens, compressed + tl.where(inside, tokens, sinks))
        score = allowed(score, position[None, :], place[:, None], mask_ptr, mask_t, mask_k, MASK, CAUSAL, window)
        score = tl.where(inside[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, axis=1))
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(score - finite[:, None])
        scale = tl.exp2(top - finite)
        total = total * scale + tl.sum(weight, axis=1)
        out = out * scale[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        top = higher
    return top, total, out
