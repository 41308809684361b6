"""Trellis codes by their definition, a coordinate at a time, in numpy and float64. Nothing here imports tqsearch."""

import math

import numpy as np

Pairs = list[tuple[int, int]]  # (size, bits) of each band that has codes

# The parities in octal, as codes are tabulated: bit j is the path bit j coordinates back; the number's low bit first.
POLYNOMIALS = {1: (0o332, 0o236, 0o523), 2: (0o354, 0o212, 0o515), 3: (0o362, 0o515), 4: (0o362, 0o515)}
# The upper half of the levels is (integer + 1/2) step, the lower half its mirror image.
UPPER = {
    1: (0.0252326, (10, 22, 25, 60)),
    2: (0.0339498, (2, 7, 12, 19, 24, 33, 41, 62)),
    3: (0.0393776, (2, 7, 12, 18, 24, 33, 45, 63)),
    4: (0.0243322, (1, 5, 8, 12, 16, 20, 24, 29, 34, 40, 47, 55, 65, 78, 95, 120)),
}


def level_table(bits: int) -> np.ndarray:
    """All levels, ascending."""
    step, upper = UPPER[bits]
    half = (np.array(upper, dtype=np.float64) + 0.5) * step
    return np.concatenate([-half[::-1], half])


def widths_of(pairs: Pairs) -> list[int]:
    return [bits for size, bits in pairs for _ in range(size)]


def levels_of(codes: list[int], pairs: Pairs) -> np.ndarray:
    """The levels of one row's codes: the path's last nine bits are kept as an integer."""
    window, levels = 0, []
    for code, bits in zip(codes, widths_of(pairs), strict=True):
        window = (2 * window + code % 2) % 512
        number = code // 2
        for polynomial in reversed(POLYNOMIALS[bits]):
            number = 2 * number + (window & polynomial).bit_count() % 2
        levels.append(level_table(bits)[number])
    return np.array(levels)


def row_bytes(pairs: Pairs) -> int:
    """The path's plane is of all bands; each other plane begins on a whole byte."""
    return math.ceil(sum(size for size, _ in pairs) / 8) + sum((b - 1) * math.ceil(size / 8) for size, b in pairs)


def pack(codes: list[int], pairs: Pairs) -> bytes:
    """One row's bytes, bit by bit."""

    def plane(bits: list[int]) -> bytes:
        out = bytearray(math.ceil(len(bits) / 8))
        for t, bit in enumerate(bits):
            out[t // 8] |= bit << t % 8
        return bytes(out)

    row, start = plane([code % 2 for code in codes]), 0
    for size, bits in pairs:
        for i in range(1, bits):
            row += plane([code >> i & 1 for code in codes[start : start + size]])
        start += size
    return row


def unpack(row: bytes, pairs: Pairs) -> list[int]:
    """One row's codes."""
    dim = sum(size for size, _ in pairs)
    codes, byte, start = [row[t // 8] >> t % 8 & 1 for t in range(dim)], math.ceil(dim / 8), 0
    for size, bits in pairs:
        for i in range(1, bits):
            for t in range(size):
                codes[start + t] |= (row[byte + t // 8] >> t % 8 & 1) << i
            byte += math.ceil(size / 8)
        start += size
    assert byte == len(row)
    return codes


def least_error(values: np.ndarray, pairs: Pairs) -> float:
    """The least squared error of a row over all walks: the best of every set of last eight path bits, forward."""
    best = {0: 0.0}
    for value, bits in zip(values.tolist(), widths_of(pairs), strict=True):
        table, after = level_table(bits), {}
        nearest = [float(np.square(value - table[low :: 1 << len(POLYNOMIALS[bits])]).min()) for low in range(8)]
        for state, error in best.items():
            for window in (2 * state, 2 * state + 1):
                low = sum((window & p).bit_count() % 2 << i for i, p in enumerate(POLYNOMIALS[bits]))
                key = window % 256
                after[key] = min(after.get(key, math.inf), error + nearest[low])
        best = after
    return min(best.values())
