"""Models that attend from the codes, against the same models over the same cache with decoded states."""

import warnings

import families
import pytest
import torch
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from tqsearch import kernels
from tqsearch.kvcache import TurboQuantCache
from tqsearch.kvcache import attention as plug
from tqsearch.kvcache.policy import LayerBits, PerLayer

BLOCK = 32
STEPS = (70, 1, 1, 5, 1, 30, 1, 1)
NO_CODES = {"deepseek-v3"}  # latents are compressed, RoPE keys are not: there is no pair


@pytest.fixture
def counted(monkeypatch):
    """How often attention ran from the codes; the kernel runs as ever."""
    calls = []
    real = kernels.attention

    def attention(*args, **kwargs):
        calls.append(args[0].shape[2])
        return real(*args, **kwargs)

    monkeypatch.setattr(plug.kernels, "attention", attention)
    return calls


def caches(model, **options):
    """A cache whose states are attended to from the codes, and one whose states are decoded."""
    model.set_attn_implementation("turboquant")
    fused = TurboQuantCache(model.config, residual_length=8, sink_length=4, block_length=BLOCK, **options)
    plain = TurboQuantCache(model.config, residual_length=8, sink_length=4, block_length=BLOCK, **options)
    for layer in plain.layers:
        if hasattr(layer, "settings"):
            layer.settings = type(layer.settings)(**{**vars(layer.settings), "from_codes": False})
    return fused, plain


def close(actual, expected, tolerance=1e-4):
    assert torch.isfinite(actual).all()
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("bits", [(4, 4), (3, 2.5)])
@pytest.mark.parametrize("name", families.CONFIGS)
@torch.no_grad()
def test_logits(name, bits, counted, monkeypatch):
    """Left padding, a first prompt, single tokens, drafts of five and a chunk that is read tile by tile."""
    monkeypatch.setattr(plug, "_warned", {"way with keys or values alone"} if name in NO_CODES else set())
    model = families.make(name)
    own = families.attention_of(model)
    fused, plain = caches(model, key_bits=bits[0], value_bits=bits[1] if name not in NO_CODES else bits[0])
    ids = families.tokens(2, sum(STEPS))
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    start = 0
    for step in STEPS:
        stop = start + step
        inputs = {"input_ids": ids[:, start:stop], "attention_mask": mask[:, :stop]}
        model.set_attn_implementation("turboquant")
        actual = model(**inputs, past_key_values=fused).logits[:, -1]
        model.set_attn_implementation(own)
        close(actual, model(**inputs, past_key_values=plain).logits[:, -1])
        start = stop
    if name in NO_CODES:
        assert not counted
    else:
        assert sorted(set(counted)) == [1, 5]


@torch.no_grad()
def test_without_padding_the_mask_is_none(counted):
    model = families.make("llama")
    own = families.attention_of(model)
    fused, plain = caches(model)
    ids = families.tokens(1, 80)
    model.set_attn_implementation("turboquant")
    model(ids[:, :-1], past_key_values=fused)
    actual = model(ids[:, -1:], past_key_values=fused).logits
    model.set_attn_implementation(own)
    model(ids[:, :-1], past_key_values=plain)
    close(actual, model(ids[:, -1:], past_key_values=plain).logits)
    assert counted == [1] * 2


@pytest.mark.parametrize("name", ["llama", "gpt-oss", "gemma2"])
@torch.no_grad()
def test_generation(name, counted):
    """Greedy tokens are those of the decoded states, with beams too."""
    model = families.make(name)
    own = families.attention_of(model)
    for beams in (1, 3):
        found = []
        for cache, implementation in zip(caches(model, bits=8), ("turboquant", own), strict=True):
            model.set_attn_implementation(implementation)
            ids = families.tokens(2, 60)
            options = {"max_new_tokens": 12, "do_sample": False, "num_beams": beams, "past_key_values": cache}
            found.append(model.generate(ids, attention_mask=torch.ones_like(ids), **options))
        assert torch.equal(*found)
    assert counted


@torch.no_grad()
def test_cross_attention_stays_exact(counted):
    """BART: the decoder's own attention reads codes, cross-attention its dense states."""
    model = families.make("bart")
    own = families.attention_of(model)
    source, target = families.tokens(2, 9, seed=1), families.tokens(2, 90)
    ends = []
    for cache, implementation in zip(caches(model), ("turboquant", own), strict=True):
        model.set_attn_implementation(implementation)
        both = EncoderDecoderCache(cache, DynamicCache(config=model.config))
        model(input_ids=source, decoder_input_ids=target[:, :80], past_key_values=both)
        ends.append(model(input_ids=source, decoder_input_ids=target[:, 80:81], past_key_values=both).logits)
    close(*ends)
    assert counted


