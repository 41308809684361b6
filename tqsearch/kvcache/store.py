"""The storage of compressed keys and values, and the codecs that write and read it.

B is the batch, H the number of KV heads, D the head dimension, C the number of compressed tokens, a multiple of
`block_length`. A vector x becomes z = x - offset (keys only: a constant a head and channel) and is stored as codes of
R z sqrt(D) / |z|, R a seeded Hadamard rotation, and one scale s = |z| sqrt(D) / <R z sqrt(D) / |z|, levels>:

    x_hat = s R^T levels + offset

That is `TurboQuantizer` in its mse form. Its levels are the optimal ones of a coordinate in dimension D, or those of a
trellis along D, and s makes inner products with x_hat unbiased.

================ ================================== ==================================================================
keys `packed`    (B, H, C / block, bytes) uint8     each token a row of codes along D in the layout of
                                                    `tqsearch.packing`, the rows of a block by planes; of a trellis
                                                    (B, H, C, row bytes) in the layout of `trellis.pack`
values `packed`  (B, H, C / block, bytes) uint8     each coordinate a row of a block's codes along the **tokens**, in
                                                    the layout of `packing` for its width, the rows of a band by planes;
                                                    bands in order; of a trellis as keys
`scales`         (B, H, C) float16                  s; float32 for the whole tensor where float16 cannot hold them
keys `offset`    (H, D) float32                     the same for all tokens of a layer
keys `order`     (H, D) int16                       with outlier channels only: see `outliers`
keys `gain`      (H, D) float32                     with outlier channels only: see `outliers`
================ ================================== ==================================================================

By planes: first the low plane of all rows, then the next (`packing.by_planes`), so that what a kernel reads of a plane
is contiguous; codes of 1, 2, 4 and 8 bits alone have one plane, and their rows are simply one after the other.
Values lie along the tokens so that a decoded tile is already transposed for probabilities times values. A trellis runs
along D for values too: no kernel reads its codes, and decoding takes whole rows.
Tensors are never changed in place, so that any number of caches may share them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from tqsearch import codec as codecs
from tqsearch import kernels
from tqsearch.codec import Codec
from tqsearch.kernels import BandTable
from tqsearch.packing import by_planes, by_rows, pack, unpack
from tqsearch.plan import BitPlan
from tqsearch.quantizer import TurboQuantizer

# Floats of a piece while encoding and decoding: bounds what is needed beside the result.
PIECE = 1 << 21

# Scales below this are stored in float32, as float16 would lose digits of all of them.
LEAST_HALF_SCALE = 2.0**-10


@dataclass(frozen=True, eq=False, repr=False)
class CompressedStates:
    """Compressed keys, or values, of one layer; see the module's docstring.

    Attributes:
        packed: the codes, uint8.
        scales: (B, H, C) float16 or float32.
        offset: (H, D) float32 of keys; None for values.
        order: (H, D) int16 of keys with outlier channels, else None.
        gain: (H, D) float32 of keys with outlier channels, else None.
    """

    packed: Tensor
    scales: Tensor
    offset: Tensor | None = None
    order: Tensor | None = None
    gain: Tensor | None = None

    def __len__(self) -> int:
        """C, the number of compressed tokens."""
        return self.scales.shape[2]

    def __repr__(self) -> str:
        return f"CompressedStates({len(self)} tokens, {sum(part.nbytes for part in self.tensors().values()):,} bytes)"

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        return {"packed": self.packed, "scales": self.scales, **self.constants()}

    def constants(self) -> dict[str, Tensor]:
        """What was estimated once for all tokens, by name; `StateCodec.encode` takes it."""
        parts = {"offset": self.offset, "order": self.order, "gain": self.gain}
        return {name: tensor for name, tensor in parts.items() if tensor is not None}

    def cat(self, *later: CompressedStates) -> CompressedStates:
        """These tokens, then the later ones, which were encoded with the same constants."""
        every = (self, *later)
        wide = any(part.scales.dtype == torch.float32 for part in every)
        scales = [part.scales.float() if wide else part.scales for part in every]
        return replace(self, packed=torch.cat([part.packed for part in every], dim=2), scales=torch.cat(scales, dim=2))

    def tokens(self, start: int, stop: int) -> CompressedStates:
        """Views of the tokens from `start` to `stop`, both multiples of `block_length`."""
        rows = self.packed.shape[2], len(self)
        first, last = (token * rows[0] // rows[1] for token in (start, stop))
        return replace(self, packed=self.packed[:, :, first:last], scales=self.scales[:, :, start:stop])

    def copied(self) -> CompressedStates:
        """The same in storages of their own, no larger than needed."""
        return replace(self, packed=_own(self.packed), scales=_own(self.scales))

    def rows(self, index: Tensor) -> CompressedStates:
        """The sequences of the batch that `index` names, (B',) int64."""
        index = index.to(self.packed.device)
        return replace(self, packed=self.packed.index_select(0, index), scales=self.scales.index_select(0, index))

    def to(self, device: torch.device | str) -> CompressedStates:
        """The same on another device; copies to a GPU do not wait."""
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in self.tensors().items()}
        return CompressedStates(**moved)


