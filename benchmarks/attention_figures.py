"""The figure of decode attention: the time of a step against the context, with the least that its bytes allow drawn."""

from pathlib import Path
from typing import Any

COLOURS = {"K4V4": "#1b4f8a", "K3V3": "#3a86c8", "K2V2": "#2a9d8f"}


def drawn(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The result that has a figure."""
    return [results["attention-context"]] if "attention-context" in results else []


def names(_: dict[str, Any]) -> list[str]:
    """The files that `draw` writes."""
    return ["attention-context.png"]


def draw(result: dict[str, Any], folder: Path) -> None:
    """Writes the figure into a folder."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [dict(zip(result["columns"], row, strict=True)) for row in result["rows"]]
    figure, axes = plt.subplots(figsize=(8.6, 5.0), layout="constrained")
    dense = {row["tokens"]: 1e3 * row["dense, ms"] for row in rows}
    axes.plot(list(dense), list(dense.values()), marker="s", color="#555555", label="dense, bfloat16")
    for codes, colour in COLOURS.items():
        mine = [row for row in rows if row["codes"] == codes]
        if not mine:
            continue
        tokens = [row["tokens"] for row in mine]
        axes.plot(tokens, [1e3 * row["ours, ms"] for row in mine], marker="o", color=colour, label=codes)
        axes.plot(tokens, [1e3 * row["least, ms"] for row in mine], linestyle=":", linewidth=1.2, color=colour)
    axes.plot([], [], linestyle=":", color="#777777", label="limits: bytes of codes and scales at the copy's rate")
    axes.set(xscale="log", yscale="log", xlabel="tokens of context", ylabel="microseconds a step and layer")
    device = result["environment"]["device"].split("+")[-1].strip()
    axes.set_title(f"batch {rows[0]['batch']}, 32 query heads, 8 KV heads, d = 128, one {device}")
    axes.set_xticks(list(dense), [f"{count // 1024}k" for count in dense])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / names(result)[0], dpi=110)
    plt.close(figure)
