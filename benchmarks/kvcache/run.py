"""`python -m benchmarks kvcache`: quality, bytes and speed of the compressed KV cache and of its rivals.

Documents of --length tokens are fed in chunks of --chunk, so that everything that has left the recent window is read
through the compressed path at every position. All caches read the same documents, and each is compared with the dense
cache of the same model, position by position. Quality is measured in float32, so that what differs is the cache's
doing; bytes are those of a bfloat16 cache.

A run adds to the file at --output: measure one family, or one part, at a time with --only and --parts. With --speed
it is `whole_model` that runs, a large random model on a GPU; with --paths `paths`, the two ways to read a cache.
"""

from __future__ import annotations

import argparse
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import environment
from benchmarks.kvcache import build, configurations, documents, language_model, paths, results, whole_model
from benchmarks.kvcache.configurations import PARTS, Configuration
from benchmarks.kvcache.measures import MEASURES, Scene, headline
from benchmarks.result_file import RESULTS

TRAINING_DOCUMENTS = 8


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks kvcache", description=__doc__)
    made.add_argument("--model", required=True, help="a folder, or a model of the hub")
    made.add_argument("--text", type=Path, action="append", help="a text file; may be repeated")
    made.add_argument("--tokens", type=int, default=40960, help="tokens measured in all (default 40,960)")
    made.add_argument("--length", type=int, default=2048, help="of a document in tokens (default 2,048)")
    made.add_argument("--chunk", type=int, default=64, help="tokens fed at a time (default 64)")
    made.add_argument("--batch", type=int, default=4, help="documents at a time (default 4)")
    made.add_argument("--needles", type=int, default=2, help="needles for each depth and length (default 2)")
    made.add_argument("--steps", type=int, default=128, help="greedy tokens compared (default 128)")
    made.add_argument("--device", default="cpu")
    made.add_argument("--only", help="a regular expression: the configurations to measure, by name")
    made.add_argument("--parts", default=",".join(PARTS[:4]), help=f"of {', '.join(PARTS)} (default: all but speed)")
    made.add_argument("--quick", action="store_true", help="4 and 2 bits on 4 documents, 512-token needles")
    made.add_argument("--output", type=Path, help="default benchmarks/results/kvcache-MODEL.json")
    made.add_argument("--codebooks", type=Path, help="a folder that PQ codebooks are kept in")
    made.add_argument("--threads", type=int, help="threads of torch and FAISS")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--list", action="store_true", help="print the names of the configurations and stop")
    return made


def main(arguments: list[str]) -> int:
    others: dict[str, Callable[[list[str]], int]] = {"--speed": whole_model.main, "--paths": paths.main}
    for flag, other in others.items():
        if flag in arguments:
            return other([one for one in arguments if one != flag])
    if arguments == ["--list"]:
        print("\n".join(one.name for one in configurations.catalogue()))
        return 0
    options = parser().parse_args(arguments)
    parts = [part for part in options.parts.split(",") if part]
    if unknown := set(parts) - set(PARTS):
        raise SystemExit(f"--parts knows {', '.join(PARTS)}, not {', '.join(sorted(unknown))}")
    catalogue = configurations.catalogue()
    wanted = configurations.chosen(catalogue, options.only)
    if options.quick:
        wanted = configurations.quick(wanted)
        options.tokens = min(options.tokens, 4 * options.length)
    if not wanted:
        raise SystemExit(f"no configuration has a name that {options.only!r} finds; --list prints them")
    order = [one.name for one in catalogue]
    for variant in language_model.VARIANTS:
        group = [one for one in wanted if one.variant == variant]
        if group:
            measure(group, variant, parts, options, order)
    return 0


def measure(
    wanted: list[Configuration], variant: str, parts: list[str], options: argparse.Namespace, order: list[str]
) -> None:
    """Measure configurations of one variant of the model, saving after each part of each."""
    model, tokenizer = language_model.load(options.model, options.device, torch.float32, variant)
    described = language_model.described(options.model, model)
    output = options.output or RESULTS / f"kvcache-{described['name']}.json"
    result = results.load(output, described)
    texts = documents.tokenized(tokenizer, options.text or documents.default_texts())
    count = max(options.tokens // options.length, len(texts))
    rows, names = documents.measured(texts, count, options.length)
    rows = rows.to(options.device)
    trained_on = min(2 if options.quick else TRAINING_DOCUMENTS, len(rows))
    training = documents.held_out(texts, trained_on, len(rows), options.length)
    subject = build.Subject(model, training, options.seed, options.codebooks)
    built: list[tuple[Configuration, build.Built]] = []
    for one in wanted:
        reason = build.missing(one, options.codebooks)
        if reason is not None:
            print(f"{one.name}: {reason}", flush=True)
            if all(run["name"] != one.name for run in result["runs"]):
                result["left_out"][one.name] = reason
            continue
        built.append((one, build.build(one, subject)))
    around = {
        "environment": environment(options.seed),
        "transformers": importlib.metadata.version("transformers"),
        "dtype": "float32",
        "chunk": options.chunk,
        "batch": options.batch,
        "device": options.device,
        "quick": options.quick,
    }

    def keep(one: Configuration, part: str, found: dict[str, Any]) -> None:
        results.add(result, {**one.record(), part: {**found, "effort": around}})
        results.save(result, output, order)
        print(f"{one.name}: {part}: {headline(part, found)}", flush=True)

    for part in parts:
        group = [(one, made) for one, made in built if part in one.parts]
        if group:
            MEASURES[part](group, keep, Scene(model, tokenizer, texts, rows, names, options))
