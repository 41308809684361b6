"""Markdown tables of a result of the KV-cache benchmark: `NAME` in short, `NAME.VIEW` for each of `VIEWS`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.kvcache.configurations import CALIBRATED, DENSE, KEPT, OURS, PROD, TRELLIS
from benchmarks.kvcache.language_model import LARGE_KEY_BIAS, PLAIN
from benchmarks.tables import markdown, provenance

HEADER = [
    "cache",
    "bytes a token",
    "of bf16",
    "perplexity, %",
    "mean KL",
    "99 % KL",
    "top-1, %",
    "needles",
    "greedy match",
]
SPEED_HEADER = ["cache", "batch", "context", "decode, tokens/s", "prefill, tokens/s"]
NEEDLE_HEADER = ["cache", "recent tokens kept"]

Run = dict[str, Any]


def table(name: str, results: dict[str, dict[str, Any]]) -> str | None:
    """The text of a table, or None where the name is not one of ours."""
    whole, _, view = (name, "", "") if name in results else name.rpartition(".")
    result = results.get(whole)
    if result is None or result.get("benchmark") != "kvcache" or (view and view not in VIEWS):
        return None
    return VIEWS[view](result) if view else short(result)


def usual(run: Run) -> bool:
    """Whether a run has the window and block that most have, on the plain model."""
    return (run["variant"], run["residual"], run["sinks"], run["block"]) == (PLAIN, 128, 4, 16)


def short(result: dict[str, Any]) -> str:
    """TurboQuant at every width and the rivals, on the plain model."""
    runs = [
        run
        for run in result["runs"]
        if usual(run) and run["family"] not in (KEPT, PROD) and run["options"] in ({}, TRELLIS)
    ]
    return quality_table(result, runs)


def choices(result: dict[str, Any]) -> str:
    """What each choice costs or gains: the offset, the window, the block, the paper's form."""
    runs = [
        run for run in result["runs"] if run["variant"] == PLAIN and run["family"] in (OURS, KEPT, PROD, CALIBRATED)
    ]
    return quality_table(result, runs)


def bias(result: dict[str, Any]) -> str:
    """The model with a large constant in its keys, with the offset taken off and left in."""
    return quality_table(result, [run for run in result["runs"] if run["variant"] == LARGE_KEY_BIAS])


def quality_table(result: dict[str, Any], runs: list[Run]) -> str:
    rows = [cells(run) for run in runs if "quality" in run or run["family"] == DENSE]
    parts = [markdown(HEADER, rows)]
    done = [run for run in runs if "quality" in run]
    if done:
        parts.append(caption(result, done))
    return "\n\n".join(parts)


def caption(result: dict[str, Any], runs: list[Run]) -> str:
    """What the rows share, and which were measured elsewhere than the first."""
    measured = runs[0]["quality"]
    effort = measured["effort"]
    where: dict[str, list[str]] = {}
    for run in runs:
        where.setdefault(provenance(run["quality"]["effort"]["environment"]), []).append(run["name"])
    first, *others = where.items()
    again = [f" {'; '.join(names)}: {text[:1].lower()}{text[1:]}" for text, names in others]
    return (
        f"{result['model']['name']}: {measured['documents']} documents in chunks of {effort['chunk']} tokens,"
        f" {measured['positions']:,} positions from {measured['measured_from']} on; ± is the 95 % interval over"
        " documents. Perplexity and KL are against the model's own dense cache; needles are exact answers of those"
        " asked at all lengths; greedy match is the mean number of tokens until the continuation differs. "
        + first[0]
        + "".join(again)
    )


def cells(run: Run) -> list[str]:
    """One row; what was not measured is left empty."""
    held, quality, needle, greedy = (run.get(part) for part in ("bytes", "quality", "needle", "greedy"))
    row = [run["name"], "", ""] if held is None else [run["name"], f"{held['per_token']:,.0f}", ratio(held)]
    if quality is None:
        row += [""] * 4
    else:
        row += [
            measured(quality["perplexity_percent"], "+.2f", ".2f"),
            measured(quality["kl"], ".5f", ".5f"),
            f"{quality['kl_p99']:.4f}",
            measured(quality["top1_percent"], ".2f", ".2f"),
        ]
    row.append("" if needle is None else "{}/{}".format(*answered(needle)))
    row.append("" if greedy is None else f"{greedy['matched_tokens']['mean']:.0f} of {greedy['steps']}")
    return [f"**{cell}**" if cell and run["family"] == OURS else cell for cell in row]


def ratio(held: dict[str, Any]) -> str:
    return f"{held['ratio_per_token']:.3f}" + ("" if held["from"] == "storages" else " (formula)")


def measured(found: dict[str, float], style: str, interval: str) -> str:
    return f"{found['mean']:{style}} ± {found['plus_minus']:{interval}}"


def answered(needle: dict[str, Any]) -> tuple[int, int]:
    """Exact answers and questions, over all lengths."""
    lengths = needle["by_length"].values()
    return sum(one["exact"] for one in lengths), sum(one["asked"] for one in lengths)


def needles(result: dict[str, Any]) -> str:
    """Exact answers by length and by depth."""
    runs = [run for run in result["runs"] if "needle" in run]
    lengths = list(dict.fromkeys(length for run in runs for length in run["needle"]["by_length"]))
    depths = list(
        dict.fromkeys(f"{depth:g}" for run in runs for one in run["needle"]["by_length"].values()
                      for depth, _, _ in one["by_depth"])
    )  # fmt: skip
    rows = []
    for run in runs:
        found = run["needle"]["by_length"]
        row = [run["name"], str(run["residual"])]
        row += [f"{found[length]['exact']}/{found[length]['asked']}" if length in found else "" for length in lengths]
        for depth in depths:
            hits = [hit for one in found.values() for hit in one["by_depth"] if f"{hit[0]:g}" == depth]
            row.append(f"{sum(hit[1] for hit in hits)}/{sum(hit[2] for hit in hits)}")
        rows.append(row)
    header = NEEDLE_HEADER + [f"{length} tokens" for length in lengths] + [f"depth {depth}" for depth in depths]
    return markdown(header, rows)


def speed(result: dict[str, Any]) -> str:
    """Tokens per second behind a long context."""
    runs = [run for run in result["runs"] if "speed" in run]
    rows = [
        [
            run["name"],
            str(one["batch"]),
            f"{one['context']:,}",
            f"{one['decode_tokens_per_second']:,.0f}",
            f"{one['prefill_tokens_per_second']:,.0f}",
        ]
        for run in runs
        for one in run["speed"]["runs"]
    ]
    parts = [markdown(SPEED_HEADER, rows)]
    parts += [provenance(run["speed"]["effort"]["environment"]) for run in runs[:1]]
    return "\n\n".join(parts)


VIEWS: dict[str, Callable[[dict[str, Any]], str]] = {
    "choices": choices,
    "bias": bias,
    "needles": needles,
    "speed": speed,
}
