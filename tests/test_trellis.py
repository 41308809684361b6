import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tqsearch import trellis, viterbi
from tqsearch.codebook import lloyd_max
from tqsearch.errors import InvalidInputError
from tqsearch.plan import BitPlan

WIDTHS = (1, 2, 3, 4)
MIXED = [(3, 2), (1, 4), (9, 1), (12, 3), (16, 2)]
PAIRS = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 4)), min_size=1, max_size=4)

# The parities in octal, as codes are tabulated: bit j is the path bit j coordinates back; the number's low bit first.
POLYNOMIALS = {1: (0o332, 0o236, 0o523), 2: (0o354, 0o212, 0o515), 3: (0o362, 0o515), 4: (0o362, 0o515)}


def widths_of(bands):
    return [bits for size, bits in bands for _ in range(size)]


def level_table(bits):
    book = trellis.trellis_codebook(bits)
    return (np.array(book.integers, dtype=np.float64) + 0.5) * book.step


def numbers_by_definition(codes, widths):
    """Level numbers of one row, a coordinate at a time, the path's last nine bits kept as an integer."""
    window, numbers = 0, []
    for code, bits in zip(codes, widths, strict=True):
        window = (2 * window + code % 2) % 512
        number = code // 2
        for polynomial in reversed(POLYNOMIALS[bits]):
            number = 2 * number + (window & polynomial).bit_count() % 2
        numbers.append(number)
    return numbers


def levels_by_definition(codes, widths):
    numbers = numbers_by_definition(codes, widths)
    return np.array([level_table(bits)[number] for number, bits in zip(numbers, widths, strict=True)])


def random_codes(bands, count, seed):
    rng = np.random.default_rng(seed)
    columns = [rng.integers(0, 2**bits, size=(count, size)) for size, bits in bands]
    return torch.from_numpy(np.concatenate(columns, axis=1).astype(np.uint8))


def rows(count, dim, seed=0):
    return torch.randn((count, dim), generator=torch.Generator().manual_seed(seed))


def errors_found(values, bands):
    """Squared errors of what `encode` chose, by the definition of its codes' levels."""
    codes = trellis.encode(values, bands).tolist()
    levels = np.array([levels_by_definition(row, widths_of(bands)) for row in codes])
    return ((values.double().numpy() - levels) ** 2).sum(axis=1)


def least_error_by_walking(values, widths):
    """The least squared error of a row over all walks: the best error of every set of last eight path bits, forward."""
    best = {0: 0.0}
    for value, bits in zip(values.double().tolist(), widths, strict=True):
        table, after = level_table(bits), {}
        for state, error in best.items():
            for bit in (0, 1):
                window = 2 * state + bit
                low = sum((window & p).bit_count() % 2 << i for i, p in enumerate(POLYNOMIALS[bits]))
                step = min((value - level) ** 2 for level in table[low :: 1 << len(POLYNOMIALS[bits])])
                key = window % 256
                after[key] = min(after.get(key, math.inf), error + step)
        best = after
    return min(best.values())


@pytest.mark.parametrize("bands", [[(d, b)] for d in (1, 7, 8, 9, 63, 65) for b in WIDTHS] + [MIXED], ids=str)
def test_decodes_as_defined(bands):
    codes, widths = random_codes(bands, 3, seed=1), widths_of(bands)
    numbers = [numbers_by_definition(row, widths) for row in codes.tolist()]
    levels = np.array([levels_by_definition(row, widths) for row in codes.tolist()])
    assert trellis.level_numbers(codes, bands).tolist() == numbers
    assert np.array_equal(trellis.decode(codes, bands).numpy(), levels.astype(np.float32))


@pytest.mark.parametrize(
    "bands",
    [[(1, 1)], [(12, 1)], [(1, 2)], [(6, 2)], [(4, 3)], [(3, 4)], [(2, 2), (3, 1), (1, 4)], [(9, 1), (1, 3)]],
    ids=str,
)
def test_no_sequence_of_codes_is_nearer(bands):
    widths = widths_of(bands)
    sequences = itertools.product(*(range(2**bits) for bits in widths))
    levels = np.array([levels_by_definition(row, widths) for row in sequences])
    values = rows(20, len(widths), seed=2)
    least = ((values.double().numpy()[:, None] - levels) ** 2).sum(axis=2).min(axis=1)
    np.testing.assert_allclose(errors_found(values, bands), least, rtol=1e-5)


@pytest.mark.parametrize("bands", [[(41, b)] for b in WIDTHS] + [MIXED], ids=str)
def test_no_walk_is_nearer_in_rows_longer_than_the_window(bands):
    widths = widths_of(bands)
    values = rows(3, len(widths), seed=3)
    least = [least_error_by_walking(row, widths) for row in values]
    np.testing.assert_allclose(errors_found(values, bands), least, rtol=1e-5)


@pytest.mark.parametrize("bits", WIDTHS)
def test_error_on_gaussian_rows_is_the_distortion_stated(bits):
    values, bands = rows(96, 544, seed=10 + bits), [(544, bits)]
    errors = (values - trellis.decode(trellis.encode(values, bands), bands)).double() ** 2
    means = errors[:, 16:-16].mean(dim=1).numpy()  # the known start costs a little, the free end gains
    stated = trellis.trellis_codebook(bits).distortion
    assert abs(means.mean() - stated) < 4 * means.std(ddof=1) / math.sqrt(len(means)) + 1e-3 * stated
    assert 4.0**-bits < stated < 0.8 * lloyd_max(bits).distortion
    if bits == 2:
        assert errors.mean() < 0.085


