"""Codecs that the benchmark simulates: what the simulated cache does, and what each codec is."""

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch

with warnings.catch_warnings():  # transformers imports hqq where it is installed, and hqq warns
    warnings.simplefilter("ignore")
    pytest.importorskip("transformers.cache_utils")

from tiny_llama import llama, tokens
from transformers import DynamicCache

from benchmarks.kvcache import calibrated, codecs, likelihood, moments, product, simulated
from tqsearch.kvcache import TurboQuantCache


class Keep:
    """A codec that loses nothing."""

    def round_trip(self, states: torch.Tensor) -> torch.Tensor:
        return states.clone()

    def bytes_per_vector(self) -> float:
        return 10.0


class AddOne(Keep):
    def round_trip(self, states: torch.Tensor) -> torch.Tensor:
        return states + 1.0


def test_a_lossless_cache_agrees_and_has_the_models_likelihood() -> None:
    model, read = llama(), tokens(3, 100)
    make = lambda: simulated.simulated_cache(model.config, [(Keep(), Keep())] * 2, residual=8, sinks=2, block=4)  # noqa: E731
    found = likelihood.Reference(model, read, 16, 2).agreement(make)
    with torch.no_grad():
        whole = torch.nn.functional.cross_entropy(
            model(read).logits[:, :-1].flatten(0, 1), read[:, 1:].flatten(), reduction="none"
        )
    torch.testing.assert_close(found.nll, whole.view(3, 99), rtol=1e-4, atol=1e-4)
    assert float(found.kl.abs().max()) < 1e-5
    assert float(found.top1.min()) == 1.0


def test_what_the_simulated_cache_compresses_and_when() -> None:
    config = llama(num_hidden_layers=1).config
    cache = simulated.simulated_cache(config, [(AddOne(), AddOne())], residual=5, sinks=2, block=4, remove_offset=False)
    states = torch.randn(1, 1, 30, 16, generator=torch.Generator().manual_seed(0))
    expected = states.clone()
    length = done = 0
    for step in (3, 9, 1, 1, 10, 6):
        fresh = states[:, :, length : length + step]
        keys, values = cache.update(fresh, fresh, 0)
        length += step
        # What is read now is what was compressed before; new tokens and the recent ones are exact.
        for read in (keys, values):
            assert torch.equal(read, expected[:, :, :length])
        while length - (2 + done) - 5 >= 4:
            expected[:, :, 2 + done : 6 + done] += 1.0
            done += 4
    assert done == 20
    codec = codecs.TurboCodec(16, 3)
    found = simulated.formula_bytes([(codec, Keep())] * 2, 3, 16, 100, 20)
    assert found["per_token"] == 2 * 3 * (6 + 2 + 10)
    assert found["total"] == 80 * 108 + 20 * 2 * 2 * 3 * 16 * 2


def test_offset_removal_leaves_a_constant_exact() -> None:
    class Zero(Keep):
        def round_trip(self, states: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(states)

    config = llama(num_hidden_layers=1).config
    states = torch.full((1, 1, 40, 16), 7.0)
    for removed, left in ((True, 7.0), (False, 0.0)):
        cache = simulated.simulated_cache(
            config, [(Zero(), Keep())], residual=0, sinks=0, block=4, remove_offset=removed
        )
        cache.update(states, states, 0)
        keys, _ = cache.update(states[:, :, :1], states[:, :, :1], 0)
        assert float(keys[0, 0, 0, 0]) == left


def test_prod_codec_is_unbiased_and_counts_its_signs() -> None:
    codec = codecs.TurboCodec(64, 3, "prod")
    assert codec.bytes_per_vector() == 16 + 2 + 8 + 2
    states = torch.randn(1, 1, 1, 64, generator=torch.Generator().manual_seed(2))
    estimates = torch.cat([codecs.TurboCodec(64, 3, "prod", seed=seed).round_trip(states) for seed in range(60)])
    products = (estimates * states).sum(dim=3).flatten()
    truth = float(states.square().sum())
    assert abs(float(products.mean()) - truth) < 5 * float(products.std()) / math.sqrt(60)


def test_product_quantization_is_that_of_faiss() -> None:
    pytest.importorskip("faiss")
    from tqsearch.faiss_pq import faiss_pq

    generator = torch.Generator().manual_seed(3)
    for size in (4, 5):  # 5 does not divide 16: zeros are put between
        vectors = torch.randn(600, 16, generator=generator)
        index = faiss_pq(16, size, "l2", iterations=5)
        index.train(vectors.numpy())
        fresh = torch.randn(40, 16, generator=generator)
        expected = index.sa_decode(index.sa_encode(fresh.numpy()))
        codec = product.PQCodec([product.trained(vectors, size, 5)])
        found = codec.round_trip(fresh.view(2, 1, 20, 16)).view(40, 16)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)
        assert codec.bytes_per_vector() == size


