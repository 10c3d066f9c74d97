"""From measured times to the constants of a kernel's predicted time (csrc/lbg.h's predicted_us).

Arithmetic over records, with numpy alone: it runs where the times are taken (tests.bench.fit) and where they are judged
(aot/tune.py), which may be two machines.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from aot.chips import REFERENCE
from aot.rules import (
    FEW_COLUMNS,
    FEW_COLUMNS_GROUP_M,
    GROUP_M,
    Launched,
    cut,
    late_us,
    loaded,
    piece_share,
    places,
    reliance,
)

HOPELESS = 3  # times as slow as the best of its shape: timed once, and of no weight in the fit


@dataclass(frozen=True)
class Time:
    """One kernel on one shape."""

    m: int
    n: int
    k: int
    symbol: str
    us: float
    chosen: bool  # by the wheel's dispatch


class Kernel(Launched, Protocol):
    """Of lbg.Config, what a predicted time depends on; besides, an attribute for each of CONSTANTS."""

    @property
    def arch(self) -> int: ...
    @property
    def x(self) -> str: ...
    @property
    def weight(self) -> str: ...
    @property
    def out(self) -> str: ...
    @property
    def fp16_accumulate(self) -> bool: ...
    @property
    def ctas_per_sm(self) -> int: ...


class Run(Protocol):
    """What a GPU told."""

    @property
    def sm_count(self) -> int: ...
    @property
    def kernels(self) -> Mapping[str, Any]: ...  # Kernel, by symbol
    @property
    def times(self) -> Sequence[Time]: ...


CONSTANTS = (
    "launch_us", "wave_us", "step_us", "latency_us", "crowd_us", "off32_us", "off64_us", "off128_us",
    "dram_bytes_per_us"
)  # fmt: skip
ELEMENT_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
TIE = 0.05  # what it costs to move a constant by all of itself, beside errors of 1 of a time
FIRM_TIE = 4.0
USUAL = 0.1  # a relative error of the formula
# Of choose_better(). No command here makes the comparisons of its docstring again. In such ones ALIKE of 0.015 and
# TIMES_COUNT of 0.1 changed little, a TIMES_COUNT of 1 chose worse, and TELLING of 30 no better than 10.
ALIKE = 0.02  # predicted times so far apart, relatively, are about as often the wrong way round as not
MOST_LOST = 0.5  # a choice that loses more is no worse: such a shape is one that the formula does not know
TELLING = 10  # times that a choice at a shape which people ask about counts
TIMES_COUNT = 0.3  # errors of times, squared, beside what choices lose
STEPS, RATE = 300, 0.01  # Adam's
LEAST_US = 1e-3  # a constant below is as good as 0, and has a logarithm


def coefficients(config: Kernel, shapes: np.ndarray, sm_count: int, linear: np.ndarray) -> np.ndarray:
    """A row a shape (M, N, K): the slope of csrc/lbg.h's predicted_us, without what a late launch takes, at `linear`.
    And row @ linear is that time itself, as twice the constants make twice the time.

    `linear` is CONSTANTS, but the last of them inverted.
    """
    m, n, k = shapes.T
    x, weight, out = (ELEMENT_BYTES[dtype] for dtype in (config.x, config.weight, config.out))
    ctas = -(-m // config.tile_m) * -(-n // config.tile_n)
    steps = -(-k // config.tile_k)
    sms = places(config, sm_count)
    most = sms * config.ctas_per_sm
    whole, rest = ctas // most, ctas % most
    starts = row_bytes(config, shapes)
    busy, memory = np.zeros((2, len(shapes), len(CONSTANTS)))
    pieces, part = cut(config, rest, most), loaded(config, x, weight, m, n)
    for waves, at_once in ((whole, most), ((rest > 0) * piece_share(pieces), rest * pieces)):
        fullest, per_sm = -(-at_once // sms), at_once / sms
        by_step = fullest * linear[2] > linear[3]
        busy[:, 1] += waves
        busy[:, 2] += waves * steps * np.where(by_step, fullest, 0)
        busy[:, 3] += waves * steps * np.where(by_step, 0, 1)
        busy[:, 4] += waves * steps * per_sm
        for column, unit in ((5, 32), (6, 64), (7, 128)):
            busy[:, column] += waves * steps * per_sm * (starts % unit != 0) * part
    x_reads, weight_reads = reads(config, shapes, most, REFERENCE[config.arch].l2_share * sm_count)
    memory[:, 8] = (x_reads * m * k * x + weight_reads * n * k * weight + m * n * out) / sm_count
    busy_us, memory_us = busy @ linear, memory @ linear
    both_us = (busy_us**4 + memory_us**4) ** 0.25
    rows = busy * ((busy_us / both_us) ** 3)[:, None] + memory * ((memory_us / both_us) ** 3)[:, None]
    rows[:, 0] = 1
    return rows


def row_bytes(config: Kernel, shapes: np.ndarray) -> np.ndarray:
    """What every row of x and weight starts on a multiple of: aot/model.py's row_bytes()."""
    m, n, k = shapes.T
    x, weight = ELEMENT_BYTES[config.x], ELEMENT_BYTES[config.weight]
    return np.where(m > 1, k * x, 0) | np.where(n > 1, k * weight, 0)


