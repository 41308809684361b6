"""The levels of packed trellis codes by look-up, several coordinates at a time, in plain torch.

A group of g neighbouring coordinates is decoded by their g path bits, the eight before them, and their bits of f: 12
bits at 1 bit a coordinate, 16 at 2 (g = 4), 14 at 3 and 16 at 4 (g = 2). So a table has at most 65,536 entries.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from tqsearch import trellis

GROUP = {1: 4, 2: 4, 3: 2, 4: 2}


def indices(path: Tensor, before: Tensor, planes: list[Tensor], group: int) -> Tensor:
    """Where in the table each group is.

    Args:
        path: (n, columns) uint8, a band's bytes of the path.
        before: likewise, the bytes one column before; 0 before the row.
        planes: of f, lowest bit first, each like `path`.
        group: coordinates of a group.

    Returns:
        (n, 8 columns / group) int32.
    """
    window = (path.int() << 8) | before.int()
    parts = []
    for first in range(0, 8, group):
        index = (window >> first) & ((1 << (8 + group)) - 1)
        for i, plane in enumerate(planes):
            index |= ((plane >> first) & ((1 << group) - 1)).int() << (8 + group * (i + 1))
        parts.append(index)
    return torch.stack(parts, dim=2).flatten(1)


@lru_cache(maxsize=16)
def table(bits: int, device: torch.device) -> Tensor:
    """The levels of every index: (2^(8 + group bits), group) float32, from rows that begin eight coordinates before."""
    group = GROUP[bits]
    every = torch.arange(1 << (8 + group * bits), dtype=torch.int32, device="cpu")[:, None]
    codes = (every >> torch.arange(8 + group, device="cpu")) & 1
    place = torch.arange(group, device="cpu")
    for i in range(1, bits):
        codes[:, 8:] |= ((every >> (8 + group * i + place)) & 1) << i
    return trellis.decode(codes.to(torch.uint8), [(8 + group, bits)])[:, 8:].contiguous().to(device)
