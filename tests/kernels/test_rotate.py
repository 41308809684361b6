"""`rotate` of each backend against numpy in float64."""

import math

import numpy as np
import pytest
import torch

from tqsearch import kernels
from tqsearch.rotation import Hadamard

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(params=["reference", "triton"])
def rotate(request, device):
    """`kernels.rotate` of a backend by the transform of seed 6; arguments and results are numpy's."""
    if request.param == "triton":
        pytest.importorskip("triton")
    turns = {}

    def run(vectors, centre=None, unit=False, factor=1.0):
        dim = vectors.shape[1]
        turn = turns.setdefault(dim, Hadamard(dim, 6).tensors(device))
        c = None if centre is None else torch.from_numpy(centre).to(device)
        with np.errstate(over="ignore", invalid="ignore"):
            found = kernels.rotate(
                torch.from_numpy(vectors).to(device), *turn, centre=c, unit=unit, factor=factor, backend=request.param
            )
        return [None if part is None else part.cpu().numpy() for part in found]

    return run


@pytest.mark.parametrize("dim", [8, 96, 100, 256, 1024, 1536])
@pytest.mark.parametrize("count", [0, 1, 5])
@pytest.mark.parametrize("how", ["plain", "centre", "unit", "unit and centre"])
def test_rotate(rotate, oracle, rng, dim, count, how):
    x = (rng.standard_normal((count, dim)) * np.exp(3 * rng.standard_normal((count, 1)))).astype(np.float32)
    centre = rng.standard_normal(dim).astype(np.float32) if how.endswith("centre") else None
    values, squares, products = rotate(x, centre, how.startswith("unit"), 2.0)
    x = x.astype(np.float64)
    x = x / np.linalg.norm(x, axis=1, keepdims=True) if how.startswith("unit") else x
    z = x if centre is None else x - centre
    norms = np.linalg.norm(z, axis=1)
    before = np.linalg.norm(x, axis=1) + (0.0 if centre is None else np.linalg.norm(centre))
    wanted = oracle.unit(z, 6) * (norms / math.sqrt(dim))[:, None]
    slack = oracle.rounding(dim) / math.sqrt(dim) * (before + norms)[:, None]
    assert (np.abs(values / 2 - wanted) <= slack).all()
    tolerance = (2 * math.log2(dim) + 8) * oracle.eps
    assert (np.abs(squares - norms**2) <= tolerance * (before + norms) * norms).all()
    if centre is None:
        assert products is None
    else:
        size = np.linalg.norm(x, axis=1) * np.linalg.norm(centre)
        assert (np.abs(products - x @ centre.astype(np.float64)) <= tolerance * size).all()
    assert values.dtype == squares.dtype == np.float32


def test_rows_that_are_not_finite_or_too_long_show_it_and_touch_no_others(rotate, rng):
    x = rng.standard_normal((9, 100)).astype(np.float32)
    x[1, 3], x[2, 5], x[4], x[6] = np.nan, np.inf, 3e38, 0.0
    values, squares, _ = rotate(x)
    np.testing.assert_array_equal(np.isfinite(squares), [True, False, False, True, False, True, True, True, True])
    assert (values[6] == 0).all()
    assert squares[6] == 0
    fine = [0, 3, 5, 7, 8]
    np.testing.assert_array_equal(values[fine], rotate(x[fine])[0])
    _, squares, _ = rotate(x, unit=True)
    np.testing.assert_array_equal(np.isfinite(squares), [True, False, False, *[True] * 6])
    np.testing.assert_allclose(squares[[0, 3, 4, 5]], 1.0, rtol=1e-5)
