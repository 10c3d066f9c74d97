"""The operators on the CPU: values against float64, layouts, fake tensors, compilation, derivatives, and the import."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import lbg
from tests import cases
from tests.cases import BF16, CLASSES, F16, F32, Arguments, Case

BEST_IMPORT_MS = 20.0


def call(case: Case, arguments: Arguments, **kwargs: Tensor) -> Tensor:
    if "out" not in kwargs:
        return lbg.fused(*arguments, out_dtype=case.out, fp16_accumulate=case.fp16_accumulate)
    return lbg.fused(*arguments, fp16_accumulate=case.fp16_accumulate, **kwargs)


# ---- values


@pytest.mark.parametrize("case", tuple(cases.cases()), ids=str)
def test_every_dtype_class(case: Case) -> None:
    for dtypes in CLASSES:
        of_class = cases.of_class(case, dtypes)
        arguments = cases.make(of_class)
        result = call(of_class, arguments)
        cases.check(of_class, arguments, result)
        assert result.is_contiguous(), f"{of_class}: strides {result.stride()}"
        out = torch.full_like(result, torch.nan)
        assert call(of_class, arguments, out=out) is out, of_class
        assert torch.equal(out, result), of_class


def test_the_two_entries_are_one_operator() -> None:
    arguments = cases.make(Case(5, 7, 9, x=F32, weight=BF16))
    expected = lbg.fused(*arguments)
    out = torch.empty(5, 7)
    assert expected.dtype == F32, "without out_dtype the result has x's dtype"
    assert torch.equal(torch.ops.lbg.fused(*arguments), expected)
    assert torch.ops.lbg.fused.out(*arguments, out=out) is out and torch.equal(out, expected)


@pytest.mark.parametrize("x_dtype", [F16, F32])
@pytest.mark.parametrize("weight_dtype", [F16, BF16])
def test_infinities_and_nan(x_dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    x = torch.zeros(5, 16, dtype=weight_dtype if x_dtype == F16 else x_dtype)
    x[:4, 0] = torch.tensor([torch.nan, torch.inf, -torch.inf, torch.inf])
    x[3, 1] = -torch.inf  # inf - inf
    weight, ones, zeros = torch.ones(1, 16, dtype=weight_dtype), torch.ones(1), torch.zeros(1)
    expected = torch.tensor([[torch.nan, torch.inf, 0, torch.nan, 0]]).mT
    for sign in (1, -1):  # a negative scale swaps the infinities
        result = lbg.fused(x, weight, sign * ones, zeros, out_dtype=F32)
        torch.testing.assert_close(result, expected if sign == 1 else expected[[0, 2, 1, 3, 4]], equal_nan=True)


def test_values_that_overflow_float16() -> None:
    x, weight = torch.full((1, 4), 300.0).half(), torch.full((2, 4), 300.0).half()
    result = lbg.fused(x, weight, torch.ones(2), torch.zeros(2), out_dtype=F32)
    assert torch.equal(result, torch.full((1, 2), 360000.0)), "accumulated in float32"
    assert lbg.fused(x, weight, torch.ones(2), torch.zeros(2)).isinf().all()
    assert lbg.fused(torch.full((1, 4), 1e6), weight, torch.ones(2), torch.zeros(2)).isinf().all(), "x rounds to inf"


# ---- shapes, strides and out


def leading_dimensions() -> dict[str, Tensor]:
    """x of K=16 in many shapes; the last ones do not collapse to rows at one stride."""
    x = torch.randn(3, 4, 5, 16, generator=torch.Generator().manual_seed(1)).half()
    return {
        "1-D": x[0, 0, 0],
        "1-D strided": x[0, 0].flatten()[:32:2],
        "3-D": x[0],
        "4-D": x,
        "4-D sliced": x[:, 1:3],
        "4-D transposed": x.transpose(0, 2),
        "4-D permuted": x.permute(1, 2, 0, 3)[::2],
        "3-D expanded": x[0, :, :1].expand(4, 7, 16),
        "3-D empty": x[:0, 0],
        "4-D empty": x[:, :, :0],
        "5-D": x[:, None, :2, :, None],
    }


@pytest.mark.parametrize("name", leading_dimensions())
def test_leading_dimensions(name: str) -> None:
    x = leading_dimensions()[name]
    _, weight, scale, shift = cases.make(Case(1, 6, 16))
    result = lbg.fused(x, weight, scale, shift)
    expected = cases.reference(Arguments(x, weight, scale, shift))
    assert result.shape == (*x.shape[:-1], 6) and result.is_contiguous(), f"{x.shape} {x.stride()}"
    assert cases.error(result, expected) <= cases.bound(Case(1, 6, 16)), f"{x.shape} {x.stride()}"
    out = torch.empty(6, *x.shape[:-1], dtype=F16).movedim(0, -1)
    assert torch.equal(lbg.fused(x, weight, scale, shift, out=out), result), f"{x.shape} {x.stride()}"


def outs(case: Case) -> dict[str, Tensor]:
    m, n, dtype = case.m, case.n, case.out
    return {
        "strided rows": torch.full((m, n + 5), 7.0, dtype=dtype)[:, 2 : n + 2],
        "inner stride": torch.full((m, 2 * n), 7.0, dtype=dtype)[:, ::2],
        "transposed": torch.full((n, m), 7.0, dtype=dtype).t(),
        "offset": torch.full((m * n + 1,), 7.0, dtype=dtype)[1:].view(m, n),
    }


@pytest.mark.parametrize("layout", outs(Case(1, 1, 1)))
@pytest.mark.parametrize("dtypes", CLASSES, ids=str)
def test_out_of_any_strides(layout: str, dtypes: tuple[torch.dtype, torch.dtype, torch.dtype, bool]) -> None:
    case = cases.of_class(Case(9, 13, 20), dtypes)
    arguments, out = cases.make(case), outs(case)[layout]
    assert out._base is not None
    outside = out._base.numel() - out.numel()
    assert call(case, arguments, out=out) is out
    cases.check(case, arguments, out)
    assert (out._base == 7).sum() == outside, f"{case}: wrote beside out"


def test_out_beside_x_in_one_buffer() -> None:
    case = Case(10, 24, 16)
    arguments = cases.make(case)
    buffer = torch.full((10, 40), 7.0).half()
    x, out = buffer[:, 24:], buffer[:, :24]
    x.copy_(arguments.x)
    assert lbg.fused(x, *list(arguments)[1:], out=out) is out
    cases.check(case, arguments, out)
    assert torch.equal(x, arguments.x), "x was written"
    assert lbg.fused(x.to("meta"), *(t.to("meta") for t in list(arguments)[1:]), out=out.to("meta")).shape == (10, 24)
    meta = buffer.to("meta")
    assert lbg.fused(meta[:, 24:], *(t.to("meta") for t in list(arguments)[1:]), out=meta[:, :24]).shape == (10, 24)


def test_strided_scale_and_shift() -> None:
    case = Case(4, 6, 8)
    x, weight, scale, shift = cases.make(case)
    wide = torch.stack([scale, shift], dim=1)
    one = torch.ones(1).expand(6)
    cases.check(case, Arguments(x, weight, scale, shift), lbg.fused(x, weight, wide[:, 0], wide[:, 1]))
    cases.check(case, Arguments(x, weight, one, shift), lbg.fused(x, weight, one, shift))


# ---- fold

FOLD_ARGUMENTS = ("bias", "gamma", "beta")


@pytest.mark.parametrize("without", [(), ("bias",), ("gamma",), ("beta",), ("gamma", "beta"), FOLD_ARGUMENTS], ids=str)
@pytest.mark.parametrize("dtype", [F32, F16, BF16, torch.float64], ids=str)
def test_fold_is_batch_norm(without: tuple[str, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    bias, mean, gamma, beta = (torch.randn(33, generator=generator).to(dtype) for _ in range(4))
    var = torch.rand(33, generator=generator).to(dtype) + 0.01
    given = {name: None if name in without else value for name, value in zip(FOLD_ARGUMENTS, (bias, gamma, beta))}
    scale, shift = lbg.fold(running_mean=mean, running_var=var, eps=1e-3, **given)
    norm = torch.nn.BatchNorm1d(33, eps=1e-3).double().eval()
    norm.load_state_dict(
        {"running_mean": mean, "running_var": var, "num_batches_tracked": torch.tensor(1)}, strict=False
    )
    with torch.no_grad():
        norm.weight.copy_(torch.ones(33) if given["gamma"] is None else gamma)
        norm.bias.copy_(torch.zeros(33) if given["beta"] is None else beta)
        product = torch.randn(5, 33, generator=generator, dtype=torch.float64)
        expected = norm(product if given["bias"] is None else product + bias)
    assert scale.dtype == shift.dtype == F32 and scale.shape == shift.shape == (33,)
    torch.testing.assert_close(product * scale + shift, expected, rtol=1e-6, atol=1e-6)


def test_fold_is_rounded_once_and_keeps_large_means() -> None:
    mean, bias = torch.tensor([1e6]), torch.tensor([1e6 + 0.5])
    scale, shift = lbg.fold(bias, mean, torch.tensor([4.0]), torch.tensor([3.0]), torch.tensor([0.25]), 0.0)
    assert scale.item() == 1.5 and shift.item() == 1.0


def test_fold_differentiates() -> None:
    vectors = [torch.rand(4).add(0.5).requires_grad_() for _ in range(5)]
    scale, shift = lbg.fold(*vectors, 1e-5)
    found = torch.autograd.grad(scale.sum() + 2 * shift.sum(), vectors)
    bias, mean, var, gamma, beta = vectors
    by_hand = gamma / torch.sqrt(var + 1e-5)
    expected = torch.autograd.grad(by_hand.sum() + 2 * ((bias - mean) * by_hand + beta).sum(), vectors)
    torch.testing.assert_close(found, expected)


# ---- fake tensors, opcheck, compilation


@pytest.mark.parametrize("name", leading_dimensions())
@pytest.mark.parametrize("out_dtype", [None, F16, F32], ids=str)
def test_fake_and_meta_results_look_like_the_real_one(name: str, out_dtype: torch.dtype | None) -> None:
    _, weight, scale, shift = cases.make(Case(1, 6, 16))
    arguments = (leading_dimensions()[name], weight, scale, shift)
    real = lbg.fused(*arguments, out_dtype=out_dtype)
    with FakeTensorMode() as mode:
        fake = lbg.fused(*map(mode.from_tensor, arguments), out_dtype=out_dtype)
    meta = lbg.fused(*(tensor.to("meta") for tensor in arguments), out_dtype=out_dtype)
    for other, device in ((fake, "cpu"), (meta, "meta")):
        assert (other.shape, other.dtype, other.stride()) == (real.shape, real.dtype, real.stride()), device
        assert other.device.type == device


def test_fake_cuda_needs_no_gpu() -> None:
    with FakeTensorMode():
        x, weight = torch.empty(4, 16, device="cuda"), torch.empty(8, 16, device="cuda", dtype=BF16)
        scale, shift = lbg.fold(None, torch.empty(8, device="cuda"), torch.empty(8, device="cuda"), None, None, 1e-5)
        result = lbg.fused(x, weight, scale, shift, out_dtype=BF16)
    assert result.is_cuda and result.shape == (4, 8) and result.dtype == BF16


SAMPLES = {
    "float16": (Case(4, 6, 16), {}),
    "bfloat16 strided": (Case(4, 6, 16, x=BF16, weight=BF16, layout="strided-rows"), {}),
    "float32 x": (Case(4, 6, 16, x=F32), {}),
    "float32 x, out_dtype": (Case(4, 6, 16, x=F32), {"out_dtype": F16}),
    "fp16_accumulate": (Case(4, 6, 16), {"fp16_accumulate": True, "out_dtype": F32}),
    "transposed": (Case(3, 5, 7, layout="transposed"), {}),
    "no rows": (Case(0, 6, 16), {}),
}


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "requires grad"])
def test_opcheck_fused(sample: str, requires_grad: bool) -> None:
    case, kwargs = SAMPLES[sample]
    arguments = tuple(tensor.requires_grad_(requires_grad) for tensor in cases.make(case))
    torch.library.opcheck(torch.ops.lbg.fused.default, arguments, kwargs)


@pytest.mark.parametrize("layout", outs(Case(1, 1, 1)))
def test_opcheck_fused_out(layout: str) -> None:
    case = Case(4, 6, 16, x=F32)
    torch.library.opcheck(torch.ops.lbg.fused.out, tuple(cases.make(case)), {"out": outs(case)[layout]})


# fold reads the length of its vectors, which the stable ABI gives for static shapes only.
STATIC_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")


@pytest.mark.parametrize("bias", [None, 1.0], ids=["no bias", "bias"])
def test_opcheck_fold(bias: float | None) -> None:
    vector = torch.rand(6) + 0.5
    arguments = (bias and vector * bias, vector, vector, None, vector, 1e-5)
    torch.library.opcheck(torch.ops.lbg.fold.default, arguments, test_utils=STATIC_CHECKS)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(dynamic: bool) -> None:
    def model(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return lbg.fused(x * 2, weight, scale, shift) + torch.ops.lbg.fused(x, weight, scale, shift, out_dtype=F32)

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for m in (4, 7, 1) if dynamic else (4,):
        arguments = tuple(cases.make(Case(m, 6, 16)))
        assert torch.equal(compiled(*arguments), model(*arguments)), f"M={m}"


def test_compile_out_and_fold() -> None:
    def model(x: Tensor, weight: Tensor, mean: Tensor, var: Tensor, out: Tensor) -> Tensor:
        scale, shift = lbg.fold(None, mean, var, None, None, 1e-5)
        return lbg.fused(x, weight, scale, shift, out=out) + 1

    x, weight, scale, shift = cases.make(Case(4, 6, 16))
    found, expected = torch.zeros(4, 6), torch.zeros(4, 6)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    result = compiled(x, weight, shift, scale.square(), found)
    assert torch.equal(result, model(x, weight, shift, scale.square(), expected)) and torch.equal(found, expected)


# ---- derivatives


def gradients(function: Callable[..., Tensor], arguments: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, ...]:
    leaves = [tensor.detach().requires_grad_() for tensor in arguments]
    return torch.autograd.grad(function(*leaves), leaves, grad.to(function(*leaves).dtype))


@pytest.mark.parametrize("op", [lbg.fused, torch.ops.lbg.fused, torch.ops.lbg.fused.default], ids=repr)
@pytest.mark.parametrize("dtypes", CLASSES, ids=str)
def test_gradients(op: Callable[..., Tensor], dtypes: tuple[torch.dtype, torch.dtype, torch.dtype, bool]) -> None:
    case = cases.of_class(Case(12, 10, 24), dtypes)
    arguments = tuple(cases.make(case))
    grad = torch.randn(12, 10, generator=torch.Generator().manual_seed(3))
    found = gradients(
        lambda *leaves: op(*leaves, out_dtype=case.out, fp16_accumulate=case.fp16_accumulate), arguments, grad
    )
    exact = gradients(lambda *leaves: cases.reference(Arguments(*leaves)), arguments, grad.to(case.out))
    for name, tensor, expected, given in zip(("x", "weight", "scale", "shift"), found, exact, arguments):
        assert tensor.shape == given.shape and tensor.dtype == given.dtype, f"{case}: {name}"
        # the product, the gradient of the product and the result are each rounded to 16 bits
        assert cases.error(tensor, expected.double()) <= 4 * cases.ROUNDING[case.weight], f"{case}: {name}"


def test_gradients_of_the_four_modules() -> None:
    x, weight, scale, shift = cases.make(Case(12, 10, 24, x=F32))
    norm = torch.nn.BatchNorm1d(10).eval()
    with torch.no_grad():
        norm.weight.copy_(scale)
        norm.bias.copy_(shift)

    def modules(x: Tensor, weight: Tensor) -> Tensor:
        product = torch.nn.functional.linear(x, weight.float())
        return torch.relu(torch.nn.functional.gelu(norm(product)))

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return lbg.fused(
            x, weight, *lbg.fold(None, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
        )

    for found, expected in zip(*(gradients(f, (x, weight), torch.ones(12, 10)) for f in (ours, modules))):
        assert cases.error(found, expected.double()) <= 2e-3


@pytest.mark.parametrize("which", range(4))
def test_gradient_of_one_argument(which: int) -> None:
    arguments = list(cases.make(Case(4, 6, 16)))
    arguments[which].requires_grad_()
    lbg.fused(*arguments).sum().backward()
    assert [tensor.grad is not None for tensor in arguments] == [i == which for i in range(4)]
    with torch.no_grad():
        assert not lbg.fused(*arguments).requires_grad


# ---- configs, explain, override


def test_every_class_is_shipped_for_every_arch_with_a_generic_kernel() -> None:
    rows = lbg.configs()
    for arch in {row.arch for row in rows}:
        symbols = [row.symbol for row in rows if row.arch == arch]
        assert len(set(symbols)) == len(symbols), f"sm_{arch}"
        generic = {
            (row.x, row.weight, row.out, row.fp16_accumulate) for row in rows if row.arch == arch and not row.aligned
        }
        modes = {row.fp16_accumulate for row in rows if row.arch == arch}  # False alone: that serves both
        names = {(*(str(dtype).removeprefix("torch.") for dtype in dtypes), mode) for *dtypes, mode in CLASSES}
        assert generic == {name for name in names if name[3] in modes}, f"sm_{arch}"


def test_explain_on_the_cpu() -> None:
    x, weight, *_ = cases.make(Case(4, 6, 16))
    explanation = lbg.explain(x, weight)
    assert explanation.chosen is None and explanation.candidates == ()
    assert str(explanation) == "x is on cpu: PyTorch's operators run, no kernel of lbg"


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_explain_for_another_gpu(device: str) -> None:
    arch = lbg.configs()[0].arch
    x, weight = torch.empty(4096, 1024, dtype=F16, device=device), torch.empty(2048, 1024, dtype=F16, device=device)
    explanation = lbg.explain(x, weight, out_dtype=F32, arch=arch, sm_count=128)
    chosen, times = explanation.chosen, [candidate.predicted_us for candidate in explanation.candidates]
    assert chosen is not None and chosen is explanation.candidates[0].config
    assert (chosen.arch, chosen.x, chosen.weight, chosen.out) == (arch, "float16", "float16", "float32")
    assert times[0] == min(time for time in times if time is not None) > 0
    lines = str(explanation).splitlines()
    assert lines[0].startswith("M=4096, N=2048, K=1024, x float16, weight float16, result float32 on an sm_")
    assert lines[1].startswith(f"-> {chosen.symbol} ") and lines[1].endswith(" us")
    assert len(lines) == 1 + len(explanation.candidates)


@pytest.mark.parametrize(
    ("why", "x", "k"),
    [
        ("K is not a multiple of 8", torch.empty(64, 80, dtype=F16)[:, :68], 68),
        ("a row stride is not a multiple of 16 bytes", torch.empty(64, 68, dtype=F16)[:, :64], 64),
        ("an inner stride is not 1", torch.empty(64, 128, dtype=F16)[:, ::2], 64),
        ("a pointer is not 16-byte aligned", torch.empty(64 * 64 + 1, dtype=F16)[1:].view(64, 64), 64),
    ],
)
def test_explain_says_why_the_generic_kernel_runs(why: str, x: Tensor, k: int) -> None:
    arch = lbg.configs()[0].arch
    explanation = lbg.explain(x, torch.empty(64, 80, dtype=F16)[:, :k], arch=arch, sm_count=100)
    assert explanation.chosen is not None and not explanation.chosen.aligned
    assert {candidate.why_not for candidate in explanation.candidates if candidate.config.aligned} == {why}
    assert why in str(explanation)


def test_explain_of_what_cannot_run() -> None:
    x, weight, *_ = cases.make(Case(4, 6, 16))
    unknown = lbg.explain(x, weight, arch=75, sm_count=40)
    assert unknown.chosen is None and "no shipped kernel can run" in str(unknown) and "sm_75" in str(unknown)
    arch = lbg.configs()[0].arch
    assert "nothing is launched" in str(lbg.explain(x[:0], weight, arch=arch, sm_count=1))
    with pytest.raises(TypeError, match="arch and sm_count together"):
        lbg.explain(x, weight, arch=89)
    with pytest.raises(TypeError, match="full_rate with arch and sm_count alone"):
        lbg.explain(x, weight, full_rate=True)
    with pytest.raises(RuntimeError, match="must have the same K"):
        lbg.explain(x[:, :8], weight)
    with pytest.raises(RuntimeError, match="CUDA devices only; got cpu"):
        lbg.warmup("cpu")


def test_override() -> None:
    x, weight, *_ = cases.make(Case(64, 64, 64))
    arch = lbg.configs()[0].arch

    def chosen() -> str:
        found = lbg.explain(x, weight, arch=arch, sm_count=100).chosen
        return "" if found is None else found.symbol

    free = chosen()
    symbols = [c.config.symbol for c in lbg.explain(x, weight, arch=arch, sm_count=100).candidates]
    for symbol in symbols:
        with lbg.override(symbol):
            assert chosen() == symbol
            assert "forced by lbg.override" in lbg.explain(x, weight, arch=arch, sm_count=100).why
            with lbg.override(symbols[0]):
                assert chosen() == symbols[0]
            assert chosen() == symbol, "the outer override is in force again"
    with pytest.raises(ValueError, match="no kernel named 'nonsense' is shipped"), lbg.override("nonsense"):
        pass
    with pytest.raises(ZeroDivisionError), lbg.override(symbols[-1]):
        raise ZeroDivisionError
    other = next(config.symbol for config in lbg.configs() if config.x == "bfloat16")
    with lbg.override(other):
        assert chosen() == "", "a kernel of other dtypes is not replaced in silence"
    assert chosen() == free


# ---- the import, each in a process of its own


def python(code: str, *path: Path) -> str:
    setup = f"import sys; sys.path[:0] = {[str(folder) for folder in path]}\n"
    done = subprocess.run([sys.executable, "-c", setup + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


CALL = (
    "lbg.fused(torch.ones(2, 4), torch.ones(3, 4).half(), torch.ones(3), torch.zeros(3)); "
    "print(lbg.fused(torch.ones(2, 4), torch.ones(3, 4).half(), torch.ones(3), torch.zeros(3)).sum().item() > 23)"
)


def test_import_costs_little() -> None:
    code = "import time, torch; t = time.perf_counter(); import lbg; print((time.perf_counter() - t) * 1e3)"
    best_ms = min(float(python(code)) for _ in range(5))
    assert best_ms <= BEST_IMPORT_MS, f"import lbg takes {best_ms:.1f} ms over import torch"


def test_import_makes_no_cuda_call_and_no_triton() -> None:
    code = f"import torch, lbg; print(torch.cuda.is_initialized()); {CALL}; print('triton' in sys.modules)"
    assert python(code).split() == ["False", "True", "False"]


def test_import_with_a_triton_that_raises(tmp_path: Path) -> None:
    tmp_path.joinpath("triton").mkdir()
    tmp_path.joinpath("triton", "__init__.py").write_text("raise RuntimeError('triton was imported')\n")
    assert python(f"import torch, lbg; {CALL}", tmp_path) == "True"


def test_import_without_triton() -> None:
    code = "sys.modules['triton'] = None  # importing it raises ModuleNotFoundError\n"
    assert python(code + f"import torch, lbg; {CALL}") == "True"


def test_exported_names() -> None:
    assert sorted(lbg.__all__) == lbg.__all__ and all(hasattr(lbg, name) for name in lbg.__all__)
    public = {name for name in vars(lbg) if not name.startswith("_")} - {"torch"}
    assert public == set(lbg.__all__) - {"__version__"}
