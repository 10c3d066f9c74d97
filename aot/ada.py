"""The sm_89 kernel, in Gluon: there the layout of each register and of each byte of shared memory is ours to choose.

It computes what lbg_fused (kernels.py) does, and adds in the same order: K ascending, 16 at a time, one chain of sums
an element. A ring of STAGES shared buffers is filled by cp.async. The loop is unrolled by a multiple of the ring, so
which buffer a step uses is a constant: no index arithmetic is left, and triton sees that a step's copies and loads
never meet, so that one barrier a step is enough. Beyond K zeros are copied: the loop has no tail and its last copies
no branch.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from aot import kernels
from aot.kernels import column_parts, relu_gelu, symbol, tile_position

FP16_CHUNK = gl.constexpr(kernels.FP16_CHUNK)


@gluon.constexpr_function
def copy_layout(columns, dtype, warps):
    """Who copies what of a [rows, columns] tile: 16 bytes at a time, a row by neighbours in a warp."""
    elements = 128 // dtype.primitive_bitwidth
    lanes = min(columns // elements, 32)
    return gl.BlockedLayout([1, elements], [32 // lanes, lanes], [warps, 1], [1, 0])


@gluon.constexpr_function
def shared_layout(columns, dtype):
    """A [rows, columns] tile whose pieces of 8 elements are swizzled so that those read at once lie in different banks:
    the same 16 bytes of 8 rows, by ldmatrix, or the same 32 bytes of 4 rows, by half of a warp that loads float32."""
    pieces = columns // 8
    rows = 128 // dtype.primitive_bitwidth
    rows_per_phase = max(1, rows // pieces)
    return gl.SwizzledSharedLayout(8, rows_per_phase, min(rows // rows_per_phase, pieces), [1, 0])


@gluon.constexpr_function
def store_layout(layout, warps, ragged):
    """How a result is spread over threads for its stores.

    Rows that start on 16 bytes: the layout as it is, a thread's registers in the order of their columns, which moves
    nothing. Ragged ones: a warp stores 32 neighbours, an element a thread."""
    if ragged:
        return gl.BlockedLayout([1, 1], [1, 32], [warps, 1], [1, 0])
    registers = sorted(layout.reg_bases, key=lambda basis: (basis[0], basis[1]))
    return gl.DistributedLinearLayout(registers, layout.lane_bases, layout.warp_bases, layout.block_bases, layout.shape)


@gluon.jit(repr=symbol)
def lbg_fused_async(
    x_ptr,
    weight_ptr,
    scale_ptr,
    shift_ptr,
    out_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_scale,
    stride_shift,
    stride_om,
    stride_on,
    TILE_M: gl.constexpr,
    TILE_N: gl.constexpr,
    TILE_K: gl.constexpr,
    WARPS_M: gl.constexpr,
    WARPS_N: gl.constexpr,
    STAGES: gl.constexpr,
    UNROLL: gl.constexpr,  # steps a loop pass: a multiple of STAGES, and whole chunks of fp16_accumulate
    UNIT_K: gl.constexpr,  # how deep the operands are that a warp holds in registers, twice
    PAIRS: gl.constexpr,  # weight_row's
    GROUP_M: gl.constexpr,
    EPILOGUE_PARTS: gl.constexpr,  # of a tile, or of each half
    RAGGED: gl.constexpr,  # result rows may start anywhere
    FP16_ACCUMULATE: gl.constexpr,
    HALVES: gl.constexpr,  # of a tile that leaves fp16_accumulate no registers to spare: add_halves()
    SYMBOL: gl.constexpr,
):
    WARPS: gl.constexpr = WARPS_M * WARPS_N
    AHEAD: gl.constexpr = STAGES - 1
    x_dtype: gl.constexpr = x_ptr.dtype.element_ty
    dtype: gl.constexpr = weight_ptr.dtype.element_ty
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS_M, WARPS_N], [16, 8])
    x_copies: gl.constexpr = copy_layout(TILE_K, x_dtype, WARPS)
    w_copies: gl.constexpr = copy_layout(TILE_K, dtype, WARPS)

    tile_m, tile_n = tile_position(gl.program_id(0), gl.cdiv(M, TILE_M), gl.cdiv(N, TILE_N), GROUP_M)
    x_offs_k = gl.arange(0, TILE_K, gl.SliceLayout(0, x_copies))[None, :]
    w_offs_k = gl.arange(0, TILE_K, gl.SliceLayout(0, w_copies))[None, :]
    rows_x = tile_m * TILE_M + gl.arange(0, TILE_M, gl.SliceLayout(1, x_copies))
    rows_w = tile_n * TILE_N + weight_row(gl.arange(0, TILE_N, gl.SliceLayout(1, w_copies)), WARPS_N, PAIRS)
    # Rows past the edge read the first rows again, and what they compute is not stored. Not one row: L2 would be asked
    # for the same bytes by all of them. Few rows are masked besides.
    x_ptrs = x_ptr + ((rows_x % M).to(gl.int64)[:, None] * stride_xm + x_offs_k)
    w_ptrs = weight_ptr + ((rows_w % N).to(gl.int64)[:, None] * stride_wn + w_offs_k)
    x_end = K
    if TILE_M <= 64:
        x_end = (rows_x < M).to(gl.int32)[:, None] * K

    x_ring = gl.allocate_shared_memory(x_dtype, [STAGES, TILE_M, TILE_K], shared_layout(TILE_K, x_dtype))
    w_ring = gl.allocate_shared_memory(dtype, [STAGES, TILE_N, TILE_K], shared_layout(TILE_K, dtype))
    if HALVES:
        acc = zero_halves(TILE_M, TILE_N // 2, gl.float32, mma)
        chunk = zero_halves(TILE_M, TILE_N // 2, gl.float16, mma)
    else:
        acc = gl.zeros((TILE_M, TILE_N), gl.float32, mma)
        chunk = gl.zeros((TILE_M, TILE_N), gl.float16, mma)  # of fp16_accumulate: the last, not in acc yet

    for stage in gl.static_range(AHEAD):
        k = stage * TILE_K
        copy_step(x_ring, w_ring, stage, x_ptrs + k, w_ptrs + k, x_offs_k < x_end - k, w_offs_k < K - k)

    for first_k in range(0, K, UNROLL * TILE_K):
        if HALVES:
            x_now = x_ptrs
            w_now = w_ptrs
        else:
            x_now = x_ptrs + first_k
            w_now = w_ptrs + first_k
        left = K - first_k
        x_left = x_end - first_k
        for step in gl.static_range(UNROLL):
            async_copy.wait_group(STAGES - 2)
            x_tile = x_ring.index(step % STAGES)
            w_tile = w_ring.index(step % STAGES)
            k = (step + AHEAD) * TILE_K
            slot = (step + AHEAD) % STAGES
            if HALVES:
                # Counted down from what is left: one register for the columns of all steps, where theirs would be four.
                copy_step(x_ring, w_ring, slot, x_now + k, w_now + k, x_offs_k < x_left - k, w_offs_k < left - k)
                acc, chunk = add_halves(x_tile, w_tile, acc, chunk, step * TILE_K % FP16_CHUNK, TILE_K, mma)
            elif FP16_ACCUMULATE:
                copy_step(x_ring, w_ring, slot, x_now + k, w_now + k, x_offs_k + k < x_left, w_offs_k + k < left)
                acc, chunk = add_chunks(x_tile, w_tile, acc, chunk, step * TILE_K % FP16_CHUNK, TILE_K, mma)
            else:
                # The first loads go before the copies, which take longer to issue and whose results are not awaited.
                x = x_operand(x_tile, dtype, 0, UNIT_K, mma)
                w = w_operand(w_tile, 0, UNIT_K, mma)
                copy_step(x_ring, w_ring, slot, x_now + k, w_now + k, x_offs_k + k < x_left, w_offs_k + k < left)
                acc = add_products(x_tile, w_tile, acc, x, w, TILE_K, UNIT_K, mma)
        if HALVES:  # or else a second set of pointers would be held through the loop, those of its beginning
            x_ptrs += UNROLL * TILE_K
            w_ptrs += UNROLL * TILE_K
    async_copy.wait_group(0)

    # Each part is finished and stored before the next is begun.
    if HALVES:
        left_acc, right_acc = acc
        left_acc = in_result_order(left_acc, WARPS_N, PAIRS)
        right_acc = in_result_order(right_acc, WARPS_N, PAIRS)
        parts = column_parts(left_acc, TILE_M, TILE_N // 2, EPILOGUE_PARTS)
        parts += column_parts(right_acc, TILE_M, TILE_N // 2, EPILOGUE_PARTS)
    else:
        if FP16_ACCUMULATE:
            acc += chunk.to(gl.float32)
        acc = in_result_order(acc, WARPS_N, PAIRS)
        parts = column_parts(acc, TILE_M, TILE_N, EPILOGUE_PARTS)
    for part in gl.static_range(len(parts)):
        first_n = tile_n * TILE_N + part * (TILE_N // len(parts))
        store(parts[part], scale_ptr, shift_ptr, out_ptr, tile_m * TILE_M, first_n, M, N, stride_om, RAGGED)


@gluon.jit
def copy_step(x_ring, w_ring, stage, x_ptrs, w_ptrs, x_mask, w_mask):
    """Begins to copy one step's operands into a stage of their rings."""
    async_copy.async_load(x_ring.index(stage), x_ptrs, mask=x_mask)
    async_copy.async_load(w_ring.index(stage), w_ptrs, mask=w_mask)
    async_copy.commit_group()