class StateCodec:
    """States coded as they are, each token's codes together, along D; encoded and decoded piece by piece.

    Args:
        dim: D, 1 to 8192.
        bits: width a coordinate, an integer, a fraction or a `BitPlan` of D coordinates.
        block_length: tokens of a block, a multiple of 8.
        seed: of the rotation.
        backend: see `kernels.select`.
        codec: "scalar" or "trellis"; 8 bits are scalar with either.
    """

    def __init__(
        self, dim: int, bits: float | BitPlan, block_length: int, seed: int, backend: str, codec: Codec = "scalar"
    ) -> None:
        codec = codec_of(codec, BitPlan.of(dim, bits))
        self.quantizer = TurboQuantizer(dim, bits, seed=seed, scale_dtype=torch.float32, codec=codec, backend=backend)
        self.dim, self.block_length, self.backend = dim, block_length, backend
        self.plan = self.quantizer.plan
        self._matrices: dict[torch.device, Tensor] = {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.plan})"

    def packed_shape(self, batch: int, heads: int, length: int) -> tuple[int, int, int, int]:
        """The shape of `packed` for `length` tokens."""
        return self.filed_shape(batch, heads, length)

    def filed_shape(self, batch: int, heads: int, length: int) -> tuple[int, int, int, int]:
        """The shape of `packed` in a file: here (B, H, C, row bytes)."""
        return batch, heads, length, self.quantizer.row_bytes

    def filed(self, packed: Tensor) -> Tensor:
        """`packed` as files hold it: the planes of each row together."""
        return packed

    def unfiled(self, packed: Tensor) -> Tensor:
        """The inverse of `filed`."""
        return packed

    def scales(self, encoded: kernels.Encoded) -> Tensor:
        """What the levels of each row are multiplied by, float32."""
        return self.quantizer.unbiased_scales(encoded.norms, encoded.dots)

    def pack(self, rows: Tensor, blocks: tuple[int, int, int]) -> Tensor:
        """Rows of codes, (B H C, row bytes), to `packed`; `blocks` is (B, H, C / block_length)."""
        batch, heads, count = blocks
        return rows.view(batch, heads, count * self.block_length, self.quantizer.row_bytes)

    def levels(self, packed: Tensor) -> Tensor:
        """The levels of `packed`: (B H C, D) float32, a head's tokens together."""
        rows = packed.reshape(-1, packed.shape[3])
        return kernels.reconstruct(rows, _ones(rows), self.quantizer.tables(packed.device), backend=self.backend)

    def estimate(self, states: Tensor) -> dict[str, Tensor]:
        """The constants that suit states (B, H, T, D), by name: none for values."""
        return {}

    def forth(self, states: Tensor, constants: dict[str, Tensor]) -> Tensor:
        """States (B, H, C, D) float32 to what is coded."""
        return states

    def back(self, states: Tensor, constants: dict[str, Tensor]) -> Tensor:
        """The inverse of `forth`."""
        return states

    @torch.no_grad()
    def encode(
        self, states: Tensor, scale_dtype: torch.dtype | None = None, /, **constants: Tensor
    ) -> CompressedStates:
        """Codes of whole blocks.

        Args:
            states: (B, H, C, D), any floating dtype, C a multiple of `block_length`.
            scale_dtype: of the scales; None for what holds them, which a GPU has to be waited for to know. Scales
                that are larger than it holds become the largest: such vectors keep their direction.
            **constants: as `estimate` gives them.
        """
        if self._in_one_launch(states):
            from tqsearch.kernels.attention_append_triton import encode_blocks

            along_tokens = isinstance(self, ValueCodec)
            tables, rotation = self.quantizer.tables(states.device), self.matrix(states.device)
            with kernels.launching_on(states.device):
                packed, scales = encode_blocks(
                    states, tables, rotation, constants.get("offset"), self.block_length, along_tokens
                )
            return CompressedStates(packed, _stored(scales, scale_dtype), **constants)
        pieces = [self._encode(states[:, :, start:stop], scale_dtype, constants) for start, stop in self.pieces(states)]
        return pieces[0].cat(*pieces[1:]) if len(pieces) > 1 else pieces[0]

    def _encode(
        self, states: Tensor, scale_dtype: torch.dtype | None, constants: dict[str, Tensor]
    ) -> CompressedStates:
        batch, heads, length, _ = states.shape
        coded = self.forth(states.float(), constants)
        encoded = self.quantizer.encode_levels(coded.reshape(-1, self.dim))
        scales = self.scales(encoded).view(batch, heads, length)
        packed = self.pack(encoded.packed, (batch, heads, length // self.block_length))
        return CompressedStates(packed, _stored(scales, scale_dtype), **constants)

    def _in_one_launch(self, states: Tensor) -> bool:
        """Whether there is a kernel that goes from states to packed codes."""
        if type(self) not in (KeyCodec, ValueCodec) or self.quantizer.codec != "scalar":
            return False
        if states.stride(3) != 1 or self.dim > 256 or self.block_length % 32:
            return False
        known = all(band.width in kernels.TRITON_WIDTHS and band.size % 8 == 0 for band in self.plan.bands)
        return known and kernels.select(self.backend, states.device) == "triton"

    def matrix(self, device: torch.device) -> Tensor:
        """The rotation as a matrix R, (D, D) float32: the rotated vector of x is R x."""
        if device not in self._matrices:
            self._matrices[device] = (
                self.quantizer.rotation.apply(torch.eye(self.dim, dtype=torch.float32, device=device)).t().contiguous()
            )
        return self._matrices[device]

    @torch.no_grad()
    def decode(self, compressed: CompressedStates, out: Tensor) -> None:
        """Writes the estimates of all tokens.

        Args:
            compressed: C tokens.
            out: (B, H, C, D) of any floating dtype.
        """
        for start, stop in self.pieces(out):
            piece = compressed.tokens(start, stop)
            rows = self.levels(piece.packed) * piece.scales.float().reshape(-1, 1)
            states = self.quantizer.rotation.invert(rows).view(*piece.scales.shape, self.dim)
            out[:, :, start:stop] = self.back(states, piece.constants())

    def pieces(self, states: Tensor) -> Iterator[tuple[int, int]]:
        """Ranges of tokens, whole blocks but the last, in which to work on states (B, H, T, D)."""
        batch, heads, length, dim = states.shape
        step = max(PIECE // max(batch * heads * dim * self.block_length, 1), 1) * self.block_length
        return ((start, min(start + step, length)) for start in range(0, length, step))


class KeyCodec(StateCodec):
    """Keys: a constant is taken off. Scalar codes lie by planes."""

    def packed_shape(self, batch: int, heads: int, length: int) -> tuple[int, int, int, int]:
        """See `StateCodec`; of scalar codes (B, H, C / block, bytes)."""
        if self.quantizer.codec != "scalar":
            return super().packed_shape(batch, heads, length)
        return batch, heads, length // self.block_length, self.block_length * self.quantizer.row_bytes

    def pack(self, rows: Tensor, blocks: tuple[int, int, int]) -> Tensor:
        """See `StateCodec`."""
        return self.unfiled(super().pack(rows, blocks))

    def levels(self, packed: Tensor) -> Tensor:
        """See `StateCodec`."""
        return super().levels(self.filed(packed))

    def filed(self, packed: Tensor) -> Tensor:
        """See `StateCodec`."""
        if self.quantizer.codec != "scalar":
            return packed
        rows = by_rows(packed.flatten(0, 2), self.plan.pairs(), self.block_length)
        return rows.view(*packed.shape[:2], packed.shape[2] * self.block_length, self.quantizer.row_bytes)

    def unfiled(self, packed: Tensor) -> Tensor:
        """See `StateCodec`."""
        if self.quantizer.codec != "scalar":
            return packed
        batch, heads, length, nbytes = packed.shape
        blocks = packed.reshape(-1, self.block_length, nbytes)
        return by_planes(blocks, self.plan.pairs()).view(self.packed_shape(batch, heads, length))

    def estimate(self, states: Tensor) -> dict[str, Tensor]:
        """The offset of keys (B, H, T, D): their mean over batch and tokens; keys that are not finite count as none."""
        total = torch.zeros((states.shape[1], self.dim), dtype=torch.float64, device=states.device)
        count = torch.zeros((states.shape[1], 1), dtype=torch.int64, device=states.device)
        for start, stop in self.pieces(states):
            working = states[:, :, start:stop].float()
            finite = working.isfinite().all(dim=3, keepdim=True)
            total += torch.where(finite, working, 0.0).sum(dim=(0, 2), dtype=torch.float64)
            count += finite.sum(dim=(0, 2))
        return {"offset": (total / count.clamp(min=1)).float()}

    def forth(self, states: Tensor, constants: dict[str, Tensor]) -> Tensor:
        """Takes the offset off, if there is one."""
        return states - constants["offset"][:, None] if "offset" in constants else states

    def back(self, states: Tensor, constants: dict[str, Tensor]) -> Tensor:
        """Adds the offset, if there is one."""
        return states + constants["offset"][:, None] if "offset" in constants else states


class ValueCodec(StateCodec):
    """Values of scalar levels: each coordinate's codes lie together, along the tokens of a block."""

    def filed_shape(self, batch: int, heads: int, length: int) -> tuple[int, int, int, int]:
        """(B, H, C / block, bytes of a block)."""
        bits = sum(band.size * band.width for band in self.plan.bands)
        return batch, heads, length // self.block_length, bits * self.block_length // 8

    def pack(self, rows: Tensor, blocks: tuple[int, int, int]) -> Tensor:
        """(B H C, row bytes) to (B, H, C / block, D bytes)."""
        count = math.prod(blocks)
        codes = unpack(rows, self.plan).view(count, self.block_length, self.dim).transpose(1, 2)
        parts, coordinate = [], 0
        for band in self.plan.bands:
            columns = codes[:, coordinate : coordinate + band.size].reshape(-1, self.block_length)
            packed = pack(columns, BitPlan.of(self.block_length, band.width))
            parts.append(packed.view(count, band.size * packed.shape[1]))
            coordinate += band.size
        whole = torch.cat(parts, dim=1)
        return self.unfiled(whole.view(*blocks, whole.shape[1]))

    def filed(self, packed: Tensor) -> Tensor:
        """See `StateCodec`."""
        parts = (by_rows(part, row, size) for part, row, size in self._bands(packed))
        return torch.cat([part.flatten(1) for part in parts], dim=1).view(packed.shape)

    def unfiled(self, packed: Tensor) -> Tensor:
        """See `StateCodec`."""
        parts = [
            by_planes(part.view(len(part), size, part.shape[1] // size), row) for part, row, size in self._bands(packed)
        ]
        return torch.cat(parts, dim=1).view(packed.shape)

    def _bands(self, packed: Tensor) -> Iterator[tuple[Tensor, list[tuple[int, int]], int]]:
        """The bytes of each band that has bits, (n, bytes); a coordinate's row as a band of tokens; the band's size."""
        blocks, byte = packed.flatten(0, 2), 0
        for band in self.plan.bands:
            if band.width:
                nbytes = band.size * self.block_length * band.width // 8
                yield blocks[:, byte : byte + nbytes], [(self.block_length, band.width)], band.size
                byte += nbytes

    def levels(self, packed: Tensor) -> Tensor:
        """(B, H, C / block, D bytes) to (B H C, D) float32."""
        blocks = self.filed(packed).flatten(0, 2)
        parts, byte = [], 0
        for table in self.quantizer.tables(packed.device):
            along: BandTable = table._replace(size=self.block_length)
            columns = blocks[:, byte : byte + table.size * along.nbytes].reshape(-1, along.nbytes)
            levels = kernels.reconstruct(columns, _ones(columns), (along,), backend=self.backend)
            parts.append(levels.view(len(blocks), table.size, self.block_length))
            byte += table.size * along.nbytes
        return torch.cat(parts, dim=1).transpose(1, 2).reshape(-1, self.dim)


def codec_of(codec: Codec, plan: BitPlan) -> Codec:
    """What codes a plan: "scalar" where none of its widths goes along a trellis."""
    return codec if any(codecs.along_path(codec, band.width) for band in plan.bands) else "scalar"


@lru_cache(maxsize=256)
def value_codec(
    dim: int, bits: float | BitPlan, block_length: int, seed: int, backend: str, codec: Codec = "scalar"
) -> StateCodec:
    """The one codec of values with these arguments; its rotation is not that of keys."""
    kind = ValueCodec if codec_of(codec, BitPlan.of(dim, bits)) == "scalar" else StateCodec
    return kind(dim, bits, block_length, seed + 1, backend, codec)


def _ones(rows: Tensor) -> Tensor:
    return torch.ones(len(rows), dtype=torch.float32, device=rows.device)


def _own(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def _stored(scales: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Scales in a dtype, or in what holds them; what is not finite stays so."""
    dtype = dtype or _scale_dtype(scales)
    if dtype == torch.float16:
        scales = torch.where(scales.isfinite(), scales.clamp(max=torch.finfo(dtype).max), scales)
    return scales.to(dtype)


def _scale_dtype(scales: Tensor) -> torch.dtype:
    """float16 where its range holds the scales; NaN and infinity, which come from such states, fit either."""
    largest = float(torch.nan_to_num(scales, 0.0, 0.0, 0.0).amax()) if scales.numel() else 0.0
    fits = largest == 0.0 or LEAST_HALF_SCALE <= largest <= torch.finfo(torch.float16).max
    return torch.float16 if fits else torch.float32
