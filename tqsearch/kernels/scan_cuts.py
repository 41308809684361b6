"""How a scan is cut into programs and steps: the choices, by width and number of queries."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from tqsearch.plan import Band, planes_of


class Config(NamedTuple):
    """How a scan is cut.

    Attributes:
        block_q: queries a program.
        block_c: columns a step.
        tile: rows a step; of a tile one maximum is kept.
        num_warps: of a program.
        num_stages: of the software pipeline.
        programs: for each multiprocessor, each of which takes many tiles; 0: a program for each tile.
        resident: whether a program's queries stay in shared memory while it goes through its tiles.
        groups: of warps of `scan_gluon`, which then writes the maxima of tiles; 0: plain Triton does.
    """

    block_q: int
    block_c: int
    tile: int
    num_warps: int
    num_stages: int
    programs: int
    resident: bool
    groups: int = 0


# Chosen on an H200; by the widest band's width and the queries, up to so many.
_CONFIGS: dict[int, tuple[tuple[int, Config], ...]] = {
    1: (
        (8, Config(8, 128, 32, 1, 3, 12, True)),
        (16, Config(16, 128, 128, 2, 3, 4, True)),
        (64, Config(64, 128, 128, 4, 3, 2, True)),
        (128, Config(128, 64, 256, 8, 2, 1, True)),
    ),
    2: (
        (8, Config(8, 128, 32, 1, 3, 8, True)),
        (16, Config(16, 128, 64, 2, 3, 4, True)),
        (64, Config(64, 128, 128, 4, 2, 2, True)),
        (128, Config(64, 64, 128, 4, 2, 2, True)),
    ),
    3: (
        (8, Config(8, 64, 64, 4, 3, 3, True)),
        (16, Config(16, 64, 64, 4, 3, 3, True)),
        (64, Config(64, 32, 128, 4, 3, 0, False)),
        (128, Config(128, 32, 128, 4, 2, 2, False)),
    ),
    4: (
        (8, Config(8, 128, 64, 2, 4, 0, False)),
        (16, Config(16, 128, 128, 4, 3, 0, False)),
        (64, Config(64, 64, 128, 4, 3, 0, False)),
        (128, Config(128, 64, 128, 4, 3, 2, False)),
    ),
    6: (
        (16, Config(16, 64, 128, 4, 3, 0, False)),
        (64, Config(64, 32, 128, 4, 3, 0, False)),
        (128, Config(128, 32, 128, 4, 2, 0, False)),
    ),
    8: (
        (16, Config(16, 64, 128, 4, 3, 0, False)),
        (64, Config(64, 64, 128, 4, 3, 0, False)),
        (128, Config(128, 64, 128, 4, 3, 0, False)),
    ),
}
# The same along a trellis.
_TRELLIS_CONFIGS: dict[int, tuple[tuple[int, Config], ...]] = {
    1: (
        (16, Config(16, 128, 128, 4, 2, 0, False)),
        (64, Config(64, 64, 128, 4, 2, 0, False)),
        (128, Config(128, 32, 128, 4, 2, 0, False)),
    ),
    2: (
        (16, Config(16, 32, 128, 4, 3, 0, False)),
        (64, Config(64, 32, 128, 4, 3, 0, False)),
        (128, Config(128, 32, 128, 4, 2, 0, False)),
    ),
    3: (
        (16, Config(16, 32, 128, 4, 3, 0, False)),
        (64, Config(64, 64, 128, 4, 2, 0, False)),
        (128, Config(128, 32, 128, 4, 2, 0, False)),
    ),
    4: (
        (16, Config(16, 32, 128, 4, 3, 0, False)),
        (64, Config(64, 64, 128, 4, 2, 0, False)),
        (128, Config(128, 32, 128, 4, 2, 0, False)),
    ),
}
# Of several bands: sums of integers and of floats are alive, and whatever is wider spills registers.
_SEVERAL = ((16, Config(16, 32, 64, 4, 2, 3, True)), (64, Config(64, 32, 128, 8, 2, 0, False)))
_EXACT = Config(16, 16, 128, 8, 2, 0, False)  # small steps: they are unrolled, and compile in proportion
_RESERVE = 32_000  # bytes of shared memory beside queries and codes


Shapes = tuple[tuple[int, int, str], ...]  # of bands: size, width, codec


@lru_cache(maxsize=1024)
def config_for(queries: int, bands: Shapes, exact: bool, shared: int) -> Config:
    """How a scan of so many queries is cut, where a program may take so many bytes of shared memory.

    The columns a step divide the planes' bytes where 32 or more can.
    """
    if exact:
        return _EXACT
    along = any(codec == "trellis" for _, _, codec in bands)
    widest = max(width for _, width, codec in bands if codec == "trellis" or not along)
    choices = (_TRELLIS_CONFIGS if along else _CONFIGS)[widest]
    if sum(width > 0 for _, width, _ in bands) > 1:
        choices = _SEVERAL
    config = next((config for most, config in choices if queries <= most), choices[-1][1])
    planes = [size // 8 for size, _, codec in bands if codec == "trellis"]
    if not along:
        planes = [size * plane // 8 for size, width, _ in bands for plane in planes_of(width)]
    whole = next((c for c in (128, 64, 32) if c <= config.block_c and all(plane % c == 0 for plane in planes)), None)
    config = config._replace(block_c=whole or min(config.block_c, 32 if along else 64))
    coordinates, row = sum(size for size, _, _ in bands), sum(Band(size, width).nbytes for size, width, _ in bands)
    if config.resident and config.block_q * coordinates + config.num_stages * config.tile * row > shared - _RESERVE:
        return config._replace(resident=False, tile=128, num_warps=4, num_stages=3, programs=0)
    return config
