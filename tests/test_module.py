"""The module on the CPU: checkpoints, PyTorch's own results, and when the kept weight and fold are made anew."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lbg
from lbg._module import _Differentiable
from tests import cases
from tests.cases import BF16, F16

KEYS = [
    "gemm.weight",
    "gemm.bias",
    "batch_norm.weight",
    "batch_norm.bias",
    "batch_norm.running_mean",
    "batch_norm.running_var",
    "batch_norm.num_batches_tracked",
]
Module = lbg.LinearBatchNormGELUReLU


class Plain(nn.Module):
    """The four PyTorch modules, under the names that checkpoints have."""

    def __init__(self, k: int, n: int, *, bias: bool = True, affine: bool = True) -> None:
        super().__init__()
        self.gemm = nn.Linear(k, n, bias=bias)
        self.batch_norm = nn.BatchNorm1d(n, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(nn.functional.gelu(self.batch_norm(self.gemm(x))))


def batch(m: int = 32, k: int = 16) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m))


def trained(**kwargs: bool) -> Plain:
    """K=16, N=24, with running statistics and BatchNorm parameters of their own."""
    torch.manual_seed(5)
    plain = Plain(16, 24, **kwargs)
    with torch.no_grad():
        for parameter in plain.batch_norm.parameters():
            parameter.add_(torch.randn(24) * 0.3)
        plain(batch() * 2 + 1)
    return plain.eval()


def module() -> Module:
    result = Module(16, 24)
    result.load_state_dict(trained().state_dict())
    return result.eval()


def check_fused(m: Module, x: Tensor | None = None) -> None:
    """The fused forward, on CPU tensors, against the modules in float64."""
    x = batch() if x is None else x
    found = m._forward_fused(x)
    expected = copy.deepcopy(m).double().eval()._forward_modules(x.double())
    assert cases.error(found, expected) <= 2e-3 + cases.ROUNDING[found.dtype], "stale or wrong"


# ---- a PyTorch module like the ones it stands for


def test_state_dict_keys() -> None:
    assert list(Module(16, 24).state_dict()) == KEYS == list(Plain(16, 24).state_dict())


def test_a_plain_checkpoint_loads_and_gives_the_same_bits() -> None:
    plain, ours, file = trained(), Module(16, 24), io.BytesIO()
    torch.save(plain.state_dict(), file)
    file.seek(0)
    assert str(ours.load_state_dict(torch.load(file))) == "<All keys matched successfully>"
    assert torch.equal(ours.eval()(batch()), plain(batch()))


def test_training_is_pytorch_s() -> None:
    plain, ours = trained().train(), module().train()
    for model in (plain, ours):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(3):
            optimizer.zero_grad()
            model(batch() + step).square().sum().backward()
            optimizer.step()
    for name, value in plain.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    assert torch.equal(ours.eval()(batch()), plain.eval()(batch()))


@pytest.mark.parametrize("kwargs", [{}, {"bias": False}, {"affine": False}], ids=str)
def test_from_modules_shares(kwargs: dict[str, bool]) -> None:
    plain = trained(**kwargs)
    ours = Module.from_modules(plain.gemm, plain.batch_norm)
    assert ours.gemm is plain.gemm and ours.batch_norm is plain.batch_norm and not ours.training
    assert torch.equal(ours(batch()), plain(batch()))
    check_fused(ours)
    assert Module.from_modules(plain.gemm, plain.batch_norm.train()).training


def test_from_modules_refuses() -> None:
    with pytest.raises(ValueError, match="linear gives 24 features and batch_norm takes 25"):
        Module.from_modules(nn.Linear(16, 24), nn.BatchNorm1d(25))
    with pytest.raises(ValueError, match="track_running_stats=False"):
        Module.from_modules(nn.Linear(16, 24), nn.BatchNorm1d(24, track_running_stats=False))
    with pytest.raises(ValueError, match=r"compute_dtype must be float16 or bfloat16; got torch\.float32"):
        Module(16, 24, compute_dtype=torch.float32)
    with pytest.raises(ValueError, match=r"x must have 2 dimensions, \[M, 16\]; got shape \[2, 3, 16\]"):
        module()(torch.zeros(2, 3, 16))


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(copied: Callable[[Module], Module]) -> None:
    ours = module()
    check_fused(ours)
    twin = copied(ours)
    assert twin._folded is None and ours._folded is not None
    assert torch.equal(twin(batch()), ours(batch())) and torch.equal(
        twin._forward_fused(batch()), ours._forward_fused(batch())
    )


# ---- when the kept weight and fold are made anew


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_folded_once(mode: Callable[[], torch.autograd.grad_mode.no_grad]) -> None:
    ours = module()
    with mode():
        ours._forward_fused(batch())
        kept = ours._folded
        for m in (1, 2, 3):
            ours._forward_fused(batch(m))
        ours(batch())  # CPU: the modules
        ours.to("cpu")
        ours.train().eval()
    ours._forward_fused(batch())
    assert kept is not None and ours._folded is kept
    ours.refold()
    ours._forward_fused(batch())
    assert ours._folded is not kept


def _step(m: Module) -> None:
    optimizer = torch.optim.Adam(m.parameters(), lr=0.1)
    m._forward_modules(batch()).sum().backward()
    optimizer.step()


def _load(assign: bool) -> Callable[[Module], object]:
    state = {name: value * 2 for name, value in trained().state_dict().items()}
    return lambda m: m.load_state_dict(state, assign=assign)


def _in_place(mode: Callable[[], torch.autograd.grad_mode.no_grad], name: str) -> Callable[[Module], None]:
    def change(m: Module) -> None:
        with mode():
            m.state_dict(keep_vars=True)[name].mul_(1.5)

    return change


def _train(mode: Callable[[], torch.autograd.grad_mode.no_grad]) -> Callable[[Module], None]:
    def change(m: Module) -> None:
        m.train()
        with mode():
            m(batch() * 3 - 1)
        m.eval()

    return change


def _eps(m: Module) -> None:
    m.batch_norm.eps = 0.5


def _weight(m: Module) -> None:
    m.gemm.weight = nn.Parameter(torch.randn(24, 16))


def _buffer(m: Module) -> None:
    m.batch_norm.running_var = torch.rand(24) + 0.5


def _linear(m: Module) -> None:
    m.gemm = nn.Linear(16, 24, bias=False)


def _there_and_back(m: Module) -> None:
    """The parameters are rounded, and the allocator may give the new ones the old ones' memory."""
    m.bfloat16().float()


