"""What users give: every dtype and layout that is legal, and errors that name what is wrong and change nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from index_oracle import Parsed, estimate

from tqsearch.errors import BackendError, DuplicateIdError, InvalidInputError, UnknownIdError
from tqsearch.index import TurboQuantIndex
from tqsearch.splitmix import permutation

METRICS = ["ip", "cosine", "l2"]
DIM = 16
SavedOf = Callable[[TurboQuantIndex], bytes]
ParsedOf = Callable[[TurboQuantIndex], Parsed]


def whole_numbers(n: int, seed: int = 0) -> np.ndarray:
    """Vectors that every dtype holds exactly."""
    return np.random.default_rng(seed).integers(1, 100, (n, DIM)).astype(np.float32)


def read_only(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.setflags(write=False)
    return array


NUMPY_DTYPES = ["f2", "f4", "f8", ">f4", ">f8", "longdouble", "i1", "i8", "u1", "u8", ">i2"]
LAYOUTS: dict[str, Callable[[np.ndarray], Any]] = {
    **{name: lambda x, name=name: x.astype(name) for name in NUMPY_DTYPES},  # type: ignore[misc]
    **{
        str(dtype): lambda x, dtype=dtype: torch.from_numpy(x).to(dtype)  # type: ignore[misc]
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.uint8)
    },
    "fortran": np.asfortranarray,
    "every second column": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "every third row": lambda x: np.repeat(x, 3, axis=0)[::3],
    "backwards": lambda x: x[::-1, ::-1].copy()[::-1, ::-1],
    "read-only": read_only,
    "torch transposed": lambda x: torch.from_numpy(x.T.copy()).t(),
    "torch with gradient": lambda x: torch.from_numpy(x).requires_grad_(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtypes_and_layouts(saved: SavedOf, layout: str) -> None:
    """The same numbers make the same index and the same results, however they are laid out."""
    made = {name: TurboQuantIndex(DIM, 4, "l2") for name in ("plain", layout)}
    for name, index in made.items():
        index.add(LAYOUTS.get(name, np.asarray)(whole_numbers(30)))
    assert saved(made["plain"]) == saved(made[layout])
    query = LAYOUTS[layout](whole_numbers(5, 1))
    wanted, got = made["plain"].search(whole_numbers(5, 1), 3), made[layout].search(query, 3)
    for a, b in zip(wanted, got, strict=True):
        assert isinstance(b, torch.Tensor if isinstance(query, torch.Tensor) else np.ndarray)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    one = made[layout].search(query[0], 3)
    np.testing.assert_array_equal(np.asarray(one[1]), np.asarray(wanted[1])[0])


def spoiled(value: float, row: int, dtype: Any = np.float32) -> np.ndarray:
    vectors = whole_numbers(9).astype(dtype)
    vectors[row, 3] = value
    vectors[8, 0] = value
    return vectors


# What is given to `add`, which error, and what its message says.
BAD_VECTORS: dict[str, tuple[Any, str]] = {
    "narrow": (np.zeros((10, DIM - 1)), r"vectors must have shape \(n, 16\), got \(10, 15\)"),
    "wide": (np.zeros((10, DIM + 1)), r"vectors must have shape \(n, 16\), got \(10, 17\)"),
    "one vector": (np.zeros(DIM), r"vectors must have shape \(n, 16\), got \(16,\)"),
    "three axes": (torch.zeros(2, 2, DIM), r"vectors must have shape \(n, 16\), got \(2, 2, 16\)"),
    "scalar": (np.array(1.0), r"vectors must have shape \(n, 16\), got \(\)"),
    "nan": (spoiled(np.nan, 5), "row 5; 2 such rows of 9"),
    "infinity": (spoiled(np.inf, 2), "row 2; 2 such rows of 9"),
    "minus infinity": (spoiled(-np.inf, 0), "row 0; 2 such rows of 9"),
    "both infinities": (np.where(np.eye(9, DIM, 2) > 0, -np.inf, spoiled(np.inf, 1)), "row 0; 9 such rows of 9"),
    "float16 infinity": (spoiled(np.inf, 2, np.float16), "row 2; 2 such rows of 9"),
    "float64 beyond float32": (spoiled(1e39, 4, np.float64), "row 4; 2 such rows of 9"),
    "torch nan": (torch.from_numpy(spoiled(np.nan, 7)).bfloat16(), "row 7; 2 such rows of 9"),
    "text": (np.full((2, DIM), "a"), "vectors must be real numbers, got dtype <U1"),
    "objects": (np.full((2, DIM), None), "vectors must be real numbers, got dtype object"),
    "bool": (np.ones((2, DIM), bool), "vectors must be real numbers, got dtype bool"),
    "torch bool": (torch.ones((2, DIM), dtype=torch.bool), r"vectors must be real numbers, got dtype torch\.bool"),
    "complex": (np.ones((2, DIM), complex), "vectors must be real numbers, got dtype complex128"),
    "torch complex": (torch.ones((2, DIM), dtype=torch.complex64), "vectors must be real numbers, got dtype torch"),
    "dates": (np.zeros((2, DIM), "datetime64[s]"), "vectors must be real numbers, got dtype datetime64"),
    "sparse": (torch.eye(DIM).to_sparse(), r"vectors must be a dense tensor with values, got torch\.sparse_coo"),
    "meta": (torch.empty(2, DIM, device="meta"), "vectors must be a dense tensor with values, got a meta tensor"),
    "masked": (np.ma.masked_less(whole_numbers(9), 5), "vectors must be a plain array, got a masked one"),
    "list": ([[0.0] * DIM], "vectors must be a numpy array or a torch tensor, got list"),
    "none": (None, "vectors must be a numpy array or a torch tensor, got NoneType"),
}

BAD_IDS: dict[str, tuple[Any, type[Exception], str]] = {
    "too few": ([100, 101], InvalidInputError, "one entry a vector, 3, got 2"),
    "too many": ([100, 101, 102, 103], InvalidInputError, "one entry a vector, 3, got 4"),
    "none at all": ([], InvalidInputError, "one entry a vector, 3, got 0"),
    "two axes": ([[100], [101], [102]], InvalidInputError, r"1-d array of integers, got shape \(3, 1\)"),
    "scalar": (100, InvalidInputError, r"1-d array of integers, got shape \(\)"),
    "floats": ([100.0, 101.0, 102.0], InvalidInputError, "integers, got dtype float64"),
    "bools": ([True, False, True], InvalidInputError, "integers, got dtype bool"),
    "text": (["a", "b", "c"], InvalidInputError, "integers, got dtype <U1"),
    "negative": ([100, -7, 102], InvalidInputError, "at least 0, got -7"),
    "missing": ([100, 101, -1], InvalidInputError, "at least 0, got -1"),
    "too large": (np.array([100, 2**63, 102], np.uint64), InvalidInputError, "fit in int64, got 9223372036854775808"),
    "far too large": ([100, 2**70, 102], InvalidInputError, f"fit in int64, got {2**70}"),
    "ragged": ([[100], [101, 102], [103]], InvalidInputError, "1-d array of integers, got rows of several lengths"),
    "a set": ({100, 101, 102}, InvalidInputError, r"1-d array of integers, got shape \(\)"),
    "twice": ([100, 101, 100], DuplicateIdError, "distinct, got 100 more than once"),
    "in the index": ([100, 5, 102], DuplicateIdError, "new, got 5, which is in the index"),
}


class TestNothingChanges:
    @pytest.fixture(params=["plain", "own ids"])
    def index(self, request: pytest.FixtureRequest) -> TurboQuantIndex:
        index = TurboQuantIndex(DIM, 4, "l2")
        index.add(whole_numbers(20), ids=None if request.param == "plain" else np.arange(20)[::-1])
        return index

    def unchanged(
        self, index: TurboQuantIndex, saved: SavedOf, change: Callable[[], object], error: Any, says: str
    ) -> None:
        before = saved(index), index.nbytes, index.ids.tolist()
        with pytest.raises(error, match=says):
            change()
        assert (saved(index), index.nbytes, index.ids.tolist()) == before
        index.add(whole_numbers(1))
        assert index.ids.tolist() == list(range(21))

    @pytest.mark.parametrize("case", BAD_VECTORS)
    def test_bad_vectors(self, index: TurboQuantIndex, saved: SavedOf, case: str) -> None:
        vectors, says = BAD_VECTORS[case]
        self.unchanged(index, saved, lambda: index.add(vectors), InvalidInputError, says)

    @pytest.mark.parametrize("case", BAD_IDS)
    def test_bad_ids(self, index: TurboQuantIndex, saved: SavedOf, case: str) -> None:
        ids, error, says = BAD_IDS[case]
        self.unchanged(index, saved, lambda: index.add(whole_numbers(3), ids=ids), error, "^ids must .*" + says)

    @pytest.mark.parametrize(
        ("ids", "error", "says"),
        [
            ([3, 20], UnknownIdError, r"got 20, which is not \(1 such ids\)"),
            ([-1], UnknownIdError, "got -1, which is not"),
            ([99, 3, 98], UnknownIdError, r"got 99, which is not \(2 such ids\)"),
            ([3, 4, 3], DuplicateIdError, "distinct, got 3 more than once"),
            ([3.0], InvalidInputError, "integers, got dtype float64"),
            ([True], InvalidInputError, "integers, got dtype bool"),
            (3, InvalidInputError, "1-d array"),
        ],
    )
    def test_bad_removals(self, index: TurboQuantIndex, saved: SavedOf, ids: Any, error: Any, says: str) -> None:
        self.unchanged(index, saved, lambda: index.remove(ids), error, "^ids must .*" + says)

    @pytest.mark.parametrize("ids", [[0, 20], [-1], np.array([2**62])])
    def test_bad_reconstructions(self, index: TurboQuantIndex, saved: SavedOf, ids: Any) -> None:
        says = f"^ids must be in the index, got {ids[-1]}"
        self.unchanged(index, saved, lambda: index.reconstruct(ids), UnknownIdError, says)

    @pytest.mark.parametrize("k", [0, -1, True, 1.0, "1", None, np.float64(2), np.array([1]), 2**31, 2**62, 2**70])
    def test_bad_k(self, index: TurboQuantIndex, saved: SavedOf, k: Any) -> None:
        says = "k must be an integer from 1 to 2147483647, got"
        self.unchanged(index, saved, lambda: index.search(np.zeros(DIM), k), InvalidInputError, says)

    @pytest.mark.parametrize(
        ("allow", "says"),
        [
            ([[1], [2, 3]], "allow must be a 1-d array of integers, got rows of several lengths"),
            ([0.5], "allow must be integers, got dtype float64"),
            (np.ones(19, bool), r"shape \(20,\), got \(19,\)"),
            (np.ma.masked_less(np.arange(20), 3), "allow must be a plain array, got a masked one"),
        ],
    )
    def test_bad_filters(self, index: TurboQuantIndex, saved: SavedOf, allow: Any, says: str) -> None:
        self.unchanged(index, saved, lambda: index.search(np.zeros(DIM), allow=allow), InvalidInputError, says)

    @pytest.mark.parametrize("case", [case for case in BAD_VECTORS if case != "one vector"])
    def test_bad_queries(self, index: TurboQuantIndex, saved: SavedOf, case: str) -> None:
        queries, says = BAD_VECTORS[case]
        says = says.replace("vectors", "queries").replace(r"\(n, 16\)", r"\(n, 16\) or \(16,\)")
        self.unchanged(index, saved, lambda: index.search(queries), InvalidInputError, says)


def test_a_bad_second_add_of_an_empty_index_leaves_it_empty(saved: SavedOf) -> None:
    index = TurboQuantIndex(DIM, 4)
    before = saved(index)
    with pytest.raises(InvalidInputError):
        index.add(spoiled(np.nan, 0))
    assert saved(index) == before
    with pytest.raises(UnknownIdError, match="got 0, which is not"):
        index.remove([0])
    with pytest.raises(UnknownIdError, match="got 0, which is not"):
        index.reconstruct([0])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dim": 0}, "dim must be an integer from 1 to 8192, got 0"),
        ({"dim": 8193}, "dim must be an integer from 1 to 8192, got 8193"),
        ({"bits": 0}, "bits must be above 0"),
        ({"bits": 9}, "bits must be a number from 0 to 8 or a BitPlan, got 9"),
        ({"bits": "4"}, "bits must be a number from 0 to 8 or a BitPlan, got '4'"),
        ({"metric": "dot"}, "metric must be one of 'ip', 'cosine', 'l2', got 'dot'"),
        ({"rotation": "pca"}, "rotation must be one of 'dense', 'hadamard', 'identity', got 'pca'"),
        ({"backend": "fast"}, "backend must be one of .*, got 'fast'"),
        ({"codec": "wavelet"}, "codec must be one of 'scalar', 'trellis', got 'wavelet'"),
        ({"codec": "trellis", "bits": 5}, "needs a band of 1 to 4 bits, .*, got 5 bits; use codec 'scalar'"),
        ({"train": True}, "train must be 'off' or 'auto', got True"),
        ({"seed": 1.5}, r"seed must be an integer, got 1\.5"),
        ({"device": "gpu"}, "device must be one of torch's, such as 'cpu' or 'cuda', got 'gpu'"),
        ({"device": 3.5}, r"device must be one of torch's, .*, got 3\.5"),
    ],
)
def test_bad_arguments(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidInputError, match=says):
        TurboQuantIndex(**{"dim": DIM, **options})


@pytest.mark.parametrize("call", ["make", "move", "load"])
def test_a_gpu_that_is_not_there(tmp_path: Path, call: str) -> None:
    """It is said at once, not when the first vectors come; the index stays where it is."""
    index = TurboQuantIndex(DIM)
    index.add(whole_numbers(5))
    index.save(tmp_path / "index")
    absent = f"cuda:{torch.cuda.device_count()}"
    calls: dict[str, Callable[[], object]] = {
        "make": lambda: TurboQuantIndex(DIM, device=absent),
        "move": lambda: index.to(absent),
        "load": lambda: TurboQuantIndex.load(tmp_path / "index", device=absent),
    }
    with pytest.raises(BackendError, match=f"device must be there, got '{absent}' where torch sees .* use 'cpu'"):
        calls[call]()
    assert index.device.type == "cpu"
    assert len(np.asarray(index.search(whole_numbers(1), 3)[1])[0]) == 3


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_an_id_that_a_search_returns_is_in_the_index(kind: Callable[[np.ndarray], Any]) -> None:
    index = TurboQuantIndex(DIM, 4)
    index.add(whole_numbers(3), ids=[7, 8, 2**62])
    found = index.search(kind(whole_numbers(3)[:1]), 4)[1][0]
    assert [id in index for id in found] == [True, True, True, False]
    assert [id in index for id in kind(np.arange(6, 9))] == [False, True, True]
    assert not any(kind(np.asarray(wrong)) in index for wrong in (7.0, True, [7]))


@pytest.mark.parametrize("count", [0, 5])
@pytest.mark.parametrize("precision", ["int4", None, 8])
def test_bad_precision(count: int, precision: Any) -> None:
    index = TurboQuantIndex(DIM)
    index.add(whole_numbers(count))
    with pytest.raises(InvalidInputError, match="precision must be 'int8' or 'exact', got"):
        index.search(whole_numbers(1), precision=precision)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_first_add_that_fails_teaches_nothing(bad: float) -> None:
    """With train="auto" the sample is drawn before the bad row is found, and the row is named by its own number."""
    index = TurboQuantIndex(DIM, train="auto")
    vectors = np.random.default_rng(0).standard_normal((5000, DIM)).astype(np.float32)
    for row in (0, 4321):
        spoilt = vectors.copy()
        spoilt[row, 2] = bad
        with pytest.raises(InvalidInputError, match=f"in row {row}; 1 such rows of 5000"):
            index.add(spoilt)
        assert (len(index), index.learnt) == (0, "nothing")
    far = np.random.default_rng(1).standard_normal((70_000, DIM)).astype(np.float32)
    drawn = set(permutation(0, 64, len(far))[: 1 << 16].tolist())
    outside = next(row for row in range(len(far)) if row not in drawn)
    far[outside] = bad
    with pytest.raises(InvalidInputError, match=f"in row {outside};"):
        index.add(far)
    assert (len(index), index.learnt) == (0, "nothing")
    index.add(vectors)
    assert index.learnt != "nothing"


class TestExtremes:
    @pytest.mark.parametrize("metric", METRICS)
    def test_zero_vectors_are_legal(self, metric: Any) -> None:
        vectors = whole_numbers(20) - 50
        vectors[[0, 7]] = 0
        index = TurboQuantIndex(DIM, 2, metric)
        index.add(vectors)
        for queries in (vectors[:9], np.zeros((3, DIM))):
            scores, ids = (np.asarray(part) for part in index.search(queries, 20))
            assert np.isfinite(scores).all()
            assert (np.sort(ids, axis=1) == np.arange(20)).all()
            wanted = (queries.astype(float) ** 2).sum(1) if metric == "l2" else np.zeros(len(queries))
            for zero in (0, 7):
                np.testing.assert_allclose(scores[ids == zero], wanted, rtol=1e-6)
        assert not np.asarray(index.reconstruct([0, 7])).any()

    @pytest.mark.parametrize("metric", METRICS)
    def test_nothing_but_zero_vectors(self, metric: Any) -> None:
        index = TurboQuantIndex(DIM, 1, metric)
        index.add(np.zeros((40, DIM)))
        scores, ids = index.search(np.zeros(DIM), 50)
        assert not np.asarray(scores)[:40].any()
        assert sorted(np.asarray(ids).tolist()) == [-1] * 10 + list(range(40))

    @pytest.mark.parametrize("metric", METRICS)
    def test_one_row_repeated(self, metric: Any) -> None:
        index = TurboQuantIndex(DIM, 3, metric)
        index.add(np.repeat(whole_numbers(1), 300, axis=0))
        scores, ids = (np.asarray(part) for part in index.search(whole_numbers(1, 1)[0], 300))
        assert len(set(ids.tolist())) == 300
        np.testing.assert_allclose(scores, scores[0], rtol=1e-6)

    @pytest.mark.parametrize(
        ("metric", "power"), [("cosine", 120), ("cosine", -140), ("ip", 118), ("l2", 59), ("l2", -50)]
    )
    def test_any_magnitude(self, parsed: ParsedOf, metric: Any, power: int) -> None:
        """A power of two changes no code, and only the exponent of a scale."""
        vectors = whole_numbers(40) - 50
        plain, scaled = (TurboQuantIndex(DIM, 4, metric) for _ in range(2))
        plain.add(vectors)
        scaled.add(np.ldexp(vectors, power - 7))
        a, b = parsed(plain), parsed(scaled)
        np.testing.assert_array_equal(a.tensors["packed"], b.tensors["packed"])
        factor = 1.0 if metric == "cosine" else 2.0 ** (power - 7)
        np.testing.assert_array_equal(factor * a.tensors["scales"], b.tensors["scales"])
        found = [np.asarray(index.search(whole_numbers(5, 1), 10, allow=range(40))[0]) for index in (plain, scaled)]
        assert all(np.isfinite(scores).all() for scores in found)
        if metric != "l2":
            np.testing.assert_allclose(found[1] / factor, found[0], rtol=1e-6)

    @pytest.mark.parametrize(("metric", "value", "says"), [("ip", 3e38, "norms"), ("l2", 1e19, "squared norms")])
    def test_norms_that_overflow(self, saved: SavedOf, metric: Any, value: float, says: str) -> None:
        index = TurboQuantIndex(DIM, 4, metric)
        index.add(whole_numbers(5))
        before, vectors = saved(index), whole_numbers(6)
        vectors[4:] = value
        with pytest.raises(InvalidInputError, match=f"vectors must have {says} that are finite .* in row 4$"):
            index.add(vectors)
        assert saved(index) == before

    @pytest.mark.parametrize("metric", METRICS)
    @pytest.mark.parametrize("value", [1e18, 1e25, 1e37, 3e38])
    def test_huge_queries_never_give_nan(self, metric: Any, value: float) -> None:
        """They are searched, or refused by name: cosine knows no size, for the others the square must not overflow."""
        index = TurboQuantIndex(DIM, 4, metric)
        vectors = whole_numbers(30) - 50
        vectors[3] = 0
        index.add(vectors)
        queries = np.stack([np.ones(DIM), np.where(np.arange(DIM) % 3, value, -value)]).astype(np.float32)
        if metric == "cosine" or value < 4e18:
            scores, ids = (np.asarray(part) for part in index.search(queries, 30))
            assert np.isfinite(scores).all()
            assert (np.sort(ids, axis=1) == np.arange(30)).all()
            return
        with pytest.raises(InvalidInputError, match=r"queries must have squared norms .* in row 1$"):
            index.search(queries, 30)


def test_integers_are_numbers_not_codes(parsed: ParsedOf) -> None:
    index = TurboQuantIndex(DIM, 4, "ip")
    index.add(whole_numbers(10).astype(np.uint8))
    wanted = estimate(whole_numbers(10), ((DIM, 4),), 0, "ip")
    np.testing.assert_allclose(parsed(index).estimates, wanted, atol=1e-4 * np.abs(wanted).max())
