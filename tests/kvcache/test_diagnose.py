import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from tqsearch.errors import InvalidInputError
from tqsearch.kvcache import LayerBits, TurboQuantCache
from tqsearch.kvcache.diagnose import RECORDER, Diagnosis, LayerDiagnosis, diagnose, measured
from tqsearch.kvcache.recommend import KEY_WIDTHS, recommend
from tqsearch.quantizer import TurboQuantizer

SMALL = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama(**changes: object) -> LlamaForCausalLM:
    torch.manual_seed(3)
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, **changes})).eval()


def tokens(count: int) -> torch.Tensor:
    return torch.randint(3, 97, (1, count), generator=torch.Generator().manual_seed(5))


def layer(**changes: float | None) -> LayerDiagnosis:
    values: dict[str, float | None] = {
        "layer": 0,
        "heads": 2,
        "key_dim": 128,
        "value_dim": 128,
        "key_norm": 10.0,
        "value_norm": 5.0,
        "centred_key_norm": 10.0,
        "offset_share": 0.0,
        "outlier_ratio": 1.5,
        "query_norm": 1.0,
    }
    return LayerDiagnosis(**{**values, **changes})  # type: ignore[arg-type]


def test_statistics_of_known_keys_and_values() -> None:
    # Two heads, three tokens, four channels; worked out by hand in plain loops.
    generator = np.random.default_rng(2)
    keys = generator.normal(size=(1, 2, 300, 4))
    keys[:, 1] += np.array([30.0, 0.0, 0.0, 0.0])
    keys[:, 0, :, 2] *= 12.0
    values = generator.normal(size=(1, 2, 300, 6)) * 0.5
    found = measured(7, torch.from_numpy(keys), torch.from_numpy(values))

    def mean_square_norm(states: np.ndarray) -> float:
        return float(np.mean([np.dot(row, row) for head in states[0] for row in head]))

    centred = keys - keys.mean(axis=2, keepdims=True)
    shares = [np.dot(keys[0, h].mean(0), keys[0, h].mean(0)) / mean_square_norm(keys[:, h : h + 1]) for h in (0, 1)]
    outliers = []
    for head in centred[0]:
        root = sorted(math.sqrt(np.mean(head[:, channel] ** 2)) for channel in range(4))
        outliers.append(root[-1] / root[1])  # torch takes the lower of two medians
    assert (found.layer, found.heads, found.key_dim, found.value_dim) == (7, 2, 4, 6)
    assert found.key_norm == pytest.approx(math.sqrt(mean_square_norm(keys)), rel=1e-9)
    assert found.value_norm == pytest.approx(math.sqrt(mean_square_norm(values)), rel=1e-9)
    assert found.centred_key_norm == pytest.approx(math.sqrt(mean_square_norm(centred)), rel=1e-9)
    assert found.offset_share == pytest.approx(max(shares), rel=1e-9)
    assert found.offset_share > 0.9
    assert found.outlier_ratio == pytest.approx(max(outliers), rel=1e-9)
    assert found.norm_ratio == pytest.approx(found.key_norm / found.value_norm)


def test_keys_of_zeros_have_no_offset_and_no_outlier() -> None:
    found = measured(0, torch.zeros(1, 2, 20, 8), torch.zeros(1, 2, 20, 8))
    assert (found.key_norm, found.offset_share, found.outlier_ratio) == (0.0, 0.0, 1.0)
    assert found.norm_ratio == math.inf


