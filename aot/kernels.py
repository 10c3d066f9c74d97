"""The kernel family: one Triton function, compiled for every row of configs.py that is none of ada.py's or hopper.py's.

    y[m, n] = relu(gelu((sum_k x[m, k] * weight[n, k]) * scale[n] + shift[n]))

An aligned kernel takes rows that start on 16-byte boundaries, so that every main-loop load is an unmasked 16-byte
copy; a generic one takes any strides and masks. Both add the products of a row in the same order (K ascending, 16 at
a time), which is what makes a row's bits the same in every kernel.
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
    ALIGNED: tl.constexpr,
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
    if ALIGNED:
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
