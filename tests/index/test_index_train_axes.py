"""Indexes of learnt axes: beside the oracle, beside theory, beside the untrained index, and with odd samples."""

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from index_oracle import check_top_k, distortion, parse, unit_rows
from trained_oracle import Trained, parse_trained

from tqsearch.errors import CorruptFileError, InvalidInputError
from tqsearch.index import AUTO_ROWS, TurboQuantIndex

METRICS = ["ip", "cosine", "l2"]
DIM = 40
GOLDEN = Path(__file__).parent / "golden"
SavedOf = Callable[[TurboQuantIndex], bytes]


def rows(n: int, seed: int = 0, dim: int = DIM, power: float = 1.0, offset: float = 1.0) -> np.ndarray:
    """Gaussian rows of variances 1 / i^power along random axes, which are the same for every seed, and a mean."""
    turn = np.linalg.qr(np.random.default_rng(99).standard_normal((dim, dim)))[0]
    spread = np.arange(1, dim + 1) ** (-power / 2)
    mean = offset * np.sin(np.arange(dim)) / np.sqrt(dim)
    return ((np.random.default_rng(seed).standard_normal((n, dim)) * spread) @ turn + mean).astype(np.float32)


def made(metric: Any, bits: float = 2, **more: Any) -> TurboQuantIndex:
    index = TurboQuantIndex(DIM, bits, metric, seed=7)
    index.train(rows(2000, 1), **more)
    assert index.learnt == "axes"
    index.add(rows(200))
    return index


def recall(index: TurboQuantIndex, base: np.ndarray, queries: np.ndarray, k: int = 10) -> float:
    """Of the true nearest by cosine or inner product that are found."""
    if index.metric == "cosine":
        base, queries = unit_rows(base.astype(float)), unit_rows(queries.astype(float))
    true = (queries @ base.T).argsort(axis=1)[:, -k:]
    if index.metric == "l2":
        true = ((queries[:, None] - base) ** 2).sum(2).argsort(axis=1)[:, :k]
    found = np.asarray(index.search(queries.astype(np.float32), k)[1])
    return float(np.mean([len(set(a) & set(b)) / k for a, b in zip(found.tolist(), true.tolist(), strict=True)]))


