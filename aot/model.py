"""Predicts a kernel's time from its machine code and a chip's facts: the constants of csrc/lbg.h's formula.

Nothing here was measured on the kernel. What a K step of one CTA takes of each unit of an SM comes from SASS; how the
units overlap, and what nothing in SASS tells, are the assumptions named below. docs/audit.md has their sources.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aot.chips import MMA_PRODUCTS, SHARED_BYTES_A_CYCLE, SUB_CORES, Chip, ctas_per_sm
from aot.configs import ELEMENT_BYTES, Config
from aot.rules import FEW_COLUMNS, FEW_COLUMNS_GROUP_M, GROUP_M, cut, grid, late_us, loaded, piece_share, places

if TYPE_CHECKING:
    from aot.compile import Report

# Assumptions, each a property of hardware and none of a kernel.
# Units busy for a and b take (a^p + b^p)^(1/p); 1 is one after another, infinity at once. Fitted on an H100 with the
# verification build, on half of the shapes of two runs; for Ada it is carried over.
OVERLAP = 1.85
SECTOR_WASTE = 8  # masked single elements move about an eighth of what 16-byte copies do
# What loads through the TMA unit cost beside their bytes (Cost), as fitted to an H200's kernels in the median.
OFF_US = 0.2


@dataclass(frozen=True)
class Cost:
    """csrc/lbg.h's Cost. Microseconds, but for the last."""

    launch_us: float  # once: the launch, and what a persistent kernel does but once
    wave_us: float  # of each wave of CTAs: to fill the pipeline, and the epilogue
    step_us: float  # of one CTA's K step in matrix pipe or L2: what CTAs on one SM add up
    latency_us: float  # least time between two K steps of a CTA: the load latency that its stages do not hide
    crowd_us: float  # what a K step takes more when every SM is at it
    off32_us: float  # as crowd_us, where rows of x or weight start off 32 bytes
    off64_us: float  # the same, off 64 bytes
    off128_us: float  # the same, off 128 bytes
    dram_bytes_per_us: float  # one SM's share of the memory's bandwidth


@dataclass(frozen=True)
class Step:
    """What a K step of one CTA takes of each unit of an SM that it has to itself, in us."""

    matrix_us: float
    issue_us: float
    shared_us: float
    l2_us: float  # while all SMs draw

    def sm_us(self, overlap: float) -> float:
        """On the SM: no less than the longest, and more where two are nearly as long, as a warp's matrix instructions
        wait for its own loads."""
        if overlap == math.inf:
            return max(self.matrix_us, self.issue_us, self.shared_us)
        return float(sum(us**overlap for us in (self.matrix_us, self.issue_us, self.shared_us)) ** (1 / overlap))


@dataclass(frozen=True)
class Prediction:
    us: float
    limiter: str  # the largest of `shares`
    shares: dict[str, float]  # of the time, what each would take if all else took none; units overlap, so no sum of 1


def wgmma(config: Config, report: Report) -> bool:
    """Whether its matrix instructions are Hopper's own, of four warps together."""
    products = report.loop_steps * config.tile_products
    return products > MMA_PRODUCTS * report.loop_mma * config.multiplying_warps


def mma_cycles(config: Config, report: Report, chip: Chip) -> float:
    if wgmma(config, report):
        return chip.wgmma_cycles
    return chip.mma_cycles_fp16 if config.fp16_accumulate else chip.mma_cycles


def operand_bytes(config: Config, weight_loads: float = 1) -> float:
    """What a CTA's K step loads, if it loads so much of its weight."""
    weight = weight_loads * config.tile_n * ELEMENT_BYTES[config.weight]
    return config.tile_k * (config.cta_rows * ELEMENT_BYTES[config.x] + weight)


