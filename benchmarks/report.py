"""`python -m benchmarks.report`: the tables and figures of the README and of docs/, from the JSON files in results/.

A table stands between `<!-- table:NAME -->` and `<!-- end -->`, where NAME is that of a file in results/ without its
`.json`; `NAME-full` is a search at all widths with remarks, `NAME.VIEW` some columns of a result that has views,
`trained` what training gains in every search.
`--check` writes nothing and fails where a page differs from what would be written, or a figure is missing. Only the
existence of figures is checked: their bytes depend on the version of matplotlib.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks import attention_figures, figures, kernel_figures, tables
from benchmarks.kvcache import figures as kvcache_figures
from benchmarks.kvcache import tables as kvcache_tables

ROOT = Path(__file__).resolve().parent.parent
MARKED = re.compile(r"(<!-- table:(?P<name>[\w.+-]+) -->\n)(?P<text>.*?)(<!-- end -->)", re.DOTALL)


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """Every result, by the name of its file."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.rglob("*.json"))}


def table(name: str, results: dict[str, dict[str, Any]]) -> str | None:
    """The text between the markers of a name, or None where there is no such result."""
    if (text := kvcache_tables.table(name, results)) is not None:
        return text
    if name == "trained":
        return tables.trained(results)
    if name in results:
        result = results[name]
        if result.get("benchmark") == "gpu":
            return tables.gpu(result, results.get(f"search-{result['dataset']}"))
        if "columns" in result:
            return tables.generic(result)
        return tables.search(result) if result.get("benchmark") == "search" else None
    whole, _, view = name.rpartition(".")
    if whole in results and view in results[whole].get("views", {}):
        return tables.generic(tables.viewed(results[whole], view))
    base = name.removesuffix("-full")
    if base != name and results.get(base, {}).get("benchmark") == "search":
        return tables.search(results[base], full=True)
    return None


def rewrite(page: str, results: dict[str, dict[str, Any]]) -> tuple[str, list[str], list[str]]:
    """Fill in a page.

    Returns:
        The page, the names of the tables that changed, and the names of those without a result, which are left alone.
    """
    changed: list[str] = []
    missing: list[str] = []

    def filled(match: re.Match[str]) -> str:
        name = match["name"]
        text = table(name, results)
        if text is None:
            missing.append(name)
            return match[0]
        if match["text"] != f"\n{text}\n\n":
            changed.append(name)
        return f"{match[1]}\n{text}\n\n{match[4]}"

    return MARKED.sub(filled, page), changed, missing


def pages(root: Path) -> list[Path]:
    """Where markers are looked for."""
    readme = root / "README.md"
    return ([readme] if readme.exists() else []) + sorted((root / "docs").rglob("*.md"))


def drawn(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The results that have figures: searches, quick ones apart."""
    return [
        result
        for result in results.values()
        if result.get("benchmark") == "search" and not result["effort"]["quick"] and result["runs"]
    ]


def main(arguments: list[str], root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where something differs")
    options = parser.parse_args(arguments)
    results = load(root / "benchmarks" / "results")
    folder = root / "docs" / "figures"
    problems: list[str] = []
    for path in pages(root):
        before = path.read_text()
        after, changed, missing = rewrite(before, results)
        where = path.relative_to(root)
        problems += [f"{where}: table:{name} has no result in benchmarks/results" for name in missing]
        if options.check:
            problems += [f"{where}: table:{name} differs from its result" for name in changed]
        elif after != before:
            path.write_text(after)
            print(f"{where}: {', '.join(changed)}")
    pictured = [(figures, result) for result in drawn(results)]
    pictured += [(kernel_figures, result) for result in kernel_figures.drawn(results)]
    pictured += [(attention_figures, result) for result in attention_figures.drawn(results)]
    pictured += [(kvcache_figures, result) for result in kvcache_figures.drawn(results)]
    for module, result in pictured:
        if options.check:
            absent = [name for name in module.names(result) if not (folder / name).exists()]
            problems += [f"docs/figures/{name} is missing" for name in absent]
        else:
            module.draw(result, folder)
            print("docs/figures: " + ", ".join(module.names(result)))
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems and options.check:
        print("`python -m benchmarks.report` writes the tables and figures", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
