"""What a cache holds, measured from the storages of its tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from tqsearch.kernels import trellis_lookup
from tqsearch.kernels.bands import trellis_bands
from tqsearch.kvcache.history import History
from tqsearch.kvcache.layer import TurboQuantLayer
from tqsearch.kvcache.store import StateCodec

if TYPE_CHECKING:
    from tqsearch.kvcache.cache import TurboQuantCache

# Parts of a compressed layer, as the table names them.
PARTS = {
    "keys.packed": "key codes",
    "keys.scales": "key scales",
    "keys.offset": "key offset",
    "keys.order": "key offset",
    "keys.gain": "key offset",
    "values.packed": "value codes",
    "values.scales": "value scales",
    "keys.sinks": "sinks",
    "values.sinks": "sinks",
    "keys.recent": "recent",
    "values.recent": "recent",
}
OTHER = "other"
_COLUMNS = (*dict.fromkeys(PARTS.values()), OTHER)


@dataclass(frozen=True)
class LayerReport:
    """One layer of a cache.

    Attributes:
        layer: its number in the model.
        kind: the class of its cache.
        compressed: whether its keys and values are compressed.
        note: the widths, or why the layer is left alone.
        tokens: tokens compressed, at present.
        parts: bytes by part: "key codes", "key scales", ..., "other".
        dense_bytes: what the same tokens take uncompressed in the model's dtype.
        compressed_bytes: of the compressed tokens alone: codes, scales and offset.
        replaced_bytes: what those tokens take uncompressed.
    """

    layer: int
    kind: str
    compressed: bool
    note: str
    tokens: int
    parts: dict[str, int]
    dense_bytes: int
    compressed_bytes: int
    replaced_bytes: int

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class CacheReport:
    """What a cache holds; `print` shows it as a table.

    Attributes:
        layers: one entry a layer of the model.
        shared_bytes: rotations and tables of levels, held once for all caches of the process.
    """

    layers: tuple[LayerReport, ...]
    shared_bytes: int

    @property
    def nbytes(self) -> int:
        """Bytes of all storages, shared tables included."""
        return sum(layer.nbytes for layer in self.layers) + self.shared_bytes

    @property
    def dense_bytes(self) -> int:
        """What the library's `DynamicCache` needs for the same tokens."""
        return sum(layer.dense_bytes for layer in self.layers)

    @property
    def ratio(self) -> float:
        """`nbytes` over `dense_bytes`; 1 for an empty cache."""
        return self.nbytes / self.dense_bytes if self.dense_bytes else 1.0

    @property
    def compressed_ratio(self) -> float:
        """Bytes of compressed tokens, scales and offsets included, over what they were; 1 if there are none."""
        replaced = sum(layer.replaced_bytes for layer in self.layers)
        return sum(layer.compressed_bytes for layer in self.layers) / replaced if replaced else 1.0

    def by_part(self) -> dict[str, int]:
        """Bytes by part, over all layers."""
        totals = {part: sum(layer.parts.get(part, 0) for layer in self.layers) for part in _COLUMNS}
        return {**totals, "shared": self.shared_bytes}

    def __str__(self) -> str:
        columns = [part for part in _COLUMNS if any(layer.parts.get(part) for layer in self.layers)]
        rows = [["layer", "cache", "compressed", *columns, "bytes", "ratio", "note"]]
        for layer in self.layers:
            ratio = f"{layer.nbytes / layer.dense_bytes:.3f}" if layer.dense_bytes else "-"
            sizes = [f"{layer.parts.get(part, 0):,}" for part in columns]
            tokens = f"{layer.tokens:,}" if layer.compressed else "-"
            cells = [str(layer.layer), layer.kind, tokens, *sizes, f"{layer.nbytes:,}", ratio, layer.note]
            rows.append(cells)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        compressed = sum(layer.compressed for layer in self.layers)
        lines.append(
            f"{compressed} layers compressed, {len(self.layers) - compressed} left alone; {self.nbytes:,} bytes "
            f"({self.shared_bytes:,} shared tables) against {self.dense_bytes:,} dense: {self.ratio:.3f}; compressed "
            f"tokens alone {self.compressed_ratio:.3f}"
        )
        return "\n".join(lines)


