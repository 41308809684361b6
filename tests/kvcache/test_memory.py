"""What a cache holds, from the storages of the tensors that can be reached from it."""

import gc
import math

import families
import pytest
import torch
from transformers.cache_utils import DynamicCache

from tqsearch.kvcache import TurboQuantCache
from tqsearch.kvcache.layer import TurboQuantLayer

BATCH, HEADS, DIM = 2, 2, 64


def storages(root, skip=()):
    """Bytes of each storage that the garbage collector reaches from an object, by address; classes, modules and
    functions are not followed."""
    seen, stack, found = {id(part) for part in skip}, [root], {}
    while stack:
        value = stack.pop()
        if id(value) in seen or isinstance(value, type) or type(value).__name__ in ("module", "function", "method"):
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            if storage.nbytes():
                found[storage.data_ptr()] = storage.nbytes()
        stack.extend(gc.get_referents(value))
    return found


def formula(tokens, key_bits, value_bits, residual, sinks, block, itemsize):
    """Bytes of one layer: first and recent tokens dense, blocks of codes with a float16 scale a vector, one offset."""
    blocks = max((tokens - sinks - residual) // block, 0)
    dense = tokens - blocks * block
    codes = blocks * block * DIM * (key_bits + value_bits) / 8
    scales = 2 * blocks * block * 2
    offset = HEADS * DIM * 4 if blocks else 0
    return BATCH * HEADS * (dense * 2 * DIM * itemsize + codes + scales) + offset


# Tables of float32 by which trellis codes are decoded, once for the process: see `trellis_lookup`.
LOOK_UPS = {1: 4 * 4 << 12, 2: 4 * 4 << 16, 3: 2 * 4 << 14, 4: 2 * 4 << 16}


@pytest.mark.parametrize("codec", ["scalar", "trellis"])
@pytest.mark.parametrize("bits", [(4, 4), (3, 2), (2.5, 3.5), (8, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_storages_add_up_to_the_formula_after_every_step(bits, dtype, codec):
    model = families.make("llama", dtype)
    options = {"key_bits": bits[0], "value_bits": bits[1], "codec": codec}
    cache = TurboQuantCache(model.config, **options, residual_length=8, sink_length=4, block_length=16)
    length = 0
    for step in (50, 1, 1, 30, *[1] * 17):
        model(families.tokens(BATCH, step), past_key_values=cache)
        length += step
        codecs = [history.codec for layer in cache.layers for history in layer.past]
        held = sum(storages(cache, skip=codecs).values())
        assert held == 2 * formula(length, *bits, 8, 4, 16, dtype.itemsize)
    widths = {w for number in bits for w in (math.floor(number), math.ceil(number)) if codec == "trellis" and w < 8}
    look_ups = sum(LOOK_UPS[width] for width in widths)
    assert cache.report().nbytes == held + sum(storages(codecs).values()) + look_ups
    assert sum(storages(codecs).values()) < 20_000  # rotations and tables, of this width alone, for all layers


@torch.no_grad()
def test_storages_after_generation_crop_and_batch_operations():
    model = families.make("llama")
    cache = TurboQuantCache(model.config, 4, residual_length=8, sink_length=4, block_length=16)
    model.generate(families.tokens(BATCH, 40), max_new_tokens=21, do_sample=False, past_key_values=cache)
    for change, length in (
        (lambda: None, 60),
        (lambda: cache.crop(-3), 57),
        (lambda: cache.reorder_cache(torch.tensor([1, 0])), 57),
        (lambda: cache.batch_repeat_interleave(2), 57),
        (lambda: cache.batch_select_indices(torch.tensor([0, 3])), 57),
    ):
        change()
        codecs = [history.codec for layer in cache.layers for history in layer.past]
        compressed = cache.layers[0].past[0].compressed_length
        assert compressed == 48
        batch = cache.layers[0].past[0].recent.shape[0]
        dense = length - compressed
        wanted = batch * HEADS * (dense * 2 * DIM * 4 + compressed * (DIM + 4)) + HEADS * DIM * 4
        assert sum(storages(cache, skip=codecs).values()) == 2 * wanted


def test_states_of_larger_buffers_are_not_kept_alive():
    """Models split keys and values off one projection: a view would keep all of it."""
    config = families.CONFIGS["llama"]()
    cache = TurboQuantCache(config, 4, residual_length=8, block_length=8)
    buffer = torch.randn((BATCH, HEADS, 100, 8 * DIM))
    for start in (0, 5):  # all in the sinks and recent, then some compressed
        states = buffer[:, :, start : start + 5 + 4 * start, :DIM]
        cache.update(states, states, 0)
        assert buffer.untyped_storage().data_ptr() not in storages(cache)


@torch.no_grad()
def test_the_report_names_layers_parts_and_reasons():
    model = families.make("gemma2", torch.bfloat16)
    cache = TurboQuantCache(model.config, 4, residual_length=16, sink_length=4, block_length=128)
    model(families.tokens(1, 4 + 16 + 256), past_key_values=cache)
    report = cache.report()
    window, full = report.layers
    assert not window.compressed
    assert window.note == "keeps a window of 12 tokens only"
    assert full.compressed
    assert full.note == "keys 4.0, values 4.0"
    assert full.tokens == 256
    assert full.parts == {
        "key codes": 2 * 256 * 32,
        "key scales": 2 * 256 * 2,
        "key offset": 2 * 64 * 4,
        "value codes": 2 * 256 * 32,
        "value scales": 2 * 256 * 2,
        "sinks": 2 * 2 * 4 * 64 * 2,
        "recent": 2 * 2 * 16 * 64 * 2,
    }
    assert full.dense_bytes == 2 * 2 * 276 * 64 * 2
    assert report.compressed_ratio == (2 * 2 * 256 * 34 + 512) / (2 * 2 * 256 * 64 * 2)
    assert report.by_part()["key codes"] == 16384
    assert report.ratio == report.nbytes / report.dense_bytes
    text = str(report)
    assert "1 layers compressed, 1 left alone" in text
    assert "keeps a window of 12 tokens only" in text


@pytest.mark.parametrize(
    ("name", "reason"),
    [("qwen3-next", "a recurrent state, which does not grow"), ("deepseek-v3", "keys 4.0, values uncompressed")],
)
@torch.no_grad()
def test_the_report_of_other_families(name, reason):
    model = families.make(name)
    cache = TurboQuantCache(model.config, 4, residual_length=0, block_length=8)
    assert cache.report().ratio == 1.0
    model(families.tokens(1, 40), past_key_values=cache)
    assert any(layer.note == reason for layer in cache.report().layers)
    assert cache.report().nbytes == sum(storages(cache).values())


@torch.no_grad()
def test_bytes_at_four_bits_and_head_dimension_128():
    """Of bfloat16's 256 bytes 66 remain, 0.258, and the offset."""
    config = families._config("LlamaConfig", head_dim=128)
    cache = TurboQuantCache(config, 4)
    states = torch.randn((1, 2, 4 + 128 + 2048, 128), dtype=torch.bfloat16)
    cache.update(states, states, 0)
    assert cache.layers[0].past[0].compressed_length == 2048
    assert cache.report().compressed_ratio < 0.27
    assert abs(cache.report().compressed_ratio - (66 / 256 + 512 / (2048 * 512))) < 1e-12


@torch.no_grad()
def test_forks_share_what_they_do_not_change():
    model = families.make("gemma2")
    cache = TurboQuantCache(model.config, 4, residual_length=8, block_length=8)
    model(families.tokens(1, 60), past_key_values=cache)
    branch = cache.fork()
    shared = storages(cache.layers[1]).keys() & storages(branch.layers[1]).keys()
    assert shared == storages(cache.layers[1]).keys()
    assert storages(cache.layers[0]).keys().isdisjoint(storages(branch.layers[0]).keys())
    assert isinstance(branch.layers[1], TurboQuantLayer)
    assert isinstance(branch, DynamicCache)