def step(config: Config, report: Report, chip: Chip) -> Step:
    sub_cores = min(SUB_CORES, config.multiplying_warps)
    matrix = config.tile_products / MMA_PRODUCTS / sub_cores * mma_cycles(config, report, chip)
    slots = report.loop_instructions * config.multiplying_warps / report.loop_steps / sub_cores
    slots += sum(report.loader_mix.values()) / SUB_CORES
    # The TMA unit writes what it loads past the instructions that are counted.
    shared = report.loop_shared_bytes / report.loop_steps
    shared += operand_bytes(config) if config.tma else 0
    # What shifted loads ask for twice, they find in L1 the second time.
    waste = 1 if config.row_major else SECTOR_WASTE
    l2 = waste * operand_bytes(config, 1 / config.cluster) / chip.l2_bytes_per_cycle
    cycles = (matrix, slots, shared / SHARED_BYTES_A_CYCLE, l2)
    return Step(*(each / chip.clock_mhz for each in cycles))


def bounds(config: Config, report: Report, chip: Chip) -> dict[str, int]:
    """CTAs on an SM of the chip by each limit, and by all of them ("all")."""
    return ctas_per_sm(chip.limits, config.warps, report.registers, report.shared_bytes)


def ctas(config: Config, report: Report, chip: Chip) -> int:
    return max(1, bounds(config, report, chip)["all"])


def epilogue_us(config: Config, report: Report, chip: Chip) -> float:
    """What a CTA issues outside of its main loop, and the stores' way to L2."""
    slots = report.other_instructions * config.multiplying_warps / SUB_CORES
    stored = config.cta_rows * config.tile_n * ELEMENT_BYTES[config.out] * (1 if config.out_aligned else SECTOR_WASTE)
    return (slots + stored / chip.l2_bytes_per_cycle) / chip.clock_mhz


def cost(config: Config, report: Report, chip: Chip) -> Cost:
    """The formula's constants for one kernel on one chip."""
    took = step(config, report, chip)
    fill_us, drain_us = chip.dram_latency_us, epilogue_us(config, report, chip)
    # A second CTA multiplies while one fills or drains, or the other consumer of a kernel whose consumers take turns;
    # and a persistent kernel's loader goes on: it shows but once.
    hidden = ctas(config, report, chip) * config.tiles_at_once > 1
    once_us = fill_us + drain_us if hidden else fill_us if config.persistent else 0.0
    wave_us = 0.0 if hidden else drain_us if config.persistent else fill_us + drain_us
    # wgmma reads shared memory itself, asynchronously, and the loops leave one under way: all units overlap.
    sm_us = took.sm_us(math.inf if wgmma(config, report) else OVERLAP)
    return Cost(
        launch_us=round(chip.launch_us + once_us, 4),
        wave_us=round(wave_us, 4),
        step_us=round(sm_us, 4),
        latency_us=round(max(chip.dram_latency_us / max(1, config.stages - 1), sm_us), 4),
        crowd_us=round(max(0.0, took.l2_us - sm_us), 4),
        off32_us=OFF_US if config.tma else 0.0,
        off64_us=0.0,
        off128_us=0.0,
        dram_bytes_per_us=round(chip.dram_share),
    )


# ---- the formula


