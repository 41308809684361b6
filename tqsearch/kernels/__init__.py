"""The operations on packed codes: each documented once, here, and run by one of the backends.

Every op is a function of tensors and integers. `reference.py` holds each in plain torch, on any device: the
specification. A faster backend is a module of its own with functions of the same names and signatures, and `select` is
the only place that chooses between them.

An encoded row estimates its vector as `scale * levels`, in the rotated space. A rotated query q therefore scores a row
as `scale * <q, levels> + bias`: with bias 0 the inner product, with twice the query and bias -|x|^2 the negated squared
distance less |q|^2.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from tqsearch.errors import BackendError, InvalidInputError
from tqsearch.kernels import attention_reference, reference
from tqsearch.kernels.attention_operands import Compressed, Context, Dense
from tqsearch.kernels.bands import BandTable, along_trellis, row_bytes, trellis_bands

__all__ = [
    "BACKENDS",
    "BandTable",
    "Compressed",
    "Context",
    "Dense",
    "Encoded",
    "Rotated",
    "attention",
    "attention_backend",
    "encode",
    "inner_products",
    "launching_on",
    "reconstruct",
    "repeated",
    "rotate",
    "row_bytes",
    "scan",
    "select",
]

BACKENDS = ("auto", "reference", "triton")
PRECISIONS = ("int8", "exact")

# Widths that the Triton kernels decode: of keys and values, and of a scan. The others run in plain torch.
TRITON_WIDTHS = frozenset((0, 1, 2, 3, 4, 8))
SCAN_WIDTHS = TRITON_WIDTHS | {6}


class Encoded(NamedTuple):
    """What `encode` returns; see there."""

    packed: Tensor
    norms: Tensor
    dots: Tensor
    centre_products: Tensor


class Rotated(NamedTuple):
    """What `rotate` returns; see there."""

    values: Tensor
    squares: Tensor
    products: Tensor | None


def select(backend: str, device: torch.device) -> str:
    """The backend that runs an op which has a Triton kernel; the other ops are plain torch everywhere.

    It depends on its arguments and on what is installed, never on an exception caught on the way: an explicit backend
    that cannot run raises.

    Args:
        backend: "auto" (Triton on a GPU where it is installed), "reference" (plain torch) or "triton".
        device: where the codes are.

    Returns:
        "reference" or "triton".

    Raises:
        InvalidInputError: an unknown name.
        BackendError: the device, or Triton on it, cannot be used; the message names the remedy.
    """
    if backend not in BACKENDS:
        raise InvalidInputError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    if device.type not in ("cpu", "cuda"):
        raise BackendError(
            f"the codes must be on a cpu or cuda device, got {device}; move index or model with .to('cpu')"
        )
    installed = find_spec("triton") is not None
    if backend == "auto":
        return "triton" if device.type == "cuda" and installed else "reference"
    if backend == "triton":
        if not installed:
            raise BackendError("backend 'triton' needs Triton, which is not installed: pip install triton")
        if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise BackendError(
                "backend 'triton' needs the codes on a GPU, got cpu; move index or model with .to('cuda'), or set "
                "TRITON_INTERPRET=1 to run the kernels slowly in Triton's interpreter"
            )
    return backend


def launching_on(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU the current one, where Triton launches, if it is not: tensors may be on another."""
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return nullcontext()
    return torch.cuda.device(device)


