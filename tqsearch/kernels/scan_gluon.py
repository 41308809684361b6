"""`scan_kernel` for many queries in Gluon, Triton's lower level: for NVIDIA GPUs of compute capability 9.x.

A program keeps a block of queries in shared memory and goes through tiles of rows. One warp of it loads codes, chunk
by chunk, into rings of buffers (bulk tensor copies that signal barriers). Two or three groups of four warps take tiles
in turn, each its own: they decode a chunk in registers and multiply it with the queries (asynchronous `wgmma`, codes
from registers, queries from shared memory). While one group decodes or reduces, the products of the others run: plain
Triton's warps do both in step, and the tensor cores wait.

The sums are the same integers as `scan_kernel`'s, what follows the same float32 operations: the maxima are equal.

One band of scalar codes of 1 to 4 bits, in rows of whole chunks that are aligned to 16 bytes.
"""

# mypy: ignore-errors
from __future__ import annotations

from dataclasses import dataclass

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

ROWS = gl.constexpr(64)  # of a product: the fewest of `wgmma`
# Renamed between Triton 3.6 and 3.9.
_copy = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_copy_words = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@dataclass(frozen=True)
class Cut:
    """How a scan is cut; a constant of the kernel.

    Attributes:
        width: bits a code.
        assembly: decodes four columns; see `decode_triton`.
        words: at 4 bits two words of the table, which the assembly expects in $3 and $7.
        block_q: queries a program.
        block_c: columns a chunk.
        chunks: chunks a row.
        plane: bytes of the first plane of a row.
        tile: rows of which one maximum is kept, a multiple of 64.
        groups: groups of four warps that decode and multiply.
        stages: buffers of a group.
        registers: of a thread of such a group.
        has_bias: whether rows have a bias.
        has_mask: whether there is a mask of rows.
    """

    width: int
    assembly: str
    words: tuple[int, int]
    block_q: int
    block_c: int
    chunks: int
    plane: int
    tile: int
    groups: int
    stages: int
    registers: int
    has_bias: bool
    has_mask: bool

    @property
    def parts(self) -> int:
        """Parts that a column decodes to, each of `block_c` slots a chunk."""
        return 8 if self.width == 3 else 8 // self.width


@gluon.constexpr_function
def _exchanged(columns, row_bits):
    """A layout of maxima (4 warps, rows, columns), the top bit of whose rows tells a thread's numbers apart.

    The `row_bits` bits below it tell lanes apart; where there were more of those, there are top bits of the column.
    """
    bits = columns.bit_length() - 1
    taken = range(bits - 3 + row_bits, bits)
    registers = [[0, 0, 1], *[[0, 0, 1 << bit] for bit in range(3, bits) if bit not in taken], [0, 1 << row_bits, 0]]
    lanes = [[0, 0, 2], [0, 0, 4]] + [[0, 1 << bit, 0] for bit in range(row_bits)] + [[0, 0, 1 << bit] for bit in taken]
    return gl.DistributedLinearLayout(registers, lanes, [[1, 0, 0], [2, 0, 0]], [], [4, 2 << row_bits, columns])


@gluon.jit
def _of_columns(most, BLOCK_Q: gl.constexpr):
    """Maxima (BLOCK_Q,) of maxima (4 warps, 8, BLOCK_Q): lanes exchange halves of their columns before each step."""
    if BLOCK_Q >= 64:
        for step in gl.static_range(3):
            most = gl.convert_layout(most, _exchanged(BLOCK_Q, 2 - step))
            most = gl.max(gl.reshape(most, [4, 2, 4 >> step, BLOCK_Q]), axis=1)
        most = gl.reshape(most, [4, BLOCK_Q])
    else:
        most = gl.max(most, axis=1)
    return gl.max(most, axis=0)


@gluon.jit
def _of_threads(score, BLOCK_Q: gl.constexpr):
    """Maxima (4 warps, 8, BLOCK_Q) of scores (ROWS, BLOCK_Q): of the two rows that a thread holds."""
    return gl.max(gl.reshape(score, [4, 2, 8, BLOCK_Q]), axis=1)


@gluon.jit
def _decoded(x, y, words, CUT: gl.constexpr):
    """The parts of a chunk; see `decode_triton.decode`."""
    # fmt: off
    if CUT.width == 4:
        return gl.inline_asm_elementwise(
            CUT.assembly, "=r,=r,r,r,r,r,r,r,r,r,r", [x, words[0], words[1]], (gl.int8, gl.int8), True, 4)
    elif CUT.width == 2:  # noqa: RET505
        return gl.inline_asm_elementwise(
            CUT.assembly, "=r,=r,=r,=r,r", [x], (gl.int8, gl.int8, gl.int8, gl.int8), True, 4)
    elif CUT.width == 3:
        return gl.inline_asm_elementwise(
            CUT.assembly, "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r", [x, y],
            (gl.int8, gl.int8, gl.int8, gl.int8, gl.int8, gl.int8, gl.int8, gl.int8), True, 4)
    else:
        gl.static_assert(CUT.width == 1)
        return gl.inline_asm_elementwise(
            CUT.assembly, "=r,=r,=r,=r,=r,=r,=r,=r,r", [x],
            (gl.int8, gl.int8, gl.int8, gl.int8, gl.int8, gl.int8, gl.int8, gl.int8), True, 4)
    # fmt: on


