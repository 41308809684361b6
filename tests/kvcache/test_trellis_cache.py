"""Keys and values coded along a trellis: the codes against their definition, and what goes with them."""

import warnings

import families
import numpy as np
import pytest
import torch
import trellis_oracle
from kv_oracle import inverse_rotation, pairs_of
from kv_trellis_oracle import nearest_levels
from test_outliers import CHANNELS, DIM, HEADS, keys_with_outliers
from test_store import states_of

from tqsearch.kvcache import TurboQuantCache, attention, compress
from tqsearch.kvcache.outliers import key_codec
from tqsearch.kvcache.store import ValueCodec, value_codec

DISTORTION = {1: 0.27416, 2: 0.0732, 3: 0.02172, 4: 0.00587}  # of N(0, 1), as the docstring of `trellis` says


def levels_of(packed, pairs):
    """(B, H, C, row bytes) to (B H C, D) float64, bit by bit."""
    rows = [row.tobytes() for row in packed.reshape(-1, packed.shape[3]).numpy()]
    return np.stack([trellis_oracle.levels_of(trellis_oracle.unpack(row, pairs), pairs) for row in rows])


@pytest.mark.parametrize(
    ("dim", "bits"), [(64, 1), (64, 2), (80, 3), (64, 4), (64, 2.5), (96, 3.25), (20, 1.5), (128, 2)]
)
@pytest.mark.parametrize("maker", [key_codec, value_codec])
def test_codes_scales_and_estimates(oracle, maker, dim, bits):
    block, seed = 8, 5
    states = states_of(dim, 2, 2, block, dim)
    offset = torch.randn((2, dim)) if maker is key_codec else None
    codec = maker(dim, bits, block, seed, "auto", codec="trellis")
    compressed = codec.encode(states, **({} if offset is None else {"offset": offset}))
    pairs = pairs_of(bits, dim)
    assert tuple(compressed.packed.shape) == (2, 2, block, trellis_oracle.row_bytes(pairs))
    assert tuple(compressed.packed.shape) == codec.packed_shape(2, 2, block)
    shift = 0.0 if offset is None else offset[:, None].double().expand(2, 2, block, dim).reshape(-1, dim).numpy()
    rest = states.reshape(-1, dim).double().numpy() - shift

    unit, levels = oracle.unit(rest, seed + (maker is value_codec)), levels_of(compressed.packed, pairs)
    least = ((unit - nearest_levels(unit, pairs)[0]) ** 2).sum(axis=1)
    np.testing.assert_allclose(((unit - levels) ** 2).sum(axis=1), least, rtol=1e-4)

    exact = np.linalg.norm(rest, axis=1) * np.sqrt(dim) / (unit * levels).sum(axis=1)
    scales = compressed.scales.reshape(-1).double().numpy()
    np.testing.assert_allclose(scales, exact, rtol=2**-11 + 1e-5)

    decoded = torch.empty_like(states)
    codec.decode(compressed, decoded)
    estimate = scales[:, None] * levels @ inverse_rotation(oracle, dim, seed + (maker is value_codec)) + shift
    error = np.linalg.norm(decoded.reshape(-1, dim).double().numpy() - estimate, axis=1)
    assert (error <= 1e-5 * (np.linalg.norm(estimate, axis=1) + 1)).all()


