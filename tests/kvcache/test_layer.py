"""The cache and its layers, call by call, as transformers and its users make them."""

import copy

import families
import numpy as np
import pytest
import torch
from kv_oracle import ROUNDING, Shape, check_states, fake_cache
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, DynamicCache

from tqsearch.errors import InvalidInputError, TQSearchError
from tqsearch.kvcache import LayerBits, PerLayer, TurboQuantCache, Uniform
from tqsearch.kvcache.layer import LEGACY_CROP, TurboQuantLayer
from tqsearch.plan import BitPlan

CONFIG = families.CONFIGS["llama"]()


def new(bits=4, **options):
    return TurboQuantCache(CONFIG, bits, **{"residual_length": 8, "block_length": 8, **options})


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_a_first_prompt_is_returned_exact_and_is_the_same_object():
    cache = new(1)
    keys, values = random(2, 2, 60, 64), random(2, 2, 60, 32, seed=1)
    returned = cache.update(keys, values, 0)
    assert returned[0] is keys
    assert returned[1] is values
    assert cache.layers[0].past[0].compressed_length == 48
    assert not torch.equal(cache.layers[0].keys, keys)


def test_new_tokens_are_returned_exact_before_they_are_compressed():
    cache = new(1, residual_length=0, sink_length=0)
    cache.update(random(1, 2, 16, 64), random(1, 2, 16, 64), 0)
    chunk = random(1, 2, 24, 64, seed=5)
    keys, values = cache.update(chunk, 2 * chunk, 0)
    assert torch.equal(keys[:, :, 16:], chunk)
    assert torch.equal(values[:, :, 16:], 2 * chunk)
    assert cache.layers[0].past[0].compressed_length == 40


def test_sinks_and_recent_tokens_stay_exact():
    cache = new(2, residual_length=13, sink_length=5)
    keys = random(2, 2, 0, 64)
    for seed, length in enumerate((3, 1, 40, 1, 1, 20)):
        chunk = random(2, 2, length, 64, seed=seed)
        keys = torch.cat([keys, chunk], dim=2)
        cache.update(chunk, -chunk, 0)
        kept = cache.layers[0].keys
        assert torch.equal(kept[:, :, :5], keys[:, :, :5])
        assert torch.equal(kept[:, :, -13:], keys[:, :, -13:])
        assert torch.equal(cache.layers[0].values[:, :, -13:], -keys[:, :, -13:])
    recent = cache.layers[0].past[0].recent.shape[2]
    assert 13 <= recent < 13 + 8
    assert cache.layers[0].past[0].sinks.shape[2] == 5
    assert recent + 5 + cache.layers[0].past[0].compressed_length == 66


@pytest.mark.parametrize(("key_dim", "value_dim", "heads"), [(64, 32, 1), (80, 96, 3), (512, 24, 1), (8, 8, 2)])
def test_any_widths_and_heads(oracle, key_dim, value_dim, heads):
    ours, dense = new(3), fake_cache(oracle, CONFIG, Shape(3, 3))
    for length, seed in ((30, 0), (1, 1), (17, 2)):
        keys, values = random(2, heads, length, key_dim, seed=seed), random(2, heads, length, value_dim, seed=seed + 9)
        ours.update(keys + 2, values, 1)
        dense.update(keys + 2, values, 1)
    layer, fake = ours.layers[1], dense.layers[1]
    check_states(layer.keys, fake.keys, fake.slack[0] + ROUNDING * fake.keys.double().norm(dim=3))
    check_states(layer.values, fake.values, fake.slack[1] + ROUNDING * fake.values.double().norm(dim=3))


def test_a_large_constant_in_the_keys_costs_nothing():
    """What breaks Qwen2-like models: with it taken off, codes are those of the keys without it."""
    keys = random(1, 2, 96, 64)
    constant = 300 * random(1, 2, 1, 64, seed=1)
    errors = []
    for shift in (0 * constant, constant):
        cache = new(4)
        cache.update(keys + shift, keys, 0)
        errors.append(float((cache.layers[0].keys - shift - keys).norm()))
    assert abs(errors[1] / errors[0] - 1) < 0.02


