"""The user's rules for num_warps, num_stages and tiles, as code: what to try of a compiled kernel, and what must hold.

The text is of the original's README: tune num_warps in {4, 8} and num_stages in {2, 3}; with registers under 96 and no
spill try 8 warps and 3 stages; with registers over 128, or occupancy limited by registers, 4 warps and 2 stages; with 3
or more distinct inputs prefer 2 stages and 4 warps; always the conservative 4 warps and 2 stages; a config that gains
under 2 % over a simpler one is dropped; blocks are powers of two from 16 to 256; the grid is never empty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from aot import BuildError

T = TypeVar("T")

WARPS, STAGES = (4, 8), (2, 3)
CONSERVATIVE = (4, 2)  # (warps, stages)
LARGER = (8, 3)
FEW_REGISTERS, MANY_REGISTERS = 96, 128  # a thread: under the first, over the second
MANY_INPUTS = 3
MOST_TRIED = 4
LEAST_GAIN = 1.02  # times as fast as a simpler config
TILE_SIZES = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Facts:
    """What the rules ask of a compiled kernel."""

    registers: int  # a thread
    spill_bytes: int
    limited_by_registers: bool  # no other limit holds the CTAs of an SM as low
    inputs: int  # distinct tensors that it reads


@dataclass(frozen=True)
class Trial:
    """What to compile next: warps and stages, and the rule that says so."""

    warps: int
    stages: int
    why: str


class HasSizes(Protocol):
    @property
    def tile_m(self) -> int: ...
    @property
    def tile_n(self) -> int: ...
    @property
    def tile_k(self) -> int: ...


class HasTile(HasSizes, Protocol):
    @property
    def warps(self) -> int: ...
    @property
    def stages(self) -> int: ...


class Launched(HasSizes, Protocol):
    @property
    def tma(self) -> bool: ...
    @property
    def persistent(self) -> bool: ...
    @property
    def cluster(self) -> int: ...
    @property
    def pieces(self) -> int: ...


def facts(registers: int, spill_bytes: int, ctas_per_sm: dict[str, int], inputs: int) -> Facts:
    """From a build report: ctas_per_sm holds the CTAs of an SM by each limit, and "all".

    Limited by registers means by them alone: where shared memory or warps allow no more CTAs either, fewer registers
    would gain nothing.
    """
    others = min(count for limit, count in ctas_per_sm.items() if limit not in ("registers", "all"))
    return Facts(registers, spill_bytes, ctas_per_sm["registers"] < others, inputs)


def trials(kernel: Facts) -> tuple[Trial, ...]:
    """The (warps, stages) to try of a kernel with these facts, in order; at most four, the conservative one among them.

    Where rules meet:
    - The rule for 4 warps and 2 stages wins over the one for 8 and 3: under 96 registers but limited by them, only the
      conservative config is tried. More warps of as many registers would not fit.
    - A spill takes part in "under 96 and no spill" alone: fewer registers that spill are no room for more warps, so
      that only the conservative config is tried.
    - From 96 to 128 registers, with no limit and no spill, no rule speaks: the whole sets are tried.
    - 3 or more inputs set an order and exclude nothing ("prefer"): 4 warps and 2 stages come first. With fewer inputs
      the largest come first.
    """
    registers = f"{kernel.registers} registers"
    if kernel.registers > MANY_REGISTERS:
        return (Trial(*CONSERVATIVE, f"{registers}, over {MANY_REGISTERS}: 4 warps and 2 stages"),)
    if kernel.limited_by_registers:
        return (Trial(*CONSERVATIVE, "registers limit the CTAs of an SM: 4 warps and 2 stages"),)
    if kernel.spill_bytes:
        return (Trial(*CONSERVATIVE, f"it spills {kernel.spill_bytes} bytes: the conservative config alone"),)
    always = Trial(*CONSERVATIVE, "the conservative config, always tried")
    if kernel.registers < FEW_REGISTERS:
        found = [Trial(*LARGER, f"{registers}, under {FEW_REGISTERS}, and no spill: 8 warps and 3 stages"), always]
    else:
        why = f"{registers}, from {FEW_REGISTERS} to {MANY_REGISTERS}: no rule excludes it"
        sets = [(warps, stages) for warps in reversed(WARPS) for stages in reversed(STAGES)]
        found = [always if each == CONSERVATIVE else Trial(*each, why) for each in sets]
    if kernel.inputs >= MANY_INPUTS:  # fewer stages first, then fewer warps
        found.sort(key=lambda trial: (trial.stages, trial.warps))
        found[0] = Trial(*CONSERVATIVE, f"{kernel.inputs} distinct inputs: 4 warps and 2 stages first; {always.why}")
    return tuple(found[:MOST_TRIED])


def outside(config: HasTile) -> list[str]:
    """In what a config leaves the user's sets; empty if in nothing."""
    found = [
        f"{name} {size}"
        for name, size in (("tile_m", config.tile_m), ("tile_n", config.tile_n), ("tile_k", config.tile_k))
        if size not in TILE_SIZES
    ]
    found += [f"{config.warps} warps"] if config.warps not in WARPS else []
    return found + ([f"{config.stages} stages"] if config.stages not in STAGES else [])


