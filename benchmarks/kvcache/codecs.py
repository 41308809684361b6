"""Codecs for the simulated cache: TurboQuant in both forms, and the library's integer groups."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from tqsearch.plan import BitPlan
from tqsearch.quantizer import TurboQuantizer


class TurboCodec:
    """TurboQuant of single vectors; form "prod" is the paper's for keys.

    Args:
        dim: of a head.
        bits: a width or a plan.
        form: "mse" or "prod".
        seed: of the rotation.
        unbiased: for "mse", whether inner products are unbiased; else the squared error is least.
    """

    def __init__(
        self,
        dim: int,
        bits: float | BitPlan,
        form: Literal["mse", "prod"] = "mse",
        *,
        unbiased: bool = True,
        seed: int = 0,
    ) -> None:
        self.quantizer = TurboQuantizer(dim, bits, form=form, seed=seed)
        self.unbiased = unbiased

    def round_trip(self, states: Tensor) -> Tensor:
        """See `simulated.Codec`."""
        flat = states.reshape(-1, states.shape[-1]).float()
        return self.quantizer.decode(self.quantizer.encode(flat), unbiased=self.unbiased).view_as(states).to(states)

    def bytes_per_vector(self) -> float:
        """Codes and a float16 scale; form "prod" also signs and a float16 residual norm."""
        signs = 0 if self.quantizer.qjl is None else -(-self.quantizer.dim // 8) + 2
        return self.quantizer.plan.bytes_per_vector + 2 + signs


class QuantoCodec:
    """The library's integer groups (quanto, axis 0, groups of 64), with our sinks and recent window around them."""

    def __init__(self, dim: int, bits: int, group: int = 64) -> None:
        from optimum.quanto import MaxOptimizer, qint2, qint4

        self.dim, self.bits, self.group = dim, bits, group
        self.qtype = {2: qint2, 4: qint4}[bits]
        self.optimizer = MaxOptimizer()

    def round_trip(self, states: Tensor) -> Tensor:
        """See `simulated.Codec`; each vector is `dim / group` groups, whatever is coded together."""
        from optimum.quanto import quantize_weight

        rows = states.reshape(-1, self.group).contiguous()
        scale, shift = self.optimizer(rows, self.qtype, 0, self.group)
        coded = quantize_weight(rows, self.qtype, 0, scale, shift, self.group)
        decoded: Tensor = coded.dequantize()
        return decoded.view_as(states)

    def bytes_per_vector(self) -> float:
        """Codes, and a scale and a shift of two bytes for each group."""
        return self.dim * self.bits / 8 + 4 * self.dim / self.group
