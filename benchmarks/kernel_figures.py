"""The figure of the GPU scan: queries a second against the batch, with the device's limits drawn."""

from pathlib import Path
from typing import Any

from benchmarks.limits_chart import device_of, limits_chart, rows_of

COLOURS = {4: "#1b4f8a", 3: "#3a86c8", 2: "#2a9d8f", 1: "#e76f51"}


def drawn(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The result that has a figure."""
    return [results["kernels"]] if "kernels" in results else []


def names(_: dict[str, Any]) -> list[str]:
    """The files that `draw` writes."""
    return ["kernels-speed.png"]


def draw(result: dict[str, Any], folder: Path) -> None:
    """Writes the figure into a folder."""
    rows = rows_of(result)
    first, operations = rows[0], result["_int_mm, TOP/s"] * 1e12
    with limits_chart(folder / names(result)[0], "code bytes at the copy's rate, or int8 products") as axes:
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
        axes.plot(
            list(exact), list(exact.values()), marker="s", color="#555555", label="exact: float16 product and topk"
        )
        axes.set(xlabel="queries a batch", ylabel="queries a second")
        axes.set_title(f"{first['vectors']:,} x {first['d']:,}, k = 10, one {device_of(result)}")
        axes.set_xticks(list(exact), [str(batch) for batch in exact])
