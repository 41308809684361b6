"""Codes, scales and layouts of compressed keys and values against numpy float64 and bit-by-bit reading."""

import itertools

import numpy as np
import pytest
import torch
from kv_oracle import dequantize, inverse_rotation, pairs_of

from tqsearch.kvcache.history import History
from tqsearch.kvcache.outliers import key_codec
from tqsearch.kvcache.store import KeyCodec, ValueCodec, value_codec
from tqsearch.plan import BitPlan

PLANES = {width: [plane for plane in (8, 4, 2, 1) if width & plane] for width in range(9)}
ORDER = [0, 1, 4, 5, 2, 3, 6, 7]


def read_row(row, pairs):
    """The codes of a row, field by field, as the docstring of `packing` says."""
    codes, byte = [], 0
    for size, width in pairs:
        band, shift = np.zeros(size, dtype=np.int64), 0
        for plane in PLANES[width]:
            per_byte = 8 // plane
            for i in range(size):
                slot = ORDER.index(i % 8) if plane == 1 else i % per_byte
                band[i] |= (int(row[byte + i // per_byte]) >> (slot * plane) & (1 << plane) - 1) << shift
            byte += -(-size * plane // 8)
            shift += plane
        codes.append(band)
    assert byte == len(row)
    return np.concatenate(codes)


def read_rows(blob, pairs, count):
    """The codes of a block of so many rows, whose planes lie one after the other: (count, codes of a row)."""
    rows, byte = [[] for _ in range(count)], 0
    for size, width in pairs:
        for plane in PLANES[width]:
            nbytes = -(-size * plane // 8)
            for row in rows:
                row.extend(blob[byte : byte + nbytes])
                byte += nbytes
    assert byte == len(blob)
    return np.stack([read_row(row, pairs) for row in rows])


def read_key_codes(packed, pairs, block):
    """(B, H, C / block, bytes) to (B H C, D)."""
    return np.concatenate([read_rows(blob, pairs, block) for blob in packed.reshape(-1, packed.shape[-1]).numpy()])


def read_value_codes(packed, pairs, block):
    """(B, H, C / block, bytes) to (B H C, D): each coordinate's tokens are a row of their own."""
    tokens = []
    for blob in packed.reshape(-1, packed.shape[-1]).numpy():
        columns, byte = [], 0
        for size, width in pairs:
            nbytes = size * block * width // 8
            columns.append(read_rows(blob[byte : byte + nbytes], [(block, width)], size))
            byte += nbytes
        assert byte == len(blob)
        tokens.append(np.concatenate(columns).T)
    return np.concatenate(tokens)


def states_of(seed, batch, heads, length, dim, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp(spread * torch.randn((batch, heads, length, 1), generator=generator))
    return torch.randn((batch, heads, length, dim), generator=generator) * sizes


CASES = [(dim, bits) for dim in (64, 80) for bits in (1, 2, 3, 4, 5, 6, 7, 8, 2.5, 3.5)] + [
    (96, 3.25),
    (128, 4),
    (256, 2),
    (512, 4),
]


@pytest.mark.parametrize(("dim", "bits"), CASES)
@pytest.mark.parametrize("kind", [KeyCodec, ValueCodec])
def test_codes_scales_and_estimates(oracle, kind, dim, bits):
    block, seed = 8, 5
    states = states_of(dim, 2, 2, 2 * block, dim)
    offset = torch.randn((2, dim)) if kind is KeyCodec else None
    codec = kind(dim, bits, block, seed, "auto")
    compressed = codec.encode(states, **({} if offset is None else {"offset": offset}))
    pairs = pairs_of(bits, dim)
    rest = (states if offset is None else states - offset[:, None]).reshape(-1, dim).double().numpy()

    codes = (
        read_key_codes(compressed.packed, pairs, block)
        if kind is KeyCodec
        else read_value_codes(compressed.packed, pairs, block)
    )
    unit = oracle.unit(rest, seed)
    tables = list(oracle.tables(pairs, dim))
    wrong = oracle.count_wrong_codes(codes, unit, tables, 4 * oracle.rounding(dim))
    assert wrong <= 2

    levels = np.concatenate([table[codes[:, band]] for band, table, _ in tables], axis=1)
    norms = np.linalg.norm(rest, axis=1)
    exact = norms * np.sqrt(dim) / (unit * levels).sum(axis=1)
    scales = compressed.scales.reshape(-1)
    assert scales.dtype == torch.float16
    np.testing.assert_allclose(scales.double().numpy(), exact, rtol=2**-11 + 1e-5)

    decoded = torch.empty_like(states)
    codec.decode(compressed, decoded)
    estimate = scales.double().numpy()[:, None] * levels @ inverse_rotation(oracle, dim, seed)
    if offset is not None:
        estimate += (
            np.repeat(offset[None, :, None].double().numpy(), 2, axis=0).repeat(2 * block, axis=2).reshape(-1, dim)
        )
    error = np.linalg.norm(decoded.reshape(-1, dim).double().numpy() - estimate, axis=1)
    assert (error <= 1e-5 * (np.linalg.norm(estimate, axis=1) + 1)).all()


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 2.5, 8])
@pytest.mark.parametrize("codec", [key_codec, value_codec])
def test_distortion_and_unbiasedness(oracle, codec, bits):
    """<x, x_hat> = |x|^2 for each vector, and E |x - x_hat|^2 <= D / (1 - D) |x|^2, D the levels' distortion (the error
    along x is none, so it is below); 4,096 vectors."""
    dim, block = 64, 32
    states = states_of(1, 4, 4, 256, dim)
    coder = codec(dim, bits, block, 3, "auto")
    decoded = torch.empty_like(states)
    coder.decode(coder.encode(states), decoded)
    x, estimate = states.double(), decoded.double()
    squares = (x**2).sum(dim=3)
    assert ((x * estimate).sum(dim=3) / squares - 1).abs().max() < 2**-11 + 1e-5
    error = (((estimate - x) ** 2).sum(dim=3) / squares).flatten()
    theory = sum(size * oracle.distortion(width, dim) for size, width in pairs_of(bits, dim)) / dim
    ratio = error / (theory / (1 - theory))
    assert 0.9 < float(ratio.mean()) < 1 + 5 * float(ratio.std()) / len(ratio) ** 0.5


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8, 2.5, 3.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("along", ["scalar", "trellis"])
@pytest.mark.parametrize("codec", [key_codec, value_codec])
def test_encoding_decoded_states_again_changes_nothing_but_rounding(codec, along, dtype, bits):
    if along == "trellis" and bits == 6:
        bits = 1.5  # a trellis has no 6 bits
    dim, block = 64, 8
    states = states_of(2, 1, 2, 64, dim, spread=0.3).to(dtype)
    coder = codec(dim, bits, block, 0, "auto", codec=along)
    first = torch.empty_like(states)
    coder.encode(states)
    coder.decode(coder.encode(states), first)
    again = torch.empty_like(first)
    coder.decode(coder.encode(first), again)
    error = (again.double() - first.double()).norm(dim=3) / first.double().norm(dim=3)
    # The scale is rounded to float16 and the estimate to dtype, once more.
    assert error.max() <= 2 * (2**-11 + torch.finfo(dtype).eps)


def test_zero_vectors_and_single_spikes():
    states = torch.zeros((1, 1, 8, 64))
    states[0, 0, 3, 5] = 7.0
    for codec, along in itertools.product((key_codec, value_codec), ("scalar", "trellis")):
        coder = codec(64, 4, 8, 0, "auto", codec=along)
        decoded = torch.full_like(states, torch.nan)
        coder.decode(coder.encode(states), decoded)
        assert (decoded[0, 0, [0, 1, 2, 4, 5, 6, 7]] == 0).all()
        assert (decoded[0, 0, 3] - states[0, 0, 3]).norm() < 0.12 * 7


@pytest.mark.parametrize("size", [1e6, 1e-8])
def test_scales_that_float16_cannot_hold_are_float32(size):
    states = states_of(3, 1, 1, 16, 64, spread=0.1)
    for codec in (key_codec, value_codec):
        coder = codec(64, 8, 8, 0, "auto")
        plain, large = coder.encode(states[:, :, :8]), coder.encode(states[:, :, 8:] * size)
        assert plain.scales.dtype == torch.float16
        assert large.scales.dtype == torch.float32
        both = plain.cat(large)
        assert both.scales.dtype == torch.float32
        decoded = torch.empty_like(states)
        coder.decode(both, decoded)
        wanted = torch.cat([states[:, :, :8], states[:, :, 8:] * size], dim=2)
        assert ((decoded - wanted).norm(dim=3) < 0.02 * wanted.norm(dim=3)).all()


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_scales_past_a_chosen_float16_keep_the_direction(backend):
    """Once a layer on a GPU has chosen float16, later blocks are not looked at: what is too long is shortened."""
    if backend == "triton":
        pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    states = states_of(3, 1, 2, 32, 64).to(device)
    lengths = torch.ones((32, 1), device=device)
    lengths[5:9] = 1e6
    if backend == "reference":  # the kernel's states are finite
        states[0, 1, 20, 3] = torch.inf
    for codec in (key_codec, value_codec):
        coder = codec(64, 4, 32, 0, backend)
        compressed = coder.encode(states * lengths, torch.float16)
        assert compressed.scales.dtype == torch.float16
        decoded = torch.empty_like(states)
        coder.decode(compressed, decoded)
        finite = decoded.isfinite().all(dim=3)
        assert torch.equal(finite, states.isfinite().all(dim=3))
        cosine = torch.cosine_similarity(decoded, states, dim=3)[finite]
        assert (cosine > 0.98).all()
        assert (compressed.scales[:, :, 5:9] == 65504).all()
        assert (compressed.scales[:, :, :5] < 100).all()


def test_work_in_pieces_equals_work_at_once(monkeypatch):
    states = states_of(4, 2, 2, 64, 64)
    states[:, :, 40:] *= 1e7  # the last pieces' scales are float32
    for codec, along in itertools.product((key_codec, value_codec), ("scalar", "trellis")):
        coder = codec(64, 3.5, 8, 0, "auto", codec=along)
        results = []
        for size in (1 << 30, 2 * 2 * 64 * 24):
            monkeypatch.setattr("tqsearch.kvcache.store.PIECE", size)
            constants = coder.estimate(states)
            compressed = coder.encode(states, **constants)
            decoded = torch.full_like(states, torch.nan)
            coder.decode(compressed, decoded)
            results.append((*constants.values(), compressed.packed, decoded))
        assert compressed.scales.dtype == torch.float32
        for whole, pieces in zip(*results, strict=True):
            if whole.dtype == torch.uint8:
                assert torch.equal(whole, pieces)
            # A scale may be rounded to float16 in one of the two; beside it float32 rounds along the whole vector.
            rounding = 1e-6 * whole.float().norm(dim=-1, keepdim=True)
            assert ((whole.float() - pieces.float()).abs() <= 2**-10 * whole.float().abs() + rounding).all()


def test_a_plan_may_name_the_bands():
    states = states_of(5, 1, 2, 16, 64)
    plan = BitPlan.from_pairs([(8, 8), (40, 3), (16, 2)])
    for codec, nbytes in ((key_codec, 16 * 27), (value_codec, 2 * 8 * 27)):
        coder = codec(64, plan, 8, 0, "auto")
        compressed = coder.encode(states)
        assert compressed.packed[0, 0].numel() == nbytes
        assert tuple(compressed.packed.shape) == coder.packed_shape(1, 2, 16)


def test_the_oracle_itself_dequantizes_well(oracle, rng):
    rows = rng.standard_normal((50, 64))
    estimate, slack = dequantize(oracle, rows, [(64, 4)], 0)
    error = ((estimate - rows) ** 2).sum(axis=1) / (rows**2).sum(axis=1)
    assert 0.006 < error.mean() < 0.013
    assert np.median(slack) < 1e-3


@pytest.mark.parametrize(("bits", "dtype"), [(4, torch.float32), (2.5, torch.float16)])
def test_blocks_of_one_launch_are_those_of_plain_torch(bits, dtype):
    """A cache's blocks are encoded by one kernel where Triton runs; the estimates are those of the other path."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    keys, values = (states_of(seed, 1, 2, 120, 64).to(dtype).to(device) * 3 for seed in (6, 7))
    decoded = []
    for backend in ("triton", "reference"):
        history = [History.empty(states, codec(64, bits, 32, 0, backend)) for states, codec in
                   ((keys, key_codec), (values, value_codec))]  # fmt: skip
        for start, stop in ((0, 70), (70, 71), (71, 120)):
            parts = (keys[:, :, start:stop], values[:, :, start:stop])
            history = [past.append(part, 4).compress(8) for past, part in zip(history, parts, strict=True)]
        assert [past.compressed_length for past in history] == [96, 96]
        assert all(past.compressed.scales.dtype == torch.float16 for past in history)
        decoded.append([past.decode().float() for past in history])
    for one, other in zip(*decoded, strict=True):
        # A code may differ where a coordinate lies within rounding of a boundary, and a float16 scale with it.
        same = (one - other).norm(dim=3) <= 2e-3 * other.norm(dim=3)
        assert same.float().mean() > 0.98
        assert (one - other).norm() < 0.02 * other.norm()
