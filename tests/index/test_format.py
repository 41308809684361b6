"""The file by its specification: golden bytes, a parser and a writer of the test's own, and what is left by a crash."""

import os
import stat
import sys
import threading
from pathlib import Path
from typing import Any

import golden_recipes
import numpy as np
import pytest
import torch
from container import put_together
from index_oracle import check_top_k, estimate, mean_distortion, parse

from tqsearch import format as file_format
from tqsearch import tensor_file
from tqsearch.errors import CorruptFileError, NewerFormatError
from tqsearch.index import TurboQuantIndex

ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
ON_POSIX = pytest.mark.skipif(os.name != "posix", reason="modes of files")


def rows(n: int, dim: int = 12, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)


def made(n: int = 30, metric: Any = "l2", *, plain: bool = False) -> TurboQuantIndex:
    index = TurboQuantIndex(12, 2.5, metric, seed=3)
    index.add(rows(n), ids=None if plain else np.arange(n)[::-1] * 3)
    return index


class TestGolden:
    @pytest.mark.parametrize("name", golden_recipes.NAMES)
    def test_loads_for_ever(self, tmp_path: Path, name: str) -> None:
        """The frozen bytes mean what the specification says, and the index says the same."""
        path = golden_recipes.FOLDER / f"{name}.tqindex"
        content = parse(path.read_bytes())
        index = TurboQuantIndex.load(path)
        assert (index.dim, index.metric, index.seed) == tuple(content.header[key] for key in ("dim", "metric", "seed"))
        assert index.plan.pairs() == list(content.plan)
        assert index.ids.tolist() == sorted(content.ids.tolist())
        queries = golden_recipes.vectors(9, index.dim)[5:]
        for k in (1, 7):
            got: Any = index.search(queries, k)
            check_top_k(got, *content.similarity(queries), content.ids, k, index.metric)
        shrunk = content.estimates * (1 - mean_distortion(content.plan)) + content.tensors.get("centre", 0)
        np.testing.assert_allclose(index.reconstruct(content.ids), shrunk, atol=1e-6 * np.abs(shrunk).max(initial=0))
        index.save(tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == path.read_bytes()
        index.add(rows(1, index.dim))
        assert index.ids.max() == content.header["next_id"]

    @pytest.mark.parametrize("name", golden_recipes.NAMES)
    def test_is_written_for_ever(self, tmp_path: Path, name: str) -> None:
        """The same vectors make these bytes, on every machine and in every version."""
        golden_recipes.make(name).save(tmp_path / "index")
        assert (tmp_path / "index").read_bytes() == (golden_recipes.FOLDER / f"{name}.tqindex").read_bytes()

    def test_holds_its_vectors(self) -> None:
        """Against an encoder of the oracle's: the golden files are not garbage that is frozen."""
        content = parse((golden_recipes.FOLDER / "l2-fraction-own-ids.tqindex").read_bytes())
        vectors = dict(zip([40, 7, 2**40, 0, 11, 5], golden_recipes.vectors(6, 12), strict=True))
        wanted = estimate(np.stack([vectors[id] for id in content.ids.tolist()]), content.plan, 3, "l2")
        np.testing.assert_allclose(content.estimates, wanted, atol=1e-5 * np.abs(wanted).max())
        assert sorted(content.ids.tolist()) == [0, 5, 11, 40, 2**40]
        assert content.header["next_id"] == 2**40 + 1


class TestSpecification:
    @pytest.mark.parametrize("metric", ["ip", "cosine", "l2"])
    @pytest.mark.parametrize("plain", [True, False])
    @pytest.mark.parametrize("n", [0, 1, 30])
    def test_a_file_written_by_hand_is_the_index(self, tmp_path: Path, metric: str, plain: bool, n: int) -> None:
        """Taken apart and put together again outside the package, with other white space in the JSON."""
        index = made(n, metric, plain=plain)
        index.save(tmp_path / "index")
        content = parse((tmp_path / "index").read_bytes())
        (tmp_path / "by hand").write_bytes(put_together(content.header, content.tensors, "1"))
        assert (tmp_path / "by hand").read_bytes() != (tmp_path / "index").read_bytes()
        loaded = TurboQuantIndex.load(tmp_path / "by hand")
        loaded.save(tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == (tmp_path / "index").read_bytes()

    def test_segments_and_chunks_do_not_show(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        whole, parts = made(0), made(0)
        ids = np.arange(60)[::-1]
        whole.add(rows(60), ids=ids)
        for part in np.split(np.arange(60), [40, 50, 55, 57]):
            parts.add(rows(60)[part], ids=ids[part])
        whole.save(tmp_path / "whole")
        assert len(parts._contents.rows.segments) > 1
        for chunk in (1, 37, 200):
            monkeypatch.setattr(tensor_file, "CHUNK", chunk)
            parts.save(tmp_path / "parts")
            assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()
            assert len(TurboQuantIndex.load(tmp_path / "parts")) == 60

    @pytest.mark.parametrize("name", golden_recipes.NAMES)
    def test_header_alone(self, name: str) -> None:
        path = golden_recipes.FOLDER / f"{name}.tqindex"
        header, wanted = file_format.read_header(path), parse(path.read_bytes()).header
        found = {key: getattr(header, key) for key in wanted}
        assert {**found, "plan": [list(pair) for pair in header.plan]} == wanted

    def test_every_rotation_is_kept(self, tmp_path: Path) -> None:
        for rotation in ("hadamard", "dense", "identity"):
            index = TurboQuantIndex(12, 4, "ip", rotation=rotation, seed=9)
            index.add(rows(20))
            index.save(tmp_path / rotation)
            loaded = TurboQuantIndex.load(str(tmp_path / rotation))
            np.testing.assert_array_equal(loaded.search(rows(3, 12, 1), 5)[0], index.search(rows(3, 12, 1), 5)[0])
            assert parse((tmp_path / rotation).read_bytes()).header["rotation"] == rotation


def changed(values: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {key: value for key, value in {**values, **changes}.items() if value is not None}


FORGED_HEADERS: dict[str, dict[str, Any]] = {
    "metric unknown": {"metric": "dot"},
    "metric of another dtype": {"metric": "cosine"},
    "metric of other tensors": {"metric": "ip"},
    "rotation": {"rotation": "pca"},
    "dim is text": {"dim": "12"},
    "dim is a fraction": {"dim": 12.0},
    "dim is another": {"dim": 13},
    "dim and plan too large": {"dim": 9000, "plan": [[9000, 0]], "count": 0},
    "count is another": {"count": 29},
    "count is negative": {"count": -1},
    "count is true": {"count": True},
    "plan is empty": {"plan": []},
    "plan has another length": {"plan": [[12, 4]]},
    "plan has no widths": {"plan": [[12]]},
    "plan is not a list": {"plan": 5},
    "plan has a width of 9": {"plan": [[12, 9]]},
    "seed is none": {"seed": "0"},
    "next id too small": {"next_id": 87},
    "an entry lacks": {"seed": None},
    "an entry more": {"more": 1},
}


class TestForged:
    """Files with the right checksum that no writer of ours makes: refused, not half understood."""

    def refused(self, tmp_path: Path, content: bytes, error: Any = CorruptFileError, says: str = "forged") -> None:
        (tmp_path / "forged").write_bytes(content)
        with pytest.raises(error, match=says):
            TurboQuantIndex.load(tmp_path / "forged")

    @pytest.fixture
    def good(self, tmp_path: Path) -> Any:
        made().save(tmp_path / "index")
        return parse((tmp_path / "index").read_bytes())

    @pytest.mark.parametrize("case", FORGED_HEADERS)
    def test_headers(self, tmp_path: Path, good: Any, case: str) -> None:
        assert good.header["next_id"] == 88
        header = changed(good.header, **FORGED_HEADERS[case])
        tensors = {} if header.get("count") == 0 else good.tensors
        self.refused(tmp_path, put_together(header, tensors, "1"))

    def test_header_is_no_object(self, tmp_path: Path) -> None:
        for header in ([], 3, "x", None):
            self.refused(tmp_path, put_together(header, {}, "1"))  # type: ignore[arg-type]

    def test_tensors(self, tmp_path: Path, good: Any) -> None:
        t = good.tensors
        twice, negative = t["ids"].copy(), t["ids"].copy()
        twice[4], negative[4] = twice[5], -1
        changes: list[dict[str, Any]] = [
            {"ids": twice},
            {"ids": negative},
            {"ids": t["ids"].astype("<i4")},
            {"ids": t["ids"][:-1]},
            {"scales": None},
            {"packed": None},
            {"bias": None},
            {"scales": t["scales"].astype("<f2")},
            {"bias": t["bias"].astype("<f8")},
            {"packed": t["packed"][:, :-1].copy()},
            {"packed": t["packed"].reshape(-1)},
            {"more": t["scales"]},
            {"ids": None, "centre": t["scales"]},
            {"ids": None, "bias": None, "centre": np.zeros(12, "<f4"), "scales": None, "packed": None},
        ]
        for change in changes:
            self.refused(tmp_path, put_together(good.header, changed(t, **change), "1"))
        (tmp_path / "good").write_bytes(put_together(good.header, t, "1"))
        assert len(TurboQuantIndex.load(tmp_path / "good")) == 30

    @pytest.mark.parametrize("version", ["5", "10", "999999999"])
    def test_newer_version(self, tmp_path: Path, good: Any, version: str) -> None:
        """Of a later version nothing is understood, not even whether its header is well formed."""
        for header in (good.header, {"new": "header"}):
            content = put_together(header, good.tensors, version)
            self.refused(tmp_path, content, NewerFormatError, f"version {version}, .* up to 4; upgrade tqsearch")

    @pytest.mark.parametrize("version", ["", "0", "-1", "1.0", "x", " 1", "²", "9" * 5000])
    def test_no_version(self, tmp_path: Path, good: Any, version: str) -> None:
        self.refused(tmp_path, put_together(good.header, good.tensors, version), CorruptFileError, "version")

    def test_a_wrong_backend_is_the_callers_fault(self) -> None:
        with pytest.raises(ValueError, match="backend must be one of"):
            TurboQuantIndex.load(golden_recipes.FOLDER / "empty.tqindex", backend="fast")


class TestWriting:
    def test_a_crash_leaves_the_old_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "index"
        made(20).save(path)
        before = path.read_bytes()

        def fail(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        for name in ("fsync", "replace", "chmod"):
            with monkeypatch.context() as patch:
                patch.setattr(os, name, fail)
                with pytest.raises(OSError, match="No space left"):
                    made(40).save(path)
            assert path.read_bytes() == before
            assert os.listdir(tmp_path) == ["index"], "a temporary file is left behind"
        made(40).save(path)
        assert parse(path.read_bytes()).header["count"] == 40

    @pytest.mark.parametrize("exists", [True, False])
    def test_an_error_half_way_leaves_the_old_file(self, tmp_path: Path, exists: bool) -> None:
        """The second segment's codes cannot be read: half of the file has been written by then."""
        path, index = tmp_path / "index", made(40)
        if exists:
            made(20).save(path)
        before = path.read_bytes() if exists else None
        ((_, columns),) = index._contents.rows.runs()
        broken = {**columns, "packed": columns["packed"].to("meta")}
        header = file_format.Header(12, "l2", index.plan.pairs(), "hadamard", 3, 80, 500)
        with pytest.raises(NotImplementedError):
            file_format.write(path, header, [columns, broken])
        assert os.listdir(tmp_path) == (["index"] if exists else [])
        assert not exists or path.read_bytes() == before

    def test_synced_before_and_after_the_rename(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The data are on the disk before the name points to them, and then the name is."""
        done: list[str] = []
        fsync, replace = os.fsync, os.replace

        def noted_fsync(handle: int) -> None:
            done.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
            fsync(handle)

        def noted_replace(source: Any, target: Any) -> None:
            done.append("rename")
            assert parse(Path(source).read_bytes()).header["count"] == 30  # nothing is left in a buffer
            replace(source, target)

        monkeypatch.setattr(os, "fsync", noted_fsync)
        monkeypatch.setattr(os, "replace", noted_replace)
        made().save(tmp_path / "index")
        assert done == (["file", "rename", "folder"] if os.name == "posix" else ["file", "rename"])

    @ON_POSIX
    def test_permissions(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A new file's are those of any new file, a replaced file keeps its own; the umask is never touched."""
        (tmp_path / "any").touch()
        usual = (tmp_path / "any").stat().st_mode
        path, index = tmp_path / "index", made()

        def forbidden(_: int) -> int:
            raise AssertionError("the umask belongs to all threads")

        monkeypatch.setattr(os, "umask", forbidden)
        index.save(path)
        assert path.stat().st_mode == usual
        for mode in (0o600, 0o640, 0o666, 0o444):
            path.chmod(mode)
            index.save(path)
            assert path.stat().st_mode & 0o777 == mode

    def test_where_it_cannot_be_written(self, tmp_path: Path) -> None:
        missing = tmp_path / "missing"
        with pytest.raises(FileNotFoundError, match=f"no such folder to save to; make it first: '{missing}'"):
            made().save(missing / "index")
        (tmp_path / "folder").mkdir()
        with pytest.raises(IsADirectoryError, match=r"it can be saved to a file, and this is a folder: '.*/folder'"):
            made().save(tmp_path / "folder")
        assert os.listdir(tmp_path) == ["folder"]

    @ON_POSIX
    def test_a_device_is_not_replaced(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(OSError, match=r"saved to a regular file, and this is none: '.*/pipe'"):
            made().save(tmp_path / "pipe")
        assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
        assert os.listdir(tmp_path) == ["pipe"]

    @ON_POSIX
    def test_a_link_stays_a_link(self, tmp_path: Path) -> None:
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "real" / "index")
        for count in (10, 20):
            made(count).save(tmp_path / "link")
            assert (tmp_path / "link").is_symlink()
            assert parse((tmp_path / "real" / "index").read_bytes()).header["count"] == count

    def test_a_name_as_long_as_the_system_allows(self, tmp_path: Path) -> None:
        made(10).save(tmp_path / ("x" * 250))
        assert os.listdir(tmp_path) == ["x" * 250]

    def test_a_full_disk_leaves_the_old_file(self, tmp_path: Path, files_up_to: Any) -> None:
        """The system itself refuses more bytes: at the head, among the codes, and one byte before the end."""
        path, index = tmp_path / "index", made(4000)
        made(20).save(path)
        before = path.read_bytes()
        index.save(tmp_path / "whole")
        size = (tmp_path / "whole").stat().st_size
        (tmp_path / "whole").unlink()
        for limit in (10, size // 2, size - 1):
            with files_up_to(limit), pytest.raises(OSError, match="File too large"):
                index.save(path)
            assert path.read_bytes() == before
            assert os.listdir(tmp_path) == ["index"]
        index.save(path)
        assert path.stat().st_size == size

    def test_two_at_once(self, tmp_path: Path) -> None:
        """Each writes a file of its own; the last rename wins."""
        sizes = [10, 20, 30, 40]
        threads = [threading.Thread(target=made(n).save, args=(tmp_path / "index",)) for n in sizes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert parse((tmp_path / "index").read_bytes()).header["count"] in sizes
        assert os.listdir(tmp_path) == ["index"]


class TestMapped:
    @ON_LINUX
    def test_load_maps_the_file(self, tmp_path: Path) -> None:
        """Every column lies inside a mapping of the file: nothing was read into memory of its own."""
        index = made(3000)
        index.save(tmp_path / "index")
        loaded = TurboQuantIndex.load(tmp_path / "index")
        maps = Path("/proc/self/maps").read_text().splitlines()
        ranges = [line.split()[0].split("-") for line in maps if line.endswith(str(tmp_path / "index"))]
        for segment in loaded._contents.rows.segments:
            for name, column in segment.columns.items():
                address = column.data_ptr()
                assert any(int(low, 16) <= address < int(high, 16) for low, high in ranges), name
        assert not any(int(low, 16) <= torch.zeros(1).data_ptr() < int(high, 16) for low, high in ranges)

    def test_changes_do_not_reach_the_file(self, tmp_path: Path) -> None:
        path = tmp_path / "index"
        made(200).save(path)
        before = path.read_bytes()
        loaded = TurboQuantIndex.load(path)
        loaded.remove(np.arange(0, 300, 3))
        loaded.add(rows(50, 12, 1), ids=np.arange(50) * 3)
        assert path.read_bytes() == before
        assert len(loaded) == 150
        np.testing.assert_array_equal(np.sort(loaded.ids), np.concatenate([np.arange(50), np.arange(100, 200)]) * 3)

    def test_saving_over_the_mapped_file(self, tmp_path: Path) -> None:
        path, query = tmp_path / "index", rows(3, 12, 5)
        made(200).save(path)
        loaded, still = TurboQuantIndex.load(path), TurboQuantIndex.load(path)
        wanted = still.search(query, 10)
        loaded.remove([0, 3, 300])
        loaded.save(path)
        assert parse(path.read_bytes()).header["count"] == 197
        np.testing.assert_array_equal(still.search(query, 10)[0], wanted[0])  # of the old file, which it still maps
        again = TurboQuantIndex.load(path)
        np.testing.assert_array_equal(again.search(query, 10)[1], loaded.search(query, 10)[1])
        made(5).save(path)
        np.testing.assert_array_equal(again.search(query, 10)[1], loaded.search(query, 10)[1])
