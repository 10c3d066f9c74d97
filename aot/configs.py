"""Which kernels are shipped: one row is one compiled kernel, and `CONFIGS` yields them all.

The tiles stand in evidence_sm_XY.json, each with the measurements that earned it; `python3 build.py tune` writes them.
A row owns its names: symbol, cubin file, table row and log text derive from it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby

from aot import BuildError, chips, evidence, rules
from aot.evidence import ARCHS

ELEMENT_BYTES = {"f16": 2, "bf16": 2, "f32": 4}
NAMES = {"f16": "float16", "bf16": "bfloat16", "f32": "float32"}  # PyTorch's
# (x, weight, result): 16-bit x with its own dtype as weight, or float32 x rounded in the kernel to the weight's.
DTYPES = tuple(
    (x, weight, out) for weight in ("f16", "bf16") for x in (weight, "f32") for out in (weight, "f32")
)  # fmt: skip

FP16_CHUNK = 64  # products that fp16_accumulate sums in float16; aot/kernels.py has the same

PERSISTENT = ("ws", "pingpong", "shift_ws")  # kernels whose CTAs walk the tiles
BY_TENSOR_MAPS = ("ring", "ws", "pingpong")  # aot/hopper.py's
SHIFTING = ("shift", "shift_ws")  # aot/unaligned.py's


@dataclass(frozen=True)
class Config:
    arch: int
    x: str
    weight: str
    out: str
    fp16_accumulate: bool
    aligned: bool  # relies on loads that are aligned: rows of x and weight start on 16 bytes, and whole_k
    tile_m: int
    tile_n: int
    tile_k: int
    warps: int  # of a CTA, those that load among them
    stages: int
    epilogue_parts: int = 1  # 2 where the epilogue of a whole tile would spill
    # tile rows that share a pass over the weight, so that what is in flight stays in L2; hopper.py has its own
    group_m: int = rules.GROUP_M
    # aot/kernels.py's lbg_fused; "async" of ada.py; "ring", "ws", "pingpong" of hopper.py; "shift", "shift_ws" of
    # unaligned.py
    kernel: str = "tile"
    warps_m: int = 0  # async: of the warps, how many lie along M
    unit_k: int = 0  # async: how deep the operands are that a warp holds in registers, twice
    cluster: int = 1  # ws: CTAs that share a tile, half of its rows each
    x_stages: int = 0  # ring: of a float32 x that has barriers of its own; else 0, and x has as many as weight
    out_aligned: bool = True  # relies on stores that are: rows of the result start on 16 bytes, N is a multiple of 8
    any_rows: bool = False  # relies on inner strides of 1 and on no alignment: rows of x and weight may start anywhere

    @property
    def symbol(self) -> str:
        x = self.x if self.x == self.weight else f"{self.x}as{self.weight}"
        mode = "_acc16" if self.fp16_accumulate else ""
        kind = {"tile": "", "pingpong": "_pp"}.get(self.kernel, f"_{self.kernel}")
        kind = f"_c{self.cluster}{kind}" if self.cluster > 1 else kind
        kind += "" if self.out_aligned else "_anyout" if self.aligned else "_anyrows" if self.any_rows else "_any"
        stages = f"{self.stages}x{self.x_stages}" if self.x_stages else f"{self.stages}"
        return f"lbg_fused_{x}_{self.out}{mode}_{self.tile}_w{self.warps}_s{stages}{kind}"

    @property
    def row_major(self) -> bool:
        """Whether it relies on inner strides of 1."""
        return self.aligned or self.any_rows

    @property
    def whole_k(self) -> bool:
        """Whether it relies on a K that is a multiple of 8: a tensor map ends anywhere."""
        return self.aligned and not self.tma

    @property
    def loads(self) -> str:
        """How aot/kernels.py's lbg_fused loads x and weight."""
        return "aligned" if self.aligned else "shifted" if self.any_rows else "masked"

    @property
    def tma(self) -> bool:
        """Whether its operands come through tensor maps, which the launcher makes."""
        return self.kernel in BY_TENSOR_MAPS

    @property
    def has_roles(self) -> bool:
        """Whether some of its warps load and others multiply."""
        return self.tma or self.kernel in SHIFTING

    @property
    def persistent(self) -> bool:
        """Whether its CTAs walk the tiles."""
        return self.kernel in PERSISTENT

    @property
    def pieces(self) -> int:
        """Most that it cuts a tile of a last wave into: no narrower than a part of the result.

        On an H100, from float16 to float16, the tile of 128x256 takes 1.25 times as long as cuBLAS's bare product at
        4096x4104x4096 with whole tiles, 1.15 with halves and 1.12 with quarters. To any address, code for quarters has
        spilled. Times of builds that had no pieces, halves alone or quarters for all; no command here makes them again.
        """
        if self.kernel != "ws":
            return 1
        return min(4 if self.out_aligned else 2, self.epilogue_parts)

    @property
    def program_warps(self) -> int:
        """Warps that run an instruction of the part that multiplies and stores."""
        if self.persistent or self.kernel in SHIFTING:
            return 4
        return self.warps - 4 * (self.kernel == "ring")

    @property
    def consumers(self) -> int:
        """Groups of such warps, each with a program of its own."""
        return 2 if self.persistent else 1

    @property
    def cta_rows(self) -> int:
        """Of a tile, what one CTA computes."""
        return self.tile_m // self.cluster

    @property
    def multiplied_rows(self) -> int:
        """The same, with what is multiplied besides and not stored: wgmma takes 64 rows."""
        return max(self.cta_rows, 64) if self.kernel == "shift" else self.cta_rows

    @property
    def x_boxes(self) -> int:
        """ws: loads of a step's x. In a cluster each consumer has its own, half of whose rows are each CTA's."""
        return self.consumers if self.cluster > 1 else 1

    @property
    def multiplying_warps(self) -> int:
        """Warps of a CTA that share a tile."""
        return self.program_warps * (1 if self.kernel == "pingpong" else self.consumers)

    @property
    def consumer_rows(self) -> int:
        """Of a tile, what one consumer holds."""
        return self.cta_rows * self.program_warps // self.multiplying_warps

    @property
    def accumulators(self) -> int:
        """Of a thread's registers, those that hold its float32 sums."""
        return self.cta_rows * self.tile_n // (self.multiplying_warps * 32)

    @property
    def halves(self) -> bool:
        """async: whether fp16_accumulate finds no room for two chunks beside so many sums (aot/ada.py)."""
        return self.kernel == "async" and self.fp16_accumulate and self.accumulators > 64

    @property
    def tiles_at_once(self) -> int:
        """Tiles that a CTA's consumers hold, as far as they are the CTA's; of one of fewer rows than are multiplied, as
        many as would fit."""
        return max(self.consumers * self.consumer_rows, self.multiplied_rows) // self.cta_rows

    @property
    def tile_products(self) -> int:
        """Multiplications of a CTA's K step."""
        return self.multiplied_rows * self.tile_n * self.tile_k

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
    warps_m: int = 0
    unit_k: int = 0
    cluster: int = 1
    x_stages: int = 0