@pytest.mark.parametrize(
    ("bits", "codec", "dim"),
    [(2, "scalar", 64), (3, "scalar", 64), (4, "scalar", 64), (2, "trellis", 512), (3, "trellis", 512)],
)
def test_the_predicted_noise_is_that_of_the_quantizer(bits: int, codec: Any, dim: int) -> None:
    """A trellis's distortion is that of long rows."""
    generator = torch.Generator().manual_seed(bits)
    keys = 3.0 * torch.randn(1, 1, 4000 * 64 // dim, dim, generator=generator) + 5.0
    queries = torch.randn(400, dim, generator=generator)
    centred = (keys - keys.mean(dim=2, keepdim=True))[0, 0]
    quantizer = TurboQuantizer(dim, bits, seed=11, codec=codec)
    decoded = quantizer.decode(quantizer.encode(centred), unbiased=True)
    errors = 0.125 * queries @ (decoded - centred).T
    query_norm = 0.125 * float(queries.square().sum(dim=1).mean().sqrt())
    predicted = measured(0, keys, keys, query_norm).logit_noise(bits, codec=codec)
    assert predicted is not None
    # 400 x 64 numbers of queries and 4000 x 64 of keys: the ratio of two spreads is within 5 standard errors of 1.
    assert float(errors.std()) == pytest.approx(predicted, rel=5 / math.sqrt(2 * 400 * 64))


def test_queries_are_those_of_the_projection() -> None:
    model = llama()
    read = tokens(40)
    before = model(read).logits
    found = diagnose(model, read)
    block = model.model.layers[0]
    with torch.no_grad():
        projected = block.self_attn.q_proj(block.input_layernorm(model.model.embed_tokens(read)))
    # The rotary embedding turns queries and keeps their norms.
    heads = projected.view(40, 4, 32).double().norm(dim=2)
    expected = math.sqrt(float((heads**2).mean())) / math.sqrt(32)
    assert found.layers[0].query_norm == pytest.approx(expected, rel=1e-5)
    assert [one.layer for one in found.layers] == [0, 1, 2]
    assert (found.tokens, found.dense_itemsize) == (40, 4)
    assert model.config._attn_implementation != RECORDER
    assert torch.equal(model(read).logits, before)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_queries_are_seen_whatever_the_attention(implementation: str) -> None:
    model = llama()
    model.set_attn_implementation(implementation)
    found = diagnose(model, tokens(40))
    assert model.config._attn_implementation == implementation
    expected = diagnose(llama(), tokens(40))
    for one, other in zip(found.layers, expected.layers, strict=True):
        assert one.query_norm == pytest.approx(other.query_norm, rel=1e-5)


def test_a_large_key_bias_is_an_offset_and_no_noise() -> None:
    model = llama(attention_bias=True)
    plain = diagnose(model, tokens(200)).layers[1]
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.bias.view(2, 32)[:, 15] += 50.0  # the lowest frequency
    found = diagnose(model, tokens(200)).layers[1]
    assert found.offset_share > 0.9 > plain.offset_share
    assert found.logit_noise(3) < 2 * plain.logit_noise(3)
    assert found.logit_noise(3, offset_removed=False) > 5 * plain.logit_noise(3)


def test_sliding_layers_are_left_alone() -> None:
    torch.manual_seed(0)
    config = MistralConfig(**{**SMALL, "sliding_window": 16})
    with pytest.raises(InvalidInputError, match="no layer of this 'mistral' model"):
        diagnose(AutoModelForCausalLM.from_config(config).eval(), tokens(40))


def test_arguments_are_checked() -> None:
    with pytest.raises(InvalidInputError, match="n >= 16"):
        diagnose(llama(), tokens(15))
    with pytest.raises(InvalidInputError, match="has an encoder"):
        diagnose(
            T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)),
            tokens(40),
        )
    latent = DeepseekV3Config(vocab_size=97, hidden_size=32, num_hidden_layers=0, n_routed_experts=8)
    with pytest.raises(InvalidInputError, match="latent attention"):
        diagnose(AutoModelForCausalLM.from_config(latent), tokens(40))
    with pytest.raises(InvalidInputError, match="noise must be"):
        recommend(Diagnosis((layer(),), {}, 100, 2), 0.0)
    with pytest.raises(InvalidInputError, match="codec must be one of"):
        recommend(Diagnosis((layer(),), {}, 100, 2), 0.2, "lattice")  # type: ignore[arg-type]


def test_the_rule() -> None:
    # Distortions of 2, 3, 4 bits in 128 dimensions are near 0.116, 0.034, 0.0093: noise 10 sqrt(D / (1 - D) / 128).
    loud, quiet, blind = layer(query_norm=100.0), layer(query_norm=0.1), layer(query_norm=None)
    middle = layer(layer=1, offset_share=0.99, outlier_ratio=20.0)
    advice = recommend(Diagnosis((loud, middle, quiet, blind), {4: "its cache is small"}, 100, 2), 0.2)
    assert advice.layers == (LayerBits(None, 3), LayerBits(3, 3), LayerBits(2, 2), LayerBits(4, 3))
    # A layer's dense bytes: 2 heads x (128 + 128) x 2; codes: bits x 128 / 8 and two bytes of scale a vector.
    assert advice.dense_bytes_per_token == 4 * 1024
    assert advice.bytes_per_token == 2 * ((256 + 50) + (50 + 50) + (34 + 34) + (66 + 50))
    said = "\n".join(advice.remarks)
    for part in (
        "layers 1: most of a key is a constant",
        "layers 1: a few channels",
        "layers 0: even 8",
        "cannot be seen",
    ):
        assert part in said
    assert "layer 4 stays as it is: its cache is small" in said


