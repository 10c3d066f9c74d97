"""torch.ops.lbg from Python: loads the extension, adds fake kernels and the derivative, and wraps the operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lbg import _checks


def _load() -> Any:
    """The extension, registered once; a second copy of lbg in the process is refused."""
    if torch._C._dispatch_has_kernel("lbg::fused"):
        raise ImportError("torch.ops.lbg is registered already: another copy of lbg is loaded in this process")
    from lbg import _C

    if error := _C.registration_error():
        raise ImportError(error)
    return _C


extension = _load()
version: str = extension.version

_fused = torch.ops.lbg.fused.default
_fused_out = torch.ops.lbg.fused.out
_library = torch.library.Library("lbg", "IMPL")


@torch.library.register_fake("lbg::fused", lib=_library)
def _fused_fake(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    out_dtype: torch.dtype | None = None,
    fp16_accumulate: bool = False,
) -> Tensor:
    dtype = _checks.check(x, weight, scale, shift, out_dtype, fp16_accumulate)
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


@torch.library.register_fake("lbg::fused.out", lib=_library)
def _fused_out_fake(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, *, fp16_accumulate: bool = False, out: Tensor
) -> Tensor:
    _checks.check_out(x, weight, scale, shift, fp16_accumulate, out)
    return out


def reference(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, out_dtype: torch.dtype) -> Tensor:
    """What the operator computes, in PyTorch's own differentiable operators; its derivative is defined by this."""
    product = torch.nn.functional.linear(x.to(weight.dtype), weight).float()
    return torch.relu(torch.nn.functional.gelu(product * scale + shift)).to(out_dtype)


def vector_jacobian(
    function: Callable[..., Tensor], inputs: tuple[Tensor | None, ...], needed: tuple[bool, ...], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """d(function)/d(input) times grad for each input that needs it, by running `function` again under autograd."""
    with torch.enable_grad():
        leaves = [
            None if tensor is None else tensor.detach().requires_grad_(need) for tensor, need in zip(inputs, needed)
        ]
        wanted = [leaf for leaf, need in zip(leaves, needed) if need and leaf is not None]
        grads = iter(torch.autograd.grad(function(*leaves), wanted, grad))
    return tuple(next(grads) if need and leaf is not None else None for leaf, need in zip(leaves, needed))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)
    ctx.out_dtype = output.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    def again(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return reference(x, weight, scale, shift, ctx.out_dtype)

    return vector_jacobian(again, ctx.saved_tensors, ctx.needs_input_grad[:4], grad)


torch.library.register_autograd("lbg::fused", _backward, setup_context=_setup_context, lib=_library)


def _fused_out_autograd(keyset: torch._C.DispatchKeySet, *args: Tensor, **kwargs: Any) -> Tensor:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*args, kwargs["out"])):
        raise RuntimeError("lbg::fused: out= cannot be differentiated; got an argument that requires grad")
    with torch._C._AutoDispatchBelowAutograd():
        result: Tensor = _fused_out.redispatch(keyset & torch._C._after_autograd_keyset, *args, **kwargs)
    return result


_library.impl("fused.out", _fused_out_autograd, "Autograd", with_keyset=True)


@_fused_out.py_functionalize_impl
def _fused_out_functional(
    context: Any, x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, *, fp16_accumulate: bool = False, out: Tensor
) -> Tensor:
    """Under torch.compile `out=` is the plain operator and a copy: PyTorch has no functional form of a custom out=."""
    tensors = context.unwrap_tensors((x, weight, scale, shift))
    with context.redispatch_to_next():
        result = _fused(*tensors, out_dtype=out.dtype, fp16_accumulate=fp16_accumulate)
        result = torch.ops.aten.copy.default(context.unwrap_tensors(out), result)
    context.replace(out, result)
    context.commit_update(out)
    context.sync(out)
    return out


