"""The order in which the scan's kernels read codes and queries: bands, columns and slots.

A band is read in columns (`decode_triton`, `trellis_triton`), which decode to parts; each entry of a part meets a slot
of the arranged queries.

Bands are summed up in *runs*: the products of a run's bands have one unit, so that integers are added, and only the
sums of runs are multiplied by their units and added as floats.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import count
from typing import NamedTuple

import numpy as np
import torch
import triton
from torch import Tensor

from tqsearch.kernels import trellis_triton
from tqsearch.kernels.bands import BandTable
from tqsearch.kernels.decode_triton import COLUMN_DIMS, assembly, slot_dims
from tqsearch.plan import planes_of
from tqsearch.trellis import row_bytes

INTERPRETED = bool(triton.knobs.runtime.interpret)
serials = count()


BandKey = tuple[int, int, str, tuple[float, ...], float, float]


class Layout(NamedTuple):
    """How bands are cut into columns and slots.

    Attributes:
        bands: what the kernels call BANDS.
        assemblies: what they call ASSEMBLIES.
        slots: (slots,) int32, the coordinate of each slot; the number of coordinates where there is none.
        ends: the end of each band's slots.
        runs: the number of each band's run, from 0 on.
        tables: (bands, 256) int8, or float32 when exact.
        steps: (bands, 2) float32, each band's step and offset; see `BandTable`.
        serial: no other layout has it.
    """

    bands: tuple[tuple[int, int, int, int, int, int, int], ...]
    assemblies: tuple[str, ...]
    slots: Tensor
    ends: tuple[int, ...]
    runs: tuple[int, ...]
    tables: Tensor
    steps: Tensor
    serial: int


def runs_of(widths: Sequence[int], along: bool = False) -> tuple[int, ...]:
    """The run of each band of codes, by the bands' widths; along a trellis each is one of its own.

    A band of more than 4 bits is a run of its own, and so are others, as long as there are fewer than three; the rest
    share one. The more bits, the more the rounding of queries is felt, which a common unit makes coarser.
    """
    runs: list[int] = []
    for place, width in enumerate(widths):
        shared = not along and place > 0 and width <= 4 and widths[place - 1] <= 4 and runs[-1] >= 2
        runs.append(0 if not runs else runs[-1] + (not shared))
    return tuple(runs)


@lru_cache(maxsize=64)
def layout_of(
    bands: tuple[BandKey, ...],
    block_c: int,
    exact: bool,
    aligned: bool,
    device: torch.device,
) -> Layout:
    """The layout of bands given as (size, width, codec, integers or levels by number, step, offset)."""
    assembled = not (exact or INTERPRETED or torch.version.cuda is None)
    on_path = [(size, width) for size, width, codec, *_ in bands if codec == "trellis"]
    if on_path:
        whole = all(size % 32 == 0 for size, _ in on_path)
    else:
        whole = all(size * p % (8 * block_c) == 0 for size, width, *_ in bands for p in planes_of(width))
    quad = assembled and aligned and whole
    dim = sum(size for size, *_ in bands)
    constants: list[tuple[int, int, int, int, int, int, int]] = []
    assemblies, slots, tables = [], [], []
    widths = [width for _, width, *_ in bands if width]
    runs = (0,) * len(widths) if exact else runs_of(widths, bool(on_path))
    first, slot = 0, 0
    path, f_plane, byte = 0, -(-sum(size for size, _ in on_path) // 8), row_bytes(on_path)
    for size, width, codec, values, _, _ in bands:
        if codec == "trellis":
            columns = -(-size // 8)
            constants.append((width, columns, path, f_plane, slot, trellis_triton.masks(width), runs[len(constants)]))
            assemblies.append(trellis_triton.assembly(width) if quad else "")
            dims = trellis_triton.slot_dims(-(-columns // block_c) * block_c, quad)
            path += columns
            f_plane += columns * (width - 1)
        elif width:
            columns = -(-size // COLUMN_DIMS[width])
            padded = -(-columns // block_c) * block_c
            planes = [-(-size * plane // 8) for plane in planes_of(width)]
            constants.append((width, columns, byte, planes[0], slot, 0, runs[len(constants)]))
            assemblies.append(assembly(width, [int(v) for v in values], quad) if assembled else "")
            dims = slot_dims(width, padded, quad)
            byte += sum(planes)
        if width:
            dims = dims.reshape(len(dims), -1, block_c).transpose(1, 0, 2).ravel()  # chunk by chunk, part by part
            slots.append(np.where(dims < size, first + dims, dim))
            tables.append(np.pad(np.array(values, np.float32 if exact else np.int8), (0, 256 - len(values))))
            slot += len(dims)
        first += size
    return Layout(
        tuple(constants),
        tuple(assemblies),
        torch.from_numpy(np.concatenate(slots).astype(np.int32)).to(device),
        tuple(np.cumsum([len(part) for part in slots]).tolist()),
        runs,
        torch.from_numpy(np.stack(tables)).to(device),
        torch.tensor(
            [[step, offset] for _, width, _, _, step, offset in bands if width], dtype=torch.float32, device=device
        ),
        next(serials),
    )


def keyed(bands: tuple[BandTable, ...], exact: bool) -> tuple[BandKey, ...]:
    """Bands as `layout_of` takes them."""
    along = any(band.codec == "trellis" for band in bands)
    left = iter(runs_of([band.width for band in bands if band.width], along))
    runs = [next(left) if band.width else -1 for band in bands]
    alone = [runs.count(run) == 1 for run in runs]
    return tuple([(b.size, b.width, b.codec, *entries(b, exact, a)) for b, a in zip(bands, alone, strict=True)])


def entries(band: BandTable, exact: bool, alone: bool = True) -> tuple[tuple[float, ...], float, float]:
    """What a band's table holds, and what its products are multiplied by and less of: step and offset.

    A band is alone where it is a run.
    """
    if exact:
        return tuple(band.levels.tolist()), band.step, band.offset
    if band.codec == "trellis":
        return trellis_triton.steps(band.width), band.step, trellis_triton.offset(band.width)
    if band.width == 1 and not alone:  # a step of the size of other bands' steps
        return (0, 32), band.step / 32, 32 * band.offset
    if band.width == 1:  # the code's bit as the top bit of a byte
        return (0, -128), -band.step / 128, -128 * band.offset
    return band.steps, band.step, band.offset
