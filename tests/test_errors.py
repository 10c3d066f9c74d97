"""Bad arguments: one text from every kernel, nothing written, and the next call works."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import lbg
from tests import cases
from tests.bad_calls import BAD_CALLS, good, zeros
from tests.cases import F16, F32, Case


def call(args: tuple[object, ...], kwargs: dict[str, object]) -> Tensor:
    op = torch.ops.lbg.fused.out if "out" in kwargs else torch.ops.lbg.fused.default
    result: Tensor = op(*args, **kwargs)
    return result


@contextmanager
def raises(text: str) -> Iterator[None]:
    """A RuntimeError of exactly this text (torch appends a C++ trace to some)."""
    with pytest.raises(RuntimeError) as raised:
        yield
    assert type(raised.value) is RuntimeError
    assert str(raised.value).split("\n")[0] == text


@pytest.mark.parametrize("bad", BAD_CALLS)
def test_cpu_raises_and_writes_nothing_and_the_next_call_works(bad: str) -> None:
    args, kwargs = BAD_CALLS[bad]("cpu")
    out = kwargs.get("out")
    before = out.clone() if isinstance(out, Tensor) else None
    with raises(BAD_CALLS[bad].error("cpu")):
        call(args, kwargs)
    assert before is None or before.is_meta or torch.equal(out, before), "out was written"
    case = Case(3, 5, 16)
    arguments = cases.make(case)
    cases.check(case, arguments, lbg.fused(*arguments))


@pytest.mark.parametrize("bad", BAD_CALLS)
def test_meta_raises_the_same(bad: str) -> None:
    args, kwargs = BAD_CALLS[bad]("meta")
    with raises(BAD_CALLS[bad].error("meta")):
        call(args, kwargs)
    assert lbg.fused(**good("meta")).shape == (4, 8)


@pytest.mark.parametrize("bad", BAD_CALLS)
def test_fake_raises_the_same(bad: str) -> None:
    with FakeTensorMode():
        args, kwargs = BAD_CALLS[bad]("cpu")
        with raises(BAD_CALLS[bad].error("cpu")):
            call(args, kwargs)
        assert lbg.fused(**good("cpu")).shape == (4, 8)


@pytest.mark.parametrize("bad", [name for name in BAD_CALLS if "device" in name])
def test_fake_cuda_raises_the_same(bad: str) -> None:
    with FakeTensorMode():
        args, kwargs = BAD_CALLS[bad]("cuda")
        with raises(BAD_CALLS[bad].error("cuda")):
            call(args, kwargs)


@pytest.mark.parametrize("name", ["requires grad", "out_dtype"])
def test_out_takes_neither_gradients_nor_out_dtype(name: str) -> None:
    arguments, out = good("cpu"), torch.full((4, 8), 7.0)
    if name == "out_dtype":
        with pytest.raises(TypeError, match=r"lbg.fused takes out or out_dtype, not both; got out_dtype float32"):
            lbg.fused(**arguments, out=out, out_dtype=F32)
    else:
        arguments["shift"].requires_grad_()
        with raises("lbg::fused: out= cannot be differentiated; got an argument that requires grad"):
            lbg.fused(**arguments, out=out)
    assert (out == 7).all(), "out was written"
    with torch.no_grad():
        assert lbg.fused(**arguments, out=out) is out and not out.any()


# name -> (text after "lbg::fold: ", what differs from five vectors of 8 ones)
BAD_FOLDS = {
    "running_mean 2-D": (
        "running_mean must have one dimension; got shape [2, 4]",
        {"running_mean": zeros("cpu", 2, 4, dtype=F32)},
    ),
    "running_mean int64": (
        "running_mean must be floating point; got int64",
        {"running_mean": zeros("cpu", 8, dtype=torch.int64)},
    ),
    "running_var too short": (
        "running_var must have running_mean's shape [8], one dimension; got [7]",
        {"running_var": zeros("cpu", 7, dtype=F32)},
    ),
    "bias 2-D": (
        "bias must have running_mean's shape [8], one dimension; got [1, 8]",
        {"bias": zeros("cpu", 1, 8, dtype=F32)},
    ),
    "gamma too long": (
        "gamma must have running_mean's shape [8], one dimension; got [9]",
        {"gamma": zeros("cpu", 9, dtype=F32)},
    ),
    "beta complex64": (
        "beta must be floating point; got complex64",
        {"beta": zeros("cpu", 8, dtype=torch.complex64)},
    ),
    "gamma on another device": (
        "gamma must be on running_mean's device cpu; got meta",
        {"gamma": zeros("meta", 8, dtype=F32)},
    ),
}


@pytest.mark.parametrize("bad", BAD_FOLDS)
def test_fold(bad: str) -> None:
    text, change = BAD_FOLDS[bad]
    vectors = {name: torch.ones(8) for name in ("bias", "running_mean", "running_var", "gamma", "beta")}
    with raises(f"lbg::fold: {text}"):
        lbg.fold(**{**vectors, **change}, eps=0.0)
    scale, shift = lbg.fold(**vectors, eps=0.0)
    assert torch.equal(scale, torch.ones(8)) and torch.equal(shift, torch.ones(8))


def test_inference_tensors_raise_too() -> None:
    with torch.inference_mode(), raises("lbg::fused: scale must be float32; got float16"):
        lbg.fused(**{**good("cpu"), "scale": zeros("cpu", 8, dtype=F16)})
