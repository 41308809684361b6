"""What makes the keys and values of a model hard to compress: their norms, constants and outlier channels.

One forward pass over a text, then statistics of what the model's own cache holds. For a layer with keys k of KV head h,
mu_h their mean, and queries q:

* offset share: |mu_h|^2 / E |k|^2, of the head where it is largest. A constant in all keys changes no softmax, yet it
  takes the scale of a plain quantizer for itself; `TurboQuantCache` takes it off.
* outlier ratio: the largest root mean square of a channel of k - mu_h over the median of the channels, of the worst
  head. A rotation spreads such a channel over all coordinates.
* logit noise at b bits: the standard deviation of the error of scaling <q, k>, by the law of TurboQuant's unbiased
  estimate, scaling |q| |k - mu| sqrt(D / (1 - D) / d), D the distortion of b bits in dimension d. Softmax turns a small
  noise e of logits into a relative error e of its weights.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, LinearAttentionAndFullAttentionLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tqsearch import codec as codecs
from tqsearch.codec import Codec
from tqsearch.errors import InvalidInputError
from tqsearch.kvcache.store import codec_of
from tqsearch.plan import BitPlan

RECORDER = "tqsearch_diagnose"
EAGER = "eager"
COMPRESSIBLE = (DynamicLayer, LinearAttentionAndFullAttentionLayer)  # by `TurboQuantCache`


@dataclass(frozen=True)
class LayerDiagnosis:
    """The statistics of one layer; see the module's docstring.

    Attributes:
        layer: its number in the model.
        heads: KV heads.
        key_dim: of a head.
        value_dim: of a head.
        key_norm: root mean square of |k|, over heads and tokens.
        value_norm: the same of values.
        centred_key_norm: the same of k - mu.
        offset_share: 0 to 1, of the worst head.
        outlier_ratio: 1 or more, of the worst head; infinite where most channels are zero.
        query_norm: root mean square of scaling |q|; None where the model's queries cannot be seen.
    """

    layer: int
    heads: int
    key_dim: int
    value_dim: int
    key_norm: float
    value_norm: float
    centred_key_norm: float
    offset_share: float
    outlier_ratio: float
    query_norm: float | None

    @property
    def norm_ratio(self) -> float:
        """Norm of keys over norm of values."""
        return self.key_norm / self.value_norm if self.value_norm else math.inf

    def logit_noise(self, bits: float, *, offset_removed: bool = True, codec: Codec = "scalar") -> float | None:
        """Standard deviation of a logit's error at `bits` a coordinate; None without queries."""
        if self.query_norm is None:
            return None
        norm = self.centred_key_norm if offset_removed else self.key_norm
        return self.query_norm * norm * relative_error(self.key_dim, bits, codec) / math.sqrt(self.key_dim)


@dataclass(frozen=True)
class Diagnosis:
    """The statistics of a model.

    Attributes:
        layers: those that can be compressed, in order.
        left_alone: why each other layer is not, by its number.
        tokens: how many were read.
        dense_itemsize: bytes of a number in the model's dtype.
    """

    layers: tuple[LayerDiagnosis, ...]
    left_alone: dict[int, str]
    tokens: int
    dense_itemsize: int


def relative_error(dim: int, bits: float, codec: Codec = "scalar") -> float:
    """sqrt(E |x_hat - x|^2) / |x| of the unbiased estimate: sqrt(D / (1 - D)), D the codec's distortion."""
    plan = BitPlan.of(dim, bits)
    distortion = codecs.plan_distortion(codec_of(codec, plan), plan, dim)
    return math.sqrt(distortion / (1.0 - distortion))


