"""What is computed from raw results: recall from ids, and nothing else that a run would have to be repeated for."""

from typing import Any

from numpy.typing import NDArray

from tqsearch.recall import recall

RECALLS = {"1@1": (1, 1), "1@10": (1, 10), "10@10": (10, 10), "100@100": (100, 100)}


def recalls(found: NDArray[Any], truth: NDArray[Any]) -> dict[str, float]:
    """Recall true@returned for every pair that the widths of the arrays allow."""
    return {
        name: round(recall(found, truth, true, returned), 5)
        for name, (true, returned) in RECALLS.items()
        if found.shape[1] >= returned and truth.shape[1] >= true
    }
