"""The caches that the whole-model benchmark fills are what a model would have filled."""

import warnings

import pytest
import torch

with warnings.catch_warnings():  # transformers imports hqq where it is installed, and hqq warns
    warnings.simplefilter("ignore")
    pytest.importorskip("transformers.cache_utils")

from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.kvcache import whole_model


@pytest.fixture
def config(monkeypatch):
    monkeypatch.setattr(whole_model, "DEVICE", "cpu")
    monkeypatch.setattr(whole_model, "FILL", 200)
    return LlamaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, head_dim=64
    )


@torch.no_grad()
def test_both_caches_hold_every_token(config):
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    dense = whole_model.dense_cache(config, 2, 500, False)
    ours = whole_model.compressed_cache(config, 2, 500, bits=4)
    for cache in (dense, ours):
        assert [layer.get_seq_length() for layer in cache.layers] == [500] * 3
        assert torch.isfinite(model(torch.zeros((2, 1), dtype=torch.int64), past_key_values=cache).logits).all()
        assert [layer.get_seq_length() for layer in cache.layers] == [501] * 3
    assert [len(layer.past[0].compressed) for layer in ours.layers] == [256] * 3
    # What a model with a cache of its own for each layer would hold: nothing is shared but what codecs share.
    places = [
        part.data_ptr() for layer in ours.layers for part in (layer.past[0].compressed.packed, layer.past[0].recent)
    ]
    assert len(set(places)) == 6
    assert torch.equal(ours.layers[0].keys[:, :, :500], ours.layers[2].keys[:, :, :500])
    assert not torch.equal(dense.layers[0].keys[:, :, :500], dense.layers[2].keys[:, :, :500])


def test_a_row_compares_with_the_dense_run():
    run = {"context": 8192, "batch": 8, "tokens_per_second": 300.0, "step_ms": 26.7, "busy_ms": 8.0, "peak_gb": 18.5}
    dense = {**run, "tokens_per_second": 200.0, "busy_ms": 12.0, "append_ms": None}
    row = whole_model._row("TurboQuantCache, K4V4", {**run, "append_ms": 12.8}, dense)
    assert row == [8192, 8, "TurboQuantCache, K4V4", 300.0, 26.7, 8.0, 18.5, 1.5, 1.5, 0.1]
    assert whole_model._row("DynamicCache, no cuDNN", dense, dense)[-3:] == [None, None, None]
    assert len(row) == len(whole_model.COLUMNS)
