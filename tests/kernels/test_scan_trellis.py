"""The scan of trellis codes against numpy in float64: codes are drawn and packed by the oracle."""

import numpy as np
import pytest
import torch
import trellis_oracle

from tqsearch import kernels
from tqsearch.errors import BackendError
from tqsearch.kernels import BandTable
from tqsearch.plan import BitPlan
from tqsearch.quantizer import TurboQuantizer

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poisoned")

PLANS = {
    "1 bit": [(72, 1)],
    "2 bits": [(64, 2)],
    "3 bits": [(100, 3)],
    "4 bits": [(37, 4)],
    "bands": [(9, 8), (24, 4), (40, 3), (30, 0), (16, 2), (21, 1)],
    "few": [(16, 2), (4, 8), (7, 6), (12, 4)],
    "1 bit, whole columns": [(1024, 1)],
    "2 bits, whole columns": [(256, 2)],
    "3 bits, whole columns": [(256, 3)],
    "4 bits, whole columns": [(512, 4)],
    "2 bits, a column and a half": [(384, 2)],
    "4 bits, a column and a half": [(128, 4)],
    "aligned bands": [(40, 8), (32, 4), (96, 3), (64, 0), (160, 2), (224, 1)],
    "8 coordinates": [(8, 4)],
}
SMALL = ["1 bit", "2 bits", "3 bits", "4 bits", "bands", "2 bits, whole columns", "8 coordinates"]
GPU = torch.cuda.is_available()


