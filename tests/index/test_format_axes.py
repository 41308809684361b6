"""The file of an index of learnt axes: by hand, forged, and frozen."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from container import put_together
from golden_recipes import FOLDER
from index_oracle import check_top_k
from learnt_rows import made, rows
from trained_oracle import Trained, parse_trained

from tqsearch.errors import CorruptFileError
from tqsearch.index import TurboQuantIndex


def test_a_file_written_by_hand_is_the_index(tmp_path: Path) -> None:
    content = parse_trained((FOLDER / "axes-l2.tqindex").read_bytes())
    (tmp_path / "by hand").write_bytes(put_together(content.header, content.tensors, "2"))
    TurboQuantIndex.load(tmp_path / "by hand").save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (FOLDER / "axes-l2.tqindex").read_bytes()


def test_levels_of_version_2_stay_optimal(tmp_path: Path) -> None:
    """A file of wide bands without the entry means other scores, and is written as it was read."""
    made("l2", 3).save(tmp_path / "new")
    new = parse_trained((tmp_path / "new").read_bytes())
    assert any(width > 4 for _, width in new.plan)
    header = {name: entry for name, entry in new.header.items() if name not in ("levels", "slopes")}
    tensors = {name: tensor for name, tensor in new.tensors.items() if name != "slopes"}
    (tmp_path / "old").write_bytes(put_together(header, tensors, "2"))
    old = parse_trained((tmp_path / "old").read_bytes())
    index, queries = TurboQuantIndex.load(tmp_path / "old"), rows(9, 2)
    got: Any = index.search(queries, 7)
    check_top_k(got, *old.similarity(queries), old.ids, 7, index.metric)
    scores, slack = old.similarity(queries)
    assert np.abs(scores - new.similarity(queries)[0]).max() > 100 * slack.max()
    index.save(tmp_path / "again")
    again = parse_trained((tmp_path / "again").read_bytes())
    assert again.header == old.header
    np.testing.assert_array_equal(again.tensors["packed"], old.tensors["packed"])


FORGED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "version 1": ({}, {}, "1"),
    "version 4 without levels": ({}, {}, "4"),
    "levels of version 2": ({"levels": "even"}, {}, "2"),
    "unknown levels": ({"levels": "odd"}, {}, "4"),
    "no learnt plan": ({"learnt_plan": None}, {}, "2"),
    "nothing of version 2": ({"learnt_plan": None, "keeps_product": None}, {}, "2"),
    "keeps_product is a number": ({"keeps_product": 1}, {}, "2"),
    "a wrong bias": ({"keeps_product": True, "metric": "ip"}, {"bias": None}, "2"),
    "a plan of other bytes": ({"learnt_plan": [[8, 3], [8, 2]]}, {}, "2"),
    "a plan of other axes": ({"learnt_plan": [[8, 6], [8, 0]]}, {}, "2"),
    "a plan of another dim": ({"learnt_plan": [[8, 4], [8, 2], [8, 0]]}, {}, "2"),
    "no axes": ({}, {"axes": None}, "2"),
    "no centre": ({}, {"centre": None}, "2"),
    "axes of another dtype": ({}, {"axes": np.float64}, "2"),
    "an axis less": ({}, {"axes": "shorter"}, "2"),
    "deviations of zero": ({}, {"deviations": "zero"}, "2"),
    "scales of version 1": ({}, {"scales": np.float32}, "2"),
}


SLOPING: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "version 2 with slopes": ({"levels": None}, {}, "2"),
    "slopes are not true": ({"slopes": False}, {}, "4"),
    "slopes without the entry": ({"slopes": None}, {}, "4"),
    "the entry without slopes": ({}, {"slopes": None}, "4"),
    "slopes above 1": ({}, {"slopes": "above"}, "4"),
    "slopes that are no numbers": ({}, {"slopes": "nan"}, "4"),
    "slopes of another dtype": ({}, {"slopes": np.float64}, "4"),
    "a slope less": ({}, {"slopes": "shorter"}, "4"),
    "slopes without axes": ({"learnt_plan": None, "keeps_product": None, "levels": None}, {}, "4"),
}


@pytest.mark.parametrize("case", SLOPING)
def test_forged_slopes_are_refused(tmp_path: Path, case: str) -> None:
    forge(tmp_path / "forged", "slopes-l2", *SLOPING[case])
    with pytest.raises(CorruptFileError, match="forged"):
        TurboQuantIndex.load(tmp_path / "forged")


@pytest.mark.parametrize("case", FORGED)
def test_forged_files_are_refused(tmp_path: Path, case: str) -> None:
    forge(tmp_path / "forged", "axes-l2", *FORGED[case])
    with pytest.raises(CorruptFileError, match="forged"):
        TurboQuantIndex.load(tmp_path / "forged")


def forge(path: Path, name: str, header: dict[str, Any], changes: dict[str, Any], version: str) -> None:
    """Writes a golden file with entries and tensors changed; None takes them away."""
    content = parse_trained((FOLDER / f"{name}.tqindex").read_bytes())
    tensors = dict(content.tensors)
    for key, change in changes.items():
        tensor = tensors.pop(key)
        if change is not None:
            named = {"shorter": tensor[:-1], "zero": 0 * tensor, "above": 0 * tensor + 2, "nan": np.nan * tensor}
            tensors[key] = named[change] if isinstance(change, str) else tensor.astype(change)
    order = [key for key in content.tensors if key in tensors]
    forged = {key: value for key, value in {**content.header, **header}.items() if value is not None}
    path.write_bytes(put_together(forged, {key: tensors[key] for key in order}, version))


@pytest.mark.parametrize("name", ["axes-l2", "axes-cosine", "slopes-l2", "slopes-cosine"])
def test_golden_files_load_for_ever(tmp_path: Path, name: str) -> None:
    """Their axes came from a library's eigenvectors, so they are not made again; what is added to them is."""
    path = FOLDER / f"{name}.tqindex"
    content: Trained = parse_trained(path.read_bytes())
    index = TurboQuantIndex.load(path)
    assert index.learnt == "axes"
    assert index.plan.pairs() == [tuple(pair) for pair in content.header["learnt_plan"]]
    queries = rows(9, 2, 16)
    for k in (1, 7):
        got: Any = index.search(queries, k)
        check_top_k(got, *content.similarity(queries), content.ids, k, index.metric)
    index.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()
    index.remove(content.ids.tolist())
    i, j = np.mgrid[:20, :16]
    index.add(((i * i * 37 + j * 101 + i * j * 13) % 61 - 30).astype(np.float32) / 8)
    index.save(tmp_path / "again")
    added = parse_trained((tmp_path / "again").read_bytes())
    for column in {"packed", "scales", "bias"} & content.tensors.keys():
        np.testing.assert_array_equal(added.tensors[column], content.tensors[column])