@pytest.mark.parametrize("metric", METRICS)
def test_results_equal_the_oracle(saved: SavedOf, metric: str) -> None:
    index = made(metric)
    content = parse_trained(saved(index))
    wanted = content.encode(rows(200))
    # A code may differ where a coordinate lies within float32 of a boundary; scales are float16.
    np.testing.assert_allclose(content.estimates, wanted, atol=2e-3 * np.abs(wanted).max())
    z = content.residuals(rows(200))
    if metric == "l2" or content.header["keeps_product"]:
        bias = -(z**2).sum(1) if metric == "l2" else z @ content.double("centre")
        np.testing.assert_allclose(content.double("bias") * content.unit, bias, rtol=2**-10, atol=1e-6)
    for k in (1, 10, 201):
        got: Any = index.search(rows(20, 2), k)
        check_top_k(got, *content.similarity(rows(20, 2)), content.ids, k, metric)
    chosen = np.arange(0, 200, 13)
    some, slack = (part[:, chosen] for part in content.similarity(rows(20, 2)))
    got = index.search(rows(20, 2), 20, allow=chosen)
    check_top_k(got, some, slack, chosen, 20, metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("bits", [1, 2, 2.5, 3])
def test_a_vector_costs_not_more_than_untrained(saved: SavedOf, metric: Any, bits: float) -> None:
    index = made(metric, bits)
    plain = TurboQuantIndex(DIM, bits, metric)
    content = parse_trained(saved(index))
    columns = sum(content.tensors[name].nbytes for name in ("packed", "scales", "bias") if name in content.tensors)
    assert columns == 200 * index.bytes_per_vector
    assert plain.bytes_per_vector - 2 < index.bytes_per_vector <= plain.bytes_per_vector
    assert index.nbytes == columns + content.tensors["axes"].nbytes + content.tensors["deviations"].nbytes
    assert f"expected distortion {index.plan.expected_distortion:.3g}" in str(index.plan)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_the_error_of_scores_is_what_theory_says(saved: SavedOf, bits: float) -> None:
    """Gaussian vectors and queries: the squared error of scores has the expectation of the oracle's formula.

    Queries are independent of the vectors, with unit variance in every direction. The mean over blocks of queries has a
    standard error that the blocks show; 3 % are for the law of a coordinate, once its vector's length is divided out.
    """
    index = TurboQuantIndex(DIM, bits, "ip", seed=7)
    index.train(rows(20000, 1))
    base = rows(500)
    index.add(base)
    content = parse_trained(saved(index))
    queries = np.random.default_rng(5).standard_normal((400, DIM)).astype(np.float32)
    scores, ids = (np.asarray(part) for part in index.search(queries, 500))
    exact = queries.astype(float) @ base.T.astype(float)
    errors = np.square(np.take_along_axis(scores, ids.argsort(1), 1) - exact).mean(axis=0)
    z = content.residuals(base)
    axes = content.double("axes")
    inside = np.square(z @ axes.T).mean(0)
    outside = (np.square(z).sum(1).mean() - inside.sum()) / max(DIM - len(axes), 1)
    variances = np.full(DIM, outside)
    variances[content.widths > 0] = inside
    moments = np.ones(DIM)
    if content.header["keeps_product"]:  # the queries are q - c
        moments = moments + np.square(content.double("centre")).sum() / DIM
    wanted = content.expected_error(variances, moments)
    assert abs(errors.mean() - wanted) < 5 * errors.std(ddof=1) / np.sqrt(len(errors)) + 0.03 * wanted


@pytest.mark.parametrize("metric", METRICS)
def test_recall_is_that_of_wider_codes(saved: SavedOf, metric: Any) -> None:
    """At 1 bit the expected error of scores is below the untrained index's at 2: so recall must be no lower.

    Both are means over 200 queries of 10 neighbours, each with a standard error below 0.5 / sqrt(200).
    """
    dim = 128
    base, queries = rows(2000, 0, dim, 2.0, 0.0), rows(200, 3, dim, 2.0, 0.0)
    index = TurboQuantIndex(dim, 1, metric, seed=1)
    index.train(rows(4000, 1, dim, 2.0, 0.0))
    index.add(base)
    content = parse_trained(saved(index))
    variances = content.double("deviations") ** 2
    variances[content.widths > 0] = np.square(content.residuals(base) @ content.double("axes").T).mean(0)
    wide = distortion(2, dim) / (1 - distortion(2, dim)) * variances.sum() ** 2 / dim
    assert content.expected_error(variances, variances) < wide  # queries are distributed as the vectors
    found = {}
    for bits in (1, 2):
        plain = TurboQuantIndex(dim, bits, metric, seed=1)
        plain.add(base)
        found[bits] = recall(plain, base, queries)
    trained = recall(index, base, queries)
    assert trained > found[2] - 2 * 0.5 / np.sqrt(200)
    assert trained > found[1] + 0.1


@pytest.mark.parametrize("metric", METRICS)
def test_parts_blocks_and_files(saved: SavedOf, tmp_path: Path, monkeypatch: Any, metric: Any) -> None:
    wanted = saved(made(metric))
    parts = TurboQuantIndex(DIM, 2, metric, seed=7)
    parts.train(rows(2000, 1))
    (tmp_path / "empty").write_bytes(saved(parts))
    for part in np.split(rows(200), [1, 2, 90, 190]):
        parts.add(part)
    assert saved(parts) == wanted
    monkeypatch.setattr("tqsearch.quantizer._BASIS_BLOCK", 37 * DIM)
    loaded = TurboQuantIndex.load(tmp_path / "empty")
    assert loaded.learnt == "axes"
    loaded.add(rows(200))
    assert saved(loaded) == wanted
    (tmp_path / "whole").write_bytes(wanted)
    again = TurboQuantIndex.load(tmp_path / "whole")
    for first, second in zip(again.search(rows(3, 2), 5), parts.search(rows(3, 2), 5), strict=True):
        np.testing.assert_array_equal(first, second)
    again.remove(range(200))
    again.train(rows(100, 3), learn="centre")
    again.add(rows(50))
    assert again.learnt == "centre"
    assert parse(saved(again)).plan == ((DIM, 2),)


def test_reconstruction_has_the_expected_distortion() -> None:
    index = TurboQuantIndex(DIM, 3, "l2", seed=7)
    index.train(rows(20000, 1))
    base = rows(3000, 4)
    index.add(base)
    assert index.centre is not None
    z, found = base - index.centre, np.asarray(index.reconstruct(np.arange(3000))) - index.centre
    shares = np.square(found - z).sum(1) / np.square(z).sum(1).mean()
    known = index.plan.expected_distortion
    assert known is not None
    # 5 % are for the trained variances, of 20,000 rows, and for the law once a vector's length is divided out.
    assert abs(shares.mean() - known) < 5 * shares.std(ddof=1) / np.sqrt(3000) + 0.05 * known


def test_queries_change_the_widths_and_lower_the_error_for_such_queries() -> None:
    """Queries lie along the last axes, where vectors vary least: their scores get better by what the widths say."""
    base = rows(1500, 4, power=0.6, offset=0.0)
    turn = np.linalg.qr(np.random.default_rng(99).standard_normal((DIM, DIM)))[0]
    spread = np.where(np.arange(DIM) < DIM - 8, 0.05, 1.0)
    asked = ((np.random.default_rng(6).standard_normal((600, DIM)) * spread) @ turn).astype(np.float32)
    errors = []
    for queries in (None, asked[:300]):
        index = TurboQuantIndex(DIM, 2, "ip", seed=7)
        index.train(rows(4000, 1, power=0.6, offset=0.0), queries)
        assert index.learnt == "axes"
        index.add(base)
        scores, ids = (np.asarray(part) for part in index.search(asked[300:], 1500))
        exact = asked[300:].astype(float) @ base.T.astype(float)
        errors.append(np.square(np.take_along_axis(scores, ids.argsort(1), 1) - exact).mean())
    assert errors[1] < 0.5 * errors[0]


# Odd samples


@pytest.mark.parametrize("metric", METRICS)
def test_constant_and_duplicate_columns(metric: Any) -> None:
    """They carry nothing: bits go to the rest, and later vectors that differ there are still searched by the rest."""
    data = rows(3000, 1)
    data[:, 5:15] = 2.0
    data[:, 15:20] = data[:, :5]
    index = TurboQuantIndex(DIM, 2, metric)
    index.train(data[:2000])
    index.add(data[2000:])
    plain = TurboQuantIndex(DIM, 2, metric)
    plain.add(data[2000:])
    assert recall(index, data[2000:], data[:100]) > recall(plain, data[2000:], data[:100])
    other = rows(10, 8) * 3
    index.add(other)
    scores, ids = (np.asarray(part) for part in index.search(other, 1010))
    assert np.isfinite(scores).all()
    assert (np.sort(ids, axis=1) == np.arange(1010)).all()


@pytest.mark.parametrize("n", [1, 2, 63, 64, 80, 500])
@pytest.mark.parametrize("power", [0.0, 2.0])
def test_small_samples_do_not_hurt(n: int, power: float) -> None:
    """From fewer rows than dimensions on: never a recall below the centre's alone by more than chance."""
    dim = 96
    base, queries = rows(2000, 4, dim, power), rows(200, 5, dim, power)
    found = []
    for learn in ("axes", "centre"):
        index = TurboQuantIndex(dim, 2, "l2")
        index.train(rows(n, 1, dim, power), learn=learn)  # type: ignore[arg-type]
        index.add(base)
        assert learn == "axes" or index.learnt == "centre"
        assert n >= 64 or index.learnt == "centre"
        found.append(recall(index, base, queries))
    assert found[0] > found[1] - 2 * 0.5 / np.sqrt(200)


def test_one_dimension() -> None:
    data = np.random.default_rng(0).standard_normal((500, 1)).astype(np.float32) + 3
    for metric in ("ip", "l2"):
        index = TurboQuantIndex(1, 1, metric)  # type: ignore[arg-type]
        index.train(data)
        index.add(data)
        assert recall(index, data, data[:50]) > 0.9
    index = TurboQuantIndex(1, 1, "cosine")
    index.train(data)
    assert index.learnt == "centre"  # unit vectors of one dimension are alike


def test_vectors_of_another_distribution() -> None:
    """After a shift to other axes and another mean the index still ranks, if worse than untrained."""
    turn = np.linalg.qr(np.random.default_rng(1).standard_normal((DIM, DIM)))[0].astype(np.float32)
    base, queries = rows(2000, 4) @ turn, rows(100, 5) @ turn
    index = TurboQuantIndex(DIM, 4, "l2")
    index.train(rows(4000, 1))
    index.add(base)
    one = TurboQuantIndex(DIM, 1, "l2")
    one.add(base)
    assert recall(index, base, queries) > recall(one, base, queries)


@pytest.mark.parametrize("metric", METRICS)
def test_vectors_on_the_centre_and_off_the_axes(metric: Any) -> None:
    index = made(metric, 1)
    assert index.centre is not None
    more = np.stack([index.centre, 0 * index.centre, -index.centre, index.centre + 100 * np.eye(DIM)[0]])
    index.add(more.astype(np.float32))
    scores, ids = (
        np.asarray(part) for part in index.search(np.concatenate([more, rows(3, 2)]).astype(np.float32), 204)
    )
    assert np.isfinite(scores).all()
    assert (np.sort(ids, axis=1) == np.arange(204)).all()


@pytest.mark.parametrize("scale", [1e-15, 1e12])
@pytest.mark.parametrize("metric", METRICS)
def test_the_unit_of_the_vectors_does_not_matter(metric: Any, scale: float) -> None:
    """A power of two near `scale`: the same neighbours, and scores by its square (its first power for none)."""
    factor = np.float32(2.0 ** np.round(np.log2(scale)))
    index = TurboQuantIndex(DIM, 2, metric, seed=7)
    index.train(rows(2000, 1) * factor)
    index.add(rows(200) * factor)
    wanted, got = made(metric).search(rows(9, 2), 10), index.search(rows(9, 2) * factor, 10)
    np.testing.assert_array_equal(got[1], wanted[1])
    by = 1.0 if metric == "cosine" else float(factor) ** 2
    np.testing.assert_allclose(np.asarray(got[0], np.float64) / by, np.asarray(wanted[0]), rtol=1e-4, atol=1e-4)


def test_vectors_far_longer_than_the_sample_are_refused(saved: SavedOf) -> None:
    for metric, factor in (("l2", 1e4), ("ip", 1e7)):
        index = TurboQuantIndex(DIM, 2, metric, seed=7)  # type: ignore[arg-type]
        index.train(rows(2000, 1))
        before = saved(index)
        long = rows(5)
        long[3] *= factor
        with pytest.raises(InvalidInputError, match=r"near the sample's.*; train on a sample .* in row 3"):
            index.add(long)
        assert saved(index) == before


# Automatic training


def test_auto_trains_on_the_first_large_addition(saved: SavedOf) -> None:
    base = rows(AUTO_ROWS)
    index = TurboQuantIndex(DIM, 2, "l2", train="auto")
    assert index.learnt == "nothing"
    index.add(base)
    assert index.learnt == "axes"
    wanted = TurboQuantIndex(DIM, 2, "l2")
    wanted.train(base)
    wanted.add(base)
    assert saved(index) == saved(wanted)
    small = TurboQuantIndex(DIM, 2, "l2", train="auto")
    small.add(base[: AUTO_ROWS - 1])
    small.add(base)
    assert small.learnt == "nothing"
    given = TurboQuantIndex(DIM, 2, "l2", train="auto")
    given.train(rows(300, 1), learn="centre")
    given.add(base)
    assert given.learnt == "centre"
    with pytest.raises(InvalidInputError, match="train must be 'off' or 'auto', got True"):
        TurboQuantIndex(DIM, 2, train=True)  # type: ignore[arg-type]


def test_bad_arguments_change_nothing(saved: SavedOf) -> None:
    index = TurboQuantIndex(DIM, 2, "l2")
    before = saved(index)
    for sample, more, says in (
        (rows(100), {"queries": rows(5)[:, :3]}, r"queries must have shape \(n, 40\)"),
        (rows(100), {"queries": rows(0)}, "queries must have at least one row"),
        (rows(100), {"learn": "all"}, "learn must be 'axes' or 'centre', got 'all'"),
        (rows(100) * np.nan, {}, "sample must be finite"),
    ):
        with pytest.raises(InvalidInputError, match=says):
            index.train(sample, **more)  # type: ignore[arg-type]
    assert saved(index) == before


# The file


def write_by_hand(path: Path, header: dict[str, Any], tensors: dict[str, np.ndarray], version: str = "2") -> None:
    """A file by the specification alone, with a right checksum."""
    text, data, container = json.dumps(header, sort_keys=True), b"", {}
    digest = hashlib.sha256(text.encode())
    for name, tensor in tensors.items():
        dtype = {"<i8": "I64", "<f4": "F32", "<f2": "F16", "|u1": "U8", "<f8": "F64"}[tensor.dtype.str]
        shape = list(tensor.shape)
        digest.update(f"{name} {dtype} {json.dumps(shape, separators=(',', ':'))}".encode() + tensor.tobytes())
        container[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + tensor.nbytes]}
        data += tensor.tobytes()
    metadata = {"format": "tqsearch-index", "version": version, "header": text, "sha256": digest.hexdigest()}
    whole = json.dumps({"__metadata__": metadata, **container}, separators=(",", ":")).encode()
    whole += b" " * (-len(whole) % 8)
    path.write_bytes(struct.pack("<Q", len(whole)) + whole + data)


