import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tqsearch import trellis
from tqsearch.codebook import lloyd_max
from tqsearch.errors import InvalidInputError
from tqsearch.plan import BitPlan

WIDTHS = (1, 2, 3, 4)

# The parities in octal, as codes are tabulated: bit j is the path bit j coordinates back; the number's low bit first.
POLYNOMIALS = {1: (0o332, 0o236, 0o523), 2: (0o354, 0o212, 0o515), 3: (0o362, 0o515), 4: (0o362, 0o515)}


def level_table(bits):
    book = trellis.trellis_codebook(bits)
    return (np.array(book.integers, dtype=np.float64) + 0.5) * book.step


def numbers_by_definition(codes, bits):
    """Level numbers of one row, a coordinate at a time, the path's last nine bits kept as an integer."""
    window, numbers = 0, []
    for code in codes:
        window = (2 * window + code % 2) % 512
        number = code // 2
        for polynomial in reversed(POLYNOMIALS[bits]):
            number = 2 * number + (window & polynomial).bit_count() % 2
        numbers.append(number)
    return numbers


def rows(count, dim, seed=0):
    return torch.randn((count, dim), generator=torch.Generator().manual_seed(seed))


def squared_error(values, bits, numbers):
    return float(((values.double().numpy() - level_table(bits)[numbers]) ** 2).sum())


def least_error_by_walking(values, bits):
    """The least squared error of a row over all walks: the best error of every set of last eight path bits, forward."""
    table, best = level_table(bits), {0: 0.0}
    for value in values.double().tolist():
        after = {}
        for state, error in best.items():
            for bit in (0, 1):
                window = 2 * state + bit
                low = sum((window & p).bit_count() % 2 << i for i, p in enumerate(POLYNOMIALS[bits]))
                step = min((value - level) ** 2 for level in table[low :: 1 << len(POLYNOMIALS[bits])])
                key = window % 256
                after[key] = min(after.get(key, math.inf), error + step)
        best = after
    return min(best.values())


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("dim", [1, 7, 8, 9, 63, 65])
def test_decodes_as_defined(bits, dim):
    codes = np.random.default_rng(dim).integers(0, 2**bits, size=(3, dim)).astype(np.uint8)
    numbers = np.array([numbers_by_definition(row, bits) for row in codes.tolist()])
    assert np.array_equal(trellis.level_numbers(torch.from_numpy(codes), bits).numpy(), numbers)
    assert np.array_equal(
        trellis.decode(torch.from_numpy(codes), bits).numpy(), level_table(bits)[numbers].astype("f4")
    )


@pytest.mark.parametrize(("bits", "dim"), [(1, 1), (1, 12), (2, 1), (2, 6), (3, 4), (4, 3)])
def test_no_sequence_of_codes_is_nearer(bits, dim):
    sequences = list(itertools.product(range(2**bits), repeat=dim))
    levels = level_table(bits)[np.array([numbers_by_definition(row, bits) for row in sequences])]
    values = rows(20, dim, seed=bits)
    least = ((values.double().numpy()[:, None] - levels) ** 2).sum(axis=2).min(axis=1)
    codes = trellis.encode(values, bits)
    found = [
        squared_error(v, bits, numbers_by_definition(c, bits)) for v, c in zip(values, codes.tolist(), strict=True)
    ]
    np.testing.assert_allclose(found, least, rtol=1e-5)


@pytest.mark.parametrize("bits", WIDTHS)
def test_no_walk_is_nearer_in_rows_longer_than_the_window(bits):
    values = rows(3, 41, seed=bits)
    codes = trellis.encode(values, bits)
    found = [
        squared_error(v, bits, numbers_by_definition(c, bits)) for v, c in zip(values, codes.tolist(), strict=True)
    ]
    np.testing.assert_allclose(found, [least_error_by_walking(v, bits) for v in values], rtol=1e-5)


@pytest.mark.parametrize("bits", WIDTHS)
def test_error_on_gaussian_rows_is_the_distortion_stated(bits):
    values = rows(96, 544, seed=10 + bits)
    errors = (values - trellis.decode(trellis.encode(values, bits), bits)).double() ** 2
    means = errors[:, 16:-16].mean(dim=1).numpy()  # the known start costs a little, the free end gains
    stated = trellis.trellis_codebook(bits).distortion
    assert abs(means.mean() - stated) < 4 * means.std(ddof=1) / math.sqrt(len(means)) + 1e-3 * stated
    assert 4.0**-bits < stated < 0.8 * lloyd_max(bits).distortion
    if bits == 2:
        assert errors.mean() < 0.085


