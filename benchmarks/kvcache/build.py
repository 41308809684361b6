"""From a configuration to a factory of empty caches."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.kvcache.calibrated import CalibratedCodec, head_transform
from benchmarks.kvcache.codecs import QuantoCodec, TurboCodec
from benchmarks.kvcache.configurations import (
    CALIBRATED,
    DENSE,
    HQQ,
    KEPT,
    NEEDS,
    OURS,
    PQ,
    PROD,
    QUANTO,
    QUANTO_WINDOW,
    Configuration,
)
from benchmarks.kvcache.moments import moments
from benchmarks.kvcache.product import PQCodec, trained
from benchmarks.kvcache.simulated import Codec, formula_bytes, simulated_cache
from benchmarks.kvcache.storage import states
from tqsearch.plan import BitPlan

Pairs = list[tuple[Codec, Codec]]


@dataclass(frozen=True)
class Subject:
    """The model that is measured and what its rivals may be trained on.

    Attributes:
        model: loaded.
        training: (documents, length) int64 that are not measured.
        seed: of rotations.
        codebooks: a folder where codebooks are kept between runs, so that they can be trained where FAISS is.
    """

    model: Any
    training: Tensor
    seed: int
    codebooks: Path | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Layers, KV heads and head dim."""
        config = self.model.config.get_text_config(decoder=True)
        heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return config.num_hidden_layers, heads, dim


@dataclass(frozen=True)
class Built:
    """A factory of empty caches, and the bytes by formula where the cache only simulates a codec."""

    make: Callable[[], Any]
    formula: Callable[[int], dict[str, Any]] | None = None


def missing(configuration: Configuration, codebooks: Path | None = None) -> str | None:
    """Why a configuration cannot be measured here, or None."""
    if configuration.family == PQ and codebooks is not None and (codebooks / f"pq-{configuration.widths}.pt").exists():
        return None
    for name in NEEDS.get(configuration.family, ()):
        if importlib.util.find_spec(name.partition(".")[0]) is None:
            return f"{name.partition('.')[0]} is not installed"
    return None


def build(wanted: Configuration, subject: Subject) -> Built:
    """What makes empty caches of a configuration; rivals that are trained are trained here, once."""
    config = subject.model.config
    if wanted.family == DENSE:
        from transformers import DynamicCache

        return Built(lambda: DynamicCache(config=config))
    if wanted.family == OURS:
        return Built(ours(wanted, subject))
    if wanted.family in (QUANTO, HQQ):
        from transformers import QuantizedCache

        bits = int(wanted.key_bits)
        axis = 0 if wanted.family == QUANTO else 1  # HQQ's own default: groups along the last dimension
        return Built(
            lambda: QuantizedCache(
                wanted.family, config, nbits=bits, axis_key=axis, axis_value=axis, residual_length=wanted.residual
            )
        )
    codecs = SIMULATED[wanted.family](wanted, subject)
    offset = wanted.family not in (KEPT, QUANTO_WINDOW)
    _, heads, dim = subject.shape
    return Built(
        lambda: simulated_cache(
            config,
            codecs,
            residual=wanted.residual,
            sinks=wanted.sinks,
            block=wanted.block,
            remove_offset=offset,
        ),
        lambda tokens: formula_bytes(codecs, heads, dim, tokens, wanted.residual + wanted.sinks),
    )


def ours(wanted: Configuration, subject: Subject) -> Callable[[], Any]:
    from tqsearch.kvcache import TurboQuantCache

    return lambda: TurboQuantCache(
        subject.model.config,
        key_bits=wanted.key_bits,
        value_bits=wanted.value_bits,
        residual_length=wanted.residual,
        sink_length=wanted.sinks,
        block_length=wanted.block,
        seed=subject.seed,
        **wanted.options,
    )


def kept(wanted: Configuration, subject: Subject) -> Pairs:
    layers, _, dim = subject.shape
    pair = (
        TurboCodec(dim, wanted.key_bits, seed=subject.seed),
        TurboCodec(dim, wanted.value_bits, seed=subject.seed + 1),
    )
    return [pair] * layers


def calibrated(wanted: Configuration, subject: Subject) -> Pairs:
    _, _, dim = subject.shape
    values = TurboCodec(dim, wanted.value_bits, seed=subject.seed + 1)
    found: Pairs = []
    for queries, keys in moments(subject.model, subject.training):
        heads = [head_transform(*pair, wanted.key_bits) for pair in zip(keys, queries, strict=True)]
        found.append((CalibratedCodec(heads), values))
    return found


def prod(wanted: Configuration, subject: Subject) -> Pairs:
    layers, _, dim = subject.shape
    keys = TurboCodec(dim, wanted.key_bits, "prod", seed=subject.seed)
    return [(keys, TurboCodec(dim, wanted.value_bits, seed=subject.seed + 1))] * layers


def quanto_window(wanted: Configuration, subject: Subject) -> Pairs:
    layers, _, dim = subject.shape
    return [(QuantoCodec(dim, int(wanted.key_bits)), QuantoCodec(dim, int(wanted.value_bits)))] * layers


def product_quantization(wanted: Configuration, subject: Subject) -> Pairs:
    """Codebooks from the folder, or trained and put there."""
    name = f"pq-{wanted.widths}.pt"
    path = None if subject.codebooks is None else subject.codebooks / name
    if path is not None and path.exists():
        books = torch.load(path, weights_only=True)
    else:
        books = trained_books(wanted, subject)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(books, path)
    return [(PQCodec(keys), PQCodec(values)) for keys, values in books]


def trained_books(wanted: Configuration, subject: Subject) -> list[list[list[dict[str, Tensor]]]]:
    """Codebooks by layer, keys and values, and head, of what the dense cache holds for the training documents.

    Keys are trained without their mean, as they are coded without it.
    """
    layers, heads, dim = subject.shape
    device = next(subject.model.parameters()).device
    recorded = [states(subject.model, document.to(device), torch.float32) for document in subject.training]
    books = []
    for layer in range(layers):
        pair = []
        for kind, bits in ((0, wanted.key_bits), (1, wanted.value_bits)):
            parts = [document[layer][kind] for document in recorded]
            if kind == 0:
                parts = [part - part.mean(dim=2, keepdim=True) for part in parts]
            rows = torch.cat(parts, dim=2)[0]
            size = BitPlan.of(dim, bits).bytes_per_vector + 2  # the scale's bytes too
            pair.append([trained(rows[head], size) for head in range(heads)])
        books.append(pair)
    return books


SIMULATED: dict[str, Callable[[Configuration, Subject], Pairs]] = {
    KEPT: kept,
    PROD: prod,
    CALIBRATED: calibrated,
    PQ: product_quantization,
    QUANTO_WINDOW: quanto_window,
}
