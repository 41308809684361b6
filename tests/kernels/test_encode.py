"""`encode` of each backend against numpy in float64."""

import math

import numpy as np
import pytest
import torch
from encoded_rows import PLANS, Rows

from tqsearch import kernels
from tqsearch.kernels import BandTable, reference
from tqsearch.quantizer import TurboQuantizer
from tqsearch.rotation import Hadamard

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(params=["reference", "triton"])
def encode(request, device):
    """`kernels.encode` of a backend, on the device that it runs on; arguments and results are on the CPU."""
    if request.param == "triton":
        pytest.importorskip("triton")

    def put(value):
        if isinstance(value, torch.Tensor):
            return value.to(device)
        return value

    bands_put = {}

    def run(vectors, bands, *tensors, **options):
        key = id(bands)
        if key not in bands_put:
            bands_put[key] = (
                bands,
                tuple(b._replace(boundaries=put(b.boundaries), levels=put(b.levels)) for b in bands),
            )
        options = {name: put(value) for name, value in options.items()}
        moved = vectors.to(device)
        with np.errstate(over="ignore", invalid="ignore"):  # of the interpreter, where a GPU would go on with infinity
            out = kernels.encode(moved, bands_put[key][1], *map(put, tensors), backend=request.param, **options)
        assert torch.equal(moved.cpu().nan_to_num(), vectors.nan_to_num()), "the input was written to"
        return kernels.Encoded(*(part.cpu() for part in out))

    return run


@pytest.mark.parametrize("pairs", PLANS)
@pytest.mark.parametrize("count", [0, 1, 65])
@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("centred", [None, "centre", "unit and centre", "unit"])
def test_encode(encode, oracle, rng, pairs, count, rotated, centred):
    data = Rows(oracle, pairs, count)
    tables = [(rows, levels / 64.0, boundaries / 64.0) for rows, levels, boundaries in data.tables]
    bands = tuple(b._replace(boundaries=b.boundaries / 64, levels=b.levels / 64) for b in data.bands)
    x = rng.standard_normal((count, data.dim)) * np.exp(3 * rng.standard_normal((count, 1)))
    x = x.astype(np.float32)
    factors, orders = Hadamard(data.dim, 6).tensors(torch.device("cpu")) if rotated else (None, None)
    z, options, growth = x.astype(np.float64), {}, 1.0
    if centred:
        unit = centred.startswith("unit")
        norms = np.linalg.norm(z, axis=1, keepdims=True)
        centre = rng.standard_normal(data.dim).astype(np.float32) * (0.1 if unit else 1.0)
        centre = centre if centred.endswith("centre") else None
        options = {"unit": unit, "centre": None if centre is None else torch.from_numpy(centre)}
        z = (z / norms if unit else z) - (0.0 if centre is None else centre)
        # What is taken off keeps the rounding of what was there: relative to |z| it grows by (|x| + |c|) / |z|.
        before = (1.0 if unit else norms) + (0.0 if centre is None else np.linalg.norm(centre))
        growth = 1 + float((before / np.linalg.norm(z, axis=1, keepdims=True)).max(initial=0.0))
    out = encode(torch.from_numpy(x), bands, factors, orders, **options)
    check_encoded(oracle, out, z, tables, pairs, 6 if rotated else None, growth)
    c = np.zeros(data.dim) if options.get("centre") is None else centre.astype(np.float64)
    slack = (2 * math.log2(data.dim) + 8) * oracle.eps * growth * np.linalg.norm(z, axis=1) * np.linalg.norm(c)
    assert (np.abs(out.centre_products.numpy() - z @ c) <= slack).all()


def check_encoded(oracle, out, z, tables, pairs, seed, growth):
    dim = z.shape[1]
    unit = oracle.unit(z, seed)
    if pairs == [(dim, 4)]:  # two in a byte
        codes = np.empty((len(z), 2 * out.packed.shape[1]), np.int64)
        codes[:, ::2], codes[:, 1::2] = out.packed.numpy() & 15, out.packed.numpy() >> 4
        codes = codes[:, :dim]
    else:
        codes = decode_bits(oracle, out.packed.numpy(), pairs)
    tolerance = oracle.rounding(dim) * growth
    oracle.count_wrong_codes(codes, unit, tables, tolerance)
    levels = np.concatenate([table[codes[:, rows]] for rows, table, _ in tables], axis=1)
    norms = np.linalg.norm(z, axis=1)
    np.testing.assert_allclose(out.norms.numpy(), norms, rtol=(2 * math.log2(dim) + 8) * oracle.eps * growth)
    dots = (unit * levels).sum(axis=1)
    slack = tolerance * np.abs(levels).sum(axis=1) + (math.log2(dim) + 2) * oracle.eps * np.abs(unit * levels).sum(1)
    assert (np.abs(out.dots.numpy() - dots) <= slack).all()
    assert out.packed.dtype == torch.uint8
    assert out.norms.dtype == out.dots.dtype == torch.float32


