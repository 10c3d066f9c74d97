"""What is timed: lbg, everything that computes the same function, and bare products as a limit.

A peer is one row of `all_peers`. Each computes relu(gelu(batch_norm(linear(x)))) from the same random data.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

import lbg
from tests import cases
from tests.bench import original
from tests.bench.records import LIMIT, OURS, PEER, Shape
from tests.bench.timing import Call, Subject, one_call_us
from tests.cases import BF16, F16, F32, Case

EPS = 1e-5
PEER_BOUND = 5e-3  # relative error in norm: batch norm and GELU in float16, or tf32 products


class Inputs:
    """Random data of one shape: x [M, K], several weights [N, K], and vectors [N] of the bias and the batch norm.

    x and weights have float16 values in every dtype but bfloat16, so that one float64 reference serves all.
    """

    def __init__(self, shape: Shape, weights: int) -> None:
        self.shape = shape
        generator = torch.Generator("cuda").manual_seed(0)
        draw = partial(torch.randn, generator=generator, device="cuda")
        self.x16 = draw(shape.m, shape.k).to(F16)
        self.weights16 = [draw(shape.n, shape.k).mul_(shape.k**-0.5).to(F16) for _ in range(weights)]
        bias, mean, beta = (0.5 * draw(shape.n) for _ in range(3))
        variance, gamma = 0.5 + draw(shape.n).abs(), 1 + 0.5 * draw(shape.n)
        self.vectors32 = bias, mean, variance, gamma, beta
        self.vectors16 = tuple(vector.to(F16) for vector in self.vectors32)
        self.fold = lbg.fold(bias, mean, variance, gamma, beta, EPS)
        self.rows = torch.randperm(shape.m, generator=generator, device="cuda")[:256]  # that are checked

    @cached_property
    def x32(self) -> Tensor:
        return self.x16.float()

    @cached_property
    def weights32(self) -> list[Tensor]:
        return [weight.float() for weight in self.weights16]

    @cached_property
    def x_bf16(self) -> Tensor:
        return self.x16.to(BF16)

    @cached_property
    def weights_bf16(self) -> list[Tensor]:
        return [weight.to(BF16) for weight in self.weights16]

    def x(self, dtype: torch.dtype) -> Tensor:
        if dtype is F32:
            return self.x32
        return self.x_bf16 if dtype is BF16 else self.x16

    @cached_property
    def expected(self) -> Tensor:
        """In float64, of the checked rows and the first weight."""
        return cases.reference(cases.Arguments(self.x16[self.rows], self.weights16[0], *self.fold))

    @cached_property
    def expected_bf16(self) -> Tensor:
        return cases.reference(cases.Arguments(self.x_bf16[self.rows], self.weights_bf16[0], *self.fold))

    def error(self, result: Tensor, x: torch.dtype) -> float:
        return cases.error(result[self.rows], self.expected_bf16 if x is BF16 else self.expected)


@dataclass(frozen=True)
class Peer:
    name: str  # as --peers takes it, and as tables and plots write it
    kind: str
    x: torch.dtype
    out: torch.dtype
    make: Callable[[Inputs], Subject]
    bound: float = PEER_BOUND
    slow_to_compile: bool = False
    fp16_accumulate: bool = False
    why_not: str = ""  # it cannot run here at all


def four_ops(x: Tensor, weight: Tensor, bias: Tensor, *norm: Tensor) -> Tensor:
    """What people write. norm: mean, variance, gamma, beta."""
    return functional.relu(functional.gelu(functional.batch_norm(functional.linear(x, weight, bias), *norm, eps=EPS)))


def autocast_four_ops(x: Tensor, weight: Tensor, bias: Tensor, *norm: Tensor) -> Tensor:
    with torch.autocast("cuda", dtype=F16):
        return four_ops(x, weight, bias, *norm)


def epilogue_(product: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """One pass, in place, so that what L2 still holds of the product is not written twice."""
    value = product.float() * scale + shift
    return product.copy_(functional.relu(functional.gelu(value)))


def _lbg(x: torch.dtype, out: torch.dtype, fp16_accumulate: bool = False) -> Peer:
    def make(inputs: Inputs) -> Subject:
        weights = inputs.weights_bf16 if x is BF16 else inputs.weights16
        call = partial(lbg.fused, out_dtype=out, fp16_accumulate=fp16_accumulate)
        return Subject([partial(call, inputs.x(x), weight, *inputs.fold) for weight in weights])

    weight = BF16 if x is BF16 else F16
    bound = cases.bound(Case(1, 1, 1, x, weight, out, fp16_accumulate))
    names = {F16: "float16", F32: "float32", BF16: "bfloat16"}
    name = f"lbg {names[x]}" + (f" to {names[out]}" if out is not x else "") + (" acc16" if fp16_accumulate else "")
    return Peer(name, OURS, x, out, make, bound, fp16_accumulate=fp16_accumulate)


def _product(inputs: Inputs) -> Subject:
    return Subject([partial(functional.linear, inputs.x16, weight) for weight in inputs.weights16])


def _cast_and_product(inputs: Inputs) -> Subject:
    return Subject([lambda weight=weight: functional.linear(inputs.x32.to(F16), weight) for weight in inputs.weights16])


def _eager(inputs: Inputs) -> Subject:
    return Subject([partial(four_ops, inputs.x16, weight, *inputs.vectors16) for weight in inputs.weights16])


def _tf32(inputs: Inputs) -> Subject:
    return Subject([partial(four_ops, inputs.x32, weight, *inputs.vectors32) for weight in inputs.weights32])


def _autocast_vectors(inputs: Inputs) -> tuple[Tensor, ...]:
    """The linear layer's bias in float16, as its weight is kept: autocast would cast both anew on every call."""
    return inputs.vectors16[0], *inputs.vectors32[1:]


