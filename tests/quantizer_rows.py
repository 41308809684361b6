"""Rows and plans that the tests of the quantizer share."""

import numpy as np
import torch

MIXED = [(5, 4), (20, 2), (7, 0), (3, 8), (29, 1)]


def vectors(rng, count, dim):
    """Rows of very different norms."""
    return (rng.standard_normal((count, dim)) * np.exp(2 * rng.standard_normal((count, 1)))).astype(np.float32)


def same(a, b):
    """Equal codes, part by part, bit for bit."""
    parts = [(a.packed, b.packed), (a.scales, b.scales), (a.signs, b.signs), (a.residual_norms, b.residual_norms)]
    return all((x is None and y is None) or torch.equal(x, y) for x, y in parts)