@pytest.mark.parametrize(("bits", "codec", "most"), [(8, "scalar", 0.15), (4, "trellis", 0.6)])
def test_states_that_are_not_finite_spoil_only_themselves(bits, codec, most):
    keys = random(2, 2, 60, 64)
    keys[0, :, 20] = torch.nan
    keys[0, :, 21, 3] = torch.inf
    cache = new(bits, codec=codec)
    cache.update(keys, keys, 0)
    kept = cache.layers[0].keys
    rest = torch.ones(60, dtype=torch.bool)
    rest[20:22] = False
    assert kept[0, :, 20].isnan().all()
    assert not kept[0, :, 21].isfinite().any()
    assert (kept[:, :, rest] - keys[:, :, rest]).abs().max() < most
    assert (kept[1] - keys[1]).abs().max() < most


def test_early_initialization_with_states_of_no_tokens():
    cache = new()
    cache.early_initialization(2, 2, 64, torch.float32, torch.device("cpu"))
    assert cache.is_initialized
    assert cache.get_seq_length() == 0
    assert cache.layers[0].keys.shape == (2, 2, 0, 64)
    cache.crop(0)
    cache.reorder_cache(torch.tensor([1, 0]))
    assert cache.get_mask_sizes(5, 0) == (5, 0)
    states = random(2, 2, 30, 64)
    returned, _ = cache.update(states, states, 0)
    assert torch.equal(returned, states)
    assert cache.get_seq_length() == 30
    cache.update(states[:, :, :0], states[:, :, :0], 0)
    assert cache.get_seq_length() == 30


def test_answers_to_transformers_questions():
    cache = new()
    assert isinstance(cache, DynamicCache)
    assert (cache.get_seq_length(), len(cache), cache.get_max_length()) == (0, 2, -1)
    cache.update(random(1, 2, 21, 64), random(1, 2, 21, 64), 0)
    assert cache.get_mask_sizes(3, 0) == (24, 0)
    assert cache.get_seq_length(0) == 21
    assert cache.is_croppable
    assert not cache.is_compileable
    assert cache.is_sliding == [False, False]
    cache.activate_past_recording()
    parts = list(cache)
    assert torch.equal(parts[0][0], cache.layers[0].keys)
    assert parts[1][:2] == (None, None)
    assert cache.layers[0].keys.data_ptr() != cache.layers[0].keys.data_ptr()  # decoded anew, never held


def test_our_layers_are_not_registered_for_others():
    assert all(not kind.__module__.startswith("tqsearch") for kind in DYNAMIC_LAYER_TYPE_MAPPING.values())
    assert not any(isinstance(layer, TurboQuantLayer) for layer in DynamicCache(config=CONFIG).layers)


def test_crop_of_nothing_of_all_and_of_more():
    cache = new()
    cache.crop(-3)  # before the first update
    for removed, left in ((0, 50), (-50, 0), (-80, 0)):
        cache.reset()
        for layer in range(2):
            cache.update(random(1, 2, 50, 64), random(1, 2, 50, 64), layer)
        before = cache.layers[0].keys
        cache.crop(removed)
        assert cache.get_seq_length() == left
        assert torch.equal(cache.layers[0].keys, before[:, :, :left])
    states = random(1, 2, 50, 64, seed=2)
    assert torch.equal(cache.update(states, states, 0)[0], states)


def test_crop_with_a_positive_number():
    cache = new()
    for layer in range(2):
        cache.update(random(1, 2, 50, 64), random(1, 2, 50, 64), layer)
    if LEGACY_CROP:  # the length to keep, before transformers 5.18
        cache.crop(20)
        assert cache.get_seq_length() == 20
        cache.crop(30)
        assert cache.get_seq_length() == 20
    else:
        with pytest.raises(InvalidInputError, match="got 20; use a number of at most 0"):
            cache.crop(20)
        assert cache.get_seq_length() == 50


