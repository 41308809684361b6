"""Scans of several bands that run in Gluon (`scan_bands_gluon`): their steps, how they are cut, and their launch."""

from __future__ import annotations

import re
from collections.abc import Hashable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tqsearch.kernels import scan_hopper
from tqsearch.kernels.decode_triton import EVEN, assembly, slot_dims
from tqsearch.kernels.launch import Launcher, variant
from tqsearch.kernels.scan_cuts import Config
from tqsearch.kernels.scan_layout import BandKey, Layout, runs_of, serials
from tqsearch.plan import planes_of

_PARTS = {1: 8, 2: 4, 3: 8, 4: 4, 6: 4, 8: 2}  # of a column: a byte at 1 and 2 bits, else two of the wider plane
_TILE = 64
RESCORED = Config(16, 32, _TILE, 4, 2, 3, True)  # how plain Triton scores the chosen tiles
_RESERVE = 2_000  # bytes of shared memory beside queries and codes


class Cut(NamedTuple):
    """How a scan is cut.

    Attributes:
        block_q: queries a program.
        columns: a step, at most.
        stages: buffers of a group.
        groups: of four warps.
        programs: for each multiprocessor.
        registers: a thread may take; None where the programs do not need to be more than one.
    """

    block_q: int
    columns: int
    stages: int
    groups: int
    programs: int
    registers: int | None


# Chosen on an H200; by the queries, up to so many; the first that fits into shared memory.
_CUTS = (
    (8, (Cut(8, 64, 3, 1, 4, 128), Cut(8, 32, 3, 1, 2, None))),
    (16, (Cut(16, 64, 3, 1, 4, 128), Cut(16, 32, 3, 1, 2, None))),
    (64, (Cut(64, 32, 4, 1, 2, None), Cut(64, 16, 3, 1, 1, None))),
    (128, (Cut(128, 32, 4, 2, 1, None), Cut(128, 16, 3, 2, 1, None), Cut(64, 16, 3, 2, 1, None))),
)


class Step(NamedTuple):
    """A piece of a band; see `scan_bands_gluon`.

    Attributes:
        width: bits a code.
        parts: that its columns decode to.
        columns: 16, 32 or 64.
        valid: of them, those that the band has.
        wide: the byte of a row where they begin in the wider plane, where columns have two bytes.
        narrow: likewise in the plane of one byte a column.
        slot: the first of the queries' slots.
        piece: the first block of queries in shared memory, counted among those of as many columns.
        band: its number among those of codes.
        run: see `scan_layout.runs_of`.
        ends: whether it is the run's last.
        assembly: decodes four columns.
    """

    width: int
    parts: int
    columns: int
    valid: int
    wide: int
    narrow: int
    slot: int
    piece: int
    band: int
    run: int
    ends: bool
    assembly: str


class Steps(NamedTuple):
    """The steps of a plan, and the layout by which queries are arranged for them."""

    steps: tuple[Step, ...]
    layout: Layout
    copied: int  # bytes that all offsets are multiples of: 16, 8 or 4


def available(device: torch.device) -> bool:
    """Whether `scan_bands_gluon` runs there: as `scan_gluon`, but for Triton 3.8.

    3.8 refuses to take part of a buffer for one of another type; 3.6, 3.7 and 3.9 compile it.
    """
    return scan_hopper.available(device) and scan_hopper.TRITON != (3, 8)


def decodable(bands: tuple[BandKey, ...]) -> bool:
    """Whether there are several bands, scalar and of widths and numbers that need no table in memory."""
    coded = [band for band in bands if band[1]]
    return len(coded) > 1 and all(
        codec == "scalar" and width in _PARTS and (width <= 4 or numbers == EVEN[width])
        for _, width, codec, numbers, _, _ in coded
    )


@lru_cache(maxsize=1024)
def cut_of(queries: int, bands: tuple[BandKey, ...], row: int, begin: int, shared: int) -> Cut | None:
    """How a scan of so many queries is cut, where a program may take so many bytes of shared memory.

    None where the queries do not fit, or rows, that begin so many bytes after a multiple of 16, are not of whole words.
    """
    cuts = next((cuts for most, cuts in _CUTS if queries <= most), _CUTS[-1][1])
    for cut in cuts:
        steps, slots, offsets = _cut_into_steps(bands, cut.columns)
        if begin or any(offset % 4 for offset in (row, *offsets)):
            return None
        wide = max([2 * step.columns for step in steps if step.width >= 3], default=32)
        narrow = max([step.columns for step in steps if step.width in (1, 2, 3, 6)], default=16)
        unused = sum(2 * columns for columns in (16, 32, 64) if all(step.columns != columns for step in steps))
        needed = cut.block_q * (len(slots) + unused) + cut.groups * cut.stages * _TILE * (wide + narrow) + _RESERVE
        if needed * cut.programs <= shared:
            return cut
    return None


@lru_cache(maxsize=64)
def steps_of(bands: tuple[BandKey, ...], columns: int, layout: Layout, row: int, device: torch.device) -> Steps:
    """The steps of bands of at most so many columns, with the units and runs of a layout of the same bands."""
    steps, slots, offsets = _cut_into_steps(bands, columns)
    copied = next(c for c in (16, 8, 4) if all(offset % c == 0 for offset in (row, *offsets)))
    first = [step for place, step in enumerate(steps) if place == 0 or steps[place - 1].band != step.band]
    ends = (*[step.slot for step in first[1:]], len(slots))
    arranged = layout._replace(
        bands=tuple([(step.width, 0, 0, 0, step.slot, 0, step.run) for step in first]),
        slots=torch.from_numpy(slots).to(device),
        ends=ends,
        serial=next(serials),
    )
    return Steps(steps, arranged, copied)