def test_a_file_written_by_hand_is_the_index(tmp_path: Path) -> None:
    content = parse_trained((GOLDEN / "axes-l2.tqindex").read_bytes())
    write_by_hand(tmp_path / "by hand", content.header, content.tensors)
    TurboQuantIndex.load(tmp_path / "by hand").save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (GOLDEN / "axes-l2.tqindex").read_bytes()


FORGED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "version 1": ({}, {}, "1"),
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


@pytest.mark.parametrize("case", FORGED)
def test_forged_files_are_refused(tmp_path: Path, case: str) -> None:
    content = parse_trained((GOLDEN / "axes-l2.tqindex").read_bytes())
    header, changes, version = FORGED[case]
    tensors = dict(content.tensors)
    for name, change in changes.items():
        tensor = tensors.pop(name)
        if change is not None:
            changed = {"shorter": tensor[:-1], "zero": 0 * tensor}.get(change) if isinstance(change, str) else None
            tensors[name] = tensor.astype(change) if changed is None else changed
    order = [name for name in content.tensors if name in tensors]
    forged = {key: value for key, value in {**content.header, **header}.items() if value is not None}
    write_by_hand(tmp_path / "forged", forged, {name: tensors[name] for name in order}, version)
    with pytest.raises(CorruptFileError, match="forged"):
        TurboQuantIndex.load(tmp_path / "forged")


@pytest.mark.parametrize("name", ["axes-l2", "axes-cosine"])
def test_golden_files_load_for_ever(tmp_path: Path, name: str) -> None:
    """Their axes came from a library's eigenvectors, so they are not made again; what is added to them is."""
    path = GOLDEN / f"{name}.tqindex"
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
    for column in ("packed", "scales"):
        np.testing.assert_array_equal(added.tensors[column], content.tensors[column])
