"""Product quantization of keys and values: codebooks trained by FAISS, applied wherever the model runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tqsearch.faiss_pq import faiss_pq, load_faiss

PIECE = 1 << 24  # distances computed at a time


def trained(vectors: Tensor, code_bytes: int, iterations: int = 25) -> dict[str, Tensor]:
    """The codebook of one head, by FAISS.

    Args:
        vectors: (n, dim).
        code_bytes: m, the sub-quantizers, of 256 centroids each.
        iterations: of k-means.

    Returns:
        `centroids` (m, 256, width) float32, and `places` (m * width,) int64: the coordinate that each place of a
        padded vector holds, or -1 where `faiss_pq` puts a zero.
    """
    faiss = load_faiss()
    dim = vectors.shape[1]
    index: Any = faiss_pq(dim, code_bytes, "l2", iterations=iterations)
    index.train(np.ascontiguousarray(vectors.float().cpu().numpy()))
    places = np.arange(dim)
    if isinstance(index, faiss.IndexPreTransform):
        places = faiss.vector_to_array(faiss.downcast_VectorTransform(index.chain.at(0)).map)
        index = faiss.downcast_index(index.index)
    centroids = faiss.vector_to_array(index.pq.centroids).reshape(code_bytes, 256, -1)
    return {"centroids": torch.from_numpy(centroids.copy()), "places": torch.from_numpy(places.astype(np.int64))}


class PQCodec:
    """Each head's vectors replaced by the nearest centroids, sub-vector by sub-vector.

    Args:
        heads: a codebook of `trained` for each head.
    """

    def __init__(self, heads: list[dict[str, Tensor]]) -> None:
        self.heads = heads

    def round_trip(self, states: Tensor) -> Tensor:
        """See `simulated.Codec`."""
        decoded = [nearest(states[:, head], codebook) for head, codebook in enumerate(self.heads)]
        return torch.stack(decoded, dim=1).to(states)

    def bytes_per_vector(self) -> float:
        """The code alone: nothing else is kept for a vector; the codebooks are not counted."""
        return float(len(self.heads[0]["centroids"]))


def nearest(vectors: Tensor, codebook: dict[str, Tensor]) -> Tensor:
    """Vectors, (..., dim), as the codebook holds them."""
    centroids, places = (codebook[name].to(vectors.device) for name in ("centroids", "places"))
    parts, _, width = centroids.shape
    flat = vectors.reshape(-1, vectors.shape[-1]).float()
    padded = torch.where(places >= 0, flat[:, places.clamp(min=0)], 0.0)
    found = torch.empty_like(padded)
    norms = centroids.square().sum(dim=2)[:, None]
    step = max(PIECE // (parts * 256), 1)
    numbers = torch.arange(parts, device=flat.device)[:, None]
    for start in range(0, len(flat), step):
        pieces = padded[start : start + step].view(-1, parts, width).transpose(0, 1)
        codes = torch.baddbmm(norms, pieces, centroids.transpose(1, 2), alpha=-2.0).argmin(dim=2)
        found[start : start + step] = centroids[numbers, codes].transpose(0, 1).reshape(-1, parts * width)
    decoded = torch.zeros_like(flat)
    decoded[:, places[places >= 0]] = found[:, places >= 0]
    return decoded.view_as(vectors)