@pytest.mark.parametrize("bits", WIDTHS)
def test_levels_are_the_means_of_what_is_coded_to_them(bits):
    """Lloyd's condition, up to the rounding of levels to half integers and of means over a sample."""
    values = rows(96, 544, seed=20 + bits)
    numbers = trellis.level_numbers(trellis.encode(values, bits), bits).numpy()[:, 16:-16]
    inner = values.double().numpy()[:, 16:-16]
    for number, level in enumerate(level_table(bits)):
        cell = inner[numbers == number]
        assert len(cell) > 100
        noise = 4.5 * cell.std(ddof=1) / math.sqrt(len(cell))
        assert abs(cell.mean() - level) < 0.6 * trellis.trellis_codebook(bits).step + noise


@pytest.mark.parametrize("bits", WIDTHS)
def test_integers_ascend_and_are_antisymmetric_and_small(bits):
    book = trellis.trellis_codebook(bits)
    integers = np.array(book.integers)
    assert len(integers) == 2 ** (len(book.taps) + bits - 1)
    assert (np.diff(integers) > 0).all()
    assert np.array_equal(integers, -1 - integers[::-1])
    assert integers.max() <= (127 if bits == 4 else 63)
    np.testing.assert_allclose(book.levels().numpy(), level_table(bits), rtol=1e-7)


@pytest.mark.parametrize("bits", WIDTHS)
def test_codes_do_not_depend_on_the_batch(bits, monkeypatch):
    values = rows(37, 50, seed=3)
    codes = trellis.encode(values, bits)
    assert codes.max() < 2**bits
    assert torch.equal(trellis.encode(values[5:6], bits), codes[5:6])
    assert torch.equal(trellis.encode(values.t().contiguous().t(), bits), codes)
    monkeypatch.setattr(trellis, "_HELD_CPU", 1)  # blocks of 16 rows
    assert torch.equal(trellis.encode(values, bits), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_complementary_codes_have_opposite_levels_once_the_start_is_past(bits):
    """Every parity has an odd number of taps, so the code is symmetric, as the law of a coordinate is."""
    codes = torch.from_numpy(np.random.default_rng(bits).integers(0, 2**bits, (4, 40)).astype(np.uint8))
    levels, flipped = trellis.decode(codes, bits), trellis.decode(codes ^ (2**bits - 1), bits)
    assert torch.equal(flipped[:, 8:], -levels[:, 8:])


def test_no_rows_zero_rows_and_one_row_repeated():
    assert trellis.encode(torch.empty((0, 24)), 2).shape == (0, 24)
    zeros = trellis.encode(torch.zeros((2, 24)), 2)
    assert torch.equal(zeros[0], zeros[1])
    repeated = trellis.encode(rows(1, 24).repeat(5, 1), 3)
    assert torch.equal(repeated, repeated[:1].expand(5, -1))


@pytest.mark.parametrize(
    ("bits", "codes", "packed"),
    [
        (1, [1, 0, 1, 0, 0, 0, 0, 1, 1], "8501"),
        (2, [3, 0, 1, 2, 1], "1509"),
        (3, [7, 1, 4, 0, 2, 6, 5, 3, 1], "c301b1006500"),
        (4, [8, 15], "02020203"),
    ],
)
def test_golden_bytes_by_hand(bits, codes, packed):
    row = torch.tensor([codes], dtype=torch.uint8)
    assert trellis.pack(row, bits).numpy().tobytes().hex() == packed
    assert torch.equal(trellis.unpack(trellis.pack(row, bits), len(codes), bits), row)


@given(st.integers(1, 70), st.sampled_from(WIDTHS), st.integers(0, 2**32 - 1))
def test_unpack_is_the_inverse_of_pack(dim, bits, seed):
    codes = torch.from_numpy(np.random.default_rng(seed).integers(0, 2**bits, (3, dim)).astype(np.uint8))
    packed = trellis.pack(codes, bits)
    assert packed.shape == (3, trellis.row_bytes(dim, bits))
    assert torch.equal(trellis.unpack(packed, dim, bits), codes)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("dim", [8, 384, 1000])
def test_rows_take_the_bytes_of_the_scalar_plan(bits, dim):
    assert trellis.row_bytes(dim, bits) == BitPlan.of(dim, bits).bytes_per_vector


@pytest.mark.parametrize("bits", [0, 5, -1, True, 2.0])
def test_refuses_other_widths(bits):
    with pytest.raises(InvalidInputError, match="1 to 4 bits a coordinate, got"):
        trellis.trellis_codebook(bits)
    with pytest.raises(InvalidInputError, match="1 to 4 bits a coordinate, got"):
        trellis.encode(torch.zeros((1, 8)), bits)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("bits", WIDTHS)
def test_a_gpu_makes_the_same_codes(bits):
    values = rows(200, 768, seed=4)
    assert torch.equal(trellis.encode(values.cuda(), bits).cpu(), trellis.encode(values, bits))


@pytest.mark.slow
def test_long_rows():
    values = rows(2, 8192, seed=5)
    error = (values - trellis.decode(trellis.encode(values, 2), 2)).square().mean()
    assert abs(error - trellis.trellis_codebook(2).distortion) < 4 * 0.11 / math.sqrt(values.numel())
