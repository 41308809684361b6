"""QJL against its paper's formulas, with Gaussian and orthogonal projections."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from tqsearch.errors import InvalidInputError
from tqsearch.qjl import QJL

PROJECTIONS = ["gaussian", "orthogonal"]


def estimates(projection, dim, seeds, y, r):
    """Estimates of <y, r>, one an independent projection."""
    y, r = (torch.from_numpy(v[None].astype(np.float32)) for v in (y, r))
    values = []
    for seed in range(seeds):
        qjl = QJL(dim, seed, projection)
        values.append(float(qjl.inner_product(y, *qjl.encode(r))))
    return np.array(values)


def pair(rng, dim, cosine):
    """Two unit vectors with that cosine."""
    y = rng.standard_normal(dim)
    y /= np.linalg.norm(y)
    other = rng.standard_normal(dim)
    other -= other @ y * y
    return y, cosine * y + math.sqrt(1 - cosine**2) * other / np.linalg.norm(other)


def mean_magnitude(dim):
    """E |u| of sqrt(d) times a sphere coordinate, by quadrature over the angle."""
    above = integrate.quad(lambda a: abs(math.sin(a)) * math.cos(a) ** (dim - 2), -math.pi / 2, math.pi / 2)[0]
    return math.sqrt(dim) * above / integrate.quad(lambda a: math.cos(a) ** (dim - 2), -math.pi / 2, math.pi / 2)[0]


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("dim", [2, 3, 8, 33])
@pytest.mark.parametrize("cosine", [1.0, 0.6, -0.3])
def test_unbiased_over_projections(z, rng, projection, dim, cosine):
    y, r = pair(rng, dim, cosine)
    values = estimates(projection, dim, 600, 2.0 * y, 3.0 * r)
    if np.ptp(values) < 1e-4:  # orthogonal, parallel vectors, d = 2: |sin| + |cos| varies, but nothing does for d = 1
        assert values.mean() == pytest.approx(6 * cosine, rel=1e-5)
    else:
        assert abs(z(values, 6 * cosine)) < 5


@pytest.mark.parametrize("dim", [8, 33])
@pytest.mark.parametrize("cosine", [1.0, 0.5, 0.0])
def test_gaussian_variance_is_the_formula(z, rng, dim, cosine):
    """d terms pi/2 z^2 sign^2 with the mean taken off: (pi / 2 |y|^2 |r|^2 - <y, r>^2) / d, below the paper's
    pi / (2 d) |y|^2 |r|^2."""
    y, r = pair(rng, dim, cosine)
    values = estimates("gaussian", dim, 1000, y, r)
    variance = (math.pi / 2 - cosine**2) / dim
    assert abs(z((values - cosine) ** 2, variance)) < 5
    assert variance <= math.pi / (2 * dim)


@pytest.mark.parametrize("dim", [8, 33])
def test_orthogonal_variance_is_smaller(z, rng, dim):
    """With y uniform, E <y, v>^2 = |v|^2 / d of v = c |r| Q^T sign(Q r) / sqrt(d), and E <v, r> = |r|^2: the error has
    mean square |r|^2 (c^2 - 1) / d, with c = 1 / E |u|."""
    _, r = pair(rng, dim, 0.0)
    errors = []
    for seed in range(800):
        qjl = QJL(dim, seed, "orthogonal")
        y = rng.standard_normal(dim)
        y = (y / np.linalg.norm(y)).astype(np.float32)
        rows = torch.from_numpy(r[None].astype(np.float32))
        errors.append(float(qjl.inner_product(torch.from_numpy(y[None]), *qjl.encode(rows))) - y @ r)
    expected = (1 / mean_magnitude(dim) ** 2 - 1) / dim
    assert abs(z(np.array(errors) ** 2, expected)) < 5
    assert expected < (math.pi / 2 - 1 / dim) / dim


@pytest.mark.parametrize("dim", [2, 3, 8, 128])
def test_orthogonal_constant_is_exact_where_the_gaussian_one_would_be_biased(rng, dim):
    """Q is orthogonal, so the decoded vector has length c |r| whatever the signs: c is seen by itself."""
    qjl = QJL(dim, 5, "orthogonal")
    r = rng.standard_normal((1, dim)).astype(np.float32)
    signs, norms = qjl.encode(torch.from_numpy(r))
    decoded = qjl.decode(signs, norms).double().numpy()
    assert np.linalg.norm(decoded) == pytest.approx(np.linalg.norm(r) / mean_magnitude(dim), rel=1e-5)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_decoded_vectors_have_the_same_inner_products(rng, projection):
    qjl = QJL(21, 3, projection)
    r, y = (torch.from_numpy(rng.standard_normal((n, 21)).astype(np.float32)) for n in (9, 4))
    signs, norms = qjl.encode(r)
    np.testing.assert_allclose(norms.numpy(), np.linalg.norm(r.numpy().astype(float), axis=1), rtol=1e-6)
    products = qjl.inner_product(y, signs, norms)
    np.testing.assert_allclose(products.numpy(), (y @ qjl.decode(signs, norms).t()).numpy(), rtol=0, atol=2e-5)
    assert signs.shape == (9, 3)
    assert qjl.bytes_per_vector == 3 + 4


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("norm", [1e-40, 1e-25, 1e25, 1e36])
def test_norms_neither_overflow_nor_vanish(rng, projection, norm):
    r = rng.standard_normal((3, 16))
    r = r / np.linalg.norm(r, axis=1, keepdims=True) * norm
    _, norms = QJL(16, 0, projection).encode(torch.from_numpy(r.astype(np.float32)))
    np.testing.assert_allclose(norms.numpy(), norm, rtol=1e-4)


def test_signs_follow_the_angle(rng):
    """Two vectors' signs differ with probability angle / pi (Goemans and Williamson)."""
    dim, seeds = 16, 300
    y, r = pair(rng, dim, 0.5)
    rows = torch.from_numpy(np.stack([y, r]).astype(np.float32))
    differing = 0
    for seed in range(seeds):
        signs, _ = QJL(dim, seed, "gaussian").encode(rows)
        differing += int(np.unpackbits((signs[0] ^ signs[1]).numpy()).sum())
    p = math.acos(0.5) / math.pi
    assert stats.binomtest(differing, dim * seeds, p).pvalue > 1e-6


def test_a_bad_projection_is_named():
    with pytest.raises(InvalidInputError, match="'gaussian' or 'orthogonal', got 'sparse'"):
        QJL(8, 0, "sparse")
