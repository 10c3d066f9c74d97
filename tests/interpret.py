"""The kernel family run by Triton's interpreter: `TRITON_INTERPRET=1 python3 -m tests.interpret GROUP` prints JSON.

One row a check: [what, error, bound]. The variable must be set before triton is imported, hence a program of its own
(tests/test_kernels.py runs it).
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator

if os.environ.get("TRITON_INTERPRET") != "1":
    sys.exit("set TRITON_INTERPRET=1")

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from aot import kernels
from tests import cases
from tests.cases import BF16, CLASSES, F16, F32, Case

Row = tuple[str, float, float]
TILE = (16, 32, 32)
LOADS = ("aligned", "shifted", "masked")
CHUNK_TILE = (16, 32, kernels.FP16_CHUNK)  # every kernel of fp16_accumulate has this K step


def teach_bfloat16(builder: type) -> None:
    """The interpreter holds a bfloat16 as its bits in uint16: it multiplies those, and it cuts where GPUs round."""
    dot, cast = builder.create_dot, builder.cast_impl

    def wide(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def cast_rounded(self, source, to):
        if source.dtype.scalar != tl.float32 or to.scalar != tl.bfloat16:
            return cast(self, source, to)
        bits = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.uint16)
        return interpreter.TensorHandle(bits.numpy(), tl.bfloat16)

    builder.create_dot = lambda self, a, b, *rest: dot(self, wide(a), wide(b), *rest)
    builder.cast_impl = cast_rounded


teach_bfloat16(interpreter.InterpreterBuilder)


def run(
    case: Case, *, tile: tuple[int, int, int] = TILE, loads: str = "masked", parts: int = 1, group_m: int = 2
) -> Row:
    """One launch into the middle of a larger `out`; what lies around it must stay."""
    arguments = cases.make(case)
    x, weight, scale, shift = arguments
    buffer = torch.full((case.m + 2, case.n + 16), torch.nan, dtype=case.out)
    out = buffer[1:-1, 8:-8]
    tile_m, tile_n, tile_k = tile
    kernels.lbg_fused[(math.ceil(case.m / tile_m) * math.ceil(case.n / tile_n),)](
        *(x, weight, scale, shift, out),
        *(case.m, case.n, case.k),
        *(*x.stride(), *weight.stride(), *scale.stride(), *shift.stride(), *out.stride()),
        *(tile_m, tile_n, tile_k, group_m, parts, loads, case.fp16_accumulate, "lbg_fused"),
    )
    what = f"{case} tile {tile} loads={loads} parts={parts} group_m={group_m}"
    if int(buffer.isnan().sum()) != buffer.numel() - out.numel():
        return f"{what}: wrote beside out, or not all of it", math.inf, 0.0
    return what, cases.error(out, cases.reference(arguments)), cases.bound(case)


def classes() -> Iterator[Row]:
    """Every dtype class and kind of load, in one part and two: several tiles with ragged edges and a K tail."""
    for dtypes in CLASSES:
        case = cases.of_class(Case(35, 70, 80), dtypes)
        for loads in LOADS:
            for parts in (1, 2):
                yield run(case, tile=CHUNK_TILE if case.fp16_accumulate else TILE, loads=loads, parts=parts)


def edges() -> Iterator[Row]:
    """Sizes around the tile's, down to 1, for the generic kernel; multiples of 16 in K for an aligned one."""
    for m, n, k in (
        (1, 1, 1),
        (16, 32, 32),
        (17, 33, 33),
        (15, 31, 31),
        (1, 65, 100),
        (49, 1, 7),
        (3, 65, 0),
        (33, 64, 64),
    ):
        for loads in ("shifted", "masked"):
            yield run(Case(m, n, k, out=F32), loads=loads)
            yield run(Case(m, n, k, x=F32, weight=BF16, out=F32), loads=loads)
            yield run(Case(m, n, k, out=F32, fp16_accumulate=True), tile=CHUNK_TILE, loads=loads)
    for k in range(25, 42):  # rows that start on every element of 16 bytes, and ends on every one
        yield run(Case(9, 9, k, out=F32), loads="shifted")
        yield run(Case(9, 9, k, x=F32, out=F32), loads="shifted")
    for k in (0, 16, 32, 48, 64, 112):
        yield run(Case(17, 40, k, out=F32), loads="aligned")
        yield run(Case(17, 40, k, out=F32, fp16_accumulate=True), tile=CHUNK_TILE, loads="aligned")
        yield run(Case(17, 41, k), loads="aligned")  # aligned loads, a result that is not
    yield run(Case(130, 40, 48), tile=(128, 32, 32), loads="aligned")  # a tile of so many rows masks none


def walks() -> Iterator[Row]:
    """Every group size against rows of tiles that it does not divide: each tile is computed once."""
    for group_m in (1, 2, 3, 8):
        for m in (16, 70, 80):
            yield run(Case(m, 100, 16, out=F32), group_m=group_m)