@gluon.jit
def _fill(queries, values_ptr, first, PIECES: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_C: gl.constexpr):
    """Copies a block of queries to shared memory, where products find it."""
    WORDS: gl.constexpr = gl.BlockedLayout([1, 16], [512 // BLOCK_C, BLOCK_C // 16], [4, 1], [1, 0])
    query = (first + gl.arange(0, BLOCK_Q, layout=gl.SliceLayout(1, WORDS))) * (PIECES * BLOCK_C)
    slot = gl.arange(0, BLOCK_C, layout=gl.SliceLayout(0, WORDS))
    for piece in range(PIECES):
        place = gl.expand_dims(query, 1) + gl.expand_dims(piece * BLOCK_C + slot, 0)
        _copy_words(queries.index(piece), values_ptr + place)
    async_copy.commit_group()
    async_copy.wait_group(0)
    fence_async_shared()


@gluon.jit
def _load(codes, narrow, ring, turns_of, CUT: gl.constexpr):
    """The warp that loads: chunk by chunk the codes of all groups."""
    GROUPS: gl.constexpr = CUT.groups
    buffers, more, full, free = ring
    program, programs, turns = turns_of
    slot = 0
    phase = 1
    for turn in range(turns):
        row = (program + turn * programs) * CUT.groups * CUT.tile
        for part in range(CUT.tile // ROWS):
            for chunk in range(CUT.chunks):
                for group in gl.static_range(GROUPS):
                    place = group * CUT.stages + slot
                    mbarrier.wait(free.index(place), phase)
                    at = row + group * CUT.tile + part * ROWS
                    column = chunk * CUT.block_c
                    if CUT.width == 3:
                        mbarrier.expect(full.index(place), 3 * ROWS * CUT.block_c)
                        _copy(codes, [at, column], full.index(place), buffers.index(place))
                        _copy(narrow, [at, CUT.plane + column], full.index(place), more.index(place))
                    else:
                        mbarrier.expect(full.index(place), ROWS * CUT.block_c)
                        _copy(codes, [at, column], full.index(place), buffers.index(place))
                slot += 1
                if slot == CUT.stages:
                    slot = 0
                    phase ^= 1


@gluon.jit
def _score(ring, queries, of, where, turns_of, GROUP: gl.constexpr, CUT: gl.constexpr):
    """A group that decodes and multiplies: one tile of each turn."""
    PARTS: gl.constexpr = CUT.parts
    BLOCK_Q: gl.constexpr = CUT.block_q
    CHUNKS: gl.constexpr = CUT.chunks
    buffers, more, full, free = ring
    scales_ptr, bias_ptr, mask_ptr, alpha_ptr, beta_ptr, out_ptr = of
    n, first, block, q, out_stride = where
    program, programs, turns = turns_of
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_Q, 32]
    )
    LEFT: gl.constexpr = gl.DotOperandLayout(0, PRODUCT, 4)
    FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    wide = gl.arange(0, BLOCK_Q, layout=gl.SliceLayout(0, PRODUCT))
    lane = block + gl.arange(0, BLOCK_Q, layout=FLAT)
    # Words of the table as numbers of each thread: one that all share, ptxas copies anew for each look-up.
    zero = gl.expand_dims(gl.minimum(gl.arange(0, ROWS, layout=gl.SliceLayout(1, LEFT)) + n, 0), 1)
    words = (zero + CUT.words[0], zero + CUT.words[1])
    slot = 0
    before = -1
    phase = 0
    for turn in range(turns):
        tile = (program + turn * programs) * CUT.groups + GROUP
        most = gl.full([ROWS, BLOCK_Q], float("-inf"), gl.float32, layout=PRODUCT)
        most = _of_threads(most, BLOCK_Q)
        for part in range(CUT.tile // ROWS):
            place = tile * CUT.tile + part * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, PRODUCT))
            inside = place < n
            rows = gl.where(inside, place, n - 1)
            scale = gl.load(scales_ptr + rows).to(gl.float32)
            bias = gl.where(inside, 0.0, float("-inf"))
            if CUT.has_bias:
                bias += gl.load(bias_ptr + rows).to(gl.float32)
            if CUT.has_mask:
                bias = gl.where(gl.load(mask_ptr + rows) != 0, bias, float("-inf"))
            acc = gl.zeros([ROWS, BLOCK_Q], gl.int32, layout=PRODUCT)
            for chunk in gl.static_range(CHUNKS):
                mbarrier.wait(full.index(GROUP * CUT.stages + slot), phase)
                x = buffers.index(GROUP * CUT.stages + slot).load(LEFT)
                y = more.index(GROUP * CUT.stages + slot).load(LEFT) if CUT.width == 3 else x
                # A buffer is free when products took its codes, not when a barrier is passed after the load: until then
                # the load may wait for shared memory, and the next copy would overwrite what it has not read.
                if PARTS > 2:
                    mbarrier.arrive(free.index(GROUP * CUT.stages + before), count=1, pred=before >= 0)
                parts = _decoded(x, y, words, CUT)
                for p in gl.static_range(PARTS):
                    right = queries.index(chunk * PARTS + p).permute((1, 0))
                    acc = warpgroup_mma(parts[p], right, acc, use_acc=chunk + p > 0, is_async=True)
                    if PARTS == 2 and p == 0:  # both parts are of the same codes; measured to be the best moment
                        mbarrier.arrive(free.index(GROUP * CUT.stages + slot), count=1)
                before = slot
                phase = gl.where(slot == CUT.stages - 1, phase ^ 1, phase)
                slot = gl.where(slot == CUT.stages - 1, 0, slot + 1)
                acc = warpgroup_mma_wait(PARTS if chunk < CHUNKS - 1 else 0, [acc])
            alpha = gl.load(alpha_ptr + first + wide)
            beta = gl.load(beta_ptr + first + wide)
            score = acc.to(gl.float32) * gl.expand_dims(alpha, 0) + gl.expand_dims(beta, 0)
            score = score * gl.expand_dims(scale, 1) + gl.expand_dims(bias, 1)
            most = gl.maximum(most, _of_threads(score, BLOCK_Q))
        best = gl.convert_layout(_of_columns(most, BLOCK_Q), FLAT)
        gl.store(out_ptr + lane * out_stride + tile, best, mask=(lane < q) & (tile * CUT.tile < n))


