"""The kernel family: one Triton function, compiled for every row of configs.py that is none of ada.py's or hopper.py's.

    y[m, n] = relu(gelu((sum_k x[m, k] * weight[n, k]) * scale[n] + shift[n]))

An aligned kernel takes rows that start on 16-byte boundaries, so that every main-loop load is an unmasked 16-byte
copy. One of shifted rows takes those that start anywhere: it loads the 16 bytes in which 8 elements begin and those in
which they end, and shifts them together. A generic one takes any strides and masks. All add the products of a row in
the same order (K ascending, 16 at a time), which is what makes a row's bits the same in every kernel.
"""

import triton
import triton.language as tl

# fp16_accumulate sums this many products in float16 before it adds them to the float32 accumulator. It is part of
# the result's definition (every kernel of that mode has this chunk), not a tuning choice.
FP16_CHUNK = 64


def symbol(specialization) -> str:
    """The name that the compiled kernel carries: its config's."""
    return specialization.constants["SYMBOL"]


@triton.jit
def relu_gelu(v, dtype: tl.constexpr):
    """relu(gelu(v)) of a float32 v for the exact-erf GELU, v * Phi(v) where that is positive, rounded to dtype.

    For v > 0 log2(1 - Phi(v)) is smooth: p(v) is its minimax fit on [0, 8] in the result's relative error
    (tests/fit_epilogue.py derives it). A float32 result has degree 5, off by 3.2e-7, with float32's own rounding by
    1e-6 at most; a 16-bit one degree 3, off by 1.1e-4 before it is rounded, at most 0.22 units in the last place of
    float16. An epilogue's instructions are paid for in power: without the two terms an H100 took 1.7 % less at
    4096x4096x4096 from float16 to float16, in one run of both. One exp2 and no division, where erf needs twice the
    instructions and the registers to match.

    For v < 0 p means nothing, but with -|p| for it 1 - exp2 is in [0, 1] there too: v times that is not positive, and
    the maximum, which costs nothing where it is part of the rounding, makes it 0. p falls past 8, so a large v gives
    v * (1 - 0); +inf gives +inf, -inf gives 0, and maximum passes NaN on.
    """
    if dtype == tl.float32:
        p = -0.0005242360639385879 * v + 0.007419101428240538
        p = p * v - 0.05260187387466431
        p = p * v - 0.45922592282295227
        p = p * v - 1.1510974168777466
    else:
        p = -0.03325381129980087 * v - 0.4745520353317261
        p = p * v - 1.147997260093689
    p = p * v - 1.0
    y = v * (1.0 - tl.exp2(-tl.abs(p)))
    return tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL).to(dtype)


