import math

import numpy as np
import pytest
from scipy import integrate, stats

from tqsearch.codebook import BetaLaw, NormalLaw, _solve_tridiagonal, even, lloyd_max, on_grid
from tqsearch.errors import InvalidInputError

DIMS = [None, 2, 3, 4, 8, 128, 1536]
# Max, "Quantizing for minimum distortion", 1960: positive levels of N(0, 1), as printed there.
PUBLISHED_LEVELS = {
    1: [0.7980],
    2: [0.4528, 1.510],
    3: [0.2451, 0.7560, 1.344, 2.152],
    4: [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733],
}
PUBLISHED_DISTORTION = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.002499}


def integral(function, low, high, dim):
    """Of function(u) times the law's density, by adaptive quadrature; for Beta over the angle u = sqrt(d) sin a."""
    if dim is None:
        value, _ = integrate.quad(lambda u: function(u) * stats.norm.pdf(u), low, min(high, 12.0), epsabs=1e-15)
        return value
    root = math.sqrt(dim)
    start, stop = (math.asin(min(edge / root, 1.0)) for edge in (low, high))
    stop = min(stop, 12.0 / root)

    def by_angle(a):
        return function(root * math.sin(a)) * math.cos(a) ** (dim - 2)

    norm = 2 * integrate.quad(lambda a: math.cos(a) ** (dim - 2), 0, min(math.pi / 2, 12 / root), epsabs=1e-15)[0]
    return integrate.quad(by_angle, start, stop, epsabs=1e-15)[0] / norm


def upper_cells(book, dim):
    """(low, high, level) of each cell above 0."""
    half = book.levels[2 ** (book.bits - 1) :]
    inner = book.boundaries[2 ** (book.bits - 1) :]
    edges = [0.0, *inner, np.inf if dim is None else math.sqrt(dim)]
    return list(zip(edges[:-1], edges[1:], half, strict=True))


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
def test_levels_are_centroids_and_boundaries_are_midpoints(bits, dim):
    book = lloyd_max(bits, dim)
    np.testing.assert_allclose(book.boundaries, (book.levels[1:] + book.levels[:-1]) / 2, rtol=0, atol=1e-15)
    for low, high, level in upper_cells(book, dim):
        centroid = integral(lambda u: u, low, high, dim) / integral(lambda u: 1.0, low, high, dim)
        assert level == pytest.approx(centroid, abs=1e-9)
    np.testing.assert_array_equal(book.levels, -book.levels[::-1])
    assert book.boundaries[2 ** (bits - 1) - 1] == 0.0


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("bits", [1, 2, 4, 6])
def test_distortion_is_the_integral_of_the_squared_error(bits, dim):
    book = lloyd_max(bits, dim)
    error = sum(
        integral(lambda u, level=level: (u - level) ** 2, low, high, dim) for low, high, level in upper_cells(book, dim)
    )
    assert book.distortion == pytest.approx(2 * error, rel=1e-9)


@pytest.mark.parametrize("dim", [None, 2, 3, 4, 7, 8, 63, 128, 1536, 8192])
@pytest.mark.parametrize("bits", range(1, 8))
def test_equals_scipys_solution_of_the_centroid_equations(oracle, bits, dim):
    levels, boundaries = oracle.lloyd(bits, dim)
    book = lloyd_max(bits, dim)
    np.testing.assert_allclose(book.levels, levels, rtol=0, atol=1e-9)
    np.testing.assert_allclose(book.boundaries, boundaries, rtol=0, atol=1e-9)
    assert book.distortion == pytest.approx(oracle.distortion(bits, dim), rel=1e-7)


@pytest.mark.parametrize("dim", [None, 3, 8, 24, 63, 1536])
@pytest.mark.parametrize("bits", [1, 2, 5, 6, 7, 8])
def test_even_levels_are_the_best_of_equal_distance(oracle, bits, dim):
    """Beside a search for the step of least error, where the error, known to 1e-12 of itself, is flat: to 1e-5."""
    levels, error = oracle.even(bits, dim)
    book = even(bits, dim)
    np.testing.assert_allclose(book.levels, levels, rtol=1e-5)
    assert book.distortion == pytest.approx(error, rel=1e-7)
    np.testing.assert_allclose(np.diff(book.levels), book.levels[-1] - book.levels[-2], rtol=1e-12)
    np.testing.assert_array_equal(book.levels, -book.levels[::-1])
    np.testing.assert_allclose(book.boundaries, (book.levels[1:] + book.levels[:-1]) / 2, rtol=0, atol=1e-14)


