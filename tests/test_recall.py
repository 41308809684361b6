import numpy as np
import pytest

from tqsearch.recall import recall

TRUTH = np.array([[7, 3, 9, 1], [0, 2, 4, 6]])


@pytest.mark.parametrize(
    ("found", "true", "returned", "expected"),
    [
        ([[7, 3, 9, 1], [0, 2, 4, 6]], 4, 4, 1.0),
        ([[1, 9, 3, 7], [6, 4, 2, 0]], 4, 4, 1.0),  # the order within the k does not count
        ([[3, 7, 9, 1], [0, 2, 4, 6]], 1, 1, 0.5),
        ([[3, 7, 8, 8], [5, 2, 4, 6]], 1, 4, 0.5),
        ([[7, 5, 5, 5], [5, 5, 5, 2]], 2, 4, 0.5),
        ([[7, 7, 7, 7], [0, 0, 0, 0]], 4, 4, 0.25),  # an id found four times is one hit
        ([[7, -1, -1, -1], [-1, -1, -1, -1]], 2, 2, 0.25),
        ([[5, 5, 5, 5], [5, 5, 5, 5]], 4, 4, 0.0),
    ],
)
def test_against_cases_counted_by_hand(found: list[list[int]], true: int, returned: int, expected: float) -> None:
    assert recall(np.array(found), TRUTH, true, returned) == expected


@pytest.mark.parametrize(("true", "returned"), [(5, 4), (4, 5), (0, 1), (1, 0)])
def test_too_few_columns_are_refused(true: int, returned: int) -> None:
    with pytest.raises(ValueError, match="needs"):
        recall(TRUTH, TRUTH, true, returned)


def test_other_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="same rows"):
        recall(TRUTH[:1], TRUTH, 1, 1)
