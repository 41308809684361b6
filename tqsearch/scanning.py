"""The top k of an index: every segment scanned, filtered, and its results merged."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from tqsearch import kernels
from tqsearch.arrays import check_finite
from tqsearch.errors import InvalidInputError
from tqsearch.estimator import Estimator
from tqsearch.kernels.reference import merge_top_k
from tqsearch.kernels.replay import Replayed
from tqsearch.segments import Columns, SegmentedRows

_GATHER_SHARE = 8  # a filter that allows less than one row in this many is scanned by gathering those rows
_GATHER_BLOCK = 1 << 16


class Searcher:
    """Searches an index as it stands; after a change it must not be used again.

    On a GPU repeated searches of few queries without a filter are recorded and replayed, see `kernels.replay`: their
    work is the same as long as the rows' tensors are.

    Args:
        estimator: what made the rows.
        rows: those; their columns' tensors stay as they are.
    """

    def __init__(self, estimator: Estimator, rows: SegmentedRows) -> None:
        self.estimator, self.rows = estimator, rows
        self._replayed = Replayed(partial(_search, estimator, rows))

    def top_k(self, queries: Tensor, k: int, mask: Tensor | None, precision: str) -> tuple[Tensor, Tensor]:
        """The k nearest vectors of each query.

        Args:
            queries: (q, dim) float32 on the rows' device.
            k: how many, >= 1.
            mask: (n,) bool, the rows that may be returned, or None for all.
            precision: see `kernels.scan`.

        Returns:
            scores: (q, k) float32 in the metric's sense; -inf ("l2": inf) where missing.
            ids: (q, k) int64; -1 where missing.

        Raises:
            InvalidInputError: a query is not finite, or its squared norm overflows float32.
        """
        if mask is None:
            scores, ids, squares = self._replayed(queries, k, precision)
        else:
            scores, ids, squares = _search(self.estimator, self.rows, queries, k, precision, mask)
        _check(queries, squares.cpu())  # the device's work is queued: only now it is waited for
        return scores, ids


def _search(
    estimator: Estimator, rows: SegmentedRows, queries: Tensor, k: int, precision: str, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores and ids as of `Searcher.top_k`, and `Scanned.squares`."""
    quantizer, device = estimator.quantizer, queries.device
    scanned = estimator.scanned(queries)
    if device.type == "cpu":
        _check(queries, scanned.squares)
    best: tuple[Tensor, Tensor] | None = None
    for start, columns in rows.runs():
        allowed = None if mask is None else mask[start : start + len(columns["packed"])]
        for local, part, part_mask in _parts(columns, allowed):
            scores, places = kernels.scan(
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
            found = scores, _named(places, local, start, columns)
            best = found if best is None else merge_top_k(*best, *found, k)
    if best is None:
        best = queries.new_empty((len(queries), 0)), torch.empty((len(queries), 0), dtype=torch.int64, device=device)
    scores, ids = best
    if scores.shape[1] < k:
        missing = (0, k - scores.shape[1])
        scores = torch.nn.functional.pad(scores, missing, value=-math.inf)
        ids = torch.nn.functional.pad(ids, missing, value=-1)
    if scanned.unit != 1.0:
        scores = scores * scanned.unit
    if scanned.constant is not None:
        scores = scores + scanned.constant
    return (-scores if estimator.metric == "l2" else scores), ids, scanned.squares


def _named(places: Tensor, local: Tensor | None, start: int, columns: Columns) -> Tensor:
    """The ids of what a scan found, -1 for nothing; `local` are the numbers of the scanned rows, None for all."""
    if local is None and start == 0 and "ids" not in columns:
        return places
    number = places if local is None else local[places]
    return (columns["ids"][number] if "ids" in columns else number + start).masked_fill(places < 0, -1)


def _check(queries: Tensor, squares: Tensor) -> None:
    """Refuses queries whose squared norms, on the CPU, are not finite."""
    if not torch.isfinite(squares).all():
        check_finite(queries, "queries")
        row = int((~torch.isfinite(squares)).nonzero()[0])
        raise InvalidInputError(
            f"queries must have squared norms that are finite in float32, got an overflow in row {row}"
        )


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