def test_masks_and_negative_indices_select_as_the_library_does():
    states = random(3, 2, 40, 64)
    for index in (torch.tensor([True, False, True]), torch.tensor([-1, 0]), torch.tensor([2])):
        ours, library = new(8), DynamicCache(config=CONFIG)
        for cache in (ours, library):
            for layer in range(2):
                cache.update(states, states, layer)
            cache.batch_select_indices(index)
        expected = library.layers[0].keys
        assert ours.layers[0].keys.shape == expected.shape
        assert (ours.layers[0].keys - expected).abs().max() < 0.15


@pytest.mark.parametrize("options", [{}, {"codec": "trellis"}, {"outlier_channels": 4}, {"key_bits": 2.5}])
def test_a_batch_that_is_empty_or_becomes_so(options):
    """Nothing is all that can be returned, of the right shape, compressed or not."""
    cache, none = new(4, **options), random(0, 2, 40, 64)
    cache.update(none, none, 0)
    cache.update(random(2, 2, 40, 64), random(2, 2, 40, 64), 1)
    cache.batch_select_indices(torch.zeros(2, dtype=torch.bool))
    assert all(layer.past[0].compressed_length for layer in cache.layers)
    for layer in range(2):
        found = [cache.update(none, none, layer) for _ in range(2)][-1]
        assert [tuple(part.shape) for part in found] == [(0, 2, 120, 64)] * 2


def test_offloading_and_prefetching_keep_the_states():
    cache = new()
    cache.update(random(1, 2, 50, 64), random(1, 2, 50, 64), 0)
    layer, before = cache.layers[0], cache.layers[0].keys
    layer.offload()
    layer.prefetch()
    assert torch.equal(layer.keys, before)
    cache.layers[1].offload()  # not yet used
    cache.layers[1].prefetch()


def test_layers_follow_their_states_to_another_device():
    """On the meta device, as no second one is at hand: everything the cache holds goes there."""
    cache = new()
    cache.update(random(1, 2, 50, 64), random(1, 2, 50, 64), 0)
    states = torch.empty((1, 2, 3, 64), device="meta")
    layer = cache.layers[0]
    layer._matching(states)
    parts = [tensor for history in layer.past for tensor in history.tensors().values()]
    assert {tensor.device.type for tensor in parts} == {"meta"}
    assert layer.device.type == "meta"


def test_what_is_kept_holds_no_graph():
    cache = new()
    weight = torch.ones(64, requires_grad=True)
    for length in (3, 40, 1):
        keys, _ = cache.update(random(1, 2, length, 64) * weight, random(1, 2, length, 64) * weight, 0)
        assert keys.requires_grad
    parts = [tensor for history in cache.layers[0].past for tensor in history.tensors().values()]
    assert not any(tensor.requires_grad for tensor in parts)
    keys.sum().backward()
    assert weight.grad is not None


def test_a_copy_is_independent():
    cache = new()
    for layer in range(2):
        cache.update(random(1, 2, 50, 64), random(1, 2, 50, 64), layer)
    twin, before = copy.deepcopy(cache), cache.layers[0].keys
    twin.crop(-30)
    assert torch.equal(cache.layers[0].keys, before)
    assert torch.equal(twin.layers[0].keys, before[:, :, :20])