@gluon.jit(do_not_specialize=["n", "q", "out_stride", "programs"])
def hopper_kernel(
    scales_ptr,  # (rows,)
    bias_ptr,  # (rows,) float32 or float16
    mask_ptr,  # (rows,) uint8
    alpha_ptr,  # (queries,) float32
    beta_ptr,  # (queries,) float32
    values_ptr,  # (queries, slots) int8
    out_ptr,  # (q, out_stride) float32, maxima of tiles
    codes,  # descriptor of (rows, bytes) uint8, at 3 bits (rows, bytes // 2) uint16, blocks of (ROWS, block_c)
    narrow,  # descriptor of (rows, bytes) uint8, blocks of (ROWS, block_c): the second plane of 3 bits
    n,
    first_query,  # a multiple of 16
    q,  # queries from there on; there is memory of queries beyond, block_q more
    out_stride,
    programs,  # for each block of queries
    CUT: gl.constexpr,
):
    """Scores tiles of rows against a block of queries and writes their maxima."""
    BLOCK_Q: gl.constexpr = CUT.block_q
    BLOCK_C: gl.constexpr = CUT.block_c
    PIECES: gl.constexpr = CUT.chunks * CUT.parts
    BUFFERS: gl.constexpr = CUT.groups * CUT.stages
    blocks = gl.cdiv(q, CUT.block_q)
    program = gl.program_id(0) // blocks
    block = gl.program_id(0) % blocks * CUT.block_q
    first = first_query + block
    turns = gl.cdiv(gl.cdiv(n, CUT.tile * CUT.groups) - program, programs)
    VALUES: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=BLOCK_C, element_bitwidth=8, rank=2)
    queries = gl.allocate_shared_memory(gl.int8, [PIECES, BLOCK_Q, BLOCK_C], VALUES)
    buffers = gl.allocate_shared_memory(codes.dtype, [BUFFERS, ROWS, BLOCK_C], codes.layout)
    more = gl.allocate_shared_memory(gl.uint8, [BUFFERS if CUT.width == 3 else 1, ROWS, BLOCK_C], narrow.layout)
    full = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(BUFFERS):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=1)
    _fill(queries, values_ptr, first, PIECES, BLOCK_Q, BLOCK_C)
    ring = (buffers, more, full, free)
    of = (scales_ptr, bias_ptr, mask_ptr, alpha_ptr, beta_ptr, out_ptr)
    where = (n, first, block, q, out_stride)
    turns_of = (program, programs, turns)
    if CUT.groups == 2:
        gl.warp_specialize(
            [
                (_score, (ring, queries, of, where, turns_of, 0, CUT)),
                (_score, (ring, queries, of, where, turns_of, 1, CUT)),
                (_load, (codes, narrow, ring, turns_of, CUT)),
            ],
            [4, 1],
            [CUT.registers, 24],
        )
    elif CUT.groups == 3:
        gl.warp_specialize(
            [
                (_score, (ring, queries, of, where, turns_of, 0, CUT)),
                (_score, (ring, queries, of, where, turns_of, 1, CUT)),
                (_score, (ring, queries, of, where, turns_of, 2, CUT)),
                (_load, (codes, narrow, ring, turns_of, CUT)),
            ],
            [4, 4, 1],
            [CUT.registers, CUT.registers, 24],
        )
