"""Every way to generate, with a compressed cache and with the oracle's dense cache of dequantized states: the same
tokens and the same scores."""

import copy
import inspect
import pickle

import families
import pytest
import torch
from kv_oracle import Shape, fake_cache
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from tqsearch.errors import InvalidInputError
from tqsearch.kvcache import TurboQuantCache, compress
from tqsearch.kvcache.layer import TurboQuantLayer

MODELS = ("llama", "gemma2", "falcon-h1", "deepseek-v3")


def both(oracle, model, bits=1, residual=8, sinks=4, codec="scalar"):
    # One bit: what is wrong shows most, and with one boundary a coordinate few lie within rounding of one, where the
    # oracle may choose another code: random models make much of that.
    latent = getattr(model.config, "kv_lora_rank", None)
    shape = Shape(bits, None if latent else bits, residual, sinks, 8, codec=codec)
    ours = TurboQuantCache(model.config, bits, residual_length=residual, sink_length=sinks, block_length=8, codec=codec)
    return ours, fake_cache(oracle, model.config, shape)


def generate(model, cache, ids, **options):
    torch.manual_seed(3)
    return model.generate(
        ids, past_key_values=cache, max_new_tokens=24, output_scores=True, return_dict_in_generate=True, **options
    )


def check_same(model, caches, ids, **options):
    ours, dense = (generate(model, cache, ids, **options) for cache in caches)
    assert torch.equal(ours.sequences, dense.sequences)
    for score, expected in zip(ours.scores, dense.scores, strict=True):
        known = expected.isfinite()
        assert torch.equal(known, score.isfinite())
        difference = (score[known] - expected[known]).abs() / expected[known].abs().max()
        assert difference.max() <= 1e-3
    compressed = [layer for layer in caches[0].layers if isinstance(layer, TurboQuantLayer)]
    assert all(layer.past[0].compressed_length >= 24 for layer in compressed)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True, "num_return_sequences": 3, "temperature": 0.7},
        {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_beams": 2},
    ],
    ids=["greedy", "samples", "beams", "sampled-beams"],
)
def test_modes(oracle, name, options):
    model, ids = families.make(name), families.tokens(2, 19)
    ids[0, :5] = 0
    mask = (ids != 0).long()
    check_same(model, both(oracle, model), ids, attention_mask=mask, **options)


@pytest.mark.parametrize("name", ["llama", "gemma2", "deepseek-v3"])
@pytest.mark.parametrize("residual", [0, 8])
def test_prompt_lookup_equals_greedy(oracle, name, residual):
    """It proposes tokens from the prompt and crops what the model refuses, also back into compressed tokens."""
    model = families.make(name)
    ids = families.tokens(1, 12).repeat(1, 3)
    check_same(model, both(oracle, model, residual=residual), ids, do_sample=False, prompt_lookup_num_tokens=6)


@pytest.mark.parametrize(
    "options",
    [{"do_sample": False}, {"num_beams": 3, "num_return_sequences": 2}, {"prompt_lookup_num_tokens": 6}],
    ids=["greedy", "beams", "prompt-lookup"],
)
def test_modes_with_trellis_codes(oracle, options):
    model = families.make("llama")
    ids = families.tokens(1, 12).repeat(1, 3)
    check_same(model, both(oracle, model, residual=0, codec="trellis"), ids, **options)


def test_assisted_generation(oracle):
    model, assistant = families.make("llama"), families.make("mistral")
    ids = families.tokens(1, 33)
    check_same(model, both(oracle, model), ids, do_sample=False, assistant_model=assistant)


def test_chunked_prefill(oracle):
    model, ids = families.make("llama"), families.tokens(2, 50)
    check_same(model, both(oracle, model), ids, do_sample=False, prefill_chunk_size=13)


def test_several_turns(oracle):
    model, caches = families.make("gemma2"), None
    caches = both(oracle, model)
    ids = families.tokens(1, 15)
    for turn in range(3):
        ours, dense = (generate(model, cache, ids, do_sample=False).sequences for cache in caches)
        assert torch.equal(ours, dense)
        ids = torch.cat([ours, families.tokens(1, 9, seed=turn)], dim=1)
    assert caches[0].get_seq_length() == caches[1].get_seq_length() > 90


