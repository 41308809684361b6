"""Oracles that share no code with the package: the definitions again, in plain Python, numpy float64 and scipy."""

import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import settings
from scipy import integrate, linalg, optimize, special, stats

# Kernels run compiled where there is a GPU, else in Triton's interpreter; Triton reads this when it is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("tqsearch", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("tqsearch")
torch.set_num_threads(1)

EPS = float(np.finfo(np.float32).eps)
MASK = 2**64 - 1


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks as "gpu" the tests of kernels and those that need a GPU, and skips what is slow unless it was asked for."""
    slow = pytest.mark.skip(reason="large; asked for with -m slow")
    for item in items:
        skips = " ".join(mark.kwargs.get("reason", "") for mark in item.iter_markers("skipif"))
        if "kernels" in item.path.parts or "GPU" in skips:
            item.add_marker("gpu")
        if "slow" not in config.option.markexpr and item.get_closest_marker("slow"):
            item.add_marker(slow)


@pytest.fixture
def files_up_to() -> Callable[[int], AbstractContextManager[None]]:
    """A context in which the system refuses to make a file larger than so many bytes, as on a full disk."""
    if sys.platform != "linux":
        pytest.skip("others end the process")
    import resource

    @contextmanager
    def limited(size: int) -> Iterator[None]:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    return limited


class SplitMix64:
    """The published sequential generator: add the golden gamma to the state, then mix."""

    def __init__(self, state: int) -> None:
        self.state = state & MASK

    def next(self) -> int:
        self.state = (self.state + 0x9E3779B97F4A7C15) & MASK
        z = self.state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        return z ^ (z >> 31)


@cache
def _lloyd(bits: int, dim: int | None) -> np.ndarray:
    """Positive optimal levels by scipy's root finder on the centroid equations, moments by incomplete betas."""
    count = 2 ** (bits - 1)
    top = np.inf if dim is None else math.sqrt(dim)
    if dim is not None:  # B(1/2, b), to more digits than by logarithms of the gamma function
        last = min(math.pi / 2, 40 / math.sqrt(dim))
        beta_function = 2 * integrate.quad(lambda a: math.cos(a) ** (dim - 2), 0, last, epsabs=0, epsrel=2e-14)[0]

    def centroid_error(half: np.ndarray) -> np.ndarray:
        edges = np.concatenate([[0.0], (half[1:] + half[:-1]) / 2, [top]])
        if dim is None:
            mass = np.diff(-stats.norm.sf(edges))
            first = -np.diff(stats.norm.pdf(edges))
        else:  # v = u^2 / d is Beta(1/2, (d - 1) / 2)
            v, b = np.minimum(edges**2 / dim, 1.0), (dim - 1) / 2
            mass = -np.diff(special.betaincc(0.5, b, v)) / 2
            first = -np.diff(special.betaincc(1.0, b, v)) * math.sqrt(dim) / (b * beta_function) / 2  # B(1, b) = 1 / b
        return half - first / mass

    quantiles = 0.5 + (np.arange(count) + 0.5) / (2 * count)  # optimal density of levels: the cube root of the law's
    if dim is None:
        start = stats.norm.ppf(quantiles) * math.sqrt(3)
    else:
        power = (dim - 3) / 6 + 1
        start = math.sqrt(dim) * (2 * stats.beta.ppf(quantiles, power, power) - 1)
    solution = optimize.root(centroid_error, start, method="hybr", options={"xtol": 1e-13})
    assert np.abs(centroid_error(solution.x)).max() < 1e-9, (bits, dim, solution.message)
    return solution.x