def encode(
    vectors: Tensor,
    bands: tuple[BandTable, ...],
    factors: Tensor | None = None,
    orders: Tensor | None = None,
    *,
    centre: Tensor | None = None,
    unit: bool = False,
    backend: str = "auto",
) -> Encoded:
    """Centres, normalises, rotates, quantizes and packs rows.

    With z = x - centre (x / |x| - centre if `unit`) and u = R z sqrt(d) / |z| each coordinate's code is the number of
    its band's boundaries below it; along a trellis u's codes are those of `trellis.encode`.

    Args:
        vectors: (n, d) float32 on the device to work on, any strides, finite; Triton also takes float16 and bfloat16.
        bands: the coordinates' tables in order, sizes summing to d.
        factors: (rounds, d) float32 of the randomized Hadamard transform, as `rotation.Hadamard.tensors` gives them;
            None if the vectors are rotated already.
        orders: (rounds - 1, d) int64, or None.
        centre: (d,) float32, or None for zero.
        unit: whether rows are divided by their norms first (zero rows stay zero).
        backend: see `select`.

    Returns:
        packed: (n, row bytes) uint8, in the layout of `packing`, or of `trellis.pack`.
        norms: (n,) float32, |z|.
        dots: (n,) float32, <u, levels of the codes>; 0 for a zero z, whose codes are those of u = 0.
        centre_products: (n,) float32, <centre, z>; 0 without a centre.
    """
    if select(backend, vectors.device) == "triton":
        if along_trellis(bands):
            from tqsearch.kernels import viterbi_triton

            search = viterbi_triton.best_paths
            with launching_on(vectors.device):
                return Encoded(*reference.encode(vectors.float(), bands, factors, orders, centre, unit, search))
        from tqsearch.kernels import encode_triton

        with launching_on(vectors.device):
            return Encoded(*encode_triton.encode(vectors, bands, factors, orders, centre, unit))
    return Encoded(*reference.encode(vectors, bands, factors, orders, centre, unit))


def rotate(
    vectors: Tensor,
    factors: Tensor | None = None,
    orders: Tensor | None = None,
    *,
    centre: Tensor | None = None,
    unit: bool = False,
    factor: float = 1.0,
    backend: str = "auto",
) -> Rotated:
    """Centres, normalises and rotates rows: with z = x - centre (x / |x| - centre if `unit`) it makes factor R z.

    Args:
        vectors: (q, d) float32, any strides.
        factors, orders: as for `encode`; without factors nothing is rotated.
        centre: (d,) float32, or None for zero.
        unit: whether rows are divided by their norms first (zero rows stay zero).
        factor: what the values are multiplied by.
        backend: see `select`.

    Returns:
        values: (q, d) float32, factor R z.
        squares: (q,) float32, |z|^2; not finite exactly where a row is not, or where it overflows.
        products: (q,) float32, <centre, x> (x / |x| if `unit`); None without a centre.
    """
    if select(backend, vectors.device) == "triton" and factors is not None:
        from tqsearch.kernels import rotate_triton

        with launching_on(vectors.device):
            return Rotated(*rotate_triton.rotate(vectors, factors, orders, centre, unit, factor))
    return Rotated(*reference.rotate(vectors, factors, orders, centre, unit, factor))


def reconstruct(packed: Tensor, scales: Tensor, bands: tuple[BandTable, ...], *, backend: str = "auto") -> Tensor:
    """The rows' estimates in the rotated space.

    Args:
        packed: (n, row bytes) uint8.
        scales: (n,) floating point.
        bands: as in `encode`.
        backend: see `select`.

    Returns:
        (n, d) float32: scale times levels.
    """
    select(backend, packed.device)
    return reference.reconstruct(packed, scales, bands)


def inner_products(
    queries: Tensor, packed: Tensor, scales: Tensor, bands: tuple[BandTable, ...], *, backend: str = "auto"
) -> Tensor:
    """All inner products of rotated queries with encoded rows.

    Args:
        queries: (q, d) float32, rotated.
        packed: (n, row bytes) uint8.
        scales: (n,) floating point.
        bands: as in `encode`.
        backend: see `select`.

    Returns:
        (q, n) float32: scale[j] * <queries[i], levels[j]>.
    """
    select(backend, packed.device)
    return reference.inner_products(queries, packed, scales, bands)


