"""`python -m benchmarks kvcache --paths`: attention from the codes beside attention to decoded states, in quality.

Both read the same documents and answer the same needles from caches of the same settings; what differs is who reads the
codes, the kernel (attention "turboquant") or plain torch, which decodes them for the library's "sdpa". Perplexity
counts from the position on from which compressed tokens are read. Both should agree to the rounding of the model's
dtype and of the kernel's 15-bit integers.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import environment
from benchmarks.kvcache import documents, language_model, likelihood, needle
from benchmarks.kvcache.measures import MEASURED_FROM, NEEDLE_DEPTHS
from benchmarks.result_file import KERNEL_RESULTS, write
from tqsearch.kvcache import TurboQuantCache

COLUMNS = (
    "dtype",
    "bits",
    "perplexity, decoded",
    "perplexity, from the codes",
    "difference, %",
    "KL between the two",
    "needles, decoded",
    "needles, from the codes",
)
PATHS = ("sdpa", "turboquant")


def row_of(model: Any, tokenizer: Any, texts: Any, bits: int, options: argparse.Namespace) -> list[Any]:
    """One width."""
    rows, _ = documents.measured(texts, options.documents, options.length)
    rows = rows.to(options.device)
    losses: dict[str, list[torch.Tensor]] = {path: [] for path in PATHS}
    between = []
    with torch.inference_mode():
        for first in range(0, len(rows), options.batch):
            group = rows[first : first + options.batch]
            model.set_attn_implementation(PATHS[0])
            decoded = TurboQuantCache(model.config, bits=bits)
            reference = torch.cat([part for _, part in likelihood.chunked(model, group, decoded, options.chunk)], dim=1)
            model.set_attn_implementation(PATHS[1])
            found = likelihood.agreement(
                model, group, reference, TurboQuantCache(model.config, bits=bits), options.chunk
            )
            losses[PATHS[0]].append(found.dense_nll[:, MEASURED_FROM:])
            losses[PATHS[1]].append(found.nll[:, MEASURED_FROM:])
            between.append(found.kl[:, MEASURED_FROM:])
    perplexities = [math.exp(torch.cat(losses[path]).double().mean().item()) for path in PATHS]
    answers = []
    prose = next(iter(texts.values()))
    for path in PATHS:
        model.set_attn_implementation(path)
        exact, asked = 0, 0
        for length in options.needles:
            prompts = needle.prompts(tokenizer, prose, length, NEEDLE_DEPTHS, 2, options.seed)
            one = needle.retrieval(
                model, tokenizer, prompts, lambda: TurboQuantCache(model.config, bits=bits), options.chunk
            )
            exact, asked = exact + one["exact"], asked + one["asked"]
        answers.append(f"{exact} of {asked}")
    return [
        options.dtype,
        f"K{bits}V{bits}",
        *(round(one, 6) for one in perplexities),
        round(100 * (perplexities[1] / perplexities[0] - 1), 5),
        float(f"{torch.cat(between).double().mean().item():.2e}"),
        *answers,
    ]


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks kvcache --paths", description=__doc__)
    parser.add_argument("--model", required=True, help="a folder, or a model of the hub")
    parser.add_argument("--text", type=Path, action="append", help="a text file; may be repeated")
    parser.add_argument("--bits", type=numbers, default=[4, 3, 2])
    parser.add_argument("--documents", type=int, default=20)
    parser.add_argument("--length", type=int, default=2048, help="of a document in tokens (default 2,048)")
    parser.add_argument("--chunk", type=int, default=64, help="tokens fed at a time (default 64)")
    parser.add_argument("--batch", type=int, default=10, help="documents at a time (default 10)")
    lengths = "lengths of the needles' prompts in tokens"
    parser.add_argument("--needles", type=numbers, default=[1024, 4000], help=lengths)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="default results/kernels/paths-MODEL.json; rows are added")
    options = parser.parse_args(arguments)
    model, tokenizer = language_model.load(options.model, options.device, getattr(torch, options.dtype))
    described = language_model.described(options.model, model)
    texts = documents.tokenized(tokenizer, options.text or documents.default_texts())
    output = options.output or KERNEL_RESULTS / f"paths-{described['name']}.json"
    result: dict[str, Any] = {
        "benchmark": "paths",
        "environment": {**environment(options.seed), "transformers": importlib.metadata.version("transformers")},
        "model": described,
        "documents": options.documents,
        "length": options.length,
        "chunk": options.chunk,
        "device": options.device,
        "columns": list(COLUMNS),
        "rows": json.loads(output.read_text())["rows"] if output.exists() else [],
    }
    for bits in options.bits:
        row = row_of(model, tokenizer, texts, bits, options)
        result["rows"] = [one for one in result["rows"] if one[:2] != row[:2]] + [row]
        print(*row, sep="\t", flush=True)
        write(output, result)
    return 0
