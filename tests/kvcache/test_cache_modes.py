"""What a caller has set in torch changes nothing that a cache keeps or returns."""

from contextlib import contextmanager

import families
import pytest
import torch

from tqsearch.kvcache import TurboQuantCache
from tqsearch.kvcache.outliers import key_codec
from tqsearch.kvcache.store import value_codec

CONFIG = families.CONFIGS["llama"]()


@contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


MODES = {
    "inference": torch.inference_mode,
    "autocast to bfloat16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast to float16": lambda: torch.autocast("cpu", dtype=torch.float16),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
}
KINDS = [{}, {"codec": "trellis"}, {"outlier_channels": 4}, {"key_bits": 2.5}]


@pytest.fixture
def forgetful():
    """Codecs are shared by all caches: each is made anew, in the mode of its test."""
    for codecs in (key_codec, value_codec):
        codecs.cache_clear()
    yield
    for codecs in (key_codec, value_codec):
        codecs.cache_clear()


def history(dtype, options):
    """All that a cache returns while it grows, is cut and is chosen from."""
    cache = TurboQuantCache(CONFIG, **{"bits": 4, "residual_length": 8, "block_length": 8, **options})
    states = torch.randn((2, 2, 70, 64), generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(dtype)
    found = []
    for start, stop in ((0, 40), (40, 41), (41, 70)):
        found += cache.update(states[:, :, start:stop], states[:, :, start:stop] / 2, 0)
    cache.crop(-30)
    cache.batch_select_indices(torch.tensor([1]))
    return [*found, cache.layers[0].keys, cache.layers[0].values]


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_states_are_as_ever(mode, dtype, options):
    with MODES[mode]():
        found = history(dtype, options)
    for part, other in zip(found, history(dtype, options), strict=True):
        assert part.dtype == other.dtype == dtype
        assert torch.equal(part, other)


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize("mode", ["float64", "bfloat16"])
@torch.no_grad()
def test_attention_from_the_codes_is_as_ever(mode):
    model, ids = families.make("llama"), families.tokens(2, 40)
    model.set_attn_implementation("turboquant")

    def logits():
        cache = TurboQuantCache(model.config, 3, residual_length=8, block_length=8)
        model(ids, past_key_values=cache)
        return [model(ids[:, at : at + 1], past_key_values=cache).logits for at in range(3)]

    with MODES[mode]():
        found = logits()
    for codecs in (key_codec, value_codec):
        codecs.cache_clear()
    assert all(torch.equal(*pair) for pair in zip(found, logits(), strict=True))


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_gradients_flow_in_autocast(options):
    """Of the call's own states, as without: what is returned may be trained on."""
    cache = TurboQuantCache(CONFIG, **{"bits": 4, "residual_length": 8, "block_length": 8, **options})
    cache.update(torch.ones(1, 2, 40, 64), torch.ones(1, 2, 40, 64), 0)
    states = torch.ones((1, 2, 3, 64), requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        keys, values = cache.update(states, states, 0)
    (keys.sum() + 2 * values.sum()).backward()
    assert torch.equal(states.grad, torch.full_like(states, 3.0))


@torch.no_grad()
def test_generation_in_autocast():
    """It ends, and finds what it finds in bfloat16 with the library's own cache, as 8 bits are next to lossless."""
    model, ids = families.make("llama"), families.tokens(2, 30)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 30, "do_sample": False}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dense = model.generate(ids, **options)
        cache = TurboQuantCache(model.config, 8, residual_length=8, block_length=8)
        found = model.generate(ids, past_key_values=cache, **options)
    assert cache.layers[0].past[0].compressed_length >= 40
    assert (found == dense).float().mean() > 0.8  # random models make much of rounding