def test_the_simulated_cache_with_our_codec_is_our_cache() -> None:
    """Offsets, windows and blocks are the same ones, so that only the rounding of scales to float16 is between them."""
    config = llama(num_hidden_layers=1, head_dim=64).config
    pair = (codecs.TurboCodec(64, 3), codecs.TurboCodec(64, 3, seed=1))
    fake = simulated.simulated_cache(config, [pair], residual=32, sinks=4, block=16)
    ours = TurboQuantCache(config, 3, residual_length=32, sink_length=4, block_length=16)
    generator = torch.Generator().manual_seed(5)
    drift = torch.linspace(0.0, 3.0, 150)[:, None]  # so that every token more or less moves the mean
    keys = torch.randn(2, 1, 150, 64, generator=generator) + drift
    values = torch.randn(2, 1, 150, 64, generator=generator)
    for start, stop in ((0, 60), (60, 61), (61, 150)):
        for cache in (fake, ours):
            cache.update(keys[:, :, start:stop], values[:, :, start:stop], 0)
    for found, expected in ((fake.layers[0].keys, ours.layers[0].keys), (fake.layers[0].values, ours.layers[0].values)):
        error = (found - expected).norm(dim=3) / expected.norm(dim=3)
        assert float(error.max()) <= 2**-11 + 1e-5
    assert ours.layers[0].past[0].compressed_length == 112


def test_widths_are_those_of_least_error() -> None:
    # Every way of giving 3 groups 0 to 4 bits each, 5 in all: the least total error, by exhaustion.
    powers = [16.0, 3.0, 0.25]
    errors = [1.0, 0.3634, 0.1175, 0.03454, 0.009497]  # Max (1960), of N(0, 1)
    ways = [(a, b, 5 - a - b) for a in range(5) for b in range(5) if 0 <= 5 - a - b <= 4]
    best = min(ways, key=lambda way: sum(power * errors[width] for power, width in zip(powers, way, strict=True)))
    found = calibrated.allotted(torch.tensor(powers).repeat_interleave(8) / 8, 5 / 3)
    assert found.tolist() == [width for width in best for _ in range(8)]


def test_a_calibrated_codec_serves_the_queries_it_knows() -> None:
    generator = torch.Generator().manual_seed(9)
    mixing, asking = (torch.randn(32, 32, generator=generator) for _ in range(2))
    spread = torch.logspace(0.5, -1.5, 32)
    keys = (torch.randn(1, 1, 4000, 32, generator=generator) * spread) @ mixing
    queries = (torch.randn(500, 32, generator=generator) * spread) @ asking
    covariance = (keys[0, 0].T @ keys[0, 0] / 4000).double()
    weight = (queries.T @ queries / 500).double()

    def logit_error(codec: Any) -> float:
        return float((queries @ (codec.round_trip(keys) - keys)[0, 0].T).square().mean())

    wide = calibrated.CalibratedCodec([calibrated.head_transform(covariance, weight, 6)])
    power = float((queries @ keys[0, 0].T).square().mean())
    assert logit_error(wide) < 0.002 * power  # 6 bits leave 0.0006 of a normal variable's power
    known = calibrated.CalibratedCodec([calibrated.head_transform(covariance, weight, 2)])
    principal = calibrated.CalibratedCodec([calibrated.head_transform(covariance, None, 2)])
    assert known.bytes_per_vector() == codecs.TurboCodec(32, 2).bytes_per_vector() == 10
    assert logit_error(known) < logit_error(principal) < logit_error(codecs.TurboCodec(32, 2))


def test_moments_are_those_of_the_caches_keys() -> None:
    model, read = llama(num_key_value_heads=2, num_attention_heads=4), tokens(2, 30)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(read, past_key_values=cache)
    found = moments.moments(model, read)
    assert len(found) == 2
    for layer, (queries, keys) in zip(cache.layers, found, strict=True):
        for head in range(2):
            rows = [layer.keys[document, head].double().numpy() for document in range(2)]
            expected = sum(np.cov(part, rowvar=False, bias=True) for part in rows) / 2
            np.testing.assert_allclose(keys[head].numpy(), expected, rtol=1e-4, atol=1e-8)
        assert float(queries.diagonal(dim1=1, dim2=2).min()) > 0
    # Of the first layer's queries the norm survives the rotary embedding: it is that of the projection.
    block = model.model.layers[0]
    with torch.no_grad():
        asked = block.self_attn.q_proj(block.input_layernorm(model.model.embed_tokens(read)))
    norms = asked.view(2, 30, 2, 2, 16).double().square().sum(dim=4).mean(dim=(0, 1, 3))
    torch.testing.assert_close(found[0][0].diagonal(dim1=1, dim2=2).sum(dim=1), norms, rtol=1e-5, atol=0.0)