def scan(
    queries: Tensor,
    packed: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    bands: tuple[BandTable, ...],
    k: int,
    *,
    precision: str = "int8",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The exact top k of the estimated scores, without writing the score matrix.

    Args:
        queries: (q, d) float32, rotated.
        packed: (n, row bytes) uint8.
        scales: (n,) floating point.
        bias: (n,) floating point, added to each row's score, or None.
        mask: (n,) bool, False for rows that may not be returned; or None.
        bands: as in `encode`.
        k: how many, >= 1.
        precision: "exact" for float32 queries and levels; "int8" lets a backend round both to int8 (Triton does).
        backend: see `select`; "auto" is "reference" where the plan has 5 or 7 bits, and along a trellis where a band
            before another is no multiple of 8 coordinates.

    Returns:
        scores: (q, min(k, n)) float32, descending; -inf where fewer rows are allowed.
        rows: (q, min(k, n)) int64; -1 where the score is -inf.
    """
    chosen = select(backend, packed.device)
    if precision not in PRECISIONS:
        raise InvalidInputError(f"precision must be one of {', '.join(map(repr, PRECISIONS))}, got {precision!r}")
    wrong = _unscannable(bands)
    if wrong and backend == "triton":
        raise BackendError(f"backend 'triton' has no kernel for {wrong}; use backend 'auto' or 'reference'")
    if chosen == "triton" and not wrong:
        from tqsearch.kernels import scan_triton

        with launching_on(queries.device):
            return scan_triton.scan(queries, packed, scales, bias, mask, bands, k, precision)
    return reference.scan(queries, packed, scales, bias, mask, bands, k)


def repeated(
    function: Callable[..., tuple[Tensor, ...]], device: torch.device, *, backend: str = "auto"
) -> Callable[..., tuple[Tensor, ...]]:
    """The function, which is to be called again and again: on a GPU that then costs the host less.

    Args:
        function: of rows (q, d) and hashable settings; what it reads besides stays where it is. Where it does nothing
            but run ops of this package, from its third call with rows of one shape on its launches are made again.
        device: of the rows.
        backend: see `select`.
    """
    if device.type == "cuda" and select(backend, device) == "triton":
        from tqsearch.kernels.relaunch import Relaunched

        return Relaunched(function)
    return function


def _unscannable(bands: tuple[BandTable, ...]) -> str:
    """What keeps a scan of the bands from Triton; empty for nothing."""
    if along_trellis(bands):
        odd = [size for size, _ in trellis_bands(bands)[:-1] if size % 8]
        return f"a trellis's band of {odd[0]} coordinates, no multiple of 8, before others" if odd else ""
    widths = {band.width for band in bands} - SCAN_WIDTHS
    return f"{min(widths)} bits" if widths else ""


def attention(
    query: Tensor,
    context: Context,
    *,
    scaling: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of a few queries, the last tokens of the context, to dense and compressed keys and values.

    softmax(scaling <q, k>) v over all T tokens of the context, with k = s R^T levels + offset for compressed keys and
    v = s R^T levels for compressed values. The compressed states are read as they are, never written out decoded.

    Args:
        query: (B, Hq, Tq, D) float32, float16 or bfloat16; Hq a multiple of the context's heads.
        context: sinks, compressed and recent tokens; see `Context`.
        scaling: what inner products are multiplied by.
        mask: (B, 1, Tq, T), bool (True: seen) or added to the logits; None for causal among the last Tq tokens.
        softcap: logits become softcap tanh(logits / softcap), before the mask; None for no such thing.
        s_aux: (Hq,) logits of a token without value that every query sees besides; None for none.
        sliding_window: a query sees the tokens less than so many before it, whatever the mask says; None for all.
        backend: see `select`; where Triton has no kernel for the shapes (head dimensions above 256, widths of 5 to 7
            bits, blocks that are not a power of two from 32 to 256) "auto" is "reference".

    Returns:
        (B, Tq, Hq, D of the values), of the query's dtype; zeros for a query that sees nothing.
    """
    if attention_backend(context, backend, query.device) == "triton":
        from tqsearch.kernels import attention_triton

        with launching_on(query.device):
            return attention_triton.attention(query, context, scaling, mask, softcap, s_aux, sliding_window)
    return attention_reference.attention(query, context, scaling, mask, softcap, s_aux, sliding_window)


def attention_backend(context: Context, backend: str, device: torch.device) -> str:
    """Which backend `attention` runs for a context: "reference" or "triton"; it raises as `attention` does."""
    chosen = select(backend, device)
    wrong = _without_kernel(context)
    if wrong and backend == "triton":
        raise BackendError(f"backend 'triton' has no kernel for {wrong}; use backend 'auto' or 'reference'")
    return "reference" if wrong else chosen


def _without_kernel(context: Context) -> str:
    """What keeps attention to a context from Triton; empty for nothing."""
    for side in (context.keys, context.values):
        for band in side.bands:
            if band.width not in TRITON_WIDTHS:
                return f"{band.width} bits"
    dim = max(len(context.keys.rotation), len(context.values.rotation))
    if dim > 256:
        return f"head dimension {dim}"
    if context.compressed:
        block = context.compressed // context.values.packed.shape[2]
        if block not in (32, 64, 128, 256):
            return f"blocks of {block} tokens"
    return ""
