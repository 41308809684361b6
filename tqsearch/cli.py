"""The command line: `tqsearch demo`, `tqsearch bench`, `tqsearch info`, `tqsearch kv-diagnose`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

try:
    import typer
except ModuleNotFoundError:  # the engine does not need it
    sys.exit("the command line needs typer: pip install 'tqsearch[bench]'")

if TYPE_CHECKING:
    from tqsearch.datasets import Dataset

REPOSITORY_BENCHMARK = "python -m benchmarks search --dataset NAME_OR_PATH"
WIDTHS = (1.0, 2.0, 4.0)
DEMO_QUERIES = 500
FEWEST_TOKENS = 16  # that `kvcache.diagnose` takes

app = typer.Typer(
    help="Vector search on TurboQuant codes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

DatasetOption = Annotated[
    str, typer.Option("--dataset", metavar="NAME_OR_PATH", help="A known data set, or a file (HDF5, fvecs, fbin, npy).")
]


def loaded(name: str, queries: int) -> Dataset:
    """The data set with its first queries."""
    from tqsearch.datasets import load_dataset
    from tqsearch.demo import first_queries

    data = first_queries(load_dataset(name), queries)
    typer.echo(
        f"{data.name}: {len(data.train):,} vectors of {data.dim} dimensions, {data.metric}; {len(data.test)} queries"
    )
    return data


@app.command()
def demo(
    dataset: DatasetOption = "synthetic-embeddings",
    out: Annotated[Path, typer.Option("--out", help="The folder of the figure.")] = Path("demo-output"),
) -> None:
    """Build an index, show one query's neighbours, and compare with exact search and FAISS PQ at the same bytes."""
    import importlib.util

    from tqsearch import demo as parts

    data = loaded(dataset, DEMO_QUERIES)
    typer.echo("finding the true neighbours ...")
    truth = data.ground_truth(parts.K)
    rows: list[parts.Row] = []
    for bits in reversed(WIDTHS):
        index, seconds = parts.build(data, bits)
        if bits == WIDTHS[-1]:
            typer.echo(f"\nQuery 0 at {bits:g} bits a dimension, {index.bytes_per_vector} bytes a vector:\n")
            typer.echo(parts.neighbours_text(index, data, truth))
        rows.insert(0, parts.turboquant_row(index, bits, data, truth, seconds))
    if importlib.util.find_spec("faiss") is None:
        typer.echo("\nFAISS is not installed; to compare with it: pip install 'tqsearch[bench]'")
    elif len(data.train) < parts.PQ_CENTROIDS:
        typer.echo(f"\nFAISS PQ learns {parts.PQ_CENTROIDS} centroids and needs as many vectors: it is left out")
    else:
        sample = min(parts.PQ_ROWS, len(data.train))
        typer.echo(f"\nTraining FAISS PQ (on {sample:,} rows, {parts.PQ_ITERATIONS} iterations, to save time) ...")
        for size in [int(row.bytes_per_vector) for row in rows if row.bytes_per_vector <= data.dim]:
            rows.append(parts.pq_row(size, data, truth))
    rows.append(parts.exact_row(data, truth))
    typer.echo("\nRecall of the 10 nearest (10@10) and of the nearest (1@1), at all bytes kept for a vector:\n")
    typer.echo(parts.table_text(rows))
    figure(out / f"{data.name}-recall.png", lambda path: parts.draw(rows, data, path))


@app.command()
def bench(
    dataset: DatasetOption = "synthetic-embeddings",
    bits: Annotated[
        list[float] | None, typer.Option("--bits", help="A width; may be repeated. 1, 2 and 4 if none.")
    ] = None,
    queries: Annotated[int, typer.Option("--queries", min=1, help="How many queries at most.")] = 1000,
) -> None:
    """Measure TurboQuant beside exact search on this machine: recall, bytes, seconds to add, queries per second.

    The comparison with FAISS and turbovec is in the repository: `python -m benchmarks search` in a checkout.
    """
    from tqsearch import demo as parts

    data = loaded(dataset, queries)
    truth = data.ground_truth(parts.K)
    rows = []
    for width in bits or WIDTHS:
        index, seconds = parts.build(data, width)
        rows.append(parts.turboquant_row(index, width, data, truth, seconds))
    rows.append(parts.exact_row(data, truth))
    typer.echo("")
    typer.echo(parts.table_text(rows))
    typer.echo(f"\nFor the rivals at equal bytes, in a checkout of the repository: {REPOSITORY_BENCHMARK}")


@app.command()
def info(
    index_file: Annotated[Path | None, typer.Argument(metavar="[INDEX_FILE]", help="A saved index.")] = None,
) -> None:
    """Print versions, devices and backends; or, of an index file, what its header says."""
    if index_file is None:
        describe_installation()
    else:
        describe_file(index_file)


