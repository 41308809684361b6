"""The codec's statistics against theory. A test fails at 5 standard errors of its own sample: once in 2 million runs.

Uniformly random unit vectors make the law of a coordinate exact for any rotation; fixed vectors need random rotations.
"""

import json
import math

import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks import distortion
from tqsearch import BitPlan, TurboQuantizer, kernels

PROD = [("prod", "gaussian"), ("prod", "orthogonal")]


def sphere(rng, count, dim):
    x = rng.standard_normal((count, dim))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def with_norm_scale(quantizer, x):
    """The paper's algorithm 1: scale |x| / sqrt(d)."""
    encoded = quantizer.encode_levels(torch.from_numpy(x.astype(np.float32)))
    rotated = kernels.reconstruct(
        encoded.packed, encoded.norms / math.sqrt(quantizer.dim), quantizer.tables(torch.device("cpu"))
    )
    return quantizer.rotation.invert(rotated).double().numpy()


def squared_errors(estimate, x):
    return ((estimate - x) ** 2).sum(axis=1)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dim", [2, 8, 100, 128])
def test_mse_is_the_exact_laws_distortion(oracle, z, rng, dim, bits):
    x = sphere(rng, 400_000 // dim // 2, dim)
    errors = squared_errors(with_norm_scale(TurboQuantizer(dim, bits, seed=bits), x), x)
    assert abs(z(errors, oracle.distortion(bits, dim))) < 5


def test_the_normal_law_would_be_told_from_the_exact_one(oracle, z, rng):
    """The test above has power: at d = 8 and 4 bits the levels of N(0, 1) are off by far more than 5 errors."""
    x = sphere(rng, 25_000, 8)
    errors = squared_errors(with_norm_scale(TurboQuantizer(8, 4), x), x)
    assert z(errors, oracle.distortion(4, None)) < -20


@pytest.mark.parametrize("bits", [2.5, 3.5, BitPlan.from_pairs([(16, 4), (80, 2), (32, 0)])])
def test_mse_of_bands_is_their_mean(oracle, z, rng, bits):
    x = sphere(rng, 4000, 128)
    quantizer = TurboQuantizer(128, bits)
    expected = sum(size * oracle.distortion(width, 128) for size, width in quantizer.plan.pairs()) / 128
    assert abs(z(squared_errors(with_norm_scale(quantizer, x), x), expected)) < 5


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_mse_of_decode_is_that_of_its_definition(oracle, rng, bits):
    """|x - (1 - D) s x_hat|^2 of independent sphere vectors through scipy's levels, in numpy: two samples, one mean."""
    dim, count = 64, 8000
    x = sphere(rng, count, dim)
    quantizer = TurboQuantizer(dim, bits)
    ours = squared_errors(quantizer.decode(quantizer.encode(x)).double().numpy(), x)
    levels, boundaries = oracle.lloyd(bits, dim)
    u = sphere(rng, count, dim) * math.sqrt(dim)
    estimate = levels[np.searchsorted(boundaries, u)]
    estimate *= (1 - oracle.distortion(bits, dim)) * dim / (u * estimate).sum(axis=1, keepdims=True)
    theirs = squared_errors(estimate, u) / dim
    error = math.sqrt((ours.var() + theirs.var()) / count)
    assert abs(ours.mean() - theirs.mean()) < 5 * error


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 2.5])
@pytest.mark.parametrize("rotation", ["hadamard", "dense"])
def test_inner_products_of_the_mse_form_are_unbiased_and_the_norm_scale_is_not(oracle, z, rng, bits, rotation):
    dim = 64
    x = sphere(rng, 12_000, dim)
    q = x + sphere(rng, 12_000, dim)  # near its vector: with independent queries any scale looks unbiased
    quantizer = TurboQuantizer(dim, bits, rotation=rotation)
    unbiased = quantizer.decode(quantizer.encode(x), unbiased=True).double().numpy()
    assert abs(z((q * (unbiased - x)).sum(axis=1), 0.0)) < 5
    shrunk = (q * (with_norm_scale(quantizer, x) - x)).sum(axis=1)
    distortion = sum(size * oracle.distortion(width, dim) for size, width in quantizer.plan.pairs()) / dim
    assert abs(z(shrunk, -distortion)) < 5  # E <q, x_hat> = (1 - D) <q, x>, and <q, x> is 1 in the mean
    assert z(shrunk, 0.0) < -20


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_fixed_vectors_are_unbiased_over_haar_rotations(z, rng, bits):
    """One pair far from random: a one-hot vector and a flat query."""
    dim = 24
    x, q = np.eye(dim)[:1], np.full((1, dim), 1.0)
    estimates = []
    for seed in range(250):
        quantizer = TurboQuantizer(dim, bits, rotation="dense", seed=seed)
        estimates.append(quantizer.inner_product(q, quantizer.encode(x))[0, 0])
    assert abs(z(np.array(estimates), 1.0)) < 5


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize(("form", "projection"), PROD)
def test_prod_form_is_unbiased_with_the_variance_of_theory(oracle, z, rng, form, projection, bits):
    """One sample a seed. With independent uniform queries the error has mean square D' (pi / 2 - 1 / d) / d (Gaussian)
    or D' (c^2 - 1) / d (orthogonal), D' the distortion at b - 1 bits; below the paper's sqrt(3) pi^2 4^-b / d."""
    dim, seeds, count = 48, 60, 250
    means, squares = [], []
    for seed in range(seeds):
        quantizer = TurboQuantizer(dim, bits, form=form, projection=projection, seed=seed)
        x, q = sphere(rng, count, dim), sphere(rng, count, dim)
        difference = quantizer.decode(quantizer.encode(x)).double().numpy() - x
        means.append(((x + q) * difference).sum(axis=1).mean())
        squares.append(((q * difference).sum(axis=1) ** 2).mean())
    assert abs(z(np.array(means), 0.0)) < 5
    lower = oracle.distortion(bits - 1, dim)
    magnitude = math.sqrt(dim / math.pi) * math.gamma(dim / 2) / math.gamma((dim + 1) / 2)  # E |u|
    factor = math.pi / 2 - 1 / dim if projection == "gaussian" else 1 / magnitude**2 - 1
    assert abs(z(np.array(squares), lower * factor / dim)) < 5
    bound = math.sqrt(3) * math.pi**2 * 4.0**-bits / dim
    assert np.mean(squares) + 5 * np.std(squares) / math.sqrt(seeds) < bound


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_variance_of_the_mse_form(oracle, rng, bits):
    """The error is orthogonal to x, of squared length |x_hat|^2 d / <u, x_hat>^2 - 1 a unit vector, and a uniform query
    sees 1 / d of it: against numpy's mean of that over scipy's levels, which is D / (1 - D) up to O(1 / d)."""
    dim, count = 128, 6000
    x, q = sphere(rng, count, dim), sphere(rng, count, dim)
    quantizer = TurboQuantizer(dim, bits)
    ours = (q * (quantizer.decode(quantizer.encode(x), unbiased=True).double().numpy() - x)).sum(axis=1) ** 2 * dim
    levels, boundaries = oracle.lloyd(bits, dim)
    u = sphere(rng, count, dim) * math.sqrt(dim)
    estimate = levels[np.searchsorted(boundaries, u)]
    theirs = dim * (estimate**2).sum(axis=1) / (u * estimate).sum(axis=1) ** 2 - 1
    assert abs(ours.mean() - theirs.mean()) < 5 * math.sqrt((ours.var() + theirs.var()) / count)
    expected = oracle.distortion(bits, dim)
    assert theirs.mean() == pytest.approx(expected / (1 - expected), rel=5 / dim)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_distortion_does_not_depend_on_the_datas_orientation(rng, bits):
    """Haar rotation: sparse, skewed data and the same data turned by a fixed rotation have one mean error."""
    dim, seeds = 16, 150
    x = np.concatenate([np.eye(dim)[:4], np.ones((2, dim)), np.diag(0.5 ** np.arange(dim))[:4] + 0.1])
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    turned = x @ stats.ortho_group.rvs(dim, random_state=1)
    samples = [[], []]
    for seed in range(2 * seeds):
        quantizer = TurboQuantizer(dim, bits, rotation="dense", seed=seed)
        data = (x, turned)[seed % 2]
        samples[seed % 2].append(squared_errors(quantizer.decode(quantizer.encode(data)).double().numpy(), data).mean())
    difference = np.mean(samples[0]) - np.mean(samples[1])
    assert abs(difference) < 5 * math.sqrt((np.var(samples[0]) + np.var(samples[1])) / seeds)


