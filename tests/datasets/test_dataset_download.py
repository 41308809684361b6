"""Downloads from a server on this machine: what is kept, what is verified, and what is said when it fails."""

import hashlib
import http.server
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tqsearch.datasets import load_dataset, registry
from tqsearch.datasets.download import cache_folder, fetch, find_file
from tqsearch.datasets.registry import Entry
from tqsearch.errors import DatasetError

pytest.importorskip("platformdirs", reason="platformdirs is not installed: pip install 'tqsearch[bench]'")

CONTENT = bytes(range(256)) * 5000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
OTHER = hashlib.sha256(b"other").hexdigest()


class Origin(http.server.ThreadingHTTPServer):
    content = CONTENT
    announced: int | None = len(CONTENT)
    requests = 0


class Handler(http.server.BaseHTTPRequestHandler):
    server: Origin

    def do_GET(self) -> None:
        self.server.requests += 1
        if self.path != "/set.hdf5":
            self.send_error(404)
            return
        self.send_response(200)
        if self.server.announced is not None:
            self.send_header("Content-Length", str(self.server.announced))
        self.end_headers()
        self.wfile.write(self.server.content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def origin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Origin]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Origin(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def entry(origin: Origin) -> Entry:
    url = f"http://127.0.0.1:{origin.server_port}/set.hdf5"
    return Entry("set", url, "set.hdf5", len(CONTENT), SHA256, None, "l2", 4, 100)


def names() -> list[str]:
    return sorted(path.name for path in cache_folder().iterdir())


def test_downloads_once(entry: Entry, origin: Origin, own_folders: Path) -> None:
    path = fetch(entry)
    assert own_folders in path.parents
    assert path.read_bytes() == CONTENT
    assert fetch(entry) == path
    assert origin.requests == 1
    assert names() == ["set.hdf5"], "no temporary file is left, and a known checksum needs no record"


@pytest.mark.parametrize("announced", [len(CONTENT), None])
def test_unknown_checksum_is_recorded_and_verified_later(entry: Entry, origin: Origin, announced: int | None) -> None:
    origin.announced = announced
    entry = replace(entry, sha256=None, size=None)
    path = fetch(entry)
    record = path.with_name("set.hdf5.sha256")
    assert record.read_text() == f"{SHA256}  set.hdf5\n"
    fetch(entry)
    changed = b"x" + CONTENT[1:]
    path.write_bytes(changed)
    actual = hashlib.sha256(changed).hexdigest()
    with pytest.raises(DatasetError, match=f"expected sha256 {SHA256}, found {actual}: remove it"):
        fetch(entry)
    path.unlink()
    origin.content = changed
    with pytest.raises(DatasetError, match=rf"expected sha256 {SHA256}, received {actual}.*remove .*set\.hdf5\.sha256"):
        fetch(entry)
    record.unlink()
    assert fetch(entry).read_bytes() == changed
    record.write_text("no checksum\n")
    with pytest.raises(DatasetError, match="expected a sha256 in hexadecimal, found 'no'"):
        fetch(entry)


def test_file_put_into_the_cache_by_hand_is_trusted_on_first_use(entry: Entry, origin: Origin) -> None:
    cache_folder().mkdir(parents=True)
    (cache_folder() / "set.hdf5").write_bytes(CONTENT)
    fetch(replace(entry, sha256=None))
    assert (cache_folder() / "set.hdf5.sha256").read_text().split()[0] == SHA256
    assert origin.requests == 0


def test_wrong_checksum_leaves_nothing(entry: Entry) -> None:
    with pytest.raises(DatasetError, match=f"expected sha256 {OTHER}, received {SHA256}"):
        fetch(replace(entry, sha256=OTHER))
    assert names() == []


def test_wrong_size_leaves_nothing(entry: Entry) -> None:
    with pytest.raises(DatasetError, match=f"expected 7 bytes, received {len(CONTENT)}"):
        fetch(replace(entry, size=7))
    assert names() == []


@pytest.mark.parametrize("size", [None, len(CONTENT)])
def test_connection_that_ends_early_leaves_nothing(entry: Entry, origin: Origin, size: int | None) -> None:
    origin.content = CONTENT[:1000]
    with pytest.raises(DatasetError, match=f"{entry.url}: (expected {len(CONTENT)} bytes, received 1000|cannot be)"):
        fetch(replace(entry, size=size, sha256=None))
    assert names() == []


def test_cached_file_of_another_size(entry: Entry) -> None:
    path = fetch(entry)
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(DatasetError, match=f"expected {len(CONTENT)} bytes, found {len(CONTENT) - 1}: remove it"):
        fetch(entry)


def test_not_found_and_offline_say_what_to_do(entry: Entry, origin: Origin) -> None:
    missing = replace(entry, url=entry.url + ".gone")
    with pytest.raises(DatasetError, match=r"cannot be downloaded: .*[Nn]ot [Ff]ound"):
        fetch(missing)
    offline = replace(entry, url="http://127.0.0.1:1/set.hdf5")
    with pytest.raises(DatasetError) as caught:
        fetch(offline)
    message = str(caught.value)
    for part in ("cannot be downloaded", f"fetch {offline.url} by hand", str(cache_folder()), "$TQSEARCH_DATA"):
        assert part in message
    assert names() == []


def test_cache_that_cannot_be_written(entry: Entry, own_folders: Path) -> None:
    own_folders.parent.mkdir(exist_ok=True)
    own_folders.write_text("a file where the folder should be")
    with pytest.raises(DatasetError, match="cannot be written"):
        fetch(entry)


def test_folder_of_the_user_comes_first(
    entry: Entry, origin: Origin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = fetch(entry)
    own = tmp_path / "own"
    own.mkdir()
    monkeypatch.setenv("TQSEARCH_DATA", str(own))
    assert fetch(entry) == cached
    (own / "set.hdf5").write_bytes(CONTENT)
    assert fetch(entry) == own / "set.hdf5"
    assert [path.name for path in own.iterdir()] == ["set.hdf5"], "nothing is written into the user's folder"
    assert find_file("set") == find_file("set.hdf5") == own / "set.hdf5"
    (own / "set.hdf5").write_bytes(b"x" + CONTENT[1:])
    with pytest.raises(DatasetError, match="expected sha256"):
        fetch(entry)


def test_load_by_name_downloads_and_checks_the_shape(
    entry: Entry, origin: Origin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    h5py = pytest.importorskip("h5py", reason="h5py is not installed: pip install 'tqsearch[bench]'")
    with h5py.File(tmp_path / "made.hdf5", "w") as file:
        file["train"] = np.random.default_rng(0).standard_normal((100, 4)).astype(np.float32)
        file["test"] = np.ones((2, 4), np.float32)
        file.attrs["distance"] = "euclidean"
    origin.content = (tmp_path / "made.hdf5").read_bytes()
    origin.announced = len(origin.content)
    entry = replace(entry, size=None, sha256=None)
    monkeypatch.setitem(registry.REGISTRY, "set", entry)
    data = load_dataset("set")
    assert (data.name, data.metric, data.train.shape) == ("set", "l2", (100, 4))
    monkeypatch.setitem(registry.REGISTRY, "set", replace(entry, n=101))
    with pytest.raises(
        DatasetError, match="expected 101 vectors of dimension 4 with metric l2, found 100 of 4 with l2"
    ):
        load_dataset("set")
    assert origin.requests == 1
