"""What an index keeps of a vector, and how the score of a query is estimated from it.

With z = x - c (c = 0 unless trained) and E the estimate of products with z from the codes:

* "ip" and "cosine": <q, x> = <q, c> + <c, z> + E<q - c, z> where <c, z> is kept, else <q, c> + E<q, z>;
* "l2": -|q - x|^2 = -|q - c|^2 + 2 E<q - c, z> - |z|^2, where |z|^2 is kept.

Of learnt axes the score of t, the query expected of the row (`training/neighbours`), is made exact: by t's error, taken
off the number that is kept, or where none is kept by the scale.

The number that is kept, <c, z> or -|z|^2, is the row's `bias`. With learnt axes it is float16, as a part of `unit`,
which is the sample's mean |z|^2 (times |c| / |z| for <c, z> where c is the longer); the scan then works in that unit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tqsearch import kernels
from tqsearch.errors import InvalidInputError
from tqsearch.kernels.reference import unit_rows
from tqsearch.quantizer import TurboQuantizer
from tqsearch.rotation import Hadamard
from tqsearch.segments import Columns


class Scanned(NamedTuple):
    """Queries as the scan takes them, and what `Estimator.scores` adds to what it finds.

    Attributes:
        queries: (q, scanned dim) float32.
        squares: (q,) float32, |z|^2 of what is rotated; not finite where a query is not, or where it overflows, so that
            products would: infinities of both signs make NaN.
        products: (q,) float32, <q, c>; None without a centre.
    """

    queries: Tensor
    squares: Tensor
    products: Tensor | None


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
        self._centres: dict[torch.device, Tensor] = {}
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
        if dtype is None and rows.expected is not None:
            columns["scales"] = rows.expected.scales
        elif dtype is not None:
            bias = (-squares if self.metric == "l2" else rows.centre_products).double()
            if rows.expected is not None:
                bias = bias + (2 if self.metric == "l2" else 1) * rows.expected.missed
            bias = (bias / self.unit).to(dtype)
            _check(bias, "squared norms" if self.metric == "l2" else "products with the centre", limit, first)
            columns["bias"] = bias
        return columns

    def scanned(self, queries: Tensor) -> Scanned:
        """Queries, (q, dim) float32, as the scan takes them; for "cosine" they are divided by their norms first."""
        quantizer, device, unit = self.quantizer, queries.device, self.metric == "cosine"
        centre = self._centre_on(device)
        taken_off = centre if self.metric == "l2" or self.keeps_product else None
        turn: tuple[Tensor, Tensor | None] | None = None
        if quantizer.basis is None and isinstance(quantizer.rotation, Hadamard):
            turn = quantizer.rotation.tensors(device)
        factor = 2.0 if self.metric == "l2" else 1.0
        values, squares, products = kernels.rotate(
            queries, *(turn or ()), centre=taken_off, unit=unit, factor=factor, backend=quantizer.backend
        )
        if centre is not None and taken_off is None:
            products = (unit_rows(queries) if unit else queries) @ centre
        if turn is None:
            values = quantizer.scanned_queries(values if self.unit == 1.0 else values.double() / self.unit)
        return Scanned(values, squares, products)

    def scores(self, found: Tensor, squares: Tensor, products: Tensor | None) -> Tensor:
        """Scores in the metric's sense, of what a scan of `Scanned.queries` found, (q, k)."""
        if self.unit != 1.0:
            found = found * self.unit
        if self.metric == "l2":
            return squares[:, None] - found
        return found if products is None else found + products[:, None]

    def _centre_on(self, device: torch.device) -> Tensor | None:
        if self.quantizer.centre is None:
            return None
        if device not in self._centres:
            self._centres[device] = self.quantizer.centre.to(device)
        return self._centres[device]


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
