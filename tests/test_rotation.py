import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import linalg, stats

from tqsearch.errors import InvalidInputError
from tqsearch.rotation import MAX_DIM, Dense, Hadamard, Identity, hadamard_blocks, make_rotation, orthogonal_matrix

DIMS = [1, 2, 3, 4, 7, 8, 63, 64, 65, 100, 127, 384, 768, 1000, 1536]


def normal(rng, *shape, dtype=np.float32):
    return torch.from_numpy(rng.standard_normal(shape).astype(dtype))


def dense_hadamard(oracle, dim, seed):
    """The transform as a product of whole matrices: block-diagonal Hadamard, diagonal signs, permutation."""
    blocks = [linalg.hadamard(size) / math.sqrt(size) for size in oracle.blocks(dim)]
    h = linalg.block_diag(*blocks)
    matrix = np.eye(dim)
    for r in range(3):
        if r and len(blocks) > 1:
            matrix = np.eye(dim)[oracle.permutation(seed, 16 + r, dim)] @ matrix
        matrix = h @ np.diag(oracle.signs(seed, r, dim)) @ matrix
    return matrix


@given(dim=st.integers(1, 100), seed=st.integers(-(2**64), 2**64))
def test_hadamard_is_the_product_of_its_matrices(oracle, dim, seed):
    expected = dense_hadamard(oracle, dim, seed)
    actual = Hadamard(dim, seed).apply(torch.eye(dim, dtype=torch.float64)).numpy().T
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-13)
    np.testing.assert_allclose(oracle.rotate(np.eye(dim), seed).T, expected, rtol=0, atol=1e-13)


@given(dim=st.integers(1, MAX_DIM))
def test_blocks_are_the_binary_form(dim):
    blocks = hadamard_blocks(dim)
    assert sum(blocks) == dim
    assert blocks == sorted(set(blocks), reverse=True)
    assert all(bin(size).count("1") == 1 for size in blocks)


@given(dim=st.integers(1, MAX_DIM), seed=st.integers(0, 2**64))
@example(dim=8192, seed=0)
@example(dim=8191, seed=0)
def test_hadamard_any_dim_equals_the_definition_and_inverts(oracle, dim, seed):
    x = np.random.default_rng(dim).standard_normal((2, dim))
    transform = Hadamard(dim, seed)
    y = transform.apply(torch.from_numpy(x))
    np.testing.assert_allclose(y.numpy(), oracle.rotate(x, seed), rtol=0, atol=1e-12)
    np.testing.assert_allclose(transform.invert(y).numpy(), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["hadamard", "dense", "identity"])
@pytest.mark.parametrize("dim", [1, 2, 3, 8, 63, 100, 256])
def test_transforms_are_orthogonal(name, dim):
    matrix = make_rotation(name, dim, 5).apply(torch.eye(dim, dtype=torch.float64)).numpy()
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(dim), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["hadamard", "dense"])
@pytest.mark.parametrize("dim", DIMS)
def test_float32_lies_within_rounding_of_float64(oracle, rng, name, dim):
    if name == "dense" and dim > 384:
        dim = 385  # the QR of a larger matrix takes seconds and tells nothing new
    transform = make_rotation(name, dim, 9)
    x = normal(rng, 7, dim)
    exact = transform.apply(x.double())
    single = transform.apply(x)
    assert single.dtype == torch.float32
    assert exact.dtype == torch.float64
    bound = oracle.rounding(dim) * x.double().norm(dim=1, keepdim=True) / math.sqrt(dim)
    assert bool(((single.double() - exact).abs() <= bound).all())
    back = transform.invert(single)
    assert bool(((back.double() - x.double()).abs() <= 2 * bound).all())


@pytest.mark.parametrize("dim", DIMS)
def test_hadamard_is_bit_for_bit_the_same_in_any_batch_and_layout(rng, dim):
    transform = Hadamard(dim, 3)
    x = normal(rng, 65, dim)
    for method in (transform.apply, transform.invert):
        whole = method(x.clone())
        assert torch.equal(torch.cat([method(row[None].clone()) for row in x]), whole)
        assert torch.equal(torch.cat([method(part.clone()) for part in x.split([1, 63, 1])]), whole)
        assert torch.equal(method(x.t().contiguous().t()), whole)
        assert torch.equal(method(torch.stack([x, x], 2).flatten(1)[:, ::2]), whole)


