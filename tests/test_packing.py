import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tqsearch.packing import pack, pack_columns, unpack
from tqsearch.plan import BitPlan

PAIRS = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 8)), min_size=1, max_size=4)


def random_codes(pairs, count, seed):
    rng = np.random.default_rng(seed)
    columns = [rng.integers(0, 2**width, size=(count, size)) for size, width in pairs]
    return np.concatenate(columns, axis=1).astype(np.uint8)


@pytest.mark.parametrize(
    ("width", "codes", "packed"),
    [
        (4, [1, 2, 15], "210f"),
        (2, [3, 0, 1, 2, 1], "9301"),
        (1, [1, 0, 1, 0, 0, 0, 0, 1, 1], "9101"),
        (1, [0, 0, 1, 1, 1, 1, 0, 0], "3c"),
        (1, [0, 0, 0, 0, 1, 1, 0, 0], "0c"),
        (3, [5, 2, 7, 0, 6], "390215"),
        (5, [17, 14, 31], "e10f11"),  # 4-bit plane 1, e, f; 1-bit plane 1, 0, 1 in the order 0, 1, 4, 5, 2
        (6, [0b110110, 0b001001], "9603"),  # 4-bit plane 6, 9; 2-bit plane 3, 0
        (7, [0b1010011, 0b0111111], "f30d01"),  # planes of 4, 2, 1 bits: 3, f; 1, 3; 1, 0
        (8, [0, 7, 255], "0007ff"),
        (0, [0, 0, 0], ""),
    ],
)
def test_golden_bytes_by_hand(width, codes, packed):
    plan = BitPlan.from_pairs([(len(codes), width)])
    assert pack(torch.tensor([codes], dtype=torch.uint8), plan).numpy().tobytes().hex() == packed


def test_golden_bytes_of_two_bands():
    plan = BitPlan.from_pairs([(3, 4), (5, 0), (2, 1)])
    codes = torch.tensor([[1, 2, 15, 0, 0, 0, 0, 0, 0, 1]], dtype=torch.uint8)
    assert pack(codes, plan).numpy().tobytes().hex() == "210f02"


@given(pairs=PAIRS, count=st.integers(0, 5), seed=st.integers(0, 2**32))
def test_rows_equal_the_bit_by_bit_oracle(oracle, pairs, count, seed):
    plan = BitPlan.from_pairs(pairs)
    codes = random_codes(pairs, count, seed)
    packed = pack(torch.from_numpy(codes), plan)
    assert packed.dtype == torch.uint8
    assert packed.shape == (count, plan.bytes_per_vector)
    assert [bytes(row) for row in packed.numpy()] == [oracle.pack(row.tolist(), pairs) for row in codes]
    assert torch.equal(unpack(packed, plan), torch.from_numpy(codes))
    columns = pack_columns(torch.from_numpy(codes).t(), plan)
    assert torch.equal(columns.t(), packed)


@pytest.mark.parametrize("width", range(1, 9))
@pytest.mark.parametrize("dim", [1, 7, 8, 9, 63, 64, 65, 100, 384, 1536, 8192])
def test_every_width_at_many_dims(oracle, width, dim):
    codes = random_codes([(dim, width)], 2, dim * 10 + width)
    plan = BitPlan.of(dim, width)
    packed = pack(torch.from_numpy(codes), plan)
    assert [bytes(row) for row in packed.numpy()] == [oracle.pack(row.tolist(), [(dim, width)]) for row in codes]
    np.testing.assert_array_equal(unpack(packed, plan).numpy(), codes)


@given(pairs=PAIRS)
def test_spare_bits_are_zero(pairs):
    """With every code at its largest value exactly size * width bits are set: the spare ones are not."""
    plan = BitPlan.from_pairs(pairs)
    largest = torch.cat([torch.full((1, size), 2**width - 1) for size, width in pairs], dim=1).to(torch.uint8)
    assert int(np.unpackbits(pack(largest, plan).numpy()).sum()) == sum(size * width for size, width in pairs)


@given(pairs=PAIRS, seed=st.integers(0, 2**32))
def test_strides_do_not_matter(pairs, seed):
    plan = BitPlan.from_pairs(pairs)
    codes = torch.from_numpy(random_codes(pairs, 6, seed))
    packed = pack(codes, plan)
    every_second = torch.repeat_interleave(codes, 2, dim=1)[:, ::2]
    assert torch.equal(pack(every_second, plan), packed)
    spread = torch.stack([packed, packed], dim=2)[:, :, 1]
    assert torch.equal(unpack(spread, plan), codes)
