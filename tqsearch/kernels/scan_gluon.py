"""`scan_kernel` for many queries, in Gluon, Triton's lower level: for NVIDIA GPUs of compute capability 9.0.

What plain Triton does not do: codes come into shared memory some columns ahead, in place of whole tiles, so that larger
tiles fit beside the queries; and codes are decoded while the products of those before are under way. One band of scalar
codes, in rows of whole columns aligned to 16 bytes.
"""

# mypy: ignore-errors
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# Renamed between Triton 3.6 and 3.9.
_copy = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@gluon.jit
def _decode(x, WIDTH: gl.constexpr, ASSEMBLY: gl.constexpr):
    # fmt: off
    if WIDTH == 2:
        return gl.inline_asm_elementwise(ASSEMBLY, "=r,=r,=r,=r,r", [x], (gl.int8, gl.int8, gl.int8, gl.int8), True, 4)
    else:  # noqa: RET505
        gl.static_assert(WIDTH == 1)
        return gl.inline_asm_elementwise(
            ASSEMBLY, "=r,=r,=r,=r,=r,=r,=r,=r,r", [x],
            (gl.int8, gl.int8, gl.int8, gl.int8, gl.int8, gl.int8, gl.int8, gl.int8), True, 4)
    # fmt: on


@gluon.jit
def _fetch(
    buffers,
    step,
    steps,
    codes_ptr,
    program,
    programs,
    n,
    ROW: gl.constexpr,
    CHUNKS: gl.constexpr,
    TILE: gl.constexpr,
    BLOCK_C: gl.constexpr,
    STAGES: gl.constexpr,
    LOAD: gl.constexpr,
):
    """Begins to copy the codes of a step, BLOCK_C columns of a tile, to its buffer."""
    place = (program + step // CHUNKS * programs) * TILE + gl.arange(0, TILE, layout=gl.SliceLayout(1, LOAD))
    columns = step % CHUNKS * BLOCK_C + gl.arange(0, BLOCK_C, layout=gl.SliceLayout(0, LOAD))
    rows = gl.minimum(place, n - 1).to(gl.int64)
    pointers = codes_ptr + gl.expand_dims(rows * ROW, 1) + gl.expand_dims(columns, 0)
    all_of_it = gl.full([TILE, BLOCK_C], 1, gl.int1, layout=LOAD)
    _copy(buffers.index(step % STAGES), pointers, mask=all_of_it & (step < steps))
    async_copy.commit_group()


@gluon.jit(do_not_specialize=["n", "q", "out_stride", "programs"])
def gluon_scan_kernel(
    codes_ptr,  # (rows, ROW) uint8
    scales_ptr,  # (rows,)
    bias_ptr,  # (rows,) float32 or float16
    mask_ptr,  # (rows,) uint8
    values_ptr,  # (queries, SLOTS) int8
    alpha_ptr,  # (1, queries) float32
    beta_ptr,  # (1, queries) float32
    out_ptr,  # (q, out_stride) float32, maxima of tiles
    n,
    first_query,  # a multiple of 16
    q,  # queries from there on; there is memory of queries beyond, BLOCK_Q more
    out_stride,
    programs,  # for each block of queries
    ROW: gl.constexpr,
    SLOTS: gl.constexpr,
    WIDTH: gl.constexpr,
    COLUMNS: gl.constexpr,
    ASSEMBLY: gl.constexpr,
    TILE: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    BLOCK_C: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_MASK: gl.constexpr,
    WARPS: gl.constexpr,
):
    """Scores tiles of rows against a block of queries and writes their maxima."""
    PARTS: gl.constexpr = 8 // WIDTH
    CHUNKS: gl.constexpr = COLUMNS // BLOCK_C
    LOAD: gl.constexpr = gl.BlockedLayout([1, 16], [512 // BLOCK_C, BLOCK_C // 16], [WARPS, 1], [1, 0])
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, BLOCK_Q, 32]
    )
    LEFT: gl.constexpr = gl.DotOperandLayout(0, PRODUCT, 4)
    FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    CODES: gl.constexpr = gl.SwizzledSharedLayout(
        vec=16, per_phase=128 // BLOCK_C, max_phase=BLOCK_C // 16, order=[1, 0]
    )
    QUERIES: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=BLOCK_C, element_bitwidth=8, rank=2)
    blocks = gl.cdiv(q, BLOCK_Q)
    program = gl.program_id(0) // blocks
    block = gl.program_id(0) % blocks * BLOCK_Q
    turns = gl.cdiv(gl.cdiv(n, TILE) - program, programs)
    steps = turns * CHUNKS

    queries = gl.allocate_shared_memory(gl.int8, [SLOTS // BLOCK_C, BLOCK_Q, BLOCK_C], QUERIES)
    buffers = gl.allocate_shared_memory(gl.uint8, [STAGES, TILE, BLOCK_C], CODES)
    # fmt: off
    for step in gl.static_range(STAGES - 1):
        _fetch(buffers, step, steps, codes_ptr, program, programs, n, ROW, CHUNKS, TILE, BLOCK_C, STAGES, LOAD)
    query = first_query + block + gl.arange(0, BLOCK_Q, layout=gl.SliceLayout(1, LOAD))
    for piece in range(SLOTS // BLOCK_C):
        slots = piece * BLOCK_C + gl.arange(0, BLOCK_C, layout=gl.SliceLayout(0, LOAD))
        value = gl.load(values_ptr + gl.expand_dims(query * SLOTS, 1) + gl.expand_dims(slots, 0))
        queries.index(piece).store(value)
    fence_async_shared()

    wide = first_query + block + gl.arange(0, BLOCK_Q, layout=gl.SliceLayout(0, PRODUCT))
    lane = block + gl.arange(0, BLOCK_Q, layout=FLAT)
    now = 0
    for turn in range(turns):
        tile = program + turn * programs
        place = tile * TILE + gl.arange(0, TILE, layout=gl.SliceLayout(1, PRODUCT))
        inside = place < n
        rows = gl.where(inside, place, n - 1)
        scale = gl.load(scales_ptr + rows).to(gl.float32)
        acc = gl.zeros([TILE, BLOCK_Q], gl.int32, layout=PRODUCT)
        for chunk in gl.static_range(CHUNKS):
            async_copy.wait_group(STAGES - 2)
            x = buffers.index(now % STAGES).load(LEFT)
            _fetch(buffers, now + STAGES - 1, steps, codes_ptr, program, programs, n, ROW, CHUNKS, TILE, BLOCK_C,
                   STAGES, LOAD)
            parts = _decode(x, WIDTH, ASSEMBLY)
            for part in gl.static_range(PARTS):
                right = queries.index(chunk * PARTS + part).permute((1, 0))
                acc = warpgroup_mma(parts[part], right, acc, is_async=True)
            if chunk < CHUNKS - 1:  # those of the chunk before are done, and their registers free
                acc = warpgroup_mma_wait(PARTS, [acc])
            now += 1
        acc = warpgroup_mma_wait(0, [acc])
        bias = gl.where(inside, 0.0, float("-inf"))
        if HAS_BIAS:
            bias += gl.load(bias_ptr + rows).to(gl.float32)
        if HAS_MASK:
            bias = gl.where(gl.load(mask_ptr + rows) != 0, bias, float("-inf"))
        alpha = gl.load(alpha_ptr + wide)
        beta = gl.load(beta_ptr + wide)
        score = acc.to(gl.float32) * gl.expand_dims(alpha, 0) + gl.expand_dims(beta, 0)
        score = score * gl.expand_dims(scale, 1) + gl.expand_dims(bias, 1)
        most = gl.convert_layout(gl.max(score, axis=0), FLAT)
        gl.store(out_ptr + lane * out_stride + tile, most, mask=lane < q)
    async_copy.wait_group(0)
    # fmt: on
