"""What encoding returns: codes, and beside them what an index keeps of a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Codes:
    """Encoded vectors.

    Attributes:
        packed: (n, row bytes) uint8, in the layout of `packing`, or of `trellis.pack`.
        scales: (n,) of the quantizer's scale dtype: what the levels are multiplied by.
        signs: (n, ceil(d / 8)) uint8, one bit a projection; form "prod" only.
        residual_norms: (n,) float32; form "prod" only.
    """

    packed: Tensor
    scales: Tensor
    signs: Tensor | None = None
    residual_norms: Tensor | None = None

    def __len__(self) -> int:
        return len(self.packed)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        parts = (self.packed, self.scales, self.signs, self.residual_norms)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)


class EncodedRows(NamedTuple):
    """Codes, with what an index keeps beside them; see `TurboQuantizer.encode_rows`."""

    packed: Tensor
    scales: Tensor
    norms: Tensor
    centre_products: Tensor
    expected: Expected | None = None


class Expected(NamedTuple):
    """What makes the score of the query expected of a row exact: t = c + sum of gamma_i y_i a_i, see `neighbours`.

    Attributes:
        scales: (n,) of the scale dtype: with these instead <t, z> is exact; never more than twice or less than half the
            unbiased ones.
        missed: (n,) float64: <t - c, z> less its estimate by the unbiased scales.
    """

    scales: Tensor
    missed: Tensor


def joined(parts: list[EncodedRows]) -> EncodedRows:
    """Blocks of rows, at least one, as one."""
    if len(parts) == 1:
        return parts[0]
    expected = [part.expected for part in parts if part.expected is not None]
    return EncodedRows(
        torch.cat([part.packed for part in parts]),
        torch.cat([part.scales for part in parts]),
        torch.cat([part.norms for part in parts]),
        torch.cat([part.centre_products for part in parts]),
        Expected(torch.cat([part.scales for part in expected]), torch.cat([part.missed for part in expected]))
        if expected
        else None,
    )