@torch.inference_mode()
def diagnose(model: PreTrainedModel, tokens: Tensor) -> Diagnosis:
    """Reads a text and measures what the model's cache holds of it.

    Args:
        model: a decoder, in evaluation mode.
        tokens: (1, n) int64 on the model's device, n at least 16.

    Raises:
        InvalidInputError: too few tokens, or no layer of the model can be compressed.
    """
    if tokens.ndim != 2 or tokens.shape[0] != 1 or tokens.shape[1] < 16:
        raise InvalidInputError(f"tokens must have shape (1, n) with n >= 16, got {tuple(tokens.shape)}")
    if model.config.is_encoder_decoder:
        raise InvalidInputError("kv-diagnose reads decoders; this model has an encoder")
    if getattr(model.config.get_text_config(decoder=True), "kv_lora_rank", None) is not None:
        raise InvalidInputError("kv-diagnose does not know multi-head latent attention, whose cache holds no keys")
    cache = DynamicCache(config=model.config)
    queries: dict[int, float] = {}
    with recorded_queries(model, queries):
        model(tokens, past_key_values=cache, use_cache=True)
    found, left_alone = [], {}
    layer: Any
    for number, layer in enumerate(cache.layers):
        kind = type(layer)
        if kind not in COMPRESSIBLE:
            left_alone[number] = f"its cache, {kind.__name__}, is not that of full attention"
        elif not layer.is_initialized:
            left_alone[number] = "the model puts nothing into its cache"
        else:
            found.append(measured(number, layer.keys, layer.values, queries.get(number)))
    if not found:
        raise InvalidInputError(f"no layer of this {model.config.model_type!r} model can be compressed")
    itemsize = next(model.parameters()).element_size()
    return Diagnosis(tuple(found), left_alone, tokens.shape[1], itemsize)


def measured(number: int, keys: Tensor, values: Tensor, query_norm: float | None = None) -> LayerDiagnosis:
    """The statistics of a layer.

    Args:
        number: of the layer.
        keys: (B, H, T, D).
        values: (B, H, T, D').
        query_norm: see `LayerDiagnosis`.
    """
    by_head = keys.double().transpose(0, 1).flatten(1, 2)  # (H, B T, D)
    mean = by_head.mean(dim=1, keepdim=True)
    power = by_head.square().sum(dim=2).mean(dim=1)
    centred = by_head - mean
    share = mean.square().sum(dim=(1, 2)) / power.clamp(min=torch.finfo(torch.float64).tiny)
    channels = centred.square().mean(dim=1).sqrt()
    ratios = channels.amax(dim=1) / channels.median(dim=1).values
    return LayerDiagnosis(
        layer=number,
        heads=keys.shape[1],
        key_dim=keys.shape[3],
        value_dim=values.shape[3],
        key_norm=float(power.mean().sqrt()),
        value_norm=float(values.double().square().sum(dim=3).mean().sqrt()),
        centred_key_norm=float(centred.square().sum(dim=2).mean().sqrt()),
        offset_share=float(share.amax()),
        outlier_ratio=float(torch.nan_to_num(ratios, nan=1.0).amax()),
        query_norm=query_norm,
    )


@contextmanager
def recorded_queries(model: PreTrainedModel, norms: dict[int, float]) -> Iterator[None]:
    """While it lasts, attention puts the root mean square of scaling |q| into `norms`, by layer.

    Nothing is recorded of a model whose attention does not go through the library's interface.
    """
    before = model.config._attn_implementation
    if not type(model)._supports_attention_backend or before not in (EAGER, *ALL_ATTENTION_FUNCTIONS.valid_keys()):
        yield
        return

    def record(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *rest: Any, **options: Any) -> Any:
        scaling = options.get("scaling") or query.shape[-1] ** -0.5
        norm = query.double().square().sum(dim=-1).mean().sqrt()
        norms[int(module.layer_idx)] = float(scaling) * float(norm)
        # The eager function is no entry of the interface: each model's own file defines it under this name.
        own = sys.modules[type(module).__module__]
        function: Any = own.eager_attention_forward if before == EAGER else ALL_ATTENTION_FUNCTIONS[before]
        return function(module, query, key, value, mask, *rest, **options)

    AttentionInterface.register(RECORDER, record)
    AttentionMaskInterface.register(RECORDER, ALL_MASK_ATTENTION_FUNCTIONS[before])
    model.set_attn_implementation(RECORDER)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