@torch.no_grad()
def test_any_other_operation_decodes():
    """The tensors stand in for the states wherever a model uses them."""
    model = families.make("llama")
    fused, plain = caches(model)
    ids = families.tokens(1, 90)
    for cache in (fused, plain):
        model(ids, past_key_values=cache)
    states = [torch.randn((1, 2, 3, 64), generator=torch.Generator().manual_seed(i)) for i in range(2)]
    keys, values = fused.layers[0].update(*states)
    exact = plain.layers[0].update(*states)
    assert isinstance(keys, plug.CompressedTensor)
    assert keys.shape == exact[0].shape
    assert keys.dtype == exact[0].dtype
    assert torch.equal(keys + 0, exact[0])
    assert torch.equal(torch.cat([keys, keys], dim=2)[:, :, : keys.shape[2]], exact[0])
    assert torch.equal(values.transpose(1, 2), exact[1].transpose(1, 2))
    assert torch.equal(values.contiguous(), exact[1])
    query = torch.randn((1, 4, 3, 64), generator=torch.Generator().manual_seed(9))
    attended = torch.nn.functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
    expected = torch.nn.functional.scaled_dot_product_attention(query, *exact, enable_gqa=True)
    close(attended, expected)


@pytest.mark.parametrize("hindrance", ["position_bias", "dropout", "mask"])
@torch.no_grad()
def test_what_the_kernel_lacks_is_decoded_and_said_once(hindrance, counted, monkeypatch):
    monkeypatch.setattr(plug, "_warned", set())
    model = families.make("llama")
    fused, _ = caches(model)
    model(families.tokens(1, 90), past_key_values=fused)
    counted.clear()
    states = [torch.randn((1, 2, 1, 64), generator=torch.Generator().manual_seed(i)) for i in range(2)]
    keys, values = fused.layers[0].update(*states)
    query = torch.randn((1, 4, 1, 64), generator=torch.Generator().manual_seed(9))
    bias = torch.randn((1, 4, 1, 91), generator=torch.Generator().manual_seed(8))
    module = model.model.layers[0].self_attn
    mask, kwargs, said = None, {}, "a position bias"
    if hindrance == "position_bias":
        kwargs = {"position_bias": bias}
    elif hindrance == "dropout":
        kwargs, said, bias = {"dropout": 0.5}, "dropout", torch.zeros_like(bias)
    else:
        mask, said = bias, "a mask for each head"
    with pytest.warns(UserWarning, match=f"has no {said}: these layers decode"):
        out, _ = plug.attention_forward(module, query, keys, values, mask, **kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plug.attention_forward(module, query, keys, values, mask, **kwargs)
    assert not counted
    if hindrance != "dropout":
        logits = query.double() @ (keys + 0).double().repeat_interleave(2, dim=1).transpose(2, 3) / 8 + bias
        expected = torch.softmax(logits, dim=3) @ (values + 0).double().repeat_interleave(2, dim=1)
        close(out.double(), expected.transpose(1, 2))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"outlier_channels": 4}, "outlier channels"),
        ({"policy": PerLayer((LayerBits(4, None),) * 2)}, "way with keys or values alone"),
        ({"policy": PerLayer((LayerBits(None, 4),) * 2)}, "way with keys or values alone"),
    ],
)
@torch.no_grad()
def test_codes_that_the_kernel_does_not_read_are_decoded_and_said_once(options, said, counted, monkeypatch):
    monkeypatch.setattr(plug, "_warned", set())
    model = families.make("llama")
    own = families.attention_of(model)
    fused, plain = caches(model, **options)
    ids = families.tokens(1, 92)
    model(ids[:, :90], past_key_values=fused)
    with pytest.warns(UserWarning, match=f"has no {said}: these layers decode"):
        first = model(ids[:, 90:91], past_key_values=fused).logits
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = model(ids[:, 91:], past_key_values=fused).logits
    assert not counted
    model.set_attn_implementation(own)
    model(ids[:, :90], past_key_values=plain)
    close(first, model(ids[:, 90:91], past_key_values=plain).logits)
    close(second, model(ids[:, 91:], past_key_values=plain).logits)


def test_gradients_are_of_decoded_states(counted, monkeypatch):
    """A loss through the current token has the gradient that decoded states give."""
    model = families.make("llama")
    own = families.attention_of(model)
    ids = families.tokens(1, 80)
    gradients = []
    for cache, implementation in zip(caches(model), ("turboquant", own), strict=True):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            model(ids[:, :-1], past_key_values=cache)
        model.zero_grad()
        model(ids[:, -1:], past_key_values=cache).logits.square().sum().backward()
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad.clone())
    close(*gradients)
    assert not counted
