"""Documents of equal length from text files: what every cache reads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tqsearch.errors import InvalidInputError

DEFAULT_TEXTS = ("heldout-books.txt", "wikitext-2-raw.test.txt")


def default_texts() -> list[Path]:
    """The two texts of `$TQSEARCH_SHARED` (default `../shared` beside the repository)."""
    repository = Path(__file__).resolve().parent.parent.parent
    folder = Path(os.environ.get("TQSEARCH_SHARED", repository.parent / "shared")) / "data" / "text"
    return [folder / name for name in DEFAULT_TEXTS]


def tokenized(tokenizer: Any, texts: list[Path]) -> dict[str, Tensor]:
    """The tokens of every text, (n,) int64, by the name of its file without suffixes."""
    found: dict[str, Tensor] = {}
    for path in texts:
        if not path.exists():
            raise InvalidInputError(f"no text at {path}; name text files with --text, or set TQSEARCH_SHARED")
        ids = tokenizer(path.read_text(encoding="utf-8"), verbose=False)["input_ids"]
        found[path.name.partition(".")[0]] = torch.tensor(ids, dtype=torch.int64)
    return found


def windows(tokens: Tensor, count: int, length: int) -> Tensor:
    """`count` windows of `length` tokens, evenly spread over a text, without overlap.

    The same count gives the same windows on every machine; they need no seed.

    Args:
        tokens: (n,) int64.

    Returns:
        (count, length) int64.
    """
    if count * length > len(tokens):
        raise InvalidInputError(
            f"{count} documents of {length} tokens need {count * length}, the text has {len(tokens)}"
        )
    stride = len(tokens) // max(count, 1)
    return torch.stack([tokens[place * stride : place * stride + length] for place in range(count)])


def measured(texts: dict[str, Tensor], count: int, length: int) -> tuple[Tensor, list[str]]:
    """About `count` documents, as many of each text, alternating; and the text each is from.

    Returns:
        (documents, length) int64, and a name for each document.
    """
    each = -(-count // len(texts))
    stacked = torch.stack([windows(tokens, each, length) for tokens in texts.values()], dim=1)
    names = list(texts) * each
    return stacked.flatten(0, 1), names


def held_out(texts: dict[str, Tensor], count: int, measured_count: int, length: int) -> Tensor:
    """Documents for training rivals, which `measured` with `measured_count` documents does not touch.

    They are the ends of the gaps between the measured windows.
    """
    each, places = -(-count // len(texts)), -(-measured_count // len(texts))
    rows = []
    for tokens in texts.values():
        stride = len(tokens) // places
        if each > places or stride < 2 * length:
            raise InvalidInputError(f"no room for {each} held-out documents of {length} tokens beside {places}")
        rows += [tokens[(place + 1) * stride - length : (place + 1) * stride] for place in range(each)]
    return torch.stack(rows)
