"""The files of results: where they lie, and how one is written."""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
KERNEL_RESULTS = RESULTS / "kernels"  # of benchmarks that need a GPU


def write(path: Path, result: dict[str, Any]) -> None:
    """Writes a result as JSON; see `replace`."""
    replace(path, json.dumps(result, indent=1) + "\n")


def replace(path: Path, text: str) -> None:
    """Writes beside and renames, so that an interruption leaves a whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)