def _autocast(inputs: Inputs) -> Subject:
    vectors = _autocast_vectors(inputs)
    return Subject([partial(autocast_four_ops, inputs.x32, weight, *vectors) for weight in inputs.weights16])


def _compiled(mode: str, autocast: bool, inputs: Inputs) -> Subject:
    """torch.compile for this one shape. With CUDA graphs of its own, one weight, which it need not copy."""
    function, x = (autocast_four_ops, inputs.x32) if autocast else (four_ops, inputs.x16)
    vectors = _autocast_vectors(inputs) if autocast else inputs.vectors16
    compiled = torch.compile(function, mode=mode, dynamic=False)
    own_graph = mode == "max-autotune"
    weights = inputs.weights16
    if own_graph:
        weights, vectors = [weights[0].clone()], tuple(vector.clone() for vector in vectors)
        for tensor in (*weights, *vectors):  # copies, as the mark would have other peers compile anew
            torch._dynamo.mark_static_address(tensor)
    return Subject([partial(compiled, x, weight, *vectors) for weight in weights], own_graph)


def _product_and_epilogue(inputs: Inputs) -> Subject:
    compiled = torch.compile(epilogue_, mode="max-autotune-no-cudagraphs", dynamic=False)
    return Subject([
        lambda weight=weight: compiled(functional.linear(inputs.x16, weight), *inputs.fold)
        for weight in inputs.weights16
    ])  # fmt: skip


def _original_kernel(kernels: list[original.Kernel], inputs: Inputs) -> Subject:
    """The fastest of its configs, as its autotuner would choose."""
    original.check_sizes(inputs.shape)
    bias, mean, variance, gamma, beta = inputs.vectors32
    vectors = bias, *lbg.fold(None, mean, variance, gamma, beta, EPS)
    transposed = [weight.t().contiguous() for weight in inputs.weights16]
    choices = [
        [partial(original.fused, kernel, inputs.x16, weight_t, vectors) for weight_t in transposed]
        for kernel in kernels
    ]  # fmt: skip
    return Subject(min(choices, key=lambda calls: one_call_us(calls[0])))


def _original_module(kernels: list[original.Kernel], inputs: Inputs) -> Subject:
    original.check_sizes(inputs.shape)
    choices: list[list[Call]] = [
        [partial(original.module, kernel, inputs.x32, weight, inputs.vectors32, EPS) for weight in inputs.weights32]
        for kernel in kernels
    ]
    return Subject(min(choices, key=lambda calls: one_call_us(calls[0])))


def archs() -> tuple[int, int]:
    """What lbg's kernels are compiled for, and this GPU's arch: two only in a verification build.

    Raises:
        RuntimeError: none is shipped for this GPU.
    """
    major, minor = torch.cuda.get_device_capability()
    arch = 10 * major + minor
    for config in lbg.configs():
        if config.arch == arch:
            return config.compiled_arch, arch
    raise RuntimeError(f"this lbg ships no kernel for {torch.cuda.get_device_name()}, sm_{arch}")


def all_peers(path_of_original: Path | None) -> list[Peer]:
    """In the order of tables and plots. Those that cannot run here say why."""
    no_triton = "" if importlib.util.find_spec("triton") else "torch.compile needs triton, which is not installed"
    kernels, no_original = original.load(path_of_original, *archs())
    compiled = partial(Peer, kind=PEER, out=F16, why_not=no_triton)
    return [
        _lbg(F16, F16),
        _lbg(F16, F32),
        _lbg(F16, F16, fp16_accumulate=True),
        _lbg(F32, F32),
        _lbg(F32, F16),
        _lbg(BF16, BF16),
        Peer("cuBLAS", LIMIT, F16, F16, _product),
        Peer("cast + cuBLAS", LIMIT, F32, F16, _cast_and_product),
        Peer("eager", PEER, F16, F16, _eager),
        compiled("cuBLAS + epilogue", x=F16, make=_product_and_epilogue),
        compiled("compile", x=F16, make=partial(_compiled, "default", False)),
        compiled(
            "compile max", x=F16, make=partial(_compiled, "max-autotune-no-cudagraphs", False), slow_to_compile=True
        ),
        compiled("compile max graphs", x=F16, make=partial(_compiled, "max-autotune", False), slow_to_compile=True),
        Peer("original kernel", PEER, F16, F32, partial(_original_kernel, kernels), why_not=no_original),
        Peer("tf32 eager", PEER, F32, F32, _tf32),
        Peer("autocast eager", PEER, F32, F16, _autocast),
        compiled("autocast compile", x=F32, make=partial(_compiled, "default", True)),
        compiled(
            "autocast compile max", x=F32, make=partial(_compiled, "max-autotune-no-cudagraphs", True),
            slow_to_compile=True,
        ),
        compiled(
            "autocast compile max graphs", x=F32, make=partial(_compiled, "max-autotune", True), slow_to_compile=True
        ),
        Peer("original module", PEER, F32, F32, partial(_original_module, kernels), why_not=no_original),
    ]  # fmt: skip
