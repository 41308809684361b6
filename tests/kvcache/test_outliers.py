"""Outlier channels against numpy float64, and what they are for."""

import families
import numpy as np
import pytest
import torch
from test_store import read_key_codes

from tqsearch.errors import InvalidInputError
from tqsearch.kvcache import TurboQuantCache
from tqsearch.kvcache.outliers import key_codec
from tqsearch.plan import BitPlan

HEADS, DIM, CHANNELS = 2, 64, 8


def keys_with_outliers(length, seed=0):
    """Keys (2, HEADS, length, DIM) with eight large channels, other ones for each head, and a constant."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn((2, HEADS, length, DIM), generator=generator)
    where = [[3, 60, 7, 11, 30, 31, 1, 0], [5, 6, 20, 21, 22, 40, 41, 63]]
    for head, channels in enumerate(where):
        keys[:, head, :, channels] *= 20
    return keys + 5, where


def test_estimates_are_the_definitions(oracle):
    keys, where = keys_with_outliers(64)
    codec = key_codec(DIM, 3, 8, 2, "auto", CHANNELS)
    constants = codec.estimate(keys)
    compressed = codec.encode(keys, **constants)
    decoded = torch.empty_like(keys)
    codec.decode(compressed, decoded)
    pairs = [(CHANNELS, 8), (DIM - CHANNELS, 3)]
    codes = read_key_codes(compressed.packed, pairs, 8).reshape(2, HEADS, 64, DIM)
    scales = compressed.scales.double().numpy()
    for head in range(HEADS):
        rows = keys[:, head].reshape(-1, DIM).double().numpy()
        mean = rows.mean(axis=0)
        variance = ((rows - mean) ** 2).mean(axis=0)
        order = constants["order"][head].long().numpy()
        assert sorted(order) == list(range(DIM))
        assert set(order[:CHANNELS]) == set(where[head])
        assert (np.diff(variance[order]) <= 1e-3).all()
        gain = np.ones(DIM)
        gain[order[:CHANNELS]] = np.sqrt(variance[order[:CHANNELS]].mean() / variance[order[CHANNELS:]].mean())
        np.testing.assert_allclose(constants["gain"][head].numpy(), gain, rtol=1e-5)
        np.testing.assert_allclose(constants["offset"][head].numpy(), mean, rtol=1e-5, atol=1e-5)

        coded = ((rows - mean) / gain)[:, order]
        unit = np.concatenate(
            [oracle.rotate(coded[:, :CHANNELS], 2), oracle.rotate(coded[:, CHANNELS:], 2)], axis=1
        ) * (np.sqrt(DIM) / np.linalg.norm(coded, axis=1, keepdims=True))
        found = codes[:, head].reshape(-1, DIM)
        tables = list(oracle.tables(pairs, DIM))
        assert oracle.count_wrong_codes(found, unit, tables, 1e-3) <= 3

        np.testing.assert_allclose(
            scales[:, head].reshape(-1), np.linalg.norm(coded, axis=1) / np.sqrt(DIM), rtol=2**-11 + 1e-5
        )
        levels = np.concatenate(
            [
                table[found[:, band]] / (1 - oracle.distortion(width, DIM))
                for (band, table, _), (_, width) in zip(tables, pairs, strict=True)
            ],
            axis=1,
        )
        estimate = levels * scales[:, head].reshape(-1, 1)
        back = np.concatenate(
            [
                estimate[:, :CHANNELS] @ oracle.rotate(np.eye(CHANNELS), 2).T,
                estimate[:, CHANNELS:] @ oracle.rotate(np.eye(DIM - CHANNELS), 2).T,
            ],
            axis=1,
        )
        wanted = np.empty_like(back)
        wanted[:, order] = back
        wanted = wanted * gain + mean
        actual = decoded[:, head].reshape(-1, DIM).double().numpy()
        assert np.abs(actual - wanted).max() < 1e-3


@pytest.mark.parametrize("bits", [2, 3, 2.5])
def test_they_take_the_outliers_error_away(bits):
    """Eight channels of 64, 20 times as large, hold 98 % of the energy: coded apart, the rest's error is its own."""
    keys, _ = keys_with_outliers(256)
    errors = []
    for channels in (0, CHANNELS):
        codec = key_codec(DIM, bits, 8, 0, "auto", channels)
        decoded = torch.empty_like(keys)
        codec.decode(codec.encode(keys, **codec.estimate(keys)), decoded)
        errors.append(float(((decoded - keys) ** 2).mean()))
    assert errors[1] < 0.03 * errors[0]


def test_equal_channels_and_constant_keys_are_no_special_case():
    codec = key_codec(DIM, 4, 8, 0, "auto", CHANNELS)
    for keys in (torch.full((1, 1, 16, DIM), 3.0), torch.zeros((1, 1, 16, DIM)), torch.eye(DIM)[None, None, :16] + 1):
        decoded = torch.full_like(keys, torch.nan)
        codec.decode(codec.encode(keys, **codec.estimate(keys)), decoded)
        assert (decoded - keys).abs().max() < 0.25


def test_a_cache_with_outlier_channels_grows_crops_and_is_saved(tmp_path):
    config = families.CONFIGS["llama"]()
    cache = TurboQuantCache(config, 3, outlier_channels=CHANNELS, residual_length=8, block_length=8)
    keys, _ = keys_with_outliers(100)
    for start, stop in ((0, 60), (60, 61), (61, 100)):
        for layer in range(2):
            cache.update(keys[:, :, start:stop], keys[:, :, start:stop], layer)
    before = cache.layers[0].keys
    # Were the constants not the first ones for all blocks, some block would be far off.
    error = (before - keys).norm(dim=3) / (keys - 5).norm(dim=3)
    assert error.max() < 0.1
    cache.save(tmp_path / "file")
    cache.crop(-57)
    assert torch.equal(cache.layers[0].keys, before[:, :, :43])
    loaded = TurboQuantCache.load(tmp_path / "file", config)
    assert torch.equal(loaded.layers[0].keys, before)
    assert loaded.layers[0].settings == cache.layers[0].settings
    plan = "8 x 8 bit + 56 x 3 bit"
    assert str(loaded.layers[0].past[0].codec.plan) == plan
    assert str(loaded.layers[0].past[1].codec.plan) == "64 x 3 bit"


def test_what_does_not_go_together_is_refused():
    with pytest.raises(InvalidInputError, match="must be less than the head dimension 64, got 64"):
        key_codec(DIM, 4, 8, 0, "auto", 64)
    with pytest.raises(InvalidInputError, match="must be a number with outlier_channels, got a BitPlan"):
        key_codec(DIM, BitPlan.of(DIM, 3), 8, 0, "auto", 8)
    with pytest.raises(InvalidInputError, match="outlier_channels must be an integer of at least 0, got -1"):
        TurboQuantCache(families.CONFIGS["llama"](), 4, outlier_channels=-1)
