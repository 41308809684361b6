"""Files of the registry: found where the user keeps them, or downloaded once and verified."""

import hashlib
import http.client
import os
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

from tqsearch.datasets.optional import needs
from tqsearch.datasets.registry import Entry
from tqsearch.errors import DatasetError
from tqsearch.progress import progress

FOLDER_VARIABLE = "TQSEARCH_DATA"
CHUNK = 1 << 20
TIMEOUT = 60.0  # seconds without a byte


def cache_folder() -> Path:
    """Where downloads go: the user's cache folder of this package. It need not exist yet."""
    return Path(needs("platformdirs", "find the cache folder of data sets").user_cache_dir("tqsearch"))


def find_file(name: str) -> Path | None:
    """The file of a data set, in `$TQSEARCH_DATA` or else in the cache, or None.

    Args:
        name: of a data set, `NAME.hdf5` being looked for first, or of a file.
    """
    own = os.environ.get(FOLDER_VARIABLE)
    if own and (found := _in_folder(Path(own), name)):
        return found
    return _in_folder(cache_folder(), name)


def _in_folder(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / f"{name}.hdf5", folder / name) if path.is_file()), None)


def fetch(entry: Entry) -> Path:
    """The verified file of an entry, downloaded into the cache if it is nowhere yet.

    The download goes to a temporary file beside its destination and is renamed when it is whole and verified, so that
    the cache never holds half a file.

    Args:
        entry: of the registry.

    Returns:
        The path of the file.

    Raises:
        DatasetError: it cannot be downloaded, or its size or checksum is not what it should be.
    """
    found = find_file(entry.name) or find_file(entry.file_name)
    if found is None:
        return _download(entry, cache_folder())
    expected = entry.sha256 or _recorded(found)
    size = found.stat().st_size
    if entry.size not in (None, size):
        raise DatasetError(
            f"{found}: expected {entry.size} bytes, found {size}: remove it to download {entry.name} anew"
        )
    if expected is not None or found.parent == cache_folder():
        actual = _checksum(found)
        if expected is None:
            _record(found, actual)
        elif actual != expected:
            raise DatasetError(f"{found}: expected sha256 {expected}, found {actual}: remove it to download it anew")
    return found


def _download(entry: Entry, folder: Path) -> Path:
    """Download an entry into a folder."""
    target = folder / entry.file_name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            dir=folder, prefix=f"{entry.file_name}.", suffix=".part", delete=False
        ) as file:
            part = Path(file.name)
    except OSError as error:
        raise DatasetError(f"{folder}: cannot be written: {error}. {_by_hand(entry, folder)}") from error
    try:
        actual = _receive(entry, part)
        expected = entry.sha256 or _recorded(target)
        if expected not in (None, actual):
            raise DatasetError(
                f"{entry.url}: expected sha256 {expected}, received {actual}: the file was altered on its way or"
                " replaced at its origin"
                + ("" if entry.sha256 else f"; remove {_record_path(target)} to trust the new one")
            )
        part.replace(target)
        if entry.sha256 is None:
            _record(target, actual)
    except (OSError, http.client.HTTPException) as error:  # URLError, HTTPError and time-outs are OSErrors
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise DatasetError(f"{entry.url}: cannot be downloaded: {reason}. {_by_hand(entry, folder)}") from error
    finally:
        part.unlink(missing_ok=True)
    return target


def _receive(entry: Entry, part: Path) -> str:
    """Write what the URL holds into a file, to the disk; return its sha256."""
    digest = hashlib.sha256()
    received = 0
    with urllib.request.urlopen(entry.url, timeout=TIMEOUT) as response, part.open("wb") as file:
        length = response.headers.get("Content-Length")
        announced = int(length) if length is not None and length.isdecimal() else None
        expected = announced if entry.size is None else entry.size
        with progress(expected, entry.file_name, "B") as bar:
            while chunk := response.read(CHUNK):
                file.write(chunk)
                digest.update(chunk)
                received += len(chunk)
                bar.update(len(chunk))
        file.flush()
        os.fsync(file.fileno())
    if expected not in (None, received):
        raise DatasetError(f"{entry.url}: expected {expected} bytes, received {received}: try again")
    return digest.hexdigest()


def _by_hand(entry: Entry, folder: Path) -> str:
    return (
        f"To do without a connection, fetch {entry.url} by hand and put it in {folder},"
        f" or in another folder that ${FOLDER_VARIABLE} names"
    )


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    size = path.stat().st_size
    with path.open("rb") as file, progress(size, f"verifying {path.name}", "B", shown=size > 1 << 30) as bar:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def _record_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _recorded(path: Path) -> str | None:
    """The checksum that was recorded when the file was first used, or None."""
    record = _record_path(path)
    if not record.is_file():
        return None
    first = (record.read_text(encoding="ascii", errors="replace").split() or [""])[0].lower()
    if len(first) != 64 or set(first) - set("0123456789abcdef"):
        raise DatasetError(
            f"{record}: expected a sha256 in hexadecimal, found {first!r}: remove it to record a new one"
        )
    return first


def _record(path: Path, checksum: str) -> None:
    """Record a checksum as `sha256sum --check` reads it."""
    _record_path(path).write_text(f"{checksum}  {path.name}\n", encoding="ascii")
