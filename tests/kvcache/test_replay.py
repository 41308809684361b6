"""Replayed decoding steps against the same steps one by one: CUDA graphs on a GPU, else steps that are called again.

What a recorded step must not depend on raises in either: the cache's length and states on the host, and numbers on the
device.
"""

import functools
import threading
import warnings
from contextlib import nullcontext

import families
import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from tqsearch.kvcache import TurboQuantCache
from tqsearch.kvcache import attention as plug
from tqsearch.kvcache.replay import GraphRecorder, replaying

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK, RESIDUAL, PROMPT = 32, 8, 60
REPLAYED = {"llama", "llama-mqa", "qwen2", "qwen3", "mistral", "phi3", "gpt2", "gpt-neox"}


class Counted:
    """Counts; without a GPU a recording is the call itself."""

    def __init__(self):
        self.recorded = self.replayed = 0
        self.graphs = GraphRecorder(torch.device("cuda:0")) if DEVICE == "cuda" else None

    def record(self, call):
        self.recorded += 1
        again = call if self.graphs is None else self.graphs.record(call)

        def replay():
            self.replayed += 1
            return again()

        return replay


def make(name):
    return families.make(name).to(DEVICE)


def tokens(batch, length, seed=0):
    return families.tokens(batch, length, seed).to(DEVICE)


def cache_of(model):
    model.set_attn_implementation(plug.NAME)
    return TurboQuantCache(model.config, bits=8, residual_length=RESIDUAL, sink_length=4, block_length=BLOCK)


def generate(model, recorder=None, padding=0, count=60, batch=2, **options):
    """What `generate` returns, and its cache.

    With a recorder each step is checked against the model's own forward over a fork of the cache, so that both read
    the same codes: of states that differ by rounding one in some thousand would be another.
    """
    cache = cache_of(model)
    ids = tokens(batch, PROMPT)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    with nullcontext() if recorder is None else replaying(model, recorder):
        if "forward" in vars(model):
            vars(model)["forward"] = checked(model, model.forward)
        out = model.generate(
            ids,
            attention_mask=mask,
            past_key_values=cache,
            output_logits=True,
            return_dict_in_generate=True,
            **{"max_new_tokens": count, "do_sample": False, **options},
        )
    assert "forward" not in vars(model)
    return out, cache


def checked(model, forward):
    """A forward, and the model's own over a fork of the cache beside it."""

    @functools.wraps(forward)
    def both(**inputs):
        branch = inputs["past_key_values"].fork()
        expected = type(model).forward(model, **{**inputs, "past_key_values": branch}).logits
        out = forward(**inputs)
        assert torch.isfinite(out.logits).all()
        assert (out.logits - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert inputs["past_key_values"].get_seq_length() == branch.get_seq_length()
        return out

    return both


@pytest.mark.parametrize("padding", [0, 6])
@pytest.mark.parametrize("name", [name for name in families.CONFIGS if name != "deepseek-v3"])
def test_families(name, padding):
    """Some 60 steps, in which two blocks are compressed; models with other layers run step by step."""
    model, again = make(name), Counted()
    _, cache = generate(model, again, padding)
    if name in REPLAYED:
        assert again.recorded == 3
        # One step a block is not replayed, and the second one of all is looked at besides.
        assert again.replayed == 59 - 3 - 1
    else:
        assert not again.recorded
    assert cache.get_seq_length() == PROMPT + 59


def test_the_cache_is_left_as_by_steps_one_by_one():
    """Whatever is done with it afterwards; also its memory is what it says."""
    model = make("llama")
    _, plain = generate(model)
    _, cache = generate(model, Counted())
    for one, other in zip(cache.layers, plain.layers, strict=True):
        for found, wanted in zip(one.past, other.past, strict=True):
            sizes = [{name: part.shape for name, part in each.tensors().items()} for each in (found, wanted)]
            assert sizes[0] == sizes[1]
            assert all(part.untyped_storage().nbytes() == part.nbytes for part in found.tensors().values())
            assert (found.decode() - wanted.decode()).abs().max() <= 0.02 * wanted.decode().abs().max()
    before = cache.layers[1].keys[:, :, :70]
    cache.crop(70 - cache.get_seq_length())
    assert cache.get_seq_length() == 70
    assert torch.equal(cache.layers[1].keys[:, :, :64], before[:, :, :64])


def test_sampling():
    model, found, again = make("llama"), [], Counted()
    for recorder in (None, again):
        torch.manual_seed(5)
        found.append(generate(model, recorder, do_sample=True)[0].sequences)
    assert torch.equal(*found)
    assert again.replayed


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3, "batch": 1}])
def test_what_changes_the_cache_between_steps_runs_step_by_step(options):
    model, again = make("llama"), Counted()
    expected, _ = generate(model, **options)
    actual, _ = generate(model, again, **options)
    assert torch.equal(actual.sequences, expected.sequences)
    assert again.replayed < 5


