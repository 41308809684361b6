"""A compressed cache driven at random beside the library's dense layers, whose old tokens numpy dequantizes."""

import tempfile
from pathlib import Path
from typing import Any

import families
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from kv_oracle import ROUNDING, Shape, check_states, fake_cache

from tqsearch.kvcache import TurboQuantCache

HEADS, MOST = 2, 4
KEY_DIM, VALUE_DIM = 24, 16


class CacheMachine(RuleBasedStateMachine):
    oracle: Any = None

    @initialize(
        widths=st.sampled_from([(4, 4), (3, 2), (2.5, 1), (8, 3.5)]),
        residual=st.sampled_from([0, 3, 8]),
        sinks=st.sampled_from([0, 4]),
        block=st.sampled_from([8, 16]),
        seed=st.integers(0, 3),
        codec=st.sampled_from(["scalar", "scalar", "trellis"]),
        batch=st.integers(1, 2),
    )
    def start(self, widths, residual, sinks, block, seed, codec, batch):
        self.config = families.CONFIGS["llama"]()
        self.options = {"residual_length": residual, "sink_length": sinks, "block_length": block, "seed": seed}
        self.options["codec"] = codec
        self.cache = TurboQuantCache(self.config, key_bits=widths[0], value_bits=widths[1], **self.options)
        self.dense = fake_cache(self.oracle, self.config, Shape(*widths, residual, sinks, block, seed, codec))
        self.generator = torch.Generator().manual_seed(seed)
        self.batch, self.other = batch, None

    def states(self, length, dim):
        states = torch.randn((self.batch, HEADS, length, dim), generator=self.generator)
        return states + 3 * torch.arange(HEADS).view(1, HEADS, 1, 1)  # an offset, other for each head

    @rule(length=st.sampled_from([1, 1, 2, 7, 23, 40]))
    def append(self, length):
        keys, values = self.states(length, KEY_DIM), self.states(length, VALUE_DIM)
        for layer in range(2):
            actual = self.cache.update(keys + layer, values, layer)
            expected = self.dense.update(keys + layer, values, layer)
            fake = self.dense.layers[layer]
            for states, wanted, slack in zip(actual, expected, fake.seen, strict=True):
                check_states(states, wanted, slack + ROUNDING * wanted.double().norm(dim=3))

    @precondition(lambda self: self.cache.get_seq_length() > 8)
    @rule(length=st.integers(0, 40))
    def crop(self, length):
        for cache in (self.cache, self.dense):
            cache.crop(-length)

    @precondition(lambda self: self.cache.get_seq_length())
    @rule(data=st.data())
    def reorder(self, data):
        index = torch.tensor(
            data.draw(st.lists(st.integers(0, self.batch - 1), min_size=self.batch, max_size=self.batch))
        )
        for cache in (self.cache, self.dense):
            cache.reorder_cache(index)

    @precondition(lambda self: self.cache.get_seq_length())
    @rule(data=st.data())
    def select(self, data):
        index = torch.tensor(data.draw(st.lists(st.integers(0, self.batch - 1), min_size=1, max_size=MOST)))
        for cache in (self.cache, self.dense):
            cache.batch_select_indices(index)
        self.batch = len(index)

    @precondition(lambda self: self.cache.get_seq_length() and self.batch * 2 <= MOST)
    @rule()
    def repeat(self):
        for cache in (self.cache, self.dense):
            cache.batch_repeat_interleave(2)
        self.batch *= 2

    @rule()
    def save_and_load(self):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "cache"
            self.cache.save(path)
            self.cache = TurboQuantCache.load(path, self.config)

    @rule()
    def branch(self):
        """The branch that is left behind stays as it is: see `untouched`."""
        self.other, self.cache = self.cache, self.cache.fork()
        self.left = [part for layer in self.other.layers for part in (layer.keys, layer.values)]

    @rule()
    def reset(self):
        for cache in (self.cache, self.dense):
            cache.reset()

    @invariant()
    def same(self):
        if not hasattr(self, "cache"):
            return
        for layer, fake in zip(self.cache.layers, self.dense.layers, strict=True):
            assert layer.get_seq_length() == fake.get_seq_length()
            assert layer.get_mask_sizes(3) == fake.get_mask_sizes(3)
            if not layer.get_seq_length():
                continue
            assert layer.past[0].compressed_length == layer.past[1].compressed_length == fake.old
            both = ((layer.keys, fake.keys, fake.slack[0]), (layer.values, fake.values, fake.slack[1]))
            for actual, expected, slack in both:
                check_states(actual, expected, slack + ROUNDING * expected.double().norm(dim=3))
            fake.keys, fake.values = layer.keys, layer.values  # so that roundings of decoded tokens do not add up

    @invariant()
    def untouched(self):
        if getattr(self, "other", None) is None:
            return
        now = [part for layer in self.other.layers for part in (layer.keys, layer.values)]
        for before, after in zip(self.left, now, strict=True):
            assert (before is None and after is None) or torch.equal(before, after)


def test_random_interleavings(oracle):
    class Machine(CacheMachine):
        pass

    Machine.oracle = oracle
    # No shrinking: each example runs a second, and the steps printed are few.
    phases = [phase for phase in Phase if phase not in (Phase.shrink, Phase.explain)]
    run_state_machine_as_test(Machine, settings=settings(max_examples=100, stateful_step_count=14, phases=phases))
