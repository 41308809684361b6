import os
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache and no folder of the user's; returns the folder that caches are made in."""
    monkeypatch.delenv("TQSEARCH_DATA", raising=False)
    home = tmp_path / "caches"
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("LOCALAPPDATA", str(home))
    return home


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets that developers have beside the repository."""
    root = Path(__file__).resolve().parents[2]
    folder = Path(os.environ.get("TQSEARCH_SHARED", root.parent / "shared")) / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data sets: {folder} does not exist; set $TQSEARCH_SHARED")
    return folder
