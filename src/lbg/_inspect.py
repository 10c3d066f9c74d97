"""What is shipped, what would run and why, and how to choose otherwise."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lbg import _checks
from lbg._ops import extension

_DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}  # csrc/lbg.h, DType


@dataclass(frozen=True)
class Config:
    """One shipped kernel. Sizes in elements unless they say bytes; dtypes by PyTorch's names."""

    symbol: str
    arch: int  # the compute capability it runs on, 89 for 8.9
    compiled_arch: int  # what it was compiled for: another arch only in a verification build
    x: str
    weight: str
    out: str
    fp16_accumulate: bool
    row_major: bool  # False: the generic kernel of its class, which takes any strides
    aligned: bool  # relies on rows of x and weight that start on 16 bytes
    out_aligned: bool  # relies on a result whose rows start on 16 bytes
    tma: bool  # loads through the TMA unit
    persistent: bool  # a CTA takes one tile after another
    tile_m: int
    tile_n: int
    tile_k: int
    warps: int
    stages: int
    cluster: int  # CTAs that share a tile, each on an SM of its own
    pieces: int  # most that a tile of a last wave is cut into
    shared_bytes: int
    registers: int
    ctas_per_sm: int
    # What a predicted time is made of (csrc/lbg.h, predicted_us); sm_89 GPUs of full rate (`explain`) have their own.
    launch_us: float  # once a launch
    wave_us: float  # a wave of CTAs
    step_us: float  # one CTA's K step
    latency_us: float  # least time between two K steps of a CTA
    crowd_us: float  # what a K step takes more when every SM is at it
    off32_us: float  # as crowd_us, where rows of x or weight start off 32 bytes
    off64_us: float  # the same, off 64 bytes
    off128_us: float  # the same, off 128 bytes
    dram_bytes_per_us: float  # one SM's share of the memory's bandwidth


@dataclass(frozen=True)
class Candidate:
    """A shipped kernel as seen from one call: a predicted time in microseconds, or the reason it cannot run."""

    config: Config
    predicted_us: float | None
    why_not: str | None


@dataclass(frozen=True)
class Explanation:
    """What a call would run. `chosen` is None on the CPU and where no kernel is needed; `why` says so.

    A kernel that does without an alignment, or inner strides of 1, which the call has is taken only where no other can
    run.
    """

    chosen: Config | None
    why: str
    candidates: tuple[Candidate, ...]  # of the call's dtypes and mode on this arch, the chosen first

    def __str__(self) -> str:
        lines = [self.why]
        for candidate in self.candidates:
            mark = "->" if candidate.config is self.chosen else "  "
            time = "" if candidate.predicted_us is None else f"predicted {candidate.predicted_us:.1f} us"
            lines.append(f"{mark} {candidate.config.symbol:<48} {candidate.why_not or time}")
        return "\n".join(lines)


@cache
def configs() -> tuple[Config, ...]:
    """Every shipped kernel, in the order in which dispatch considers them."""
    return tuple(Config(**row) for row in json.loads(extension.configs()))


def _gpu(device: int) -> tuple[str, int, int, bool]:
    error, name, arch, sm_count, full_rate = extension.gpu(device)
    if error:
        raise RuntimeError(f"lbg: {error}")
    return name, arch, sm_count, bool(full_rate)


def _index(device: torch.device | str | int | None) -> int:
    if device is None:
        return torch.cuda.current_device()
    if isinstance(device, int):
        return device
    device = torch.device(device)
    if device.type != "cuda":
        raise RuntimeError(f"lbg: kernels are loaded on CUDA devices only; got {device}")
    return torch.cuda.current_device() if device.index is None else device.index


def warmup(device: torch.device | str | int | None = None) -> int:
    """Loads every kernel shipped for a CUDA device (the current one if None), so that no later call does.

    Returns:
        How many kernels were made ready.

    Raises:
        RuntimeError: not a CUDA device, no such device, a GPU that is not shipped for, no driver or one too old.
    """
    error, loaded = extension.warmup(_index(device))
    if error:
        raise RuntimeError(f"lbg: {error}")
    return int(loaded)


