"""What is measured: every configuration of the cache, and its rivals, as data."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from benchmarks.kvcache.language_model import LARGE_KEY_BIAS, PLAIN

PARTS = ("quality", "needle", "greedy", "bytes", "speed")
DENSE, OURS, KEPT, PROD = "dense", "TurboQuant", "TurboQuant, offset kept", "TurboQuant, prod keys"
CALIBRATED = "TurboQuant, calibrated keys"
TRELLIS = {"codec": "trellis"}  # the option of `TurboQuantCache`
PQ, QUANTO, HQQ, QUANTO_WINDOW = "FAISS PQ", "quanto", "hqq", "quanto, our window"
NEEDS = {PQ: ("faiss",), QUANTO: ("optimum.quanto",), HQQ: ("hqq",), QUANTO_WINDOW: ("optimum.quanto",)}

# What a reader must know of each family but ours; "simulated" is defined in `simulated`.
NOTES = {
    KEPT: "the same codec with the keys' constant left in, simulated in float",
    PROD: "keys in the paper's inner-product form (one bit less for the levels, one for QJL), values in the mse form;"
    " simulated in float, offset removed",
    CALIBRATED: "keys in a basis fitted to the keys and queries of documents that are not measured, see `calibrated`;"
    " simulated in float, offset removed; the basis is not counted as bytes",
    PQ: "8-bit product quantization at the bytes of TurboQuant, trained for each layer and KV head on keys and values"
    " of documents that are not measured; simulated in float, offset removed; codebooks are not counted as bytes",
    QUANTO: "the library's QuantizedCache, its defaults: groups of 64 along a vector, residual_length 128, no sinks",
    HQQ: "the library's QuantizedCache with HQQ, groups of 64 along a vector, residual_length 128, no sinks",
    QUANTO_WINDOW: "quanto's groups of 64 behind the same sinks and recent window as TurboQuant; simulated in float,"
    " offset kept as quanto does",
}


@dataclass(frozen=True)
class Configuration:
    """One cache that is measured.

    Attributes:
        family: who made it; one of the constants above.
        key_bits: width of a key's coordinate; 16 for dense.
        value_bits: of a value's.
        residual: recent tokens kept dense.
        sinks: first tokens kept dense.
        block: tokens compressed at a time. With 16, everything older than `residual` is compressed but for at most 15
            tokens, which is harder than the default of 128.
        variant: of the model.
        parts: what is measured of it.
        options: further arguments of the cache, by name.
    """

    family: str
    key_bits: float
    value_bits: float
    residual: int = 128
    sinks: int = 4
    block: int = 16
    variant: str = PLAIN
    parts: tuple[str, ...] = ("quality", "bytes")
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def widths(self) -> str:
        """`K4V3` for 4-bit keys and 3-bit values."""
        return f"K{self.key_bits:g}V{self.value_bits:g}"

    @property
    def name(self) -> str:
        """What it is called in results; two configurations of one variant never share a name."""
        parts = [self.family if self.family == DENSE else f"{self.family} {self.widths}"]
        parts += [f"residual {self.residual}"] if self.residual != 128 else []
        parts += [f"sinks {self.sinks}"] if self.sinks != 4 else []
        parts += [f"block {self.block}"] if self.block != 16 else []
        parts += [f"{name} {value}" for name, value in self.options.items()]
        parts += [self.variant] if self.variant != PLAIN else []
        return ", ".join(parts)

    def record(self) -> dict[str, Any]:
        """As a result holds it."""
        return {
            "name": self.name,
            "family": self.family,
            "variant": self.variant,
            "key_bits": self.key_bits,
            "value_bits": self.value_bits,
            "residual": self.residual,
            "sinks": self.sinks,
            "block": self.block,
            "options": self.options,
        }


def catalogue() -> list[Configuration]:
    """Everything that a full run measures."""
    every = PARTS
    found = [Configuration(DENSE, 16, 16, parts=("needle", "bytes", "speed"))]
    found += [Configuration(OURS, bits, bits, parts=every) for bits in (8, 6, 4, 3.5, 3, 2.5, 2)]
    found += [Configuration(OURS, *pair, parts=every) for pair in ((4, 3), (4, 2), (3, 2))]
    measured = ("quality", "needle", "greedy", "bytes")
    widths = ((4, 4), (3.5, 3.5), (3, 3), (2.5, 2.5), (2, 2), (3, 2))
    found += [Configuration(OURS, keys, values, parts=measured, options=TRELLIS) for keys, values in widths]
    found += [Configuration(OURS, bits, bits, block=128, options=TRELLIS) for bits in (4, 3, 2)]
    found += [Configuration(OURS, bits, bits, residual=32, parts=("needle", "quality")) for bits in (4, 3.5, 3)]
    found += [Configuration(OURS, bits, bits, residual=0) for bits in (4, 3, 2)]
    found += [Configuration(OURS, bits, bits, options={"outlier_channels": 8}) for bits in (3, 2)]
    found += [Configuration(OURS, bits, bits, options={"protect_layers": 1}) for bits in (3, 2)]
    found += [Configuration(OURS, bits, bits, block=128, parts=("quality", "bytes", "speed")) for bits in (4, 3, 2)]
    mixed = ((4, 4), (3, 3), (2, 2), (4, 2))
    found += [Configuration(OURS, *pair, variant=LARGE_KEY_BIAS, parts=("quality", "needle")) for pair in mixed]
    found += [Configuration(KEPT, *pair, variant=variant) for variant in (PLAIN, LARGE_KEY_BIAS) for pair in mixed]
    found += [Configuration(family, bits, bits) for family in (PROD, CALIBRATED) for bits in (4, 3, 2)]
    found += [Configuration(PQ, bits, bits) for bits in (4, 3, 2)]
    found += [Configuration(family, bits, bits) for family in (QUANTO, HQQ, QUANTO_WINDOW) for bits in (4, 2)]
    return found


def quick(configurations: list[Configuration]) -> list[Configuration]:
    """The few of a quick run: 4 and 2 bits of every family on the plain model."""
    return [
        one
        for one in configurations
        if one.variant == PLAIN
        and one.residual == 128
        and one.block == 16
        and one.key_bits == one.value_bits
        and one.key_bits in (16, 4, 2)
    ]


def chosen(configurations: list[Configuration], pattern: str | None) -> list[Configuration]:
    """Those whose names a regular expression finds; all without one."""
    return [one for one in configurations if pattern is None or re.search(pattern, one.name)]
