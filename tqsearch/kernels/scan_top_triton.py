"""The kernels of `scan_triton` that choose: the tiles of largest maximum, the best rows of those."""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.4028234663852886e38)  # of float32


@triton.jit(do_not_specialize=["tiles", "groups"])
def group_kernel(
    maxima_ptr,  # (q, tiles) float32, of `scan_kernel`
    groups_ptr,  # (q, groups) float32
    tiles,
    groups,
    GROUP: tl.constexpr,  # tiles
    BLOCK: tl.constexpr,  # groups
):
    """The largest maximum of each run of GROUP tiles."""
    blocks = tl.cdiv(groups, BLOCK)
    query = (tl.program_id(0) // blocks).to(tl.int64)
    group = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    tile = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    most = tl.load(maxima_ptr + query * tiles + tile, mask=tile < tiles, other=float("-inf"))
    tl.store(groups_ptr + query * groups + group, tl.max(most, axis=1), mask=group < groups)


@triton.jit(do_not_specialize=["k", "tiles", "groups"])
def choose_kernel(
    maxima_ptr,  # (q, tiles) float32, of `scan_kernel`
    groups_ptr,  # (q, groups) float32, of `group_kernel`
    chosen_ptr,  # (q, k) int64
    k,
    tiles,
    groups,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,  # a power of two, groups or more
    K: tl.constexpr,  # a power of two, k or more
):
    """The k tiles of largest maximum of one query: they are among the k groups of largest maximum."""
    query = tl.program_id(0).to(tl.int64)
    ordinal = tl.arange(0, K)
    place = tl.arange(0, GROUPS)
    most = tl.load(groups_ptr + query * groups + place, mask=place < groups, other=float("-inf"))
    most = tl.where(place < groups, tl.maximum(most, LOWEST), float("-inf"))  # what is there goes before what is not
    group = tl.zeros((K,), tl.int32)
    for i in range(k):
        _, at = tl.max(most, axis=0, return_indices=True)
        group = tl.where(ordinal == i, at, group)
        most = tl.where(place == at, float("-inf"), most)
    tile = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    there = (tile < tiles) & (ordinal < tl.minimum(k, groups))[:, None]
    most = tl.load(maxima_ptr + query * tiles + tile, mask=there, other=float("-inf"))
    most = tl.reshape(tl.where(there, tl.maximum(most, LOWEST), float("-inf")), (K * GROUP,))
    tile = tl.reshape(tile, (K * GROUP,))
    place = tl.arange(0, K * GROUP)
    for i in range(k):
        _, at = tl.max(most, axis=0, return_indices=True)
        tl.store(chosen_ptr + query * k + i, tl.sum(tl.where(place == at, tile, 0), axis=0).to(tl.int64))
        most = tl.where(place == at, float("-inf"), most)


@triton.jit(do_not_specialize=["k"])
def best_kernel(
    candidates_ptr,  # (q, k, TILE) float32
    tiles_ptr,  # (q, k) int64, the candidates' tiles
    scores_ptr,  # (q, k) float32
    rows_ptr,  # (q, k) int64
    k,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The k best candidates of one query, one after the other: a launch in place of a sort and six small ones."""
    query = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    scores = tl.load(candidates_ptr + query * k * TILE + place, mask=place < k * TILE, other=float("-inf"))
    for i in range(k):
        best, at = tl.max(scores, axis=0, return_indices=True)
        row = tl.load(tiles_ptr + query * k + at // TILE) * TILE + at % TILE
        tl.store(scores_ptr + query * k + i, best)
        tl.store(rows_ptr + query * k + i, tl.where(best > float("-inf"), row, -1))
        scores = tl.where(place == at, float("-inf"), scores)
