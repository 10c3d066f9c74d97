"""The one case generator: what tests and benchmarks call the operator with, and what its result must be.

No data is typed in: every tensor is drawn at random from a seed that the case fixes.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
# (x, weight, result): every combination that is shipped
DTYPES = tuple((x, weight, out) for weight in (F16, BF16) for x in (weight, F32) for out in (weight, F32))
CLASSES = tuple(
    (*dtypes, fp16_accumulate)
    for dtypes in DTYPES
    for fp16_accumulate in ((False, True) if dtypes[1] is F16 else (False,))
)


@dataclass(frozen=True)
class Case:
    """One call. `layout` says how x (and for some, weight) lies in memory."""

    m: int
    n: int
    k: int
    x: torch.dtype = F16
    weight: torch.dtype = F16
    out: torch.dtype = F16
    fp16_accumulate: bool = False
    layout: str = "contiguous"

    def __str__(self) -> str:
        dtypes = "-".join(str(dtype).removeprefix("torch.") for dtype in (self.x, self.weight, self.out))
        return f"{self.m}x{self.n}x{self.k}-{dtypes}{'-acc16' if self.fp16_accumulate else ''}-{self.layout}"


@dataclass(frozen=True)
class Arguments:
    x: Tensor
    weight: Tensor
    scale: Tensor
    shift: Tensor

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.x, self.weight, self.scale, self.shift))


# Shapes (M, N, K), each for the edge it names.
ALIGNED = ((128, 128, 128), (256, 512, 320), (64, 64, 64), (16, 4096, 256), (1, 256, 4096), (300, 48, 2048))
RAGGED = ((127, 128, 128), (129, 96, 64), (128, 131, 64), (65, 63, 72), (128, 128, 65), (17, 19, 23), (1, 129, 33))
TINY = ((1, 1, 1), (2, 3, 1), (1, 1, 16), (3, 2, 17))
EMPTY = ((0, 8, 8), (8, 0, 8), (8, 8, 0), (0, 0, 0))
LAYOUTS = (
    "contiguous",
    "strided-rows",  # x is a column window of a wider matrix
    "inner-stride",  # every other element
    "offset",  # x and weight start one element into their storage: no 16-byte alignment
    "expanded",  # x is one row, repeated with stride 0
    "transposed",  # x and weight are stored K-major
    "strided-weight",  # weight is a column window of a wider matrix
    "padded-rows",  # x's and weight's rows start on 128 bytes, whatever K is
    "padded-x",
    "padded-weight",
)


def shapes() -> tuple[tuple[int, int, int], ...]:
    return ALIGNED + RAGGED + TINY + EMPTY


def cases(layouts: tuple[str, ...] = LAYOUTS) -> Iterator[Case]:
    """Every shape contiguous, and every other layout on an aligned and a ragged shape, padded rows with a K off 8 too;
    float16 throughout."""
    for m, n, k in shapes():
        yield Case(m, n, k)
    for layout in layouts[1:]:
        for m, n, k in ((128, 128, 128), (33, 47, 80)):
            yield Case(m, n, k, layout=layout)
        if layout.startswith("padded"):
            for m, n, k in ((300, 264, 203), (1, 128, 65), (40, 77, 1)):
                yield Case(m, n, k, layout=layout)


def of_class(case: Case, dtypes: tuple[torch.dtype, torch.dtype, torch.dtype, bool]) -> Case:
    x, weight, out, fp16_accumulate = dtypes
    return replace(case, x=x, weight=weight, out=out, fp16_accumulate=fp16_accumulate)


def _matrix(rows: int, columns: int, dtype: torch.dtype, layout: str, generator: torch.Generator) -> Tensor:
    """[rows, columns], standard normal, laid out as asked."""
    device = generator.device

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    if layout == "strided-rows":
        return draw(rows, columns + 48)[:, 16 : 16 + columns]
    if layout in ("padded-rows", "padded-x"):
        return draw(rows, -(-columns // 64) * 64)[:, :columns]
    if layout == "inner-stride":
        return draw(rows, 2 * columns)[:, ::2]
    if layout == "offset":
        return draw(rows * columns + 1)[1:].view(rows, columns)
    if layout == "expanded":
        return draw(1, columns).expand(rows, columns)
    if layout == "transposed":
        return draw(columns, rows).t()
    return draw(rows, columns)


WEIGHT_LAYOUT = {
    "offset": "offset", "transposed": "transposed", "strided-weight": "strided-rows", "padded-rows": "padded-rows",
    "padded-weight": "padded-rows",
}  # fmt: skip


def make(case: Case, device: str | torch.device = "cpu") -> Arguments:
    """Random arguments: x and scale near 1 in size, weight 1/sqrt(K), so that results neither vanish nor overflow."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(str(case).encode()))
    x = _matrix(case.m, case.k, case.x, case.layout, generator)
    weight = _matrix(case.n, case.k, case.weight, WEIGHT_LAYOUT.get(case.layout, "contiguous"), generator)
    weight.mul_(1 / math.sqrt(max(case.k, 1)))
    scale = 1 + 0.5 * torch.randn(case.n, generator=generator, device=device)
    shift = 0.5 * torch.randn(case.n, generator=generator, device=device)
    return Arguments(x, weight, scale, shift)


def before_activation(arguments: Arguments) -> Tensor:
    """(x @ weight.T) * scale + shift in float64, a float32 x rounded to weight's dtype first."""
    x, weight, scale, shift = arguments
    return (x.to(weight.dtype).double() @ weight.double().T) * scale.double() + shift.double()


def activation(v: Tensor) -> Tensor:
    """relu(gelu(v)) in v's dtype: gelu(relu(v)) is the same function, and right at -inf."""
    return torch.nn.functional.gelu(torch.relu(v))


def reference(arguments: Arguments) -> Tensor:
    """The contract in float64."""
    return activation(before_activation(arguments))


# Relative error in norm against float64. float32 accumulation of products of 16-bit values: 1e-5. A 16-bit result adds
# its own rounding (half a unit in the last place, 2^-11 or 2^-8). fp16_accumulate rounds partial sums of 64 products.
FLOAT32_BOUND = 1e-5
FP16_ACCUMULATE_BOUND = 6e-4
ROUNDING = {F32: 0.0, F16: 2.0**-11, BF16: 2.0**-8}


def bound(case: Case) -> float:
    return (FP16_ACCUMULATE_BOUND if case.fp16_accumulate else FLOAT32_BOUND) + ROUNDING[case.out]


def error(result: Tensor, expected: Tensor) -> float:
    """||result - expected|| / ||expected||; 0 for two empty or two zero tensors, and NaN never passes a bound."""
    if expected.numel() == 0:
        return 0.0
    difference = (result.double() - expected).norm().item()
    size = expected.norm().item()
    return difference / size if size else difference


def check(case: Case, arguments: Arguments, result: Tensor) -> None:
    """Asserts shape, dtype and error bound, naming the case."""
    assert result.shape == (case.m, case.n) and result.dtype == case.out, f"{case}: {result.shape} {result.dtype}"
    found = error(result, reference(arguments))
    assert found <= bound(case), f"{case}: relative error {found:.2e} over {bound(case):.1e}"
