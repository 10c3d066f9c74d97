"""Facts of GPUs: what an arch lets a kernel take, and what the named chips can do, each number with its source.

"datasheet" is NVIDIA's for that GPU; "guide" is the CUDA C++ Programming Guide's table of compute capabilities. An
assumption is called one: nobody measured it on that chip for this project.
"""

from __future__ import annotations

from dataclasses import dataclass

from aot import BuildError

SUB_CORES = 4  # of an SM, each issuing one instruction a cycle (Ada and Hopper whitepapers)
SHARED_BYTES_A_CYCLE = 128  # of an SM: 32 banks of 4 bytes (guide)
MMA_PRODUCTS = 2048  # of an m16n8k16


@dataclass(frozen=True)
class Limits:
    """What the kernels on one SM may take together, and a block alone (guide)."""

    registers: int
    warps: int
    blocks: int
    shared_bytes: int
    shared_block_bytes: int


LIMITS = {
    89: Limits(65536, 48, 24, 100 * 1024, 99 * 1024),
    90: Limits(65536, 64, 32, 228 * 1024, 227 * 1024),
}

DRAM_EFFICIENCY = 0.88  # of the datasheet's bandwidth: a copy on an H100, 2.94 of 3.35 TB/s


@dataclass(frozen=True)
class Chip:
    """One GPU. Cycles are of a sub-core between two m16n8k16, or as many products of a wgmma."""

    name: str
    arch: int
    sm_count: int
    clock_mhz: int
    mma_cycles: float  # with float32 accumulation
    mma_cycles_fp16: float
    wgmma_cycles: float  # 0 where there is no wgmma
    dram_gb_per_s: int
    l2_bytes: int
    l2_copies: int  # of a line, once all SMs have read it
    l2_bytes_per_cycle: float  # what an SM draws from L2 while all of them draw
    dram_latency_us: float
    launch_us: float
    assumed: tuple[str, ...]  # the fields that nobody measured or published

    @property
    def limits(self) -> Limits:
        return LIMITS[self.arch]

    @property
    def full_rate(self) -> bool:
        """csrc/lbg.h's: whether mma.sync is as fast with float32 accumulation, of an arch whose GPUs differ in that."""
        return self.arch == 89 and self.mma_cycles == self.mma_cycles_fp16

    @property
    def l2_holds(self) -> int:
        """Bytes that all SMs read and that stay in L2."""
        return self.l2_bytes // self.l2_copies

    @property
    def l2_share(self) -> int:
        """One SM's, of what L2 holds; dispatch knows a GPU's SMs and not its L2."""
        return self.l2_holds // self.sm_count

    @property
    def dram_share(self) -> float:
        """One SM's, in bytes a microsecond."""
        return self.dram_gb_per_s * 1e3 * DRAM_EFFICIENCY / self.sm_count

    def tflops(self, cycles: float) -> float:
        """The tensor cores' peak if an m16n8k16 takes a sub-core so many cycles."""
        return 2 * MMA_PRODUCTS / cycles * SUB_CORES * self.sm_count * self.clock_mhz * 1e6 / 1e12


# What nobody measured on Ada: that its L2 gives an SM the same share as on Hopper, and its latencies.
_ADA_ASSUMED = ("l2_bytes_per_cycle", "dram_latency_us", "launch_us")
_MB = 1024 * 1024

CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="RTX 4090",
            arch=89,
            sm_count=128,  # Ada whitepaper
            clock_mhz=2520,  # Ada whitepaper: the boost clock that its TFLOPS are for
            mma_cycles=32,  # Ada whitepaper: 165.2 TFLOPS
            mma_cycles_fp16=16,  # Ada whitepaper: 330.3 TFLOPS
            wgmma_cycles=0,
            dram_gb_per_s=1008,  # Ada whitepaper
            l2_bytes=72 * _MB,  # Ada whitepaper
            l2_copies=1,
            l2_bytes_per_cycle=15.5,  # assumption: 5.0 TB/s over all SMs
            dram_latency_us=0.8,  # assumption: as on Hopper
            launch_us=2.0,  # assumption: as on Hopper
            assumed=_ADA_ASSUMED,
        ),
        Chip(
            name="L40S",
            arch=89,
            sm_count=142,  # datasheet: 568 tensor cores
            clock_mhz=2490,  # what the datasheet's 362.05 TFLOPS come to; the boost clock is 2520
            mma_cycles=16,  # datasheet: 362.05 TFLOPS, with float32 accumulation too
            mma_cycles_fp16=16,
            wgmma_cycles=0,
            dram_gb_per_s=864,  # datasheet
            l2_bytes=96 * _MB,  # Ada whitepaper: all of AD102's
            l2_copies=1,
            l2_bytes_per_cycle=15.5,  # assumption
            dram_latency_us=0.8,  # assumption: as on Hopper
            launch_us=2.0,  # assumption
            assumed=_ADA_ASSUMED,
        ),
        Chip(
            name="L4",
            arch=89,
            sm_count=58,  # datasheet: 232 tensor cores
            clock_mhz=2040,  # the boost clock, at which 121 TFLOPS of the datasheet are; 72 W do not sustain it
            mma_cycles=16,  # datasheet: 242 TFLOPS with sparsity, so 121
            mma_cycles_fp16=16,
            wgmma_cycles=0,
            dram_gb_per_s=300,  # datasheet
            l2_bytes=48 * _MB,  # Ada whitepaper: AD104's
            l2_copies=1,
            l2_bytes_per_cycle=15.5,  # assumption
            dram_latency_us=0.8,  # assumption: as on Hopper
            launch_us=2.0,  # assumption
            assumed=_ADA_ASSUMED,
        ),
        Chip(
            name="H100 SXM",
            arch=90,
            sm_count=132,  # Hopper whitepaper
            clock_mhz=1830,  # what the datasheet's 989.4 TFLOPS come to
            mma_cycles=6.2,  # measured on an H100: sm_80's mma.sync reaches 640 TFLOPS
            mma_cycles_fp16=6.2,  # measured on an H200: no faster
            wgmma_cycles=4,  # datasheet: 989.4 TFLOPS
            dram_gb_per_s=3350,  # datasheet
            l2_bytes=50 * _MB,  # datasheet
            l2_copies=2,  # Hopper's L2 has two halves, and an SM reads the far one through its own
            l2_bytes_per_cycle=43,  # assumption: as the H200, whose die it is
            dram_latency_us=0.8,  # assumption: as the H200
            launch_us=2.0,  # assumption: as the H200
            assumed=("l2_bytes_per_cycle", "dram_latency_us", "launch_us"),
        ),
        Chip(
            name="H200",
            arch=90,
            sm_count=132,  # datasheet
            clock_mhz=1830,  # what the datasheet's 989.4 TFLOPS come to
            mma_cycles=6.2,  # measured on an H100
            mma_cycles_fp16=6.2,  # measured: no faster
            wgmma_cycles=4,  # datasheet
            dram_gb_per_s=4800,  # datasheet
            l2_bytes=50 * _MB,  # datasheet
            l2_copies=2,  # Hopper's L2 has two halves, and an SM reads the far one through its own
            l2_bytes_per_cycle=43,  # measured: 16x64 tiles of 16384x4096x4096 draw 43 GB through L2 in 4.15 ms
            dram_latency_us=0.8,  # fitted to the verification build's times
            launch_us=2.0,  # the same
            assumed=(),
        ),
    )
}
# The GPU that an arch's kernels are judged for.
REFERENCE = {89: CHIPS["RTX 4090"], 90: CHIPS["H100 SXM"]}
# The one that stands for an arch's GPUs of full rate, where dispatch is told of them.
FULL_RATE = {89: CHIPS["L40S"]}


def is_full_rate(arch: int, gpu: str) -> bool:
    """By the name that the driver has for the GPU, as csrc/runtime.cpp has it: any sm_89 one but a GeForce."""
    return arch == 89 and "GeForce" not in gpu


def named(name: str) -> Chip:
    """Raises BuildError for a chip that is not in the table."""
    if name not in CHIPS:
        raise BuildError(f"no chip is named {name!r}; there are {', '.join(CHIPS)}")
    return CHIPS[name]


def ctas_per_sm(limits: Limits, warps: int, registers: int, shared_bytes: int) -> dict[str, int]:
    """CTAs that one SM holds by each limit, and by all of them (`"all"`)."""
    # Registers are handed out per warp in units of 256; a block also holds 1 KB of shared memory for the system.
    per_warp = -(-registers * 32 // 256) * 256
    found = {
        "registers": limits.registers // (per_warp * warps),
        "shared": limits.shared_bytes // (shared_bytes + 1024),
        "warps": limits.warps // warps,
    }
    return found | {"all": min(limits.blocks, *found.values())}
