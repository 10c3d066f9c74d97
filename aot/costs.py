"""What dispatch expects of each kernel's time: measured where evidence_sm_XY.json has its symbol, else modelled.

The formula is csrc/lbg.h's predicted_us. `python3 build.py tune` and `python -m tests.bench.fit` measure and write. No
cubin depends on a cost, so that a new one compiles nothing again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from aot import evidence
from aot.configs import CHIPS, ELEMENT_BYTES, Config


@dataclass(frozen=True)
class Cost:
    """csrc/lbg.h's Cost. Microseconds, but for the last."""

    launch_us: float  # once: the launch, and what a persistent kernel does but once
    wave_us: float  # of each wave of CTAs: to fill the pipeline, and the epilogue
    step_us: float  # of one CTA's K step in matrix pipe or L2: what CTAs on one SM add up
    latency_us: float  # least time between two K steps of a CTA: the load latency that its stages do not hide
    crowd_us: float  # what a K step takes more when every SM is at it
    off_us: float  # as crowd_us, where rows of x or weight start off 32 bytes
    fill_us: float  # as crowd_us, for each row of an x box that lies past M
    box_us: float  # of a K step, for each x box after the first
    dram_bytes_per_us: float  # one SM's share of the memory's bandwidth


@dataclass(frozen=True)
class Rates:
    """Of one arch's reference GPU. Datasheet figures, measured where it says so."""

    clock_mhz: int
    mma_efficiency: float  # of that rate, what a main loop reaches
    l2_bytes_per_us: int  # what one SM draws from L2 with all of them drawing
    dram_gb_per_s: int
    latency_us: float  # of a load that misses L2
    launch_us: float


RATES = {
    89: Rates(2520, 0.95, 39_000, 1008, 0.6, 2.0),
    # Efficiency and L2 rate as measured on an H200: 16384x4096x4096 draws 6.4 GB through L2 in 1.0 ms.
    90: Rates(1830, 0.75, 49_000, 3350, 0.7, 2.0),
}
# What loads through the TMA unit cost beside their bytes (Cost), as fitted to an H200's kernels in the median.
OFF_US = 0.2
FILL_BYTES_PER_US = 60_000
BOX_US = 0.03
READ_EFFICIENCY = 0.88  # of the datasheet's bandwidth: a copy on the H100, 2.94 of 3.35 TB/s


def modelled(config: Config) -> Cost:
    rates = RATES[config.arch]
    chip = CHIPS[config.arch]
    cycles = chip.mma_cycles_fp16 if config.fp16_accumulate else chip.mma_cycles
    mma = config.tile_m * config.tile_n * config.tile_k / 2048
    mma_us = mma / 4 * cycles / rates.clock_mhz / rates.mma_efficiency
    x_bytes, weight_bytes = ELEMENT_BYTES[config.x], ELEMENT_BYTES[config.weight]
    # Masked single-element copies move about an eighth of what 16-byte copies do.
    load_us = config.tile_k * (config.tile_m * x_bytes + config.tile_n * weight_bytes) / rates.l2_bytes_per_us
    load_us *= 1 if config.aligned else 8
    store_us = config.tile_m * config.tile_n * ELEMENT_BYTES[config.out] / rates.l2_bytes_per_us
    store_us *= 1 if config.out_aligned else 8
    # A persistent kernel loads for its next tile while it finishes one: it fills and drains once.
    once_us, wave_us = (rates.latency_us + store_us, 0.0) if config.persistent else (0.0, rates.latency_us + store_us)
    return Cost(
        launch_us=round(rates.launch_us + once_us, 4),
        wave_us=round(wave_us, 4),
        # The two overlap, but not wholly: a tenth of the shorter shows.
        step_us=round(max(mma_us, load_us) + min(mma_us, load_us) / 10, 4),
        latency_us=round(rates.latency_us / (config.stages - 1), 4),
        # Within step_us, which is of the rates that all SMs have together.
        crowd_us=0.0,
        off_us=OFF_US if config.tma else 0.0,
        fill_us=round(config.tile_k * x_bytes / FILL_BYTES_PER_US, 5) if config.x_box else 0.0,
        box_us=BOX_US if config.x_box else 0.0,
        dram_bytes_per_us=round(rates.dram_gb_per_s * 1e3 * READ_EFFICIENCY / CHIPS[config.arch].sm_count),
    )


@cache
def measured(arch: int) -> dict[str, Cost]:
    """By symbol; empty for an arch that has not been measured."""
    rows = evidence.read(arch)["tune"].get("costs", {}).get("kernels", {})
    return {symbol: Cost(**row["cost"]) for symbol, row in rows.items()}


def cost(config: Config) -> Cost:
    return measured(config.arch).get(config.symbol) or modelled(config)
