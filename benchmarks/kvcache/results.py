"""The result file of a run, which later runs add to: a rival can be measured on another machine, on another day."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.kvcache.configurations import NOTES
from benchmarks.result_file import write


def empty(model: dict[str, Any]) -> dict[str, Any]:
    """A result without runs.

    Args:
        model: of `language_model.described`.
    """
    return {"benchmark": "kvcache", "model": model, "notes": NOTES, "left_out": {}, "runs": []}


def load(path: Path, model: dict[str, Any]) -> dict[str, Any]:
    """The result at a path, or an empty one where there is none."""
    if not path.exists():
        return empty(model)
    found: dict[str, Any] = json.loads(path.read_text())
    if found["model"] != model:
        raise SystemExit(f"{path} is of another model, {found['model']['name']}; name another file with --output")
    found["notes"] = NOTES
    return found


def add(result: dict[str, Any], run: dict[str, Any]) -> None:
    """Put a run in; parts measured before of the same configuration stay where the run has none of them."""
    for place, before in enumerate(result["runs"]):
        if before["name"] == run["name"]:
            result["runs"][place] = {**before, **run}
            break
    else:
        result["runs"].append(run)
    result["left_out"].pop(run["name"], None)


def merge(results: list[dict[str, Any]]) -> dict[str, Any]:
    """One result of several of the same model; of a part measured twice, the later stands."""
    whole = empty(results[0]["model"])
    for result in results:
        if result["model"] != whole["model"]:
            raise SystemExit("the results are of different models")
        for run in result["runs"]:
            add(whole, run)
    done = {run["name"] for run in whole["runs"]}
    for result in results:
        whole["left_out"].update({name: why for name, why in result["left_out"].items() if name not in done})
    return whole


def save(result: dict[str, Any], path: Path, order: list[str]) -> None:
    """Write a result, runs in the order of the catalogue and others after them."""
    places = {name: place for place, name in enumerate(order)}
    result["runs"].sort(key=lambda run: places.get(run["name"], len(places)))
    write(path, result)
