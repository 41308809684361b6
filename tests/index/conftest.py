from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from index_oracle import Parsed, parse

from tqsearch.index import TurboQuantIndex


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """The index is small here: threads would cost more than they save."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[TurboQuantIndex], bytes]:
    """The bytes of an index's file: all that the index is."""

    def save(index: TurboQuantIndex) -> bytes:
        index.save(tmp_path / "saved")
        return (tmp_path / "saved").read_bytes()

    return save


@pytest.fixture
def parsed(saved: Callable[[TurboQuantIndex], bytes]) -> Callable[[TurboQuantIndex], Parsed]:
    """What is in an index, read from its file by the oracle."""
    return lambda index: parse(saved(index))
