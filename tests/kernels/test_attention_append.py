"""Blocks encoded by one kernel, against the definition in float64."""

import numpy as np
import pytest
import torch

from tqsearch import BitPlan, TurboQuantizer

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poisoned")


def encode(states, quantizer, rotation, offset, block, along_tokens):
    from tqsearch.kernels.attention_append_triton import encode_blocks

    return encode_blocks(states, quantizer.tables(states.device), rotation, offset, block, along_tokens)


def unpacked(packed, pairs, block, along_tokens, oracle_pack):
    """Codes (tokens, D) of one head, each bit read where the oracle's packer puts it."""
    if not along_tokens:
        return _read(_rows(packed, pairs, block), _places(pairs, oracle_pack))
    rows, start = [], 0
    for size, width in pairs:
        nbytes = size * block * width // 8
        band = _rows(packed[:, start : start + nbytes], [(block, width)], size)
        rows.append(_read(band, _places([(block, width)], oracle_pack)).reshape(len(packed), size, block))
        start += nbytes
    return np.concatenate(rows, axis=1).swapaxes(1, 2).reshape(-1, sum(size for size, _ in pairs))


def _rows(blocks, pairs, count):
    """Blocks of so many rows, the planes of each row put together: (rows, bytes)."""
    parts, start = [blocks[:, :0].repeat(count, axis=0)], 0
    for size, width in pairs:
        for plane in (plane for plane in (8, 4, 2, 1) if width & plane):
            nbytes = size * plane // 8
            parts.append(blocks[:, start : start + count * nbytes].reshape(-1, nbytes))
            start += count * nbytes
    assert start == blocks.shape[1]
    return np.concatenate(parts, axis=1)


def _places(pairs, oracle_pack):
    """For each coordinate and bit of its code the bit of the row that the oracle's packer sets."""
    count, places = sum(size for size, _ in pairs), []
    widths = [width for size, width in pairs for _ in range(size)]
    for i, width in enumerate(widths):
        codes = [0] * count
        places.append([])
        for bit in range(width):
            codes[i] = 1 << bit
            row = np.frombuffer(oracle_pack(codes, pairs), np.uint8)
            places[-1].append(int(np.flatnonzero(np.unpackbits(row, bitorder="little"))[0]))
    return places


def _read(rows, places):
    bits = np.unpackbits(rows, axis=1, bitorder="little").astype(np.int64)
    columns = [
        sum((bits[:, place] << bit for bit, place in enumerate(each)), np.zeros(len(rows), int)) for each in places
    ]
    return np.stack(columns, axis=1)


PLANS = [[(64, 4)], [(64, 3)], [(80, 2)], [(32, 1)], [(32, 8)], [(16, 4), (24, 3)], [(8, 8), (8, 0), (16, 2)]]


@pytest.mark.parametrize(
    ("pairs", "along_tokens", "block"),
    [
        *((pairs, along, 128) for pairs in PLANS for along in (False, True)),
        *(([(64, 3)], along, block) for along in (False, True) for block in (32, 64)),
    ],
)
def test_codes_and_scales(oracle, device, pairs, along_tokens, block):
    rng = np.random.default_rng(0)
    dim, heads, count = sum(size for size, _ in pairs), 2, 128
    quantizer = TurboQuantizer(dim, BitPlan.from_pairs(pairs))
    states = rng.standard_normal((1, heads, count, dim)).astype(np.float32) * 3
    states[0, 1, 5], states[0, 0, 7] = 0.0, states[0, 0, 7] * 1e25
    offset = rng.standard_normal((heads, dim)).astype(np.float32)
    offset[1] = 0.0
    matrix = np.linalg.qr(rng.standard_normal((dim, dim)))[0].astype(np.float32)
    found = encode(*(torch.from_numpy(x).to(device) if isinstance(x, np.ndarray) else x
                     for x in (states, quantizer, matrix, offset)), block, along_tokens)  # fmt: skip
    packed, scales = (part.cpu().numpy() for part in found)
    wrong = 0
    for head in range(heads):
        z = states[0, head].astype(np.float64) - offset[head]
        norm = np.linalg.norm(z, axis=1)
        unit = z @ matrix.astype(np.float64).T * (np.sqrt(dim) / np.where(norm > 0, norm, 1))[:, None]
        codes = unpacked(packed[0, head], pairs, block, along_tokens, oracle.pack)
        levels = np.zeros_like(unit)
        for where, table, _ in oracle.tables(pairs, dim):
            levels[:, where] = table[codes[:, where]] if len(table) else 0.0
        wrong += oracle.count_wrong_codes(codes, unit, list(oracle.tables(pairs, dim)), oracle.rounding(dim))
        product = (unit * levels).sum(axis=1)
        expected = norm * np.sqrt(dim) / np.where(product > 0, product, np.inf)
        np.testing.assert_allclose(scales[0, head], expected, rtol=1e-5)
    assert wrong <= 1e-3 * states.size  # of which each lies within rounding of a boundary


def test_strides_and_dtype(device):
    """Every second token of a wider table, in bfloat16: as its copy in float32."""
    states = torch.randn((2, 3, 128, 32), generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    quantizer, rotation = TurboQuantizer(32, 4), torch.eye(32, device=device)
    found = encode(states[:, :, ::2], quantizer, rotation, None, 32, True)
    again = encode(states[:, :, ::2].float().contiguous(), quantizer, rotation, None, 32, True)
    assert torch.equal(found[0], again[0])
    assert torch.equal(found[1], again[1])


def test_nothing(device):
    packed, scales = encode(
        torch.zeros((1, 2, 0, 32), device=device), TurboQuantizer(32, 3), torch.eye(32), None, 32, False
    )
    assert packed.shape == (1, 2, 0, 32 * 12)
    assert scales.shape == (1, 2, 0)
