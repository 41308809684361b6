"""Markdown tables from results: a search at equal bytes, and any result that is a list of columns and rows."""

from typing import Any

COMPACT_WIDTHS = ("1", "2", "4")
OURS = (
    "TurboQuant",
    "TurboQuant centred",
    "TurboQuant trained",
    "TurboQuant trellis",
    "TurboQuant trained trellis",
)
EXACT = "exact"
BELOW = 0.9  # a setting with up to a tenth fewer bytes than the budget is shown too
ABOVE = 1.5
HEADER = (
    "budget",
    "codec",
    "bytes",
    "recall 10@10",
    "recall 1@1",
    "train s",
    "add s",
    "queries/s, 1 at a time",
    "by 32",
    "by 1000",
)


NEARLY = 1.15
TRAINED_HEADER = (
    "data",
    "bits",
    "bytes",
    "untrained",
    "trained",
    "trellis, untrained",
    "trellis, trained",
    "best rival",
    "which",
)
GPU_HEADER = (
    "codec",
    "on",
    "bytes",
    "recall 10@10",
    "with exact queries",
    "train and add s",
    "queries/s, 1 at a time",
    "by 32",
    "by 1000",
)


def markdown(header: list[str], rows: list[list[str]], left: int = 1) -> str:
    """A table of GitHub's Markdown; the first `left` columns are text, the others are aligned to the right."""
    rule = ["---" if position < left else "---:" for position in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def number(value: Any) -> str:
    """A cell: text as it is, numbers with three or four significant digits."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or (value == int(value) and abs(value) >= 1000):
        return f"{int(value):,}"
    return f"{value:.4g}"


def seconds(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 0.05 else "0"


def rate(value: float) -> str:
    """Three significant digits: more are noise."""
    return f"{float(f'{value:.3g}'):,.0f}"


def generic(result: dict[str, Any]) -> str:
    """The table of a result with `columns` and `rows`."""
    rows = [[number(value) for value in row] for row in result["rows"]]
    text = [any(isinstance(row[position], str) for row in result["rows"]) for position in range(len(result["columns"]))]
    left = text.index(False) if False in text else len(text)
    parts = [markdown([str(name) for name in result["columns"]], rows, left)]
    if "environment" in result:
        parts.append(provenance(result["environment"]))
    return "\n\n".join(parts)


def gpu(result: dict[str, Any], search: dict[str, Any] | None) -> str:
    """The index on a GPU, and for each width FAISS PQ of as many bytes on a CPU, of a result of `benchmarks.search`."""
    rivals = [] if search is None else families(search).get("FAISS PQ", [])
    rows: list[list[str]] = []
    for bits, centred, size, recall, exact, added, *speeds in result["rows"]:
        ours = f"TurboQuant{' centred' if centred == 'yes' else ''}, {bits} bit{'' if bits == 1 else 's'}"
        rows.append([ours, "GPU", number(size), f"{recall:.3f}", f"{exact:.3f}", seconds(added), *map(rate, speeds)])
        if centred == "yes":
            for run in at_budget(rivals, size):
                built = seconds(run["train_seconds"] + run["add_seconds"])
                shown = [number(run["bytes_per_vector"]), f"{run['recall']['10@10']:.3f}", "", built]
                name = f"FAISS PQ, `{run['setting']}`"
                rows.append([name, "CPU", *shown, *(rate(run["qps"][batch]) for batch in ("1", "32", "1000"))])
    parts = [markdown(list(GPU_HEADER), rows, 2), provenance(result["environment"])]
    if search is not None:
        parts[1] += f" The CPU: {provenance(search['environment'])}"
    return "\n\n".join(parts)


def trained(results: dict[str, dict[str, Any]]) -> str | None:
    """Recall of untrained and trained indexes and of the best rival, at every width of every search.

    A rival takes part with at most `NEARLY` times the budget's bytes, at its best setting; None without searches.
    """
    rows: list[list[str]] = []
    for result in results.values():
        if result.get("benchmark") != "search" or result["effort"]["quick"]:
            continue
        grouped = families(result)
        name = result["dataset"]["name"]
        for width, budget in result["budgets"].items():
            ours = [
                next((run for run in grouped.get(family, []) if f"{run['parameter']:g}" == width), None)
                for family in ("TurboQuant", "TurboQuant trained", "TurboQuant trellis", "TurboQuant trained trellis")
            ]
            rivals = [run for family, runs in grouped.items() if family not in (*OURS, EXACT) for run in runs]
            near = [run for run in rivals if "error" not in run and run["bytes_per_vector"] <= NEARLY * budget]
            best = max(near, key=lambda run: float(run["recall"]["10@10"]), default=None)
            shown = [f"{run['recall']['10@10']:.3f}" if run and "error" not in run else "" for run in ours]
            rival = ["", ""]
            if best is not None:
                said = f"{best['family']}, {number(best['bytes_per_vector'])} B"
                rival = [f"{best['recall']['10@10']:.3f}", said]
            rows.append([name, width, number(budget), *shown, *rival])
            name = ""
    return markdown(list(TRAINED_HEADER), rows) if rows else None


def viewed(result: dict[str, Any], view: str) -> dict[str, Any]:
    """A result with `columns` and `rows` cut to the columns that one of its `views` names."""
    kept = [result["columns"].index(name) for name in result["views"][view]]
    rows = [[row[position] for position in kept] for row in result["rows"]]
    return {**result, "columns": result["views"][view], "rows": rows}


def at_budget(runs: list[dict[str, Any]], budget: float) -> list[dict[str, Any]]:
    """The runs of one family that are compared at a budget.

    They are the cheapest that is not below it and not above 1.5 of it, and the dearest that is less than a tenth below;
    of two with the same bytes, the one with more recall.
    """
    done = [run for run in runs if "error" not in run]
    done.sort(key=lambda run: float(run["recall"]["10@10"]), reverse=True)
    done.sort(key=lambda run: float(run["bytes_per_vector"]))
    enough = [run for run in done if budget <= run["bytes_per_vector"] <= ABOVE * budget]
    near = [run for run in done if BELOW * budget <= run["bytes_per_vector"] < budget]
    most = max((run["bytes_per_vector"] for run in near), default=None)
    return [run for run in near if run["bytes_per_vector"] == most][:1] + enough[:1]


def families(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The runs by family, in the order in which they ran."""
    grouped: dict[str, list[dict[str, Any]]] = {}
    for run in result["runs"]:
        grouped.setdefault(run["family"], []).append(run)
    return grouped


def cells(budget: str, run: dict[str, Any]) -> list[str]:
    recall, qps = run["recall"], run["qps"]
    name = run["family"] if run["family"] == EXACT else f"{run['family']}, `{run['setting']}`"
    values = [
        budget,
        name,
        number(run["bytes_per_vector"]),
        f"{recall['10@10']:.3f}",
        f"{recall['1@1']:.3f}",
        seconds(run["train_seconds"]),
        seconds(run["add_seconds"]),
        *(rate(qps[batch]) for batch in ("1", "32", "1000")),
    ]
    if run["family"] in OURS:
        values[1:] = [f"**{value}**" for value in [f"{run['family']}, {run['setting']}", *values[2:]]]
    return values


def search(result: dict[str, Any], *, full: bool = False) -> str:
    """TurboQuant and every rival at its bytes per vector.

    Args:
        result: of `benchmarks.search`.
        full: at every width, not only at 1, 2 and 4 bits.
    """
    grouped = families(result)
    rows: list[list[str]] = []
    for width, budget in result["budgets"].items():
        if not full and width not in COMPACT_WIDTHS:
            continue
        name = f"{width} bit{'' if width == '1' else 's'}, {budget} B"
        ours = [
            run
            for name in OURS
            for run in grouped.get(name, [])
            if f"{run['parameter']:g}" == width and "error" not in run
        ]
        others = [runs for family, runs in grouped.items() if family not in (*OURS, EXACT)]
        for run in ours + [run for runs in others for run in at_budget(runs, budget)]:
            rows.append(cells(name, run))
            name = ""
    rows += [cells("none", run) for run in grouped.get(EXACT, []) if "error" not in run]
    data = result["dataset"]
    effort = result["effort"]
    caption = (
        f"{data['name']}: {data['vectors']:,} vectors of {data['dim']} dimensions, {data['metric']},"
        f" {data['queries']:,} queries; PQ is trained on {min(effort['training_rows'], data['vectors']):,} rows,"
        f" {effort['pq_iterations']} iterations."
    )
    elsewhere: dict[str, list[str]] = {}
    for family, record in result.get("again", {}).items():
        elsewhere.setdefault(provenance(record), []).append(family)
    again = "".join(f" {', '.join(names)}: {text.lower()[:1]}{text[1:]}" for text, names in elsewhere.items())
    parts = [markdown(list(HEADER), rows, 2), caption + " " + provenance(result["environment"]) + again]
    if full:
        parts += remarks(result)
    return "\n\n".join(parts)


def remarks(result: dict[str, Any]) -> list[str]:
    """Notes on the contestants, who was left out, and which runs failed: a list, as one part."""
    lines = [f"- {name}: {note}" for name, note in result["notes"].items()]
    lines += [f"- {name} is left out: {reason}" for name, reason in result["left_out"].items()]
    lines += [
        f"- {run['family']} `{run['setting']}` failed: {run['error']}" for run in result["runs"] if "error" in run
    ]
    return ["\n".join(lines)] if lines else []


def provenance(environment: dict[str, Any]) -> str:
    """One line: on what it was measured, with what, when."""
    versions = environment.get("versions", {})
    names = ", ".join(f"{name} {version}" for name, version in versions.items() if version and name != "triton")
    threads = environment.get("threads")
    parts = [
        str(environment.get("device", "")),
        f"{threads} threads" if threads else "",
        names,
        f"commit {environment['commit']}" if environment.get("commit") else "",
        str(environment.get("date", "")),
        str(environment.get("times", "")),
    ]
    return "Measured on " + "; ".join(part for part in parts if part) + "."
