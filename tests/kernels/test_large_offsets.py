"""Rows whose offsets pass 2^31: what lies behind is read and written as what lies before. Gigabytes, for a GPU."""

import numpy as np
import pytest
import torch

from tqsearch import kernels
from tqsearch.kernels import BandTable
from tqsearch.quantizer import TurboQuantizer

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
DIM = 1024


@pytest.mark.parametrize("precision", ["int8", "exact"])
@pytest.mark.parametrize("k", [1, 40])
def test_scan_finds_rows_behind_two_gigabytes(oracle, k, precision):
    rng = np.random.default_rng(0)
    count = 2**31 // (DIM // 2) + 7
    places = np.array([0, 2**21 - 1, 2**22 - 1, 2**22, count - 1])
    numbers = np.arange(16) * 8
    levels = ((numbers - 63.5) / 64).astype(np.float32)
    codes = rng.integers(0, 16, (len(places), DIM))
    rows = b"".join(oracle.pack(row.tolist(), [(DIM, 4)]) for row in codes)
    packed = torch.randint(0, 256, (count, DIM // 2), dtype=torch.uint8, device="cuda")
    packed[torch.from_numpy(places).cuda()] = torch.from_numpy(
        np.frombuffer(rows, np.uint8).reshape(-1, DIM // 2).copy()
    ).cuda()
    boundaries = torch.from_numpy((levels[1:] + levels[:-1]) / 2).cuda()
    band = BandTable(DIM, 4, boundaries, torch.from_numpy(levels).cuda(), tuple(map(int, numbers)), 63.5, 1 / 64)
    queries = torch.from_numpy(levels[codes]).cuda()
    scales = torch.ones(count, dtype=torch.float16, device="cuda")
    scores, found = kernels.scan(queries, packed, scales, None, None, (band,), k, precision=precision, backend="triton")
    assert (found[:, 0].cpu().numpy() == places).all()
    squares = (levels.astype(np.float64)[codes] ** 2).sum(axis=1)
    step = np.abs(levels).max() / 127  # of int8 queries: each coordinate is off by half of it at most
    tolerance = 1e-5 * squares if precision == "exact" else step / 2 * np.abs(levels[codes]).sum(axis=1)
    assert (np.abs(scores[:, 0].cpu().numpy() - squares) <= tolerance).all()


def test_encode_writes_rows_behind_two_billion_numbers():
    count = 2**31 // DIM + 5
    vectors = torch.randn((count, DIM), dtype=torch.float16, device="cuda")
    encoded = TurboQuantizer(DIM, 4, device="cuda").encode(vectors)
    for rows in (slice(0, 9), slice(2**21 - 4, 2**21 + 5), slice(count - 9, count)):
        alone = TurboQuantizer(DIM, 4, device="cuda").encode(vectors[rows].clone())
        for name in ("packed", "scales"):
            assert torch.equal(getattr(encoded, name)[rows], getattr(alone, name)), name
