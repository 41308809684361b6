"""The Triton scan against numpy in float64: the oracle draws and packs codes, scores follow from the docstrings."""

import math

import numpy as np
import pytest
import torch

from tqsearch import kernels
from tqsearch.errors import BackendError, InvalidInputError
from tqsearch.kernels import BandTable

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poisoned")

PLANS = {
    "1 bit": [(72, 1)],
    "2 bits": [(64, 2)],
    "3 bits": [(100, 3)],
    "4 bits": [(37, 4)],
    "6 bits": [(41, 6)],
    "8 bits": [(40, 8)],
    "bands": [(24, 8), (22, 6), (40, 4), (9, 3), (30, 0), (16, 2), (21, 1)],
    "even bands": [(32, 8), (64, 6), (64, 4), (128, 3), (8, 0), (64, 2), (128, 1)],
    "4 bits, whole columns": [(256, 4)],
    "3 bits, whole columns": [(256, 3)],
    "2 bits, whole columns": [(256, 2)],
    "1 bit, whole columns": [(1024, 1)],
    "6 bits, whole columns": [(256, 6)],
    "8 coordinates": [(8, 4)],
}


def grid(width: int, rng: np.random.Generator) -> tuple[np.ndarray, float, float]:
    """Numbers, offset and step of some table of the width: any will do."""
    if width == 1:
        return np.array([0, 1]), 0.5, 1.6
    if width > 4 and rng.random() < 0.5:  # levels of equal distance
        return np.arange(2**width) - (128 if width == 8 else 0), -0.5 if width == 8 else 31.5, 0.021
    if width > 4:
        return np.sort(rng.choice(np.arange(-127, 128), 2**width)), 0.0, 0.021
    return np.sort(rng.choice(128, 2**width, replace=False)), 63.5, 0.04


def rounded_bands(parts: list[np.ndarray], steps: list[float], widths: list[int]) -> list[np.ndarray]:
    """Queries' parts in bands, (q, size), rounded as the docstring of `scan_layout` says, and back."""
    runs: list[list[int]] = []
    for place, width in enumerate(widths):
        joins = runs and width <= 4 and widths[place - 1] <= 4 and len(runs) >= 3
        runs = [*runs[:-1], [*runs[-1], place]] if joins else [*runs, [place]]
    found = {}
    for run in runs:
        if len(run) > 1:  # a bit's two levels are 32 steps apart
            steps = [step / 32 if widths[place] == 1 and place in run else step for place, step in enumerate(steps)]
        largest = {place: np.abs(parts[place]).max(axis=1, keepdims=True).astype(np.float32) / 127 for place in run}
        unit = np.max([largest[place] * np.float32(steps[place]) for place in run], axis=0)
        for place in run:
            scale = largest[place] if len(run) == 1 else unit / np.float32(steps[place])
            whole = np.floor(parts[place].astype(np.float32) / scale + np.float32(0.5))
            found[place] = whole.astype(np.float64) * unit / steps[place]
    return [found[place] for place in range(len(parts))]


