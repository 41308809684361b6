"""What training learns: widths beside every possible choice, axes and variances beside numpy, and odd samples."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from scipy import optimize, special, stats

from tqsearch.errors import InvalidInputError
from tqsearch.plan import BitPlan
from tqsearch.training import spectrum
from tqsearch.training.allocation import allocate
from tqsearch.training.basis import Basis
from tqsearch.training.learn import Learnt, learn, spectrum_of
from tqsearch.training.neighbours import neighbours_of
from tqsearch.training.spectrum import principal_axes

WIDTHS = (0, 1, 2, 3, 4, 6, 8)


def least_error_of_even(width: int) -> float:
    places = np.arange(2**width) - (2**width - 1) / 2

    def error(step: float) -> float:
        edges = np.concatenate([[-np.inf], (places[1:] - 0.5) * step, [np.inf]])
        mass, first = np.diff(special.ndtr(edges)), -np.diff(stats.norm.pdf(edges))
        return float(1 - 2 * (places * step * first).sum() + ((places * step) ** 2 * mass).sum())

    return float(optimize.minimize_scalar(error, bounds=(0, 16 / 2**width), method="bounded").fun)


def distortion_of(width: int) -> float:
    """Of the levels for N(0, 1): above 4 bits of equal distance, else by Lloyd's iteration."""
    if width > 4:
        return least_error_of_even(width)
    levels = np.sqrt(3) * stats.norm.ppf((np.arange(2**width) + 0.5) / 2**width)
    for _ in range(400):
        edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
        mass, first = np.diff(special.ndtr(edges)), -np.diff(stats.norm.pdf(edges))
        levels = first / mass
    return float(1 - (first**2 / mass).sum())


DISTORTION = {width: distortion_of(width) for width in WIDTHS}


