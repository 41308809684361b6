"""The figure of the GPU scan: queries a second against the batch, with the device's limits drawn."""

from pathlib import Path
from typing import Any

COLOURS = {4: "#1b4f8a", 3: "#3a86c8", 2: "#2a9d8f", 1: "#e76f51"}


def drawn(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The result that has a figure."""
    return [results["kernels"]] if "kernels" in results else []


def names(_: dict[str, Any]) -> list[str]:
    """The files that `draw` writes."""
    return ["kernels-speed.png"]


def draw(result: dict[str, Any], folder: Path) -> None:
    """Writes the figure into a folder."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [dict(zip(result["columns"], row, strict=True)) for row in result["rows"]]
    figure, axes = plt.subplots(figsize=(8.6, 5.0), layout="constrained")
    operations = result["_int_mm, TOP/s"] * 1e12
    for bits, colour in COLOURS.items():
        mine = [row for row in rows if row["bits"] == bits]
        if not mine:
            continue
        batches = [row["batch"] for row in mine]
        speeds = [1e3 * row["batch"] / row["ours from a graph, ms"] for row in mine]
        axes.plot(batches, speeds, marker="o", color=colour, label=f"{bits} bit{'' if bits == 1 else 's'}")
        size = mine[0]["vectors"] * mine[0]["d"]
        reads = result["copy, TB/s"] * 1e12 / (size * bits / 8)
        limits = [min(batch * reads, operations / (2 * size)) for batch in batches]
        axes.plot(batches, limits, linestyle=":", linewidth=1.2, color=colour)
    exact = {row["batch"]: 1e3 * row["batch"] / row["float16 + topk from a graph, ms"] for row in rows}
    axes.plot(list(exact), list(exact.values()), marker="s", color="#555555", label="exact: float16 product and topk")
    axes.plot([], [], linestyle=":", color="#777777", label="limits: code bytes at the copy's rate, or int8 products")
    axes.set(xscale="log", yscale="log", xlabel="queries a batch", ylabel="queries a second")
    first = rows[0]
    axes.set_title(
        f"{first['vectors']:,} x {first['d']:,}, k = 10, one {result['environment']['device'].split('+')[-1].strip()}"
    )
    axes.set_xticks(list(exact), [str(batch) for batch in exact])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / names(result)[0], dpi=110)
    plt.close(figure)
