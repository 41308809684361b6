"""The figures of the KV-cache benchmark: KL against bytes, and perplexity against bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.kvcache.configurations import CALIBRATED, HQQ, KEPT, OURS, PQ, PROD, QUANTO, QUANTO_WINDOW, TRELLIS
from benchmarks.kvcache.language_model import LARGE_KEY_BIAS, PLAIN
from benchmarks.kvcache.tables import Run, usual

KINDS = ("bytes", "bits")
# Okabe and Ito's colours; the marker says the same again.
STYLES = {
    OURS: ("#D55E00", "o"),
    PROD: ("#CC79A7", "v"),
    CALIBRATED: ("#AA4499", "P"),
    KEPT: ("#E69F00", ">"),
    PQ: ("#0072B2", "s"),
    QUANTO: ("#009E73", "^"),
    HQQ: ("#56B4E9", "D"),
    QUANTO_WINDOW: ("#117733", "h"),
}


def drawn(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The results that have figures."""
    return [
        result
        for result in results.values()
        if result.get("benchmark") == "kvcache" and any("quality" in run for run in result["runs"])
    ]


def names(result: dict[str, Any]) -> list[str]:
    """The file names of the figures of a result."""
    return [f"kvcache-{result['model']['name']}-{kind}.png" for kind in KINDS]


def draw(result: dict[str, Any], folder: Path) -> None:
    """Write both figures."""
    folder.mkdir(parents=True, exist_ok=True)
    by_bytes, by_bits = (folder / name for name in names(result))
    kl_by_bytes(result, by_bytes)
    perplexity_by_bits(result, by_bits)


def kl_by_bytes(result: dict[str, Any], path: Path) -> None:
    """Mean KL of every family against bytes a token, those of equal widths joined by a line."""
    figure, axes = canvas()
    lines: list[tuple[str, dict[str, Any], str, str]] = [(family, {}, *style) for family, style in STYLES.items()]
    lines.insert(1, (OURS, TRELLIS, "#882255", "*"))
    for family, options, colour, marker in lines:
        runs = [
            run
            for run in result["runs"]
            if run["family"] == family and usual(run) and "quality" in run and "bytes" in run
            if run["options"] == options
        ]
        if family == KEPT or not runs:
            continue
        runs.sort(key=lambda run: float(run["bytes"]["per_token"]))
        even = [run for run in runs if run["key_bits"] == run["value_bits"]]
        axes.errorbar(
            [run["bytes"]["per_token"] for run in even],
            [run["quality"]["kl"]["mean"] for run in even],
            [run["quality"]["kl"]["plus_minus"] for run in even],
            **line(family + ", trellis" * bool(options), colour, marker),
        )
        uneven = [run for run in runs if run["key_bits"] != run["value_bits"]]
        axes.plot(
            [run["bytes"]["per_token"] for run in uneven],
            [run["quality"]["kl"]["mean"] for run in uneven],
            linestyle="none",
            marker=marker,
            markerfacecolor="white",
            color=colour,
            zorder=6,
        )
        for run in runs if family == OURS and not options else []:
            label(axes, run, run["bytes"]["per_token"], run["quality"]["kl"]["mean"], colour)
    axes.set_yscale("log")
    axes.set_xlabel("bytes a token behind the recent window, all layers, all overhead counted", fontsize=11)
    axes.set_ylabel("mean KL to the dense cache, nats", fontsize=11)
    finish(figure, axes, f"{result['model']['name']}: KL against bytes", path)


def perplexity_by_bits(result: dict[str, Any], path: Path) -> None:
    """Change of perplexity against bits, with and without the keys' offset, on both variants of the model."""
    figure, axes = canvas()
    for family, variant, style in (
        (OURS, PLAIN, "-"),
        (KEPT, PLAIN, "-"),
        (OURS, LARGE_KEY_BIAS, "--"),
        (KEPT, LARGE_KEY_BIAS, "--"),
    ):
        runs = [
            run
            for run in result["runs"]
            if (run["family"], run["variant"], run["residual"], run["block"]) == (family, variant, 128, 16)
            and run["key_bits"] == run["value_bits"]
            and not run["options"]
            and "quality" in run
        ]
        if not runs:
            continue
        runs.sort(key=lambda run: float(run["key_bits"]))
        colour, marker = STYLES[family]
        name = family if variant == PLAIN else f"{family}, {variant}"
        axes.errorbar(
            [run["key_bits"] for run in runs],
            [run["quality"]["perplexity_percent"]["mean"] for run in runs],
            [run["quality"]["perplexity_percent"]["plus_minus"] for run in runs],
            **line(name, colour, marker if variant == PLAIN else "X"),
            linestyle=style,
        )
    axes.axhline(0.0, color="#888888", linewidth=0.8)
    axes.set_yscale("symlog", linthresh=1.0)
    axes.set_ylim(bottom=-1.0 if axes.dataLim.y0 > -1.0 else None)
    axes.set_xlabel("bits a coordinate of keys and values", fontsize=11)
    axes.set_ylabel("change of perplexity, % (linear up to 1, then logarithmic)", fontsize=11)
    finish(figure, axes, f"{result['model']['name']}: perplexity against bits", path)


def line(name: str, colour: str, marker: str) -> dict[str, Any]:
    """How a family is drawn."""
    ours = name == OURS
    return {
        "label": name,
        "color": colour,
        "marker": marker,
        "linewidth": 2.6 if ours else 1.3,
        "markersize": 8 if ours else 6,
        "capsize": 3,
        "zorder": 5 if ours else 2,
    }


def label(axes: Any, run: Run, x: float, y: float, colour: str) -> None:
    name = f"K{run['key_bits']:g}V{run['value_bits']:g}"
    axes.annotate(name, (x, y), xytext=(6, 6), textcoords="offset points", color=colour, fontsize=8.5, zorder=7)


def canvas() -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(8.6, 5.0), layout="constrained")


def finish(figure: Any, axes: Any, title: str, path: Path) -> None:
    import matplotlib.pyplot as plt

    axes.set_title(title, loc="left", fontsize=12)
    axes.grid(True, color="#e4e4e4", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize=9.5)
    figure.savefig(path, dpi=150)
    plt.close(figure)