def up(a: int, b: int) -> int:
    return -(-a // b)


def waves(config: Config, tiles: int, at_once: int) -> Iterator[tuple[float, int]]:
    """(how many waves, CTAs of one): the whole ones, and what is left, which may be cut into pieces."""
    whole, rest = divmod(tiles, at_once)
    pieces = cut(config, rest, at_once)
    yield whole, at_once
    yield piece_share(pieces) if rest else 0, rest * pieces


def dram_bytes(config: Config, at_once: int, m: int, n: int, k: int, l2_bytes: float) -> int:
    """Bytes to and from DRAM, of `at_once` tiles on the GPU: the result once; x once, or once for each set of tile
    columns in flight if L2 does not hold a group's x; weight once, or once for each group, or set of groups in flight,
    if it does not stay in L2 beside a group's x. Those that are not persistent but load through tensor maps read the
    larger operand once, and the smaller one, too, or once for each set of the larger one's rows in flight."""
    x, weight, out = (ELEMENT_BYTES[dtype] for dtype in (config.x, config.weight, config.out))
    tiles_m, tiles_n = up(m, config.tile_m), up(n, config.tile_n)
    if config.tma and not config.persistent:
        sizes = (m * k * x, tiles_m), (n * k * weight, tiles_n)
        (smaller, across), (larger, along) = sorted(sizes, key=lambda operand: operand[0])
        reads = 1 if smaller <= l2_bytes else up(along, max(1, at_once // across))
        return larger + reads * smaller + m * n * out
    group = min(FEW_COLUMNS_GROUP_M if config.persistent and tiles_n <= FEW_COLUMNS else GROUP_M, tiles_m)
    group_bytes = min(group * config.tile_m, m) * k * x
    x_reads = 1 if group_bytes <= l2_bytes else up(tiles_n, max(1, at_once // group))
    weight_reads = 1 if n * k * weight + group_bytes <= l2_bytes else up(tiles_m, max(group, at_once // tiles_n))
    return x_reads * m * k * x + weight_reads * n * k * weight + m * n * out


def row_bytes(config: Config, m: int, n: int, k: int) -> int:
    """Every row of contiguous operands starts on as many bytes as this is a multiple of, if the first does."""
    return (k * ELEMENT_BYTES[config.x] if m > 1 else 0) | (k * ELEMENT_BYTES[config.weight] if n > 1 else 0)


def predicted_us(
    config: Config, cost: Cost, at_once: int, m: int, n: int, k: int, sm_count: int, l2_bytes: float
) -> float:
    """csrc/lbg.h's formula, of contiguous operands; `at_once` are the CTAs that an SM holds, `l2_bytes` what L2
    does."""
    steps, tiles, sms = up(k, config.tile_k), grid(m, n, config.tile_m, config.tile_n), places(config, sm_count)
    offs = ((32, cost.off32_us), (64, cost.off64_us), (128, cost.off128_us))
    off_us = sum(us for unit, us in offs if row_bytes(config, m, n, k) % unit)
    crowd_us = cost.crowd_us + off_us * loaded(config, ELEMENT_BYTES[config.x], ELEMENT_BYTES[config.weight], m, n)
    busy = 0.0
    for count, ctas in waves(config, tiles, sms * at_once):
        step_us = max(up(ctas, sms) * cost.step_us, cost.latency_us)
        busy += count * (cost.wave_us + steps * (step_us + ctas / sms * crowd_us))
    memory = dram_bytes(config, sms * at_once, m, n, k, l2_bytes) / (sm_count * cost.dram_bytes_per_us)
    late = float(late_us(config, m, n, k, sm_count, sms * at_once))
    return float(cost.launch_us + (busy**4 + memory**4) ** 0.25 + late)


def predict(config: Config, report: Report, chip: Chip, m: int, n: int, k: int) -> Prediction:
    """The time of one call on a chip, and what limits it."""
    made, took, at_once = cost(config, report, chip), step(config, report, chip), ctas(config, report, chip)
    us = predicted_us(config, made, at_once, m, n, k, chip.sm_count, chip.l2_holds)
    tiles, steps = grid(m, n, config.tile_m, config.tile_n), up(k, config.tile_k)
    sms = places(config, chip.sm_count)
    passes = list(waves(config, tiles, sms * at_once))
    count = sum(some for some, _ in passes)
    each = tiles * steps / sms  # K steps of an SM, if all SMs had as many
    fullest = steps * sum(some * up(ctas, sms) for some, ctas in passes)
    alone = {
        "tensor pipe": each * took.matrix_us,
        "issue slots": each * took.issue_us,
        "shared memory": each * took.shared_us,
        "L2": each * took.l2_us,
        "DRAM": dram_bytes(config, sms * at_once, m, n, k, chip.l2_holds) / (made.dram_bytes_per_us * chip.sm_count),
        "load latency": count * steps * chip.dram_latency_us / max(1, config.stages - 1),
        "waves and tail": count * made.wave_us + (fullest - each) * made.step_us,
        "launch": made.launch_us,
    }
    shares = {name: round(one / us, 4) for name, one in alone.items()}
    return Prediction(round(us, 3), max(shares, key=lambda name: shares[name]), shares)