def explain(
    x: Tensor,
    weight: Tensor,
    *,
    out_dtype: torch.dtype | None = None,
    fp16_accumulate: bool = False,
    arch: int | None = None,
    sm_count: int | None = None,
    full_rate: bool = False,
) -> Explanation:
    """Which kernel `fused(x, weight, ...)` would run, what it was chosen over, and why.

    Args:
        x, weight, out_dtype, fp16_accumulate: as for `fused`; nothing is read but shapes, strides and addresses.
        arch, sm_count: ask for another GPU than x's, such as 89 and 128 for an RTX 4090; x may then be on any device.
        full_rate: of that GPU, if it is an sm_89: tensor cores accumulate in float32 as fast as in float16, as those
            of an L4, L40, L40S or RTX 6000 Ada do, and no GeForce's.

    Raises:
        RuntimeError: the arguments are none that `fused` takes.
        TypeError: only one of arch and sm_count is given, or full_rate without them.
    """
    if (arch is None) != (sm_count is None):
        raise TypeError(f"lbg.explain takes arch and sm_count together; got {arch} and {sm_count}")
    if full_rate and arch is None:
        raise TypeError("lbg.explain takes full_rate with arch and sm_count alone: x's own GPU says what it is")
    n, k = weight.shape if weight.dim() == 2 else (0, 0)
    vector = x.new_empty(n, dtype=torch.float32)
    result = _checks.check(x, weight, vector, vector, out_dtype, fp16_accumulate)
    if arch is None or sm_count is None:
        if not x.is_cuda:
            return Explanation(None, f"x is on {x.device}: PyTorch's operators run, no kernel of lbg", ())
        name, arch, sm_count, full_rate = _gpu(_index(x.device))
    else:
        full_rate = full_rate and arch == 89
        name = f"an sm_{arch} GPU{' of full rate' if full_rate else ''}"
    if n == 0 or 0 in x.shape[:-1]:
        return Explanation(None, "the result is empty: nothing is launched", ())
    launches, rows, stride_xm, stride_om = _rows(x, n)
    addresses = [0 if tensor.is_meta else tensor.data_ptr() for tensor in (x, weight)]
    text = extension.explain(
        _DTYPES[x.dtype],
        _DTYPES[weight.dtype],
        _DTYPES[result],
        int(fp16_accumulate),
        (rows, n, k),
        (stride_xm, x.stride(-1), weight.stride(0), weight.stride(1), 1, 1, stride_om, 1),
        int(all(address % 16 == 0 for address in addresses)),
        arch,
        sm_count,
        int(full_rate),
    )
    # Where fp16_accumulate gains nothing it is served by the kernels of the other mode.
    forced = extension.get_override()
    mode = (
        fp16_accumulate
        and (bool(forced) or not full_rate)
        and any(config.fp16_accumulate for config in configs() if config.arch == arch)
    )
    wanted = (_checks.name(x.dtype), _checks.name(weight.dtype), _checks.name(result), mode)
    chosen: Config | None = None
    candidates: list[Candidate] = []
    for config, (predicted_us, why_not, is_chosen) in zip(configs(), json.loads(text)):
        if config.arch != arch or (config.x, config.weight, config.out, config.fp16_accumulate) != wanted:
            continue
        candidates.append(Candidate(config, predicted_us, why_not))
        if is_chosen:
            chosen = config
    candidates.sort(key=lambda c: (c.config is not chosen, c.predicted_us is None, c.predicted_us or 0.0))
    what = f"M={rows}, N={n}, K={k}, x {wanted[0]}, weight {wanted[1]}, result {wanted[2]} on {name}, {sm_count} SMs"
    if launches > 1:
        what = f"{launches} launches, as x's rows do not lie at one stride, of {what}"
    if chosen is None:
        return Explanation(None, f"{what}: no shipped kernel can run", tuple(candidates))
    reason = "forced by lbg.override" if forced else "the lowest predicted time, last resorts aside"
    return Explanation(chosen, f"{what}: {reason}", tuple(candidates))


def _rows(x: Tensor, n: int) -> tuple[int, int, int, int]:
    """(launches, rows of a launch, their strides in x and in the result): csrc/ops.cpp's row_axes once more."""
    axes: list[tuple[int, int, int]] = []
    stride_out = n
    for size, stride in reversed(list(zip(x.shape[:-1], x.stride()[:-1]))):
        if size > 1:
            if axes and stride == axes[-1][0] * axes[-1][1]:
                axes[-1] = (axes[-1][0] * size, *axes[-1][1:])
            else:
                axes.append((size, stride, stride_out))
        stride_out *= size
    rows, stride_xm, stride_om = max(axes, default=(1, 0, 0), key=lambda axis: axis[0])
    return math.prod(size for size, *_ in axes) // rows, rows, stride_xm, stride_om


@contextmanager
def override(symbol: str) -> Iterator[None]:
    """Within this context, every call in the process runs the kernel of that name, or raises if it cannot.

    Args:
        symbol: as in `Config.symbol`.

    Raises:
        ValueError: no kernel of that name is shipped.
    """
    before = extension.get_override()
    if error := extension.set_override(symbol):
        raise ValueError(f"lbg: {error}")
    try:
        yield
    finally:
        extension.set_override(before)
