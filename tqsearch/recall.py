"""Recall: how many of the true neighbours a search found."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def recall(found: NDArray[Any], truth: NDArray[Any], true: int, returned: int) -> float:
    """The share of the `true` best neighbours that are among the first `returned` results, averaged over the queries.

    Recall 10@10 is `recall(found, truth, 10, 10)`; recall 1@10, the chance that the best neighbour is among ten
    results, is `recall(found, truth, 1, 10)`.

    Args:
        found: (q, >= returned) ids as a search returned them, best first; negative for a missing result.
        truth: (q, >= true) ids of the exact neighbours, best first.
        true: how many of the exact neighbours count.
        returned: how many of the results count; an id given twice counts once.

    Raises:
        ValueError: the arrays are too narrow or have different numbers of rows.
    """
    if found.ndim != 2 or truth.ndim != 2 or len(found) != len(truth) or not len(found):
        raise ValueError(f"found and truth must have the same rows (q, k), got {found.shape} and {truth.shape}")
    if true < 1 or returned < 1 or found.shape[1] < returned or truth.shape[1] < true:
        raise ValueError(
            f"recall {true}@{returned} needs {returned} results and {true} true neighbours a query,"
            f" got {found.shape[1]} and {truth.shape[1]}"
        )
    hits = (truth[:, :true, None] == found[:, None, :returned]).any(axis=2)
    return float(np.mean(hits))