def test_the_rule_for_a_trellis() -> None:
    # Distortions of 1 to 4 bits: 0.274, 0.0732, 0.0217, 0.00587; logits have noise 10 q sqrt(D / (1 - D) / 128).
    queries = (0.5, 1.0, 2.2, 20.0)  # noise at 2, 3, 4 bits per 1.0: 0.248, 0.132, 0.068
    advice = recommend(Diagnosis(tuple(layer(query_norm=q) for q in queries), {}, 100, 2), 0.16, "trellis")
    assert advice.layers == (LayerBits(2, 2), LayerBits(3, 3), LayerBits(4, 3), LayerBits(8, 3))
    assert advice.call.endswith('LayerBits(8, 3))), codec="trellis")')
    alike = recommend(Diagnosis((layer(),), {}, 100, 2), 0.16, "trellis")
    assert alike.call == 'TurboQuantCache(model.config, key_bits=3, value_bits=3, codec="trellis")'
    assert recommend(Diagnosis((layer(),), {}, 100, 2), 0.16).layers == (LayerBits(4, 4),)  # of scalar levels


def test_six_bits_are_for_scalar_levels_alone() -> None:
    # Distortions of 4 and 6 bits: 0.0095, 0.00069: noise per 1.0 of queries 0.0866, 0.0233 (a trellis has 0.068 at 4).
    diagnosis = Diagnosis((layer(query_norm=5.0),), {}, 100, 2)
    assert recommend(diagnosis, 0.16).layers[0].keys == 6
    assert recommend(diagnosis, 0.16, "trellis").layers[0].keys == 8


def test_less_noise_takes_no_fewer_bits() -> None:
    widths = [
        recommend(Diagnosis((layer(),), {}, 100, 2), noise).layers[0] for noise in (2.0, 0.6, 0.35, 0.2, 0.1, 0.03)
    ]
    keys, values = zip(*widths, strict=True)
    assert sorted(keys) == list(keys)
    assert sorted(values) == list(values)
    assert len(set(keys)) > 3
    assert set(keys) <= set(KEY_WIDTHS)
    assert all(value <= key for key, value in widths)


def test_the_recommended_bytes_are_those_of_a_cache() -> None:
    model = llama()
    advice = recommend(diagnose(model, tokens(64)), 0.05)
    cache = TurboQuantCache(model.config, policy=advice.policy, residual_length=0, sink_length=0)
    states = torch.randn(1, 2, 512, 32, generator=torch.Generator().manual_seed(1))
    sizes = []
    for start in (0, 256):
        for number in range(3):
            cache.update(states[:, :, start : start + 256], states[:, :, start : start + 256], number)
        sizes.append(sum(entry.nbytes for entry in cache.report().layers))
    assert (sizes[1] - sizes[0]) / 256 == advice.bytes_per_token
    assert advice.dense_bytes_per_token == 3 * 2 * 2 * 32 * 4


def test_command(tmp_path: Path) -> None:
    typer_testing = pytest.importorskip("typer.testing")
    pytest.importorskip("matplotlib")
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    from tqsearch import cli

    raw = Tokenizer(WordLevel({"[UNK]": 3, "the": 4, "and": 5, "she": 6, "of": 7}, unk_token="[UNK]"))
    raw.pre_tokenizer = Whitespace()
    folder = tmp_path / "tiny-llama"
    PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]").save_pretrained(folder)
    llama().save_pretrained(folder)
    result = typer_testing.CliRunner().invoke(
        cli.app, ["kv-diagnose", str(folder), "--tokens", "100", "--noise", "0.5", "--out", str(tmp_path)]
    )
    assert result.exit_code == 0, result.output
    assert "tiny-llama, 100 tokens read: recommended" in result.output
    assert "TurboQuantCache(model.config, key_bits=2, value_bits=2)" in result.output
    # 3 layers, 2 heads, keys and values of 32 dimensions: 2 bits and a float16 scale, of float32.
    assert "takes 120 bytes of 1,536: 0.078" in result.output
    assert (tmp_path / "tiny-llama-kv.png").read_bytes().startswith(b"\x89PNG")

    short = tmp_path / "short.txt"
    short.write_text("the and of " * 5)
    result = typer_testing.CliRunner().invoke(cli.app, ["kv-diagnose", str(folder), "--text", str(short)])
    assert result.exit_code == 1
    assert "tqsearch: the text must have at least 16 tokens, got 15" in result.output
