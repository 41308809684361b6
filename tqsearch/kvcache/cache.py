"""TurboQuantCache: a drop-in for the cache of transformers' generate that holds compressed keys and values."""

from __future__ import annotations

import copy
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer, LinearAttentionAndFullAttentionLayer

from tqsearch.codec import CODECS, Codec
from tqsearch.errors import InvalidInputError
from tqsearch.kernels import BACKENDS
from tqsearch.kvcache.attention import NAME as ATTENTION
from tqsearch.kvcache.hybrid import TurboQuantHybridLayer, recurrent_batch
from tqsearch.kvcache.layer import LayerSettings, TurboQuantLayer
from tqsearch.kvcache.persistence import load, save
from tqsearch.kvcache.policy import Policy, Uniform, Width, checked_bits
from tqsearch.kvcache.report import CacheReport, report


class TurboQuantCache(DynamicCache):
    """A cache of keys and values in a few bits each, for `model.generate(past_key_values=cache)`.

    Full-attention layers keep their first tokens (attention sinks) and their most recent ones in the model's dtype, and
    all between in blocks of TurboQuant codes: a random rotation, then optimal scalar levels (arXiv 2504.19874), with
    one scale a vector that makes inner products unbiased, and a constant a (layer, head, channel) taken off the keys,
    which changes no softmax. All other layers (sliding window, recurrent, shared) are the library's own, untouched.

    A first prompt attends to its exact keys and values; they are compressed after. Gradients flow through the states of
    the current call alone: what is kept is detached.

    Args:
        config: the model's configuration.
        bits: width a coordinate of keys and values: 1 to 8, a fraction as in the paper (2.5, 3.5), or a `BitPlan`.
        key_bits: of keys, if another.
        value_bits: of values, if another.
        residual_length: how many recent tokens stay uncompressed at least; up to a block more do.
        sink_length: how many first tokens stay uncompressed.
        protect_layers: how many of the first, and of the last, attention layers get 8 bits.
        codec: "scalar" levels, or levels along a "trellis" (`tqsearch.trellis`): a quarter to two fifths less squared
            error in the same bytes, for slower encoding, and attention reads decoded states. It has 1 to 4 bits; 8 bits
            are scalar with either.
        outlier_channels: how many channels of each key head, those of largest variance, get 8 bits; see `outliers`.
        block_length: tokens compressed at a time, a multiple of 8.
        seed: of the rotations.
        backend: see `tqsearch.kernels.select`.
        policy: widths layer by layer, instead of `bits` and `protect_layers`; see `policy`.
        offloading: whether layers not in use wait on the CPU, as in the library's `DynamicCache`.
        offload_only_non_sliding: whether layers with a window stay on the GPU all the same.

    Raises:
        InvalidInputError: an argument is out of range, or the model has no layer that can be compressed.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        bits: Width = 4,
        *,
        key_bits: Width = None,
        value_bits: Width = None,
        residual_length: int = 128,
        sink_length: int = 4,
        codec: Codec = "scalar",
        protect_layers: int = 0,
        outlier_channels: int = 0,
        block_length: int = 128,
        seed: int = 0,
        backend: str = "auto",
        policy: Policy | None = None,
        offloading: bool = False,
        offload_only_non_sliding: bool = False,
    ) -> None:
        if not isinstance(config, PretrainedConfig):
            raise InvalidInputError(
                f"config must be a transformers model's configuration, got {type(config).__name__}; pass model.config"
            )
        if policy is None:
            policy = Uniform(
                bits if key_bits is None else key_bits,
                bits if value_bits is None else value_bits,
                _count(protect_layers, "protect_layers"),
            )
        elif not callable(getattr(policy, "bits", None)):
            raise InvalidInputError(f"policy must have a method bits(layer, count), got {policy!r}")
        if _count(block_length, "block_length") % 8 or not block_length:
            raise InvalidInputError(f"block_length must be a positive multiple of 8, got {block_length}")
        if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
            raise InvalidInputError(f"seed must be an integer, got {seed!r}")
        if codec not in CODECS:
            raise InvalidInputError(f"codec must be one of {', '.join(map(repr, CODECS))}, got {codec!r}")
        if backend not in BACKENDS:
            raise InvalidInputError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
        super().__init__(config=config, offloading=offloading, offload_only_non_sliding=offload_only_non_sliding)
        common = (
            _count(residual_length, "residual_length"),
            _count(sink_length, "sink_length"),
            int(block_length),
            int(seed),
            backend,
            _count(outlier_channels, "outlier_channels"),
            codec,
            _latent(config),
            config.get_text_config(decoder=True)._attn_implementation == ATTENTION,
        )
        chosen = [index for index, layer in enumerate(self.layers) if type(layer) in _COMPRESSIBLE]
        for number, index in enumerate(chosen):
            widths = checked_bits(policy.bits(number, len(chosen)), codec)
            if widths != (None, None):
                self.layers[index] = _compressed(self.layers[index], LayerSettings(widths, *common))
        if not any(isinstance(layer, TurboQuantLayer) for layer in self.layers):
            kinds = sorted({type(layer).__name__ for layer in self.layers}) or ["none"]
            why = "the policy leaves every layer alone" if chosen else f"its layers are {', '.join(kinds)}"
            raise InvalidInputError(
                f"no layer of this {config.model_type!r} model can be compressed: {why}; full attention alone grows "
                "with the text. Use the library's DynamicCache"
            )

    def report(self) -> CacheReport:
        """What the cache holds: real bytes by part and layer, the ratio to dense, and why layers are left alone."""
        return report(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the cache to a file, whole or not at all; see `format` for what is in it.

        Raises:
            InvalidInputError: a layer of the library's holds something that files cannot.
            OSError: the file cannot be written; what was there is as it was.
        """
        save(self, path)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        config: PretrainedConfig,
        *,
        device: str | torch.device = "cpu",
        **options: Any,
    ) -> TurboQuantCache:
        """Reads a cache that `save` wrote, with the widths and lengths it had.

        Args:
            path: the file.
            config: the configuration of the model that filled it.
            device: where the tensors go; compressed layers follow their model's device anyway.
            **options: `backend` and `offloading`, as for the constructor.

        Raises:
            FormatError: not such a file, or a damaged one; the subclass says which.
            OSError: the file cannot be read.
            InvalidInputError: the configuration's layers are not those of the file, or the device is none of torch's.
            BackendError: a GPU that torch does not see here.
        """
        return load(cls, path, config, device, options)

    def fork(self) -> TurboQuantCache:
        """A second cache with the same past: each goes on from there alone.

        Compressed layers share their tensors, which are never changed in place; the library's other layers, which
        change theirs, are copied.
        """
        branch = copy.copy(self)
        branch.layers = [_forked(layer) for layer in self.layers]
        return branch

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each sequence of the batch in every layer, recurrent states too."""
        layer: Any
        for layer in self.layers:
            if hasattr(layer, "batch_repeat_interleave"):
                layer.batch_repeat_interleave(repeats)
            elif (batch := recurrent_batch(layer)) is not None:
                layer.reorder_cache(torch.arange(batch, device="cpu").repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the sequences of these indices, or those where a mask is True, in every layer, recurrent states too."""
        layer: Any
        for layer in self.layers:
            if hasattr(layer, "batch_select_indices"):
                layer.batch_select_indices(indices)
            elif (batch := recurrent_batch(layer)) is not None:
                layer.reorder_cache(torch.arange(batch, device="cpu")[torch.as_tensor(indices).cpu()])


_COMPRESSIBLE = (DynamicLayer, LinearAttentionAndFullAttentionLayer)


def _compressed(layer: Any, settings: LayerSettings) -> TurboQuantLayer:
    if isinstance(layer, LinearAttentionAndFullAttentionLayer):
        return TurboQuantHybridLayer(settings, layer.number_of_states)
    return TurboQuantLayer(settings)


def _forked(layer: Any) -> Any:
    branch = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, Tensor):
            vars(branch)[name] = value.clone()
        elif isinstance(value, dict):
            vars(branch)[name] = {
                key: part.clone() if isinstance(part, Tensor) else part for key, part in value.items()
            }
    return branch


def _latent(config: PretrainedConfig) -> tuple[int, int] | None:
    decoder = config.get_text_config(decoder=True)
    latent, rope = getattr(decoder, "kv_lora_rank", None), getattr(decoder, "qk_rope_head_dim", None)
    return None if latent is None or rope is None else (latent, rope)


def _count(number: int, name: str) -> int:
    if isinstance(number, bool) or not isinstance(number, int | np.integer) or number < 0:
        raise InvalidInputError(f"{name} must be an integer of at least 0, got {number!r}")
    return int(number)
