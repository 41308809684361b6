"""The top k of an index: every segment scanned, filtered, and its results merged."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from tqsearch import kernels
from tqsearch.arrays import check_finite
from tqsearch.errors import InvalidInputError
from tqsearch.estimator import Estimator
from tqsearch.kernels.reference import merge_top_k
from tqsearch.segments import Columns, SegmentedRows

_GATHER_SHARE = 8  # a filter that allows less than one row in this many is scanned by gathering those rows
_GATHER_BLOCK = 1 << 16


class _Run(NamedTuple):
    """A segment: its first row's number, its columns, and the scan of them for queries, k and precision."""

    start: int
    columns: Columns
    scan: Callable[..., tuple[Tensor, ...]]


class Searcher:
    """Searches an index as it stands; after a change it must not be used again.

    What its searches have in common is found once, see `kernels.repeated`.

    Args:
        estimator: what made the rows.
        rows: those; their columns' tensors stay as they are.
        device: of the rows.
    """

    def __init__(self, estimator: Estimator, rows: SegmentedRows, device: torch.device) -> None:
        self._estimator, self._backend = estimator, estimator.quantizer.backend
        self._tables = estimator.quantizer.tables(device)
        self._scanned = kernels.repeated(partial(_scanned, estimator), device, backend=self._backend)
        self._streams = threading.local()
        self._known_streams: dict[int, torch.cuda.Stream] = {}
        self._count = len(rows)
        self._runs = []
        for start, columns in rows.runs():
            scan = partial(_scan, columns, None, self._tables, self._backend)
            self._runs.append(_Run(start, columns, kernels.repeated(scan, device, backend=self._backend)))

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
        values, squares, *products = self._scanned(queries)
        prepared = None
        if queries.device.type == "cpu":
            _check(queries, squares)
        else:
            prepared = torch.cuda.Event()  # type: ignore[no-untyped-call]
            prepared.record(self._current_stream(queries.device))
        most = min(k, self._count)
        best: tuple[Tensor, Tensor] | None = None
        for found in self._found(values, most, mask, precision):
            best = found if best is None else merge_top_k(*best, *found, most)
        if best is None:
            none = queries.new_empty((len(queries), 0))
            best = none, none.long()
        scores, ids = best
        if prepared is not None:  # the scan is queued: it runs while the host looks at the queries
            _check(queries, self._on_host(squares, prepared))
        if scores.shape[1] < k:
            missing = (0, k - scores.shape[1])
            scores = torch.nn.functional.pad(scores, missing, value=-math.inf)
            ids = torch.nn.functional.pad(ids, missing, value=-1)
        return self._estimator.scores(scores, squares, *(products or (None,))), ids

    def _current_stream(self, device: torch.device) -> torch.cuda.Stream:
        """What `torch.cuda.current_stream` makes anew at each call, which takes longer than a launch."""
        number = torch._C._cuda_getCurrentRawStream(device.index)
        if number not in self._known_streams:
            self._known_streams[number] = torch.cuda.current_stream(device)
        return self._known_streams[number]

    def _on_host(self, squares: Tensor, prepared: torch.cuda.Event) -> Tensor:
        """The squares as soon as they are made, not when the current stream has done its work."""
        beside: torch.cuda.Stream | None = getattr(self._streams, "beside", None)
        if beside is None:
            beside = self._streams.beside = torch.cuda.Stream(squares.device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(beside):
            beside.wait_event(prepared)
            return squares.cpu()

    def _found(self, queries: Tensor, k: int, mask: Tensor | None, precision: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Scores and ids of the best of each segment, or of parts of it."""
        for start, columns, scan in self._runs:
            if mask is None:
                scores, places = scan(queries, k, precision)
                yield scores, _named(places, None, start, columns)
                continue
            for local, part, allowed in _parts(columns, mask[start : start + len(columns["packed"])]):
                scores, places = _scan(part, allowed, self._tables, self._backend, queries, k, precision)
                yield scores, _named(places, local, start, columns)


def _scanned(estimator: Estimator, queries: Tensor) -> tuple[Tensor, ...]:
    """`Scanned` without what is not there."""
    return tuple([part for part in estimator.scanned(queries) if part is not None])


def _scan(
    columns: Columns,
    mask: Tensor | None,
    tables: tuple[kernels.BandTable, ...],
    backend: str,
    queries: Tensor,
    k: int,
    precision: str,
) -> tuple[Tensor, Tensor]:
    parts = columns["packed"], columns["scales"], columns.get("bias")
    return kernels.scan(queries, *parts, mask, tables, k, precision=precision, backend=backend)


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


def _parts(columns: Columns, mask: Tensor) -> Iterator[tuple[Tensor | None, Columns, Tensor | None]]:
    """What to scan of a segment: all of it under its mask or, where the mask allows few rows, those rows in blocks.

    Yields:
        Row numbers of the columns' rows (None: all in order), the columns, and their mask.
    """
    rows = mask.nonzero().flatten()
    if len(rows) * _GATHER_SHARE >= len(mask):
        yield None, columns, mask
        return
    for block in torch.split(rows, _GATHER_BLOCK):
        if len(block):
            yield block, {name: column[block] for name, column in columns.items()}, None