def packed_beside(codes, width):
    """The bytes of a band of 6 or 8 bits, (n, size) to (n, bytes), plane by plane as `packing` says."""
    if width == 8:
        return codes.astype(np.uint8)
    planes = []
    for bits, fields in ((4, codes & 15), (2, codes >> 4)):
        fields = np.pad(fields, ((0, 0), (0, -fields.shape[1] % (8 // bits)))).reshape(len(codes), -1, 8 // bits)
        planes.append((fields << bits * np.arange(8 // bits)).sum(axis=2).astype(np.uint8))
    return np.concatenate(planes, axis=1)


class Case:
    """Random codes, queries and terms for a plan."""

    def __init__(self, pairs, n, q, seed, device):
        rng = np.random.default_rng(seed)
        self.n, self.device, dim = n, device, sum(size for size, _ in pairs)
        coded = [(size, bits) for size, bits in pairs if bits not in (0, 6, 8)]
        widths = np.repeat([bits for _, bits in pairs], [size for size, _ in pairs])
        codes = np.concatenate([rng.integers(0, 2**bits, (n, size)) for size, bits in coded], axis=1)
        rows = b"".join(trellis_oracle.pack(row, coded) for row in codes.tolist())
        levels, tables, step = np.zeros((n, dim)), {}, 0.021
        levels[:, (widths > 0) & (widths < 6)] = [trellis_oracle.levels_of(row, coded) for row in codes.tolist()]
        parts = [np.frombuffer(rows, np.uint8).reshape(n, -1)]
        start = 0
        for size, bits in pairs:
            if bits in (6, 8):
                tables[bits] = np.sort(rng.choice(np.arange(-127, 128), 2**bits))
                wide = rng.integers(0, 2**bits, (n, size))
                levels[:, start : start + size] = tables[bits][wide] * step
                parts.append(packed_beside(wide, bits))
            start += size
        self.packed = np.concatenate(parts, axis=1)
        self.queries = rng.standard_normal((q, dim)).astype(np.float32)
        self.scales = rng.uniform(0.5, 2, n).astype(np.float16)
        self.bias = rng.standard_normal(n).astype(np.float32)
        self.mask = rng.random(n) < 0.7
        self.exact = self.queries.astype(np.float64) @ levels.T
        self.rounded, start = np.zeros((q, n)), 0
        for size, _ in pairs:  # what the docstring of the scan says of int8: one scale a query and band
            part = self.queries[:, start : start + size]
            scale = np.abs(part).max(axis=1, keepdims=True) / np.float32(127)
            whole = np.floor(part / scale + np.float32(0.5))
            self.rounded += scale.astype(np.float64) * (whole @ levels[:, start : start + size].T)
            start += size
        plan = BitPlan.from_pairs(pairs)
        self.bands = tuple(
            band._replace(
                levels=torch.from_numpy((tables[band.width] * step).astype(np.float32)).to(device),  # any will do
                steps=tuple(tables[band.width].tolist()),
                offset=0.0,
                step=step,
            )
            if band.width in tables
            else band
            for band in TurboQuantizer(dim, plan, rotation="identity", codec="trellis").tables(device)
        )

    def scan(self, k, *, backend="triton", precision="int8"):
        arrays = (self.queries, self.packed, self.scales, self.bias, self.mask)
        found = kernels.scan(
            *(torch.from_numpy(array).to(self.device) for array in arrays),
            self.bands,
            k,
            precision=precision,
            backend=backend,
        )
        return tuple(part.cpu().numpy() for part in found)

    def check(self, k, precision, backend="triton"):
        scores, rows = self.scan(k, precision=precision, backend=backend)
        products = self.rounded if precision == "int8" else self.exact
        expected = np.where(self.mask, products * self.scales.astype(np.float64) + self.bias, -np.inf)
        tolerance = 1e-5 * np.abs(self.queries).sum(axis=1, keepdims=True) + 1e-6  # a wrong code is 1e-3 of the sum
        best = -np.sort(-expected, axis=1)[:, :k]
        real = np.isfinite(best)
        assert scores.shape == rows.shape == best.shape
        assert (np.isneginf(scores) == ~real).all()
        assert (rows[~real] == -1).all()
        assert (np.abs(np.where(real, scores, 0) - np.where(real, best, 0)) <= tolerance).all()
        own = np.take_along_axis(expected, np.maximum(rows, 0), axis=1)
        assert (np.abs(np.where(real, own, 0) - np.where(real, scores, 0)) <= tolerance).all()
        assert all(len(set(line[kept].tolist())) == kept.sum() for line, kept in zip(rows, real, strict=True))


@pytest.mark.parametrize("precision", ["int8", "exact"])
@pytest.mark.parametrize("plan", PLANS if GPU else SMALL)
def test_every_width_by_scores(device, plan, precision):
    Case(PLANS[plan], 131, 3, 1, device).check(7, precision)


@pytest.mark.parametrize("precision", ["int8", "exact"])
@pytest.mark.parametrize("plan", PLANS if GPU else ["few"])
def test_by_maxima_of_tiles(device, plan, precision):
    """Eleven tiles and k = 2: the maxima choose, the rows are scored again."""
    Case(PLANS[plan], 11 * 128 - 5, 3, 2, device).check(2, precision)


@pytest.mark.parametrize("plan", ["bands", "aligned bands", "4 bits"])
def test_reference(device, plan):
    Case(PLANS[plan], 131, 3, 3, device).check(7, "exact", backend="reference")


@pytest.mark.skipif(not GPU, reason="assembly needs a GPU")
@pytest.mark.parametrize("plan", [plan for plan in PLANS if plan not in (*SMALL, "few")])  # "few" is not aligned
def test_assembly_equals_portable_code(device, plan, monkeypatch):
    """Integer arithmetic, so the scores are equal to the last bit; each number of queries is another cut."""
    from tqsearch.kernels import scan_layout, scan_triton

    case, found = Case(PLANS[plan], 600, 130, 4, device), {}
    queries, packed = case.queries, torch.from_numpy(case.packed).to(device)
    for body in ("assembly", "portable"):
        monkeypatch.setattr(scan_layout, "INTERPRETED", body == "portable")
        scan_layout.layout_of.cache_clear()
        few = torch.from_numpy(queries[:3]).to(device)
        scanner = scan_triton.Scanner(few, packed, packed[:, 0].float(), None, None, case.bands, False)
        on_path = [constants[5] > 0 for constants in scanner.layout.bands]
        assert [text != "" for text in scanner.layout.assemblies] == [body == "assembly" and one for one in on_path]
        for count in (1, 17, 65, 130):
            case.queries = queries[:count]
            found[body, count] = case.scan(600)[0], case.scan(1)[0]  # by scores; by maxima of tiles
    scan_layout.layout_of.cache_clear()
    for count in (1, 17, 65, 130):
        for ours, theirs in zip(found["assembly", count], found["portable", count], strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_bands_off_the_byte_have_no_kernel(device):
    case = Case([(12, 2), (16, 1)], 60, 2, 5, device)
    with pytest.raises(BackendError, match="no kernel for a trellis's band of 12 coordinates, no multiple of 8"):
        case.scan(3)
    case.check(3, "exact", backend="reference")


@pytest.mark.parametrize("pairs", [[(48, 2)], [(16, 4), (8, 0), (9, 3)]], ids=str)
def test_encoding_in_triton_makes_the_reference_codes(device, pairs):
    """Vectors through the quantizer: the kernel's paths are those of the reference, and so is all that is kept."""
    dim = sum(size for size, _ in pairs)
    vectors = np.random.default_rng(6).standard_normal((5, dim)).astype(np.float32)
    vectors[3] = 0
    plan = BitPlan.from_pairs(pairs)
    ours, theirs = (
        TurboQuantizer(dim, plan, codec="trellis", device=place, backend=backend).encode(vectors)
        for place, backend in ((device, "triton"), ("cpu", "reference"))
    )
    assert torch.equal(ours.packed.cpu(), theirs.packed)
    assert torch.equal(ours.scales.cpu(), theirs.scales)


def test_a_band_says_what_its_integers_mean():
    for band in TurboQuantizer(64, BitPlan.from_pairs([(8, 4), (8, 3), (8, 2), (40, 1)]), codec="trellis").tables(
        torch.device("cpu")
    ):
        assert isinstance(band, BandTable)
        found = (np.array(band.steps) - band.offset) * band.step
        np.testing.assert_allclose(found, trellis_oracle.level_table(band.width), rtol=1e-12)
        np.testing.assert_allclose(band.levels, trellis_oracle.level_table(band.width), rtol=1e-6)
