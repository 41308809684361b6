"""The integers of levels: near the levels, and of several bands in steps of about one size."""

import numpy as np
import pytest
import torch

from tqsearch.band_tables import band_tables
from tqsearch.plan import Band

CPU = torch.device("cpu")


def levels_of(table) -> np.ndarray:
    return (np.array(table.steps) - table.offset) * table.step


@pytest.mark.parametrize("dim", [24, 512, 8192])
def test_integers_of_several_bands(dim: int) -> None:
    tables = band_tables([Band(8, width) for width in (8, 6, 4, 3, 2)], "scalar", dim, "even", CPU)
    for table in tables:
        assert min(table.steps) >= -128
        assert max(table.steps) <= 127
        assert np.abs(levels_of(table) - table.levels.numpy()).max() <= 0.51 * table.step + 1e-6
    for table in tables[:2]:  # of equal distance: exact
        np.testing.assert_allclose(levels_of(table), table.levels.numpy(), rtol=1e-6)
        np.testing.assert_array_equal(np.diff(table.steps), 1)
    shared = [table.step for table in tables[2:]]
    assert max(shared) < 1.25 * 1.1 * min(shared)  # `on_grid` stretches a table by up to a quarter


def test_integers_of_one_band_are_as_fine_as_can_be() -> None:
    for width in (2, 3, 4):
        (table,) = band_tables([Band(8, width)], "scalar", 512, "optimal", CPU)
        assert table.offset == 63.5
        assert np.abs(levels_of(table) - table.levels.numpy()).max() <= 0.51 * table.step
