"""The top k of an index: every segment scanned, filtered, and its results merged."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from tqsearch import kernels
from tqsearch.contents import Contents
from tqsearch.estimator import Estimator
from tqsearch.kernels.reference import merge_top_k
from tqsearch.segments import Columns

_GATHER_SHARE = 8  # a filter that allows less than one row in this many is scanned by gathering those rows
_GATHER_BLOCK = 1 << 16


def top_k(
    estimator: Estimator, contents: Contents, queries: Tensor, k: int, mask: Tensor | None, precision: str
) -> tuple[Tensor, Tensor]:
    """The k nearest vectors of each query.

    Args:
        estimator: what made the columns.
        contents: the columns and ids.
        queries: (q, dim) float32 on the contents' device.
        k: how many, >= 1.
        mask: (n,) bool, the rows that may be returned, or None for all.
        precision: see `kernels.scan`.

    Returns:
        scores: (q, k) float32 in the metric's sense; -inf ("l2": inf) where missing.
        ids: (q, k) int64; -1 where missing.

    Raises:
        InvalidInputError: a query's squared norm overflows float32.
    """
    quantizer, device = estimator.quantizer, queries.device
    scanned = estimator.scanned(queries)
    scores = torch.full((len(queries), k), -math.inf, device=device)
    ids = torch.full((len(queries), k), -1, dtype=torch.int64, device=device)
    for start, columns in contents.rows.runs():
        allowed = None if mask is None else mask[start : start + len(columns["packed"])]
        for rows, part, part_mask in _parts(columns, allowed):
            found, places = kernels.scan(
                scanned.queries,
                part["packed"],
                part["scales"],
                part.get("bias"),
                part_mask,
                quantizer.tables(device),
                k,
                precision=precision,
                backend=quantizer.backend,
            )
            local = places if rows is None else rows[places]
            named = columns["ids"][local] if "ids" in columns else local + start
            scores, ids = merge_top_k(scores, ids, found, named.masked_fill(places < 0, -1), k)
    scores = scores.mul_(scanned.unit).add_(scanned.constant)
    return (-scores if estimator.metric == "l2" else scores), ids


def _parts(columns: Columns, mask: Tensor | None) -> Iterator[tuple[Tensor | None, Columns, Tensor | None]]:
    """What to scan of a segment: all of it under its mask or, where the mask allows few rows, those rows in blocks.

    Yields:
        Row numbers of the columns' rows (None: all in order), the columns, and their mask.
    """
    rows = None if mask is None else mask.nonzero().flatten()
    if mask is None or rows is None or len(rows) * _GATHER_SHARE >= len(mask):
        yield None, columns, mask
        return
    for block in torch.split(rows, _GATHER_BLOCK):
        if len(block):
            yield block, {name: column[block] for name, column in columns.items()}, None