@triton.jit(repr=symbol)
def lbg_fused(
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
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EPILOGUE_PARTS: tl.constexpr,
    LOADS: tl.constexpr,  # "aligned", "shifted" or "masked"
    FP16_ACCUMULATE: tl.constexpr,
    SYMBOL: tl.constexpr,
):
    tile_m, tile_n = tile_position(tl.program_id(0), tl.cdiv(M, TILE_M), tl.cdiv(N, TILE_N), GROUP_M)
    offs_m = tile_m * TILE_M + tl.arange(0, TILE_M)
    offs_n = tile_n * TILE_N + tl.arange(0, TILE_N)
    offs_k = tl.arange(0, TILE_K)
    # Rows past the edge read the last row again instead of being masked: the loop stays free of predicates, and what
    # they compute is not stored. A tile for few rows masks them in an aligned loop: most of its rows would ask L2 for
    # the same bytes.
    rows_x = tl.minimum(offs_m, M - 1).to(tl.int64)
    rows_w = tl.minimum(offs_n, N - 1).to(tl.int64)
    x_ptrs = x_ptr + rows_x[:, None] * stride_xm + offs_k[None, :].to(tl.int64) * stride_xk
    acc = tl.zeros((TILE_M, TILE_N), dtype=tl.float32)
    if LOADS == "aligned":
        w_ptrs = weight_ptr + rows_w[None, :] * stride_wn + offs_k[:, None].to(tl.int64) * stride_wk
        full = K // TILE_K * TILE_K
        for _ in range(0, full, TILE_K):
            x = tl.load(x_ptrs, mask=offs_m[:, None] < M, other=0.0) if TILE_M <= 64 else tl.load(x_ptrs)
            acc = multiply_add(x, tl.load(w_ptrs), acc, FP16_ACCUMULATE)
            x_ptrs += TILE_K * stride_xk
            w_ptrs += TILE_K * stride_wk
        if full < K:
            x = tl.load(x_ptrs, mask=offs_k[None, :] < K - full, other=0.0)
            w = tl.load(w_ptrs, mask=offs_k[:, None] < K - full, other=0.0)
            acc = multiply_add(x, w, acc, FP16_ACCUMULATE)
    elif LOADS == "shifted":
        # A step's operands are loaded while the one's before are multiplied. As they are carried from step to step,
        # triton does not see how they were made, and leaves each 16 of K in order.
        x_dtype: tl.constexpr = x_ptr.dtype.element_ty
        w_dtype: tl.constexpr = weight_ptr.dtype.element_ty
        x_ends = ends(x_ptr + rows_x * stride_xm, x_dtype, TILE_K)
        w_ends = ends(weight_ptr + rows_w * stride_wn, w_dtype, TILE_K)
        x = shifted_edge(x_ends, 0, K, x_dtype, TILE_K)
        w = shifted_edge(w_ends, 0, K, w_dtype, TILE_K)
        full = K // TILE_K * TILE_K
        for k in range(TILE_K, full, TILE_K):
            next_x = shifted(x_ends, k, x_dtype, offs_m[:, None] < M if TILE_M <= 64 else None)
            next_w = shifted(w_ends, k, w_dtype, None)
            acc = multiply_add(x, w.T, acc, FP16_ACCUMULATE)
            x = next_x
            w = next_w
        if (full > 0) & (full < K):
            next_x = shifted_edge(x_ends, full, K, x_dtype, TILE_K)
            next_w = shifted_edge(w_ends, full, K, w_dtype, TILE_K)
            acc = multiply_add(x, w.T, acc, FP16_ACCUMULATE)
            x = next_x
            w = next_w
        acc = multiply_add(x, w.T, acc, FP16_ACCUMULATE)
    else:
        # The weight tile is loaded as it lies, and transposed on its way to the dot: 1.3 ms for 2.7 at 4097x4095x4088
        # on an H200. (The aligned loop loses 15 % that way: triton no longer prefetches the next K step's operands.)
        w_ptrs = weight_ptr + rows_w[:, None] * stride_wn + offs_k[None, :].to(tl.int64) * stride_wk
        for k in range(0, K, TILE_K):
            x = tl.load(x_ptrs, mask=offs_k[None, :] < K - k, other=0.0)
            w = tl.load(w_ptrs, mask=offs_k[None, :] < K - k, other=0.0)
            acc = multiply_add(x, w.T, acc, FP16_ACCUMULATE)
            x_ptrs += TILE_K * stride_xk
            w_ptrs += TILE_K * stride_wk

    # Each part is finished and stored before the next is begun: fewer results live at once, so none is spilled.
    PART_N: tl.constexpr = TILE_N // EPILOGUE_PARTS
    parts = column_parts(acc, TILE_M, TILE_N, EPILOGUE_PARTS)
    for part in tl.static_range(EPILOGUE_PARTS):
        cols = tile_n * TILE_N + part * PART_N + tl.arange(0, PART_N)
        cols_read = tl.minimum(cols, N - 1).to(tl.int64)
        scale = tl.load(scale_ptr + cols_read * stride_scale)
        shift = tl.load(shift_ptr + cols_read * stride_shift)
        y = relu_gelu(parts[part] * scale[None, :] + shift[None, :], out_ptr.dtype.element_ty)
        out_ptrs = out_ptr + offs_m[:, None].to(tl.int64) * stride_om + cols[None, :].to(tl.int64) * stride_on
        tl.store(out_ptrs, y, mask=(offs_m[:, None] < M) & (cols[None, :] < N))


