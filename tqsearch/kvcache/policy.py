"""How many bits each attention layer gets: a policy is one small class with a method `bits`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from tqsearch import trellis
from tqsearch.codebook import MAX_BITS
from tqsearch.codec import Codec
from tqsearch.errors import InvalidInputError
from tqsearch.plan import NUMBER, BitPlan

# The width that protected layers get.
PROTECTED_BITS = 8

Width = float | BitPlan | None


class LayerBits(NamedTuple):
    """Widths of a layer's keys and values: 1 to 8, a fraction, a `BitPlan`, or None to leave them uncompressed."""

    keys: Width
    values: Width


class Policy(Protocol):
    """The widths of every layer."""

    def bits(self, layer: int, count: int) -> LayerBits:
        """The widths of attention layer number `layer` of `count`, counting only those that can be compressed."""


@dataclass(frozen=True)
class Uniform:
    """The same widths for all layers but the protected ones.

    Attributes:
        key_bits: of keys.
        value_bits: of values.
        protect_layers: how many of the first, and of the last, layers get `protected_bits` instead.
        protected_bits: width of the protected layers.
    """

    key_bits: Width
    value_bits: Width
    protect_layers: int = 0
    protected_bits: Width = PROTECTED_BITS

    def bits(self, layer: int, count: int) -> LayerBits:
        """See `Policy`."""
        if layer < self.protect_layers or layer >= count - self.protect_layers:
            return LayerBits(self.protected_bits, self.protected_bits)
        return LayerBits(self.key_bits, self.value_bits)


@dataclass(frozen=True)
class PerLayer:
    """Widths listed layer by layer.

    Attributes:
        layers: a pair (key bits, value bits) for each layer that can be compressed.
    """

    layers: tuple[LayerBits, ...]

    def bits(self, layer: int, count: int) -> LayerBits:
        """See `Policy`."""
        if len(self.layers) != count:
            raise InvalidInputError(
                f"the policy must name {count} layers that can be compressed, got {len(self.layers)}"
            )
        return self.layers[layer]


def checked_bits(bits: LayerBits, codec: Codec = "scalar") -> LayerBits:
    """The widths, once they are known to be ones that the codec has.

    Raises:
        InvalidInputError: a width is not None, a number from 1 to 8 (along a trellis from 1 to 4, or 8) or a `BitPlan`
            of such.
    """
    for name, width in zip(("key_bits", "value_bits"), bits, strict=True):
        if width is None:
            continue
        number = isinstance(width, NUMBER) and not isinstance(width, bool | np.bool_)
        if not isinstance(width, BitPlan) and not (number and 1 <= width <= MAX_BITS):
            raise InvalidInputError(f"{name} must be a number from 1 to {MAX_BITS}, a BitPlan or None, got {width!r}")
        widths = {band.width for band in width.bands} if isinstance(width, BitPlan) else {width}
        if codec == "trellis" and any(trellis.MAX_BITS < one < MAX_BITS for one in widths):
            raise InvalidInputError(
                f"{name} must be from 1 to {trellis.MAX_BITS}, or {MAX_BITS}, along a trellis, got {width}; use codec "
                "'scalar'"
            )
    return LayerBits(*bits)
