"""Generated vectors with the anisotropy of real text embeddings: nothing to download, a few seconds to make.

Real embeddings are far from isotropic noise, and quantizers are sensitive to that. Before normalization, a vector here
is a common mean plus a Gaussian whose covariance has a power-law spectrum in a random orthonormal basis. The Gaussian
is shared in part by a topic, in part by a cluster of about 64 vectors, and is in part the vector's own; how much is
shared differs from vector to vector. A query has another mean (questions are not passages), is related to one base
vector and to its cluster, closely or loosely, and spreads over more directions than the base does.

The constants were fitted to 100,000 passages and 2,000 questions embedded by all-MiniLM-L6-v2 (d = 384). The last
column is 10,000 questions embedded by bge-base-en-v1.5 (d = 768). All were measured alike, with 500 queries for the
nearest, 300 for the recall (randomly rotated, Lloyd-Max levels, the unbiased scale; numpy):

==================================================  =============  =============  =============
statistic                                           synthetic      MiniLM         bge
==================================================  =============  =============  =============
norm of the mean of the base, of the queries        0.171, 0.289   0.169, 0.285   0.583, 0.586
cosine of these two means                           0.421          0.417          0.999
share of variance in the top 10 % of directions     0.412          0.391          0.532
the same of the queries, in the base's directions   0.351          0.313          0.521
effective rank: exp of the spectrum's entropy       211            215            282
participation ratio of the spectrum                 132            130            149
cosine of a query with its nearest: mean, std       0.617, 0.119   0.605, 0.122   0.685, 0.073
cosine of a query with its tenth: mean, std         0.476, 0.110   0.455, 0.080   0.590, 0.054
cosine of a base vector with its nearest other      0.622, 0.153   0.656, 0.112   0.685, 0.077
cosine of a query and any base vector               0.021, 0.079   0.019, 0.079   0.341, 0.067
cosine of any two base vectors: mean, std           0.029, 0.085   0.028, 0.088   0.340, 0.067
recall 10@10 of codes of 1, 2 and 4 bits            .68, .81, .94  .68, .83, .95  not measured
==================================================  =============  =============  =============
"""

import math

import numpy as np
from numpy.typing import NDArray

from tqsearch.datasets.dataset import Dataset
from tqsearch.datasets.registry import SYNTHETIC_NAME
from tqsearch.errors import InvalidInputError

BASE_MEAN = 0.1685  # norm of the mean of the unit vectors
QUERY_MEAN = 0.2853
MEANS_COSINE = 0.417
DECAY = 0.5  # the variance of direction i is (i + 1) ** -DECAY * exp(-(i / (CUTOFF * dim)) ** 2)
CUTOFF = 0.65
CLUSTER_ROWS = 64  # base vectors a cluster, on average; sizes fall off like a power law
TOPICS = 156
TOPIC_SHARE = 0.3  # of a cluster's centre, the variance that comes from its topic
SHARED_MEAN, SHARED_SPREAD = 0.44, 0.4  # of a vector, the variance that comes from its cluster
RELATED_LOW, RELATED_HIGH = 0.6, 1.15  # how closely a query is related, times the two weights below
CLUSTER_WEIGHT, VECTOR_WEIGHT = 0.28, 0.54
QUERY_FLAT = 0.35  # the share of the query's own variance that is spread evenly over all directions
BLOCK_ROWS = 8192  # part of the definition: the order of the random draws follows the blocks

Floats = NDArray[np.float32]


