import dataclasses
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

typer_testing = pytest.importorskip("typer.testing")

from tqsearch import TurboQuantIndex, __version__, cli, demo  # noqa: E402
from tqsearch.datasets import Dataset  # noqa: E402
from tqsearch.errors import TQSearchError  # noqa: E402

DIM = 16


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Dataset:
    generator = np.random.default_rng(1)
    base = generator.standard_normal((600, DIM), dtype=np.float32)
    data = Dataset(name="small", metric="cosine", train=base, test=base[:40] * 2)
    monkeypatch.setattr("tqsearch.datasets.load_dataset", lambda _: data)
    monkeypatch.setattr(demo, "SECONDS_PER_BATCH", 0.01)
    return data


def run(*arguments: str) -> tuple[int, str]:
    result = typer_testing.CliRunner().invoke(cli.app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_help_names_the_commands() -> None:
    status, output = run("--help")
    assert status == 0
    assert all(name in output for name in ("demo", "bench", "info"))


@pytest.mark.usefixtures("small")
def test_demo(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    status, output = run("demo", "--out", str(tmp_path))
    assert status == 0
    assert "600 vectors of 16 dimensions" in output
    assert "exact rank" in output
    for name in ("TurboQuant 1 bit ", "TurboQuant 4 bits", "FAISS PQ10x8", "exact float32"):
        assert name in output
    figure = tmp_path / "small-recall.png"
    assert str(figure) in output.replace("\n", "")
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("small")
def test_demo_goes_on_without_faiss_and_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, output = run("demo", "--out", str(tmp_path / "none"))
    assert status == 0
    assert "FAISS is not installed" in output
    assert output.count("pip install 'tqsearch[bench]'") == 2
    assert not (tmp_path / "none").exists()


def test_demo_of_too_few_vectors_for_product_quantization(
    small: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("faiss")
    few = dataclasses.replace(small, train=small.train[:255])
    monkeypatch.setattr("tqsearch.datasets.load_dataset", lambda _: few)
    status, output = run("demo", "--out", str(tmp_path))
    assert status == 0
    assert "needs as many vectors: it is left out" in output
    assert "FAISS PQ10x8" not in output
    assert (tmp_path / "small-recall.png").exists()


@pytest.mark.usefixtures("small")
def test_bench_measures_the_widths_asked_for() -> None:
    status, output = run("bench", "--bits", "3.5", "--queries", "7")
    assert status == 0
    assert "7 queries" in output
    assert "TurboQuant 3.5 bits" in output
    assert "TurboQuant 4" not in output
    assert cli.REPOSITORY_BENCHMARK in output


def test_info_of_the_installation() -> None:
    status, output = run("info")
    assert status == 0
    assert __version__ in output
    assert "cpu" in output
    assert "reference" in output


@pytest.mark.parametrize("codec", ["scalar", "trellis"])
@pytest.mark.parametrize("learn", [None, "centre", "axes"])
def test_info_of_a_file(tmp_path: Path, codec: Any, learn: Any) -> None:
    index = TurboQuantIndex(DIM, bits=2, metric="l2", seed=11, codec=codec)
    vectors = np.random.default_rng(0).standard_normal((1234, DIM), dtype=np.float32) * np.geomspace(1, 9, DIM)
    if learn:
        index.train(vectors, learn=learn)
        assert index.learnt == learn
    index.add(vectors)
    path = tmp_path / "some.tqs"
    index.save(path)
    status, output = run("info", str(path))
    assert status == 0
    said = dict(line.split(maxsplit=1) for line in output.replace("learnt axes", "learnt-axes").splitlines())
    assert said["a"] == f"vector      {index.bytes_per_vector} bytes (float32: 64)"
    assert said["vectors"] == "1,234"
    assert said["metric"] == "l2"
    assert said["plan"] == f"{DIM} x 2 bit"
    assert said["codec"] == codec
    assert said["rotation"] == "hadamard, seed 11"
    learnt = " + ".join(f"{size} x {width} bit" for size, width in index.plan.pairs())
    assert said.get("learnt-axes") == (learnt if learn == "axes" else None)


def test_info_of_an_empty_index(tmp_path: Path) -> None:
    TurboQuantIndex(DIM).save(tmp_path / "empty")
    status, output = run("info", str(tmp_path / "empty"))
    assert status == 0
    assert "vectors       0\n" in output
    assert "a vector" not in output


def test_an_error_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "foreign.tqs"
    path.write_bytes(b"not an index at all")
    for name in (path, tmp_path / "absent.tqs"):
        monkeypatch.setattr("sys.argv", ["tqsearch", "info", str(name)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 1
        said = capsys.readouterr().err
        assert said.startswith("tqsearch: ")
        assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--codec", "tree"], "codec must be one of scalar, trellis, got tree"),
        (["--text", "latin"], "latin must be text in UTF-8"),
        ([], "folder must be a model's folder or a model of the hub"),
    ],
)
def test_kv_diagnose_says_what_is_wrong(tmp_path: Path, arguments: list[str], says: str) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "folder").mkdir()
    (tmp_path / "latin").write_bytes("\xe4\xf6\xfc".encode("latin-1"))
    arguments = [str(tmp_path / name) if name == "latin" else name for name in arguments]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers' own imports
        status, output = run("kv-diagnose", str(tmp_path / "folder"), *arguments)
    assert status == 1
    *_, last = output.splitlines()
    assert last.startswith("tqsearch: ")
    assert says in last


@pytest.mark.parametrize("device", ["gpu", f"cuda:{torch.cuda.device_count()}"])
def test_kv_diagnose_needs_a_device_that_is_there(tmp_path: Path, device: str) -> None:
    """It is said before the model is loaded: here there is none."""
    pytest.importorskip("transformers")
    with pytest.raises(TQSearchError, match="device must be"):
        run("kv-diagnose", str(tmp_path / "none"), "--device", device)


@pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
def test_exact_search_is_exact(metric: str) -> None:
    generator = np.random.default_rng(2)
    data = Dataset(
        name="x",
        metric=metric,  # type: ignore[arg-type]
        train=generator.standard_normal((200, DIM), dtype=np.float32),
        test=generator.standard_normal((9, DIM), dtype=np.float32),
    )
    search = demo.exact_search(demo.unit_rows(data.train, metric), metric)
    np.testing.assert_array_equal(search(demo.unit_rows(data.test, metric), 5), data.ground_truth(5))
    nearest = demo.true_scores(demo.unit_rows(data.train, metric), demo.unit_rows(data.test, metric)[0], metric)
    best = nearest.argmin() if metric == "l2" else nearest.argmax()
    assert best == data.ground_truth(1)[0, 0]