def layouts() -> Iterator[Row]:
    """Every layout of the case generator, for the generic kernel."""
    for layout in cases.LAYOUTS:
        yield run(Case(33, 47, 40, layout=layout))
        yield run(Case(33, 47, 40, x=F32, weight=BF16, out=BF16, layout=layout))
    yield run(Case(33, 47, 48, layout="strided-rows"), loads="aligned")
    yield run(Case(33, 47, 48, layout="strided-weight"), loads="aligned")


@triton.jit
def epilogue(v_ptr, y_ptr, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    tl.store(y_ptr + offsets, kernels.relu_gelu(tl.load(v_ptr + offsets), y_ptr.dtype.element_ty))


def relu_gelu(v: Tensor, dtype: torch.dtype) -> Tensor:
    """The kernel family's epilogue on float32 values."""
    padded = torch.zeros(1 << max(0, (len(v) - 1).bit_length()))
    padded[: len(v)] = v
    y = torch.empty_like(padded, dtype=dtype)
    epilogue[(1,)](padded, y, len(padded))
    return y[: len(v)]


# By the result's dtype, the largest relative error of a result that is normal: of the fit, which float32's rounding
# adds to, or which is added to half a unit in the last place.
ACTIVATION_BOUNDS = {F32: 1e-6, F16: 2.0**-11 + 1.1e-4, BF16: 2.0**-8 + 1.1e-4}


def activation() -> Iterator[Row]:
    """relu_gelu alone, against float64 on the same float32 values; exp2 exact, and off by what the GPU's may be."""
    spread = torch.logspace(-44, 38, 20001, dtype=torch.float64).float()
    sweep = torch.linspace(-40, 40, 1 << 19)
    v = torch.cat([sweep, spread, -spread])
    expected = v.double().relu() * torch.special.ndtr(v.double())
    exact = interpreter.InterpreterBuilder.create_exp2
    for off in (0.0, 2.0**-22, -(2.0**-22)):  # ex2.approx.ftz.f32: 2^-22 relative, by the PTX manual

        def approximate(self, argument, off=off):
            result = exact(self, argument)
            result.data = (result.data.astype(np.float64) * (1 + off)).astype(np.float32)
            return result

        interpreter.InterpreterBuilder.create_exp2 = approximate
        for dtype, bound in ACTIVATION_BOUNDS.items():
            difference = (relu_gelu(v, dtype).double() - expected).abs()
            what = f"relu_gelu to {dtype} over [-40, 40] and both extremes, exp2 off by {off:g}"
            if dtype == F32:
                yield f"{what}, over max(1, |y|)", (difference / expected.clamp_min(1)).max().item(), 4.5e-7
            limits = torch.finfo(dtype)
            normal = (expected > limits.smallest_normal) & (expected < limits.max)
            yield f"{what}, relative", (difference[normal] / expected[normal]).max().item(), bound
            yield f"{what}, where it is 0", difference[expected == 0].max().item(), 0
    interpreter.InterpreterBuilder.create_exp2 = exact
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 3.4e38, -3.4e38])
    wanted = torch.tensor([torch.inf, 0, torch.nan, 0, 0, 3.4e38, 0])
    for dtype in ACTIVATION_BOUNDS:
        same = torch.allclose(relu_gelu(special, dtype), wanted.to(dtype), rtol=0, atol=0, equal_nan=True)
        yield f"relu_gelu({special.tolist()}) to {dtype}", float(not same), 0


def special_values() -> Iterator[Row]:
    """NaN and the infinities through the whole kernel, and a row that holds them leaves the others alone."""
    case = Case(19, 33, 48, out=F32)
    x, weight, scale, shift = cases.make(case)
    x[3, 5], x[4, 0], x[5, 0] = torch.nan, torch.inf, -torch.inf
    out = torch.full((case.m, case.n), 7.0)
    strides = (*x.stride(), *weight.stride(), *scale.stride(), *shift.stride(), *out.stride())
    kernels.lbg_fused[(4,)](x, weight, scale, shift, out, 19, 33, 48, *strides, *TILE, 8, 1, False, False, "lbg_fused")
    v = cases.before_activation(cases.Arguments(x, weight, scale, shift))
    expected = torch.where(v == torch.inf, v, v.relu() * torch.special.ndtr(v.relu())).float()
    same = torch.allclose(out, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    yield f"{case} with NaN, +inf and -inf", float(not same), 0


GROUPS = {group.__name__: group for group in (classes, edges, walks, layouts, activation, special_values)}


if __name__ == "__main__":
    np.seterr(all="ignore")  # NaN and infinity are among the inputs
    print(json.dumps(list(GROUPS[sys.argv[1]]())))
