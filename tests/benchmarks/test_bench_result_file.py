import json
from pathlib import Path

import pytest

from benchmarks import result_file

resource = pytest.importorskip("resource")  # not on Windows


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "new" / "some.json"
    result_file.write(path, {"rows": [[1, 2.5], ["a", None]]})
    before = path.read_text()
    assert json.loads(before) == {"rows": [[1, 2.5], ["a", None]]}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            result_file.write(path, {"rows": list(range(10_000))})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == before
