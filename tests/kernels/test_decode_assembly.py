"""The assembly of widths whose numbers need no table, word by word, without a GPU."""

import numpy as np
import pytest
from ptx import run

pytest.importorskip("triton")


def columns(width: int, codes: np.ndarray, oracle) -> list[np.ndarray]:
    """Words of four columns of a band of codes (n, 4 * coordinates a column), as `decode` loads them."""
    rows = [oracle.pack(row.tolist(), [(codes.shape[1], width)]) for row in codes]
    content = np.frombuffer(b"".join(rows), np.uint8).reshape(len(codes), -1)
    if width == 6:
        wide, narrow = np.ascontiguousarray(content[:, :8]), np.ascontiguousarray(content[:, 8:])
        return [*wide.view("<u4").T, narrow.view("<u4")[:, 0]]
    return [np.ascontiguousarray(content).view("<u4")[:, 0]]


@pytest.mark.parametrize(("width", "numbers"), [(8, range(-128, 128)), (6, range(64)), (1, (0, 32)), (1, (0, 1))])
def test_numbers_that_need_no_table(oracle, width, numbers):
    """Every code in every place: parts hold the numbers of the coordinates that `slot_dims` names."""
    from tqsearch.kernels.decode_triton import COLUMN_DIMS, PARTS, assembly, slot_dims

    rng, dims = np.random.default_rng(0), 4 * COLUMN_DIMS[width]
    codes = rng.integers(0, 2**width, (4096, dims))
    found = run(assembly(width, tuple(numbers), quad=True), PARTS[width], columns(width, codes, oracle), {})
    wanted = np.array(numbers)[codes]
    for part, slots in zip(found, slot_dims(width, 4, quad=True), strict=True):
        np.testing.assert_array_equal(part.view(np.int8).reshape(-1, 4), wanted[:, slots])


def test_other_numbers_are_looked_up():
    from tqsearch.kernels.decode_triton import assembly

    assert assembly(6, tuple(range(-32, 32)), quad=True) == ""
    assert assembly(8, tuple(range(-127, 129)), quad=True) == ""
