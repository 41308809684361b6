"""A tiny random model and tokens for it."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(4)
    settings = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 8192,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(3, 61, (rows, length), generator=torch.Generator().manual_seed(8))