CHANGES: dict[str, Callable[[Module], object]] = {
    "optimizer step": _step,
    "load_state_dict": _load(assign=False),
    "load_state_dict, assign": _load(assign=True),
    "half": Module.half,
    "bfloat16 and back": _there_and_back,
    "to": lambda m: m.to(torch.float64),
    "running statistics by training": _train(torch.enable_grad),
    "running statistics by training, no_grad": _train(torch.no_grad),
    "running statistics by training, inference_mode": _train(torch.inference_mode),
    "reset_running_stats": lambda m: m.batch_norm.reset_running_stats(),
    "eps": _eps,
    "parameter replaced": _weight,
    "buffer replaced": _buffer,
    "module replaced": _linear,
    **{f"{name} under no_grad": _in_place(torch.no_grad, name) for name in KEYS[:6]},
    **{f"{name} under inference_mode": _in_place(torch.inference_mode, name) for name in KEYS[:6]},
}


@pytest.mark.parametrize("change", CHANGES)
def test_folded_anew_after(change: str) -> None:
    ours = module()
    check_fused(ours)
    kept = ours._folded
    CHANGES[change](ours)
    check_fused(ours)
    assert kept is not None and ours._folded is not kept, "the old fold was kept"
    kept = ours._folded
    check_fused(ours)
    assert ours._folded is kept, "it is kept again"


def test_folded_anew_for_another_compute_dtype() -> None:
    ours = module()
    for x in (batch(), batch().bfloat16(), batch().half(), batch()):
        check_fused(ours, x)
        assert ours._folded is not None and ours._folded.weight.dtype == (BF16 if x.dtype == BF16 else F16)
    assert Module(16, 24, compute_dtype=BF16).eval()._forward_fused(batch()).dtype == torch.float32


@pytest.mark.parametrize("features", [8, 20, 83])
def test_rows_of_the_kept_weight_start_on_16_bytes(features: int) -> None:
    ours = Module(features, 24, dtype=torch.float16).eval()
    with torch.no_grad():
        ours._forward_fused(torch.randn(3, features).half())
    kept = ours._folded
    assert kept is not None and torch.equal(kept.weight, ours.gemm.weight)
    assert kept.weight.stride(0) % 8 == 0 and kept.weight.stride(1) == 1
    assert (kept.weight.data_ptr() == ours.gemm.weight.data_ptr()) is (features % 8 == 0), "copied without need, or not"


def test_parameters_made_under_inference_mode_are_never_stale() -> None:
    with torch.inference_mode():
        ours = module()
        check_fused(ours)
        ours.gemm.weight.mul_(2)
        check_fused(ours)
        ours.batch_norm.running_mean.add_(1)
        check_fused(ours)


# ---- the derivative


@pytest.mark.parametrize("kwargs", [{}, {"bias": False}, {"affine": False}], ids=str)
def test_gradient_is_the_modules(kwargs: dict[str, bool]) -> None:
    plain = trained(**kwargs)
    ours = Module.from_modules(plain.gemm, plain.batch_norm)
    x, grad = batch().requires_grad_(), torch.randn(32, 24, generator=torch.Generator().manual_seed(8))
    leaves = [x, *plain.parameters()]
    result = _Differentiable.apply(ours, x, *ours._sources())
    found = torch.autograd.grad(result, leaves, grad)
    expected = torch.autograd.grad(plain(x), leaves, grad)
    assert cases.error(result, plain(x).double()) <= 2e-3
    torch.testing.assert_close(found, expected)


def test_gradient_of_a_16_bit_x() -> None:
    ours, plain = module(), trained()
    x = batch().half().requires_grad_()
    found = torch.autograd.grad(_Differentiable.apply(ours, x, *ours._sources()).sum(), [x, ours.gemm.weight])
    wide = x.detach().float().requires_grad_()
    expected = torch.autograd.grad(plain(wide).sum(), [wide, plain.gemm.weight])
    assert found[0].dtype == F16 and cases.error(found[0], expected[0].double()) <= 2e-3
    assert cases.error(found[1], expected[1].double()) <= 2e-3