def synthetic_embeddings(n: int = 100_000, dim: int = 384, queries: int = 1_000, seed: int = 0) -> Dataset:
    """Generate the data set `synthetic-embeddings`: unit vectors like those of a text embedding model.

    The module's docstring says how, and how close to real ones they come. Equal arguments give equal vectors, up to the
    last bits, in which matrix products differ between machines.

    Args:
        n: base vectors, at least 1.
        dim: coordinates, at least 2.
        queries: query vectors, at least 1.
        seed: of `numpy.random.PCG64`, at least 0.

    Returns:
        A data set of metric `cosine`: `train` (n, dim) and `test` (queries, dim), both float32; no neighbours.

    Raises:
        InvalidInputError: an argument is too small.
    """
    for argument, value, least in (("n", n, 1), ("dim", dim, 2), ("queries", queries, 1), ("seed", seed, 0)):
        if value < least:
            raise InvalidInputError(f"{argument} must be at least {least}, got {value}")
    rng = np.random.Generator(np.random.PCG64(seed))
    basis, variance = _basis(rng, dim), _spectrum(dim)
    colour = np.sqrt(variance, dtype=np.float32)[:, None] * basis
    base_mean, query_mean = _means(rng, dim)
    centres = _centres(rng, max(1, n // CLUSTER_ROWS), dim) @ colour
    cluster = _assign(rng, n, len(centres))

    train = np.empty((n, dim), np.float32)
    for start in range(0, n, BLOCK_ROWS):
        mine = cluster[start : start + BLOCK_ROWS]
        shared = SHARED_MEAN + SHARED_SPREAD * rng.uniform(-1, 1, (len(mine), 1)).astype(np.float32)
        own = rng.standard_normal((len(mine), dim), dtype=np.float32) @ colour
        block = base_mean + np.sqrt(shared) * centres[mine] + np.sqrt(1 - shared) * own
        train[start : start + BLOCK_ROWS] = _unit(block)

    query_variance = (1 - QUERY_FLAT) * variance + QUERY_FLAT / dim
    query_colour = np.sqrt(query_variance, dtype=np.float32)[:, None] * basis
    test = np.empty((queries, dim), np.float32)
    for start in range(0, queries, BLOCK_ROWS):
        rows = rng.integers(0, n, min(BLOCK_ROWS, queries - start))
        related = rng.uniform(RELATED_LOW, RELATED_HIGH, (len(rows), 1)).astype(np.float32)
        about = CLUSTER_WEIGHT * centres[cluster[rows]] + VECTOR_WEIGHT * _unit(train[rows] - base_mean)
        about *= related
        own = rng.standard_normal((len(rows), dim), dtype=np.float32) @ query_colour
        # What the relation leaves of a variance of one, but never nothing: a query is no copy of a base vector.
        left = np.maximum(1 - np.square(about).sum(axis=1, keepdims=True), np.float32(0.05))
        test[start : start + len(rows)] = _unit(query_mean + about + np.sqrt(left) * own)
    return Dataset(SYNTHETIC_NAME, "cosine", train, test)


def _basis(rng: np.random.Generator, dim: int) -> Floats:
    """Orthonormal rows in random directions, (dim, dim): no coordinate is special."""
    return np.linalg.qr(rng.standard_normal((dim, dim)))[0].astype(np.float32)


def _spectrum(dim: int) -> NDArray[np.float64]:
    """The variances along the basis, (dim,), largest first; their sum is one."""
    i = np.arange(dim)
    variance = (i + 1.0) ** -DECAY * np.exp(-((i / (CUTOFF * dim)) ** 2))
    return np.asarray(variance / variance.sum())


def _means(rng: np.random.Generator, dim: int) -> tuple[Floats, Floats]:
    """The means of base and queries, (dim,) each, before normalization, beside noise of variance one."""
    first, second = np.linalg.qr(rng.standard_normal((dim, 2)))[0].T
    base = first * BASE_MEAN / math.sqrt(1 - BASE_MEAN**2)
    query = MEANS_COSINE * first + math.sqrt(1 - MEANS_COSINE**2) * second
    query *= QUERY_MEAN / math.sqrt(1 - QUERY_MEAN**2)
    return base.astype(np.float32), query.astype(np.float32)


def _centres(rng: np.random.Generator, clusters: int, dim: int) -> Floats:
    """The centres of the clusters, (clusters, dim), white, related within a topic."""
    topics = rng.standard_normal((min(TOPICS, clusters), dim), dtype=np.float32)
    topic = rng.integers(0, len(topics), clusters)
    own = rng.standard_normal((clusters, dim), dtype=np.float32)
    own *= np.float32(math.sqrt(1 - TOPIC_SHARE))
    own += np.float32(math.sqrt(TOPIC_SHARE)) * topics[topic]
    return own


def _assign(rng: np.random.Generator, n: int, clusters: int) -> NDArray[np.int64]:
    """The cluster of each base vector, (n,): a few clusters are large."""
    weight = (np.arange(clusters) + 10.0) ** -0.5
    return rng.choice(clusters, n, p=weight / weight.sum()).astype(np.int64)


def _unit(rows: Floats) -> Floats:
    """Rows of norm one; a row of norm zero has no direction and cannot come from a continuous law."""
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), dtype=np.float32)