# Any strides, any alignment. 4 warps and 2 stages, the conservative choice: its loads are masked single elements. By
# fp16_accumulate. It closes every class and is no row of the evidence: the tuner holds all others against it.
GENERIC = {False: Tile(64, 64, 32, 4, 2), True: Tile(32, 64, 64, 4, 2)}
# Rows of x and weight that start anywhere, with inner strides of 1 (aot/kernels.py's shifted loads): by arch, by x's
# dtype being float32, and by fp16_accumulate, whose K steps are its chunks. 2 stages: a step's operands are in
# registers while the one's before are multiplied. sm_90 has aot/unaligned.py's but for few rows: beside those, calls of
# a 16-bit x took no less time with 256x128 and 128x128, the best of 18 others, at 480 random shapes; with a float32 x
# they take 0.46 to 0.85 of the time that the best of 14 others did at N=4096, K=4095. No command here makes those
# comparisons again.
ANY_ROWS = {
    (89, False, False): (
        Tile(128, 128, 64, 8, 2, 4), Tile(64, 64, 64, 4, 2), Tile(32, 64, 64, 4, 2), Tile(16, 32, 256, 4, 2)
    ),
    (89, True, False): (
        Tile(128, 128, 32, 8, 2, 4), Tile(64, 64, 32, 4, 2), Tile(32, 64, 64, 4, 2), Tile(16, 32, 128, 4, 2)
    ),
    (89, False, True): (Tile(64, 64, 64, 4, 2), Tile(32, 64, 64, 4, 2), Tile(16, 32, 64, 4, 2)),
    (89, True, True): (Tile(64, 64, 64, 8, 2), Tile(32, 64, 64, 4, 2), Tile(16, 32, 64, 4, 2)),
    (90, False, False): (
        Tile(128, 256, 64, 12, 4, 4, kernel="shift_ws"), Tile(128, 128, 64, 12, 6, 2, kernel="shift_ws"),
        Tile(64, 64, 64, 20, 4, kernel="shift"), Tile(64, 32, 64, 20, 8, kernel="shift"), Tile(16, 32, 256, 4, 2)
    ),
    (90, True, False): (
        Tile(128, 256, 64, 12, 3, 8, kernel="shift_ws"), Tile(128, 128, 64, 12, 4, 2, kernel="shift_ws"),
        Tile(64, 64, 64, 20, 4, kernel="shift"), Tile(64, 32, 64, 20, 8, kernel="shift"),
        Tile(16, 32, 64, 20, 8, kernel="shift"), Tile(16, 32, 128, 4, 2)
    ),
}  # fmt: skip
# Arches whose matrix units are faster at fp16 accumulation. Elsewhere fp16_accumulate permits what would gain nothing,
# and dispatch takes the kernels that accumulate in float32.
FP16_ACCUMULATE_ARCHS = (89,)


