"""Step 1 of the scan in Gluon: its maxima of tiles are those of the plain kernel, to the last bit.

The plain kernel's scores are taken in blocks of eight queries by two warps: another instruction multiplies there, and
other instructions load. Whole searches of many queries are held against numpy by test_scan_triton.
"""

import pytest
import torch

from tqsearch import kernels
from tqsearch.quantizer import TurboQuantizer

pytest.importorskip("triton")
from tqsearch.kernels import scan_hopper, scan_triton
from tqsearch.kernels.scan_cuts import Config

PLAIN = Config(8, 32, 64, 2, 2, 0, False)
SHARED = 232_448
on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or not scan_hopper.available(torch.device("cuda")),
    reason="needs a GPU of compute capability 9.x: Gluon has no interpreter",
)


class Case:
    """Random codes, every byte among them, queries and terms; what an index of the same would scan."""

    def __init__(self, width, dim, n, q, terms=True, wide=0):
        self.n, self.q, self.device = n, q, torch.device("cuda")
        random = torch.Generator(self.device).manual_seed(n)
        self.tables = TurboQuantizer(dim, width).tables(self.device)
        table = torch.randint(
            256, (n, dim * width // 8 + wide), dtype=torch.uint8, device=self.device, generator=random
        )
        self.packed = table[:, wide:]
        self.scales = (torch.rand(n, device=self.device, generator=random) + 0.5).half()
        self.bias = torch.randn(n, device=self.device, generator=random) if terms else None
        self.mask = torch.rand(n, device=self.device, generator=random) < 0.5 if terms else None
        self.queries = torch.randn(q, dim, device=self.device, generator=random)

    def scanner(self, config):
        return scan_triton.Scanner(
            self.queries, self.packed, self.scales, self.bias, self.mask, self.tables, False, config
        )

    def check(self, queries=None):
        """The kernel that is chosen for the case, several times: its warps race each other anew at each launch."""
        queries = slice(0, self.q) if queries is None else queries
        scanner = self.scanner(None)
        tile = scanner.config.tile
        assert scanner.config.groups
        scores = self.scanner(PLAIN).scores(queries, slice(0, self.n))
        beyond = scores.new_full((len(scores), -self.n % tile), -torch.inf)
        expected = torch.cat([scores, beyond], dim=1).view(len(scores), -1, tile).amax(dim=2)
        for _ in range(5):
            torch.testing.assert_close(scanner.maxima(queries), expected, rtol=0, atol=0)


@pytest.fixture(autouse=True)
def _poisoned(poisoned):
    """What is not written is NaN."""


@on_hopper
@pytest.mark.parametrize("terms", [False, True])
@pytest.mark.parametrize("q", [17, 64, 129])
@pytest.mark.parametrize("width", sorted(scan_hopper.WIDTHS))
def test_every_width(width, q, terms):
    Case(width, 1024, 60_077, q, terms).check()


@on_hopper
@pytest.mark.parametrize("n", [1, 63, 64, 65, 127, 128, 129, 1000])
def test_sizes(n):
    Case(4, 1024, n, 65).check()


@on_hopper
@pytest.mark.parametrize("dim", [256, 384, 768, 1536])
def test_dimensions(dim):
    Case(4, dim, 5_000, 70).check()


@on_hopper
def test_rows_of_a_larger_table_and_later_queries():
    case = Case(4, 1024, 3_000, 150, wide=48)
    case.check(slice(128, 150))


@on_hopper
def test_nothing_allowed():
    case = Case(4, 1024, 3_000, 70)
    case.mask[:] = False
    case.check()
    assert (case.scanner(None).maxima(slice(0, 70)) == -torch.inf).all()


@on_hopper
@pytest.mark.parametrize("width", [3, 4])
def test_searches_repeated(width):
    """From the third call on the launches are made again: the codes stay where they are, the queries do not."""
    case = Case(width, 1024, 60_077, 70)

    def search(rows):
        return kernels.scan(rows, case.packed, case.scales, case.bias, case.mask, case.tables, 5)

    again = kernels.repeated(search, case.device)
    for factor in (1.0, 2.0, -1.0, 0.5, -3.0):
        rows = case.queries * factor
        for found, expected in zip(again(rows), search(rows), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


@on_hopper
def test_rows_that_are_not_aligned_go_to_the_plain_kernel():
    case = Case(4, 1024, 3_000, 70, wide=8)
    assert case.scanner(None).config.groups == 0


@pytest.mark.parametrize("shared", [232_448, 101_376, 49_152])
@pytest.mark.parametrize("dim", [8, 100, 384, 1000, 1024, 1536, 4096])
@pytest.mark.parametrize("q", [1, 16, 17, 64, 65, 300, 4096])
def test_cuts_fit(q, dim, shared):
    """Queries and buffers fit into shared memory, chunks fill rows; where they cannot, there is no cut."""
    for width in (1, 2, 3, 4, 6, 8):
        config = scan_hopper.config_for(q, ((dim, width, "scalar"),), shared)
        if config is None:
            continue
        assert dim % 8 == 0
        assert dim * min(width, 4 if width != 3 else 1) // 8 % config.block_c == 0
        buffers = config.groups * scan_hopper.stages(config, dim, width, shared)
        chunk = 64 * config.block_c * (3 if width == 3 else 1)
        reduced = config.groups * 16 * config.block_q
        assert config.block_q * dim + buffers * (chunk + 16) + reduced + 1024 <= shared
        assert buffers >= 3 * config.groups
    assert scan_hopper.config_for(q, ((64, 4, "scalar"), (64, 2, "scalar")), shared) is None
    assert scan_hopper.config_for(q, ((1024, 4, "trellis"),), shared) is None