def reads(config: Kernel, shapes: np.ndarray, at_once: int, l2_bytes: float) -> tuple[np.ndarray, np.ndarray]:
    """How often x and weight come from DRAM: aot/model.py's dram_bytes()."""
    m, n, k = shapes.T
    x, weight = ELEMENT_BYTES[config.x], ELEMENT_BYTES[config.weight]
    tiles_m, tiles_n = -(-m // config.tile_m), -(-n // config.tile_n)
    if config.tma and not config.persistent:
        x_is_larger = m * x > n * weight
        along, across = np.where(x_is_larger, (tiles_m, tiles_n), (tiles_n, tiles_m))
        held = np.minimum(m * x, n * weight) * k <= l2_bytes
        times = np.where(held, 1, -(-along // np.maximum(1, at_once // across)))
        return np.where(x_is_larger, 1, times), np.where(x_is_larger, times, 1)
    group = np.where(config.persistent & (tiles_n <= FEW_COLUMNS), FEW_COLUMNS_GROUP_M, GROUP_M)
    group = np.minimum(group, tiles_m)
    group_bytes = np.minimum(group * config.tile_m, m) * k * x
    x_reads = np.where(group_bytes <= l2_bytes, 1, -(-tiles_n // np.maximum(1, at_once // group)))
    stays = n * k * weight + group_bytes <= l2_bytes
    return x_reads, np.where(stays, 1, -(-tiles_m // np.maximum(group, at_once // tiles_n)))


def linear_of(cost: dict[str, float]) -> np.ndarray:
    *most, dram_bytes_per_us = (cost[name] for name in CONSTANTS)
    return np.array([*most, 1 / dram_bytes_per_us])


def predicted_us(config: Kernel, shapes: np.ndarray, sm_count: int, cost: dict[str, float]) -> np.ndarray:
    linear = linear_of(cost)
    return coefficients(config, shapes, sm_count, linear) @ linear + late(config, shapes, sm_count)


def late(config: Kernel, shapes: np.ndarray, sm_count: int) -> Any:
    return late_us(config, *shapes.T, sm_count, places(config, sm_count) * config.ctas_per_sm)


def least_squares(rows: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """min |rows @ v - wanted| over v >= 0: what would be most negative is left out until nothing is."""
    size = np.linalg.norm(rows, axis=0)
    found = np.zeros_like(size)
    kept = np.flatnonzero(size)
    while len(kept):
        part = np.linalg.lstsq(rows[:, kept] / size[kept], wanted, rcond=1e-10)[0]
        if part.min() >= 0:
            found[kept] = part / size[kept]
            break
        kept = np.delete(kept, part.argmin())
    return found


def fit(config: Kernel, shapes: np.ndarray, us: np.ndarray, weight: np.ndarray, sm_count: int) -> np.ndarray:
    """The constants of least weighted relative error: linear least squares again and again, by the slopes at the last
    constants. An error beyond USUAL counts by its size and no more by its square: what the formula
    does not know of, such as the power limit, should not bend the rest."""
    own = linear_of({name: getattr(config, name) for name in CONSTANTS})
    # A constant that no time depends on stays the wheel's: to be off by all of itself costs as much as TIE of a time.
    # The memory's bandwidth is the GPU's and no kernel's: FIRM_TIE.
    own[-1] = 1 / REFERENCE[config.arch].dram_share
    tie = np.where(np.arange(len(own)) == len(own) - 1, FIRM_TIE, TIE)
    ties = np.diag(tie / np.maximum(own, 1e-12)) * (own > 0)
    tied = tie * (own > 0)
    best, best_error = own, math.inf
    for latency in (0.5, 1.0, 2.0, 4.0):
        linear = own * np.where(np.arange(len(own)) == CONSTANTS.index("latency_us"), latency, 1)
        for _ in range(30):
            relative = coefficients(config, shapes, sm_count, linear) / us[:, None]
            off = relative @ linear - 1
            size = np.sqrt(1 + (off / USUAL) ** 2)
            error = float(np.sum(2 * (weight * USUAL) ** 2 * (size - 1)) + np.sum((ties @ linear - tied) ** 2))
            if error < best_error:
                best, best_error = linear, error
            heed = weight / np.sqrt(size)
            rows = np.concatenate([relative * heed[:, None], ties])
            last, linear = linear, (linear + least_squares(rows, np.concatenate([heed, tied]))) / 2
            if np.allclose(last, linear, rtol=1e-4):
                break
    return best


@dataclass(frozen=True)
class Timed:
    """A kernel's times: a row a shape, and `at` which of the shapes that its rivals have times of, too."""

    config: Kernel
    at: np.ndarray
    shapes: np.ndarray
    us: np.ndarray
    late_us: np.ndarray

    def predicted(self, linear: np.ndarray, sm_count: int) -> tuple[np.ndarray, np.ndarray]:
        """(times, a row a shape: the slope of a time's logarithm by each constant's)."""
        rows = coefficients(self.config, self.shapes, sm_count, linear)
        us = rows @ linear + self.late_us
        return us, rows * linear / us[:, None]


def choose_better(
    kernels: Sequence[Timed], linear: Sequence[np.ndarray], counts: np.ndarray, sm_count: int
) -> list[np.ndarray]:
    """Constants near these by which choices among the kernels lose less time.

    fit() sees one kernel, and an error that has it chosen where it is slow is to it like one that changes no choice.
    Here a shape's loss is what the chosen kernel takes longer than the best, in the mean over what might be chosen:
    each with a probability in proportion to predicted_us^(-1 / ALIKE). Adam lowers the sum over the shapes of that, as
    often as a shape `counts`, and of the errors of times, as fit() has them, and of the way from the first constants,
    all of their logarithms.

    At an H100's times of 922 shapes and four classes, a quarter held out in turn, choices are off the best by 1.4 % in
    the mean and 8.2 % at the 95th percentile; by fit()'s constants alone by 1.9 and 11.7 %.
    """
    best_us = np.full(len(counts), math.inf)
    for each in kernels:
        np.minimum.at(best_us, each.at, each.us)
    lost, likely = np.zeros((2, len(kernels), len(counts)))
    for row, each in enumerate(kernels):
        lost[row, each.at] = np.minimum(each.us / best_us[each.at] - 1, MOST_LOST)
    first = np.log(np.array([[*np.maximum(each[:-1], LEAST_US), each[-1]] for each in linear]))
    found, mean, square = first.copy(), np.zeros_like(first), np.zeros_like(first)
    for step in range(1, STEPS + 1):
        told = [each.predicted(own, sm_count) for each, own in zip(kernels, np.exp(found))]
        for row, (each, (us, _)) in enumerate(zip(kernels, told)):
            likely[row, each.at] = (us / best_us[each.at]) ** (-1 / ALIKE)
        likely /= likely.sum(axis=0)
        by_choice = counts * likely * ((likely * lost).sum(axis=0) - lost) / ALIKE
        slope = 2 * TIE**2 * (found - first)
        for row, (each, (us, slopes)) in enumerate(zip(kernels, told)):
            off, weight = np.log(us / each.us), (best_us[each.at] / each.us) ** 4
            by_time = 2 * TIMES_COUNT * weight * off / np.sqrt(1 + (off / USUAL) ** 2)
            slope[row] += slopes.T @ (by_choice[row, each.at] + by_time)
        slope /= len(counts)
        slope[:, -1] = 0  # the memory's bandwidth is the GPU's and no kernel's
        mean, square = 0.9 * mean + 0.1 * slope, 0.999 * square + 0.001 * slope**2
        found -= RATE * mean / (1 - 0.9**step) / (np.sqrt(square / (1 - 0.999**step)) + 1e-9)
    return list(np.exp(found))


def by_shape(run: Run) -> list[list[Time]]:
    """The times of one shape and class together: of a kernel that serves two classes, or that two runs timed, the
    shorter one."""
    groups: dict[tuple[object, ...], dict[str, Time]] = {}
    for time in run.times:
        config = run.kernels[time.symbol]
        kind = (config.x, config.weight, config.out, config.fp16_accumulate)
        group = groups.setdefault((time.m, time.n, time.k, *kind), {})
        group[time.symbol] = min(time, group.get(time.symbol, time), key=lambda t: t.us)
    return [list(group.values()) for group in groups.values()]


def fit_all(run: Run, telling: Collection[tuple[int, int, int]] = ()) -> dict[str, dict[str, Any]]:
    """By symbol: constants, over how many shapes, and what is left of their times: rms and worst relative error.

    Each kernel is fitted alone; then those together that dispatch chooses among, of a class and reliance. There a
    choice at one of the `telling` shapes counts TELLING times.
    """
    groups = by_shape(run)
    best = {id(time): min(t.us for t in group) for group in groups for time in group}
    linear: dict[str, np.ndarray] = {}
    heeded: dict[str, list[Time]] = {}
    rivals: dict[tuple[object, ...], dict[str, list[Time]]] = {}
    for symbol, config in run.kernels.items():
        every = [t for group in groups for t in group if t.symbol == symbol]
        if not every:
            continue  # a generic kernel: it ran nowhere, and runs where nothing else does
        times = [t for t in every if t.us < HOPELESS * best[id(t)]]
        heeded[symbol] = times = times if len(times) > 2 * len(CONSTANTS) else every
        # Where a kernel may be chosen, its time matters most.
        weight = np.array([best[id(t)] / t.us for t in times]) ** 2
        one = timed(config, times, run.sm_count, {})
        linear[symbol] = fit(config, one.shapes, one.us - one.late_us, weight, run.sm_count)
        kind = (config.x, config.weight, config.out, config.fp16_accumulate, reliance(config))
        rivals.setdefault(kind, {})[symbol] = every
    for some in rivals.values():
        sizes = dict.fromkeys((t.m, t.n, t.k) for times in some.values() for t in times)
        rows = {size: row for row, size in enumerate(sizes)}
        counts = np.array([TELLING if size in telling else 1 for size in rows])
        kernels = [timed(run.kernels[symbol], times, run.sm_count, rows) for symbol, times in some.items()]
        linear |= zip(some, choose_better(kernels, [linear[symbol] for symbol in some], counts, run.sm_count))
    found: dict[str, dict[str, Any]] = {}
    for symbol, times in heeded.items():
        one = timed(run.kernels[symbol], times, run.sm_count, {})
        off = one.predicted(linear[symbol], run.sm_count)[0] / one.us - 1
        values = [float(f"{value:.4g}") for value in linear[symbol][:-1]] + [round(1 / max(linear[symbol][-1], 1e-9))]
        found[symbol] = {
            "cost": dict(zip(CONSTANTS, values)),
            "shapes": len(times),
            "rms": round(float(np.sqrt(np.mean(off**2))), 3),
            "worst": round(float(np.abs(off).max()), 3),
        }
    return found


def timed(config: Kernel, times: Sequence[Time], sm_count: int, rows: Mapping[tuple[int, int, int], int]) -> Timed:
    shapes, us = np.array([(t.m, t.n, t.k) for t in times]), np.array([t.us for t in times])
    at = np.array([rows.get((t.m, t.n, t.k), 0) for t in times])
    return Timed(config, at, shapes, us, late(config, shapes, sm_count) + np.zeros_like(us))
