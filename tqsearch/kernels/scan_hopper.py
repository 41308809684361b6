"""Which scans run in Gluon (`scan_gluon`) in place of plain Triton, how they are cut, and their launch."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from tqsearch.kernels.launch import Launcher
from tqsearch.kernels.scan_cuts import Config, Shapes
from tqsearch.kernels.scan_layout import INTERPRETED, Layout
from tqsearch.plan import planes_of

TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
_ROWS = 64  # of a product
_REGISTERS = {2: 232, 3: 160}  # of a thread, by groups
_RESERVE = 10_000  # bytes of shared memory beside queries and codes
_FEWEST_STAGES = 3  # buffers of a group
_FEWEST = 17  # queries: for fewer, plain Triton reads the codes as fast

# Chosen on an H200; by width and the queries, up to so many.
_CONFIGS: dict[int, tuple[tuple[int, Config], ...]] = {
    1: ((64, Config(64, 32, 128, 4, 2, 0, False, 3)), (128, Config(128, 32, 256, 8, 2, 0, False, 2))),
    2: ((64, Config(64, 64, 128, 4, 2, 0, False, 2)), (128, Config(128, 64, 256, 8, 2, 0, False, 2))),
    3: ((64, Config(64, 32, 128, 4, 2, 0, False, 2)), (128, Config(128, 32, 256, 8, 2, 0, False, 2))),
    4: (
        (32, Config(32, 128, 128, 4, 2, 0, False, 2)),
        (64, Config(64, 128, 128, 4, 2, 0, False, 2)),
        (128, Config(128, 128, 128, 4, 2, 0, False, 2)),
    ),
}
WIDTHS = tuple(_CONFIGS)


@lru_cache(maxsize=64)
def available(device: torch.device) -> bool:
    """Whether a device is of compute capability 9.x, and Triton of a version whose Gluon is known."""
    if device.type != "cuda" or torch.version.cuda is None or INTERPRETED:
        return False
    return (3, 6) <= TRITON <= (3, 9) and torch.cuda.get_device_capability(device)[0] == 9


@lru_cache(maxsize=1024)
def config_for(queries: int, bands: Shapes, shared: int) -> Config | None:
    """How a scan of so many queries is cut, where a program may take so many bytes of shared memory.

    None where plain Triton is to run: for few queries, several bands, trellis codes, rows that are not whole chunks,
    queries that do not fit.
    """
    (size, width, codec), *others = bands
    if queries < _FEWEST or others or codec == "trellis" or width not in _CONFIGS:
        return None
    choices = _CONFIGS[width]
    config = next((config for most, config in choices if queries <= most), choices[-1][1])
    for block_q in (config.block_q, 64):
        for block_c in (128, 64, 32):
            whole = all(size * plane % (8 * block_c) == 0 for plane in planes_of(width))
            cut = config._replace(block_q=min(block_q, config.block_q), block_c=block_c)
            if block_c <= config.block_c and whole and stages(cut, size, width, shared) >= _FEWEST_STAGES:
                return cut
    return None


def stages(config: Config, size: int, width: int, shared: int) -> int:
    """Buffers of a group, where rows have so many coordinates of a width."""
    chunk = _ROWS * config.block_c * (3 if width == 3 else 1)
    return min(20, (shared - _RESERVE - config.block_q * size) // (config.groups * chunk))


@lru_cache(maxsize=1)
def launcher() -> Launcher:
    """Of `scan_gluon`, which is imported where it is needed: Gluon is not there in every version of Triton."""
    from tqsearch.kernels.scan_gluon import hopper_kernel

    return Launcher(hopper_kernel)


@lru_cache(maxsize=16)
def _block(columns: int, bits: int) -> tuple[list[int], Any]:
    """Shape and layout of a block of codes in shared memory, of columns of so many bits."""
    from triton.experimental.gluon.language import NVMMASharedLayout

    return [_ROWS, columns], NVMMASharedLayout(columns * bits // 8, bits, 2)


def _with_words(assembly: str) -> tuple[str, tuple[int, int]]:
    """The assembly of 4 bits with the first words of its two look-ups in $3 and $7, and these words."""
    first, second = (re.findall(f"prmt.b32 {into}, (0x[0-9a-f]+),", assembly)[0] for into in "ab")
    assembly = assembly.replace(f"a, {first},", "a, $3,").replace(f"b, {second},", "b, $7,")
    return assembly, (int(first, 16), int(second, 16))


def launch(
    config: Config,
    layout: Layout,
    operands: tuple[Tensor, ...],
    terms: tuple[bool, bool],
    out: Tensor,
    first_query: int,
    key: tuple[Any, ...],
    limits: tuple[int, int],
) -> None:
    """Writes the maxima of tiles, as `scan_kernel` does.

    Args:
        config: of `config_for`.
        layout: of the queries.
        operands: as `Scanner` gives them to `scan_kernel`.
        terms: whether there are a bias and a mask.
        out: (q, tiles) float32.
        first_query: a multiple of 16.
        key: see `Launcher`.
        limits: multiprocessors, and the bytes of shared memory that a program may take.
    """
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    packed, scales, bias, mask, values, alpha, beta, _ = operands
    width, columns, _, plane, *_ = layout.bands[0]
    count, tiles = out.shape
    blocks = -(-count // config.block_q)
    programs = max(1, min(-(-tiles // config.groups), limits[0] // blocks))

    def blocked(codes: Tensor, bits: int) -> Any:
        return TensorDescriptor(codes, list(codes.shape), list(codes.stride()), *_block(config.block_c, bits))

    def constants() -> dict[str, Any]:
        from tqsearch.kernels.scan_gluon import Cut

        size = layout.ends[-1]
        assembly, words = _with_words(layout.assemblies[0]) if width == 4 else (layout.assemblies[0], (0, 0))
        return {
            "CUT": Cut(
                width=width,
                assembly=assembly,
                words=words,
                block_q=config.block_q,
                block_c=config.block_c,
                chunks=columns // config.block_c,
                plane=plane,
                tile=config.tile,
                groups=config.groups,
                stages=stages(config, size, width, limits[1]),
                registers=_REGISTERS[config.groups],
                has_bias=terms[0],
                has_mask=terms[1],
            )
        }

    narrow = blocked(packed, 8)
    codes = blocked(packed.view(torch.uint16), 16) if width == 3 else narrow
    launcher()(
        (programs * blocks, 1, 1),
        key,
        (scales, bias, mask, alpha, beta, values, out, codes, narrow, len(packed), first_query, count, tiles, programs),
        constants,
        num_warps=4,
    )