def test_a_zero_row_divided_by_its_norm_stays_zero_before_the_centre_is_taken_off(encode, oracle):
    data = Rows(oracle, [(8, 2)], 1)
    centre = torch.full((8,), -0.5)
    out = encode(torch.zeros(1, 8), data.bands, centre=centre, unit=True)
    expected = encode(torch.full((1, 8), 0.5), data.bands)
    assert torch.equal(out.packed, expected.packed)
    assert out.norms.tolist() == pytest.approx([math.sqrt(2.0)], rel=1e-6)


def decode_bits(oracle, packed, pairs):
    """Codes by looking for each byte row's meaning bit by bit: the packed image of every single set bit is known."""
    dim = sum(size for size, _ in pairs)
    bits = np.unpackbits(packed, axis=1, bitorder="little").astype(np.int64)
    codes, start = np.zeros((len(packed), dim), dtype=np.int64), 0
    for size, width in pairs:
        for i in range(start, start + size):
            for bit in range(width):
                one = [0] * dim
                one[i] = 1 << bit
                image = np.frombuffer(oracle.pack(one, pairs), np.uint8)
                codes[:, i] |= bits[:, int(np.argmax(np.unpackbits(image, bitorder="little")))] << bit
        start += size
    return codes


@pytest.mark.parametrize("block_rows", [1, 13, 64])
def test_encode_in_blocks_is_the_same(oracle, rng, monkeypatch, block_rows):
    data = Rows(oracle, [(24, 3), (41, 2)], 1)
    x = torch.from_numpy(rng.standard_normal((200, 65)).astype(np.float32))
    tensors = Hadamard(65, 1).tensors(torch.device("cpu"))
    whole = kernels.encode(x, data.bands, *tensors)
    monkeypatch.setattr(reference, "ENCODE_BLOCK", block_rows * 65)
    parts = kernels.encode(x, data.bands, *tensors)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_a_value_on_a_boundary_has_the_lower_code(encode, oracle):
    """All ones: u = 1 exactly in every coordinate."""
    boundaries = torch.tensor([-1.0, 0.0, 1.0])
    band = BandTable(4, 2, boundaries, torch.tensor([-1.5, -0.5, 0.5, 1.5]), (-3, -1, 1, 3), 0.0, 0.5)
    out = encode(torch.tensor([[1.0, 1, 1, 1], [3, -3, 3, -3], [0, 0, 0, 0]]), (band,))
    assert out.packed.numpy().tobytes().hex() == "aa2255"  # codes 2222, 2020 from the low end, 1111
    assert out.norms.tolist() == [2.0, 6.0, 0.0]
    assert out.dots.tolist() == [2.0, 4.0, 0.0]


@pytest.mark.parametrize("dim", [8, 100, 128, 768, 960, 1024, 1536, 2048, 3000, 4096, 5000, 8192])
def test_encode_at_the_sizes_of_embeddings(encode, oracle, rng, dim):
    quantizer = TurboQuantizer(dim, 4, seed=3)
    bands = quantizer.tables(torch.device("cpu"))
    x = rng.standard_normal((5, dim)).astype(np.float32)
    out = encode(torch.from_numpy(x), bands, *quantizer.rotation.tensors(torch.device("cpu")))
    tables = [(slice(0, dim), bands[0].levels.double().numpy(), bands[0].boundaries.double().numpy())]
    check_encoded(oracle, out, x.astype(np.float64), tables, [(dim, 4)], 3, 1.0)


@pytest.mark.parametrize("dim", [16, 384, 1024, 4096])
def test_rows_of_one_large_coordinate(encode, oracle, dim):
    """All of the norm in one number, in equal numbers, in one again: what a transform meets at its extremes."""
    quantizer = TurboQuantizer(dim, 4, seed=5)
    bands, tensors = quantizer.tables(torch.device("cpu")), quantizer.rotation.tensors(torch.device("cpu"))
    once = quantizer.rotation.apply(torch.eye(dim)[:3])
    x = torch.cat([torch.eye(dim)[:3], torch.eye(dim)[-3:] * 7, once, torch.ones(1, dim), torch.eye(dim)[:1] + 1e-6])
    out = encode(x, bands, *tensors)
    tables = [(slice(0, dim), bands[0].levels.double().numpy(), bands[0].boundaries.double().numpy())]
    check_encoded(oracle, out, x.double().numpy(), tables, [(dim, 4)], 5, 1.0)