def test_outlier_channels_are_scalar_and_the_others_go_along_the_trellis(oracle):
    keys, where = keys_with_outliers(16)
    codec = key_codec(DIM, 3, 8, 2, "auto", CHANNELS, "trellis")
    constants = codec.estimate(keys)
    compressed = codec.encode(keys, **constants)
    decoded = torch.empty_like(keys)
    codec.decode(compressed, decoded)
    pairs = [(DIM - CHANNELS, 3)]
    cut = trellis_oracle.row_bytes(pairs)
    assert compressed.packed.shape[3] == cut + CHANNELS
    table = oracle.lloyd(8, DIM)[0] / (1 - oracle.distortion(8, DIM))
    for head in range(HEADS):
        packed = compressed.packed[:, head, None]
        others = levels_of(packed[..., :cut], pairs) / (1 - DISTORTION[3])
        wide = table[packed[..., cut:].reshape(-1, CHANNELS).long().numpy()]
        scales = compressed.scales[:, head].double().numpy().reshape(-1, 1)
        back = np.concatenate(
            [
                scales * wide @ oracle.rotate(np.eye(CHANNELS), 2).T,
                scales * others @ oracle.rotate(np.eye(DIM - CHANNELS), 2).T,
            ],
            axis=1,
        )
        wanted, order = np.empty_like(back), constants["order"][head].long().numpy()
        assert set(order[:CHANNELS]) == set(where[head])
        wanted[:, order] = back
        wanted = wanted * constants["gain"][head].double().numpy() + constants["offset"][head].double().numpy()
        assert np.abs(decoded[:, head].reshape(-1, DIM).double().numpy() - wanted).max() < 1e-3
    assert ((decoded - keys).square().mean() / (keys - 5).square().mean()) < 0.001


def test_eight_bits_are_the_scalar_codes():
    config = families._config("LlamaConfig", head_dim=64, num_hidden_layers=3)
    states = states_of(3, 1, 2, 60, 64)
    caches = [
        TurboQuantCache(config, 3, codec=codec, protect_layers=1, residual_length=8, block_length=8)
        for codec in ("scalar", "trellis")
    ]
    for cache in caches:
        for layer in range(3):
            cache.update(states, states, layer)
    for layer, same in ((0, True), (1, False), (2, True)):
        for mine, other in zip(*(cache.layers[layer].past for cache in caches), strict=True):
            assert torch.equal(mine.compressed.packed.flatten(), other.compressed.packed.flatten()) == same
    note = "keys 3.0 along a trellis, values 3.0 along a trellis"
    assert [layer.note for layer in caches[1].report().layers] == ["keys 8.0, values 8.0", note, "keys 8.0, values 8.0"]


@pytest.mark.parametrize("bits", [(2, 2), (2, 8), (8, 2)], ids=str)
def test_attention_from_the_codes_gives_way_with_a_warning(bits):
    """No kernel reads these codes: the layers decode them, and say so once."""
    attention.register()
    model, ids = families.make("llama"), families.tokens(2, 50)
    logits = []
    for implementation in ("sdpa", attention.NAME):
        model.set_attn_implementation(implementation)
        options = {"key_bits": bits[0], "value_bits": bits[1], "codec": "trellis"}
        cache = TurboQuantCache(model.config, **options, residual_length=8, block_length=8)
        attention._warned.clear()
        with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model(ids[:, :40], past_key_values=cache)
            logits.append([model(ids[:, 40 + i : 41 + i], past_key_values=cache).logits for i in range(10)])
        told = [str(warning.message) for warning in caught if "trellis codes" in str(warning.message)]
        assert len(told) == (implementation == attention.NAME)
    for exact, found in zip(*logits, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)
    kinds = {type(layer.past[1].codec) is ValueCodec for layer in cache.layers}
    assert kinds == {bits[1] == 8}


def test_compress_takes_the_codec():
    model, ids = families.make("llama"), families.tokens(1, 30)
    options = {"residual_length": 8, "block_length": 8}
    compress(model, 1, codec="trellis", **options)
    found = model.generate(ids, max_new_tokens=20, do_sample=False)
    compress(model, None)
    wanted = {
        codec: model.generate(
            ids,
            max_new_tokens=20,
            do_sample=False,
            past_key_values=TurboQuantCache(model.config, 1, codec=codec, **options),
        )
        for codec in ("scalar", "trellis")
    }
    assert torch.equal(found, wanted["trellis"])
    assert not torch.equal(found, wanted["scalar"])