def test_reset_and_use_again():
    model, ids = families.make("llama"), families.tokens(2, 30)
    cache = TurboQuantCache(model.config, 3, residual_length=8, block_length=8)
    first = generate(model, cache, ids).sequences
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.layers[0].keys is None
    assert torch.equal(generate(model, cache, ids).sequences, first)
    cache.reset()
    generate(model, cache, ids[:1, :7])  # another batch and length
    assert cache.get_seq_length() == 7 + 24 - 1


@pytest.mark.parametrize("options", [{"do_sample": False}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("name", families.ENCODER_DECODERS)
def test_encoder_decoder(oracle, name, options):
    model, ids = families.make(name), families.tokens(2, 9)
    parts = both(oracle, model, residual=0, sinks=0)
    caches = [EncoderDecoderCache(part, DynamicCache(config=model.config)) for part in parts]
    ours, dense = (generate(model, cache, ids, **options) for cache in caches)
    assert torch.equal(ours.sequences, dense.sequences)
    assert parts[0].layers[0].past[0].compressed_length == 24


def test_compress_is_used_by_every_later_generate_and_undone(monkeypatch):
    model, ids = families.make("llama"), families.tokens(2, 30)
    dense = model.generate(ids, max_new_tokens=30, do_sample=False)
    seen = []
    compress(model, 1, residual_length=0, sink_length=0, block_length=8)
    monkeypatch.setattr(TurboQuantCache, "get_seq_length", spy(TurboQuantCache.get_seq_length, seen))
    first = model.generate(ids, max_new_tokens=30, do_sample=False)
    one = len({id(cache) for cache in seen})
    second = model.generate(ids, max_new_tokens=30, do_sample=False)
    assert torch.equal(first, second)
    assert not torch.equal(first, dense)  # one bit tells
    assert (one, len({id(cache) for cache in seen})) == (1, 2)
    assert torch.equal(model.generate(ids, max_new_tokens=30, do_sample=False, use_cache=False), dense)
    without = GenerationConfig(max_new_tokens=30, do_sample=False, use_cache=False)
    assert torch.equal(model.generate(ids, without), dense)
    assert torch.equal(model.generate(ids, generation_config=without), dense)
    assert torch.equal(
        model.generate(ids, max_new_tokens=30, do_sample=False, past_key_values=DynamicCache(config=model.config)),
        dense,
    )
    assert torch.equal(model.generate(ids, max_new_tokens=30, do_sample=False, cache_implementation="dynamic"), dense)
    compress(model, None)
    assert torch.equal(model.generate(ids, max_new_tokens=30, do_sample=False), dense)
    assert "generate" not in vars(model)
    compress(model, None)  # again is no error


def spy(method, seen):
    def watched(self, *args, **kwargs):
        if isinstance(self, TurboQuantCache):
            seen.append(self)  # kept, so that ids stay apart
        return method(self, *args, **kwargs)

    return watched


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_of_a_compressed_model_generates_with_its_own_weights(way):
    model, ids = families.make("llama"), families.tokens(1, 30)
    compress(model, 4, residual_length=8, block_length=8)
    twin = way(model)
    before = model.generate(ids, max_new_tokens=5, do_sample=False)
    with torch.no_grad():
        twin.lm_head.weight.neg_()
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), before)
    assert not torch.equal(twin.generate(ids, max_new_tokens=5, do_sample=False), before)


@pytest.mark.parametrize("name", ["t5", "gemma2", "qwen3-next"])
def test_compress_serves_every_kind_of_model(name):
    model, ids = families.make(name), families.tokens(2, 30)
    dense = model.generate(ids, max_new_tokens=30, do_sample=False)
    compress(model, 8, residual_length=8, block_length=8)
    out = model.generate(ids, max_new_tokens=30, do_sample=False)
    assert (out == dense).float().mean() > 0.5  # the models are random, so small errors grow; scores are tested above


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "turboquant"])
def test_on_a_cpu_compress_leaves_attention_alone(implementation):
    model = families.make("llama")
    model.set_attn_implementation(implementation)
    for bits in (4, 2, None):
        compress(model, bits)
        assert model.config._attn_implementation == implementation


def test_compress_refuses_at_once():
    model = families.make("llama")
    with pytest.raises(InvalidInputError, match="key_bits must be a number from 1 to 8"):
        compress(model, 9)
    with pytest.raises(InvalidInputError, match="takes no options, got seed"):
        compress(model, None, seed=3)
    with pytest.raises(InvalidInputError, match="that can generate, got Linear"):
        compress(torch.nn.Linear(2, 2), 4)
    assert "generate" not in vars(model)
    assert inspect.ismethod(model.generate)
