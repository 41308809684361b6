"""The three metrics and the words other projects use for them."""

from typing import Final, Literal, get_args

Metric = Literal["cosine", "ip", "l2"]

METRICS: Final[tuple[Metric, ...]] = get_args(Metric)

_WORDS: Final[dict[str, Metric]] = {
    "angular": "cosine",
    "cosine": "cosine",
    "dot": "ip",
    "euclidean": "l2",
    "ip": "ip",
    "l2": "l2",
}


def metric_from_word(word: str) -> Metric | None:
    """The metric that a word such as `angular` stands for.

    Args:
        word: as written in an ann-benchmarks file or at the end of its name; upper and lower case are one.

    Returns:
        The metric, or None for a word that is none of ours (`hamming`, `jaccard`).
    """
    return _WORDS.get(word.lower())


def metric_from_name(name: str) -> Metric | None:
    """The metric that a data set's name ends with, as in `sift-128-euclidean`; None if it ends otherwise."""
    return metric_from_word(name.rpartition("-")[2])
