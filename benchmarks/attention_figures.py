"""The figure of decode attention: the time of a step against the context, with the least that its bytes allow drawn."""

from pathlib import Path
from typing import Any

from benchmarks.limits_chart import device_of, limits_chart, rows_of

COLOURS = {"K4V4": "#1b4f8a", "K3V3": "#3a86c8", "K2V2": "#2a9d8f"}


def drawn(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The result that has a figure."""
    return [results["attention-context"]] if "attention-context" in results else []


def names(_: dict[str, Any]) -> list[str]:
    """The files that `draw` writes."""
    return ["attention-context.png"]


def draw(result: dict[str, Any], folder: Path) -> None:
    """Writes the figure into a folder."""
    rows = rows_of(result)
    dense = {row["tokens"]: 1e3 * row["dense, ms"] for row in rows}
    with limits_chart(folder / names(result)[0], "bytes of codes and scales at the copy's rate") as axes:
        axes.plot(list(dense), list(dense.values()), marker="s", color="#555555", label="dense, bfloat16")
        for codes, colour in COLOURS.items():
            mine = [row for row in rows if row["codes"] == codes]
            if not mine:
                continue
            tokens = [row["tokens"] for row in mine]
            axes.plot(tokens, [1e3 * row["ours, ms"] for row in mine], marker="o", color=colour, label=codes)
            axes.plot(tokens, [1e3 * row["least, ms"] for row in mine], linestyle=":", linewidth=1.2, color=colour)
        axes.set(xlabel="tokens of context", ylabel="microseconds a step and layer")
        axes.set_title(f"batch {rows[0]['batch']}, 32 query heads, 8 KV heads, d = 128, one {device_of(result)}")
        axes.set_xticks(list(dense), [f"{count // 1024}k" for count in dense])