def report(cache: TurboQuantCache) -> CacheReport:
    """Measures a cache."""
    seen: set[int] = set()
    layers = tuple(_layer(index, layer, seen) for index, layer in enumerate(cache.layers))
    histories = [
        history for layer in cache.layers if isinstance(layer, TurboQuantLayer) for history in layer.past or ()
    ]
    return CacheReport(layers, _size((*reachable([each.codec for each in histories]), *_look_ups(histories)), seen))


def _look_ups(histories: list[History]) -> Iterator[Tensor]:
    """The tables by which trellis codes are decoded, up to 1 MB a width."""
    for history in histories:
        if history.codec is not None and history.compressed is not None:
            device = history.recent.device
            for _, bits in trellis_bands(history.codec.quantizer.tables(device)):
                yield trellis_lookup.table(bits, device)


def _layer(index: int, layer: Any, seen: set[int]) -> LayerReport:
    if not isinstance(layer, TurboQuantLayer):
        size = _size(reachable(vars(layer)), seen)
        return LayerReport(index, type(layer).__name__, False, _why(layer), 0, {OTHER: size}, size, 0, 0)
    parts: dict[str, int] = {}
    dense, compressed, replaced, tokens = 0, 0, 0, 0
    for side, history in zip(("keys", "values"), layer.past or (), strict=False):
        batch, heads, _, dim = history.recent.shape
        token = batch * heads * dim * history.recent.element_size()
        dense += token * len(history)
        replaced += token * history.compressed_length
        tokens = max(tokens, history.compressed_length)
        for name, tensor in history.tensors().items():
            size = _size([tensor], seen)
            part = PARTS[f"{side}.{name}"]
            parts[part] = parts.get(part, 0) + size
            compressed += size if name not in ("sinks", "recent") else 0
    other = _size(
        reachable({name: value for name, value in vars(layer).items() if name not in ("_past", "_window")}), seen
    )
    if other:
        parts[OTHER] = other
    kind = type(layer).__name__
    return LayerReport(index, kind, True, _widths(layer), tokens, parts, dense + other, compressed, replaced)


def _widths(layer: TurboQuantLayer) -> str:
    if layer.past is None:
        names = ["uncompressed" if width is None else str(width) for width in layer.settings.bits]
    else:
        names = [_width(history.codec) for history in layer.past]
    return "keys {}, values {}".format(*names)


def _width(codec: StateCodec | None) -> str:
    if codec is None:
        return "uncompressed"
    return f"{codec.plan.bits_per_dim}" + (" along a trellis" if codec.quantizer.codec == "trellis" else "")


def _why(layer: Any) -> str:
    if isinstance(layer, DynamicSlidingWindowLayer):
        return f"keeps a window of {layer.sliding_window} tokens only"
    if type(layer) is DynamicLayer:
        return "the policy leaves it alone"
    if isinstance(layer, LinearAttentionLayer):
        return "a recurrent state, which does not grow"
    if isinstance(layer, DynamicLayer):
        return "an attention of its own kind, which needs its states as they are"
    return "keeps no keys and values"


def reachable(root: Any) -> Iterator[Tensor]:
    """The tensors held by an object, its attributes and its containers, each once."""
    seen: set[int] = set()
    stack = [root]
    while stack:
        value = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            stack.extend(value.values())
        elif isinstance(value, list | tuple):
            stack.extend(value)
        elif is_dataclass(value) and not isinstance(value, type):
            stack.extend(getattr(value, entry.name) for entry in fields(value))
            stack.extend(vars(value).values())
        elif type(value).__module__.startswith("tqsearch."):
            stack.extend(getattr(value, "__dict__", {}).values())


def _size(tensors: Iterable[Tensor], seen: set[int]) -> int:
    """Bytes of the tensors' storages, but for those seen before."""
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total