class Oracle:
    """The definitions, computed apart from the package."""

    eps = EPS
    splitmix64 = SplitMix64

    @staticmethod
    def words(seed: int, stream: int, count: int) -> list[int]:
        """`splitmix`'s docstring by the sequential generator: each mix(v) is the first output of state v - gamma."""
        first = SplitMix64(seed).next()
        gamma = 0x9E3779B97F4A7C15
        state = SplitMix64(first + stream * gamma - gamma).next()
        generator = SplitMix64(state)
        return [generator.next() for _ in range(count)]

    @classmethod
    def signs(cls, seed: int, stream: int, count: int) -> list[int]:
        return [-1 if word >= 2**63 else 1 for word in cls.words(seed, stream, count)]

    @classmethod
    def permutation(cls, seed: int, stream: int, count: int) -> list[int]:
        words = cls.words(seed, stream, count)
        return sorted(range(count), key=words.__getitem__)

    @classmethod
    def gaussians(cls, seed: int, stream: int, count: int) -> np.ndarray:
        uniforms = [((word >> 11) + 0.5) / 2**53 for word in cls.words(seed, stream, 2 * count)]
        pairs = zip(uniforms[:count], uniforms[count:], strict=True)
        return np.array([math.sqrt(-2 * math.log(r)) * math.cos(2 * math.pi * a) for r, a in pairs])

    @staticmethod
    def blocks(dim: int) -> list[int]:
        return [2**i for i in reversed(range(14)) if (dim // 2**i) % 2]

    @classmethod
    def block_hadamard(cls, rows: np.ndarray) -> np.ndarray:
        """Orthonormal Hadamard blocks along rows; a large block as a Kronecker product of two small ones."""
        parts, start = [], 0
        for size in cls.blocks(rows.shape[1]):
            left = 2 ** (size.bit_length() // 2)
            left = min(left, size)
            cube = rows[:, start : start + size].reshape(len(rows), left, size // left)
            a, b = linalg.hadamard(left).astype(float), linalg.hadamard(size // left).astype(float)
            parts.append((a @ cube @ b).reshape(len(rows), size) / math.sqrt(size))
            start += size
        return np.concatenate(parts, axis=1)

    @classmethod
    def rotate(cls, rows: np.ndarray, seed: int) -> np.ndarray:
        """The randomized Hadamard transform of `rotation`'s docstring, float64."""
        dim = rows.shape[1]
        out = rows.astype(np.float64)
        for r in range(3):
            if r and len(cls.blocks(dim)) > 1:
                out = out[:, cls.permutation(seed, 16 + r, dim)]
            out = cls.block_hadamard(out * np.array(cls.signs(seed, r, dim)))
        return out

    @staticmethod
    def lloyd(bits: int, dim: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Levels and boundaries of the optimal quantizer, float64."""
        if bits == 0:
            return np.zeros(1), np.zeros(0)
        half = _lloyd(bits, dim)
        levels = np.concatenate([-half[::-1], half])
        return levels, (levels[1:] + levels[:-1]) / 2

    @staticmethod
    def even(bits: int, dim: int | None) -> tuple[np.ndarray, float]:
        """Levels of equal distance about zero that have the least E (u - level)^2, by search, and that error."""
        places = np.arange(2**bits) - (2**bits - 1) / 2

        def error(step: float) -> float:
            edges = np.concatenate([[-np.inf], (places[1:] - 0.5) * step, [np.inf]])
            if dim is None:
                mass, first = np.diff(special.ndtr(edges)), -np.diff(stats.norm.pdf(edges))
            else:
                t, b = np.clip((1 + edges / math.sqrt(dim)) / 2, 0.0, 1.0), (dim - 1) / 2
                mass = np.diff(special.betainc(b, b, t))
                first = math.sqrt(dim) * (np.diff(special.betainc(b + 1, b, t)) - mass)
            return float(1 - 2 * (places * step * first).sum() + ((places * step) ** 2 * mass).sum())

        most = 4 * min(10.0, math.inf if dim is None else math.sqrt(dim)) / 2**bits
        best = optimize.minimize_scalar(error, bounds=(0.0, most), method="bounded", options={"xatol": 1e-12})
        return places * best.x, float(best.fun)

    @classmethod
    def distortion(cls, bits: int, dim: int | None) -> float:
        """E (u - nearest level)^2: 1 - E level^2, as each level is the mean of its cell."""
        levels, boundaries = cls.lloyd(bits, dim)
        if bits == 0:
            return 1.0
        half = levels[len(levels) // 2 :]
        edges = np.append(boundaries[len(half) - 1 :], np.inf if dim is None else math.sqrt(dim))
        if dim is None:
            mass = -np.diff(stats.norm.sf(edges))
        else:
            mass = -np.diff(special.betaincc(0.5, (dim - 1) / 2, np.minimum(edges**2 / dim, 1.0))) / 2
        return float(1 - 2 * np.sum(mass * half**2))

    @staticmethod
    def pack(codes: list[int], pairs: list[tuple[int, int]]) -> bytes:
        """A row, bit by bit, as the docstring of `packing` says."""
        row, start = bytearray(), 0
        for size, width in pairs:
            band, shift = codes[start : start + size], 0
            for plane in (8, 4, 2, 1):
                if not width & plane:
                    continue
                per_byte = 8 // plane
                out = bytearray(math.ceil(size * plane / 8))
                for i, code in enumerate(band):
                    slot = i % per_byte
                    if plane == 1:
                        slot = [0, 1, 4, 5, 2, 3, 6, 7].index(slot)
                    for bit in range(plane):
                        if code >> (shift + bit) & 1:
                            out[i // per_byte] |= 1 << (slot * plane + bit)
                row += out
                shift += plane
            start += size
        return bytes(row)

    @classmethod
    def tables(cls, pairs: list[tuple[int, int]], dim: int) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """Coordinates, levels and boundaries of each band."""
        start = 0
        for size, width in pairs:
            yield slice(start, start + size), *cls.lloyd(width, dim)
            start += size

    @classmethod
    def unit(cls, rows: np.ndarray, seed: int | None) -> np.ndarray:
        """Rotated rows (seed None: not rotated) scaled to squared norm d; zero rows stay zero."""
        rows = rows.astype(np.float64)
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        rotated = rows if seed is None else cls.rotate(rows, seed)
        return rotated * math.sqrt(rows.shape[1]) / np.where(norms > 0, norms, np.inf)

    @staticmethod
    def count_wrong_codes(codes: np.ndarray, unit: np.ndarray, tables: list, tolerance: float) -> int:
        """How many codes differ from the number of boundaries below the float64 value; raises if one does so by more
        than one step, or further than `tolerance` from the boundary between."""
        wrong = 0
        for rows, _, boundaries in tables:
            expected = np.searchsorted(boundaries, unit[:, rows], side="left")
            actual = codes[:, rows].astype(np.int64)
            where = np.nonzero(expected != actual)
            wrong += len(where[0])
            assert (np.abs(expected - actual)[where] == 1).all()
            between = boundaries[np.minimum(expected, actual)[where]]
            assert (np.abs(unit[:, rows][where] - between) <= tolerance).all()
        return wrong

    @staticmethod
    def rounding(dim: int) -> float:
        """A bound on |u32 - u64| of a coordinate: each of the K stages of the float32 pipeline adds an error of norm at
        most eps |u|, and |u| = sqrt(d)."""
        log = max(dim.bit_length(), 1)
        return (3 * (log + 1) + log + 6) * EPS * math.sqrt(dim)


def z_score(samples: np.ndarray, expected: float) -> float:
    """How many standard errors the mean of independent samples lies from its expectation."""
    samples = np.asarray(samples, dtype=np.float64).ravel()
    return float((samples.mean() - expected) / (samples.std(ddof=1) / math.sqrt(samples.size)))


@pytest.fixture(scope="session")
def oracle() -> type[Oracle]:
    """The definitions, apart from the package."""
    return Oracle


@pytest.fixture(scope="session")
def z() -> Callable[[np.ndarray, float], float]:
    """`z_score`: tests ask for less than 5, which a correct build misses with probability 6e-7."""
    return z_score


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20240607)
