import pytest
import torch

from tqsearch import trellis, viterbi

kernel = pytest.importorskip("tqsearch.kernels.viterbi_triton", reason="needs Triton", exc_type=ImportError)

ALL = [[(33, 1)], [(33, 2)], [(33, 3)], [(33, 4)], [(3, 2), (1, 4), (9, 1), (12, 3)], [(1, 2)]]


def stages_of(bands, device):
    found = []

    def keep(values, stages):
        found.extend(stages)
        return viterbi.best_paths(values, stages)

    trellis.encode(torch.zeros((1, sum(size for size, _ in bands)), device=device), bands, search=keep)
    return found


@pytest.mark.parametrize("bands", ALL, ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_paths_equal_the_reference(bands, count, device, poisoned):
    values = torch.randn((count, sum(size for size, _ in bands)), generator=torch.Generator().manual_seed(count))
    stages = stages_of(bands, device)
    paths = kernel.best_paths(values.to(device), stages)
    assert torch.equal(paths, viterbi.best_paths(values.to(device), stages))


def test_several_blocks_and_a_row_of_zeros(device, monkeypatch):
    monkeypatch.setattr(kernel, "_SCRATCH", 3 * 17 * 32)  # three rows a block
    values = torch.randn((7, 17), generator=torch.Generator().manual_seed(0)).to(device)
    values[4] = 0.0
    stages = stages_of([(17, 2)], device)
    assert torch.equal(kernel.best_paths(values, stages), viterbi.best_paths(values, stages))


def test_no_rows(device):
    assert kernel.best_paths(torch.empty((0, 17), device=device), stages_of([(17, 2)], device)).shape == (0, 17)


def test_encode_with_it_makes_the_same_codes(device):
    values, bands = torch.randn((2, 24), generator=torch.Generator().manual_seed(1)).to(device), [(8, 3), (16, 2)]
    assert torch.equal(trellis.encode(values, bands, search=kernel.best_paths), trellis.encode(values, bands))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_long_rows_compiled(bits, device):
    values = torch.randn((2000, 768), generator=torch.Generator().manual_seed(bits)).to(device)
    bands = [(256, bits), (512, 2)]
    assert torch.equal(trellis.encode(values, bands, search=kernel.best_paths), trellis.encode(values, bands))