def check_tile(config: HasSizes) -> None:
    """Raises BuildError unless every block size is a power of two from 16 to 256."""
    for name in ("tile_m", "tile_n", "tile_k"):
        if (size := getattr(config, name)) not in TILE_SIZES:
            raise BuildError(
                f"{name} is {size}; block sizes are powers of two from {TILE_SIZES[0]} to {TILE_SIZES[-1]}"
            )


def check_earned(name: str, config: HasTile, evidence: Sequence[Any], pending: str) -> str:
    """Raises BuildError for a config outside the user's sets that nothing has earned its place.

    Returns "", or a warning where the measurement is still to come: `pending` says why.
    """
    if evidence or not (found := outside(config)):
        return ""
    if not pending:
        raise BuildError(f"{name}: {' and '.join(found)} are outside the user's sets (warps 4 or 8, stages 2 or 3, "
                         "tiles 16 to 256), and no measurement earned it; python3 build.py tune measures")  # fmt: skip
    return f"{name}: {' and '.join(found)} outside the user's sets, not measured yet: {pending}"


def grid(m: int, n: int, tile_m: int, tile_n: int) -> int:
    """CTAs of a launch of a tile each. Raises BuildError for an empty one, which no kernel is launched for."""
    count = -(-m // tile_m) * -(-n // tile_n)
    if count < 1:
        raise BuildError(f"M={m}, N={n} in tiles of {tile_m}x{tile_n} is an empty grid; sizes are 1 or more")
    return count


# Rows of tiles whose CTAs share a pass over the weight: down a group's rows, then on to its next columns. csrc/lbg.h
# and aot/hopper.py have the same.
GROUP_M = 8
FEW_COLUMNS, FEW_COLUMNS_GROUP_M = 16, 4  # of a persistent kernel's tiles: up to so many, groups of so many rows


def places(config: Launched, sm_count: int) -> int:
    """SMs, or clusters of them, that have a tile of their own."""
    return max(1, sm_count // config.cluster)


SHARED = 0.4  # csrc/lbg.h's kShared


def cut(config: Launched, last: Any, at_once: int) -> Any:
    """Into how many pieces the tiles of a last wave are cut: csrc/dispatch.cpp's. Of a number, or of an array."""
    halves, quarters = ((pieces <= config.pieces) & (pieces * last <= at_once) for pieces in (2, 4))
    return 1 + halves + 2 * quarters  # where quarters have a place, halves have


def piece_share(pieces: Any) -> Any:
    """Of what a wave of whole tiles takes, what one of as many such pieces does."""
    return SHARED + (1 - SHARED) / pieces


def loaded(config: Launched, x_bytes: int, weight_bytes: int, m: Any, n: Any) -> Any:
    """csrc/lbg.h's `loaded`, where an element of x and of weight has so many bytes; of numbers, or of arrays."""
    if not config.tma or config.persistent:
        return 1.0
    rows, columns = (size + (tile - size) * (size > tile) for size, tile in ((m, config.tile_m), (n, config.tile_n)))
    whole = config.tile_m * x_bytes + config.tile_n * weight_bytes
    return (rows * x_bytes + columns * weight_bytes) / whole


LATE_US, NO_ROOM_US = 1.3, 0.45  # csrc/lbg.h's kLateUs and kNoRoomUs


def late_us(config: Launched, m: Any, n: Any, k: Any, sm_count: int, at_once: int) -> Any:
    """What a launch takes that does not begin early, by csrc/lbg.h's early(), or has no room to; of numbers, or of
    arrays. `at_once` tiles are on the GPU together."""
    if not config.tma:
        return 0.0
    tiles = -(-m // config.tile_m) * -(-n // config.tile_n)
    us = NO_ROOM_US * (2 * tiles * cut(config, tiles, at_once) > at_once)
    if not config.persistent and config.tile_m <= 64:
        us += LATE_US * ((m > 2 * config.tile_m) & (2 * tiles > sm_count) & (k > 1024))
    return us


def reliance(config: Any) -> int:
    """On how many of a call's promises a kernel relies: row_major, aligned and out_aligned."""
    return int(config.row_major) + int(config.aligned) + int(config.out_aligned)


def contenders(kernels: Sequence[T], config: Callable[[T], Any]) -> list[T]:
    """Of kernels that can run a call, those that csrc/dispatch.cpp's choose() weighs by time: none that relies on less
    than another does."""
    most = max((reliance(config(each)) for each in kernels), default=0)
    return [each for each in kernels if reliance(config(each)) == most]


def gains_enough(us: float, simpler_us: float, margin: float = 0.0) -> bool:
    """Whether a config is worth its place beside a simpler one; `margin`, as a log, is asked for besides."""
    return simpler_us >= LEAST_GAIN * math.exp(margin) * us