class Case:
    """Random codes, queries and terms for a plan."""

    def __init__(self, oracle, pairs, n, q, seed, device):
        rng = np.random.default_rng(seed)
        self.pairs, self.n, self.device = pairs, n, device
        dim = sum(size for size, _ in pairs)
        codes = np.concatenate([rng.integers(0, 2**width, (n, size)) for size, width in pairs], axis=1)
        rows = b"".join(oracle.pack(row.tolist(), pairs) for row in codes)
        self.packed = np.frombuffer(rows, np.uint8).reshape(n, -1).copy()
        self.queries = rng.standard_normal((q, dim)).astype(np.float32)
        self.scales = rng.uniform(0.5, 2, n).astype(np.float16)
        self.bias = rng.standard_normal(n).astype(np.float32)
        self.mask = rng.random(n) < 0.7
        self.bands, self.exact, self.rounded = [], np.zeros((q, n)), np.zeros((q, n))
        start, coded = 0, []
        for size, width in pairs:
            numbers, offset, step = (np.zeros(1), 0.0, 0.0) if width == 0 else grid(width, rng)
            levels = ((numbers - offset) * step).astype(np.float32)
            part, code = self.queries[:, start : start + size].astype(np.float64), codes[:, start : start + size]
            self.exact += part @ levels.astype(np.float64)[code].T
            if width:
                coded.append((part, step, width, ((numbers - offset) * step)[code]))
            boundaries = torch.from_numpy((levels[1:] + levels[:-1]) / 2)
            table = [int(number) for number in numbers]
            self.bands.append(BandTable(size, width, boundaries, torch.from_numpy(levels), tuple(table), offset, step))
            start += size
        parts, steps, widths, levels_of = zip(*coded, strict=True)
        for whole, levels in zip(rounded_bands(list(parts), list(steps), list(widths)), levels_of, strict=True):
            self.rounded += whole @ levels.T

    def scan(self, k, *, backend="triton", bias=True, mask=True, precision="exact", packed=None):
        def put(array):
            return torch.from_numpy(array).to(self.device)

        bands = tuple(
            b._replace(boundaries=b.boundaries.to(self.device), levels=b.levels.to(self.device)) for b in self.bands
        )
        found = kernels.scan(
            put(self.queries),
            put(self.packed) if packed is None else packed,
            put(self.scales),
            put(self.bias) if bias else None,
            put(self.mask) if mask else None,
            bands,
            k,
            precision=precision,
            backend=backend,
        )
        return tuple(part.cpu().numpy() for part in found)

    def check(self, k, *, bias=True, mask=True, precision="exact"):
        scores, rows = self.scan(k, bias=bias, mask=mask, precision=precision)
        products = self.exact if precision == "exact" else self.rounded
        expected = products * self.scales.astype(np.float64)
        if bias:
            expected = expected + self.bias
        if mask:
            expected = np.where(self.mask, expected, -np.inf)
        tolerance = 1e-5 * np.abs(self.queries).sum(axis=1, keepdims=True) + 1e-6  # a wrong code is 1e-3 of the sum
        assert scores.shape == rows.shape == (len(self.queries), min(k, self.n))
        best = -np.sort(-expected, axis=1)[:, : scores.shape[1]]
        real = np.isfinite(best)
        assert (np.isneginf(scores) == ~real).all()
        assert (rows[~real] == -1).all()
        assert (np.abs(np.where(real, scores - np.where(real, best, 0), 0)) <= tolerance).all()
        own = np.take_along_axis(expected, np.maximum(rows, 0), axis=1)
        assert (np.abs(np.where(real, own - np.where(real, scores, 0), 0)) <= tolerance).all()
        for line, kept in zip(rows, real, strict=True):
            assert len(set(line[kept].tolist())) == kept.sum()


@pytest.mark.parametrize("precision", ["int8", "exact"])
@pytest.mark.parametrize("plan", PLANS)
def test_every_width_by_scores(oracle, device, plan, precision):
    Case(oracle, PLANS[plan], 131, 3, 1, device).check(7, precision=precision)


@pytest.mark.parametrize("precision", ["int8", "exact"])
@pytest.mark.parametrize("plan", ["1 bit", "3 bits", "6 bits", "bands", "4 bits, whole columns"])
def test_by_maxima_of_tiles(oracle, device, plan, precision):
    """Eleven tiles and k = 2: the maxima choose, the rows are scored again."""
    Case(oracle, PLANS[plan], 11 * 128 - 5, 3, 2, device).check(2, precision=precision)


@pytest.mark.parametrize("n", [1, 2, 63, 65, 127, 128, 129])
@pytest.mark.parametrize("q", [1, 17])
def test_sizes(oracle, device, n, q):
    Case(oracle, [(20, 4)], n, q, 3, device).check(5, precision="int8")


@pytest.mark.parametrize(("bias", "mask"), [(False, False), (True, False), (False, True)])
def test_without_terms(oracle, device, bias, mask):
    Case(oracle, [(20, 2)], 600, 2, 4, device).check(1, bias=bias, mask=mask, precision="int8")


def test_bias_in_half_precision(oracle, device):
    case = Case(oracle, [(20, 2)], 600, 2, 4, device)
    case.bias = case.bias.astype(np.float16)
    for precision in ("int8", "exact"):
        case.check(3, precision=precision)


def test_nothing_allowed(oracle, device):
    case = Case(oracle, [(20, 4)], 600, 2, 5, device)
    case.mask[:] = False
    scores, rows = case.scan(1)
    assert np.isneginf(scores).all()
    assert (rows == -1).all()