def kind_of(arch: int, x: str, out: str, fp16_accumulate: bool) -> str:
    """The kind of class, whose classes share their tiles: bfloat16 runs float16's instructions with another type. On
    sm_90 a tile's result has a buffer in shared memory, so that there its width counts too."""
    names = ["acc16"] if fp16_accumulate else []
    names += ["x32"] if x == "f32" else [] if fp16_accumulate else ["x16"]
    return ", ".join(names + (["out32"] if arch == 90 and out == "f32" else []))


def classes(arch: int) -> Iterator[tuple[str, str, str, bool]]:
    """(x, weight, result, fp16_accumulate) of every class that the arch has kernels of its own for."""
    for x, weight, out in DTYPES:
        for mode in (False, True) if weight == "f16" and arch in FP16_ACCUMULATE_ARCHS else (False,):
            yield x, weight, out, mode


def config_of(arch: int, dtypes: tuple[str, str, str, bool], tile: Tile, promise: str) -> Config:
    """The row of a class; `promise` is what it relies on: "rows", "any_out", "any_rows" or "any"."""
    aligned, out_aligned = promise in ("rows", "any_out"), promise == "rows"
    return Config(arch, *dtypes, aligned, **asdict(tile), out_aligned=out_aligned, any_rows=promise == "any_rows")


