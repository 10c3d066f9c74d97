"""Which kernels are shipped: one row is one compiled kernel, and `CONFIGS` yields them all.

A row owns its names: symbol, cubin file, table row and log text derive from it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby

from aot import BuildError, chips

ARCHS = (89, 90)
ELEMENT_BYTES = {"f16": 2, "bf16": 2, "f32": 4}
# (x, weight, result): 16-bit x with its own dtype as weight, or float32 x rounded in the kernel to the weight's.
DTYPES = tuple(
    (x, weight, out) for weight in ("f16", "bf16") for x in (weight, "f32") for out in (weight, "f32")
)  # fmt: skip


CHIPS = chips.LIMITS  # by arch


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
    warps: int  # of a CTA, those that load among them
    stages: int
    epilogue_parts: int = 1  # 2 where the epilogue of a whole tile would spill
    group_m: int = 8  # tiles_m that share a pass over the weight: x and weight rows in flight stay well inside L2
    kernel: str = "tile"  # aot/kernels.py's lbg_fused; "async" of aot/ada.py; "ring" or "ws" of aot/hopper.py
    x_box: int = 0  # ring: rows of x that are loaded at a time
    warps_m: int = 0  # async: of the warps, how many lie along M
    unit_k: int = 0  # async: how deep the operands are that a warp holds in registers, twice
    out_aligned: bool = True  # relies on stores that are: rows of the result start on 16 bytes, N is a multiple of 8

    @property
    def symbol(self) -> str:
        x = self.x if self.x == self.weight else f"{self.x}as{self.weight}"
        mode = "_acc16" if self.fp16_accumulate else ""
        kind = {"tile": "", "async": "_async", "ring": f"_b{self.x_box}_ring", "ws": "_ws"}[self.kernel]
        kind += "" if self.out_aligned else "_anyout" if self.aligned else "_any"
        return f"lbg_fused_{x}_{self.out}{mode}_{self.tile}_w{self.warps}_s{self.stages}{kind}"

    @property
    def tma(self) -> bool:
        """Whether its operands come through tensor maps, which the launcher makes."""
        return self.kernel in ("ring", "ws")

    @property
    def persistent(self) -> bool:
        """Whether its CTAs walk the tiles."""
        return self.kernel == "ws"

    @property
    def program_warps(self) -> int:
        """Warps that run an instruction of the part that multiplies and stores; ws has that part twice."""
        return {"ring": self.warps - 4, "ws": 4}.get(self.kernel, self.warps)

    @property
    def multiplying_warps(self) -> int:
        return self.program_warps * (2 if self.kernel == "ws" else 1)

    @property
    def tile_products(self) -> int:
        """Multiplications of a K step."""
        return self.tile_m * self.tile_n * self.tile_k

    @property
    def tile(self) -> str:
        return f"{self.tile_m}x{self.tile_n}x{self.tile_k}"

    @property
    def file(self) -> str:
        return f"sm_{self.arch}_{self.symbol}"


@dataclass(frozen=True)
class Tile:
    """A Config but for its class and what it relies on, field by field."""

    tile_m: int
    tile_n: int
    tile_k: int
    warps: int
    stages: int
    epilogue_parts: int = 1
    kernel: str = "tile"
    x_box: int = 0
    warps_m: int = 0
    unit_k: int = 0


def async_(m: int, n: int, k: int, warps_m: int, warps_n: int, stages: int, unit_k: int, parts: int = 1) -> Tile:
    return Tile(m, n, k, warps_m * warps_n, stages, parts, kernel="async", warps_m=warps_m, unit_k=unit_k)


def ring(m: int, n: int, k: int, warps: int, stages: int, x_box: int) -> Tile:
    return Tile(m, n, k, warps, stages, kernel="ring", x_box=x_box)


def ws(m: int, n: int, k: int, stages: int, parts: int) -> Tile:
    return Tile(m, n, k, 12, stages, parts, kernel="ws")


# What is shipped for sm_89, by the dtype of x and the mode, from large M to small: kinds of class x16, x32, acc16
# (whose K step is a multiple of its chunk) and acc16 of a float32 x. Times are medians on one H200 through the
# verification build, N=K=4096, float16 result, the kernel that the row replaced in brackets; large M in ms, small M in
# us by graph replay with a cold L2. What decides is the SASS: issue slots besides the matrix instructions, as a share
# of the cycles that those take on a 4090, and CTAs an SM there.
ADA = {
    "x16": (
        async_(128, 128, 32, 2, 2, 3, 16),  # M=16384: 1.365 [1.491]; slots 1.7 %, 2 CTAs
        async_(128, 64, 64, 2, 2, 4, 32),  # M=256: 31.5 [37]
        async_(64, 32, 128, 2, 2, 4, 64),  # M=64: 15.5 [17.0]
        async_(16, 32, 128, 1, 4, 8, 128),  # M=16: 11.9 [12.7]; M=1: 11.6 [17.2]
    ),
    "x32": (
        async_(128, 256, 32, 2, 4, 4, 16),  # M=16384: 1.902 [1.982]; slots 2.6 %, 4 stages
        # async ones lose: M=256 55 us for 49, M=64 30 for 24, M=16 20 for 16
        Tile(64, 64, 64, 4, 3),
        Tile(64, 32, 128, 4, 3),
        Tile(16, 32, 256, 4, 3),
    ),
    "acc16": (
        # For the 4090, where 128x64 would be held up by L2 (12.9 GB at M=16384, for 8.6): slots 17 %, 3 stages. On a
        # Hopper GPU, whose L2 is faster and whose fp16 accumulation is not, 1.86 [1.56].
        async_(128, 128, 64, 2, 4, 3, 64),
        async_(64, 64, 64, 2, 2, 3, 64),  # M=256: 33.2 [38.5]
        async_(64, 32, 64, 2, 2, 8, 64),
        async_(16, 32, 256, 1, 4, 4, 64),  # M=1: 12.1
    ),
    "acc16, x32": (
        Tile(128, 64, 64, 4, 3),
        # 64x64x64 would take 52 % of the matrix cycles for its other instructions, 64x32x64 75 %
        Tile(16, 64, 64, 4, 3),
    ),
}
# The same where the result's rows are off 16 bytes, so that its stores are single elements. M=4097, N=4095, K=4088, in
# ms: x16 0.53 [1.57 of the generic kernel], acc16 0.57 [2.49].
ADA_ANY_OUT = {
    "x16": (async_(128, 128, 32, 2, 2, 3, 16, 2), Tile(64, 32, 128, 4, 4)),
    "x32": (Tile(128, 128, 32, 4, 3, 4), Tile(64, 32, 128, 4, 3)),
    "acc16": (async_(128, 128, 64, 2, 4, 3, 64, 2), Tile(16, 64, 64, 4, 3)),
    "acc16, x32": (Tile(128, 64, 64, 4, 3), Tile(16, 64, 64, 4, 3)),
}


def hopper(x_bytes: int, out_bytes: int) -> tuple[Tile, ...]:
    """What is shipped for sm_90. Times in us are medians on one H200, float16: those with cuBLAS's bare product in
    brackets of one benchmark run, N=K=4096 (docs/benchmarks); those against the next best kernel of one run of
    tests.bench.fit, M x N x K."""
    parts = out_bytes  # keeps the buffers of a 256-wide tile's result at 16 KB a consumer
    if x_bytes == 4:
        return (
            ws(128, 256, 64, 3, parts),  # M=16384, float32 result: 1158 [862 with the cast]
            ring(64, 128, 64, 8, 6, 64),  # M=256: 28.8 [20.2]
            ring(64, 64, 64, 8, 8, 64),
            ring(64, 32, 128, 8, 5, 16),  # M=64: 19.5 [13.9]; M=16: 19.0 [15.3]
        )
    return (
        # The widest accumulator that two consumers hold, as many stages as fit beside the result's buffers.
        ws(128, 256, 64, 4, parts),  # M=16384: 803 [771], float32 result 824; M=4096: 194 [181]; M=1024: 50.9 [47.0]
        ws(128, 128, 64, 6, out_bytes // 2),  # 3149x2632x344: 24.0 against 28.7; 2074x6304x72: 23.6 against 27.0
        ring(128, 128, 64, 12, 6 if out_bytes == 2 else 5, 128),  # 696x6664x11248: 195 against 236
        ring(64, 128, 64, 8, 8, 64),  # M=256: 15.6 [17.8]; 256x4096x4096: 15.6 against 22.2
        ring(64, 64, 128, 8, 6, 64),  # 1099x224x12096: 22.2 against 26.5
        ring(64, 32, 128, 8, 8, 64),  # M=64: 11.8 [12.0]; 64x4096x4096: 11.7 against 12.2
        ring(64, 128, 64, 8, 8, 16),  # 3x9400x1080: 9.3 against 11.0
        ring(64, 32, 128, 8, 8, 16),  # 16x4096x4096: 11.4 against 14.8; 1x4096x4096: 11.6 against 14.6
    )


# An earlier form of the first took 263 us at 4097x4095x4088, where the aligned 4096x4096x4096 took 205 and cuBLAS's
# product 1361 for the ragged one; the first itself takes 2.6 % longer than its aligned twin at M=16384, N=K=4096.
def hopper_any_out(x_bytes: int, out_bytes: int) -> tuple[Tile, ...]:
    return hopper(x_bytes, out_bytes)[0], ring(64, 64, 64, 8, 8, 64)


# Any strides, any alignment. 4 warps and 2 stages, the conservative choice: its loads are masked single elements.
GENERIC = {False: Tile(64, 64, 32, 4, 2), True: Tile(32, 64, 64, 4, 2)}
# Arches whose matrix units are faster at fp16 accumulation. Elsewhere fp16_accumulate permits what would gain nothing,
# and dispatch takes the kernels that accumulate in float32.
FP16_ACCUMULATE_ARCHS = (89,)


def configs() -> Iterator[Config]:
    for arch in ARCHS:
        for x, weight, out in DTYPES:
            for mode in (False, True) if weight == "f16" and arch in FP16_ACCUMULATE_ARCHS else (False,):
                if arch == 90:
                    widths = ELEMENT_BYTES[x], ELEMENT_BYTES[out]
                    fast, any_out = hopper(*widths), hopper_any_out(*widths)
                else:
                    kind = ("acc16, x32" if x == "f32" else "acc16") if mode else "x32" if x == "f32" else "x16"
                    fast, any_out = ADA[kind], ADA_ANY_OUT[kind]
                promises = [(True, True)] * len(fast) + [(True, False)] * len(any_out) + [(False, False)]
                for tile, (aligned, out_aligned) in zip((*fast, *any_out, GENERIC[mode]), promises):
                    yield Config(arch, x, weight, out, mode, aligned, **asdict(tile), out_aligned=out_aligned)


CONFIGS = tuple(configs())
MOST_IN_REGIME = 4


def class_of(config: Config) -> tuple[int, str, str, str, bool]:
    """What a call fixes, and so what its kernel is chosen among."""
    return config.arch, config.x, config.weight, config.out, config.fp16_accumulate


def regime(config: Config) -> str:
    """The M that a tile is for. A generic kernel is of every regime, its last resort."""
    if not config.aligned:
        return "any M"
    rows = config.x_box or config.tile_m
    size = "few rows" if rows <= 32 else "some rows" if rows == 64 else "many rows"
    return size if config.out_aligned else f"{size}, any result"


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
    """CTAs that one SM of the config's arch holds by each limit, and by all of them (`"all"`)."""
    return chips.ctas_per_sm(CHIPS[config.arch], config.warps, registers, shared_bytes)