@pytest.mark.parametrize("bits", range(1, 9))
def test_even_levels_where_the_best_are_even(bits):
    """At one bit, and on the sphere of R^3."""
    np.testing.assert_allclose(even(1, 17).levels, lloyd_max(1, 17).levels, rtol=1e-12)
    np.testing.assert_allclose(even(bits, 3).levels, lloyd_max(bits, 3).levels, rtol=1e-9)
    assert even(bits, 1).levels.tolist() == lloyd_max(bits, 1).levels.tolist()


def test_eight_bits_of_the_normal_law(oracle):
    np.testing.assert_allclose(lloyd_max(8).levels, oracle.lloyd(8, None)[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("bits", PUBLISHED_LEVELS)
def test_published_levels(bits):
    half = lloyd_max(bits).levels[2 ** (bits - 1) :]
    np.testing.assert_allclose(half, PUBLISHED_LEVELS[bits], rtol=6e-4)  # four digits


@pytest.mark.parametrize("bits", PUBLISHED_DISTORTION)
def test_published_distortion(bits):
    """To the accuracy of a table computed in 1960: its last two entries are 0.0095010 and 0.0025037 by quadrature."""
    assert lloyd_max(bits).distortion == pytest.approx(PUBLISHED_DISTORTION[bits], rel=2.5e-3)


@pytest.mark.parametrize("bits", range(1, 9))
def test_distortion_lies_between_the_rate_distortion_bound_and_the_papers(bits):
    assert 4.0**-bits < lloyd_max(bits).distortion < math.sqrt(3) * math.pi / 2 * 4.0**-bits


@pytest.mark.parametrize("bits", range(1, 9))
def test_dim_three_is_uniform_so_its_levels_are_evenly_spaced(bits):
    """On the sphere of R^3 a coordinate is uniform (Archimedes): cells of equal width, distortion 4^-b."""
    book = lloyd_max(bits, 3)
    expected = math.sqrt(3) * ((2 * np.arange(2**bits) + 1) / 2**bits - 1)
    np.testing.assert_allclose(book.levels, expected, rtol=0, atol=1e-12)
    assert book.distortion == pytest.approx(4.0**-bits, rel=1e-9)


def test_dim_two_at_one_bit_by_hand():
    """E |sqrt(2) cos a| = 2 sqrt(2) / pi, so the distortion is 1 - 8 / pi^2."""
    book = lloyd_max(1, 2)
    np.testing.assert_allclose(book.levels, [-2 * math.sqrt(2) / math.pi, 2 * math.sqrt(2) / math.pi], rtol=1e-13)
    assert book.distortion == pytest.approx(1 - 8 / math.pi**2, rel=1e-12)


@pytest.mark.parametrize("bits", range(1, 9))
def test_dim_one_holds_the_only_two_values(bits):
    book = lloyd_max(bits, 1)
    assert book.levels[0] == -1.0
    assert book.levels[-1] == 1.0
    assert book.distortion == 0.0
    assert on_grid(book, 127.0, 1).distortion == 0.0


def test_zero_bits_is_the_mean():
    book = lloyd_max(0, 16)
    assert book.levels.tolist() == [0.0]
    assert book.boundaries.size == 0
    assert book.distortion == 1.0


@pytest.mark.parametrize("dim", [2, 3, 5, 64, 8192])
def test_beta_density_is_that_of_a_sphere_coordinate(dim):
    """u^2 / d is Beta(1/2, (d - 1) / 2): the density follows by change of variable, and so do the moments."""
    law, root = BetaLaw(dim), math.sqrt(dim)
    u = np.linspace(0.01, 0.99, 23) * min(root, 5.0)
    expected = stats.beta.pdf(u**2 / dim, 0.5, (dim - 1) / 2) * u / dim
    np.testing.assert_allclose(law.density(u), expected, rtol=1e-9)
    edges = np.array([0.0, 0.3, 0.7, min(root, 4.0)])
    mass, first = law.moments(edges)
    for i in range(3):
        assert mass[i] == pytest.approx(integral(lambda t: 1.0, edges[i], edges[i + 1], dim), rel=1e-9)
        assert first[i] == pytest.approx(integral(lambda t: t, edges[i], edges[i + 1], dim), rel=1e-9)


def test_normal_law_moments():
    edges = np.array([0.0, 0.5, 3.0, 9.0, np.inf])
    mass, first = NormalLaw().moments(edges)
    np.testing.assert_allclose(mass, -np.diff(stats.norm.sf(edges)), rtol=1e-12)
    np.testing.assert_allclose(first, -np.diff(stats.norm.pdf(edges)), rtol=1e-12)


@pytest.mark.parametrize("dim", [None, 4, 128])
@pytest.mark.parametrize("offset", [127.0, 63.5])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
def test_grid_levels_and_their_distortion(bits, offset, dim):
    book = lloyd_max(bits, dim)
    grid = on_grid(book, offset, dim)
    assert grid.steps.dtype == np.int64
    assert grid.steps.min() >= 0
    assert grid.steps.max() <= 2 * offset
    rounded = (grid.steps - grid.offset) * grid.step
    assert np.abs(rounded - book.levels).max() <= grid.step / 2 * (1 + 1e-12)  # the nearest step
    np.testing.assert_allclose(rounded, -rounded[::-1], rtol=0, atol=1e-14)
    cells = upper_cells(book, dim)
    error = sum(
        integral(lambda u, level=level: (u - level) ** 2, low, high, dim)
        for (low, high, _), level in zip(cells, rounded[len(cells) :], strict=True)
    )
    assert grid.distortion == pytest.approx(2 * error, rel=1e-8)
    assert grid.distortion <= spanning_grid_distortion(book, cells, offset, dim) * (1 + 1e-12)


def spanning_grid_distortion(book, cells, offset, dim):
    """Of the simplest grid: the outermost level on its last step."""
    step = book.levels[-1] / offset
    total = 0.0
    for low, high, level in cells:
        rounded = (round(level / step + offset) - offset) * step
        total += integral(lambda u, rounded=rounded: (u - rounded) ** 2, low, high, dim)
    return 2 * total


def test_grid_costs_little():
    """At 4 bits 0.1 % of the distortion with 254 steps; half the steps cost by the square, a few times that."""
    book = lloyd_max(4)
    fine = on_grid(book, 127.0).distortion / book.distortion - 1
    coarse = on_grid(book, 63.5).distortion / book.distortion - 1
    assert 0 < fine < 0.0015
    assert fine < coarse < 0.0065


@pytest.mark.parametrize("bits", [-1, 9, 2.5, "4", None])
def test_a_bad_width_is_named(bits):
    with pytest.raises(InvalidInputError, match="from 0 to 8, got " + repr(bits).replace(".", r"\.")):
        lloyd_max(bits)


def test_a_bad_dim_is_named():
    with pytest.raises(InvalidInputError, match="dim must be at least 1, got 0"):
        lloyd_max(4, 0)


@pytest.mark.parametrize("count", [1, 2, 128])
def test_tridiagonal_systems_are_solved(count: int) -> None:
    """Beside the dense solution; the diagonal dominates, as it does in the levels' equations."""
    rng = np.random.default_rng(count)
    below, above, right = rng.uniform(-0.5, 0.5, (3, count))
    diagonal = rng.uniform(1.1, 2.0, count)
    matrix = np.diag(diagonal) + np.diag(below[1:], -1) + np.diag(above[:-1], 1)
    found = _solve_tridiagonal(below, diagonal, above, right)
    np.testing.assert_allclose(found, np.linalg.solve(matrix, right), rtol=1e-12, atol=1e-14)
