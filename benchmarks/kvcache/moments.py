"""Second moments of a model's queries and keys, by layer and KV head: what a calibrated codec is fitted to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

RECORDER = "tqsearch_moments"


@torch.inference_mode()
def moments(model: Any, documents: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Second moments of every layer's queries, and covariances of its keys.

    Args:
        model: whose attention goes through the library's interface.
        documents: (documents, length) int64.

    Returns:
        For each layer (H, D, D) float64 of queries, all heads of a KV head together, and (H, D, D) float64 of keys,
        each document's mean taken off; both after the rotary embedding.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = model.config._attn_implementation
    function = ALL_ATTENTION_FUNCTIONS[before]
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def record(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *rest: Any, **options: Any) -> Any:
        heads, dim = key.shape[1], key.shape[3]
        asked = query[0].double().reshape(heads, -1, dim)
        kept = key[0].double() - key[0].double().mean(dim=1, keepdim=True)
        pair = tuple(rows.transpose(1, 2) @ rows / rows.shape[1] / len(documents) for rows in (asked, kept))
        sums = found.get(module.layer_idx)
        found[module.layer_idx] = (pair[0], pair[1]) if sums is None else (sums[0] + pair[0], sums[1] + pair[1])
        return function(module, query, key, value, mask, *rest, **options)

    AttentionInterface.register(RECORDER, record)
    AttentionMaskInterface.register(RECORDER, ALL_MASK_ATTENTION_FUNCTIONS[before])
    model.set_attn_implementation(RECORDER)
    try:
        for document in documents:
            model(document[None].to(model.device), use_cache=False, logits_to_keep=1)
    finally:
        model.set_attn_implementation(before)
    return [found[layer] for layer in sorted(found)]
