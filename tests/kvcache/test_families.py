"""Every family at the logit level: a model with a compressed cache against the same model with a dense cache of
dequantized states, which numpy computes in float64 from the definitions."""

import families
import pytest
import torch
from kv_oracle import ROUNDING, FakeQuantMixin, Shape, check_states, fake_cache
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from tqsearch.errors import InvalidInputError
from tqsearch.kvcache import TurboQuantCache
from tqsearch.kvcache.layer import TurboQuantLayer

WIDTHS = [(4, 4), (3.5, 2.5), (4, 2), (8, 1), (5, 6), (3, 3), (2, 7)]


def pair_of(oracle, name, bits, *, residual=8, sinks=4, codec="scalar"):
    """A model, its compressed cache and the oracle of it."""
    model = families.make(name)
    latent = name.startswith("deepseek")
    shape = Shape(bits[0], None if latent else bits[1], residual, sinks, 8, codec=codec)
    cache = TurboQuantCache(
        model.config,
        key_bits=bits[0],
        value_bits=bits[1],
        residual_length=residual,
        sink_length=sinks,
        block_length=8,
        codec=codec,
    )
    return model, cache, fake_cache(oracle, model.config, shape)


def compare(cache, oracle_cache):
    """Decoded states equal the oracle's; then the oracle takes them over, so that rounding does not add up."""
    compressed = 0
    for layer, fake in zip(cache.layers, oracle_cache.layers, strict=True):
        assert isinstance(layer, TurboQuantLayer) == isinstance(fake, FakeQuantMixin)
        if not isinstance(layer, TurboQuantLayer):
            continue
        for actual, expected, slack in (
            (layer.keys, fake.keys, fake.slack[0]),
            (layer.values, fake.values, fake.slack[1]),
        ):
            check_states(actual, expected, slack + ROUNDING * expected.double().norm(dim=3))
        fake.keys, fake.values = layer.keys, layer.values
        assert layer.past[0].compressed_length == fake.old
        compressed += fake.old
    return compressed


def close(actual, expected):
    assert torch.isfinite(actual).all()
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


# A first prompt, a chunk, single tokens, a chunk longer than recent tokens and a block, single tokens.
STEPS = (21, 5, *[1] * 10, 19, *[1] * 3)


@pytest.mark.parametrize("name", families.CONFIGS)
def test_logits(oracle, name):
    check_logits(*pair_of(oracle, name, WIDTHS[sum(map(ord, name)) % len(WIDTHS)]))


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("llama", (3, 3)),
        ("llama-mqa", (2, 1)),
        ("gemma2", (2.5, 4)),
        ("gpt-oss", (8, 2)),
        ("falcon-h1", (1, 8)),
        ("deepseek-v3", (4, 4)),
    ],
)
def test_logits_of_trellis_codes(oracle, name, bits):
    check_logits(*pair_of(oracle, name, bits, codec="trellis"))


@torch.no_grad()
def check_logits(model, cache, dense):
    """Step by step, with left padding."""
    ids = families.tokens(2, sum(STEPS))
    mask = torch.ones_like(ids)
    mask[0, :6] = 0  # left padding, sinks and all
    start = 0
    for step in STEPS:
        stop = start + step
        inputs = {"input_ids": ids[:, start:stop], "attention_mask": mask[:, :stop]}
        close(
            model(**inputs, past_key_values=cache).logits[:, -1], model(**inputs, past_key_values=dense).logits[:, -1]
        )
        compressed = compare(cache, dense)
        start = stop
    assert cache.get_seq_length() == start
    assert compressed >= 40


@pytest.mark.parametrize("name", families.ENCODER_DECODERS)
@torch.no_grad()
def test_logits_with_an_encoder(oracle, name):
    model, cache, dense = pair_of(oracle, name, (4, 3))
    caches = [EncoderDecoderCache(part, DynamicCache(config=model.config)) for part in (cache, dense)]
    source, target = families.tokens(2, 9, seed=1), families.tokens(2, sum(STEPS))
    start = 0
    for step in STEPS:
        stop = start + step
        logits = [
            model(input_ids=source, decoder_input_ids=target[:, start:stop], past_key_values=both).logits[:, -1]
            for both in caches
        ]
        close(*logits)
        compressed = compare(cache, dense)
        start = stop
    assert compressed >= 40
    assert caches[0].cross_attention_cache.layers[0].keys.shape[2] == 9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_states_keep_their_dtype(dtype):
    """At 8 bits the codes' error is far below half precision's own: logits agree as two half-precision runs do."""
    model = families.make("llama", dtype)
    cache, dense = (
        TurboQuantCache(model.config, 8, residual_length=8, block_length=8),
        DynamicCache(config=model.config),
    )
    ids = families.tokens(2, 60)
    exact = families.make("llama")(ids).logits[:, -1].double()
    ends = []
    for part in (cache, dense):
        model(ids[:, :-1], past_key_values=part)
        ends.append(model(ids[:, -1:], past_key_values=part).logits[:, -1].double())
    assert cache.layers[0].keys.dtype == dtype
    assert cache.layers[0].past[0].compressed_length == 48
    error, reference = ((end - exact).norm() for end in ends)
    assert error <= 2 * reference + 0.03 * exact.norm()


def test_latent_attention_never_compresses_the_rope_key():
    model = families.make("deepseek-v3")
    cache = TurboQuantCache(model.config, 2, residual_length=0, sink_length=0, block_length=8)
    dense = DynamicCache(config=model.config)
    ids = families.tokens(1, 40)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        model(ids, past_key_values=dense)
    assert cache.layers[0].past[0].compressed_length == 40
    assert torch.equal(cache.layers[0].values, dense.layers[0].values)
    assert not torch.allclose(cache.layers[0].keys, dense.layers[0].keys, atol=0.1)


def test_latent_attention_with_parts_that_cannot_be_told_raises():
    config = families.CONFIGS["deepseek-v3"]()
    cache = TurboQuantCache(config, 4)
    states = torch.zeros((1, 1, 3, 80))
    with pytest.raises(InvalidInputError, match="must cache its latent of width 64 and its RoPE key of width 16 apart"):
        cache.update(states, states, 0)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (lambda: families._config("MistralConfig", sliding_window=8), "DynamicSlidingWindowLayer"),
        (lambda: families._config("MambaConfig", head_dim=None), "its layers are LinearAttentionLayer"),
    ],
)
def test_a_model_nothing_of_which_can_be_compressed_raises(config, why):
    with pytest.raises(InvalidInputError, match=why):
        TurboQuantCache(config(), 4)


def test_layers_that_keep_a_window_are_the_librarys():
    config = families.CONFIGS["gemma2"]()
    library, ours = DynamicCache(config=config), TurboQuantCache(config, 4)
    kinds = [type(layer).__name__ for layer in ours.layers]
    assert kinds == ["DynamicSlidingWindowLayer", "TurboQuantLayer"]
    assert vars(ours.layers[0]).keys() == vars(library.layers[0]).keys()
    assert ours.layers[0].sliding_window == 12