def nbytes(size: int, width: int) -> int:
    return sum(-(-size * plane // 8) for plane in (8, 4, 2, 1) if width & plane)


def widths_of(plan: BitPlan) -> np.ndarray:
    return np.repeat([width for _, width in plan.pairs()], [size for size, _ in plan.pairs()])


@pytest.mark.parametrize("dim", [1, 8, 13, 32, 37])
@pytest.mark.parametrize("steep", [0.0, 1.0, 4.0])
def test_widths_are_the_best_of_all(dim: int, steep: float) -> None:
    """Against every choice of a width for every block, at every budget."""
    rng = np.random.default_rng(dim)
    weights = np.sort(rng.random(dim) * np.exp(-steep * np.arange(dim) / 8))[::-1].copy()
    sizes = [min(8, dim - start) for start in range(0, dim, 8)]
    sums = [float(weights[start : start + 8].sum()) for start in range(0, dim, 8)]
    best: dict[int, float] = {}
    for chosen in itertools.product(WIDTHS, repeat=len(sizes)):
        cost = sum(weight * DISTORTION[width] for weight, width in zip(sums, chosen, strict=True))
        used = sum(nbytes(size, width) for size, width in zip(sizes, chosen, strict=True))
        best[used] = min(best.get(used, np.inf), cost)
    for budget in range(dim + 3):
        plan = allocate(weights, budget)
        assert plan.dim == dim
        assert sum(nbytes(size, width) for size, width in plan.pairs()) <= budget
        found = sum(w * DISTORTION[int(b)] for w, b in zip(weights, widths_of(plan), strict=True))
        assert found <= min(cost for used, cost in best.items() if used <= budget) * (1 + 1e-4) + 1e-15


def test_widths_descend_with_the_weights_and_fill_aligned_blocks() -> None:
    weights = np.arange(1, 257)[::-1] ** -1.0
    weights = np.sort(weights)[::-1].copy()
    plan = allocate(weights, 64, block=32)
    assert all(size % 32 == 0 for size, _ in plan.pairs())
    assert np.all(np.diff(widths_of(plan)) <= 0)
    assert len({width for _, width in plan.pairs()}) == len(plan.pairs())


def test_steps_of_two_bytes_are_not_taken_greedily() -> None:
    """Two blocks, eight bytes: one gets all, three quarters or half of them, by ratios of weights computed here."""
    d = DISTORTION
    least = (d[6] - d[8]) / (d[0] - d[2])  # w2 / w1 at which (8, 0) and (6, 2) cost the same
    most = (d[4] - d[6]) / (d[2] - d[4])  # and (6, 2) and (4, 4)
    shares = ((0.9 * least, [(8, 8), (8, 0)]), (1.1 * least, [(8, 6), (8, 2)]), (0.9 * most, [(8, 6), (8, 2)]))
    for ratio, wanted in (*shares, (1.1 * most, [(16, 4)])):
        assert allocate(np.repeat([1.0, ratio], 8), 8).pairs() == wanted


def test_weights_of_zero_get_no_bits() -> None:
    assert allocate(np.repeat([1.0, 0.0], 8), 16).pairs() == [(8, 8), (8, 0)]
    assert allocate(np.zeros(16), 16).pairs() == [(16, 0)]


@pytest.mark.parametrize(
    ("weights", "budget", "block"),
    [
        (np.ones((2, 8)), 4, 8),
        (np.ones(0), 4, 8),
        (np.array([1.0, -1.0]), 4, 8),
        (np.array([np.nan]), 4, 8),
        (np.ones(8), -1, 8),
        (np.ones(8), 4, 12),
        (np.ones(8), 4, 0),
    ],
)
def test_bad_weights(weights: Any, budget: int, block: int) -> None:
    with pytest.raises(InvalidInputError):
        allocate(weights, budget, block)


# Axes and variances


def centred(n: int, dim: int, seed: int = 0, power: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.standard_normal((dim, dim)))[0]
    rows = rng.standard_normal((n, dim)) * np.arange(1, dim + 1) ** (-power / 2) @ turn
    return rows - rows.mean(0)


def shrunk_by_the_book(rows: np.ndarray) -> np.ndarray:
    """Ledoit and Wolf's estimate of the covariance, matrix by matrix."""
    n, dim = rows.shape
    sample = rows.T @ rows / n
    target = np.trace(sample) / dim * np.eye(dim)
    spread = np.sum((sample - target) ** 2)
    chance = sum(np.sum((np.outer(row, row) - sample) ** 2) for row in rows) / n**2
    share = min(chance / spread, 1.0) if dim > 1 else 1.0
    return share * target + (1 - share) * sample


@pytest.mark.parametrize(("n", "dim"), [(300, 12), (20, 40), (2, 5), (500, 1)])
def test_axes_diagonalise_the_shrunk_covariance(n: int, dim: int) -> None:
    rows = centred(n, dim)
    axes, variances = (part.numpy() for part in principal_axes(torch.from_numpy(rows)))
    np.testing.assert_allclose(axes @ axes.T, np.eye(dim), atol=1e-12)
    wanted = shrunk_by_the_book(rows)
    np.testing.assert_allclose(axes.T @ np.diag(variances) @ axes, wanted, atol=1e-12 * np.trace(wanted))
    assert (np.diff(variances) <= 0).all()
    assert (axes[np.arange(dim), np.abs(axes).argmax(1)] > 0).all()


def test_randomized_axes_find_what_the_exact_ones_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """A steep spectrum: the leading axes carry the exact ones' variance, the rest is one plateau of the right sum."""
    rows = centred(600, 96, power=3.0)
    exact = np.linalg.eigvalsh(rows.T @ rows / 600)[::-1]
    monkeypatch.setattr(spectrum, "EXACT_DIM", 95)
    monkeypatch.setattr(spectrum, "RANK", 24)
    monkeypatch.setattr(spectrum, "_EXTRA", 8)
    monkeypatch.setattr(spectrum, "_shrunk", lambda variances, _: variances)
    axes, variances = (part.numpy() for part in principal_axes(torch.from_numpy(rows), seed=3))
    np.testing.assert_allclose(axes @ axes.T, np.eye(96), atol=1e-10)
    # Three products with S, then a Rayleigh quotient: what lies beyond the 32 columns sinks as a sixth power.
    bound = 64 * exact[:24] * (exact[32] / exact[:24]) ** 6  # of 64 such axes
    assert (np.abs(variances[:24] - exact[:24]) <= bound + 1e-14).all()
    np.testing.assert_allclose(variances[24:], exact[24:].mean(), rtol=1e-2)
    along = np.square(rows @ axes.T).mean(0)
    np.testing.assert_allclose(along[:24], variances[:24], rtol=1e-9)
    np.testing.assert_allclose(along.sum(), exact.sum(), rtol=1e-9)
    again = principal_axes(torch.from_numpy(rows), seed=3)[0].numpy()
    np.testing.assert_array_equal(again, axes)


# The whole


def learnt(
    rows: np.ndarray, metric: str = "l2", nbytes: int | None = None, queries: Any = None, power: float = 0.5
) -> Learnt | None:
    budget = rows.shape[1] // 4 if nbytes is None else nbytes
    spectrum = spectrum_of(torch.from_numpy(rows.astype(np.float32)), 0)
    asked = None if queries is None else torch.from_numpy(queries.astype(np.float32))
    if spectrum is None:
        return None
    sample = torch.from_numpy(rows.astype(np.float32))
    near = neighbours_of(spectrum.axes, spectrum.variances, spectrum.centre, sample, asked, metric)
    return learn(spectrum, near, asked, metric, lambda keeps: budget - 2 * keeps, power=power)


def test_constant_and_duplicate_columns_cost_nothing() -> None:
    """Of 32 columns 8 are constant and 8 duplicates: no axis of width above 0 touches a constant one."""
    rows = centred(2000, 32, power=0.5)
    rows[:, 8:16] = 3.0
    rows[:, 16:24] = rows[:, :8]
    found = learnt(rows)
    assert found is not None
    axes = found.basis.axes.numpy()
    assert np.abs(axes[:, 8:16]).max() < 1e-5
    np.testing.assert_allclose(axes[:, 16:24], axes[:, :8], atol=1e-5)
    assert len(axes) <= 16


def test_queries_move_the_bits() -> None:
    """Queries lie in a quarter of the dimensions, that of least variance: which then get the wide codes."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((4000, 64)) * np.repeat([1.2, 0.8], [48, 16])
    queries = rng.standard_normal((300, 64)) * np.repeat([0.01, 1.0], [48, 16])
    for asked, inside in ((queries, True), (None, False)):
        found = learnt(rows, nbytes=16, queries=asked)
        assert found is not None
        widths = widths_of(found.basis.plan)
        energy = (found.basis.axes.numpy()[:, 48:] ** 2).sum(1)
        widest = energy[widths[widths > 0] == widths.max()]
        assert widest.min() > 0.9 if inside else widest.max() < 0.1


@pytest.mark.parametrize("power", [0.5, 0.75, 1.0])
@pytest.mark.parametrize("asked", [None, 1, 300])
def test_widths_follow_the_moments_of_the_queries(power: float, asked: int | None) -> None:
    """The plan is that of weights made in numpy, in which one query says nothing and 300 say nearly all."""
    rows = centred(3000, 64)
    turn = np.linalg.eigh(rows.T @ rows / len(rows))[1][:, ::-1]
    queries = np.random.default_rng(3).standard_normal((asked or 1, 64)) * np.linspace(0.1, 3, 64) @ turn.T
    found = learnt(rows, nbytes=16, queries=None if asked is None else queries, power=power)
    assert found is not None
    variances = np.linalg.eigvalsh(shrunk_by_the_book(rows.astype(np.float32)))[::-1]
    moments = variances
    if asked is not None:
        squares = np.square((queries - found.centre.numpy()) @ turn)
        given, alike = squares.mean(0), variances * squares.mean() / variances.mean()
        apart = np.average(np.square(given / alike - 1), weights=alike)
        chance = np.average(np.maximum(squares.var(0), 2 * given**2) / asked / alike**2, weights=alike)
        known = max(0.0, 1 - chance / apart)
        assert known == 0 if asked == 1 else known > 0.9
        moments = alike + known * (given - alike)
    weights = variances * (moments / moments.mean()) ** power
    assert found.basis.plan.pairs() == allocate(np.sort(weights)[::-1].copy(), 16).pairs()


@pytest.mark.parametrize(("offset", "keeps"), [(0.0, False), (30.0, True)])
def test_the_product_with_the_centre_is_kept_where_it_pays(offset: float, keeps: bool) -> None:
    rows = centred(2000, 32, power=0.3) + offset
    found = learnt(rows, "ip")
    assert found is not None
    assert found.keeps_product is keeps


@pytest.mark.parametrize("rows", [np.ones((100, 8)), np.zeros((100, 8)), centred(63, 8)])
def test_nothing_to_learn(rows: np.ndarray) -> None:
    assert learnt(rows) is None


def test_a_basis_must_fit_its_plan() -> None:
    plan = BitPlan.from_pairs([(8, 2), (8, 0)])
    Basis(plan, torch.eye(16)[:8], torch.ones(16))
    for axes, deviations in (
        (torch.eye(16), torch.ones(16)),
        (torch.eye(16)[:8], torch.ones(8)),
        (torch.eye(16)[:8], torch.zeros(16)),
        (torch.eye(16)[:8] * torch.nan, torch.ones(16)),
    ):
        with pytest.raises(InvalidInputError, match="axes and deviations must"):
            Basis(plan, axes, deviations)


def test_distortions_are_weighted_by_variance() -> None:
    plan = BitPlan.from_pairs([(8, 2), (8, 1), (8, 0)])
    basis = Basis(plan, torch.eye(24)[:16], torch.repeat_interleave(torch.tensor([2.0, 1.0, 0.5]), 8))
    kept = 4 * DISTORTION[2] + 1 * DISTORTION[1]
    assert basis.distortion == pytest.approx((kept + 0.25) / 5.25, rel=1e-6)
    assert basis.coded_distortion == pytest.approx(kept / 5, rel=1e-6)


def test_bands_of_8_bits_are_cut_where_the_deviations_have_halved() -> None:
    """So that one scale of an int8 query serves each piece; the bytes of a row stay those of the plan."""
    plan = BitPlan.from_pairs([(96, 8), (64, 4), (8, 0), (16, 3)])
    sigma = torch.cat([torch.linspace(8, 2.1, 96), torch.linspace(2, 0.1, 64), torch.ones(8), torch.ones(16)])
    basis = Basis(plan, torch.eye(184)[:176], sigma)
    # 8 at 0, 6.0 at 32, 4.04 at 64: no cut yet; a steeper one is cut at 32, to 1.7, and then at 64, to 0.4.
    assert [(band.size, band.width) for band in basis.scanned_bands] == [(96, 8), (64, 4), (16, 3)]
    steep = Basis(plan, torch.eye(184)[:176], torch.cat([8 * torch.exp(-torch.arange(96) / 21), sigma[96:]]))
    assert [(band.size, band.width) for band in steep.scanned_bands] == [(32, 8)] * 3 + [(64, 4), (16, 3)]
    assert sum(band.nbytes for band in steep.scanned_bands) == plan.bytes_per_vector
