"""Attention tile by tile against its definition in numpy float64, and how much of a past it decodes at a time."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from tqsearch.kvcache import attention as plug
from tqsearch.kvcache import tiles
from tqsearch.kvcache.history import History
from tqsearch.kvcache.outliers import key_codec
from tqsearch.kvcache.store import value_codec


def definition(query, keys, values, scaling, mask, softcap, s_aux, window):
    """softmax of the logits, query by query."""
    batch, query_heads, count, _ = query.shape
    group, length = query_heads // keys.shape[1], keys.shape[2]
    out = np.zeros((batch, count, query_heads, values.shape[3]))
    for b in range(batch):
        for head in range(query_heads):
            for i in range(count):
                place = length - count + i
                logits = keys[b, head // group] @ query[b, head, i] * scaling
                if softcap is not None:
                    logits = softcap * np.tanh(logits / softcap)
                token = np.arange(length)
                seen = token <= place if mask is None else np.ones(length, bool)
                if mask is not None and mask.dtype == bool:
                    seen = mask[b, 0, i]
                elif mask is not None:
                    logits = logits + mask[b, 0, i]
                if window is not None:
                    seen = seen & (token > place - window)
                logits = np.where(seen, logits, -np.inf)
                aux = [] if s_aux is None else [s_aux[head]]
                weights = np.exp(np.concatenate([logits, aux]) - max([*logits, *aux]))
                out[b, i, head] = weights[:length] / weights.sum() @ values[b, head // group]
    return out


@pytest.mark.parametrize("option", ["", "bool", "added", "softcap", "s_aux", "window"])
def test_against_the_definition(option, rng):
    batch, heads, group, count, length = 2, 2, 3, 5, 41
    query = rng.standard_normal((batch, heads * group, count, 16))
    keys, values = rng.standard_normal((batch, heads, length, 16)) * 3, rng.standard_normal((batch, heads, length, 24))
    mask = s_aux = None
    if option == "bool":
        mask = rng.random((batch, 1, count, length)) < 0.3
        mask[..., -1] = True
        mask[0, 0, 0, :30] = False  # whole tiles unseen
    elif option == "added":
        mask = rng.standard_normal((batch, 1, count, length))
    elif option == "s_aux":
        s_aux = rng.standard_normal(heads * group) * 4
    window = 9 if option == "window" else None
    softcap = 2.0 if option == "softcap" else None
    expected = definition(query, keys, values, 0.4, mask, softcap, s_aux, window)

    def tensor(array):
        if array is None:
            return None
        return torch.from_numpy(array) if array.dtype == bool else torch.from_numpy(array).float()

    for cuts in ([0, 41], [0, 4, 4, 20, 33, 41]):
        pieces = [(tensor(keys[:, :, start:stop]), tensor(values[:, :, start:stop])) for start, stop in pairwise(cuts)]
        found = tiles.attention(
            tensor(query),
            pieces,
            length,
            scaling=0.4,
            mask=tensor(mask),
            softcap=softcap,
            s_aux=tensor(s_aux),
            sliding_window=window,
        )
        np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=2e-5)


def test_a_long_chunk_decodes_a_tile_at_a_time(monkeypatch):
    """Never the whole past; and what it finds is attention to the whole past."""
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn((1, 2, 500, 64), generator=generator) for _ in range(2)]
    codecs = (key_codec(64, 4, 32, 0, "auto"), value_codec(64, 4, 32, 0, "auto"))
    pasts = [
        History.empty(part, codec).append(part[:, :, :460], 4).compress(8).append(part[:, :, 460:], 4)
        for part, codec in zip(states, codecs, strict=True)
    ]
    dense = [past.decode() for past in pasts]
    query = torch.randn((1, 4, 40, 64), generator=generator)
    monkeypatch.setattr(tiles, "TILE", 2 * 64 * 64)
    decoded = []
    real = History.decoded
    monkeypatch.setattr(History, "decode", lambda past: pytest.fail("the whole past was decoded"))
    monkeypatch.setattr(History, "decoded", lambda past, a, b: decoded.append(b - a) or real(past, a, b))
    module = torch.nn.Module()
    tensors = plug.states_of(*pasts, "auto")
    out, _ = plug.attention_forward(module, query, *tensors, None)
    assert max(decoded) == 64
    assert sum(decoded) == 2 * 448
    arrays = [part.double().numpy() for part in (query, *dense)]
    np.testing.assert_allclose(out.numpy(), definition(*arrays, 1 / 8, None, None, None, None), rtol=0, atol=2e-5)


@pytest.mark.usefixtures("levels_on_the_grid")
@pytest.mark.parametrize("masked", [False, True])
def test_a_long_chunk_by_the_kernel(masked, monkeypatch, rng):
    """Some queries a launch: each launch sees the tokens up to its last query, and no later one."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    monkeypatch.setattr(plug, "MANY_QUERIES", 8)
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn((1, 1, 120, 64), generator=generator).to(device) for _ in range(2)]
    pasts = [
        History.empty(part, codec(64, 2, 32, 0, "triton")).append(part[:, :, :100], 4).compress(8)
        for part, codec in zip(states, (key_codec, value_codec), strict=True)
    ]
    pasts = [past.append(part[:, :, 100:], 4) for past, part in zip(pasts, states, strict=True)]
    query = torch.randn((1, 2, 20, 64), generator=generator)
    mask = None
    if masked:
        mask = rng.random((1, 1, 20, 120)) < 0.5
        mask &= np.arange(120) <= np.arange(100, 120)[:, None]
        mask[..., 0] = True
    tensors = plug.states_of(*pasts, "triton")
    assert type(tensors[0]) is plug.CompressedTensor
    given = None if mask is None else torch.from_numpy(mask).to(device)
    out, _ = plug.attention_forward(torch.nn.Module(), query.to(device), *tensors, given)
    dense = [past.decode().cpu().double().numpy() for past in pasts]
    expected = definition(query.double().numpy(), *dense, 1 / 8, mask, None, None, None)
    # What rounding queries and weights to 15 bits leaves: see docs/attention.md.
    assert np.abs(out.cpu().numpy() - expected).max() < 1e-3 * np.abs(expected).max()
    assert pasts[0].compressed_length == 64
