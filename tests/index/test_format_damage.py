"""Damaged and foreign files: each raises an error of ours, or is read as what was written; never as something else."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tqsearch.errors import CorruptFileError, ForeignFileError, FormatError, NewerFormatError
from tqsearch.format import read_header
from tqsearch.index import TurboQuantIndex


@pytest.fixture(scope="module", params=["l2", "cosine", "axes", "trellis", "empty"])
def good(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    metric: Any = "l2" if request.param in ("l2", "axes") else "cosine"
    codec: Any = "trellis" if request.param == "trellis" else "scalar"
    index = TurboQuantIndex(12, 2.5, metric, seed=3, codec=codec)
    if request.param == "axes":
        index.train(np.random.default_rng(1).standard_normal((500, 12)) / np.arange(1, 13))
        assert index.learnt == "axes"
    if request.param != "empty":
        vectors = np.random.default_rng(0).standard_normal((20, 12)).astype(np.float32)
        index.add(vectors, ids=np.arange(20)[::-1] if request.param == "l2" else None)
    path = tmp_path_factory.mktemp("good") / "index"
    index.save(path)
    return path.read_bytes()


def error_of(read: Callable[[Path], object], path: Path) -> str:
    """The name of our error that reading raises, or "none"; any other error fails the test."""
    try:
        read(path)
    except FormatError as raised:
        error = raised
    else:
        return "none"
    assert type(error) in (CorruptFileError, ForeignFileError, NewerFormatError)
    assert str(path) in str(error)
    return type(error).__name__


def outcome(path: Path, content: bytes, good: bytes) -> str:
    """What loading does: an error's name, or "same"; to read it as something else fails the test."""
    path.write_bytes(content)
    error_of(read_header, path)
    error = error_of(TurboQuantIndex.load, path)
    if error != "none":
        return error
    TurboQuantIndex.load(path).save(path)
    assert path.read_bytes() == good, "read as something else"
    return "same"


def damaged(good: bytes, seed: int) -> tuple[str, bytes]:
    """A random corruption of a random kind."""
    rng = np.random.default_rng(seed)
    data = bytearray(good)
    kind = ["bits", "bytes", "cut", "insert", "delete", "zeros", "swap", "append"][seed % 8]
    place, size = int(rng.integers(len(data))), int(rng.integers(1, 40))
    if kind == "bits":
        for _ in range(rng.integers(1, 4)):
            data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    elif kind == "bytes":
        for _ in range(rng.integers(1, 4)):
            data[rng.integers(len(data))] = int(rng.integers(256))
    elif kind == "cut":
        del data[place:]
    elif kind == "insert":
        data[place:place] = rng.bytes(size)
    elif kind == "delete":
        del data[place : place + size]
    elif kind == "zeros":
        data[place : place + size] = bytes(len(data[place : place + size]))
    elif kind == "swap":
        data[place : place + size] = data[place : place + size][::-1]
    else:
        data += rng.bytes(size)
    return kind, bytes(data)


def test_200_random_corruptions(tmp_path: Path, good: bytes) -> None:
    outcomes: dict[str, set[str]] = {}
    for seed in range(200):
        kind, content = damaged(good, seed)
        found = outcome(tmp_path / "damaged", content, good)
        assert found != "same" or content == good or len(content) == len(good), "another length went unnoticed"
        if content != good:
            outcomes.setdefault(kind, set()).add(found)
    assert len(outcomes) == 8
    assert all(found & {"CorruptFileError", "ForeignFileError"} for found in outcomes.values())


def test_every_byte_of_the_head(tmp_path: Path, good: bytes) -> None:
    """One bit of each byte before the tensors, another from byte to byte, and one of each byte of the tensors' ends.

    What may pass unnoticed is white space at the end of the JSON; and nothing of the tensors.
    """
    head = 8 + int.from_bytes(good[:8], "little")
    for place in [*range(head), *range(head, len(good), 17), *range(max(head, len(good) - 1), len(good))]:
        data = bytearray(good)
        data[place] ^= 1 << place * 5 % 8
        found = outcome(tmp_path / "damaged", bytes(data), good)
        assert found != "same" or chr(good[place]) == " "
        if place >= head:
            assert found == "CorruptFileError"


def test_every_length(tmp_path: Path, good: bytes) -> None:
    for length in [*range(0, len(good), 7), len(good) - 1]:
        found = outcome(tmp_path / "damaged", good[:length], good)
        assert found == ("CorruptFileError" if length else "ForeignFileError")


def foreign_files(folder: Path) -> dict[str, Path]:
    contents: dict[str, bytes] = {
        "empty": b"",
        "text": b"These are not the vectors you are looking for.\n" * 20,
        "json": b'{"__metadata__":{"format":"tqsearch-index","version":"1"}}',
        "zeros": bytes(5000),
        "random": np.random.default_rng(0).bytes(5000),
        "random, long": np.random.default_rng(1).bytes(300_000),
        "zip": b"PK\x03\x04" + bytes(100),
        "numpy": b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }" + bytes(64),
        "huge header": (2**63).to_bytes(8, "little") + bytes(100),
    }
    files = {name: folder / name for name in contents}
    for name, content in contents.items():
        files[name].write_bytes(content)
    for name, metadata in (("model", None), ("model with metadata", {"format": "pt"})):
        files[name] = folder / name
        save_file({"weight": torch.ones(3, 4)}, files[name], metadata)
    return files


def test_foreign_files(tmp_path: Path) -> None:
    for name, path in foreign_files(tmp_path).items():
        for read in (TurboQuantIndex.load, read_header):
            with pytest.raises(ForeignFileError, match="is not a tqsearch index") as caught:
                read(path)
            assert str(path) in str(caught.value), name


def test_a_huge_header_is_refused_without_being_read(tmp_path: Path) -> None:
    """Ours by its first bytes, and a length of 2^62: refused by its length, not by running out of memory."""
    start = b'{"__metadata__":{"format":"tqsearch-index","version":"1"}}'
    (tmp_path / "huge").write_bytes((2**62).to_bytes(8, "little") + start)
    with pytest.raises(CorruptFileError):
        TurboQuantIndex.load(tmp_path / "huge")


@pytest.mark.parametrize("read", [TurboQuantIndex.load, read_header])
def test_no_file(tmp_path: Path, read: Any) -> None:
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "missing")
    with pytest.raises(OSError, match=r"folder|directory|Permission"):
        read(tmp_path)