@gluon.jit
def x_operand(x_tile, dtype: gl.constexpr, k: gl.constexpr, DEPTH: gl.constexpr, mma: gl.constexpr):
    """Of a float32 x, rounded on its way from shared memory to the matrix instruction."""
    return x_tile.slice(k, DEPTH, 1).load(gl.DotOperandLayout(0, mma, 2)).to(dtype)


@gluon.jit
def w_operand(w_tile, k: gl.constexpr, DEPTH: gl.constexpr, mma: gl.constexpr):
    return w_tile.slice(k, DEPTH, 1).permute([1, 0]).load(gl.DotOperandLayout(1, mma, 2))


@gluon.jit
def add_products(x_tile, w_tile, acc, x, w, TILE_K: gl.constexpr, UNIT_K: gl.constexpr, mma: gl.constexpr):
    """acc + x_tile @ w_tile.T; x and w are its first operands. A unit's are loaded while the one before multiplies."""
    for k in gl.static_range(UNIT_K, TILE_K, UNIT_K):
        next_x = x_operand(x_tile, w_tile.dtype, k, UNIT_K, mma)
        next_w = w_operand(w_tile, k, UNIT_K, mma)
        acc = mma_v2(x, w, acc)
        x = next_x
        w = next_w
    return mma_v2(x, w, acc)


