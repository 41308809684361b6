"""The PTX of the attention kernels, run by `ptx` on packed codes: what comes out, and where, is as the layouts say."""

import re

import numpy as np
import ptx
import pytest
import torch

from tqsearch.kernels.bands import BandTable

pytest.importorskip("triton")
from tqsearch.kernels.attention_layout import HALVES, WORDS, band_keys, key_layout, registers, value_layout

CPU = torch.device("cpu")
PARTS = {2: 4, 3: 4, 4: 2}


def drawn(oracle, width, size, rows, seed):
    """Codes (rows, size), their packed bytes, and the numbers of the levels."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**width, (rows, size))
    packed = b"".join(oracle.pack(row.tolist(), [(size, width)]) for row in codes)
    steps = np.sort(rng.choice(128, 2**width, replace=False))
    return codes, np.frombuffer(packed, np.uint8).reshape(rows, -1), steps


def band_of(width, size, steps):
    levels = torch.from_numpy(steps.astype(np.float32))
    return BandTable(size, width, levels[:-1], levels, tuple(int(step) for step in steps), 0.0, 1.0)


def held(text, tables):
    """The registers that `registers` fills, from the tables' bytes."""
    found = re.findall(r"ld\.global\.b32 (\w+), \[table_at_1\+(\d+)\]", text)
    flat = tables.numpy().tobytes()
    copies = [{name: int.from_bytes(flat[int(at) + c :][:4], "little") for name, at in found} for c in (0, 128)]
    assert copies[0] == copies[1]  # odd threads read the copy
    return copies[0]


def words(tile):
    return np.ascontiguousarray(tile).view(np.uint32)


def parts_of(packed, width, form, start, step, plane, assembly, names, tables, inner):
    """The parts (parts, rows, step) of the columns from `start` on, fed as the kernel feeds them."""
    x = packed[:, start : start + step]
    if form == WORDS:
        eights = x.reshape(len(x), -1, 2, 4)
        y = packed[:, plane + start // 2 :][:, : step // 2].reshape(len(x), -1, 4)
        both = [np.stack([four, four], axis=2 if inner else 1) for four in (eights[:, :, 0], eights[:, :, 1], y)]
        places = np.arange(step)
        flags = tables.numpy()[0, 64:66][places // 4 % 2 if inner else places // (step // 2)]
        inputs = [words(one.reshape(len(x), step)) for one in both]
        inputs.append(words(np.broadcast_to(flags.astype(np.uint8), x.shape)))
    else:
        inputs = [words(x)]
    found = ptx.run(assembly, 4 if form == HALVES else PARTS[width], inputs, names)
    parts = np.stack([one.view(np.uint8).reshape(len(x), step) for one in found])
    if form == HALVES:  # whose products are added
        assert not (parts[:2] & parts[2:]).any()
        return parts[:2] + parts[2:]
    return parts


@pytest.mark.parametrize("size", [128, 256])
@pytest.mark.parametrize("width", [2, 3, 4])
def test_keys_are_decoded_to_their_slots(oracle, width, size):
    codes, packed, steps = drawn(oracle, width, size, 20, seed=width)
    keys = band_keys((band_of(width, size, steps),))
    layout = key_layout(keys, True, CPU)
    (_, columns, step, byte, plane, slot, slots, form) = layout.bands[0]
    names = held(registers(keys), layout.tables)
    assert names
    found = [
        part
        for start in range(0, columns, step)
        for part in parts_of(
            packed, width, form, start, step, plane, layout.assemblies[0], names, layout.tables, inner=False
        )
    ]
    assert (byte, slot, slots) == (0, 0, size)
    assert np.array_equal(np.concatenate(found, axis=1), steps[codes][:, layout.slots.numpy()])


@pytest.mark.parametrize("block", [128, 256])
@pytest.mark.parametrize("width", [2, 3, 4])
def test_weights_meet_the_values_of_their_tokens(oracle, width, block):
    codes, packed, steps = drawn(oracle, width, block, 20, seed=10 + width)  # a row: a coordinate's codes of the tokens
    keys = band_keys((band_of(width, 20, steps),))
    layout = value_layout(keys, block, True, CPU)
    (_, columns, _, _, plane, *_, form) = layout.bands[0]
    names = held(registers(keys), layout.tables)
    parts = parts_of(packed, width, form, 0, columns, plane, layout.assemblies[0], names, layout.tables, inner=True)
    decoded = np.concatenate(list(parts), axis=1)
    weights = np.random.default_rng(0).integers(-100, 100, block)  # by token
    by_row = weights[layout.tokens.numpy()]  # as the scores' rows stand
    twos = by_row.reshape((2,) * (block.bit_length() - 1))
    placed = twos.transpose(layout.orders[0][:-1]).reshape(-1)
    assert np.array_equal(decoded.astype(np.int64) @ placed, steps[codes] @ weights)
    natural = np.arange(block).reshape(twos.shape).transpose(layout.places).reshape(-1)
    assert np.array_equal(natural, layout.tokens.numpy())
