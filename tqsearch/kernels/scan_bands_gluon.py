"""`scan_kernel` for plans of several bands, in Gluon, Triton's lower level: for NVIDIA GPUs of compute capability 9.x.

A program keeps a block of queries in shared memory and goes through every so many tiles of 64 rows. A row is read in
*steps* (`scan_bands`), pieces of a band of 16 to 64 columns. Their bytes come through a ring of buffers by asynchronous
copies, which run ahead from step to step, whatever the band, and from tile to tile; plain Triton fills and drains a
pipeline for each band. A step is decoded in registers while the products of the step before run. With many queries two
groups of four warps share the queries, each with tiles and a ring of its own, so that one decodes or reduces while the
products of the other run.

The sums are the same integers as `scan_kernel`'s, and the same float32 operations follow.
"""

# mypy: ignore-errors
from __future__ import annotations

from dataclasses import dataclass

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

TILE = gl.constexpr(64)  # rows: the fewest of `wgmma`
# Renamed between Triton 3.6 and 3.9.
_copy = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
_RENAMED = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


@dataclass(frozen=True)
class Cut:
    """How a scan is cut; a constant of the kernel.

    Attributes:
        steps: of a row; see `scan_bands.Step`.
        block_q: queries a program.
        stages: buffers of a group.
        groups: of four warps: 1 or 2.
        row: bytes from one row to the next.
        slots: of a query.
        copied: bytes that are copied at once: 4, 8 or 16.
        has_bias: whether rows have a bias.
        has_mask: whether there is a mask of rows.
    """

    steps: tuple
    block_q: int
    stages: int
    groups: int
    row: int
    slots: int
    copied: int
    has_bias: bool
    has_mask: bool

    @property
    def pieces(self) -> tuple:
        """Blocks of queries beside steps of 16, 32 and 64 columns; at least one, as memory of size 0 is none."""
        counts = [sum(step.parts // 2 for step in self.steps if step.columns == columns) for columns in (16, 32, 64)]
        return tuple(max(1, count) for count in counts)

    @property
    def wide(self) -> int:
        """The most bytes of a row that a step reads of its wider plane, where it has two bytes a column."""
        return max([2 * step.columns for step in self.steps if step.width >= 3], default=32)

    @property
    def narrow(self) -> int:
        """The most bytes of a row that a step reads of a plane of one byte a column."""
        return max([step.columns for step in self.steps if step.width in (1, 2, 3, 6)], default=16)


@gluon.constexpr_function
def _buffer(columns, nbytes):
    """A layout of (TILE, columns) of so many bytes each that is read without conflicts."""
    if columns == 16:
        return gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    row = columns * nbytes
    return gl.SwizzledSharedLayout(16 // nbytes, 128 // row, row // 16, [1, 0])


@gluon.constexpr_function
def _held(columns):
    """Of (TILE, columns): each thread holds four neighbouring columns, those that it multiplies."""
    more = [[0, 16 << bit] for bit in range((columns // 32).bit_length())]
    lanes = [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout([[0, 1], [0, 2], [8, 0], *more], lanes, [[16, 0], [32, 0]], [], [64, columns])


@gluon.constexpr_function
def _copying(columns, nbytes, at_once):
    """Of (TILE, columns) of so many bytes each, of which a thread copies `at_once` bytes."""
    each = min(at_once, columns * nbytes // 2) // nbytes
    lanes = min(32, columns // each)
    return gl.BlockedLayout([1, each], [32 // lanes, lanes], [4, 1], [1, 0])


@gluon.jit
def _as(shared, DTYPE: gl.constexpr, COLUMNS: gl.constexpr, NBYTES: gl.constexpr):
    """A buffer as (TILE, COLUMNS)."""
    if _RENAMED:
        return shared.reinterpret(DTYPE, [TILE, COLUMNS], _buffer(COLUMNS, NBYTES))
    else:  # noqa: RET505 (Triton compiles the branch that a constant takes)
        return shared._reinterpret(DTYPE, [TILE, COLUMNS], _buffer(COLUMNS, NBYTES))


@gluon.jit
def _copy_plane(
    shared,
    codes_ptr,
    tile,
    n,
    DTYPE: gl.constexpr,
    NBYTES: gl.constexpr,
    BYTE: gl.constexpr,
    STEP: gl.constexpr,
    CUT: gl.constexpr,
):
    """Begins to copy a step's columns of one plane; nothing for a tile beyond the end."""
    COPYING: gl.constexpr = _copying(STEP.columns, NBYTES, CUT.copied)
    rows = gl.minimum(tile * TILE + gl.arange(0, TILE, layout=gl.SliceLayout(1, COPYING)), n - 1).to(gl.int64)
    column = gl.arange(0, STEP.columns, layout=gl.SliceLayout(0, COPYING))
    first = (codes_ptr + gl.expand_dims(rows * CUT.row, 1) + BYTE).to(gl.pointer_type(DTYPE), bitcast=True)
    valid = gl.expand_dims(column < STEP.valid, 0) & (tile * TILE < n)
    _copy(_as(shared, DTYPE, STEP.columns, NBYTES), first + gl.expand_dims(column, 0), mask=valid)


@gluon.jit
def _copy_step(ring, place, codes_ptr, tile, n, STEP: gl.constexpr, CUT: gl.constexpr):
    """Begins to copy a step's bytes to a place of the ring."""
    wide, narrow = ring
    if STEP.width >= 3:
        _copy_plane(wide.index(place), codes_ptr, tile, n, gl.uint16, 2, STEP.wide, STEP, CUT)
    if STEP.width == 6 or STEP.width <= 3:
        _copy_plane(narrow.index(place), codes_ptr, tile, n, gl.uint8, 1, STEP.narrow, STEP, CUT)
    async_copy.commit_group()


@gluon.jit
def _decoded(x, y, WIDTH: gl.constexpr, ASSEMBLY: gl.constexpr):
    """The parts of a step's columns."""
    # fmt: off
    if WIDTH == 8:
        return gl.inline_asm_elementwise(ASSEMBLY, "=r,=r,r,r", [x], (gl.int8, gl.int8), True, 4)
    elif WIDTH == 6:  # noqa: RET505
        return gl.inline_asm_elementwise(
            ASSEMBLY, "=r,=r,=r,=r,r,r,r", [x, y], (gl.int8, gl.int8, gl.int8, gl.int8), True, 4)
    elif WIDTH == 4:
        return gl.inline_asm_elementwise(
            ASSEMBLY, "=r,=r,=r,=r,r,r", [x], (gl.int8, gl.int8, gl.int8, gl.int8), True, 4)
    elif WIDTH == 3:
        return gl.inline_asm_elementwise(
            ASSEMBLY, "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r", [x, y],
            (gl.int8, gl.int8, gl.int8, gl.int8, gl.int8, gl.int8, gl.int8, gl.int8), True, 4)
    elif WIDTH == 2:
        return gl.inline_asm_elementwise(
            ASSEMBLY, "=r,=r,=r,=r,r", [y], (gl.int8, gl.int8, gl.int8, gl.int8), True, 4)
    else:
        return gl.inline_asm_elementwise(
            ASSEMBLY, "=r,=r,=r,=r,=r,=r,=r,=r,r", [y],
            (gl.int8, gl.int8, gl.int8, gl.int8, gl.int8, gl.int8, gl.int8, gl.int8), True, 4)
    # fmt: on


@gluon.jit
def _operands(ring, place, STEP: gl.constexpr, LEFT: gl.constexpr):
    """A step decoded: pairs of parts side by side, (TILE, 2 columns) each; to join them moves no register."""
    wide, narrow = ring
    HELD: gl.constexpr = _held(STEP.columns)
    if STEP.width == 6 or STEP.width == 3:
        x = _as(wide.index(place), gl.uint16, STEP.columns, 2).load(HELD)
        y = _as(narrow.index(place), gl.uint8, STEP.columns, 1).load(HELD)
    elif STEP.width > 3:
        x = _as(wide.index(place), gl.uint16, STEP.columns, 2).load(HELD)
        y = x
    else:
        y = _as(narrow.index(place), gl.uint8, STEP.columns, 1).load(HELD)
        x = y
    parts = _decoded(x, y, STEP.width, gl.constexpr(STEP.assembly))
    operands = ()
    for p in gl.static_range(len(parts) // 2):
        pair = gl.permute(gl.join(parts[2 * p], parts[2 * p + 1]), (0, 2, 1))
        pair = gl.convert_layout(gl.reshape(pair, [TILE, 2 * STEP.columns]), LEFT)
        operands = operands + (pair,)  # noqa: RUF005
    return operands


@gluon.jit
def _multiplied(acc, operands, queries, STEP: gl.constexpr):
    """Begins the products of a step."""
    for p in gl.static_range(len(operands)):
        if STEP.columns == 16:
            right = queries[0].index(STEP.piece + p)
        elif STEP.columns == 32:
            right = queries[1].index(STEP.piece + p)
        else:
            right = queries[2].index(STEP.piece + p)
        acc = warpgroup_mma(operands[p], right.permute((1, 0)), acc, is_async=True)
    return acc


@gluon.jit
def _awaited(acc, operands):
    """The sums, once the products have been made; until then the operands' registers stay as they are."""
    acc = warpgroup_mma_wait(0, (acc,))
    for p in gl.static_range(len(operands)):
        gl.inline_asm_elementwise("", "=r,r", [operands[p]], gl.int8, False, 4)
    return acc


@gluon.jit
def _score(ring, queries, of, where, GROUP: gl.constexpr, CUT: gl.constexpr):
    """A group of four warps: the maxima of every so many tiles."""
    codes_ptr, scales_ptr, bias_ptr, mask_ptr, alpha_ptr, beta_ptr, out_ptr = of
    n, first_query, q, alpha_stride, out_stride, block, program, programs = where
    BLOCK_Q: gl.constexpr = CUT.block_q
    STEPS: gl.constexpr = len(CUT.steps)
    AHEAD: gl.constexpr = CUT.stages - 1
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_Q, 32]
    )
    LEFT: gl.constexpr = gl.DotOperandLayout(0, PRODUCT, 4)
    FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    alpha_ptr += first_query + block  # not added to the queries' numbers: addresses would fill the registers
    beta_ptr += first_query + block
    query = gl.arange(0, BLOCK_Q, layout=gl.SliceLayout(0, PRODUCT))
    lane = block + gl.arange(0, BLOCK_Q, layout=FLAT)
    tile = program * CUT.groups + GROUP
    apart = programs * CUT.groups
    for s in gl.static_range(AHEAD):
        _copy_step(
            ring,
            GROUP * CUT.stages + s,
            codes_ptr,
            tile + s // STEPS * apart,
            n,
            gl.constexpr(CUT.steps[s % STEPS]),
            CUT,
        )
    count = 0
    for _ in range(gl.cdiv(gl.cdiv(n, TILE) - tile, apart)):
        acc = gl.zeros([TILE, BLOCK_Q], gl.int32, layout=PRODUCT)
        score = gl.zeros([TILE, BLOCK_Q], gl.float32, layout=PRODUCT)
        running = ()
        for s in gl.static_range(STEPS):
            async_copy.wait_group(AHEAD - 1)
            operands = _operands(ring, GROUP * CUT.stages + count % CUT.stages, gl.constexpr(CUT.steps[s]), LEFT)
            _copy_step(
                ring,
                GROUP * CUT.stages + (count + AHEAD) % CUT.stages,
                codes_ptr,
                tile + (s + AHEAD) // STEPS * apart,
                n,
                gl.constexpr(CUT.steps[(s + AHEAD) % STEPS]),
                CUT,
            )
            count += 1
            acc = _awaited(acc, running)
            acc = _multiplied(acc, operands, queries, gl.constexpr(CUT.steps[s]))
            running = operands
            if CUT.steps[s].ends:
                acc = _awaited(acc, running)
                running = ()
                alpha = gl.load(alpha_ptr + CUT.steps[s].run * alpha_stride + query)
                product = acc.to(gl.float32) * gl.expand_dims(alpha, 0)
                score = product if CUT.steps[s].run == 0 else score + product
                # Not the same sums with `use_acc` off: ptxas then leaves the products before out.
                acc = gl.zeros([TILE, BLOCK_Q], gl.int32, layout=PRODUCT)
        place = tile * TILE + gl.arange(0, TILE, layout=gl.SliceLayout(1, PRODUCT))
        inside = place < n
        rows = gl.where(inside, place, n - 1)
        bias = gl.where(inside, 0.0, float("-inf"))
        if CUT.has_bias:
            bias += gl.load(bias_ptr + rows).to(gl.float32)
        if CUT.has_mask:
            bias = gl.where(gl.load(mask_ptr + rows) != 0, bias, float("-inf"))
        scale = gl.load(scales_ptr + rows).to(gl.float32)
        score = score + gl.expand_dims(gl.load(beta_ptr + query), 0)
        score = score * gl.expand_dims(scale, 1) + gl.expand_dims(bias, 1)
        best = gl.convert_layout(gl.max(score, axis=0), FLAT)
        gl.store(out_ptr + lane * out_stride + tile, best, mask=lane < q)
        tile += apart
    async_copy.wait_group(0)


@gluon.jit
def _keep_queries(queries, values_ptr, first, STEP: gl.constexpr, CUT: gl.constexpr):
    """Puts the queries' slots of a step into shared memory."""
    K: gl.constexpr = 2 * STEP.columns
    LOADING: gl.constexpr = gl.BlockedLayout([1, 16], [512 // K, K // 16], [4, 1], [1, 0])
    query = (first + gl.arange(0, CUT.block_q, layout=gl.SliceLayout(1, LOADING))).to(gl.int64)
    slot = STEP.slot + gl.arange(0, K, layout=gl.SliceLayout(0, LOADING))
    for p in gl.static_range(STEP.parts // 2):
        values = gl.load(values_ptr + gl.expand_dims(query * CUT.slots + p * K, 1) + gl.expand_dims(slot, 0))
        queries.index(STEP.piece + p).store(values)


@gluon.jit
def _memory(PIECES: gl.constexpr, BLOCK_Q: gl.constexpr, K: gl.constexpr):
    layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=K, element_bitwidth=8, rank=2)
    return gl.allocate_shared_memory(gl.int8, [PIECES, BLOCK_Q, K], layout)


@gluon.jit(do_not_specialize=["n", "q", "out_stride", "programs"])
def bands_kernel(
    codes_ptr,  # (n, row) uint8
    scales_ptr,  # (n,)
    bias_ptr,  # (n,) float32 or float16
    mask_ptr,  # (n,) uint8
    values_ptr,  # (queries, slots) int8
    alpha_ptr,  # (runs, alpha_stride) float32
    beta_ptr,  # (alpha_stride,) float32
    out_ptr,  # (q, out_stride) float32: maxima of tiles
    n,
    first_query,  # a multiple of 16
    q,
    alpha_stride,  # a multiple of 16
    out_stride,
    programs,  # for each block of queries
    CUT: gl.constexpr,
):
    """Writes the best score of each tile for each query."""
    q_blocks = gl.cdiv(q, CUT.block_q)
    block = gl.program_id(0) % q_blocks * CUT.block_q
    program = gl.program_id(0) // q_blocks
    queries = (
        _memory(CUT.pieces[0], CUT.block_q, 32),
        _memory(CUT.pieces[1], CUT.block_q, 64),
        _memory(CUT.pieces[2], CUT.block_q, 128),
    )
    RAW: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    ring = (
        gl.allocate_shared_memory(gl.uint8, [CUT.groups * CUT.stages, TILE, CUT.wide], RAW),
        gl.allocate_shared_memory(gl.uint8, [CUT.groups * CUT.stages, TILE, CUT.narrow], RAW),
    )
    for s in gl.static_range(len(CUT.steps)):
        if CUT.steps[s].columns == 16:
            _keep_queries(queries[0], values_ptr, first_query + block, gl.constexpr(CUT.steps[s]), CUT)
        elif CUT.steps[s].columns == 32:
            _keep_queries(queries[1], values_ptr, first_query + block, gl.constexpr(CUT.steps[s]), CUT)
        else:
            _keep_queries(queries[2], values_ptr, first_query + block, gl.constexpr(CUT.steps[s]), CUT)
    fence_async_shared()
    of = (codes_ptr, scales_ptr, bias_ptr, mask_ptr, alpha_ptr, beta_ptr, out_ptr)
    where = (n, first_query, q, alpha_stride, out_stride, block, program, programs)
    if CUT.groups == 1:
        _score(ring, queries, of, where, 0, CUT)
    else:
        gl.warp_specialize(
            [(_score, (ring, queries, of, where, 0, CUT)), (_score, (ring, queries, of, where, 1, CUT))], [4], [240]
        )
