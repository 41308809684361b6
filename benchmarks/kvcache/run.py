"""`python -m benchmarks kvcache`: quality, bytes and speed of the compressed KV cache and of its rivals.

Documents of --length tokens are fed in chunks of --chunk, so that everything that has left the recent window is read
through the compressed path at every position. All caches read the same documents, and each is compared with the dense
cache of the same model, position by position. Quality is measured in float32, so that what differs is the cache's
doing; bytes are those of a bfloat16 cache.

A run adds to the file at --output: measure one family, or one part, at a time with --only and --parts.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import environment
from benchmarks.kvcache import (
    build,
    configurations,
    documents,
    greedy,
    language_model,
    likelihood,
    needle,
    results,
    speed,
    storage,
    summary,
)
from benchmarks.kvcache.configurations import PARTS, Configuration

RESULTS = Path(__file__).resolve().parent.parent / "results"
TRAINING_DOCUMENTS = 8
MEASURED_FROM = 320  # residual 128, four sinks, the largest block and a chunk
NEEDLE_LENGTHS = (1024, 2048, 4096)
NEEDLE_DEPTHS = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
BYTES_LENGTHS = (2052, 4100)  # multiples of every block above the sinks


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
    made.add_argument(
        "--parts", default=",".join(PARTS[:4]), help=f"of {', '.join(PARTS)} (all but speed if not given)"
    )
    made.add_argument("--quick", action="store_true", help="4 and 2 bits on 4 documents, 512-token needles")
    made.add_argument("--output", type=Path, help="default benchmarks/results/kvcache-MODEL.json")
    made.add_argument("--threads", type=int, help="threads of torch and FAISS")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--list", action="store_true", help="print the names of the configurations and stop")
    return made


def main(arguments: list[str]) -> int:
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
    """Measure configurations of one variant of the model, saving after each part."""
    model, tokenizer = language_model.load(options.model, options.device, torch.float32, variant)
    described = language_model.described(options.model, model)
    output = options.output or RESULTS / f"kvcache-{described['name']}.json"
    result = results.load(output, described)
    texts = documents.tokenized(tokenizer, options.text or documents.default_texts())
    count = max(options.tokens // options.length, len(texts))
    rows, names = documents.measured(texts, count, options.length)
    rows = rows.to(options.device)
    training = documents.held_out(texts, min(TRAINING_DOCUMENTS, len(rows)), len(rows), options.length)
    subject = build.Subject(model, training, options.seed)
    built: list[tuple[Configuration, build.Built]] = []
    for one in wanted:
        reason = build.missing(one)
        if reason is not None:
            print(f"{one.name}: {reason}", flush=True)
            if all(run["name"] != one.name for run in result["runs"]):
                result["left_out"][one.name] = reason
            continue
        built.append((one, build.build(one, subject)))
    around = {
        "environment": environment(options.seed),
        "dtype": "float32",
        "chunk": options.chunk,
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


class Scene:
    """What the measures share: the model, its tokenizer, texts, the documents and the options."""

    def __init__(self, model: Any, tokenizer: Any, texts: Any, rows: Any, names: list[str], options: Any) -> None:
        self.model, self.tokenizer, self.texts = model, tokenizer, texts
        self.rows, self.names, self.options = rows, names, options


def quality(group: Any, keep: Any, scene: Scene) -> None:
    makers = {one.name: made.make for one, made in group}
    started = time.perf_counter()
    found = likelihood.compare(scene.model, scene.rows, makers, scene.options.chunk, scene.options.batch)
    for one, _ in group:
        keep(one, "quality", summary.summarize(found[one.name], scene.names, MEASURED_FROM))
    print(f"quality of {len(group)} configurations: {time.perf_counter() - started:.0f} s", flush=True)


def needles(group: Any, keep: Any, scene: Scene) -> None:
    options = scene.options
    lengths = (512,) if options.quick else NEEDLE_LENGTHS
    prose = next(iter(scene.texts.values()))
    asked = {
        length: needle.prompts(scene.tokenizer, prose, length, NEEDLE_DEPTHS, options.needles, options.seed)
        for length in lengths
    }
    for one, made in group:
        by_length = {
            str(length): needle.retrieval(scene.model, scene.tokenizer, prompts, made.make, options.chunk)
            for length, prompts in asked.items()
        }
        keep(one, "needle", {"residual": one.residual, "by_length": by_length})


def greedy_match(group: Any, keep: Any, scene: Scene) -> None:
    options = scene.options
    prompts = scene.rows[:, : scene.options.length // 2]
    dense = greedy.dense_continuation(scene.model, prompts, options.chunk, options.steps)
    for one, made in group:
        keep(one, "greedy", greedy.matched(scene.model, prompts, dense, made.make, options.chunk))


def bytes_held(group: Any, keep: Any, scene: Scene) -> None:
    shorter, longer = BYTES_LENGTHS
    text = next(iter(scene.texts.values()))
    model = scene.model.to(torch.bfloat16)
    recorded = storage.states(model, text[:longer].to(scene.options.device))
    scene.model.to(torch.float32)
    for one, made in group:
        if made.formula is not None:
            found = made.formula(longer)
        else:
            found = storage.measured_bytes(recorded, made.make, scene.options.chunk, shorter, longer)
        keep(one, "bytes", found)


def tokens_per_second(group: Any, keep: Any, scene: Scene) -> None:
    options = scene.options
    text = next(iter(scene.texts.values()))
    model = scene.model.to(torch.bfloat16)
    for one, made in group:
        rows = documents.windows(text, options.batch, 4096).to(options.device)
        keep(one, "speed", {**speed.decoding(model, rows, made.make, 512, 32), "dtype": "bfloat16"})
    scene.model.to(torch.float32)


MEASURES = {
    "quality": quality,
    "needle": needles,
    "greedy": greedy_match,
    "bytes": bytes_held,
    "speed": tokens_per_second,
}


def headline(part: str, found: dict[str, Any]) -> str:
    """One line for the terminal."""
    if part == "quality":
        change, kl, top1 = found["perplexity_percent"], found["kl"], found["top1_percent"]
        return (
            f"perplexity {change['mean']:+.2f} ± {change['plus_minus']:.2f} %, KL {kl['mean']:.5f} ±"
            f" {kl['plus_minus']:.5f} (99 %: {found['kl_p99']:.4f}), top-1 {top1['mean']:.2f} ± {top1['plus_minus']:.2f} %"
        )
    if part == "needle":
        return ", ".join(f"{length}: {one['exact']}/{one['asked']}" for length, one in found["by_length"].items())
    if part == "greedy":
        return f"{found['matched_tokens']['mean']:.1f} of {found['steps']} tokens, {found['whole']} whole"
    if part == "bytes":
        return f"{found['per_token']:g} a token, {found['ratio_per_token']:.3f} of {found['dtype']} ({found['from']})"
    return f"{found['decode_tokens_per_second']:g} tokens/s"