def test_one_row_repeated(oracle, device):
    case = Case(oracle, [(20, 4)], 300, 2, 6, device)
    case.packed[:], case.scales[:], case.bias[:] = case.packed[0], case.scales[0], case.bias[0]
    scores, rows = case.scan(4, mask=False)
    assert (scores == scores[:, :1]).all()
    assert all(len(set(line.tolist())) == 4 for line in rows)


def test_zero_query_and_zero_scale(oracle, device):
    case = Case(oracle, [(20, 4)], 140, 3, 7, device)
    case.queries[1] = 0
    case.exact[1] = case.rounded[1] = 0
    case.scales[::3] = 0
    case.rounded = np.nan_to_num(case.rounded)
    case.check(5, precision="exact")
    scores, _ = case.scan(140, mask=False, precision="int8")
    assert np.isfinite(scores).all()
    np.testing.assert_allclose(np.sort(scores[1]), np.sort(case.bias), rtol=1e-6)


def test_many_passes_over_the_queries(oracle, device, monkeypatch):
    from tqsearch.kernels import scan_triton

    case = Case(oracle, [(20, 4)], 700, 37, 8, device)
    monkeypatch.setattr(scan_triton, "_numbers_held", lambda packed: 6)
    case.check(1, precision="int8")
    case.check(9, precision="int8")


def test_no_queries(oracle, device):
    case = Case(oracle, [(20, 4)], 30, 0, 9, device)
    scores, rows = case.scan(3)
    assert scores.shape == rows.shape == (0, 3)


def test_rows_of_a_larger_table(oracle, device):
    """Rows are read by their stride: the codes are columns 16 .. 47 of a wider table."""
    case = Case(oracle, [(64, 4)], 200, 2, 10, device)
    expected = case.scan(3)
    wide = torch.full((200, 64), 255, dtype=torch.uint8, device=device)
    wide[:, 16:48] = torch.from_numpy(case.packed).to(device)
    found = case.scan(3, packed=wide[:, 16:48])
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])


def test_equals_the_reference_twin(oracle, device):
    case = Case(oracle, PLANS["bands"], 300, 5, 11, device)
    ours, theirs = case.scan(6), case.scan(6, backend="reference")
    np.testing.assert_allclose(ours[0], theirs[0], rtol=0, atol=1e-5 * np.abs(case.queries).sum(axis=1).max())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="assembly needs a GPU")
@pytest.mark.parametrize("plan", PLANS)
def test_assembly_equals_portable_code(oracle, device, plan, monkeypatch):
    """Every byte occurs among 700 rows; integer arithmetic, so the scores are equal to the last bit."""
    from tqsearch.kernels import scan_layout

    case = Case(oracle, PLANS[plan], 700, 3, 12, device)
    assembled = case.scan(700, precision="int8")
    monkeypatch.setattr(scan_layout, "INTERPRETED", True)
    scan_layout.layout_of.cache_clear()
    portable = case.scan(700, precision="int8")
    scan_layout.layout_of.cache_clear()
    np.testing.assert_array_equal(assembled[0], portable[0])


def test_select_and_its_refusals(device, monkeypatch):
    assert kernels.select("auto", torch.device("cuda")) == "triton"
    assert kernels.select("auto", torch.device("cpu")) == "reference"
    assert kernels.select("reference", torch.device("cuda")) == "reference"
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendError, match="on a GPU, got cpu; move index or model with"):
        kernels.select("triton", torch.device("cpu"))
    with pytest.raises(InvalidInputError, match="backend must be one of 'auto', 'reference', 'triton', got 'cuda'"):
        kernels.select("cuda", device)
    with pytest.raises(BackendError, match="cpu or cuda device, got meta"):
        kernels.select("auto", torch.device("meta"))


def test_refuses_what_it_cannot_do(device):
    table = BandTable(8, 5, torch.zeros(31), torch.zeros(32), tuple(range(32)), 0.0, 1.0)
    arguments = (torch.zeros(1, 8), torch.zeros((4, 5), dtype=torch.uint8), torch.ones(4), None, None, (table,), 1)
    arguments = tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in arguments)
    with pytest.raises(BackendError, match="no kernel for 5 bits"):
        kernels.scan(*arguments, backend="triton")
    with pytest.raises(InvalidInputError, match="precision must be one of 'int8', 'exact', got 'half'"):
        kernels.scan(*arguments, precision="half")


