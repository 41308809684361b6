"""Decode attention from packed keys and values in Triton: what is launched, and with what.

Three launches, and nothing waits for the device. (1) `attention_ends_triton.prepare` rotates the queries and rounds
them to 15 bits, as two int8 digits. (2) `attention_split_triton.split_kernel` splits the sequence: a program for a KV
head and a run of its blocks, and one for its dense tokens. (3) `attention_ends_triton.merge` joins the runs by their
log-sum-exp and rotates back once.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from tqsearch.kernels.attention_ends_triton import merge, prepare
from tqsearch.kernels.attention_layout import KeyLayout, ValueLayout, band_keys, key_layout, registers, value_layout
from tqsearch.kernels.attention_operands import Compressed, Context
from tqsearch.kernels.attention_split_triton import split_kernel
from tqsearch.kernels.bands import BandTable
from tqsearch.kernels.launch import Launcher, variant
from tqsearch.kernels.replay import kept

INTERPRETED = bool(triton.knobs.runtime.interpret)
LOG2_E = math.log2(math.e)


class Prepared(NamedTuple):
    """Queries as the kernels read them.

    Attributes:
        rows: R, query heads times queries of a program.
        row_blocks: programs that share a KV head's rows.
        digits: (B H row blocks, 2 R, slots) int8.
        factors: (B H row blocks, 1 + bands + biases, R) float32; see `prepare`.
        cut: the layout of the keys.
    """

    rows: int
    row_blocks: int
    digits: Tensor
    factors: Tensor
    cut: KeyLayout


def _assembled() -> bool:
    return not (INTERPRETED or torch.version.cuda is None)


@lru_cache(maxsize=16)
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _blocks_a_split(programs: int, blocks: int, device: torch.device) -> int:
    """Blocks a program takes: some 8 programs a multiprocessor, or 4 where each would have but few blocks."""
    few, many = (max(1, per * _processors(device) // programs) for per in _PROGRAMS)
    return max(-(-blocks // many), min(_FEW_BLOCKS, -(-blocks // few)))


_PROGRAMS = (4, 8)
_FEW_BLOCKS = 16
_CHUNK = 32  # slots a program prepares; divides those of a band
_WARPS, _STAGES = 4, 3


def _power(value: int, least: int = 16) -> int:
    return max(least, 1 << (value - 1).bit_length())


_prepare, _split, _merge = Launcher(prepare), Launcher(split_kernel), Launcher(merge)


@lru_cache(maxsize=16)
def _options(device: torch.device) -> dict[str, bool]:
    """Whether a kernel may start before the one whose results it awaits has ended."""
    if not _assembled() or device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return {}
    return {"launch_pdl": True}


def prepared(query: Tensor, keys: Compressed, offset: Tensor | None, factor: float) -> Prepared:
    """Rotates queries (B, Hq, Tq, D) and rounds them; logits come out `factor` times the inner products."""
    batch, query_heads, queries, dim = query.shape
    heads = keys.scales.shape[1]
    group = query_heads // heads
    device = query.device
    cut = _key_cut(keys.bands, _assembled(), device)
    rows = min(16, _power(group * queries, 4))
    row_blocks = -(-group * queries // rows)
    tasks, slots = batch * heads * row_blocks, len(cut.slots)
    biases = slots // _CHUNK
    digits = torch.empty((tasks, 2 * rows, slots), dtype=torch.int8, device=device)
    factors = torch.empty((tasks, 1 + len(cut.bands) + biases, rows), dtype=torch.float32, device=device)
    turned, offsets = _slot_rotation(keys.rotation, cut.slots), query if offset is None else offset
    strides = query.stride()[:3]
    _prepare(
        (tasks, biases, 1),
        (device, cut.serial, rows, dim, offset is None, variant((query, offsets), strides)),
        (query, turned, offsets, digits, factors, heads, group, queries, row_blocks, factor, *strides),
        lambda: {
            "R": rows,
            "SLOTS": slots,
            "BANDS": cut.bands,
            "STEPS": cut.steps,
            "OFFSETS": cut.offsets,
            "DK": dim,
            "DK2": _power(dim),
            "HAS_OFFSET": offset is not None,
            "CHUNK": _CHUNK,
            "DEPENDENT": bool(_options(device)),
        },
    )
    return Prepared(rows, row_blocks, digits, factors, cut)


def attention(
    query: Tensor,
    context: Context,
    scaling: float,
    mask: Tensor | None,
    softcap: float | None,
    s_aux: Tensor | None,
    sliding_window: int | None,
) -> Tensor:
    """See `kernels.attention`."""
    if query.stride(3) != 1:
        query = query.contiguous()
    batch, query_heads, count, key_dim = query.shape
    sinks, keys, values, recent, offset, counted = context
    heads, compressed = keys.scales.shape[1:]
    group, value_dim = query_heads // heads, recent.values.shape[3]
    sink_count, recent_count = sinks.keys.shape[2], recent.keys.shape[2]
    length = sink_count + compressed + recent_count
    block = compressed // values.packed.shape[2] if compressed else 128
    device, options = query.device, _options(query.device)
    factor = scaling * (LOG2_E if softcap is None else 2.0 * LOG2_E / softcap)
    cap = 0.0 if softcap is None else softcap * LOG2_E
    value_cut = _value_cut(values.bands, block, _assembled(), device)
    rows, row_blocks, digits, factors, key_cut = prepared(query, keys, offset, factor)
    tasks = len(digits)
    least = length if counted is None else length - recent_count + count  # tokens that there are for certain
    first_seen = 0 if sliding_window is None else max(0, least - count - sliding_window + 1)
    first_block = min(max(0, first_seen - sink_count), compressed) // block
    blocks = compressed // block - first_block
    blocks_a_split = _blocks_a_split(tasks, blocks, device) if blocks else 1
    splits = -(-blocks // blocks_a_split)

    # Of each run and row its output, its maximum and its sum.
    allocate = torch.zeros if any(band.width == 0 for band in values.bands) else torch.empty
    parts = allocate(tasks * (splits + 1) * rows * (value_dim + 2), dtype=torch.float32, device=device)
    out = torch.empty((batch, count, query_heads, value_dim), dtype=query.dtype, device=device)
    mask_strides = (0, 0, 0)
    if mask is not None:
        mask = mask.expand(batch, -1, count, length)
        mask_strides = mask.stride(0), mask.stride(2), mask.stride(3)
        if mask.dtype == torch.bool:
            mask = mask.view(torch.uint8)
    mask_kind = 0 if mask is None else (1 if mask.dtype == torch.uint8 else 2)
    causal = sliding_window is not None or (mask is None and length - recent_count > length - count + 1)
    causal_dense = sliding_window is not None or mask is None
    # fmt: off
    given = (
        query, keys.packed, keys.scales, values.packed, values.scales,
        sinks.keys, sinks.values, recent.keys, recent.values, query if mask is None else mask)
    numbers = (
        heads, group, count, row_blocks, compressed, sink_count, recent_count if counted is None else counted, splits,
        blocks_a_split, first_block,
        length + 1 if sliding_window is None else sliding_window, factor, cap)
    strides = (
        *query.stride()[:3], *sinks.keys.stride()[:3], *sinks.values.stride()[:3], *recent.keys.stride()[:3],
        *recent.values.stride()[:3], mask_strides[2])
    made = (digits, factors, key_cut.tables, value_cut.tables, value_cut.tokens, parts)
    # fmt: on
    _split(
        (tasks * (splits + 1), 1, 1),
        (
            (device, key_cut.serial, value_cut.serial, rows, key_dim, value_dim, block),
            (mask_kind, causal, causal_dense, softcap is None, counted is None),
            variant(given, strides),
        ),
        (*given, *made, *numbers, *strides, *mask_strides[:2]),
        lambda: {
            "R": rows,
            "SLOTS": digits.shape[2],
            "BIASES": digits.shape[2] // _CHUNK,
            "BLOCK": block,
            "KEY_ROW": keys.packed.shape[3] // block,
            "VALUE_BYTES": values.packed.shape[3],
            "KEY_BANDS": key_cut.bands,
            "KEY_ASSEMBLIES": key_cut.assemblies,
            "VALUE_BANDS": value_cut.bands,
            "VALUE_ASSEMBLIES": value_cut.assemblies,
            "VALUE_ORDERS": value_cut.orders,
            "VALUE_ROWS": tuple(_power(band[6]) for band in value_cut.bands),
            "VALUE_STEPS": value_cut.steps,
            "VALUE_OFFSETS": value_cut.offsets,
            "VALUE_PLACES": (value_cut.places,),
            "REGISTERS": registers(band_keys(keys.bands), band_keys(values.bands)) if _assembled() else "",
            "TWOS": (2,) * (block.bit_length() - 1) + (2 * rows,),
            "DK": key_dim,
            "DV": value_dim,
            "DK2": _power(key_dim),
            "DV2": _power(value_dim),
            "MASK": mask_kind,
            "CAUSAL": causal,
            "CAUSAL_DENSE": causal_dense,
            "SOFTCAP": softcap is not None,
            "STAGES": _STAGES,
            "ASSEMBLED": _assembled(),
            "DEPENDENT": bool(options),
        },
        num_warps=_WARPS,
        num_stages=_STAGES,
        **options,
    )
    runs, width = splits + 1, _power(value_dim)
    runs2 = _power(runs)
    chunk = min(width, 16384 // width)
    aux = query if s_aux is None else s_aux
    _merge(
        (tasks, -(-value_dim // chunk), 1),
        (device, rows, value_dim, runs2, s_aux is None, out.dtype, variant((values.rotation, aux), ())),
        (parts, values.rotation, aux, out, heads, group, count, row_blocks, runs),
        lambda: {
            "R": rows,
            "DV": value_dim,
            "DV2": width,
            "RUNS2": runs2,
            "SOME": max(1, 8192 // (rows * width)),
            "CHUNK": chunk,
            "HAS_AUX": s_aux is not None,
            "DEPENDENT": bool(options),
        },
        num_warps=8,
        **options,
    )
    return out


_key_cuts: dict[tuple[object, ...], tuple[object, KeyLayout]] = {}
_value_cuts: dict[tuple[object, ...], tuple[object, ValueLayout]] = {}


def _key_cut(bands: tuple[BandTable, ...], assembled: bool, device: torch.device) -> KeyLayout:
    """The layout of keys, found by the identity of the bands: hashing their tables at each step takes long."""
    key = (id(bands), assembled, device)
    if key not in _key_cuts:
        if len(_key_cuts) >= 64:
            _key_cuts.clear()
        _key_cuts[key] = (bands, key_layout(band_keys(bands), assembled, device))  # held, so that their id stays theirs
    return kept(_key_cuts[key][1])


def _value_cut(bands: tuple[BandTable, ...], block: int, assembled: bool, device: torch.device) -> ValueLayout:
    """The layout of values, found likewise."""
    key = (id(bands), block, assembled, device)
    if key not in _value_cuts:
        if len(_value_cuts) >= 64:
            _value_cuts.clear()
        _value_cuts[key] = (bands, value_layout(band_keys(bands), block, assembled, device))
    return kept(_value_cuts[key][1])


_rotations: dict[tuple[int, int, torch.device], tuple[Tensor, Tensor]] = {}


def _slot_rotation(rotation: Tensor, slots: Tensor) -> Tensor:
    """The rotation's rows in the order of the slots, and a zero row where there is none; kept for both tensors."""
    key = (id(rotation), id(slots), slots.device)
    found = _rotations.get(key)
    if found is None or found[0] is not rotation:
        padded = torch.cat([rotation, rotation.new_zeros((1, rotation.shape[1]))])
        found = (rotation, padded[slots].contiguous())
        if len(_rotations) >= 64:
            _rotations.clear()
        _rotations[key] = found
    return kept(found[1])
