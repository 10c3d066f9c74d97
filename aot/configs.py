"""Which kernels are shipped: one row is one compiled kernel, and `CONFIGS` yields them all.

A row owns its names: symbol, cubin file, table row and log text derive from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

ARCHS = (89, 90)
ELEMENT_BYTES = {"f16": 2, "bf16": 2, "f32": 4}
# (x, weight, result): 16-bit x with its own dtype as weight, or float32 x rounded in the kernel to the weight's.
DTYPES = tuple(
    (x, weight, out) for weight in ("f16", "bf16") for x in (weight, "f32") for out in (weight, "f32")
)  # fmt: skip


@dataclass(frozen=True)
class Chip:
    """What bounds a kernel on one arch. Datasheet figures of the arch's reference GPU, measured where it says so."""

    name: str
    sm_count: int
    clock_mhz: int
    registers: int  # per SM
    warps: int  # per SM
    shared_bytes: int  # per SM
    shared_block_bytes: int  # most that one block can ask for
    mma_cycles: int  # between two m16n8k16 with fp32 accumulation, on one of the four sub-cores
    mma_cycles_fp16: int  # the same with fp16 accumulation
    l2_bytes_per_us: int  # what one SM draws from L2 with all of them drawing
    latency_us: float  # of a load that misses L2


CHIPS = {
    # HMMA rates: NVIDIA Ada whitepaper, 165.2 and 330.3 TFLOPS over 128 SMs at 2.52 GHz.
    89: Chip("RTX 4090", 128, 2520, 65536, 48, 100 * 1024, 99 * 1024, 32, 16, 39_000, 0.6),
    # 989 TFLOPS over 132 SMs at 1.83 GHz: both accumulation widths run at one rate.
    90: Chip("H100 SXM", 132, 1830, 65536, 64, 228 * 1024, 227 * 1024, 4, 4, 41_000, 0.7),
}


@dataclass(frozen=True)
class Config:
    arch: int
    x: str
    weight: str
    out: str
    fp16_accumulate: bool
    aligned: bool
    tile_m: int
    tile_n: int
    tile_k: int
    warps: int
    stages: int
    epilogue_parts: int = 1  # 2 where the epilogue of a whole tile would spill
    group_m: int = 8  # tiles_m that share a pass over the weight: x and weight rows in flight stay well inside L2

    @property
    def symbol(self) -> str:
        x = self.x if self.x == self.weight else f"{self.x}as{self.weight}"
        mode = "_acc16" if self.fp16_accumulate else ""
        kind = "" if self.aligned else "_any"
        return f"lbg_fused_{x}_{self.out}{mode}_{self.tile}_w{self.warps}_s{self.stages}{kind}"

    @property
    def tile(self) -> str:
        return f"{self.tile_m}x{self.tile_n}x{self.tile_k}"

    @property
    def file(self) -> str:
        return f"sm_{self.arch}_{self.symbol}"


# The tiles of one arch, in three kinds of class: 16-bit x, float32 x, and fp16_accumulate (whose K step is its chunk).
# (tile_m, tile_n, tile_k, warps, stages), the last aligned row first for large M, then 64 rows, then 16 rows.
TILES = {
    (89, "x16"): ((128, 128, 32, 4, 3), (64, 64, 64, 4, 3), (16, 64, 128, 4, 3)),
    (89, "x32"): ((128, 128, 32, 4, 3), (64, 64, 64, 4, 3), (16, 64, 128, 4, 3)),
    (89, "acc16"): ((128, 64, 64, 4, 3), (64, 64, 64, 4, 3), (16, 64, 64, 4, 3)),
    (90, "x16"): ((128, 256, 64, 8, 3), (64, 64, 64, 4, 3), (16, 64, 128, 4, 3)),
    (90, "x32"): ((128, 128, 64, 8, 3), (64, 64, 64, 4, 3), (16, 64, 128, 4, 3)),
    (90, "acc16"): ((128, 128, 64, 8, 3), (64, 64, 64, 4, 3), (16, 64, 64, 4, 3)),
}
# Any strides, any alignment. 4 warps and 2 stages, the conservative choice: its loads are masked single elements.
GENERIC_TILE = {False: (64, 64, 32, 4, 2), True: (32, 64, 64, 4, 2)}


def configs() -> Iterator[Config]:
    for arch in ARCHS:
        for x, weight, out in DTYPES:
            for fp16_accumulate in (False, True) if weight == "f16" else (False,):
                kind = "acc16" if fp16_accumulate else "x32" if x == "f32" else "x16"
                for tile in TILES[arch, kind]:
                    # A float32 result is twice as wide while it waits to be stored: in one part it spills.
                    parts = 2 if out == "f32" and tile[0] * tile[1] >= 128 * 128 else 1
                    yield Config(arch, x, weight, out, fp16_accumulate, True, *tile, epilogue_parts=parts)
                yield Config(arch, x, weight, out, fp16_accumulate, False, *GENERIC_TILE[fp16_accumulate])


CONFIGS = tuple(configs())


def ctas_per_sm(config: Config, registers: int, shared_bytes: int) -> dict[str, int]:
    """CTAs that one SM holds by each limit, and by all of them (`"all"`)."""
    chip = CHIPS[config.arch]
    # Registers are handed out per warp in units of 256; a block also holds 1 KB of shared memory for the system.
    per_warp = -(-registers * 32 // 256) * 256
    limits = {
        "registers": chip.registers // (per_warp * config.warps),
        "shared": chip.shared_bytes // (shared_bytes + 1024),
        "warps": chip.warps // config.warps,
    }
    return limits | {"all": min(limits.values())}


def cost_us(config: Config, ctas: int) -> tuple[float, float]:
    """(fixed, per K step) microseconds of one wave of `ctas` co-resident CTAs an SM, modelled on the arch's chip.

    A step takes the longest of its matrix instructions, its bytes from L2, and its share of the load latency that the
    pipeline's stages do not hide; a CTA pays one latency to fill the pipeline and its stores to leave.
    """
    chip = CHIPS[config.arch]
    cycles = chip.mma_cycles_fp16 if config.fp16_accumulate else chip.mma_cycles
    mma_us = config.tile_m * config.tile_n * config.tile_k / 2048 / 4 * cycles / chip.clock_mhz
    step_bytes = config.tile_k * (
        config.tile_m * ELEMENT_BYTES[config.x] + config.tile_n * ELEMENT_BYTES[config.weight]
    )
    # Masked single-element copies move about an eighth of what 16-byte copies do.
    load_us = step_bytes / chip.l2_bytes_per_us * (1 if config.aligned else 8)
    store_us = config.tile_m * config.tile_n * ELEMENT_BYTES[config.out] / chip.l2_bytes_per_us
    step_us = max(ctas * mma_us, ctas * load_us, chip.latency_us / (config.stages - 1))
    return chip.latency_us + ctas * store_us, step_us