def test_int8_estimates_lose_little(oracle, device):
    """The error that rounding the query to int8 adds is that of a uniform law: q's step / sqrt(12) a coordinate."""
    case = Case(oracle, [(1024, 4)], 130, 4, 14, device)
    exact, _ = case.scan(130, bias=False, mask=False, precision="exact")
    order = np.argsort(-(case.exact * case.scales.astype(np.float64)), axis=1)
    found, rows = case.scan(130, bias=False, mask=False, precision="int8")
    back = np.zeros_like(found)
    np.put_along_axis(back, rows, found, axis=1)
    difference = back - np.take_along_axis(exact, np.argsort(order, axis=1), axis=1)
    levels = case.bands[0].levels.numpy().astype(np.float64)
    step = np.abs(case.queries).max(axis=1, keepdims=True) / 127
    expected = case.scales.astype(np.float64) * step / math.sqrt(12) * math.sqrt(1024 * np.mean(levels**2))
    ratio = np.sqrt(np.mean((difference / expected) ** 2))
    assert 0.8 < ratio < 1.2


@pytest.mark.parametrize(("plan", "tile"), [("4 bits, whole columns", 64), ("bands", 256)])
def test_every_cut_gives_the_same_maxima(oracle, device, plan, tile):
    """Queries held in shared memory or read again at each step, one program for all tiles or several."""
    from tqsearch.kernels import scan_triton
    from tqsearch.kernels.scan_cuts import Config

    case = Case(oracle, PLANS[plan], 5 * 128 - 5, 19, 13, device)
    queries, packed, scales = (torch.from_numpy(part).to(device) for part in (case.queries, case.packed, case.scales))
    found = []
    for config in (
        Config(16, 32, 128, 4, 2, 0, False),
        Config(16, 32, tile, 4, 2, 1, False),
        Config(16, 32, tile, 4, 2, 2, True),
        Config(32, 32, tile, 2, 2, 1, True),
    ):
        scanner = scan_triton.Scanner(queries, packed, scales, None, None, tuple(case.bands), False, config)
        maxima = scanner.maxima(slice(0, 19))
        assert maxima.shape == (19, -(-case.n // config.tile))
        whole = torch.full((19, 6 * 128 // config.tile), -math.inf, device=device)
        whole[:, : maxima.shape[1]] = maxima
        found.append(whole.view(19, 3, -1).amax(dim=2).cpu().numpy())
    expected = (case.rounded * case.scales.astype(np.float64))[:, :512].reshape(19, 2, 256).max(axis=2)
    np.testing.assert_allclose(found[0][:, :2], expected, rtol=1e-5, atol=1e-4)
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


@pytest.mark.parametrize(("tiles", "k"), [(131, 32), (700, 1), (9000, 7)])
def test_chosen_tiles_are_those_of_largest_maximum(oracle, device, tiles, k):
    from tqsearch.kernels import scan_triton

    rng = np.random.default_rng(tiles)
    maxima = np.round(rng.standard_normal((3, tiles)), 1).astype(np.float32)  # with ties
    maxima[1, rng.permutation(tiles)[: tiles - 2]] = -np.inf  # fewer finite ones than k
    maxima[2] = -np.inf
    case = Case(oracle, [(8, 4)], 300, 3, 14, device)
    columns = [torch.from_numpy(part).to(device) for part in (case.queries, case.packed, case.scales)]
    scanner = scan_triton.Scanner(*columns, None, None, tuple(case.bands), False)
    chosen = scanner.choose(torch.from_numpy(maxima).to(device), k).cpu().numpy()
    assert all(len(set(line.tolist())) == k for line in chosen)
    own = np.take_along_axis(maxima, chosen, axis=1)
    np.testing.assert_array_equal(-np.sort(-own, axis=1), -np.sort(-maxima, axis=1)[:, :k])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="slow in the interpreter")
@pytest.mark.parametrize("terms", [False, True])
@pytest.mark.parametrize("plan", ["1 bit, whole columns", "2 bits, whole columns"])
def test_many_queries(oracle, device, plan, terms):
    """More than 64; the last tile is not whole."""
    Case(oracle, PLANS[plan], 1500, 130, 15, device).check(1, bias=terms, mask=terms, precision="int8")