@pytest.mark.parametrize(("dim", "bits"), [(1024, 4), (4096, 8)])
def test_numbers_beside_a_boundary_have_the_code_of_their_side(encode, dim, bits):
    """Every boundary and both its neighbours, in rows of norm sqrt(d) exactly, so that numbers stay what they are."""
    bands = TurboQuantizer(dim, bits).tables(torch.device("cpu"))
    boundaries = bands[0].boundaries
    up, down = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    others = boundaries[boundaries != 0.0]  # the neighbours of zero would vanish in the squares
    beside = torch.cat([boundaries, others.nextafter(up), others.nextafter(down), torch.tensor([-1e-6, 1e-6])])
    rest = math.sqrt((dim - float(beside.double().square().sum())) / (dim - len(beside)))
    rows = torch.cat([beside.expand(65, -1), torch.full((65, dim - len(beside)), rest)], dim=1)
    rows[:, -1] += torch.linspace(-1e-3, 1e-3, 65)  # some of the norms are rounded to sqrt(d)
    out = encode(rows, bands)
    exact = out.norms == math.sqrt(dim)
    assert exact.any()
    packed = out.packed
    codes = packed if bits == 8 else torch.stack([packed & 15, packed >> 4], dim=2).flatten(1)
    wanted = np.searchsorted(boundaries.numpy(), rows[exact].numpy(), side="left")
    assert codes[exact].tolist() == wanted.tolist()


@pytest.mark.parametrize("dim", [8, 64, 100, 128, 1024])
@pytest.mark.parametrize("unit", [True, False])
def test_a_row_that_is_not_finite_spoils_no_other(encode, rng, dim, unit):
    quantizer = TurboQuantizer(dim, 2, seed=4)
    bands, tensors = quantizer.tables(torch.device("cpu")), quantizer.rotation.tensors(torch.device("cpu"))
    x = torch.from_numpy(rng.standard_normal((9, dim)).astype(np.float32))
    wanted = encode(x, bands, *tensors, unit=unit)
    x[2, 3], x[5, 1], x[6] = torch.nan, torch.inf, 0.0
    out, others = encode(x, bands, *tensors, unit=unit), [0, 1, 3, 4, 7, 8]
    for name in ("packed", "norms", "dots"):
        assert torch.equal(getattr(out, name)[others], getattr(wanted, name)[others])
    assert not out.norms[[2, 5]].isfinite().any()


def test_a_row_has_the_same_codes_beside_rows_of_any_length(encode, rng):
    quantizer = TurboQuantizer(24, 4, seed=2)
    bands, tensors = quantizer.tables(torch.device("cpu")), quantizer.rotation.tensors(torch.device("cpu"))
    x = torch.from_numpy(rng.standard_normal((5, 24)).astype(np.float32))
    beside = x.clone()
    beside[1], beside[3] = beside[1] * 1e-36, beside[3] * 1e36
    out, wanted = encode(beside, bands, *tensors), encode(x, bands, *tensors)
    assert torch.equal(out.packed[[0, 2, 4]], wanted.packed[[0, 2, 4]])
    assert torch.equal(out.dots[[0, 2, 4]], wanted.dots[[0, 2, 4]])
    assert torch.equal(out.norms[[0, 2, 4]], wanted.norms[[0, 2, 4]])


def test_a_row_has_the_same_codes_in_any_batch(encode, rng):
    quantizer = TurboQuantizer(100, 3, seed=1)
    bands, tensors = quantizer.tables(torch.device("cpu")), quantizer.rotation.tensors(torch.device("cpu"))
    x = torch.from_numpy(rng.standard_normal((40, 100)).astype(np.float32))
    whole = encode(x, bands, *tensors)
    parts = [encode(part, bands, *tensors) for part in x.split([1, 2, 37])]
    for name in whole._fields:
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))


def test_strides(encode, rng):
    quantizer = TurboQuantizer(40, 2, seed=1)
    bands, tensors = quantizer.tables(torch.device("cpu")), quantizer.rotation.tensors(torch.device("cpu"))
    wide = torch.from_numpy(rng.standard_normal((80, 120)).astype(np.float32))
    for x in (wide[::3, 5:45], wide[:40, :33].t()):
        out, wanted = encode(x, bands, *tensors), encode(x.contiguous(), bands, *tensors)
        assert all(torch.equal(a, b) for a, b in zip(out, wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_triton_reads_halves(device, rng, dtype):
    quantizer = TurboQuantizer(40, 2, seed=1)
    x = torch.from_numpy(rng.standard_normal((9, 40))).to(device, dtype)
    bands, tensors = quantizer.tables(device), quantizer.rotation.tensors(device)
    out = kernels.encode(x, bands, *tensors, backend="triton")
    wanted = kernels.encode(x.float(), bands, *tensors, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(out, wanted, strict=True))


@pytest.mark.parametrize("size", [1e-38, 1e-20, 1e20, 3e38])
def test_rows_of_any_length(encode, oracle, rng, size):
    """Squares would vanish or overflow; norms and codes do not."""
    quantizer = TurboQuantizer(24, 4, seed=2)
    bands = quantizer.tables(torch.device("cpu"))
    x = (rng.uniform(-1, 1, (7, 24)) * size / 5).astype(np.float32)
    out = encode(torch.from_numpy(x), bands, *quantizer.rotation.tensors(torch.device("cpu")))
    tables = [(slice(0, 24), bands[0].levels.double().numpy(), bands[0].boundaries.double().numpy())]
    check_encoded(oracle, out, x.astype(np.float64), tables, [(24, 4)], 2, 1.0)