def _unwatched(*tensors: Tensor | None) -> bool:
    """Whether autograd is on but nothing needs to see this call: no derivative, no transform, no tracing.

    The derivative is registered from Python, and asking it costs more than the launch wherever autograd is not off
    altogether (torch.inference_mode), so `fused` asks here whether it must.
    """
    return not (
        torch.compiler.is_compiling()  # first: inference mode cannot be asked for under torch.compile
        or torch.is_inference_mode_enabled()
        or torch._C._are_functorch_transforms_active()
        or (torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors))
    )


def fused(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    out_dtype: torch.dtype | None = None,
    fp16_accumulate: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """relu(gelu((x @ weight.T) * scale + shift)) with the exact (erf) GELU, accumulated in float32.

    On CUDA this is one kernel launch on the current stream of x's device: no synchronisation, no allocation but the
    result, safe to capture in a CUDA graph. (Leading dimensions of x that do not collapse to rows at one stride take a
    launch each.) On the CPU it is the same function in PyTorch's operators. The same inputs give the same bits every
    time, and on one GPU a row's bits do not depend on the rest of the batch.

    Args:
        x: [..., K], float16, bfloat16 or float32, any strides. float32 is rounded to weight's dtype in the kernel.
        weight: [N, K], float16 or bfloat16 (a 16-bit x's own dtype), as `torch.nn.Linear` stores it.
        scale: [N], float32; see `fold`.
        shift: [N], float32.
        out_dtype: float32 or weight's dtype; x's dtype if None.
        fp16_accumulate: permits products to be summed in float16 over chunks of 64 along K before they are added in
            float32: by NVIDIA's figures twice the rate on GeForce Ada, with an error like float16 rounding (3e-4 in
            norm, at any K). Needs a float16 weight. Where it gains nothing (the CPU, sm_90, and L4, L40, L40S and
            RTX 6000 Ada among sm_89), float32 accumulates.
        out: the tensor to write, [..., N], of any strides that do not overlap; its dtype is the result's.

    Returns:
        [..., N], contiguous, or `out`. NaN before the activation gives NaN, +inf gives +inf, -inf gives 0.

    Raises:
        RuntimeError: an argument has the wrong shape, dtype or device; `out` overlaps an input; `out` is given and an
            argument requires grad; the GPU is none that is shipped for; the driver is missing or too old; a CUDA call
            failed. The text says what was given and what is supported. Arguments are refused before anything is
            launched or written.
        TypeError: `out` and `out_dtype` are both given.
    """
    if out is not None:
        if out_dtype is not None:
            raise TypeError(f"lbg.fused takes out or out_dtype, not both; got out_dtype {_checks.name(out_dtype)}")
        result: Tensor = _fused_out(x, weight, scale, shift, fp16_accumulate=fp16_accumulate, out=out)
        return result
    if _unwatched(x, weight, scale, shift):
        with torch._C._AutoDispatchBelowAutograd():
            result = _fused(x, weight, scale, shift, out_dtype=out_dtype, fp16_accumulate=fp16_accumulate)
        return result
    result = _fused(x, weight, scale, shift, out_dtype=out_dtype, fp16_accumulate=fp16_accumulate)
    return result


def fold(
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """BatchNorm at inference and the linear layer's bias, as the (scale, shift) that `fused` takes.

    scale = gamma / sqrt(running_var + eps) and shift = (bias - running_mean) * scale + beta: the affine map of Ioffe
    and Szegedy, "Batch Normalization" (2015), algorithm 2. Computed in float64, rounded once.

    Args:
        bias: [N], floating point; None is 0. The linear layer's.
        running_mean, running_var: [N], floating point.
        gamma: [N], floating point; None is 1. BatchNorm's weight.
        beta: [N], floating point; None is 0. BatchNorm's bias.
        eps: added to the variance.

    Returns:
        (scale, shift), each [N], float32, on running_mean's device.

    Raises:
        RuntimeError: a vector's shape, dtype or device does not fit running_mean's; the text says which.
    """
    scale, shift = torch.ops.lbg.fold.default(bias, running_mean, running_var, gamma, beta, eps)
    return scale, shift
