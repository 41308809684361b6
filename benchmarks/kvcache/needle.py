"""Needle in a haystack: a fact hidden in prose, asked for at the end; an answer counts only when it is exact."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tqsearch.errors import InvalidInputError

FACT = " The secret number of the {name} is {number}."
QUESTION = " Question: what is the secret number of the {name}? Answer:"
ADJECTIVES = ("brave", "quiet", "golden", "clever", "gentle", "silver", "proud", "hidden", "swift", "ancient")
NOUNS = ("falcon", "river", "garden", "soldier", "captain", "mountain", "lantern", "doctor", "forest", "bridge")
ANSWER_TOKENS = 8  # enough for five digits, whatever the tokenizer makes of them


@dataclass(frozen=True)
class Prompts:
    """Prompts of one length.

    Attributes:
        tokens: (prompts, length) int64, all of exactly the same length, so that nothing is padded.
        numbers: the answers.
        depths: where the fact stands: 0 is the beginning, 1 the end.
    """

    tokens: Tensor
    numbers: list[str]
    depths: list[float]


def prompts(tokenizer: Any, prose: Tensor, length: int, depths: list[float], each: int, seed: int) -> Prompts:
    """`each` prompts for every depth, with their own names, numbers and prose.

    Args:
        prose: (n,) tokens that the haystacks are cut from.
        length: of a prompt in tokens, all included.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, numbers, places = [], [], []
    for depth in depths:
        for _ in range(each):
            drawn = torch.randint(0, 2**31, (4,), generator=generator).tolist()
            name = f"{ADJECTIVES[drawn[0] % len(ADJECTIVES)]} {NOUNS[drawn[1] % len(NOUNS)]}"
            number = str(10000 + drawn[2] % 90000)
            fact, question = (
                torch.tensor(tokenizer(text.format(name=name, number=number), add_special_tokens=False)["input_ids"])
                for text in (FACT, QUESTION)
            )
            room = length - len(fact) - len(question)
            if room < 0 or len(prose) <= room:
                raise InvalidInputError(f"a prompt of {length} tokens needs more prose than {len(prose)} tokens")
            start = drawn[3] % (len(prose) - room)
            hay = prose[start : start + room]
            cut = round(depth * room)
            rows.append(torch.cat([hay[:cut], fact, hay[cut:], question]))
            numbers.append(number)
            places.append(depth)
    return Prompts(torch.stack(rows), numbers, places)


@torch.inference_mode()
def continuation(model: Any, tokens: Tensor, cache: Any, chunk: int, steps: int) -> Tensor:
    """Greedy continuation of prompts that are fed in chunks.

    Returns:
        (prompts, steps) int64.
    """
    for start in range(0, tokens.shape[1], chunk):
        logits = model(tokens[:, start : start + chunk], past_key_values=cache, use_cache=True).logits
    found = []
    for _ in range(steps):
        following = logits[:, -1].argmax(dim=-1, keepdim=True)
        found.append(following)
        if len(found) < steps:
            logits = model(following, past_key_values=cache, use_cache=True).logits
    return torch.cat(found, dim=1)


def exact(text: str, number: str) -> bool:
    """Whether the first digits of an answer are the number and nothing else."""
    digits = re.search(r"\d+", text.replace(",", ""))
    return digits is not None and digits[0] == number


def retrieval(model: Any, tokenizer: Any, asked: Prompts, make: Callable[[], Any], chunk: int) -> dict[str, Any]:
    """Exact answers by depth.

    Returns:
        `exact` and `asked` in all, and `by_depth`: [depth, exact, asked].
    """
    device = next(model.parameters()).device
    answers = continuation(model, asked.tokens.to(device), make(), chunk, ANSWER_TOKENS)
    texts = tokenizer.batch_decode(answers)
    right = [exact(text, number) for text, number in zip(texts, asked.numbers, strict=True)]
    by_depth = []
    for depth in dict.fromkeys(asked.depths):
        hits = [ok for ok, place in zip(right, asked.depths, strict=True) if place == depth]
        by_depth.append([depth, sum(hits), len(hits)])
    return {"exact": sum(right), "asked": len(right), "by_depth": by_depth}
