"""A small counter-based integer generator whose numbers never change.

Every random choice of a codec (signs, permutations, Gaussian entries) comes from here and not from a library's stream:
torch and numpy may change theirs in any release, and every saved file would then decode to noise.

The generator is SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014) read
at a counter. With `mix` its output function and all arithmetic modulo 2**64,

    key(seed, stream)  = mix(mix(seed + G) + stream * G)
    word(seed, stream, i) = mix(key + (i + 1) * G),        G = 0x9E3779B97F4A7C15.

Integer operations alone decide signs and permutations, so these are the same on every machine.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 0xFFFFFFFFFFFFFFFF


def _mix(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def words(seed: int, stream: int, count: int) -> npt.NDArray[np.uint64]:
    """The first `count` 64-bit words of one stream of a seed.

    Args:
        seed: any integer; taken modulo 2**64.
        stream: which of the seed's independent streams, >= 0.
        count: how many words, >= 0.

    Returns:
        (count,) uint64.
    """
    key = _mix((_mix((seed + _GOLDEN) & _MASK) + stream * _GOLDEN) & _MASK)
    counters = np.arange(1, count + 1, dtype=np.uint64)
    value = counters * np.uint64(_GOLDEN) + np.uint64(key)  # array arithmetic on uint64 wraps silently
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    result: npt.NDArray[np.uint64] = value ^ (value >> np.uint64(31))
    return result


def signs(seed: int, stream: int, count: int) -> npt.NDArray[np.float64]:
    """`count` random signs, (count,) float64 of -1 and 1: the top bit of each word (set means -1)."""
    result: npt.NDArray[np.float64] = 1.0 - 2.0 * (words(seed, stream, count) >> np.uint64(63)).astype(np.float64)
    return result


def permutation(seed: int, stream: int, count: int) -> npt.NDArray[np.int64]:
    """A random permutation of 0 .. count - 1, (count,) int64: the stable order of the words."""
    return np.argsort(words(seed, stream, count), kind="stable").astype(np.int64)


def gaussians(seed: int, stream: int, count: int) -> npt.NDArray[np.float64]:
    """`count` standard normal numbers, (count,) float64, by the Box-Muller transform of two uniforms each.

    Unlike signs and permutations these pass through `log` and `cos`, so they are the same everywhere only up to the
    last bit of float64; they are rounded to float32 wherever they are used.
    """
    raw = words(seed, stream, 2 * count)
    uniforms = ((raw >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # in (0, 1), never 0
    radius = np.sqrt(-2.0 * np.log(uniforms[:count]))
    result: npt.NDArray[np.float64] = radius * np.cos(2.0 * np.pi * uniforms[count:])
    return result
