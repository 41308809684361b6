import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tqsearch import splitmix

SEEDS = st.integers(min_value=-(2**70), max_value=2**70)
STREAMS = st.integers(min_value=0, max_value=2**32)


def test_oracle_gives_the_published_outputs(oracle):
    generator = oracle.splitmix64(1234567)
    assert [generator.next() for _ in range(5)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert oracle.splitmix64(0).next() == 0xE220A8397B1DCDAF


@given(seed=SEEDS, stream=STREAMS, count=st.integers(0, 70))
def test_words_are_splitmix64_at_a_counter(oracle, seed, stream, count):
    words = splitmix.words(seed, stream, count)
    assert words.dtype == np.uint64
    assert words.tolist() == oracle.words(seed, stream, count)


def test_golden_words_never_change():
    assert [hex(word) for word in splitmix.words(7, 3, 4).tolist()] == [
        "0x6bfc273dbace04e7",
        "0x7843c9f8df494699",
        "0x183c5150f473d59f",
        "0x2c2f443d2cda9f24",
    ]


def test_golden_signs_and_permutation_never_change():
    assert splitmix.signs(0, 0, 16).tolist() == [1, 1, 1, 1, -1, 1, 1, 1, 1, 1, -1, -1, 1, 1, 1, 1]
    assert splitmix.permutation(0, 17, 12).tolist() == [11, 4, 3, 5, 6, 0, 8, 10, 7, 2, 1, 9]


@given(seed=SEEDS, stream=STREAMS, count=st.integers(0, 70))
def test_signs_permutations_and_gaussians_follow_their_definitions(oracle, seed, stream, count):
    assert splitmix.signs(seed, stream, count).tolist() == oracle.signs(seed, stream, count)
    assert splitmix.permutation(seed, stream, count).tolist() == oracle.permutation(seed, stream, count)
    expected = oracle.gaussians(seed, stream, count)
    np.testing.assert_allclose(splitmix.gaussians(seed, stream, count), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("count", [1, 5, 100])
def test_a_longer_stream_begins_with_the_shorter_one(count):
    np.testing.assert_array_equal(splitmix.words(3, 4, 1000)[:count], splitmix.words(3, 4, count))
    np.testing.assert_array_equal(splitmix.signs(3, 4, 1000)[:count], splitmix.signs(3, 4, count))


def test_words_are_uniform_in_every_bit():
    count = 20_000
    words = splitmix.words(11, 0, count)
    ones = np.array([int(((words >> np.uint64(bit)) & np.uint64(1)).sum()) for bit in range(64)])
    assert np.abs(ones - count / 2).max() < 5 * math.sqrt(count / 4)
    assert stats.kstest(words / 2.0**64, "uniform").pvalue > 1e-6


def test_gaussians_are_standard_normal():
    assert stats.kstest(splitmix.gaussians(5, 48, 50_000), "norm").pvalue > 1e-6


def test_streams_and_seeds_are_uncorrelated():
    count = 20_000
    base = splitmix.gaussians(0, 0, count)
    for seed, stream in [(0, 1), (1, 0), (0, 16), (-1, 0), (2**40, 0), (0, 2**20)]:
        products = base * splitmix.gaussians(seed, stream, count)  # mean 0, variance 1 if independent
        assert abs(products.mean()) < 5 / math.sqrt(count), (seed, stream)


def test_permutations_put_every_element_everywhere_equally_often():
    size, trials = 8, 4000
    counts = np.zeros((size, size))
    for seed in range(trials):
        counts[np.arange(size), splitmix.permutation(seed, 17, size)] += 1
    expected = trials / size
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert stats.chi2.sf(chi2, (size - 1) ** 2) > 1e-6
