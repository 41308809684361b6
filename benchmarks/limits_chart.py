"""The frame of a figure that shows measurements beside the limits of the device: logarithmic axes, dotted limits."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def limits_chart(path: Path, limits: str) -> Iterator[Any]:
    """Gives the axes to draw on, and writes the file; `limits` says in the legend what the dotted lines are."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8.6, 5.0), layout="constrained")
    axes.set(xscale="log", yscale="log")
    yield axes
    axes.plot([], [], linestyle=":", color="#777777", label=f"limits: {limits}")
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def rows_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A result's rows by column."""
    return [dict(zip(result["columns"], row, strict=True)) for row in result["rows"]]


def device_of(result: dict[str, Any]) -> str:
    """The accelerator's name, without the host's."""
    return str(result["environment"]["device"]).split("+")[-1].strip()
