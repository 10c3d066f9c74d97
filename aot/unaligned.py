"""The sm_90 kernel for rows that start anywhere, of a 16-bit x, in Gluon: there the TMA unit cannot load, as what it
reads starts on 16 bytes.

Two groups of warps take its place, and the K steps by turns: while one group's loads are on their way, the other's
rows are shifted. A group loads the 16 bytes in which 8 elements begin and those in which they end, puts them together
and writes them to a slot of hopper.py's ring, from which four more warps multiply with wgmma, as if they had come
aligned. So L1 and the shifts work beside the products, where aot/kernels.py's one has its warps do all in turn.

    x, weight ---16 bytes twice, registers---> shift ---> ring ---> wgmma

A tile has up to 64 rows and columns: a thread of a group holds its rows' words of one step, and more of them spill.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from aot.hopper import Ring, allocate_barriers, full_box, ring_tile, stage_of
from aot.kernels import four, symbol, tile_position

GROUPS = gl.constexpr(2)
GROUP_WARPS = gl.constexpr(8)
NOWHERE = gl.constexpr(1 << 30)  # a column past every K (csrc/dispatch.cpp's kShiftedK)


@gluon.jit(repr=symbol)
def lbg_fused_shift(
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
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    SYMBOL: gl.constexpr,
):
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    gl.static_assert(dtype == weight_ptr.dtype.element_ty, "a float32 x has twice the words")
    tile_m, tile_n = tile_position(gl.program_id(0), gl.cdiv(M, TILE_M), gl.cdiv(N, TILE_N), GROUP_M)
    first_m = full_box(tile_m * TILE_M, M, TILE_M)
    first_n = full_box(tile_n * TILE_N, N, TILE_N)
    full, empty = allocate_barriers(STAGES, 1, 1)
    x_ring = Ring(allocate_rows(dtype, STAGES, TILE_M, TILE_K), full, empty, TILE_K, STAGES)
    weight_ring = Ring(allocate_rows(dtype, STAGES, TILE_N, TILE_K), full, empty, TILE_K, STAGES)
    x = (x_ptr, stride_xm, first_m, M)
    weight = (weight_ptr, stride_wn, first_n, N)
    result = (scale_ptr, shift_ptr, out_ptr, stride_om)
    gl.warp_specialize(
        [
            (ring_tile, (x_ring, weight_ring, result, first_m, first_n, M, N, K, 0, False)),
            (shift_steps, (0, x_ring, weight_ring, x, weight, K)),
            (shift_steps, (1, x_ring, weight_ring, x, weight, K)),
        ],
        [GROUP_WARPS, GROUP_WARPS],
    )


@gluon.jit
def allocate_rows(dtype: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr, TILE_K: gl.constexpr):
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, TILE_K], dtype)
    return gl.allocate_shared_memory(dtype, [STAGES, ROWS, TILE_K], LAYOUT)


@gluon.jit
def shift_steps(WHO: gl.constexpr, x_ring, weight_ring, x, weight, K):
    """Brings in one group's steps of both operands, K ascending. Its next step's are loaded as soon as this one's have
    left their registers."""
    TILE_K: gl.constexpr = x_ring.TILE_K
    x_rows = rows_of(x, x_ring)
    weight_rows = rows_of(weight, weight_ring)
    x_words = load_words(x_rows, K - WHO * TILE_K, WHO * TILE_K)
    weight_words = load_words(weight_rows, K - WHO * TILE_K, WHO * TILE_K)
    step = WHO
    for k in range(WHO * TILE_K, K, GROUPS * TILE_K):
        stage, parity = stage_of(step, x_ring.full)
        mbarrier.wait(x_ring.empty.index(stage), parity ^ 1)
        next_k = k + GROUPS * TILE_K
        store_shifted(x_ring, stage, x_words, x_rows, K - k)
        x_words = load_words(x_rows, K - next_k, next_k)
        store_shifted(weight_ring, stage, weight_words, weight_rows, K - k)
        weight_words = load_words(weight_rows, K - next_k, next_k)
        fence_async_shared()
        mbarrier.arrive(x_ring.full.index(stage))
        step += GROUPS


@gluon.constexpr_function
def words_layout(words, warps):
    """A thread has 4 words of a row, 16 bytes, beside those of its neighbours in a warp."""
    return gl.BlockedLayout([1, 4], [32 // (words // 4), words // 4], [warps, 1], [1, 0])


@gluon.jit
def rows_of(operand, ring):
    """Of a tile's rows: pointers to the words of 4 bytes from the last 16-byte boundary on, the column in which every
    16 bytes of them begin, and how many elements of a row's first 16 bytes are not the row's yet.

    What is read beside a row lies in 16 bytes that hold an element of it. Rows past the edge have no columns.
    """
    ptr, stride, first, rows = operand
    ROWS: gl.constexpr = ring.slots.shape[1]
    WORDS: gl.constexpr = ring.TILE_K // 2
    LAYOUT: gl.constexpr = words_layout(WORDS, gl.num_warps())
    row = first + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    address = (ptr + gl.minimum(row, rows - 1).to(gl.int64) * stride).to(gl.uint64, bitcast=True)
    skip = (address % 16).to(gl.int32) // 2
    word = gl.expand_dims(gl.arange(0, WORDS, gl.SliceLayout(0, LAYOUT)), 0)
    words = gl.expand_dims((address - address % 16).to(gl.pointer_type(gl.uint32), bitcast=True), 1) + word
    words = gl.max_contiguous(gl.multiple_of(words, [1, 16]), [1, 4])
    column = word // 4 * 8 - gl.expand_dims(skip, 1)
    return words, gl.where(gl.expand_dims(row < rows, 1), column, NOWHERE), skip


@gluon.jit
def load_words(rows, left, k):
    """(the 16 bytes in which 8 elements of each row begin, those in which they end) of the step at k, where `left`
    columns are left. A row that starts on 16 bytes ends where it begins."""
    words, column, skip = rows
    words += k // 2
    left = gl.where(left > 0, left, -NOWHERE)  # K may be 0, and a row's first 16 bytes begin before column 0
    began = gl.load(words, mask=column < left, other=0)
    ended = gl.load(words + 4, mask=gl.expand_dims(skip > 0, 1) & (column < left - 8), other=0)
    return began, ended


@gluon.jit
def store_shifted(ring, stage, words, rows, left):
    """Puts each row together, as aot/kernels.py's shift() does, and writes it to a slot; zeros past the last column."""
    began, ended = words
    _, _, skip = rows
    ROWS: gl.constexpr = began.shape[0]
    WORDS: gl.constexpr = began.shape[1]
    w0, w1, w2, w3 = four(began)
    w4, w5, w6, w7 = four(ended)
    skip = gl.expand_dims(gl.convert_layout(skip, gl.SliceLayout(1, w0.type.layout)), 1)
    two = skip >= 4
    w0, w1, w2 = gl.where(two, w2, w0), gl.where(two, w3, w1), gl.where(two, w4, w2)
    w3, w4, w5 = gl.where(two, w5, w3), gl.where(two, w6, w4), gl.where(two, w7, w5)
    one = skip % 4 >= 2
    w0, w1, w2 = gl.where(one, w1, w0), gl.where(one, w2, w1), gl.where(one, w3, w2)
    w3, w4 = gl.where(one, w4, w3), gl.where(one, w5, w4)
    chosen = gl.where(skip % 2 == 1, 0x5432, 0x3210)
    w0, w1 = four_bytes(w0, w1, chosen), four_bytes(w1, w2, chosen)
    w2, w3 = four_bytes(w2, w3, chosen), four_bytes(w3, w4, chosen)
    shifted = gl.join(gl.join(w0, w2), gl.join(w1, w3)).reshape((ROWS, WORDS))
    if left < ring.TILE_K:
        here = left - 2 * gl.expand_dims(gl.arange(0, WORDS, gl.SliceLayout(0, shifted.type.layout)), 0)
        kept = gl.where(here >= 2, -1, gl.where(here == 1, 0xFFFF, 0))
        shifted &= kept.to(gl.uint32, bitcast=True)
    LAYOUT: gl.constexpr = of_words(ring.slots.layout)
    ring.slots.index(stage).reinterpret(gl.uint32, (ROWS, WORDS), LAYOUT).store(shifted)


@gluon.constexpr_function
def of_words(layout):
    """The same bytes in words of 4."""
    return gl.NVMMASharedLayout(swizzle_byte_width=layout.swizzle_byte_width, element_bitwidth=32, rank=2)


@gluon.jit
def four_bytes(word, following, chosen):
    """Of two words' eight bytes the four that `chosen` names, a digit a byte."""
    return gl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [word, following, chosen], dtype=gl.uint32, is_pure=True, pack=1
    )
