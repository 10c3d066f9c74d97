"""Which kernels are shipped: one row is one compiled kernel, and `CONFIGS` yields them all.

A row owns its names: symbol, cubin file, table row and log text derive from it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from aot import BuildError

ARCHS = (89, 90)
ELEMENT_BYTES = {"f16": 2, "bf16": 2, "f32": 4}
# (x, weight, result): 16-bit x with its own dtype as weight, or float32 x rounded in the kernel to the weight's.
DTYPES = tuple(
    (x, weight, out) for weight in ("f16", "bf16") for x in (weight, "f32") for out in (weight, "f32")
)  # fmt: skip


@dataclass(frozen=True)
class Chip:
    """What a kernel may take on one arch, and the GPU that its rates are quoted for (aot/costs.py)."""

    name: str
    sm_count: int
    registers: int  # per SM
    warps: int  # per SM
    shared_bytes: int  # per SM
    shared_block_bytes: int  # most that one block can ask for


CHIPS = {
    89: Chip("RTX 4090", 128, 65536, 48, 100 * 1024, 99 * 1024),
    90: Chip("H100 SXM", 132, 65536, 64, 228 * 1024, 227 * 1024),
}


@dataclass(frozen=True)
class Config:
    arch: int
    x: str
    weight: str
    out: str
    fp16_accumulate: bool
    aligned: bool  # relies on loads that are aligned: rows of x and weight start on 16 bytes, K is a multiple of 8
    tile_m: int
    tile_n: int
    tile_k: int
    warps: int
    stages: int
    epilogue_parts: int = 1  # 2 where the epilogue of a whole tile would spill
    group_m: int = 8  # tiles_m that share a pass over the weight: x and weight rows in flight stay well inside L2
    tma: bool = False  # lbg_fused_tma: persistent, with tensor maps made by the launcher
    out_aligned: bool = True  # relies on stores that are: rows of the result start on 16 bytes, N is a multiple of 8

    @property
    def symbol(self) -> str:
        x = self.x if self.x == self.weight else f"{self.x}as{self.weight}"
        mode = "_acc16" if self.fp16_accumulate else ""
        kind = "_tma" if self.tma else "" if self.out_aligned else "_anyout" if self.aligned else "_any"
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
                generic = GENERIC_TILE[fp16_accumulate]
                yield Config(arch, x, weight, out, fp16_accumulate, False, *generic, out_aligned=False)


CONFIGS = tuple(configs())
MOST_IN_REGIME = 4


def class_of(config: Config) -> tuple[int, str, str, str, bool]:
    """What a call fixes, and so what its kernel is chosen among."""
    return config.arch, config.x, config.weight, config.out, config.fp16_accumulate


def regime(config: Config) -> str:
    """The M that a tile is for. A generic kernel is of every regime, its last resort."""
    if not config.aligned:
        return "any M"
    return "few rows" if config.tile_m <= 32 else "some rows" if config.tile_m == 64 else "many rows"


def check_classes(configs: Sequence[Config]) -> None:
    """Raises BuildError unless dispatch finds in each class what it relies on."""
    found: list[tuple[int, str, str, str, bool]] = []
    for key, group in groupby(configs, class_of):
        rows, label = list(group), f"sm_{key[0]} {'-'.join(key[1:4])}{' fp16_accumulate' if key[4] else ''}"
        if key in found:
            raise BuildError(f"{label}: its configs do not stand together in CONFIGS")
        found.append(key)
        last = rows[-1]
        if last.aligned or last.out_aligned or (last.warps, last.stages) != (4, 2):
            raise BuildError(f"{label}: the last config, {last.symbol}, is not the conservative one: any alignment, 4 "
                             "warps, 2 stages")  # fmt: skip
        for name, count in Counter(map(regime, rows[:-1])).items():
            if count + 1 > MOST_IN_REGIME or name == "any M":
                raise BuildError(f"{label}: {count + 1} configs for {name}; the most is {MOST_IN_REGIME}, the "
                                 "conservative one among them")  # fmt: skip


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