@lru_cache(maxsize=64)
def _cut_into_steps(
    bands: tuple[BandKey, ...], most: int
) -> tuple[tuple[Step, ...], npt.NDArray[np.int32], tuple[int, ...]]:
    """Steps, the coordinate of each slot (the number of coordinates where there is none), and the planes' offsets."""
    coded = [width for _, width, *_ in bands if width]
    runs, dim = runs_of(coded), sum(size for size, *_ in bands)
    steps: list[Step] = []
    slots: list[npt.NDArray[np.int64]] = []
    offsets: list[int] = []
    pieces = {16: 0, 32: 0, 64: 0}
    first, byte, slot, number = 0, 0, 0, 0
    for size, width, _, numbers, _, _ in bands:
        if width:
            parts = _PARTS[width]
            total = -(-size // parts)
            planes = [-(-size * plane // 8) for plane in planes_of(width)]
            narrow = byte + (planes[0] if width in (3, 6) else 0)
            offsets += [byte, narrow]
            dims, place = _slot_dims(width, -(-total // 64) * 64), 0
            while place < total:
                left = total - place
                columns = next(c for c in (64, 32, 16) if c == 16 or (c <= most and left > c * 3 // 4))
                part = dims[:, place : place + columns].ravel()
                last = place + columns >= total
                ends = last and (number + 1 == len(coded) or runs[number + 1] != runs[number])
                steps.append(
                    Step(
                        width,
                        parts,
                        columns,
                        min(columns, left),
                        byte + 2 * place if width >= 3 else 0,
                        narrow + place if width in (1, 2, 3, 6) else 0,
                        slot,
                        pieces[columns],
                        number,
                        runs[number],
                        ends,
                        _assembly(width, [int(n) for n in numbers]),
                    )
                )
                slots.append(np.where(part < size, first + part, dim))
                pieces[columns] += parts // 2
                slot += len(part)
                place += columns
            byte += sum(planes)
            number += 1
        first += size
    return tuple(steps), np.concatenate(slots).astype(np.int32), tuple(offsets)


def _slot_dims(width: int, columns: int) -> npt.NDArray[np.int64]:
    """Which coordinate of the band each entry of the parts is: (parts, columns) int64.

    As `decode_triton.slot_dims`, but that columns of 4 and 8 bits have two bytes.
    """
    if width in (4, 8):
        four, place = np.arange(columns) // 4, np.arange(columns) % 4
        parts = _PARTS[width]
        return np.stack([4 * parts * four + 4 * part + place for part in range(parts)])
    return slot_dims(width, columns, True)


def _assembly(width: int, numbers: list[int]) -> str:
    """The PTX that decodes four columns."""
    if width == 8:
        return "xor.b32 $0, $2, 0x80808080;\nxor.b32 $1, $3, 0x80808080;"
    if width != 4:
        return assembly(width, numbers, True)
    begin, *lines, end = assembly(4, numbers, True).split("\n")  # $0 and $1 from $2
    halves = []
    for names in ("014", "235"):
        halves += [re.sub(r"\$(\d)", lambda found: f"${names[int(found[1])]}", line) for line in lines]  # noqa: B023
    return "\n".join([begin, *halves, end])


@lru_cache(maxsize=1)
def launcher() -> Launcher:
    """Of `scan_bands_gluon`, which is imported where it is needed: Gluon is not there in every version of Triton."""
    from tqsearch.kernels.scan_bands_gluon import bands_kernel

    return Launcher(bands_kernel)


class BandScan(NamedTuple):
    """A scan as the kernel takes it.

    Attributes:
        cut: how.
        steps: of the plan.
        operands: codes, scales, bias, mask, and the queries arranged by `steps.layout`: values, alpha and beta.
        has_bias: whether there is a bias.
        has_mask: whether there is a mask.
    """

    cut: Cut
    steps: Steps
    operands: tuple[Tensor, ...]
    has_bias: bool
    has_mask: bool

    def _key(self) -> tuple[Hashable, ...]:
        """Of the variant; first queries and strides of queries are multiples of 16."""
        row = self.operands[0].stride(0)
        return (self.cut, self.steps.layout.serial, row, self.has_bias, self.has_mask, *variant(self.operands, ()))

    def compiled(self) -> bool:
        """Whether the kernel is."""
        return self._key() in launcher()

    def launch(self, out: Tensor, first_query: int, processors: int) -> None:
        """Writes the maxima of tiles of `RESCORED.tile` rows, (q, tiles) float32."""
        cut, (count, tiles) = self.cut, out.shape
        packed, values, alpha = self.operands[0], self.operands[4], self.operands[5]
        blocks = -(-count // cut.block_q)
        programs = max(1, min(-(-tiles // cut.groups), processors * cut.programs // blocks))

        def constants() -> dict[str, object]:
            from tqsearch.kernels import scan_bands_gluon

            terms = self.has_bias, self.has_mask
            row, slots = packed.stride(0), values.shape[1]
            steps, copied = self.steps.steps, self.steps.copied
            made = scan_bands_gluon.Cut(steps, cut.block_q, cut.stages, cut.groups, row, slots, copied, *terms)
            return {"CUT": made}

        launcher()(
            (programs * blocks, 1, 1),
            self._key(),
            (*self.operands, out, len(packed), first_query, count, alpha.shape[1], tiles, programs),
            constants,
            num_warps=4,
            **({} if cut.registers is None else {"maxnreg": cut.registers}),
        )
