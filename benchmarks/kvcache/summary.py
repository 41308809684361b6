"""Means over documents with their confidence intervals: documents are independent, positions within one are not."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from benchmarks.kvcache.likelihood import Agreement

CONFIDENCE = 0.95


def interval(values: Tensor) -> float:
    """Half-width of Student's interval of the mean of independent values, (n,); 0 for fewer than two."""
    from scipy.stats import t  # a development dependency

    count = len(values)
    if count < 2:
        return 0.0
    error = float(values.double().std(correction=1)) / math.sqrt(count)
    return float(t.isf((1 - CONFIDENCE) / 2, count - 1)) * error


def estimate(values: Tensor, factor: float = 1.0) -> dict[str, float]:
    """Mean and half-width of the interval over documents, times a factor."""
    return {"mean": rounded(factor * float(values.double().mean())), "plus_minus": rounded(factor * interval(values))}


def perplexity_change(differences: Tensor) -> dict[str, float]:
    """How much larger the perplexity is than the dense cache's, percent: exp(mean difference) - 1, and its interval.

    Args:
        differences: (documents,) mean negative log-likelihoods less the dense cache's.
    """
    mean = float(differences.double().mean())
    return {
        "mean": rounded(100.0 * math.expm1(mean)),
        "plus_minus": rounded(100.0 * math.exp(mean) * interval(differences)),
    }


def rounded(value: float) -> float:
    return float(f"{value:.6g}")


def summarize(found: Agreement, names: list[str], measured_from: int) -> dict[str, Any]:
    """The figures of one cache.

    Args:
        found: of all documents.
        names: the text each document is from.
        measured_from: the first position that counts: before it hardly anything is compressed yet. The figures over all
            positions, which the exact ones flatter, are under "all_positions".
    """
    late = {name: getattr(found, name)[:, measured_from:].double() for name in ("dense_nll", "nll", "kl", "top1")}
    nll, dense = late["nll"].mean(dim=1), late["dense_nll"].mean(dim=1)
    by_text = {}
    for text in dict.fromkeys(names):
        rows = torch.tensor([place for place, name in enumerate(names) if name == text])
        by_text[text] = {
            "perplexity": rounded(math.exp(float(nll[rows].mean()))),
            "dense_perplexity": rounded(math.exp(float(dense[rows].mean()))),
            "perplexity_percent": perplexity_change((nll - dense)[rows]),
            "kl": estimate(late["kl"].mean(dim=1)[rows]),
            "top1_percent": estimate(late["top1"].mean(dim=1)[rows], 100.0),
        }
    return {
        "documents": len(names),
        "positions": int(late["kl"].numel()),
        "measured_from": measured_from,
        "perplexity": rounded(math.exp(float(nll.mean()))),
        "dense_perplexity": rounded(math.exp(float(dense.mean()))),
        "perplexity_percent": perplexity_change(nll - dense),
        "kl": estimate(late["kl"].mean(dim=1)),
        "kl_p99": rounded(float(torch.quantile(late["kl"].flatten(), 0.99))),
        "top1_percent": estimate(late["top1"].mean(dim=1), 100.0),
        "all_positions": {
            "perplexity_percent": perplexity_change((found.nll - found.dense_nll).double().mean(dim=1)),
            "kl": estimate(found.kl.mean(dim=1)),
            "top1_percent": estimate(found.top1.mean(dim=1), 100.0),
        },
        "by_text": by_text,
        "per_document": {
            "nll": [rounded(float(value)) for value in nll],
            "dense_nll": [rounded(float(value)) for value in dense],
            "kl": [rounded(float(value)) for value in late["kl"].mean(dim=1)],
            "top1": [rounded(float(value)) for value in late["top1"].mean(dim=1)],
        },
    }
