import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import result_file


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path: Path, files_up_to: Any) -> None:
    path = tmp_path / "new" / "some.json"
    result_file.write(path, {"rows": [[1, 2.5], ["a", None]]})
    before = path.read_text()
    assert json.loads(before) == {"rows": [[1, 2.5], ["a", None]]}
    with files_up_to(1000), pytest.raises(OSError, match="too large"):
        result_file.write(path, {"rows": list(range(10_000))})
    assert path.read_text() == before
