"""The figures of a search: recall against bytes per vector, and recall against speed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.tables import EXACT, OURS, families

# Okabe and Ito's colours, which colour-blind readers tell apart; the marker says the same again.
OUR_COLOUR = "#D55E00"
OUR_STYLES = dict(
    zip(OURS, zip((OUR_COLOUR, "#F0A070", "#B00020", "#7B2D8E", "#3F007D"), "odpHP", strict=True), strict=False)
)
STYLES = (
    ("#0072B2", "s"),
    ("#56B4E9", "D"),
    ("#009E73", "^"),
    ("#CC79A7", "v"),
    ("#882255", "<"),
    ("#E69F00", ">"),
    ("#555555", "P"),
    ("#999999", "X"),
    ("#117733", "h"),
)
MARGIN = 1.25  # settings with more bytes than this times the largest budget are not drawn

KINDS = ("bytes", "speed")


def names(result: dict[str, Any]) -> list[str]:
    """The file names of the figures of a search."""
    return [f"search-{result['dataset']['name']}-{kind}.png" for kind in KINDS]


def draw(result: dict[str, Any], folder: Path) -> None:
    """Write both figures."""
    folder.mkdir(parents=True, exist_ok=True)
    by_bytes, by_speed = (folder / name for name in names(result))
    chart(
        result,
        by_bytes,
        lambda run: (float(run["bytes_per_vector"]), float(run["recall"]["10@10"])),
        ("bytes per vector, all overhead counted", "recall 10@10"),
        logarithmic="x",
    )
    chart(
        result,
        by_speed,
        lambda run: (float(run["recall"]["10@10"]), float(run["qps"]["1000"])),
        ("recall 10@10", f"queries per second, 1000 at a time, {result['environment']['threads']} threads"),
        logarithmic="y",
    )


def chart(
    result: dict[str, Any],
    path: Path,
    point: Callable[[dict[str, Any]], tuple[float, float]],
    labels: tuple[str, str],
    logarithmic: str,
) -> None:
    """One line a family, TurboQuant on top with its widths written beside the points."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    limit = MARGIN * max(result["budgets"].values())
    figure, axes = plt.subplots(figsize=(8.6, 5.0), layout="constrained")
    styles = iter(STYLES)
    for family, runs in families(result).items():
        colour, marker = OUR_STYLES[family] if family in OURS else ("#000000", "*") if family == EXACT else next(styles)
        shown = [run for run in runs if "error" not in run and "10@10" in run["recall"]]
        shown = [run for run in shown if run["bytes_per_vector"] <= limit or (family == EXACT and logarithmic == "y")]
        if not shown:
            continue
        shown.sort(key=lambda run: float(run["bytes_per_vector"]))
        xs, ys = zip(*map(point, shown), strict=True)
        ours = family in OURS
        axes.plot(
            xs,
            ys,
            color=colour,
            marker=marker,
            label=family,
            linewidth=2.8 if ours else 1.2,
            markersize=8 if ours else 5.5,
            alpha=1 if ours else 0.85,
            zorder=5 if ours else 2,
        )
        if family == OURS[0]:
            annotate(axes, shown, xs, ys)
    (axes.set_xscale if logarithmic == "x" else axes.set_yscale)("log")
    if logarithmic == "x":
        ticks = sorted(result["budgets"].values())
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
    data = result["dataset"]
    axes.set_title(f"{data['name']}: {data['vectors']:,} x {data['dim']}, {data['metric']}", loc="left", fontsize=12)
    axes.set_xlabel(labels[0], fontsize=11)
    axes.set_ylabel(labels[1], fontsize=11)
    axes.grid(True, color="#e4e4e4", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=9.5)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def annotate(axes: Any, runs: list[dict[str, Any]], xs: tuple[float, ...], ys: tuple[float, ...]) -> None:
    for run, x, y in zip(runs, xs, ys, strict=True):
        axes.annotate(
            f"{run['parameter']:g} bit" + ("" if run["parameter"] == 1 else "s"),
            (x, y),
            xytext=(7, -13),
            textcoords="offset points",
            color=OUR_COLOUR,
            fontsize=9,
            fontweight="bold",
            zorder=6,
        )
