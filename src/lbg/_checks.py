"""The argument checks of csrc/ops.cpp once more, for tensors that have no data: same conditions, order and texts.

tests/test_errors.py holds the two lists together.
"""

from __future__ import annotations

import torch
from torch import Tensor

SIXTEEN_BIT = (torch.float16, torch.bfloat16)


def _fail(text: str) -> None:
    raise RuntimeError(f"lbg::fused: {text}")


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_vector(label: str, vector: Tensor, x: Tensor, n: int) -> None:
    if vector.device != x.device:
        _fail(f"{label} must be on x's device; got x on {x.device} and {label} on {vector.device}")
    if vector.dtype != torch.float32:
        _fail(f"{label} must be float32; got {name(vector.dtype)}")
    if vector.dim() != 1 or vector.shape[0] != n:
        _fail(f"{label} must have shape [{n}], one value a row of weight; got {list(vector.shape)}")


def check(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    out_dtype: torch.dtype | None,
    fp16_accumulate: bool,
) -> torch.dtype:
    """Raises RuntimeError for arguments that no kernel takes; returns the result's dtype."""
    if x.dim() < 1:
        _fail("x must have at least 1 dimension, [..., K]; got shape []")
    if weight.dim() != 2:
        _fail(f"weight must have 2 dimensions, [N, K]; got shape {list(weight.shape)}")
    if weight.device != x.device:
        _fail(f"weight must be on x's device; got x on {x.device} and weight on {weight.device}")
    if x.dtype not in (*SIXTEEN_BIT, torch.float32):
        _fail(f"x must be float16, bfloat16 or float32; got {name(x.dtype)}")
    if weight.dtype not in SIXTEEN_BIT:
        _fail(f"weight must be float16 or bfloat16; got {name(weight.dtype)}")
    if x.dtype in SIXTEEN_BIT and x.dtype != weight.dtype:
        _fail(f"x and weight must have the same 16-bit dtype; got x {name(x.dtype)} and weight {name(weight.dtype)}")
    if x.shape[-1] != weight.shape[1]:
        _fail(
            f"x [..., K] and weight [N, K] must have the same K; got x of shape {list(x.shape)} "
            f"and weight of shape {list(weight.shape)}"
        )
    _check_vector("scale", scale, x, weight.shape[0])
    _check_vector("shift", shift, x, weight.shape[0])
    result = x.dtype if out_dtype is None else out_dtype
    if result not in (torch.float32, weight.dtype):
        _fail(f"out_dtype must be float32 or weight's {name(weight.dtype)}; got {name(result)}")
    if fp16_accumulate and weight.dtype != torch.float16:
        _fail(f"fp16_accumulate needs a float16 weight; got {name(weight.dtype)}")
    return result


def _span(tensor: Tensor) -> tuple[int | torch.SymInt, int | torch.SymInt]:
    """Bytes [first, last) of the tensor's storage that its elements lie in."""
    first = tensor.storage_offset() * tensor.element_size()
    if tensor.numel() == 0:
        return first, first
    last = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return first, first + last * tensor.element_size()


def _may_overlap(a: Tensor, b: Tensor) -> bool:
    if a.untyped_storage()._cdata != b.untyped_storage()._cdata:
        return False
    (a_first, a_last), (b_first, b_last) = _span(a), _span(b)
    if a_last <= b_first or b_last <= a_first or a_first == a_last or b_first == b_last:
        return False
    if a.dim() != 2 or b.dim() != 2 or a.stride(1) != 1 or b.stride(1) != 1:
        return True
    pitch = a.stride(0) * a.element_size()
    if pitch <= 0 or b.stride(0) * b.element_size() != pitch:
        return True
    gap = (b_first - a_first) % pitch  # from a's column to b's
    return a.shape[1] * a.element_size() > gap or b.shape[1] * b.element_size() > pitch - gap


def _may_overlap_itself(tensor: Tensor) -> bool:
    if tensor.numel() == 0:
        return False
    reach = 0
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape) if size > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def check_out(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, fp16_accumulate: bool, out: Tensor) -> None:
    """Raises RuntimeError for arguments or an `out` that no kernel takes."""
    check(x, weight, scale, shift, torch.float32, fp16_accumulate)
    if out.dtype not in (torch.float32, weight.dtype):
        _fail(f"out must be float32 or weight's {name(weight.dtype)}; got {name(out.dtype)}")
    if out.device != x.device:
        _fail(f"out must be on x's device; got x on {x.device} and out on {out.device}")
    shape = [*x.shape[:-1], weight.shape[0]]
    if list(out.shape) != shape:
        _fail(f"out must have shape {shape}; got {list(out.shape)}")
    if _may_overlap_itself(out):
        _fail(f"out must not overlap itself; got strides {list(out.stride())}")
    for label, tensor in (("x", x), ("weight", weight), ("scale", scale), ("shift", shift)):
        if _may_overlap(out, tensor):
            _fail(f"out must not overlap {label} in memory")
