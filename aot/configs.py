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
    mma_efficiency: float  # of that rate, what a main loop reaches
    l2_bytes_per_us: int  # what one SM draws from L2 with all of them drawing
    latency_us: float  # of a load that misses L2


CHIPS = {
    # HMMA rates: NVIDIA Ada whitepaper, 165.2 and 330.3 TFLOPS over 128 SMs at 2.52 GHz.
    89: Chip("RTX 4090", 128, 2520, 65536, 48, 100 * 1024, 99 * 1024, 32, 16, 0.95, 39_000, 0.6),
    # 989 TFLOPS over 132 SMs at 1.83 GHz, one rate for both accumulation widths. Efficiency and L2 rate as measured on
    # an H200 with these kernels: 16384x4096x4096 draws 6.4 GB through L2 in 1.0 ms.
    90: Chip("H100 SXM", 132, 1830, 65536, 64, 228 * 1024, 227 * 1024, 4, 4, 0.75, 49_000, 0.7),
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
    tma: bool = False  # lbg_fused_tma: persistent, with tensor maps made by the launcher

    @property
    def symbol(self) -> str:
        x = self.x if self.x == self.weight else f"{self.x}as{self.weight}"
        mode = "_acc16" if self.fp16_accumulate else ""
        kind = "_tma" if self.tma else "" if self.aligned else "_any"
        return f"lbg_fused_{x}_{self.out}{mode}_{self.tile}_w{self.warps}_s{self.stages}{kind}"

    @property
    def tile(self) -> str:
        return f"{self.tile_m}x{self.tile_n}x{self.tile_k}"

    @property
    def file(self) -> str:
        return f"sm_{self.arch}_{self.symbol}"


# The tiles of one arch, in three kinds of class: 16-bit x, float32 x, and fp16_accumulate (whose K step is its chunk).
# (tile_m, tile_n, tile_k, warps, stages, epilogue parts if not 1), from large M to small. Times are medians on one
# H200, M x N=4096 x K=4096, sm_89 rows through the verification build; 4 stages where they earn it against 3.
TILES: dict[tuple[int, str], tuple[tuple[int, ...], ...]] = {
    (89, "x16"): (
        (128, 128, 32, 4, 3),  # M=16384: 1.61 ms; 2 CTAs an SM by registers, 64 KB of shared memory of 100
        (64, 64, 64, 4, 3),  # M=256: 39.6 us, against 42.4 of 128x64x64
        (64, 32, 128, 4, 4),  # M=64: 17.5 us, against 20.5 with 3 stages; one CTA an SM fills a 4090 at N=4096
        (16, 32, 256, 4, 4),  # M=16: 12.3 us, against 13.6 with 3 stages; M=1: 16.6 against 19.7
    ),
    # Two parts: in one, a float32 result spills.
    (89, "x32"): ((128, 128, 32, 4, 3, 2), (64, 64, 64, 4, 3), (64, 32, 128, 4, 3), (16, 32, 256, 4, 3)),
    (89, "acc16"): ((128, 64, 64, 4, 3), (64, 64, 64, 4, 3), (64, 32, 64, 4, 3), (16, 64, 64, 4, 3)),
    (90, "x16"): (
        # The widest tile that 64 K registers hold. M=16384: 0.92 ms; in one part a float32 result spills, and a float16
        # one takes 3 % longer.
        (128, 256, 64, 8, 3, 2),
        (64, 64, 128, 4, 3),  # M=256: 24.7 us, against 33.8 of 64x64x64
        (64, 32, 128, 4, 4),  # M=64: 15.7 us, against 19.0 with 3 stages
        (16, 32, 256, 4, 4),  # M=16: 13.0 us, against 14.2 with 3 stages; M=1: 17.3 against 20.2
    ),
    # M=16384: 1.37 ms, against 1.84 of 128x128x64 with 8 warps
    (90, "x32"): ((128, 256, 64, 8, 3, 2), (64, 64, 64, 4, 3), (64, 32, 128, 4, 3), (16, 32, 256, 4, 3)),
    # M=16384: 1.36 ms, against 1.59 of 128x128x64 with 8 warps
    (90, "acc16"): ((64, 128, 64, 4, 3), (64, 64, 64, 4, 3), (64, 32, 64, 4, 3), (16, 64, 64, 4, 3)),
}
# Of 16-bit x on sm_90 besides: persistent, operands and result through tensor maps. M=16384, in one run: 0.81 ms for
# a float16 result, against 0.91 of the same tile above; 0.86 for float32, against 0.90. In one part a float32 result
# needs more shared memory than there is.
TMA_TILE = {"f16": (128, 256, 64, 8, 3), "bf16": (128, 256, 64, 8, 3), "f32": (128, 256, 64, 8, 3, 2)}
# Any strides, any alignment. 4 warps and 2 stages, the conservative choice: its loads are masked single elements.
GENERIC_TILE = {False: (64, 64, 32, 4, 2), True: (32, 64, 64, 4, 2)}


def configs() -> Iterator[Config]:
    for arch in ARCHS:
        for x, weight, out in DTYPES:
            for fp16_accumulate in (False, True) if weight == "f16" else (False,):
                kind = "acc16" if fp16_accumulate else "x32" if x == "f32" else "x16"
                for tile in TILES[arch, kind]:
                    yield Config(arch, x, weight, out, fp16_accumulate, True, *tile)
                if (arch, kind) == (90, "x16"):
                    yield Config(arch, x, weight, out, False, True, *TMA_TILE[out], tma=True)
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


@dataclass(frozen=True)
class Cost:
    """Microseconds, modelled on the arch's chip; csrc/dispatch.cpp's predicted_us puts them together."""

    fixed_us: float  # of a wave of CTAs: to fill the pipeline, and to store
    step_us: float  # of one CTA's K step in matrix pipe or L2, whichever is slower: what CTAs on an SM add up
    latency_us: float  # least time between two K steps of a CTA: the load latency that its stages do not hide


def cost(config: Config) -> Cost:
    chip = CHIPS[config.arch]
    cycles = chip.mma_cycles_fp16 if config.fp16_accumulate else chip.mma_cycles
    mma = config.tile_m * config.tile_n * config.tile_k / 2048
    mma_us = mma / 4 * cycles / chip.clock_mhz / chip.mma_efficiency
    x_bytes, weight_bytes = ELEMENT_BYTES[config.x], ELEMENT_BYTES[config.weight]
    # Masked single-element copies move about an eighth of what 16-byte copies do.
    load_us = config.tile_k * (config.tile_m * x_bytes + config.tile_n * weight_bytes) / chip.l2_bytes_per_us
    load_us *= 1 if config.aligned else 8
    store_us = config.tile_m * config.tile_n * ELEMENT_BYTES[config.out] / chip.l2_bytes_per_us
    latency_us = chip.latency_us / (config.stages - 1)
    # The two overlap, but not wholly: a tenth of the shorter shows.
    step_us = max(mma_us, load_us) + min(mma_us, load_us) / 10
    return Cost(*(round(us, 4) for us in (chip.latency_us + store_us, step_us, latency_us)))
