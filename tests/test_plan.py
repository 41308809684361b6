import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tqsearch.errors import InvalidInputError
from tqsearch.plan import Band, BitPlan, planes_of

PAIRS = st.lists(st.tuples(st.integers(1, 300), st.integers(0, 8)), min_size=1, max_size=5)


@pytest.mark.parametrize(
    ("size", "width", "nbytes"),
    [
        *[(1, 1, 1), (8, 1, 1), (9, 1, 2), (1, 3, 2), (4, 3, 2), (5, 3, 3), (100, 3, 38), (7, 0, 0), (3, 4, 2)],
        *[(3, 8, 3), (9, 7, 10), (384, 4, 192), (1536, 2, 384), (8, 5, 5), (8, 6, 6)],
    ],
)
def test_bytes_of_a_band_by_hand(size, width, nbytes):
    assert Band(size, width).nbytes == nbytes


@pytest.mark.parametrize("width", range(9))
def test_planes_add_up_to_the_width_widest_first(width):
    planes = planes_of(width)
    assert sum(planes) == width
    assert list(planes) == sorted(set(planes), reverse=True)
    assert all(8 % plane == 0 for plane in planes)


@given(pairs=PAIRS)
def test_totals_are_sums_over_bands(pairs):
    plan = BitPlan.from_pairs(pairs)
    assert plan.dim == sum(size for size, _ in pairs)
    expected = sum(math.ceil(size * plane / 8) for size, width in pairs for plane in (1, 2, 4, 8) if width & plane)
    assert plan.bytes_per_vector == expected
    assert plan.bits_per_dim == pytest.approx(sum(s * w for s, w in pairs) / plan.dim)
    assert plan.pairs() == pairs
    assert BitPlan.from_pairs(plan.pairs()) == plan
    # Each plane ends on a whole byte: at most 7 spare bits a plane, 4 planes a width.
    assert 0 <= 8 * plan.bytes_per_vector - sum(s * w for s, w in pairs) <= 7 * 4 * len(pairs)


@pytest.mark.parametrize(
    ("dim", "bits", "pairs"),
    [
        (128, 4, [(128, 4)]),
        (128, 2.5, [(64, 3), (64, 2)]),
        (128, 3.5, [(64, 4), (64, 3)]),
        (1536, 2.25, [(384, 3), (1152, 2)]),
        (100, 2.5, [(48, 3), (52, 2)]),
        (100, 0.5, [(48, 1), (52, 0)]),
        (96, 7.5, [(48, 8), (48, 7)]),
        (64, 0, [(64, 0)]),
        (64, 8, [(64, 8)]),
        (64, 3.0, [(64, 3)]),
        (5, 3.9, [(5, 4)]),
        (3, 2.5, [(3, 2)]),
    ],
)
def test_fraction_becomes_two_neighbouring_bands(dim, bits, pairs):
    assert BitPlan.of(dim, bits).pairs() == pairs


@given(dim=st.integers(1, 8192), bits=st.floats(0, 8))
def test_fraction_is_met_to_within_half_a_group_of_eight(dim, bits):
    plan = BitPlan.of(dim, bits)
    assert plan.dim == dim
    assert abs(plan.bits_per_dim - bits) <= 4 / dim + 1e-9
    widths = [width for _, width in plan.pairs()]
    assert set(widths) <= {math.floor(bits), math.floor(bits) + 1}
    assert widths == sorted(widths, reverse=True)
    if len(plan.bands) == 2:
        assert plan.bands[0].size % 8 == 0


@pytest.mark.parametrize("dim", [None, 8, 128])
def test_distortion_is_the_mean_over_coordinates(oracle, dim):
    plan = BitPlan.from_pairs([(3, 1), (10, 0), (7, 4), (2, 2)])
    expected = (3 * oracle.distortion(1, dim) + 10 + 7 * oracle.distortion(4, dim) + 2 * oracle.distortion(2, dim)) / 22
    assert plan.distortion(dim) == pytest.approx(expected, rel=1e-9)


def test_a_plan_for_the_dim_is_returned_as_it_is():
    plan = BitPlan.from_pairs([(3, 1), (5, 4)])
    assert BitPlan.of(8, plan) is plan


def test_reads_as_its_bands():
    assert str(BitPlan.from_pairs([(96, 4), (200, 2), (88, 0)])) == "96 x 4 bit + 200 x 2 bit + 88 x 0 bit"


@pytest.mark.parametrize("bits", [-1, 8.5, math.nan, math.inf, True, "4", None, np.array([4])])
def test_bad_bits_are_named(bits):
    with pytest.raises(InvalidInputError, match="bits must be a number from 0 to 8 or a BitPlan, got"):
        BitPlan.of(16, bits)


@pytest.mark.parametrize("pair", [(0, 4), (-1, 4), (8, 9), (8, -1)])
def test_bad_bands_are_named(pair):
    with pytest.raises(InvalidInputError, match=f"got size {pair[0]}, width {pair[1]}"):
        BitPlan.from_pairs([(4, 4), pair])


@pytest.mark.parametrize(
    "pairs", [[(8, 2.5)], [("8", 2)], [(8,)], [(8, 2, 1)], [(8, None)], [(4, 4), (8.0, 2)], [8, 2]]
)
def test_pairs_of_something_else_are_refused(pairs):
    """A width of 2.5 is not taken for 2."""
    with pytest.raises(InvalidInputError, match="needs pairs of integers"):
        BitPlan.from_pairs(pairs)
    assert BitPlan.from_pairs([(np.int64(8), np.uint8(2))]).pairs() == [(8, 2)]


def test_no_bands_and_wrong_dim_are_refused():
    with pytest.raises(InvalidInputError, match="at least one band"):
        BitPlan.from_pairs([])
    with pytest.raises(InvalidInputError, match="must cover 16 coordinates, got one for 8"):
        BitPlan.of(16, BitPlan.from_pairs([(8, 4)]))