@gluon.jit
def add_chunks(x_tile, w_tile, acc, chunk, begun: gl.constexpr, TILE_K: gl.constexpr, mma: gl.constexpr):
    """add_products() with sums of FP16_CHUNK products in float16: (acc without the last of them, that one), of which
    `begun` products were summed before. Each is added to acc while the next one's products are under way."""
    DEPTH: gl.constexpr = min(TILE_K, FP16_CHUNK)
    for first_k in gl.static_range(0, TILE_K, DEPTH):
        last = chunk
        if begun == 0:
            chunk = gl.zeros(acc.shape, gl.float16, mma)
        for k in gl.static_range(first_k, first_k + DEPTH, 16):
            x = x_operand(x_tile, w_tile.dtype, k, 16, mma)
            chunk = mma_v2(x, w_operand(w_tile, k, 16, mma), chunk)
        if begun == 0:
            acc += last.to(gl.float32)
    return acc, chunk


@gluon.jit
def zero_halves(ROWS: gl.constexpr, COLUMNS: gl.constexpr, dtype: gl.constexpr, mma: gl.constexpr):
    return gl.zeros((ROWS, COLUMNS), dtype, mma), gl.zeros((ROWS, COLUMNS), dtype, mma)


@gluon.jit
def add_halves(x_tile, w_tile, acc, chunk, begun: gl.constexpr, TILE_K: gl.constexpr, mma: gl.constexpr):
    """add_chunks() for a tile whose sums take three quarters of a thread's registers: (acc, chunk), each in two halves
    side by side. There is one chunk, which is added to acc as soon as it is whole, while another warp multiplies; and
    an operand is read when it is needed."""
    gl.static_assert(FP16_CHUNK % TILE_K == 0, "a step must not cross from one chunk to the next")
    COLUMNS: gl.constexpr = acc[0].shape[1]
    left, right = chunk
    for k in gl.static_range(0, TILE_K, 16):
        no_sooner()
        x = x_operand(x_tile, w_tile.dtype, k, 16, mma)
        no_sooner()
        left = mma_v2(x, w_operand(w_tile.slice(0, COLUMNS, 0), k, 16, mma), left)
        no_sooner()
        right = mma_v2(x, w_operand(w_tile.slice(COLUMNS, COLUMNS, 0), k, 16, mma), right)
    if begun + TILE_K == FP16_CHUNK:
        acc = (acc[0] + left.to(gl.float32), acc[1] + right.to(gl.float32))
        left, right = zero_halves(acc[0].shape[0], COLUMNS, gl.float16, mma)
    return acc, (left, right)