@pytest.mark.parametrize("name", ["hadamard", "dense", "identity"])
@pytest.mark.parametrize("layout", ["rows", "columns", "one row"])
def test_inputs_are_not_written_to(rng, name, layout):
    x = normal(rng, 1 if layout == "one row" else 5, 24)
    x = x.t().contiguous().t() if layout == "columns" else x
    before = x.clone()
    transform = make_rotation(name, 24, 0)
    transform.apply(x)
    transform.invert(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", ["hadamard", "dense", "identity"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int32, torch.uint8])
def test_other_dtypes_are_taken_as_float32(name, dtype):
    x = (torch.arange(48).view(2, 24) % 17).to(dtype)
    transform = make_rotation(name, 24, 0)
    assert torch.equal(transform.apply(x), transform.apply(x.float()))


@pytest.mark.parametrize("name", ["hadamard", "dense", "identity"])
def test_no_rows(name):
    transform = make_rotation(name, 24, 0)
    assert transform.apply(torch.empty(0, 24)).shape == (0, 24)
    assert transform.invert(torch.empty(0, 24)).shape == (0, 24)


@pytest.mark.parametrize("dim", [16, 128, 1024])
def test_one_hot_inputs_have_the_fourth_moment_of_a_sum_of_signs(z, dim):
    """After round one a one-hot row is flat with random signs; each coordinate of round two is then a normalised sum of
    d random signs, whose fourth moment is 3 - 2 / d (a normal's is 3, a flat vector's 1)."""
    rows = torch.eye(dim, dtype=torch.float64)[[0, dim // 2, dim - 1]]
    moments = [float((Hadamard(dim, seed).apply(rows) ** 4).mean()) * dim**2 for seed in range(150)]
    assert abs(z(np.array(moments), 3 - 2 / dim)) < 5


@pytest.mark.parametrize("dim", [63, 100, 384])
@pytest.mark.parametrize("kind", ["first", "last", "constant"])
def test_worst_inputs_behave_as_with_true_random_signs_and_permutations(oracle, rng, dim, kind):
    """Fourth moments over seeds against the same three rounds with numpy's randomness: equal within the error of both,
    and well above the 1 of a flat vector."""
    row = np.full((1, dim), dim**-0.5) if kind == "constant" else np.eye(dim)[[0 if kind == "first" else dim - 1]]
    ours = [float((Hadamard(dim, s).apply(torch.from_numpy(row)) ** 4).sum()) * dim for s in range(300)]
    theirs = []
    for _ in range(300):
        y = row
        for r in range(3):
            y = y[:, rng.permutation(dim)] if r else y
            y = oracle.block_hadamard(y * rng.choice([-1.0, 1.0], dim))
        theirs.append(float((y**4).sum()) * dim)
    ours, theirs = np.array(ours), np.array(theirs)
    error = math.sqrt(ours.var(ddof=1) / 300 + theirs.var(ddof=1) / 300)
    assert abs(ours.mean() - theirs.mean()) < 5 * error
    assert ours.mean() > 2.3


@pytest.mark.parametrize("dim", [1, 2, 16, 65])
def test_dense_is_the_orthogonal_factor_of_the_seeded_gaussian_matrix(oracle, dim):
    """G = Q R with R upper triangular and positive on its diagonal determines Q, whose columns are the rows."""
    matrix = orthogonal_matrix(dim, 4, 32)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(dim), rtol=0, atol=1e-13)
    upper = matrix @ oracle.gaussians(4, 32, dim * dim).reshape(dim, dim)
    np.testing.assert_allclose(upper, np.triu(upper), rtol=0, atol=1e-11)
    assert np.diag(upper).min() > 0
    np.testing.assert_array_equal(Dense(dim, 4).matrix(torch.device("cpu")).numpy(), matrix)


def test_dense_is_haar_distributed():
    """Any fixed vector becomes uniform on the sphere: v^2 of a coordinate is Beta(1/2, (d - 1) / 2), signs are fair."""
    dim, seeds = 6, 2000
    rows = np.stack([orthogonal_matrix(dim, seed, 32) for seed in range(seeds)])
    for coordinate in (rows[:, 0, 0], rows[:, dim - 1, dim - 1], rows.sum(2)[:, 2] / math.sqrt(dim)):
        assert stats.kstest(coordinate**2, stats.beta(0.5, (dim - 1) / 2).cdf).pvalue > 1e-6
        assert abs((coordinate > 0).sum() - seeds / 2) < 5 * math.sqrt(seeds / 4)
    determinants = np.linalg.det(rows)  # both components of the orthogonal group
    assert abs((determinants > 0).sum() - seeds / 2) < 5 * math.sqrt(seeds / 4)


def test_dense_apply_and_invert_are_products_with_the_matrix(rng):
    dense = Dense(40, 1)
    x = rng.standard_normal((5, 40))
    matrix = dense.matrix(torch.device("cpu")).numpy()
    np.testing.assert_allclose(dense.apply(torch.from_numpy(x)).numpy(), (matrix @ x.T).T, rtol=0, atol=1e-13)
    np.testing.assert_allclose(dense.invert(torch.from_numpy(x)).numpy(), (matrix.T @ x.T).T, rtol=0, atol=1e-13)


def test_identity_changes_nothing(rng):
    x = normal(rng, 3, 10)
    assert torch.equal(Identity(10).apply(x), x)
    assert torch.equal(Identity(10).invert(x), x)


def test_golden_signs_of_a_transform_never_change():
    """A file's meaning: the transform of the first axis, d = 8, seed 0, scaled to integers."""
    first = Hadamard(8, 0).apply(torch.eye(8)[:1]) * 8
    flat = linalg.hadamard(8)[0]  # signs(0, 0, 8)[0] is +1, so round one gives ones
    round_two = np.array([1, -1, 1, -1, -1, 1, -1, 1])  # the top bits of words(0, 1, 8)
    round_three = np.array([1, -1, 1, -1, 1, 1, 1, -1])  # of words(0, 2, 8)
    expected = linalg.hadamard(8) @ (round_three * (linalg.hadamard(8) @ (flat * round_two))) / math.sqrt(8)
    np.testing.assert_allclose(first.numpy()[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dim", [0, -3, 8193])
@pytest.mark.parametrize("name", ["hadamard", "dense", "identity"])
def test_a_bad_dim_is_named(name, dim):
    with pytest.raises(InvalidInputError, match=f"dim must be an integer from 1 to 8192, got {dim}"):
        make_rotation(name, dim, 0)


def test_a_bad_name_is_named():
    with pytest.raises(InvalidInputError, match="one of 'dense', 'hadamard', 'identity', got 'pca'"):
        make_rotation("pca", 8, 0)
