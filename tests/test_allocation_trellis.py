"""Widths along a trellis against every choice there is."""

import itertools

import numpy as np
import pytest
import trellis_oracle

from tqsearch.training.allocation import allocate, expected_error

WIDTHS = (0, 1, 2, 3, 4, 6, 8)
DISTORTION = {0: 1.0, 1: 0.27416, 2: 0.07320, 3: 0.02172, 4: 0.005868}  # what `trellis` says; 6 and 8 bits stay scalar


def cost(weights, sizes, widths, distortion):
    return sum(
        part.sum() * distortion[width]
        for part, width in zip(np.split(weights, np.cumsum(sizes)[:-1]), widths, strict=True)
    )


def bytes_of(sizes, widths):
    pairs = list(zip(sizes, widths, strict=True))
    on_path = [(size, width) for size, width in pairs if width not in (0, 6, 8)]
    planes = {6: (4, 2), 8: (8,)}
    beside = sum(-(-size * plane // 8) for size, width in pairs for plane in planes.get(width, ()))
    return trellis_oracle.row_bytes(on_path) + beside


@pytest.mark.parametrize("dim", [24, 29])
@pytest.mark.parametrize("budget", [0, 3, 5, 8, 11, 17, 40])
@pytest.mark.parametrize("power", [0.5, 2.0])
def test_no_choice_of_widths_has_less_error(oracle, dim, budget, power):
    distortion = {**DISTORTION, 6: oracle.even(6, None)[1], 8: oracle.even(8, None)[1]}
    weights = np.arange(1, dim + 1) ** -power
    sizes = [min(8, dim - start) for start in range(0, dim, 8)]
    allowed = [w for w in itertools.product(WIDTHS, repeat=len(sizes)) if bytes_of(sizes, w) <= budget]
    least = min(cost(weights, sizes, widths, distortion) for widths in allowed)
    plan = allocate(weights, budget, codec="trellis")
    chosen = np.repeat([band.width for band in plan.bands], [band.size for band in plan.bands])[::8]
    assert bytes_of(sizes, chosen.tolist()) <= budget
    assert cost(weights, sizes, chosen.tolist(), distortion) == pytest.approx(least, rel=1e-9)
    assert expected_error(weights, plan, "trellis") == pytest.approx(least, rel=1e-9)