@pytest.mark.parametrize("bits", WIDTHS)
def test_levels_are_the_means_of_what_is_coded_to_them(bits):
    """Lloyd's condition, up to the rounding of levels to half integers and of means over a sample."""
    values, bands = rows(96, 544, seed=20 + bits), [(544, bits)]
    numbers = trellis.level_numbers(trellis.encode(values, bands), bands).numpy()[:, 16:-16]
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
    assert np.array_equal(book.levels().numpy(), level_table(bits).astype(np.float32))


def test_bands_share_one_path():
    """One row in bands of the same width is coded as one band is."""
    values = rows(5, 48, seed=4)
    whole, cut = trellis.encode(values, [(48, 2)]), trellis.encode(values, [(5, 2), (11, 2), (32, 2)])
    assert torch.equal(whole, cut)


@pytest.mark.parametrize("bands", [[(50, 1)], [(50, 4)], MIXED], ids=str)
def test_codes_do_not_depend_on_the_batch(bands, monkeypatch):
    values = rows(37, len(widths_of(bands)), seed=5)
    codes = trellis.encode(values, bands)
    assert (codes.amax(dim=0) < torch.tensor([2**bits for bits in widths_of(bands)])).all()
    assert torch.equal(trellis.encode(values[5:6], bands), codes[5:6])
    assert torch.equal(trellis.encode(values.t().contiguous().t(), bands), codes)
    monkeypatch.setattr(viterbi, "_HELD_CPU", 1)  # blocks of 16 rows
    assert torch.equal(trellis.encode(values, bands), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_complementary_codes_have_opposite_levels_once_the_start_is_past(bits):
    """Every parity has an odd number of taps, so the code is symmetric, as the law of a coordinate is."""
    bands = [(40, bits)]
    codes = random_codes(bands, 4, seed=6)
    levels, flipped = trellis.decode(codes, bands), trellis.decode(codes ^ (2**bits - 1), bands)
    assert torch.equal(flipped[:, 8:], -levels[:, 8:])


def test_no_rows_zero_rows_and_one_row_repeated():
    assert trellis.encode(torch.empty((0, 24)), [(24, 2)]).shape == (0, 24)
    zeros = trellis.encode(torch.zeros((2, 24)), [(24, 2)])
    assert torch.equal(zeros[0], zeros[1])
    repeated = trellis.encode(rows(1, 24).repeat(5, 1), [(24, 3)])
    assert torch.equal(repeated, repeated[:1].expand(5, -1))


@pytest.mark.parametrize(
    ("bands", "codes", "packed"),
    [
        ([(9, 1)], [1, 0, 1, 0, 0, 0, 0, 1, 1], "8501"),
        ([(5, 2)], [3, 0, 1, 2, 1], "1509"),
        ([(9, 3)], [7, 1, 4, 0, 2, 6, 5, 3, 1], "c301b1006500"),
        ([(2, 4)], [8, 15], "02020203"),
        ([(2, 3), (1, 1), (6, 2)], [5, 2, 1, 1, 2, 3, 0, 0, 2], "2d00020126"),
    ],
)
def test_golden_bytes_by_hand(bands, codes, packed):
    row = torch.tensor([codes], dtype=torch.uint8)
    assert trellis.pack(row, bands).numpy().tobytes().hex() == packed
    assert torch.equal(trellis.unpack(trellis.pack(row, bands), bands), row)


@given(PAIRS, st.integers(0, 2**32 - 1))
def test_unpack_is_the_inverse_of_pack(bands, seed):
    codes = random_codes(bands, 3, seed)
    packed = trellis.pack(codes, bands)
    assert packed.shape == (3, trellis.row_bytes(bands))
    assert torch.equal(trellis.unpack(packed, bands), codes)


@pytest.mark.parametrize("bands", [[(8, 1)], [(384, 2)], [(1000, 3)], [(96, 4), (200, 2), (88, 1)]], ids=str)
def test_rows_take_the_bytes_of_the_scalar_plan(bands):
    assert trellis.row_bytes(bands) == BitPlan.from_pairs(bands).bytes_per_vector


@pytest.mark.parametrize("bits", [0, 5, -1, True, 2.0])
def test_refuses_other_widths(bits):
    with pytest.raises(InvalidInputError, match="1 to 4 bits a coordinate, got"):
        trellis.trellis_codebook(bits)
    with pytest.raises(InvalidInputError, match="1 to 4 bits a coordinate, got"):
        trellis.encode(torch.zeros((1, 8)), [(8, bits)])


def test_refuses_rows_that_the_bands_do_not_cover():
    with pytest.raises(InvalidInputError, match=r"rows must have shape \(n, 24\), as their bands have, got \(2, 16\)"):
        trellis.encode(torch.zeros((2, 16)), [(8, 2), (16, 1)])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("bands", [[(768, 1)], [(768, 4)], MIXED], ids=str)
def test_a_gpu_makes_the_same_codes(bands):
    values = rows(200, len(widths_of(bands)), seed=7)
    assert torch.equal(trellis.encode(values.cuda(), bands).cpu(), trellis.encode(values, bands))


@pytest.mark.slow
def test_long_rows():
    values, bands = rows(2, 8192, seed=8), [(8192, 2)]
    errors = (values - trellis.decode(trellis.encode(values, bands), bands)).square()
    noise = float(errors.std()) / math.sqrt(errors.numel())
    assert abs(float(errors.mean()) - trellis.trellis_codebook(2).distortion) < 4 * noise
