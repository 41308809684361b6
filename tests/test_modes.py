"""What a caller has set in torch changes no code, no score and no dtype; what one mode made goes on in another."""

import ast
import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tqsearch
from tqsearch import TurboQuantIndex, TurboQuantizer
from tqsearch.kernels import trellis_lookup
from tqsearch.trellis import encode, trellis_codebook

DIM = 48
PACKAGE = Path(tqsearch.__file__).parent
OF_NUMBERS = {"torch.arange", "torch.tensor"}  # which say whether they are integers
NAMES = ("empty", "eye", "full", "linspace", "ones", "rand", "randn", "zeros")
FACTORIES = OF_NUMBERS | {f"torch.{name}" for name in NAMES}
VECTORS = np.random.default_rng(0).standard_normal((300, DIM)).astype(np.float32) * np.geomspace(1, 8, DIM, dtype="f4")


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "another device": lambda: torch.device("meta"),  # where nothing can be computed
}
# Options of an index, and what it learns.
CASES: list[tuple[dict[str, Any], str | None]] = [
    ({"bits": 3}, None),
    ({"bits": 3}, "axes"),
    ({"bits": 2.5, "metric": "ip"}, "centre"),
    ({"bits": 5, "metric": "l2"}, None),
    ({"bits": 2, "codec": "trellis"}, None),
    ({"bits": 2, "codec": "trellis"}, "axes"),
    ({"bits": 3, "metric": "l2", "backend": "triton"}, None),
]


def forget() -> None:
    """Tables that are kept for all: they are to be made anew, in this mode."""
    trellis_lookup.table.cache_clear()
    if find_spec("triton") is not None:
        importlib.import_module("tqsearch.kernels.scan_layout").layout_of.cache_clear()


def through(folder: Path, options: dict[str, Any], learn: str | None) -> tuple[bytes, list[np.ndarray]]:
    """An index's file, and all that it returns."""
    backend = options.get("backend", "auto")
    forget()
    index = TurboQuantIndex(DIM, **options)
    if learn:
        index.train(VECTORS, learn=learn)  # type: ignore[arg-type]
    index.add(VECTORS[:60])
    index.add(torch.from_numpy(VECTORS[60:80]), ids=range(500, 520))
    index.remove([3, 510])
    index.save(folder / "index")
    index = TurboQuantIndex.load(folder / "index", backend=backend)
    index.remove([5])
    index.add(VECTORS[:1])
    found = [*index.search(VECTORS[:3], 7), *index.search(torch.from_numpy(VECTORS[0]), 90, allow=[1, 2, 500])]
    found += [index.reconstruct([0, 500]), index.reconstruct([])]
    return (folder / "index").read_bytes(), [np.asarray(part) for part in found]


@pytest.mark.parametrize(("options", "learn"), CASES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_indexes_are_as_ever(tmp_path: Path, mode: str, options: dict[str, Any], learn: str | None) -> None:
    if options.get("backend") == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("runs the kernels on tensors of the CPU, which the interpreter does")
        if mode == "another device":
            pytest.skip("the interpreter makes tensors of its own")
    with MODES[mode]():
        content, found = through(tmp_path, options, learn)
    wanted_content, wanted = through(tmp_path, options, learn)
    assert content == wanted_content
    for part, other in zip(found, wanted, strict=True):
        assert part.dtype == other.dtype
        np.testing.assert_array_equal(part, other)


@pytest.mark.parametrize("codec", ["scalar", "trellis"])
def test_what_was_made_in_inference_mode_changes_outside(tmp_path: Path, codec: Any) -> None:
    """As vectors are made by a model: what a removal moves is changed in place."""
    with torch.inference_mode():
        index = TurboQuantIndex(DIM, 2, codec=codec)
        index.add(torch.from_numpy(VECTORS) + 0)
        index.save(tmp_path / "index")
        loaded = TurboQuantIndex.load(tmp_path / "index")
    for each in (index, loaded):
        each.remove(range(0, 300, 7))
        each.add(VECTORS[:5])
        np.testing.assert_array_equal(np.asarray(each.search(VECTORS[1:2], 1)[1]), [[1]])


@pytest.mark.parametrize("form", ["mse", "prod"])
@pytest.mark.parametrize("mode", MODES)
def test_quantizers_are_as_ever(mode: str, form: Any) -> None:
    def outcome() -> list[np.ndarray]:
        quantizer = TurboQuantizer(DIM, 3, form=form, rotation="dense", seed=11)
        codes = quantizer.encode(VECTORS[:20])
        found = [codes.packed, codes.scales, quantizer.decode(codes), quantizer.inner_product(VECTORS[:3], codes)]
        return [np.asarray(part) for part in found]

    with MODES[mode]():
        found = outcome()
    for part, other in zip(found, outcome(), strict=True):
        assert part.dtype == other.dtype
        np.testing.assert_array_equal(part, other)


def test_paths_are_found_in_float32_whatever_the_default() -> None:
    values = torch.randn((50, 400), generator=torch.Generator().manual_seed(0))
    wanted = encode(values, [(400, 1)])
    with default_dtype(torch.float64):
        assert torch.equal(encode(values, [(400, 1)]), wanted)
        assert trellis_codebook(1).levels().dtype == torch.float32


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_what_makes_a_tensor_names_its_dtype_and_device(path: Path) -> None:
    """Else the caller's defaults decide: on a GPU, where no test above comes by."""
    for node in ast.walk(ast.parse(path.read_text())):
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if isinstance(node, ast.Call) and called in FACTORIES:
            named = {keyword.arg for keyword in node.keywords}
            assert "device" in named, f"line {node.lineno}: {ast.unparse(node)}"
            assert "dtype" in named or called in OF_NUMBERS, f"line {node.lineno}: {ast.unparse(node)}"
