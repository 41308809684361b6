"""The model that is measured: loaded from a folder or the hub, with or without a large constant in its keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tqsearch.errors import InvalidInputError

# The constant of the first, the last and the other layers. Keys of norm 270 against values of norm 3: the situation of
# Qwen2.5, on a model small enough to measure.
BIAS_FIRST, BIAS_LAST, BIAS_OTHER = 150.0, 90.0, 12.0
PLAIN, LARGE_KEY_BIAS = "plain", "large key bias"
VARIANTS = (PLAIN, LARGE_KEY_BIAS)


def load(name: str, device: str, dtype: torch.dtype, variant: str = PLAIN) -> tuple[Any, Any]:
    """The model, ready to be measured, and its tokenizer.

    Args:
        name: a folder, or a model of the hub.
        variant: one of `VARIANTS`.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(name)
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    model = model.to(device).eval()
    if variant == LARGE_KEY_BIAS:
        add_large_key_bias(model)
    return model, tokenizer


def add_large_key_bias(model: Any) -> None:
    """Add a large constant to the keys, which changes nothing that the model computes.

    The two lowest frequencies of the rotary embedding hardly turn within a context, so the constant is nearly the same
    for every key, and softmax drops it. Elements D/2 - 2 and D - 1 of each KV head's bias get s, D - 2 gets -0.7 s and
    D/2 - 1 gets -0.8 s.

    Raises:
        InvalidInputError: the keys' projections have no bias.
    """
    layers = model.get_decoder().layers
    dim = model.config.head_dim
    for number, layer in enumerate(layers):
        bias = getattr(layer.self_attn.k_proj, "bias", None) if hasattr(layer.self_attn, "k_proj") else None
        if bias is None:
            raise InvalidInputError("the large key bias needs a model whose k_proj has a bias")
        size = BIAS_FIRST if number == 0 else BIAS_LAST if number == len(layers) - 1 else BIAS_OTHER
        heads = bias.data.view(-1, dim)
        for element, share in ((dim // 2 - 2, 1.0), (dim - 1, 1.0), (dim - 2, -0.7), (dim // 2 - 1, -0.8)):
            heads[:, element] += share * size


def described(name: str, model: Any) -> dict[str, Any]:
    """What a reader must know of the model, without paths."""
    config = model.config.get_text_config(decoder=True)
    return {
        "name": Path(name).name,
        "type": config.model_type,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "layers": config.num_hidden_layers,
        "kv_heads": getattr(config, "num_key_value_heads", config.num_attention_heads),
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
    }
