"""What an index keeps of a vector, and how the score of a query is estimated from it.

With z = x - c (c = 0 unless trained) and E the estimate of products with z from the codes:

* "ip" and "cosine": <q, x> = <q, c> + <c, z> + E<q - c, z> where <c, z> is kept, else <q, c> + E<q, z>;
* "l2": -|q - x|^2 = -|q - c|^2 + 2 E<q - c, z> - |z|^2, where |z|^2 is kept.

The number that is kept, <c, z> or -|z|^2, is the row's `bias`. With learnt axes it is float16, as a part of `unit`,
which is the sample's mean |z|^2 (times |c| / |z| for <c, z> where c is the longer); the scan then works in that unit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tqsearch.errors import InvalidInputError
from tqsearch.quantizer import TurboQuantizer
from tqsearch.segments import Columns


class Scanned(NamedTuple):
    """Queries as the scan takes them: a score is `unit` times what the scan finds, plus `constant`."""

    queries: Tensor
    unit: float
    constant: Tensor


class Estimator:
    """The columns of an index of a metric, and its queries; see the module's docstring.

    Args:
        metric: "ip", "cosine" or "l2".
        quantizer: makes the codes.
        keeps_product: whether <c, z> is kept; "l2" keeps |z|^2 in any case.
    """

    def __init__(self, metric: str, quantizer: TurboQuantizer, *, keeps_product: bool) -> None:
        self.metric, self.quantizer, self.keeps_product = metric, quantizer, keeps_product and metric != "l2"
        self.unit = 1.0
        if quantizer.basis is not None:
            length = quantizer.basis.variance**0.5
            centre = 0.0 if quantizer.centre is None else float(quantizer.centre.double().norm())
            self.unit = length * (length if metric == "l2" else max(length, centre))

    @property
    def bias_dtype(self) -> torch.dtype | None:
        """Of the number kept beside the code; None if there is none."""
        return bias_dtype(self.metric, self.keeps_product, learnt_axes=self.quantizer.basis is not None)

    @property
    def bytes_per_vector(self) -> int:
        """Bytes of codes, scale and bias."""
        dtype = self.bias_dtype
        return self.quantizer.bytes_per_vector + (0 if dtype is None else dtype.itemsize)

    def encode(self, matrix: Tensor, first: int = 0) -> Columns:
        """The columns of checked rows, (n, dim) float32, of which the first has the number `first`.

        Raises:
            InvalidInputError: a number overflows; the first such row is named.
        """
        rows = self.quantizer.encode_rows(matrix)
        squares = rows.norms * rows.norms if self.metric == "l2" else rows.norms
        _check(squares, "squared norms" if self.metric == "l2" else "norms", "finite in float32", first)
        limit = "finite in float32"
        if self.quantizer.basis is not None:
            limit = (
                "near the sample's, got one far larger; train on a sample that has such vectors, or its centre alone"
            )
            _check(rows.scales, "norms", limit, first)
        columns = {"packed": rows.packed, "scales": rows.scales}
        dtype = self.bias_dtype
        if dtype is not None:
            bias = -squares if self.metric == "l2" else rows.centre_products
            bias = (bias.double() / self.unit).to(dtype)
            _check(bias, "squared norms" if self.metric == "l2" else "products with the centre", limit, first)
            columns["bias"] = bias
        return columns

    def scanned(self, queries: Tensor) -> Scanned:
        """Queries, (q, dim) float32, as the scan takes them; for "cosine" they are divided by their norms first.

        Raises:
            InvalidInputError: a squared norm overflows float32.
        """
        if self.metric == "cosine":
            queries = unit_rows(queries)
        constant = torch.zeros(1, device=queries.device)
        centre = self.quantizer.centre
        if centre is not None:
            centre = centre.to(queries.device)
            constant = (queries @ centre)[:, None]
            if self.metric == "l2" or self.keeps_product:
                queries = queries - centre
        squares = (queries * queries).sum(dim=1, keepdim=True)
        if not torch.isfinite(squares).all():  # products would overflow, and infinities of both signs make NaN
            row = int((~torch.isfinite(squares)).nonzero()[0, 0])
            raise InvalidInputError(
                f"queries must have squared norms that are finite in float32, got an overflow in row {row}"
            )
        if self.metric == "l2":
            queries, constant = 2.0 * queries, -squares
        if self.unit != 1.0:
            queries = queries.double() / self.unit
        return Scanned(self.quantizer.scanned_queries(queries), self.unit, constant)


def unit_rows(vectors: Tensor) -> Tensor:
    """Rows, (n, dim) float32, divided by their norms; zero rows stay zero."""
    largest = vectors.abs().amax(dim=1, keepdim=True) if vectors.shape[0] else vectors[:, :1]
    vectors = vectors / torch.where(largest > 0, largest, 1.0)  # so that squares neither overflow nor vanish
    norms = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    return vectors / torch.where(norms > 0, norms, 1.0)


def bias_dtype(metric: str, keeps_product: bool, *, learnt_axes: bool) -> torch.dtype | None:
    """The dtype of an index's `bias`, or None if it keeps none.

    For "cosine" it is at most 2, and with learnt axes a part of the sample's: float16 is enough.
    """
    if metric != "l2" and not keeps_product:
        return None
    return torch.float16 if metric == "cosine" or learnt_axes else torch.float32


def _check(values: Tensor, what: str, limit: str, first: int) -> None:
    if not torch.isfinite(values).all():
        row = first + int((~torch.isfinite(values)).nonzero()[0])
        raise InvalidInputError(f"vectors must have {what} that are {limit}, got an overflow in row {row}")
