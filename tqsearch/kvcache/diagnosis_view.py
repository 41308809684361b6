"""A diagnosis for people: the table that the command line prints, and the figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tqsearch.kvcache.diagnose import Diagnosis
from tqsearch.kvcache.recommend import Recommendation

HEADER = (
    "layer",
    "|k|",
    "|k - mu|",
    "|v|",
    "|k|/|v|",
    "offset",
    "outlier",
    "noise 4b",
    "3b",
    "2b",
    "4b, offset left",
    "bits",
)
SHOWN = (4, 3, 2)


def rows(diagnosis: Diagnosis, advice: Recommendation) -> list[tuple[str, ...]]:
    """The cells of the table, a row a layer."""
    found = []
    for layer, bits in zip(diagnosis.layers, advice.layers, strict=True):
        noise = [layer.logit_noise(width, codec=advice.codec) for width in SHOWN]
        noise.append(layer.logit_noise(4, offset_removed=False, codec=advice.codec))
        found.append(
            (
                str(layer.layer),
                f"{layer.key_norm:.1f}",
                f"{layer.centred_key_norm:.1f}",
                f"{layer.value_norm:.1f}",
                f"{layer.norm_ratio:.1f}",
                f"{layer.offset_share:.0%}",
                f"{layer.outlier_ratio:.1f}",
                *("?" if value is None else f"{value:.2f}" for value in noise),
                f"K{'dense' if bits.keys is None else bits.keys} V{bits.values}",
            )
        )
    return found


def text(name: str, diagnosis: Diagnosis, advice: Recommendation) -> str:
    """The table, the remarks and the recommendation."""
    cells = [HEADER, *rows(diagnosis, advice)]
    sizes = [max(len(row[place]) for row in cells) for place in range(len(HEADER))]
    lines = ["  ".join(cell.rjust(size) for cell, size in zip(row, sizes, strict=True)) for row in cells]
    ratio = advice.bytes_per_token / advice.dense_bytes_per_token
    lines += [
        "",
        "offset: share of the keys' power that is a constant; outlier: largest channel over the median channel;",
        "noise: standard deviation of a logit's error at 4, 3 and 2 bits, the offset taken off, and at 4 bits with it.",
        "",
        *advice.remarks,
        f"{name}, {diagnosis.tokens} tokens read: recommended",
        f"    {advice.call}",
        f"    a compressed token takes {advice.bytes_per_token:,.0f} bytes of {advice.dense_bytes_per_token:,.0f}:"
        f" {ratio:.3f}",
    ]
    return "\n".join(lines)


def draw(name: str, diagnosis: Diagnosis, path: Path) -> None:
    """Three panels by layer, as a PNG file: norms, offset and outliers, logit noise by width."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    layers = diagnosis.layers
    xs = [layer.layer for layer in layers]
    figure, (norms, shape, noise) = plt.subplots(1, 3, figsize=(12.5, 4.0), layout="constrained")
    line(norms, xs, [layer.key_norm for layer in layers], "keys", "#D55E00", "o")
    line(norms, xs, [layer.centred_key_norm for layer in layers], "keys without offset", "#E69F00", "s")
    line(norms, xs, [layer.value_norm for layer in layers], "values", "#0072B2", "^")
    norms.set_yscale("log")
    norms.set_title(f"{name}: norms", loc="left", fontsize=11)
    line(shape, xs, [100.0 * layer.offset_share for layer in layers], "offset share, %", "#D55E00", "o")
    line(shape, xs, [layer.outlier_ratio for layer in layers], "outlier channel over median", "#0072B2", "s")
    shape.set_yscale("log")
    shape.set_title("constant and outlier channels of keys", loc="left", fontsize=11)
    for width, colour, marker in ((4, "#009E73", "o"), (3, "#56B4E9", "s"), (2, "#CC79A7", "^")):
        known = [(layer.layer, value) for layer in layers if (value := layer.logit_noise(width)) is not None]
        line(noise, [x for x, _ in known], [y for _, y in known], f"{width} bits", colour, marker)
        left = [layer.logit_noise(width, offset_removed=False) for layer in layers]
        noise.plot(xs, [value or float("nan") for value in left], color=colour, linestyle=":", linewidth=1.2)
    noise.set_yscale("log")
    noise.set_title("noise of logits (dotted: offset left in)", loc="left", fontsize=11)
    for axes in (norms, shape, noise):
        axes.set_xlabel("layer")
        axes.grid(True, color="#e4e4e4")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def line(axes: Any, xs: list[int], ys: list[float], label: str, colour: str, marker: str) -> None:
    """One line of a panel."""
    axes.plot(xs, ys, label=label, color=colour, marker=marker, linewidth=1.8)
