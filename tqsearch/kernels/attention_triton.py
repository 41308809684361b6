"""Decode attention from packed keys and values in Triton: what is launched, and with what.

Three launches, and nothing waits for the device. (1) `attention_ends_triton.prepare` rotates the queries and rounds
them to 15 bits, as two int8 digits. (2) `attention_split_triton.split_kernel` splits the sequence: a program for a KV
head and a run of its blocks. (3) `attention_ends_triton.merge` attends to the dense tokens, joins the runs to them by
their log-sum-exp and rotates back once. Each is launched while the one before it still runs.
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


@lru_cache(maxsize=256)
def _most_splits(tasks: int, programs: int) -> int:
    """Splits of a task such that all run at once, or two or three rounds of them where that leaves fewer idle."""

    def busy(rounds: int) -> float:
        return max(1, rounds * programs // tasks) * tasks / (rounds * programs)

    rounds = next((rounds for rounds in (1, 2, 3) if 0.95 <= busy(rounds) <= 1.0), 3)
    return max(1, rounds * programs // tasks)


def _blocks_a_split(tasks: int, blocks: int, programs: int) -> int:
    """Blocks a program takes, of which `programs` run at once."""
    return max(_LEAST_BLOCKS, -(-blocks // _most_splits(tasks, programs)))


_LEAST_BLOCKS = 2
_CHUNK = 32  # slots a program prepares; divides those of a band
_STAGES = 3
_MERGED = 8192  # floats of the rotation that a program merges with
_SOME = 4096  # floats of runs that are joined at a time
_TOKENS = 64  # dense ones attended to at a time
_MERGED_ROWS = 4


def _shape(rows: int, dim: int, bits: int, masked: bool) -> tuple[int, int]:
    """Warps of a program, and how many programs a multiprocessor is given: what was fastest on an H200.

    Two warps run fewer instructions a token than four, where their registers suffice.
    """
    if rows > 4 or dim > 128 or bits > 4 or masked:
        return 4, 8
    return 2, 8 if bits <= 2 else 6  # as many as the registers hold


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
        **_options(device),
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
    bits = max((band.width for side in (keys, values) for band in side.bands), default=0)
    warps, programs = _shape(rows, max(key_dim, value_dim), bits, mask is not None)
    blocks_a_split = _blocks_a_split(tasks, blocks, programs * _processors(device))
    splits = -(-blocks // blocks_a_split)

    # Of each run and row its output, its maximum and its sum.
    allocate = torch.zeros if any(band.width == 0 for band in values.bands) else torch.empty
    parts = allocate(max(1, tasks * splits * rows * (value_dim + 2)), dtype=torch.float32, device=device)
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
    recents: int | Tensor = recent_count if counted is None else counted
    window = length + 1 if sliding_window is None else sliding_window
    masks = query if mask is None else mask
    coded = keys.packed, keys.scales, values.packed, values.scales, masks
    made = digits, factors, key_cut.tables, value_cut.tables, value_cut.tokens, parts
    # fmt: off
    numbers = (
        heads, group, count, row_blocks, compressed, sink_count, recents, splits, blocks_a_split, first_block, window,
        cap)
    # fmt: on
    if splits:
        _split(
            (tasks * splits, 1, 1),
            (
                (device, key_cut.serial, value_cut.serial, rows, value_dim, block),
                (mask_kind, causal, softcap is None, counted is None),
                variant(coded, mask_strides[2:]),
            ),
            (*coded, *made, *numbers, mask_strides[2], *mask_strides[:2]),
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
                "DV": value_dim,
                "MASK": mask_kind,
                "CAUSAL": causal,
                "SOFTCAP": softcap is not None,
                "STAGES": _STAGES,
                "ASSEMBLED": _assembled(),
                "DEPENDENT": bool(options),
            },
            num_warps=warps,
            num_stages=_STAGES,
            **options,
        )
    width, runs2 = _power(value_dim), _power(splits)
    chunk = min(width, _MERGED // width)
    chunks, merged = -(-value_dim // chunk), _MERGED_ROWS
    while merged > 1 and splits * merged * width > _SOME and tasks * chunks * rows // merged < _processors(device):
        merged //= 2
    # fmt: off
    given = (
        query, sinks.keys, sinks.values, recent.keys, recent.values, masks, values.rotation,
        query if s_aux is None else s_aux)
    strides = (
        *query.stride()[:3], *sinks.keys.stride()[:3], *sinks.values.stride()[:3], *recent.keys.stride()[:3],
        *recent.values.stride()[:3], mask_strides[2])
    # fmt: on
    _merge(
        (tasks, chunks, rows // merged),
        (
            (device, rows, merged, key_dim, value_dim, runs2, s_aux is None, mask_kind, causal_dense, softcap is None),
            (counted is None, out.dtype, variant(given, strides)),
        ),
        (
            *(*given, parts, out, heads, group, count, row_blocks, splits, compressed, sink_count, recents, window),
            *(factor, cap, *strides, *mask_strides[:2]),
        ),
        lambda: {
            "R": rows,
            "DK": key_dim,
            "DK2": _power(key_dim),
            "DV": value_dim,
            "DV2": width,
            "RUNS2": runs2,
            "SOME": max(1, _SOME // (merged * width)),
            "CHUNK": chunk,
            "ROWS": merged,
            "TOKENS": _TOKENS if query.element_size() == 2 else 16,
            "HAS_AUX": s_aux is not None,
            "MASK": mask_kind,
            "CAUSAL": causal_dense,
            "SOFTCAP": softcap is not None,
            "ASSEMBLED": _assembled(),
            "DEPENDENT": bool(options),
        },
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
