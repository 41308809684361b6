"""The steps in which Gluon reads plans of several bands, without a GPU; and on one its scan beside plain Triton's."""

import numpy as np
import pytest
import torch
from ptx import run

from tqsearch.kernels import BandTable

pytest.importorskip("triton")

PLANS = {
    "a trained plan": [(32, 8), (192, 6), (352, 4), (384, 3), (64, 2)],
    "rows of 380 bytes": [(32, 8), (64, 8), (224, 6), (128, 4), (64, 3), (64, 2), (96, 1), (96, 0)],
    "few bits": [(32, 3), (96, 2), (96, 1), (160, 0)],
    "small bands": [(8, 8), (16, 6), (8, 4), (32, 3), (16, 2), (32, 1)],
    "two": [(128, 3), (128, 2)],
}


def tables(pairs, rng, device="cpu"):
    """Bands of some levels up to 4 bits and even ones above, with steps that differ."""
    found = []
    for size, width in pairs:
        numbers, offset = np.sort(rng.choice(128, 2 ** min(width, 4), replace=False)), 63.5
        if width > 4:
            numbers = np.arange(2**width) - (128 if width == 8 else 0)
            offset = -0.5 if width == 8 else 31.5
        if width == 1:
            numbers, offset = np.array([0, 1]), 0.5
        step = 1.6 if width == 1 else float(rng.uniform(0.02, 0.1))
        levels = torch.from_numpy(((numbers - offset) * step).astype(np.float32)).to(device)
        boundaries = (levels[1:] + levels[:-1]) / 2
        found.append(BandTable(size, width, boundaries, levels, tuple(int(n) for n in numbers), offset, step))
    return tuple(found)


@pytest.mark.parametrize("most", [16, 32, 64])
@pytest.mark.parametrize("plan", PLANS)
def test_steps_decode_every_coordinate_once(oracle, plan, most):
    """By the assembly, run on the words that a thread holds: entries are the numbers of the slots' coordinates."""
    from tqsearch.kernels import scan_bands
    from tqsearch.kernels.scan_layout import keyed

    rng, pairs = np.random.default_rng(1), PLANS[plan]
    dim = sum(size for size, _ in pairs)
    codes = np.concatenate([rng.integers(0, 2**width, (50, size)) for size, width in pairs], axis=1)
    rows = np.frombuffer(b"".join(oracle.pack(row.tolist(), pairs) for row in codes), np.uint8).reshape(50, -1)
    rows = np.concatenate([rows, np.zeros((50, 256), np.uint8)], axis=1)
    bands, numbers = keyed(tables(pairs, rng), False), np.zeros((50, dim + 1), np.int64)
    starts = np.cumsum([0, *[size for size, _ in pairs]])
    for (size, width, _, table, _, _), start in zip(bands, starts[:-1], strict=True):
        if width:
            numbers[:, start : start + size] = np.array(table, np.int64)[codes[:, start : start + size]]
    steps, slots, _ = scan_bands._cut_into_steps(bands, most)
    met = slots[slots < dim]
    coded = np.repeat([width > 0 for _, width in pairs], [size for size, _ in pairs])
    np.testing.assert_array_equal(np.sort(met), np.flatnonzero(coded))
    for step in steps:
        assert step.columns <= max(most, 16)
        for first in range(0, step.columns, 4):
            wide = rows[:, step.wide + 2 * first : step.wide + 2 * first + 8].copy().view("<u4")
            narrow = rows[:, step.narrow + first : step.narrow + first + 4].copy().view("<u4")[:, 0]
            words = [*wide.T] if step.width > 2 else []
            words += [narrow] if step.width in (1, 2, 3, 6) else []
            parts = run(step.assembly, step.parts, words, {})
            for number, part in enumerate(parts):
                at = step.slot + number * step.columns + first
                place = slots[at : at + 4]
                known = place < dim
                np.testing.assert_array_equal(part.view(np.int8).reshape(50, 4)[:, known], numbers[:, place[known]])


@pytest.mark.gpu
@pytest.mark.parametrize("queries", [1, 16, 50, 300])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("terms", [False, True])
def test_maxima_equal_those_of_plain_triton(plan, queries, terms):
    """The same integers and the same float32 operations: equal, for whole and ragged tiles, at any first query."""
    from tqsearch.kernels import scan_hopper, scan_triton
    from tqsearch.kernels.scan_cuts import Config

    device = torch.device("cuda")
    if not scan_hopper.available(device):
        pytest.skip("needs compute capability 9.x")
    rng, pairs, n = np.random.default_rng(2), PLANS[plan], 40_007
    bands = tables(pairs, rng, "cuda")
    nbytes = sum(band.nbytes for band in bands)
    packed = torch.from_numpy(rng.integers(0, 256, (n, nbytes), dtype=np.uint8)).cuda()
    scales = torch.from_numpy(rng.uniform(0.5, 2, n).astype(np.float16)).cuda()
    bias = torch.from_numpy(rng.standard_normal(n).astype(np.float32)).cuda() if terms else None
    mask = torch.from_numpy(rng.random(n) < 0.3).cuda() if terms else None
    dim = sum(size for size, _ in pairs)
    asked = torch.from_numpy(rng.standard_normal((queries, dim)).astype(np.float32)).cuda()
    arguments = (asked, packed, scales, bias, mask, bands, False)
    gluon, plain = scan_triton.Scanner(*arguments), scan_triton.Scanner(*arguments, Config(16, 32, 64, 4, 2, 0, False))
    assert gluon._bands is not None
    for part in (slice(0, queries), slice(16, queries) if queries > 16 else slice(0, 1)):
        found, wanted = gluon.maxima(part), plain.maxima(part)
        assert found.shape == wanted.shape == (part.stop - part.start, -(-n // 64))
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize(("version", "wanted"), [((3, 6), True), ((3, 7), True), ((3, 8), False), ((3, 9), True)])
def test_triton_3_8_scans_in_plain_triton(monkeypatch, version, wanted):
    from tqsearch.kernels import scan_bands, scan_hopper

    monkeypatch.setattr(scan_hopper, "available", lambda _: True)
    monkeypatch.setattr(scan_hopper, "TRITON", version)
    assert scan_bands.available(torch.device("cuda")) == wanted