def shipped(arch: int, rows: evidence.Rows) -> Iterator[Config]:
    """Class by class: the kind's tiles from large M to small, those that store anywhere, those of rows that start
    anywhere, the conservative one."""
    for dtypes in classes(arch):
        x, _, out, mode = dtypes
        kind = kind_of(arch, x, out, mode)
        if kind not in rows:
            raise BuildError(f"evidence_sm_{arch}.json has no kind {kind!r}; it has {', '.join(rows)}")
        for promise in evidence.PROMISES:
            for row in rows[kind][promise]:
                yield config_of(arch, dtypes, tile_of(row), promise)
        for tile in ANY_ROWS[arch, x == "f32", mode]:
            if tile.kernel in PERSISTENT:  # a part of its result goes through a buffer of one size
                tile = replace(tile, epilogue_parts=tile.epilogue_parts * ELEMENT_BYTES[out] // 2)
            yield config_of(arch, dtypes, tile, "any_rows")
        yield config_of(arch, dtypes, GENERIC[mode], "any")


def tile_of(row: evidence.Row) -> Tile:
    try:
        return Tile(**row.tile)
    except TypeError as error:
        raise BuildError(f"evidence: {row.tile} is no tile: {error}") from None


def check_evidence(arch: int, rows: evidence.Rows) -> list[str]:
    """Raises BuildError for a row outside the user's sets that nothing has earned; returns what is still to measure."""
    found = []
    for kind, promises in rows.items():
        for promise, some in promises.items():
            for row in some:
                tile = tile_of(row)
                name = f"sm_{arch}, {kind}, {promise}: {tile.tile_m}x{tile.tile_n}x{tile.tile_k} {tile.kernel}"
                found.append(rules.check_earned(name, tile, row.evidence, row.pending))
    return list(filter(None, found))


ROWS = {arch: evidence.rows(evidence.read(arch)) for arch in ARCHS}
CONFIGS = tuple(config for arch in ARCHS for config in shipped(arch, ROWS[arch]))
MOST_IN_REGIME = 4


def class_of(config: Config) -> tuple[int, str, str, str, bool]:
    """What a call fixes, and so what its kernel is chosen among."""
    return config.arch, config.x, config.weight, config.out, config.fp16_accumulate


def regime(config: Config) -> str:
    """The M that a tile is for. A generic kernel is of every regime, its last resort.

    A tile's rows tell; of kernels with tensor maps, whose wide tiles are for many rows, too, its area: the larger it
    is, the more rows it takes until all SMs have one.
    """
    if not config.row_major:
        return "any M"
    rows = math.isqrt(config.tile_m * config.tile_n) if config.tma else config.tile_m
    size = "few rows" if rows < 64 else "some rows" if rows == 64 else "many rows" if rows <= 128 else "most rows"
    return size if config.out_aligned else f"{size}, any {'result' if config.aligned else 'rows'}"


def check_classes(configs: Sequence[Config]) -> None:
    """Raises BuildError unless dispatch finds in each class what it relies on."""
    found: list[tuple[int, str, str, str, bool]] = []
    for key, group in groupby(configs, class_of):
        rows, label = list(group), f"sm_{key[0]} {'-'.join(key[1:4])}{' fp16_accumulate' if key[4] else ''}"
        if key in found:
            raise BuildError(f"{label}: its configs do not stand together in CONFIGS")
        found.append(key)
        last = rows[-1]
        if last.row_major or last.out_aligned or (last.warps, last.stages) != (4, 2):
            raise BuildError(f"{label}: the last config, {last.symbol}, is not the conservative one: any alignment, 4 "
                             "warps, 2 stages")  # fmt: skip
        for row in rows:
            if row.x_stages and (row.kernel != "ring" or row.x == row.weight):
                raise BuildError(f"{label}: {row.symbol}: stages of x are its own in a ring with a float32 x alone")
        for name, count in Counter(map(regime, rows[:-1])).items():
            if count + 1 > MOST_IN_REGIME or name == "any M":
                raise BuildError(f"{label}: {count + 1} configs for {name}; the most is {MOST_IN_REGIME}, the "
                                 "conservative one among them")  # fmt: skip


def ctas_per_sm(config: Config, registers: int, shared_bytes: int) -> dict[str, int]:
    """CTAs that one SM of the config's arch holds by each limit, and by all of them (`"all"`)."""
    return chips.ctas_per_sm(chips.LIMITS[config.arch], config.warps, registers, shared_bytes)
