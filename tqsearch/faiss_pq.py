"""FAISS product quantization at exactly the bytes per vector that another codec has: the rival everybody knows.

`IndexPQ` wants the dimension to be a multiple of the number m of sub-quantizers. Where it is not, zeros are put between
the coordinates, evenly spread (`RemapDimensionsTransform`), so that every byte of the code describes real coordinates
and m can be any number of bytes.

`faiss.index_factory(dim, "PQ..")` turns polysemous training on: simulated annealing of the order of the centroids,
seconds for each sub-quantizer, which ordinary search does not use. The constructor leaves it
off, and so does this module.
"""

import importlib
from typing import Any

from tqsearch.errors import InvalidInputError


def faiss_pq(dim: int, code_bytes: int, metric: str, *, iterations: int = 25) -> Any:
    """An untrained FAISS index of 8-bit product quantization with `code_bytes` bytes per vector.

    Args:
        dim: width of a vector.
        code_bytes: m, from 1 to dim.
        metric: `l2`, or `ip` / `cosine` (for which the caller normalises).
        iterations: of k-means.

    Raises:
        InvalidInputError: more bytes than coordinates.
    """
    faiss = load_faiss()

    if not 1 <= code_bytes <= dim:
        raise InvalidInputError(f"code_bytes must be from 1 to {dim}, a byte for each dimension, got {code_bytes}")
    padded = padded_dim(dim, code_bytes)
    index = faiss.IndexPQ(padded, code_bytes, 8, faiss_metric(metric))
    index.pq.cp.niter = iterations
    index.pq.cp.min_points_per_centroid = 1  # or FAISS warns once for each sub-quantizer trained on under 9,984 rows
    return spread(index, dim, padded)


def padded_dim(dim: int, parts: int) -> int:
    """The smallest multiple of `parts` that is not below `dim`."""
    return -(-dim // parts) * parts


def spread(index: Any, dim: int, padded: int) -> Any:
    """The index behind a transform that puts zeros between the coordinates; the index itself where none are needed."""
    faiss = load_faiss()

    if padded == dim:
        return index
    transform = faiss.RemapDimensionsTransform(dim, padded, True)
    return faiss.IndexPreTransform(transform, index)


def load_faiss() -> Any:
    """The module, imported when first asked for; untyped, as the types in its wheel do not cover what is used here."""
    return importlib.import_module("faiss")


def faiss_metric(metric: str) -> int:
    """The constant of FAISS for `l2`, and inner product for `ip` and `cosine`."""
    faiss = load_faiss()

    return int(faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT)
