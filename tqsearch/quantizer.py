"""TurboQuantizer: vectors to codes of a few bits a dimension, and inner products straight from the codes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tqsearch import codec as codecs
from tqsearch import kernels
from tqsearch.arrays import ArrayLike, as_device, as_matrix, like
from tqsearch.band_tables import band_tables
from tqsearch.codebook import MAX_BITS
from tqsearch.codec import Codec, Levels
from tqsearch.codes import Codes, EncodedRows, Expected, joined
from tqsearch.errors import InvalidInputError
from tqsearch.kernels import BandTable
from tqsearch.modes import plainly
from tqsearch.plan import NUMBER, BitPlan
from tqsearch.qjl import QJL
from tqsearch.rotation import Hadamard, make_rotation
from tqsearch.training.basis import Basis

Form = Literal["mse", "prod"]

_BASIS_BLOCK = 1 << 21  # float64 numbers of a block while encoding in a learnt basis


class TurboQuantizer:
    """TurboQuant: a random rotation, then optimal scalar levels for each coordinate (arXiv 2504.19874).

    Form "mse" (algorithm 1) keeps `bits` a coordinate and one scale s = |x|^2 / <x, x_hat> a vector, with which
    s <q, x_hat> estimates <q, x> without bias (the correction of RaBitQ and EDEN). Form "prod" (algorithm 2) keeps
    bits - 1 a coordinate, the signs of a random projection of the residual (QJL) and the residual's norm. It is here
    because the paper has it: at equal bits its inner products are noisier at every width above 1.

    The levels are the Lloyd-Max levels of the exact law of a coordinate in dimension `dim`. With codec "trellis" a
    coordinate chooses among several times as many, by a code that runs along the row (`trellis`): a quarter to two
    fifths less squared error at the same bytes, but from 16 coordinates on. A CPU core then encodes 0.9 million
    coordinates a second. Bands of 0, 6 and 8 bits are the same with either codec.

    Args:
        dim: 1 to 8192.
        bits: width a coordinate: an integer from 1 to 8, a fraction, or a `BitPlan`; along a trellis 1 to 4.
        form: "mse" or "prod".
        rotation: "hadamard", "dense" or "identity" (the vectors' coordinates are alike already).
        seed: any integer; with the other arguments it defines the codec for ever.
        projection: of form "prod": "gaussian" (the paper's) or "orthogonal" (less noise).
        centre: (dim,) numbers taken off every vector before it is coded, such as the mean of a sample; None for zero.
        unit: whether vectors are divided by their norms first; their codes then stand for the unit vectors.
        basis: learnt axes, coded in place of the rotation's by the plan that they bring (`bits` is then not read); see
            `tqsearch.training`. A scale is then |A z|^2 / <A z, sigma levels>, near 1 for vectors like the sample: what
            lies outside the coded axes counts as zero.
        scale_dtype: torch.float32 or torch.float16; None for float16 where scales are near 1 / sqrt(dim), that is with
            `unit` and a plan that keeps bits of every coordinate, or with a basis; else float32.
        codec: "scalar" or "trellis"; form "prod" has the first only.
        device: where codes are made; None for the vectors' own device.
        backend: see `kernels.select`.

    Raises:
        InvalidInputError: an argument is out of range; the message says which.
    """

    def __init__(
        self,
        dim: int,
        bits: float | BitPlan = 4,
        *,
        form: Form = "mse",
        rotation: str = "hadamard",
        seed: int = 0,
        projection: Literal["gaussian", "orthogonal"] = "gaussian",
        scale_dtype: torch.dtype | None = None,
        centre: ArrayLike | None = None,
        unit: bool = False,
        basis: Basis | None = None,
        codec: Codec = "scalar",
        device: str | torch.device | None = None,
        backend: str = "auto",
    ) -> None:
        if form not in ("mse", "prod"):
            raise InvalidInputError(f"form must be 'mse' or 'prod', got {form!r}")
        if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
            raise InvalidInputError(f"seed must be an integer, got {seed!r}")
        self.rotation = make_rotation(rotation, dim, int(seed))
        self.dim, self.form, self.seed, self.backend = int(dim), form, int(seed), backend
        if basis is not None:
            if form == "prod":
                raise InvalidInputError("a basis goes with form 'mse' only")
            if basis.codec != codec:
                raise InvalidInputError(f"codec must be the basis's, {basis.codec!r}, got {codec!r}")
            bits = replace(basis.plan, expected_distortion=basis.distortion)
        self.basis = basis
        self.plan = BitPlan.of(self.dim, _less_one(bits) if form == "prod" else bits)
        self.codec = codecs.checked(codec, self.plan)
        if form == "prod" and codec != "scalar":
            raise InvalidInputError(f"codec must be 'scalar' for form 'prod', got {codec!r}")
        if form == "mse" and self.plan.bytes_per_vector == 0:
            raise InvalidInputError(f"bits must be above 0 for form 'mse', got the plan {self.plan}")
        if scale_dtype is None:
            near_one = basis is not None or (unit and all(band.width for band in self.plan.bands))
            scale_dtype = torch.float16 if near_one else torch.float32
        if scale_dtype not in (torch.float32, torch.float16):
            raise InvalidInputError(f"scale_dtype must be torch.float32 or torch.float16, got {scale_dtype}")
        self.scale_dtype = scale_dtype
        if form == "prod" and (unit or centre is not None):
            raise InvalidInputError("centre and unit go with form 'mse' only; take them off the vectors beforehand")
        self.unit = bool(unit)
        self.centre: Tensor | None = None
        if centre is not None:
            rows = as_matrix(centre, self.dim, "centre", torch.device("cpu"), one=True)
            if len(rows) != 1:
                raise InvalidInputError(f"centre must have shape ({self.dim},), got {tuple(centre.shape)}")
            self.centre = rows[0].clone()
        self.device = None if device is None else as_device(device)
        self.qjl = QJL(self.dim, self.seed, projection) if form == "prod" else None
        self._tables: dict[torch.device, tuple[BandTable, ...]] = {}

    def __repr__(self) -> str:
        codec = "" if self.codec == "scalar" else f", codec={self.codec!r}"
        return (
            f"TurboQuantizer(dim={self.dim}, plan={self.plan} = {self.row_bytes} bytes, form={self.form!r}, "
            f"rotation={self.rotation.name!r}{codec})"
        )

    @property
    def bytes_per_vector(self) -> int:
        """Bytes kept for each vector: codes, scale, and for form "prod" signs and residual norm."""
        extra = 0 if self.qjl is None else self.qjl.bytes_per_vector
        return self.row_bytes + self.scale_dtype.itemsize + extra

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of packed codes; along a trellis `plan.bytes_per_vector` where bands are multiples of 8."""
        return codecs.row_bytes(self.codec, self.plan)

    @property
    def compression_ratio(self) -> float:
        """Bytes of the vector in float32 over `bytes_per_vector`."""
        return 4 * self.dim / self.bytes_per_vector

    @property
    def distortion(self) -> float:
        """Expected |z - decode|^2 / |z|^2 of form "mse", z = x - centre: exact for a Haar rotation; of a basis, for
        Gaussian vectors of its variances; of a trellis, for long rows.
        """
        if self.basis is not None:
            return self.basis.distortion
        return codecs.plan_distortion(self.codec, self.plan, self.dim)

    @property
    def scanned_dim(self) -> int:
        """Coordinates that have codes as the kernels see them: all of a rotation, of a basis those of width above 0."""
        return self.dim if self.basis is None else self.basis.coded

    def tables(self, device: torch.device) -> tuple[BandTable, ...]:
        """The plan's bands with their float32 tables on a device, as the kernels take them."""
        if device not in self._tables:
            bands = self.plan.bands if self.basis is None else self.basis.scanned_bands
            levels: Levels = "optimal" if self.basis is None else self.basis.levels
            self._tables[device] = band_tables(bands, self.codec, self.scanned_dim, levels, device)
        return self._tables[device]

    @plainly
    def encode(self, vectors: ArrayLike) -> Codes:
        """Codes of vectors; equal vectors have equal codes, whatever batch they come in.

        Args:
            vectors: (n, dim) numpy or torch, float16, bfloat16, float32, float64 or integer, any strides, finite.

        Raises:
            InvalidInputError: wrong shape or dtype, or a value that is not finite (the first such row is named).
        """
        matrix = as_matrix(vectors, self.dim, "vectors", self.device)
        if self.qjl is None:
            rows = self.encode_rows(matrix)
            return Codes(rows.packed, rows.scales)
        encoded = self.encode_levels(matrix)
        scales = (encoded.norms / math.sqrt(self.dim)).to(self.scale_dtype)
        estimate = kernels.reconstruct(encoded.packed, scales, self.tables(matrix.device), backend=self.backend)
        residual = matrix - self.rotation.invert(estimate)
        return Codes(encoded.packed, scales, *self.qjl.encode(residual))

    def encode_rows(self, matrix: Tensor) -> EncodedRows:
        """Codes of checked rows, (n, dim) float32, form "mse", with what an index keeps beside them.

        Returns:
            packed: (n, row_bytes) uint8.
            scales: (n,) of the scale dtype; in float16 of a basis, infinite for a vector some 65,504 times longer than
                those of the sample.
            norms: (n,) float32, |z|, z = x - centre.
            centre_products: (n,) float32, <centre, z>; 0 without a centre.
            expected: of a basis with slopes, else None.
        """
        if self.basis is not None:
            return self._encode_in_basis(matrix, self.basis)
        encoded = self.encode_levels(matrix)
        scales = self.unbiased_scales(encoded.norms, encoded.dots)
        return EncodedRows(encoded.packed, scales, encoded.norms, encoded.centre_products)

    def _encode_in_basis(self, matrix: Tensor, basis: Basis) -> EncodedRows:
        """The sum over axes of y sigma levels weighs each by its variance, so it is taken here, not in the kernel."""
        centre = torch.zeros(self.dim, dtype=torch.float32, device="cpu") if self.centre is None else self.centre
        centre = centre.to(matrix.device).double()
        blocks = torch.split(matrix, max(1, _BASIS_BLOCK // self.dim))
        return joined([self._block_in_basis(block, basis, centre) for block in blocks])

    def _block_in_basis(self, matrix: Tensor, basis: Basis, centre: Tensor) -> EncodedRows:
        tables = self.tables(matrix.device)
        axes, sigma = basis.tensors(matrix.device)
        rows = matrix.double()
        if self.unit:
            lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
            rows = rows / torch.where(lengths > 0, lengths, 1.0)
        rows = rows - centre
        coordinates = rows @ axes.t()
        spread = coordinates / sigma
        largest = spread.abs().amax(dim=1, keepdim=True)  # float32 neither overflows nor vanishes
        spread = spread / torch.where(largest > 0, largest, 1.0)
        packed = kernels.encode(spread.float(), tables, backend=self.backend).packed
        ones = torch.ones(len(packed), dtype=torch.float32, device=matrix.device)
        levels = sigma * kernels.reconstruct(packed, ones, tables, backend=self.backend).double()
        dots = (coordinates * levels).sum(dim=1)
        squares = coordinates.square().sum(dim=1)
        exact = squares / torch.where(dots > 0, dots, math.inf)
        scales = exact.to(self.scale_dtype)
        norms, products = torch.linalg.vector_norm(rows, dim=1), rows @ centre
        expected = None
        if basis.slopes is not None:
            slopes, rest = basis.slopes_on(matrix.device)
            leaning = (coordinates * slopes * coordinates).sum(dim=1) + rest * (norms * norms - squares).clamp(min=0)
            estimate = (coordinates * slopes * levels).sum(dim=1)
            whole = estimate + levels @ (axes @ centre)
            matched = (products + leaning) / torch.where(whole > 0, whole, math.inf)
            matched = torch.maximum(torch.minimum(matched, 2 * exact), 0.5 * exact)
            expected = Expected(matched.to(self.scale_dtype), leaning - scales.double() * estimate)
        return EncodedRows(packed, scales, norms.float(), products.float(), expected)

    def scanned_queries(self, queries: Tensor) -> Tensor:
        """What `kernels.scan` takes for queries: rotated, or in the basis; (q, dim) to (q, scanned_dim) float32."""
        return self.rotation.apply(queries).contiguous() if self.basis is None else self.basis.queries(queries)

    def encode_levels(self, matrix: Tensor) -> kernels.Encoded:
        """Codes of checked rows, (n, dim) float32, with what their scales are made from; see `kernels.encode`.

        Of the rotation, not of a basis.
        """
        tables = self.tables(matrix.device)
        centre = None if self.centre is None else self.centre.to(matrix.device)
        factors, orders = None, None
        if isinstance(self.rotation, Hadamard):
            factors, orders = self.rotation.tensors(matrix.device)
        else:
            matrix = self.rotation.apply(matrix)
            centre = None if centre is None else self.rotation.apply(centre[None])[0]
        return kernels.encode(matrix, tables, factors, orders, centre=centre, unit=self.unit, backend=self.backend)

    def unbiased_scales(self, norms: Tensor, dots: Tensor) -> Tensor:
        """s = |x| sqrt(d) / <u, levels>, (n,); 0 where there is nothing to estimate (a zero vector)."""
        scales = norms * (math.sqrt(self.dim) / torch.where(dots > 0, dots, math.inf))
        return scales.to(self.scale_dtype)

    @plainly
    def decode(self, codes: Codes, *, unbiased: bool = False) -> Tensor:
        """Approximate vectors of codes.

        Args:
            codes: what `encode` returned.
            unbiased: for form "mse", False gives the estimate of least squared error; True the one whose inner product
                with any query equals `inner_product`, longer by 1 / (1 - distortion). Form "prod" is unbiased in any
                case.

        Returns:
            (n, dim) float32, on the codes' device.

        Raises:
            InvalidInputError: codes of another quantizer, as far as their shapes show it.
        """
        self._check(codes)
        scales = codes.scales.float()
        if self.qjl is None and not unbiased:
            scales = scales * (1.0 - (self.distortion if self.basis is None else self.basis.coded_distortion))
        tables = self.tables(codes.packed.device)
        levels = kernels.reconstruct(codes.packed, scales, tables, backend=self.backend)
        vectors = self.rotation.invert(levels) if self.basis is None else self.basis.invert(levels)
        if self.qjl is not None and codes.signs is not None and codes.residual_norms is not None:
            vectors = vectors + self.qjl.decode(codes.signs, codes.residual_norms)
        if self.centre is not None:
            vectors = vectors + self.centre.to(vectors.device)
        return vectors.contiguous()

    @plainly
    def inner_product(self, queries: ArrayLike, codes: Codes) -> ArrayLike:
        """Unbiased estimates of the inner products of queries with encoded vectors.

        Args:
            queries: (q, dim) or (dim,), dtypes as for `encode`.
            codes: n encoded vectors.

        Returns:
            (q, n) or (n,) float32: numpy for numpy queries, else torch on the queries' device.

        Raises:
            InvalidInputError: bad queries, or codes of another quantizer, as far as their shapes show it.
        """
        self._check(codes)
        device = codes.packed.device
        matrix = as_matrix(queries, self.dim, "queries", device, one=True)
        products = kernels.inner_products(
            self.scanned_queries(matrix), codes.packed, codes.scales, self.tables(device), backend=self.backend
        )
        if self.qjl is not None and codes.signs is not None and codes.residual_norms is not None:
            products = products + self.qjl.inner_product(matrix, codes.signs, codes.residual_norms)
        if self.centre is not None:
            products = products + (matrix @ self.centre.to(device))[:, None]
        return like(products[0] if queries.ndim == 1 else products, queries)

    def _check(self, codes: Codes) -> None:
        if not isinstance(codes, Codes):
            raise InvalidInputError(f"codes must be what encode returns, got {type(codes).__name__}")
        packed, scales = codes.packed, codes.scales
        if packed.ndim != 2 or packed.dtype != torch.uint8 or scales.shape != packed.shape[:1]:
            raise InvalidInputError(
                "codes must have packed (n, row bytes) of torch.uint8 and scales (n,), got "
                f"{tuple(packed.shape)} of {packed.dtype} and {tuple(scales.shape)}"
            )
        wanted, found = (self.row_bytes, self.qjl is not None), (codes.packed.shape[1], codes.signs is not None)
        if found != wanted:
            said = [f"{size} bytes a row {'and' if signs else 'without'} signs" for size, signs in (wanted, found)]
            raise InvalidInputError(f"codes must be of this quantizer, {said[0]}, got {said[1]}")


def _less_one(bits: float | BitPlan) -> float | BitPlan:
    if isinstance(bits, BitPlan):
        return BitPlan.from_pairs([(size, width - 1) for size, width in bits.pairs()])
    if isinstance(bits, bool) or not isinstance(bits, NUMBER) or not 1 <= bits <= MAX_BITS:
        raise InvalidInputError(
            f"bits must be a number from 1 to {MAX_BITS} or a BitPlan for form 'prod', got {bits!r}"
        )
    return float(bits) - 1
