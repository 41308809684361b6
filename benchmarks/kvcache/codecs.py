"""Codecs for the simulated cache: TurboQuant in both forms, FAISS PQ, and the library's integer groups."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tqsearch.faiss_pq import faiss_pq
from tqsearch.plan import BitPlan
from tqsearch.quantizer import TurboQuantizer


class TurboCodec:
    """TurboQuant of single vectors; form "prod" is the paper's for keys.

    Args:
        dim: of a head.
        bits: a width or a plan.
        form: "mse" or "prod".
        unbiased: for "mse", whether inner products are unbiased; else the squared error is least.
    """

    def __init__(
        self,
        dim: int,
        bits: float | BitPlan,
        form: Literal["mse", "prod"] = "mse",
        *,
        unbiased: bool = True,
        seed: int = 0,
    ) -> None:
        self.quantizer = TurboQuantizer(dim, bits, form=form, seed=seed)
        self.unbiased = unbiased

    def round_trip(self, states: Tensor) -> Tensor:
        """See `simulated.Codec`."""
        flat = states.reshape(-1, states.shape[-1]).float()
        return self.quantizer.decode(self.quantizer.encode(flat), unbiased=self.unbiased).view_as(states).to(states)

    def bytes_per_vector(self) -> float:
        """Codes and a float16 scale; form "prod" also signs and a float16 residual norm."""
        signs = 0 if self.quantizer.qjl is None else -(-self.quantizer.dim // 8) + 2
        return self.quantizer.plan.bytes_per_vector + 2 + signs


class PQCodec:
    """FAISS product quantization, one trained for each head.

    Args:
        training: (heads, n, dim) states to train on.
        code_bytes: of a vector.
        iterations: of k-means.
    """

    def __init__(self, training: Tensor, code_bytes: int, iterations: int = 15) -> None:
        self.code_bytes = code_bytes
        self.indexes: list[Any] = []
        for head in training.float().cpu().numpy():
            index = faiss_pq(head.shape[1], code_bytes, "l2", iterations=iterations)
            index.train(np.ascontiguousarray(head))
            self.indexes.append(index)

    def round_trip(self, states: Tensor) -> Tensor:
        """See `simulated.Codec`."""
        decoded = []
        for head, index in enumerate(self.indexes):
            flat = states[:, head].reshape(-1, states.shape[-1]).float().cpu().numpy()
            vectors = index.sa_decode(index.sa_encode(np.ascontiguousarray(flat)))
            decoded.append(torch.from_numpy(vectors).view(states[:, head].shape))
        return torch.stack(decoded, dim=1).to(states)

    def bytes_per_vector(self) -> float:
        """The code alone: nothing else is kept; the codebooks are not counted."""
        return float(self.code_bytes)


class QuantoCodec:
    """The library's integer groups (quanto, axis 0, groups of 64), with our sinks and recent window around them."""

    def __init__(self, dim: int, bits: int, group: int = 64) -> None:
        from optimum.quanto import MaxOptimizer, qint2, qint4

        self.dim, self.bits, self.group = dim, bits, group
        self.qtype = {2: qint2, 4: qint4}[bits]
        self.optimizer = MaxOptimizer()

    def round_trip(self, states: Tensor) -> Tensor:
        """See `simulated.Codec`; each vector is `dim / group` groups, whatever is coded together."""
        from optimum.quanto import quantize_weight

        rows = states.reshape(-1, self.group).contiguous()
        scale, shift = self.optimizer(rows, self.qtype, 0, self.group)
        coded = quantize_weight(rows, self.qtype, 0, scale, shift, self.group)
        return coded.dequantize().view_as(states)

    def bytes_per_vector(self) -> float:
        """Codes, and a scale and a shift of two bytes for each group."""
        return self.dim * self.bits / 8 + 4 * self.dim / self.group