def test_states_that_do_not_go_with_the_past_are_refused():
    cache = new()
    cache.update(random(2, 2, 50, 64), random(2, 2, 50, 64), 0)
    with pytest.raises(
        InvalidInputError, match=r"states must be torch\.float32 as those in the cache, got torch\.bfloat16"
    ):
        cache.update(random(2, 2, 1, 64, dtype=torch.bfloat16), random(2, 2, 1, 64, dtype=torch.bfloat16), 0)
    with pytest.raises(InvalidInputError, match=r"got \(4, 2, 1, 64\); batch_repeat_interleave"):
        cache.update(random(4, 2, 1, 64), random(4, 2, 1, 64), 0)
    assert cache.get_seq_length() == 50
    with pytest.raises(InvalidInputError, match="keys of a compressed layer cannot be set"):
        cache.layers[0].keys = random(2, 2, 1, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 0}, "key_bits must be a number from 1 to 8, a BitPlan or None, got 0"),
        ({"bits": 9}, "got 9"),
        ({"bits": "4"}, "got '4'"),
        ({"bits": True}, "got True"),
        ({"value_bits": float("nan")}, "value_bits must be"),
        ({"residual_length": -1}, "residual_length must be an integer of at least 0, got -1"),
        ({"sink_length": 1.5}, "sink_length must be an integer of at least 0, got 1.5"),
        ({"block_length": 12}, "block_length must be a positive multiple of 8, got 12"),
        ({"block_length": 0}, "block_length must be a positive multiple of 8, got 0"),
        ({"protect_layers": -1}, "protect_layers must be an integer"),
        ({"backend": "cuda"}, "backend must be one of"),
        ({"seed": 1.5}, "seed must be an integer"),
        ({"codec": "lattice"}, "codec must be one of 'scalar', 'trellis', got 'lattice'"),
        ({"bits": 6, "codec": "trellis"}, "key_bits must be from 1 to 4, or 8, along a trellis, got 6; use codec"),
        ({"value_bits": 4.5, "codec": "trellis"}, "value_bits must be from 1 to 4, or 8, along a trellis, got 4.5"),
        ({"bits": BitPlan.of(64, 5), "codec": "trellis"}, "along a trellis, got 64 x 5 bit"),
        ({"policy": PerLayer((LayerBits(4, 4),))}, "the policy must name 2 layers that can be compressed, got 1"),
        ({"policy": 3}, r"policy must have a method bits\(layer, count\), got 3"),
        ({"policy": Uniform(None, None)}, "the policy leaves every layer alone"),
    ],
)
def test_wrong_arguments_are_refused_at_once(options, message):
    with pytest.raises(TQSearchError, match=message):
        TurboQuantCache(CONFIG, **options)


def test_a_model_in_place_of_its_configuration_is_refused():
    with pytest.raises(InvalidInputError, match=r"got LlamaForCausalLM; pass model\.config"):
        TurboQuantCache(families.make("llama"))


def test_widths_of_layers():
    config = families._config("LlamaConfig", head_dim=64, num_hidden_layers=5)

    def widths(**options):
        return [tuple(layer.settings.bits) for layer in TurboQuantCache(config, **options).layers]

    assert widths() == [(4, 4)] * 5
    assert widths(bits=2.5) == [(2.5, 2.5)] * 5
    assert widths(key_bits=3) == [(3, 4)] * 5
    assert widths(bits=3, value_bits=np.int64(2)) == [(3, 2)] * 5
    assert widths(bits=3, protect_layers=1) == [(8, 8), (3, 3), (3, 3), (3, 3), (8, 8)]
    assert widths(bits=3, protect_layers=9) == [(8, 8)] * 5
    plan = BitPlan.of(64, 3)
    assert widths(bits=plan) == [(plan, plan)] * 5
    chosen = tuple(LayerBits(width, None) for width in (1, 2, 3, 4, 5))
    assert widths(policy=PerLayer(chosen)) == list(chosen)


def test_protected_layers_are_counted_among_those_that_can_be_compressed():
    cache = TurboQuantCache(
        families._config("Gemma2Config", head_dim=64, num_hidden_layers=6, sliding_window=8, query_pre_attn_scalar=64),
        3,
        protect_layers=1,
    )
    widths = [layer.settings.bits.keys for layer in cache.layers if isinstance(layer, TurboQuantLayer)]
    assert widths == [8, 3, 8]


def test_keys_alone_may_be_compressed():
    cache = TurboQuantCache(CONFIG, policy=Uniform(2, None), residual_length=0, sink_length=0, block_length=8)
    states = random(1, 2, 40, 64)
    cache.update(states, states, 0)
    assert torch.equal(cache.layers[0].values, states)
    assert not torch.equal(cache.layers[0].keys, states)
    cache.layers[0].crop(-5)
    assert torch.equal(cache.layers[0].values, states[:, :, :35])