@app.command("kv-diagnose")
def kv_diagnose(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, or a model of the hub.")],
    text: Annotated[Path | None, typer.Option("--text", help="What to read; a page of prose if none.")] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=FEWEST_TOKENS, help="How many tokens to read at most.")] = 2048,
    noise: Annotated[float, typer.Option("--noise", help="0.1 is next to lossless, 0.35 small.")] = 0.2,
    codec: Annotated[str, typer.Option("--codec", help="scalar, or trellis.")] = "scalar",
    device: Annotated[str, typer.Option("--device", help="Where the model runs.")] = "cpu",
    out: Annotated[Path, typer.Option("--out", help="The folder of the figure.")] = Path("kv-diagnosis"),
) -> None:
    """Say how hard a model's keys and values are to compress, and recommend bits for its KV cache."""
    import importlib.util

    if importlib.util.find_spec("transformers") is None:
        sys.exit("kv-diagnose needs transformers: pip install 'tqsearch[hf]'")

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tqsearch.arrays import as_device
    from tqsearch.codec import CODECS
    from tqsearch.kvcache import diagnosis_view, sample_text
    from tqsearch.kvcache.diagnose import diagnose
    from tqsearch.kvcache.recommend import recommend

    if codec not in CODECS:
        sys.exit(f"tqsearch: codec must be one of {', '.join(CODECS)}, got {codec}")
    place = as_device(device)
    try:
        page = sample_text.TEXT if text is None else text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        sys.exit(f"tqsearch: {text} must be text in UTF-8 ({error})")
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        network: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    except (OSError, ValueError) as error:  # transformers raises either for what is no model
        sys.exit(f"tqsearch: {model} must be a model's folder or a model of the hub ({str(error).splitlines()[0]})")
    ids = tokenizer(page, return_tensors="pt", verbose=False)["input_ids"][:, :tokens]
    if ids.shape[1] < FEWEST_TOKENS:
        sys.exit(f"tqsearch: the text must have at least {FEWEST_TOKENS} tokens, got {ids.shape[1]}")
    diagnosis = diagnose(network.to(place).eval(), ids.to(place))
    name = Path(model).resolve().name
    advice = recommend(diagnosis, noise, codec)  # type: ignore[arg-type]  # checked there
    typer.echo(diagnosis_view.text(name, diagnosis, advice))
    figure(out / f"{name}-kv.png", lambda path: diagnosis_view.draw(name, diagnosis, path))


def figure(path: Path, draw: Callable[[Path], None]) -> None:
    """Draws a figure where it can be drawn, and says where it is."""
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        typer.echo("\nmatplotlib is not installed, so no figure is drawn: pip install 'tqsearch[bench]'")
        return
    draw(path)
    typer.echo(f"\nThe figure is {path}")


def describe_installation() -> None:
    """Versions, devices, backends."""
    import importlib.metadata
    import importlib.util
    import platform

    import torch

    from tqsearch import __version__, kernels

    lines = [("tqsearch", __version__), ("python", platform.python_version())]
    for name in ("torch", "triton", "numpy", "faiss-cpu", "turbovec", "transformers"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        lines.append((name, version))
    lines.append(("devices", f"cpu ({torch.get_num_threads()} threads)"))
    for number in range(torch.cuda.device_count()):
        lines.append(("", f"cuda:{number} ({torch.cuda.get_device_name(number)})"))
    lines.append(("backends", ", ".join(kernels.BACKENDS)))
    show(lines)


def describe_file(path: Path) -> None:
    """The header of an index file; the vectors are not read."""
    from tqsearch.format import read_header, stored_bytes
    from tqsearch.plan import BitPlan

    header = read_header(path)
    lines = [
        ("vectors", f"{header.count:,}"),
        ("dim", str(header.dim)),
        ("metric", header.metric),
        ("plan", str(BitPlan.from_pairs(header.plan))),
    ]
    if header.learnt_plan is not None:
        lines.append(("learnt axes", str(BitPlan.from_pairs(header.learnt_plan))))
    lines += [("codec", header.codec or "scalar"), ("rotation", f"{header.rotation}, seed {header.seed}")]
    if header.count:
        lines.append(("a vector", f"{stored_bytes(path) // header.count} bytes (float32: {4 * header.dim})"))
    show([*lines, ("file", f"{path.stat().st_size:,} bytes")])


def show(lines: list[tuple[str, str]]) -> None:
    """Two columns."""
    for name, value in lines:
        typer.echo(f"{name:<14}{value}")


def main() -> None:
    """The entry point: an error of ours, or of a file, is one line and exit status 1."""
    from tqsearch.errors import TQSearchError

    try:
        app()
    except (TQSearchError, OSError) as error:
        typer.echo(f"tqsearch: {error}", err=True)
        sys.exit(1)
