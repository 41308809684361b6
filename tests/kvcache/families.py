"""Tiny random models of many families, made from configurations."""

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

VOCABULARY = 61
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.3,  # the default would make attention all but uniform
}


def _config(name, **changes):
    return getattr(transformers, name)(**{**SMALL, **changes})


# Name: a function that makes the configuration. What each adds to the test is said beside it.
CONFIGS = {
    "llama": lambda: _config("LlamaConfig", head_dim=64),
    "llama-mqa": lambda: _config("LlamaConfig", num_key_value_heads=1, head_dim=80),
    "qwen2": lambda: _config("Qwen2Config", head_dim=64),  # biases of k_proj
    "qwen2-window": lambda: _config(  # the second layer has a window
        "Qwen2Config", head_dim=64, use_sliding_window=True, sliding_window=12, max_window_layers=1
    ),
    "qwen3": lambda: _config("Qwen3Config", head_dim=96),
    "mistral": lambda: _config("MistralConfig", head_dim=64, sliding_window=None),
    "gemma2": lambda: _config("Gemma2Config", head_dim=64, sliding_window=12, query_pre_attn_scalar=64),  # softcap
    "gemma3": lambda: _config(
        "Gemma3TextConfig", head_dim=256, sliding_window=12, layer_types=["sliding_attention", "full_attention"]
    ),
    "phi3": lambda: _config("Phi3Config", hidden_size=4 * 64, num_key_value_heads=4),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=128,
        n_layer=2,
        n_head=2,
        n_positions=512,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
        initializer_range=0.3,
    ),
    "gpt-neox": lambda: _config("GPTNeoXConfig", hidden_size=128, num_attention_heads=2),
    "gpt-oss": lambda: _config(  # learnt sink logits; every second layer has a window
        "GptOssConfig",
        head_dim=64,
        sliding_window=12,
        num_local_experts=2,
        num_experts_per_tok=1,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "qwen3-next": lambda: _config(  # linear attention, and one layer of full attention
        "Qwen3NextConfig",
        head_dim=64,
        layer_types=["linear_attention", "full_attention"],
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        linear_num_value_heads=2,
        linear_num_key_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
    ),
    "falcon-h1": lambda: _config(  # attention and a state in the same layer
        "FalconH1Config",
        head_dim=64,
        mamba_d_ssm=32,
        mamba_n_heads=2,
        mamba_d_head=16,
        mamba_d_state=8,
        mamba_n_groups=1,
    ),
    "deepseek-v3": lambda: _config(  # latent attention: "keys" are the latent, "values" the RoPE key
        "DeepseekV3Config",
        num_key_value_heads=4,
        kv_lora_rank=64,
        q_lora_rank=None,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
        first_k_dense_replace=2,
        n_routed_experts=2,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=1,
    ),
}
RECURRENT = {"qwen3-next", "falcon-h1"}
ENCODER_DECODERS = {
    "t5": lambda: transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=48,
        d_kv=64,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=None,
        initializer_factor=3.0,
    ),
    "bart": lambda: transformers.BartConfig(
        vocab_size=VOCABULARY,
        d_model=128,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        decoder_start_token_id=1,
        forced_eos_token_id=None,
        init_std=0.3,
    ),
}


def make(name, dtype=torch.float32):
    """The model of a name, the same at every call."""
    torch.manual_seed(7)
    if name in CONFIGS:
        model = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=dtype)
    else:
        model = AutoModelForSeq2SeqLM.from_config(ENCODER_DECODERS[name](), dtype=dtype)
    return model.eval()


def attention_of(model):
    """The library's attention that computes all of the model: before 5.18 its "sdpa" left out Gemma's cap of logits."""
    capped = getattr(model.config, "attn_logit_softcapping", None) is not None
    return "eager" if capped else model.config._attn_implementation


def tokens(batch, length, seed=0):
    """Random token ids (batch, length), none of them padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (batch, length), generator=generator)
