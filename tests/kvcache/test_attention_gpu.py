"""Compressed caches on a GPU: attention by the compiled kernels, nothing that waits, layers on the CPU in between."""

import families
import pytest
import torch
from transformers import AttentionInterface

from tqsearch.kvcache import TurboQuantCache, compress, replay
from tqsearch.kvcache import attention as plug
from tqsearch.kvcache.layer import TurboQuantLayer
from tqsearch.kvcache.outliers import key_codec
from tqsearch.kvcache.store import value_codec

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("levels_on_the_grid"),
]
STEPS = (70, 1, 1, 5, 1, 30, 1, 1)
NO_CODES = {"deepseek-v3"}  # latents are compressed, RoPE keys are not: there is no pair
# Of a layer and its largest value, what rounding adds. Weights have 15 bits in each block; their errors add up to this.
WEIGHTS = 5e-4
# A query's coordinates are rounded to |q| / 16256, so a logit's standard error is this part of scaling |q| |k|.
LOGITS = 1 / (16256 * 12**0.5)


def cache_of(model, **options):
    return TurboQuantCache(model.config, residual_length=8, sink_length=4, block_length=32, **options)


def attended(query, keys, values, mask, scaling, softcap, s_aux, window):
    """softmax(scaling <q, k>) v by its definition, in float64: (B, Tq, Hq, D)."""
    keys, values = (part.double().repeat_interleave(query.shape[1] // part.shape[1], 1) for part in (keys, values))
    logits = query.double() @ keys.transpose(2, 3) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    token = torch.arange(keys.shape[2], device=query.device)
    place = token[-query.shape[2] :, None]
    seen = (token <= place) & (token > place - (window or len(token))) if mask is None else mask
    assert seen.dtype == torch.bool
    logits = logits.masked_fill(~seen, -torch.inf)
    if s_aux is not None:
        logits = torch.cat([logits, s_aux.double().view(1, -1, 1, 1).expand(*logits.shape[:3], 1)], dim=3)
    weights = torch.softmax(logits, dim=3).nan_to_num(0.0)
    return (weights[..., : keys.shape[2]] @ values).transpose(1, 2)


@pytest.mark.parametrize("bits", [(4, 4), (3, 2.5)])
@pytest.mark.parametrize("name", families.CONFIGS)
@torch.no_grad()
def test_every_layer(name, bits, monkeypatch):
    """Of each call from the codes: left padding, a first prompt, single tokens, drafts, a long chunk.

    Not the logits of two ways beside each other: those encode states that differ by rounding, some codes fall to the
    other side of a boundary, and what follows differs by as much as another code makes, up to 3e-2.
    """
    monkeypatch.setattr(plug, "_warned", {"way with keys or values alone"} if name in NO_CODES else set())
    errors = []

    def compared(
        module, query, key, value, mask, scaling=None, softcap=None, s_aux=None, sliding_window=None, **kwargs
    ):
        options = {"scaling": scaling, "softcap": softcap, "s_aux": s_aux, "sliding_window": sliding_window}
        out, weights = plug.attention_forward(module, query, key, value, mask, **options)
        if isinstance(key, plug.CompressedTensor):
            scaling = query.shape[3] ** -0.5 if scaling is None else scaling
            seen = None if mask is None else mask[..., : key.shape[2]]
            keys, values = key.decoded(), value.decoded()
            exact = attended(query, keys, values, seen, scaling, softcap, s_aux, sliding_window)
            assert torch.isfinite(out).all()
            largest = scaling * query.norm(dim=3).max() * keys.norm(dim=3).max()
            errors.append((((out - exact).abs().max() / values.abs().max()).item(), largest.item()))
        return out, weights

    model = families.make(name).cuda()
    widths = {"key_bits": bits[0], "value_bits": bits[0] if name in NO_CODES else bits[1]}
    model.set_attn_implementation(plug.NAME)
    cache = cache_of(model, **widths)
    ids = families.tokens(2, sum(STEPS)).cuda()
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    start = 0
    with monkeypatch.context() as patched:
        patched.setitem(AttentionInterface._global_mapping, plug.NAME, compared)
        for step in STEPS:
            stop = start + step
            model(input_ids=ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache)
            start = stop
    layers = [layer for layer in cache.layers if isinstance(layer, TurboQuantLayer)]
    assert len(errors) == (0 if name in NO_CODES else len(layers) * (len(STEPS) - 1))
    wrong = [(error, largest) for error, largest in errors if error > WEIGHTS + LOGITS * largest]
    assert not wrong


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("bits", [4, 3, 2, 8])
@torch.no_grad()
def test_a_step_waits_for_nothing(bits):
    """Neither a token nor a block that is full makes the host wait, once the first blocks have been compressed."""
    model = families.make("llama").cuda()
    model.set_attn_implementation(plug.NAME)
    cache = cache_of(model, bits=bits)
    ids = families.tokens(2, 200).cuda()
    for start, stop in ((0, 100), *((at, at + 1) for at in range(100, 140))):  # kernels are compiled here
        model(ids[:, start:stop], past_key_values=cache)
    before = cache.layers[0].past[0].compressed_length
    places = torch.arange(200, device="cuda")[None].expand(2, -1)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for at in range(140, 200):
            model(ids[:, at : at + 1], position_ids=places[:, at : at + 1], past_key_values=cache)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert cache.layers[0].past[0].compressed_length > before
    assert torch.isfinite(model(ids[:, -1:], past_key_values=cache).logits).all()


@pytest.mark.parametrize("implementation", ["sdpa", plug.NAME])
@torch.no_grad()
def test_offloading_changes_nothing(implementation):
    """The tokens and the logits are those of a cache that stays; layers not in use are on the CPU."""
    model = families.make("llama").cuda()
    model.set_attn_implementation(implementation)
    ids = families.tokens(2, 90).cuda()
    found = []
    for offloading in (False, True):
        cache = cache_of(model, offloading=offloading)
        found.append(
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=cache,
                max_new_tokens=40,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        )
    torch.cuda.synchronize()
    stays, goes = found
    assert torch.equal(stays.sequences, goes.sequences)
    assert all(torch.equal(*pair) for pair in zip(stays.logits, goes.logits, strict=True))
    layers = [layer for layer in cache.layers if isinstance(layer, TurboQuantLayer)]
    devices = [{part.device.type for history in layer.past for part in history.tensors().values()} for layer in layers]
    assert {"cpu"} in devices


@torch.no_grad()
def test_blocks_that_have_not_changed_are_not_copied_back():
    model = families.make("llama").cuda()
    model.set_attn_implementation(plug.NAME)
    cache = cache_of(model, offloading=True)
    ids = families.tokens(1, 90).cuda()
    model(ids[:, :80], past_key_values=cache)
    blocks = cache.layers[1].past[0].compressed
    assert blocks.packed.device.type == "cpu"
    model(ids[:, 80:81], past_key_values=cache)
    assert cache.layers[1].past[0].compressed is blocks
    for at in range(81, 90):
        model(ids[:, at : at + 1], past_key_values=cache)
    model(families.tokens(1, 40).cuda(), past_key_values=cache)
    assert len(cache.layers[1].past[0].compressed) > len(blocks)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@torch.no_grad()
def test_blocks_encoded_in_one_launch_decode_as_those_of_many(dim, dtype):
    """The kernel's blocks against plain torch's: a code may differ where a coordinate lies on a boundary."""
    states = torch.randn((2, 3, 256, dim), generator=torch.Generator().manual_seed(1)).to(dtype).cuda() * 5
    for codec in (key_codec, value_codec):
        one, many = (codec(dim, 3, 128, 0, backend) for backend in ("triton", "reference"))
        constants = one.estimate(states)
        decoded = []
        for coder in (one, many):
            compressed = coder.encode(states, **constants)
            assert compressed.scales.dtype == torch.float16
            decoded.append(torch.empty_like(states, dtype=torch.float32))
            coder.decode(compressed, decoded[-1])
        equal = ((decoded[0] - decoded[1]).norm(dim=3) <= 2e-3 * decoded[1].norm(dim=3)).float().mean()
        assert equal > 0.98
        norms = [((part - states.float()).norm() / states.float().norm()).item() for part in decoded]
        assert abs(norms[0] - norms[1]) < 1e-3 * norms[1]


@pytest.mark.parametrize("name", ["llama", "gpt-oss"])
def test_compress_sets_attention_and_puts_it_back(name, monkeypatch):
    """And lets steps be replayed, where the model's layers are such and nobody forbids it."""
    recorded, real = [], replay.GraphRecorder.record
    monkeypatch.setattr(replay.GraphRecorder, "record", lambda self, call: recorded.append(1) or real(self, call))
    model = families.make(name).cuda()
    own = model.config._attn_implementation
    ids = families.tokens(2, 90).cuda()
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 20, "do_sample": False}
    decoded = model.generate(ids, past_key_values=cache_of(model, bits=8), **options)
    for refused in ({"codec": "trellis", "bits": 4}, {"outlier_channels": 4}, {"backend": "reference"}):
        compress(model, **refused)
        assert model.config._attn_implementation == own
    for _ in range(2):
        compress(model, 8, residual_length=8, sink_length=4, block_length=32)
        assert model.config._attn_implementation == plug.NAME
    assert torch.equal(model.generate(ids, disable_compile=True, **options), decoded)
    assert not recorded
    assert torch.equal(model.generate(ids, **options), decoded)
    assert bool(recorded) == (name == "llama")
    compress(model, None)
    assert model.config._attn_implementation == own


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
@pytest.mark.parametrize("implementation", ["sdpa", plug.NAME])
@torch.no_grad()
def test_layers_on_two_devices(implementation):
    """Each layer's cache follows its layer; the logits are those of one device."""
    ids = families.tokens(2, 120)
    found = []
    for second in ("cuda:0", "cuda:1"):
        model = families.make("llama")
        model.set_attn_implementation(implementation)
        decoder = model.model
        for part in (decoder.embed_tokens, decoder.layers[0], decoder.rotary_emb):
            part.to("cuda:0")
        for part in (decoder.layers[1], decoder.norm, model.lm_head):
            part.to(second)

        def moved(module, args, kwargs, device=second):
            pairs = [part.to(device) for part in kwargs["position_embeddings"]]
            mask = kwargs.get("attention_mask")
            return (args[0].to(device), *args[1:]), {
                **kwargs,
                "position_embeddings": tuple(pairs),
                "attention_mask": None if mask is None else mask.to(device),
            }

        decoder.layers[1].register_forward_pre_hook(moved, with_kwargs=True)
        cache, logits = cache_of(model), []
        mask = torch.ones_like(ids)
        mask[0, :6] = 0
        for start, stop in ((0, 70), *((at, at + 1) for at in range(70, 80)), (80, 120)):
            inputs = {"input_ids": ids[:, start:stop], "attention_mask": mask[:, :stop]}
            out = model(**{name: part.to("cuda:0") for name, part in inputs.items()}, past_key_values=cache)
            logits.append(out.logits[:, -1].cpu())
        found.append(torch.stack(logits))
        assert cache.layers[0].past[0].compressed.packed.device == torch.device("cuda:0")
        assert cache.layers[1].past[0].compressed.packed.device == torch.device(second)
    assert torch.equal(*found)