@gluon.jit
def no_sooner():
    """Keeps the assembler from reading shared memory ahead, into registers that it then would have to spill: a warp's
    barrier is where it may not, and costs one issue slot."""
    gl.inline_asm("bar.warp.sync -1;")


@gluon.jit
def weight_row(column, WARPS_N: gl.constexpr, PAIRS: gl.constexpr):
    """Which row of the weight tile gives the products in `column` of the accumulator.

    Of every 8 columns a thread holds 2, and its next 2 are 8 * WARPS_N further on. With the rows dealt out this way
    PAIRS such pairs are neighbours in the result, and the thread stores them at once, with no exchange of data.
    """
    pair = column // 2 % 4
    warp = column // 8 % WARPS_N
    block = column // (8 * WARPS_N) % PAIRS
    rest = column // (8 * WARPS_N * PAIRS)
    return (((rest * WARPS_N + warp) * 4 + pair) * PAIRS + block) * 2 + column % 2


@gluon.jit
def in_result_order(acc, WARPS_N: gl.constexpr, PAIRS: gl.constexpr):
    """acc with its columns where weight_row took their rows from: a renaming of registers."""
    TILE_M: gl.constexpr = acc.shape[0]
    TILE_N: gl.constexpr = acc.shape[1]
    acc = acc.reshape((TILE_M, TILE_N // (8 * WARPS_N * PAIRS), PAIRS, WARPS_N, 4, 2))
    return acc.permute((0, 1, 3, 4, 2, 5)).reshape((TILE_M, TILE_N))


@gluon.jit
def store(acc, scale_ptr, shift_ptr, out_ptr, first_m, first_n, M, N, stride_om, RAGGED: gl.constexpr):
    layout: gl.constexpr = store_layout(acc.type.layout, gl.num_warps(), RAGGED)
    acc = gl.convert_layout(acc, layout)
    rows = first_m + gl.arange(0, acc.shape[0], gl.SliceLayout(1, layout))
    columns = first_n + gl.arange(0, acc.shape[1], gl.SliceLayout(0, layout))
    scale = gl.load(scale_ptr + columns, mask=columns < N, other=0.0)
    shift = gl.load(shift_ptr + columns, mask=columns < N, other=0.0)
    y = relu_gelu(acc * scale[None, :] + shift[None, :], out_ptr.dtype.element_ty)
    out_ptrs = out_ptr + (rows.to(gl.int64)[:, None] * stride_om + columns[None, :])
    gl.store(out_ptrs, y, mask=(rows[:, None] < M) & (columns[None, :] < N))
