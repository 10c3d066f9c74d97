"""Calls that no kernel takes, each with the text that all answer: C++ on the CPU and on CUDA, and the fake kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.cases import BF16, F16, F32

SENTINEL = 7.0


def zeros(device: str, *shape: int, dtype: torch.dtype = F16) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def full(device: str, *shape: int, dtype: torch.dtype = F16) -> Tensor:
    return torch.full(shape, SENTINEL, dtype=dtype, device=device)


def good(device: str) -> dict[str, Tensor]:
    """Arguments that every kernel takes: M=4, N=8, K=16."""
    return {
        "x": zeros(device, 4, 16),
        "weight": zeros(device, 8, 16),
        "scale": zeros(device, 8, dtype=F32),
        "shift": zeros(device, 8, dtype=F32),
    }


def other(device: str) -> str:
    """A device that is not `device`."""
    return "meta" if device == "cpu" else "cpu"


@dataclass(frozen=True)
class BadCall:
    """`bad(device)` is (args, kwargs) for torch.ops.lbg.fused, or for fused.out if kwargs has an `out`."""

    text: str  # of the error, after "lbg::fused: "; {x} and {other} are devices
    change: Callable[[str], dict[str, object]]  # what differs from a good call

    def __call__(self, device: str) -> tuple[tuple[object, ...], dict[str, object]]:
        arguments: dict[str, object] = {**good(device), **self.change(device)}
        return tuple(arguments.pop(name) for name in ("x", "weight", "scale", "shift")), arguments

    def error(self, device: str) -> str:
        named = "cuda:0" if device == "cuda" else device
        return "lbg::fused: " + self.text.format(x=named, other=other(device))


def _overlap_x(device: str) -> dict[str, object]:
    buffer = full(device, 4, 24)
    return {"x": buffer[:, :16], "out": buffer[:, 8:16]}


def _overlap_weight(device: str) -> dict[str, object]:
    buffer = full(device, 8, 16)
    return {"weight": buffer, "out": buffer[2:6, :8]}


def _overlap_vector(name: str) -> Callable[[str], dict[str, object]]:
    def change(device: str) -> dict[str, object]:
        buffer = full(device, 32, dtype=F32)
        return {name: buffer[24:], "out": buffer.view(4, 8)}

    return change


def _bfloat16(device: str) -> dict[str, object]:
    return {"x": zeros(device, 4, 16, dtype=BF16), "weight": zeros(device, 8, 16, dtype=BF16)}


def _x_dtype(dtype: torch.dtype) -> BadCall:
    text = f"x must be float16, bfloat16 or float32; got {str(dtype).removeprefix('torch.')}"
    return BadCall(text, lambda d: {"x": zeros(d, 4, 16, dtype=dtype)})


BAD_CALLS: dict[str, BadCall] = {
    "x 0-D": BadCall("x must have at least 1 dimension, [..., K]; got shape []", lambda d: {"x": zeros(d)}),
    "weight 1-D": BadCall("weight must have 2 dimensions, [N, K]; got shape [16]", lambda d: {"weight": zeros(d, 16)}),
    "weight 3-D": BadCall(
        "weight must have 2 dimensions, [N, K]; got shape [1, 8, 16]", lambda d: {"weight": zeros(d, 1, 8, 16)}
    ),
    "weight on another device": BadCall(
        "weight must be on x's device; got x on {x} and weight on {other}", lambda d: {"weight": zeros(other(d), 8, 16)}
    ),
    "x float64": _x_dtype(torch.float64),
    "x int8": _x_dtype(torch.int8),
    "x uint16": _x_dtype(torch.uint16),
    "x bool": _x_dtype(torch.bool),
    "x complex64": _x_dtype(torch.complex64),
    "x float8": _x_dtype(torch.float8_e4m3fn),
    "weight float32": BadCall(
        "weight must be float16 or bfloat16; got float32", lambda d: {"weight": zeros(d, 8, 16, dtype=F32)}
    ),
    "weight int64": BadCall(
        "weight must be float16 or bfloat16; got int64", lambda d: {"weight": zeros(d, 8, 16, dtype=torch.int64)}
    ),
    "x float16, weight bfloat16": BadCall(
        "x and weight must have the same 16-bit dtype; got x float16 and weight bfloat16",
        lambda d: {"weight": zeros(d, 8, 16, dtype=BF16)},
    ),
    "x bfloat16, weight float16": BadCall(
        "x and weight must have the same 16-bit dtype; got x bfloat16 and weight float16",
        lambda d: {"x": zeros(d, 4, 16, dtype=BF16)},
    ),
    "K differs": BadCall(
        "x [..., K] and weight [N, K] must have the same K; got x of shape [2, 4, 15] and weight of shape [8, 16]",
        lambda d: {"x": zeros(d, 2, 4, 15)},
    ),
    "scale on another device": BadCall(
        "scale must be on x's device; got x on {x} and scale on {other}",
        lambda d: {"scale": zeros(other(d), 8, dtype=F32)},
    ),
    "scale float16": BadCall("scale must be float32; got float16", lambda d: {"scale": zeros(d, 8)}),
    "scale too short": BadCall(
        "scale must have shape [8], one value a row of weight; got [7]", lambda d: {"scale": zeros(d, 7, dtype=F32)}
    ),
    "scale 2-D": BadCall(
        "scale must have shape [8], one value a row of weight; got [1, 8]",
        lambda d: {"scale": zeros(d, 1, 8, dtype=F32)},
    ),
    "shift on another device": BadCall(
        "shift must be on x's device; got x on {x} and shift on {other}",
        lambda d: {"shift": zeros(other(d), 8, dtype=F32)},
    ),
    "shift float64": BadCall(
        "shift must be float32; got float64", lambda d: {"shift": zeros(d, 8, dtype=torch.float64)}
    ),
    "shift too long": BadCall(
        "shift must have shape [8], one value a row of weight; got [16]", lambda d: {"shift": zeros(d, 16, dtype=F32)}
    ),
    "shift 0-D": BadCall(
        "shift must have shape [8], one value a row of weight; got []", lambda d: {"shift": zeros(d, dtype=F32)}
    ),
    "out_dtype float64": BadCall(
        "out_dtype must be float32 or weight's float16; got float64", lambda d: {"out_dtype": torch.float64}
    ),
    "out_dtype bfloat16 of float16": BadCall(
        "out_dtype must be float32 or weight's float16; got bfloat16", lambda d: {"out_dtype": BF16}
    ),
    "fp16_accumulate with bfloat16": BadCall(
        "fp16_accumulate needs a float16 weight; got bfloat16", lambda d: {**_bfloat16(d), "fp16_accumulate": True}
    ),
    "out: K differs": BadCall(
        "x [..., K] and weight [N, K] must have the same K; got x of shape [4, 15] and weight of shape [8, 16]",
        lambda d: {"x": zeros(d, 4, 15), "out": full(d, 4, 8)},
    ),
    "out: fp16_accumulate with bfloat16": BadCall(
        "fp16_accumulate needs a float16 weight; got bfloat16",
        lambda d: {**_bfloat16(d), "fp16_accumulate": True, "out": full(d, 4, 8, dtype=BF16)},
    ),
    "out float64": BadCall(
        "out must be float32 or weight's float16; got float64", lambda d: {"out": full(d, 4, 8, dtype=torch.float64)}
    ),
    "out bfloat16 of float16": BadCall(
        "out must be float32 or weight's float16; got bfloat16", lambda d: {"out": full(d, 4, 8, dtype=BF16)}
    ),
    "out on another device": BadCall(
        "out must be on x's device; got x on {x} and out on {other}", lambda d: {"out": full(other(d), 4, 8)}
    ),
    "out of another M": BadCall("out must have shape [4, 8]; got [5, 8]", lambda d: {"out": full(d, 5, 8)}),
    "out of another N": BadCall("out must have shape [4, 8]; got [4, 9]", lambda d: {"out": full(d, 4, 9)}),
    "out of another rank": BadCall("out must have shape [4, 8]; got [1, 4, 8]", lambda d: {"out": full(d, 1, 4, 8)}),
    "out expanded": BadCall(
        "out must not overlap itself; got strides [0, 1]", lambda d: {"out": full(d, 8).expand(4, 8)}
    ),
    "out of rows that overlap": BadCall(
        "out must not overlap itself; got strides [4, 1]",
        lambda d: {"out": full(d, 20).as_strided((4, 8), (4, 1))},
    ),
    "out overlaps x": BadCall("out must not overlap x in memory", _overlap_x),
    "out overlaps weight": BadCall("out must not overlap weight in memory", _overlap_weight),
    "out overlaps scale": BadCall("out must not overlap scale in memory", _overlap_vector("scale")),
    "out overlaps shift": BadCall("out must not overlap shift in memory", _overlap_vector("shift")),
}
