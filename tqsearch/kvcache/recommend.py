"""A policy of bits by rule, from a model's diagnosis, with the bytes it will take.

The rule has one number, `noise`, for keys and values alike:

* keys get the fewest bits of 2, 3, 4, 6, 8 (along a trellis not 6) whose logit noise is at most `noise`, the offset
  taken off; a layer where 8 bits are not enough keeps its keys uncompressed. Where the queries cannot be seen, keys get
  4 bits.
* values get the fewest of 2, 3, 4 whose relative error sqrt(D / (1 - D)) is at most `noise`, and never more than keys,
  as errors of values average over the tokens attended to and errors of keys do not.

0.1 is next to lossless, 0.2 the default, 0.35 small.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tqsearch.codec import CODECS, Codec
from tqsearch.errors import InvalidInputError
from tqsearch.kvcache.diagnose import Diagnosis, LayerDiagnosis, relative_error
from tqsearch.kvcache.policy import LayerBits, PerLayer
from tqsearch.plan import BitPlan

KEY_WIDTHS = (2, 3, 4, 6, 8)
VALUE_WIDTHS = (2, 3, 4)
WITHOUT_QUERIES = 4
SCALE_BYTES = 2

# Where a constant is this much of the keys' power, a quantizer that leaves it in loses a bit or more.
LARGE_OFFSET = 0.75
LARGE_OUTLIER = 8.0


@dataclass(frozen=True)
class Recommendation:
    """What to compress a model's cache to.

    Attributes:
        layers: widths of every layer that can be compressed, in order.
        bytes_per_token: of compressed tokens, in those layers.
        dense_bytes_per_token: of the same in the model's dtype.
        remarks: what is unusual about the model, in words.
        codec: for which the widths are meant.
    """

    layers: tuple[LayerBits, ...]
    bytes_per_token: float
    dense_bytes_per_token: float
    remarks: tuple[str, ...]
    codec: Codec = "scalar"

    @property
    def policy(self) -> PerLayer:
        """For `TurboQuantCache(config, policy=..., codec=...)`."""
        return PerLayer(self.layers)

    @property
    def call(self) -> str:
        """The call that makes such a cache."""
        keys, values = self.layers[0]
        codec = "" if self.codec == "scalar" else f', codec="{self.codec}"'
        if all(bits == self.layers[0] for bits in self.layers):
            return f"TurboQuantCache(model.config, key_bits={keys}, value_bits={values}{codec})"
        pairs = ", ".join(f"LayerBits({bits.keys}, {bits.values})" for bits in self.layers)
        return f"TurboQuantCache(model.config, policy=PerLayer(({pairs})){codec})"


def recommend(diagnosis: Diagnosis, noise: float = 0.2, codec: Codec = "scalar") -> Recommendation:
    """The widths of every layer by the rule of this module.

    Raises:
        InvalidInputError: `noise` is not above 0, or `codec` is unknown.
    """
    if codec not in CODECS:
        raise InvalidInputError(f"codec must be one of {', '.join(map(repr, CODECS))}, got {codec!r}")
    if not 0.0 < noise < math.inf:
        raise InvalidInputError(f"noise must be a number above 0, got {noise!r}")
    layers = tuple(widths(layer, noise, codec) for layer in diagnosis.layers)
    coded, dense = 0.0, 0
    for layer, bits in zip(diagnosis.layers, layers, strict=True):
        for dim, width in ((layer.key_dim, bits.keys), (layer.value_dim, bits.values)):
            whole = dim * diagnosis.dense_itemsize
            coded += layer.heads * (whole if width is None else BitPlan.of(dim, width).bytes_per_vector + SCALE_BYTES)
            dense += layer.heads * whole
    return Recommendation(layers, coded, dense, tuple(remarks(diagnosis, layers)), codec)


def widths(layer: LayerDiagnosis, noise: float, codec: Codec) -> LayerBits:
    """Of one layer."""
    keys: int | None = WITHOUT_QUERIES
    if layer.query_norm is not None:
        known = [width for width in KEY_WIDTHS if codec == "scalar" or width != 6]
        enough = [width for width in known if (layer.logit_noise(width, codec=codec) or 0.0) <= noise]
        keys = enough[0] if enough else None
    fine = (width for width in VALUE_WIDTHS if relative_error(layer.value_dim, width, codec) <= noise)
    values = next(fine, VALUE_WIDTHS[-1])
    return LayerBits(keys, values if keys is None else min(values, keys))


def remarks(diagnosis: Diagnosis, layers: tuple[LayerBits, ...]) -> list[str]:
    """What a reader should know before choosing otherwise."""
    found = []
    offset = [layer.layer for layer in diagnosis.layers if layer.offset_share > LARGE_OFFSET]
    if offset:
        found.append(
            f"layers {listed(offset)}: most of a key is a constant; TurboQuantCache takes it off, a quantizer that"
            " leaves it in would fail here"
        )
    outliers = [layer.layer for layer in diagnosis.layers if layer.outlier_ratio > LARGE_OUTLIER]
    if outliers:
        found.append(
            f"layers {listed(outliers)}: a few channels are much larger than the rest; the rotation spreads them, and"
            " outlier channels at 8 bits may help below 4 bits"
        )
    hard = [layer.layer for layer, bits in zip(diagnosis.layers, layers, strict=True) if bits.keys is None]
    if hard:
        found.append(f"layers {listed(hard)}: even 8 bits leave more noise in the logits; keys stay uncompressed")
    if any(layer.query_norm is None for layer in diagnosis.layers):
        found.append("the model's queries cannot be seen, so keys get 4 bits without a prediction")
    found += [f"layer {number} stays as it is: {why}" for number, why in diagnosis.left_alone.items()]
    return found


def listed(numbers: list[int]) -> str:
    """Numbers with commas between."""
    return ", ".join(map(str, numbers))