class Branching(BaseStreamer):
    """Forks the cache in the midst, and lets the branch go its own way at once."""

    def __init__(self, model):
        self.model, self.cache, self.count, self.logits = model, None, 0, None

    def put(self, value):
        self.count += 1
        if self.count == 20:
            branch = self.cache.fork()
            own = type(self.model).forward
            with torch.no_grad():
                self.logits = own(self.model, tokens(1, 3, seed=9), past_key_values=branch).logits
                self.length = branch.get_seq_length()

    def end(self):
        pass


def test_a_fork_in_the_midst_goes_its_own_way():
    model, found = make("llama"), []
    model.set_attn_implementation(plug.NAME)
    ids = tokens(1, PROMPT)
    for again in (None, Counted()):
        cache = cache_of(model)
        streamer = Branching(model)
        streamer.cache = cache
        options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 60}
        with nullcontext() if again is None else replaying(model, again):
            found.append((model.generate(ids, past_key_values=cache, streamer=streamer, **options), streamer))
    (wanted, plain), (actual, forked) = found
    assert torch.equal(actual, wanted)
    assert forked.length == plain.length
    assert (forked.logits - plain.logits).abs().max() <= 1e-4 * plain.logits.abs().max()
    assert again.replayed > 30


class Beside(BaseStreamer):
    """Has another thread generate with the same model, in the midst."""

    def __init__(self, model):
        self.model, self.count, self.found = model, 0, []

    def put(self, value):
        self.count += 1
        if self.count == 20:
            thread = threading.Thread(target=self.generate)
            thread.start()
            thread.join()

    def generate(self):
        ids, cache = tokens(1, PROMPT), cache_of(self.model)
        with replaying(self.model, Counted()):
            found = self.model.generate(ids, past_key_values=cache, max_new_tokens=60, do_sample=False)
        self.found.append(found)

    def end(self):
        pass


def test_another_thread_in_the_midst():
    model, counted = make("llama"), Counted()
    wanted, _ = generate(model, batch=1)
    streamer = Beside(model)
    found, _ = generate(model, counted, batch=1, streamer=streamer)
    assert torch.equal(found.sequences, wanted.sequences)
    assert torch.equal(streamer.found[0], wanted.sequences)
    assert counted.replayed == 59 - 3 - 1


@pytest.mark.parametrize("kind", ["length", "number", "hidden states"])
def test_what_cannot_be_recorded_runs_step_by_step_and_is_said_once(kind, monkeypatch):
    model, again, options = make("llama"), Counted(), {}
    attention = model.model.layers[1].self_attn
    own = attention.forward

    def asks(hidden_states, *args, **kwargs):
        cache = kwargs["past_key_values"]
        count = cache.get_seq_length(1) if kind == "length" else int(hidden_states.isnan().sum())
        out, weights = own(hidden_states, *args, **kwargs)
        return out * (1.0 + 0.01 * count), weights

    if kind == "hidden states":
        options["output_hidden_states"] = True
    else:
        monkeypatch.setattr(attention, "forward", asks)
    expected, plain = generate(model, count=40, **options)
    with pytest.warns(UserWarning, match="are not recorded and replayed") as said:
        actual, cache = generate(model, again, count=40, **options)
    assert len([one for one in said if "recorded" in str(one.message)]) == 1
    assert torch.equal(actual.sequences, expected.sequences)
    assert cache.get_seq_length() == plain.get_seq_length()
    assert not again.recorded


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_a_recording_that_fails_does_no_harm(monkeypatch):
    """What waits for the device without an operation of torch's is found only when it spoils the recording."""
    model, counted = make("llama"), Counted()
    mlp = model.model.layers[1].mlp
    own = mlp.forward

    def waits(states):
        torch.cuda.synchronize()
        return own(states)

    wanted, _ = generate(model)
    with monkeypatch.context() as patched:
        patched.setattr(mlp, "forward", waits)
        with pytest.warns(UserWarning, match="a step cannot be recorded"):
            found, _ = generate(model, counted)
    assert torch.equal(found.sequences, wanted.sequences)
    assert counted.recorded == 1
    assert torch.rand(3, device=DEVICE).max() < 1.0
    counted = Counted()  # a recording that failed has spoilt the memory of its own
    found, _ = generate(model, counted)
    assert torch.equal(found.sequences, wanted.sequences)
    assert counted.replayed == 59 - 3 - 1


def test_nothing_is_replayed_where_nothing_is_compressed_yet():
    model, again = make("llama"), Counted()
    model.set_attn_implementation(plug.NAME)
    ids = tokens(1, 10)
    with warnings.catch_warnings(), replaying(model, again):
        warnings.simplefilter("error")
        cache = cache_of(model)
        model.generate(ids, past_key_values=cache, do_sample=False, max_new_tokens=50)
        assert again.replayed == 10 + 49 - 4 - RESIDUAL - BLOCK - 2
        with torch.no_grad():  # a longer cache, but none that is ours
            model.generate(ids, do_sample=False, max_new_tokens=60)
    assert again.recorded == 1