@pytest.mark.parametrize(
    ("dim", "bits"),
    [(dim, bits) for dim in (100, 128, 384) for bits in (1, 2, 3)],
)
def test_hadamard_keeps_the_papers_bound_on_worst_inputs(dim, bits):
    """sqrt(3) pi / 2 4^-b for every vector, in the mean over seeds: one-hot, flat, two-hot, alternating."""
    x = np.stack(
        [np.eye(dim)[0], np.eye(dim)[-1], np.ones(dim), np.eye(dim)[3] + np.eye(dim)[4], (-1.0) ** np.arange(dim)]
    )
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    errors = np.stack([squared_errors(with_norm_scale(TurboQuantizer(dim, bits, seed=s), x), x) for s in range(60)])
    upper = errors.mean(axis=0) + 5 * errors.std(axis=0) / math.sqrt(len(errors))
    assert (upper < math.sqrt(3) * math.pi / 2 * 4.0**-bits).all()


def test_benchmark_saves_a_table_that_holds(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(distortion, "SAMPLES", {16: (6, 300)})
    monkeypatch.setattr(distortion, "TOLERANCE", 0.2)
    threads = torch.get_num_threads()
    status = distortion.main(["--output", str(tmp_path / "out.json")])
    torch.set_num_threads(threads)
    assert status == 0, capsys.readouterr().out
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["environment"]["seed"] == 0
    assert [row[:2] for row in result["rows"]] == [[16, bits] for bits in (1, 2, 3, 4, 5)]
    assert all(len(row) == len(result["columns"]) for row in result["rows"])
    two = dict(zip(result["columns"], result["rows"][1], strict=True))
    assert two["Lloyd-Max, N(0, 1)"] == pytest.approx(0.1175, rel=1e-3)
    assert two["rate-distortion bound"] == 0.0625
    assert two["paper's bound"] == pytest.approx(2.7207 / 16, rel=1e-3)
    assert two["prod: paper's bound"] == pytest.approx(17.095 / 16, rel=1e-3)


@pytest.mark.parametrize(
    ("column", "value", "breaks"),
    [
        ("MSE, norm scale", 0.1013, True),
        ("MSE, norm scale", 0.0987, True),
        ("MSE, norm scale", 0.1009, False),
        ("MSE, decode", 0.1013, True),
        ("MSE, decode", 0.0980, False),  # the unbiased scale takes off the error along x
        ("MSE, decode", math.nan, True),
        ("mse form: mean error", 0.02, True),
        ("prod, Gaussian: mean error", -0.02, True),
        ("prod, orthogonal: mean error", 0.02, True),
        ("prod, orthogonal: mean error", math.nan, True),
        ("prod, orthogonal: mean error", 0.009, False),
    ],
)
def test_benchmark_fails_where_theory_is_missed(column, value, breaks):
    row = dict.fromkeys(distortion.COLUMNS, 0.0)
    row |= {name: 0.1 for name in row if name.startswith(("MSE", "Lloyd"))}
    row |= {name: 0.01 for name in row if name.endswith("interval")}
    row[column] = value
    assert bool(distortion.failures(list(row.values()))) == breaks