@triton.jit
def ends(starts, dtype: tl.constexpr, TILE_K: tl.constexpr):
    """Of rows that start at `starts`: pointers to the words of 4 bytes from the last 16-byte boundary on, four by four
    those in which 16 bytes of a row begin, and to the four in which they end; and how many elements of the first four
    are not the row's yet. What is read beside a row lies in 16 bytes that hold an element of it."""
    BYTES: tl.constexpr = dtype.primitive_bitwidth // 8
    address = starts.to(tl.uint64, bitcast=True)
    skip = (address % 16).to(tl.int32) // BYTES
    words = tl.arange(0, TILE_K * BYTES // 4)[None, :]
    first = (address - address % 16).to(tl.pointer_type(tl.uint32), bitcast=True)[:, None] + words
    last = first + tl.where(skip > 0, 4, 0)[:, None]  # of an aligned row the same: there may be no next
    first = tl.max_contiguous(tl.multiple_of(first, [1, 16]), [1, 4])
    last = tl.max_contiguous(tl.multiple_of(last, [1, 16]), [1, 4])
    return first, last, skip[:, None]


@triton.jit
def shifted(row_ends, k, dtype: tl.constexpr, mask):
    """A tile of a whole step, from k on."""
    first, last, skip = row_ends
    words = k * dtype.primitive_bitwidth // 32
    if mask is None:
        began, ended = tl.load(first + words), tl.load(last + words)
    else:
        began, ended = tl.load(first + words, mask=mask, other=0), tl.load(last + words, mask=mask, other=0)
    return shift(began, ended, skip, dtype)


@triton.jit
def shifted_edge(row_ends, k, K, dtype: tl.constexpr, TILE_K: tl.constexpr):
    """The same of a step that K, which may be 0, may end in: zeros follow."""
    first, last, skip = row_ends
    PER_WORD: tl.constexpr = 32 // dtype.primitive_bitwidth
    words = k // PER_WORD
    column = k - skip + tl.arange(0, TILE_K // PER_WORD)[None, :] // 4 * 4 * PER_WORD
    began = tl.load(first + words, mask=tl.maximum(column, 0) < K, other=0)
    ended = tl.load(last + words, mask=column + 4 * PER_WORD * (skip > 0) < K, other=0)
    return tl.where(tl.arange(0, TILE_K)[None, :] < K - k, shift(began, ended, skip, dtype), 0.0)


@triton.jit
def shift(began, ended, skip, dtype: tl.constexpr):
    """Rows, from the words in which every 16 bytes of them begin and end."""
    HALVES: tl.constexpr = dtype.primitive_bitwidth == 16  # of words: an odd number of them may be skipped
    w0, w1, w2, w3 = four(began)
    w4, w5, w6, w7 = four(ended)
    words = skip // 2 if HALVES else skip
    two = words >= 2
    w0, w1, w2 = tl.where(two, w2, w0), tl.where(two, w3, w1), tl.where(two, w4, w2)
    w3, w4, w5 = tl.where(two, w5, w3), tl.where(two, w6, w4), tl.where(two, w7, w5)
    one = words % 2 == 1
    w0, w1, w2 = tl.where(one, w1, w0), tl.where(one, w2, w1), tl.where(one, w3, w2)
    w3, w4 = tl.where(one, w4, w3), tl.where(one, w5, w4)
    if HALVES:
        half = skip % 2 == 1
        w0, w1 = tl.where(half, straddling(w0, w1), w0), tl.where(half, straddling(w1, w2), w1)
        w2, w3 = tl.where(half, straddling(w2, w3), w2), tl.where(half, straddling(w3, w4), w3)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(began.shape)
    if HALVES:
        low, high = words.to(tl.uint16), (words >> 16).to(tl.uint16)
        return tl.join(low, high).reshape(began.shape[0], began.shape[1] * 2).to(dtype, bitcast=True)
    else:
        return words.to(dtype, bitcast=True)


@triton.jit
def four(words):
    """Of words four by four, the first, second, third and fourth."""
    even, odd = words.reshape(words.shape[0], words.shape[1] // 4, 2, 2).split()
    first, third = even.split()
    second, fourth = odd.split()
    return first, second, third, fourth


@triton.jit
def straddling(word, following):
    """The two elements of 16 bits that end the one and begin the other."""
    return (word >> 16) | (following << 16)


@triton.jit
def tile_position(tile, tiles_m, tiles_n, GROUP_M):
    """(row, column) of the tile-th tile: GROUP_M rows of tiles at a time, column by column within a group, so that the
    tiles in flight share their rows of x and of weight in L2."""
    group_first = (tile // (GROUP_M * tiles_n)) * GROUP_M
    group_rows = tl.minimum(tiles_m - group_first, GROUP_M)
    in_group = tile % (GROUP_M * tiles_n)
    return group_first + in_group % group_rows, in_group // group_rows


@triton.jit
def column_parts(acc, TILE_M: tl.constexpr, TILE_N: tl.constexpr, PARTS: tl.constexpr):
    """acc's columns as PARTS (a power of 2) tensors of equal width, left to right."""
    if PARTS == 1:
        return (acc,)
    else:
        left, right = acc.reshape(TILE_M, 2, TILE_N // 2).permute(0, 2, 1).split()
        return column_parts(left, TILE_M, TILE_N // 2, PARTS // 2) + column_parts(
            right, TILE_M, TILE_N // 2, PARTS // 2
        )


@triton.jit
def multiply_add(x, w, acc, FP16_ACCUMULATE: tl.constexpr):
    """acc + x @ w, x rounded to w's dtype (a float32 x never exists in 16 bits outside registers)."""
    x = x.to(w.dtype)
    if FP16_ACCUMULATE:
        return acc + tl.dot(x, w, out_dtype=tl.float16).to(tl.float32)
    return tl.dot(x, w, acc)
