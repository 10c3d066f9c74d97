"""What the tuner compiles and measures: tiles around the shipped families, a kind of class at a time.

One enumerator yields all; what it leaves out it yields too, with the reason. A tile is tried in one class of its kind,
the float16 one: bfloat16 runs the same instructions, and on sm_89 a float32 result hardly differs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields

from aot import BuildError, rules
from aot.chips import LIMITS
from aot.configs import ELEMENT_BYTES, FP16_CHUNK, GENERIC, ROWS, Config, Tile, classes, config_of, kind_of, tile_of

DTypes = tuple[str, str, str, bool]  # (x, weight, result, fp16_accumulate)
INPUTS = 4  # distinct: x, weight, scale, shift
REGISTERS = 255  # most that a thread can have
MOST_ACCUMULATORS = 128  # of them: the rest holds operands, addresses and the epilogue
SYSTEM_SHARED_BYTES = 1024  # of a block, which it does not see
BARRIER_BYTES = 256  # at most, of a ring's mbarriers and of the roles of its warps
MOST_STAGES = 8  # beyond, nothing was ever gained


@dataclass(frozen=True)
class Candidate:
    config: Config
    why: str  # what had it tried


@dataclass(frozen=True)
class Excluded:
    name: str
    why: str


def representative(arch: int) -> dict[str, DTypes]:
    """By kind of class, the one that its candidates are compiled and measured in."""
    found: dict[str, DTypes] = {}
    for dtypes in classes(arch):
        x, weight, out, mode = dtypes
        if weight == "f16":
            found.setdefault(kind_of(arch, x, out, mode), dtypes)
    return found


def candidates(arch: int, kind: str, promise: str) -> Iterator[Candidate | Excluded]:
    """The shipped tiles, then others of their families, then plain Triton tiles of 4 warps and 2 stages.

    The last are what the user's rules start from: follow_ups() names the next to compile once their registers are
    known. Two tiles of one symbol cannot be told apart by a dispatch that goes by name: the first is tried.
    """
    dtypes = representative(arch)[kind]
    seen: dict[str, Tile] = {}
    for tile, why in _tiles(arch, kind, dtypes, promise):
        name = f"{kind}, {promise}: {describe(tile)}"
        config = config_of(arch, dtypes, tile, promise)
        if reason := why_not(config):
            yield Excluded(name, reason)
        elif config.symbol in seen:
            if seen[config.symbol] != tile:
                yield Excluded(name, f"another tile is called {config.symbol} too")
        else:
            seen[config.symbol] = tile
            yield Candidate(config, why)


def conservative(arch: int, kind: str) -> Config:
    """The row that closes the kind's classes, which all others are held against."""
    dtypes = representative(arch)[kind]
    return config_of(arch, dtypes, GENERIC[dtypes[3]], "any")


def follow_ups(config: Config, facts: rules.Facts) -> Iterator[Candidate]:
    """What the user's rules have tried next of a plain tile, compiled with 4 warps and 2 stages."""
    for trial in rules.trials(facts):
        if (trial.warps, trial.stages) != (config.warps, config.stages):
            fields_of = asdict(config) | {"warps": trial.warps, "stages": trial.stages}
            yield Candidate(Config(**fields_of), trial.why)


def tile_from(config: Config) -> Tile:
    """The tile of a config, which all classes of its kind share."""
    return Tile(**{field.name: getattr(config, field.name) for field in fields(Tile)})


def describe(tile: Tile) -> str:
    ctas = f", {tile.cluster} CTAs" if tile.cluster > 1 else ""
    tiles = f"{tile.tile_m}x{tile.tile_n}x{tile.tile_k} {tile.kernel}"
    stages = f"{tile.stages} stages" + (f", {tile.x_stages} of x" if tile.x_stages else "")
    return f"{tiles}, {tile.warps} warps, {stages}{ctas}"


def _tiles(arch: int, kind: str, dtypes: DTypes, promise: str) -> Iterator[tuple[Tile, str]]:
    for row in ROWS[arch][kind][promise]:
        yield tile_of(row), "shipped"
    few = promise == "any_out"  # the last resort of an aligned call, and no other's: the main shapes are enough
    if arch == 90:
        yield from ((tile, "ws") for tile in _persistent("ws", WS_FEW if few else WS_SHAPES, dtypes))
        yield from ((tile, "ws, two CTAs a tile") for tile in _persistent("ws", PAIR_SHAPES, dtypes, 2))
        pingpong = () if dtypes[0] == "f32" else PINGPONG_SHAPES
        yield from ((tile, "ping-pong") for tile in _persistent("pingpong", pingpong, dtypes))
        yield from ((tile, "ring") for tile in _ring(dtypes, few))
    else:
        yield from ((tile, "async") for tile in _async(arch, dtypes, few))
    yield from ((tile, "plain, for the user's rules") for tile in _plain(dtypes, few))


# ---- sm_89: aot/ada.py

# (tile_m, tile_n): K steps. Few rows wait for the weight: a deep step has more of it on its way.
ASYNC_SHAPES = {
    (256, 128): (32,), (128, 256): (32,), (128, 128): (32, 64), (128, 64): (32, 64), (64, 128): (32, 64),
    (64, 64): (64, 128), (64, 32): (64, 128), (32, 64): (64, 128), (32, 32): (128,), (16, 128): (64,),
    (16, 64): (64, 128), (16, 32): (128, 256),
}  # fmt: skip
# Of a float32 x, which takes twice the room.
ASYNC_WIDE_SHAPES = {
    (128, 256): (32,), (128, 128): (32,), (128, 64): (32,), (64, 128): (32,), (64, 64): (32, 64), (64, 32): (32, 64),
    (32, 64): (64,), (32, 32): (64, 128), (16, 128): (64,), (16, 64): (64, 128), (16, 32): (128, 256),
}  # fmt: skip
ASYNC_FEW = ((128, 256), (128, 128), (128, 64), (64, 64), (64, 32))


def _async(arch: int, dtypes: DTypes, few: bool) -> Iterator[Tile]:
    """4 warps with two CTAs an SM where that leaves three stages, and 8 warps with one for the large tiles."""
    x, _, _, fp16_accumulate = dtypes
    wide = x == "f32"
    for (m, n), steps in (ASYNC_WIDE_SHAPES if wide else ASYNC_SHAPES).items():
        if few and (m, n) not in ASYNC_FEW:
            continue
        large = m * n > 128 * 128
        # A step is whole chunks of fp16_accumulate, but for a float32 x and a large tile, which have no room for that.
        for k in sorted({max(k, FP16_CHUNK) for k in steps} if fp16_accumulate and not wide and not large else steps):
            # A float32 x leaves room for one CTA of 128x128 alone, where 128x256 is ahead at all large shapes.
            for warps in (4,) if m * n < 128 * 128 else (8,) if large or wide else (4, 8):
                for ctas in (2, 1) if warps == 4 else (1,):
                    stages = min(MOST_STAGES, _async_stages(arch, x, m, n, k, ctas))
                    if stages >= 3:  # two of two CTAs leave the loads' latency in sight (docs/audit.md)
                        yield _async_tile(m, n, k, warps, stages, dtypes, few)
                        break


def _async_stages(arch: int, x: str, m: int, n: int, k: int, ctas: int) -> int:
    """As many as shared memory holds for that many CTAs an SM."""
    chip = LIMITS[arch]
    room = min(chip.shared_block_bytes, chip.shared_bytes // ctas - SYSTEM_SHARED_BYTES)
    return room // ((m * ELEMENT_BYTES[x] + n * 2) * k)


def _async_tile(m: int, n: int, k: int, warps: int, stages: int, dtypes: DTypes, few: bool) -> Tile:
    x, _, out, _ = dtypes
    warps_m = 1 if m == 16 else warps // 2 if m > n else 2
    if x == "f32" and m >= 128:
        warps_m = 4  # each warp rounds the rows that it multiplies: the fewer beside each other the better
    # As deep as two sets of operands fit beside the accumulators.
    operands = m // warps_m + n // (warps // warps_m)
    unit_k = max(u for u in (16, 32, 64, 128, 256) if u == 16 or (u <= k and _held(m, n, warps, operands, u) <= 200))
    parts = ELEMENT_BYTES[out] if few and m * n // (warps * 32) >= MOST_ACCUMULATORS else 1
    return Tile(m, n, k, warps, stages, parts, kernel="async", warps_m=warps_m, unit_k=unit_k)


def _held(m: int, n: int, warps: int, operands: int, unit_k: int) -> int:
    """Registers of a thread: its accumulators, and operands twice."""
    return m * n // (warps * 32) + 2 * operands * unit_k // 64


# ---- sm_90: aot/hopper.py

RING_SHAPES = (
    (64, 32, 64), (64, 32, 128), (64, 32, 256), (64, 64, 64), (64, 64, 128), (64, 128, 64), (64, 128, 128),
    (64, 256, 64), (128, 64, 64), (128, 128, 64), (128, 256, 64)
)  # fmt: skip
RING_FEW = ((64, 32, 128), (64, 64, 64), (64, 64, 128), (64, 128, 64), (128, 128, 64))
DEEP_K = 128  # K steps from which a float32 x gains by barriers of its own (aot/hopper.py's Ring)
# Some that were ahead at a shape or two are no candidates: dispatch foresees times within some percent, and with them
# among its choices took 0.03 % less time in the mean (python -m tests.bench.fit --validate tells of such kernels). They
# are tiles of 256x128 and 256x64, with one CTA or two, a float32 x's ping-pong kernel, and its rings of deep steps that
# have no barriers of x's own. And on an H100 a tile of 64x256 by turns was 5 % or more behind the best at every shape.
WS_SHAPES = ((128, 256, 64), (128, 128, 64), (128, 64, 64))
WS_FEW = WS_SHAPES[:2]
PAIR_SHAPES = ((256, 256, 64),)  # of two CTAs
PINGPONG_SHAPES = ((128, 128, 64),)  # of a 16-bit x
WS_BUFFER_BYTES = 8192  # of a part of a consumer's result, on its way out: it has OUT_BUFFERS
OUT_BUFFERS = 2  # aot/hopper.py's


def _ring(dtypes: DTypes, few: bool) -> Iterator[Tile]:
    """As many stages as fit for one CTA an SM; of the small tiles, for two CTAs besides. Of deep steps a float32 x has
    barriers of its own."""
    x, _, out, _ = dtypes
    chip = LIMITS[90]
    for m, n, k in RING_FEW if few else RING_SHAPES:
        each = (m * ELEMENT_BYTES[x] + n * 2) * k
        result = m * n * ELEMENT_BYTES[out]  # goes through shared memory to another layout
        if x == "f32" and k == DEEP_K:
            room = chip.shared_block_bytes - result - BARRIER_BYTES
            x_stages, stages = _apart(room, m * ELEMENT_BYTES[x] * k, n * 2 * k)
            yield Tile(m, n, k, m // 16 + 4, min(MOST_STAGES, stages), kernel="ring", x_stages=x_stages)
            continue
        for ctas in (1, 2) if (m, n) in ((64, 32), (64, 64)) and k == 64 else (1,):
            room = min(chip.shared_block_bytes, chip.shared_bytes // ctas - SYSTEM_SHARED_BYTES)
            stages = min(MOST_STAGES, (room - result - BARRIER_BYTES) // each)
            yield Tile(m, n, k, m // 16 + 4, stages, kernel="ring")


def _apart(room: int, x_bytes: int, weight_bytes: int) -> tuple[int, int]:
    """Stages of x and of weight in so much shared memory: of x, which is in L2, as many as of the weight at most."""
    stages = {of_x: (room - of_x * x_bytes) // weight_bytes for of_x in range(room // x_bytes + 1)}
    most = max(of_x for of_x, of_weight in stages.items() if of_x <= of_weight)
    return most, stages[most]


def _persistent(
    kernel: str, shapes: Sequence[tuple[int, int, int]], dtypes: DTypes, cluster: int = 1
) -> Iterator[Tile]:
    """As many stages as fit beside the buffers of the result. Two consumers share a CTA's rows of a tile, or have a
    tile each."""
    x, _, out, _ = dtypes
    for m, n, k in shapes:
        result = m // cluster * n * ELEMENT_BYTES[out] * (2 if kernel == "pingpong" else 1)  # both consumers'
        parts = max(OUT_BUFFERS, result // (2 * WS_BUFFER_BYTES))
        each = (m // cluster * ELEMENT_BYTES[x] + n * 2) * k
        room = LIMITS[90].shared_block_bytes - BARRIER_BYTES - OUT_BUFFERS * result // parts
        yield Tile(m, n, k, 12, min(MOST_STAGES, room // each), parts, kernel=kernel, cluster=cluster)


# ---- both: aot/kernels.py, with the user's warps and stages

PLAIN_SHAPES = ((128, 128, 32), (128, 64, 64), (64, 64, 64), (64, 32, 128), (16, 64, 64))
PLAIN_FEW = ((128, 128, 32), (64, 32, 128))


def _plain(dtypes: DTypes, few: bool) -> Iterator[Tile]:
    for m, n, k in PLAIN_FEW if few else PLAIN_SHAPES:
        # The epilogue of the largest tile at once would spill.
        parts = 4 if m * n >= 128 * 128 else 1
        yield Tile(m, n, FP16_CHUNK if dtypes[3] else k, *rules.CONSERVATIVE, parts)


# ---- what no compiler need be asked


def why_not(config: Config) -> str:
    """Why a config cannot be a kernel; empty if nothing speaks against it before it is compiled."""
    try:
        rules.check_tile(config)
    except BuildError as error:
        return str(error)
    least = 1 if config.kernel == "tile" else 2
    if config.stages < least:
        return f"shared memory holds {max(0, config.stages)} stages; a {config.kernel} kernel needs {least}"
    if config.accumulators > MOST_ACCUMULATORS:
        return (
            f"{config.accumulators} of a thread's {REGISTERS} registers would be accumulators; the most is "
            f"{MOST_ACCUMULATORS}"
        )
    if config.fp16_accumulate and (
        config.tile_k != FP16_CHUNK
        if config.kernel == "tile"
        else config.tile_k % FP16_CHUNK and FP16_CHUNK % config.tile_k
    ):
        return f"fp16_accumulate sums chunks of {FP16_CHUNK}: K steps of {config.tile_k} do not make one"
    if config.kernel == "async":
        sizes = config.tile_m, config.tile_n, config.tile_k
        if config.stages > (most := _async_stages(config.arch, config.x, *sizes, 1)):
            return f"shared memory holds {most} stages, not {config.stages}"
        warps_n = config.warps // config.warps_m
        if config.tile_m < 16 * config.warps_m or config.tile_n < 8 * warps_n:
            return f"{config.warps_m}x{warps_n} warps take 16 rows and 8 columns each, which the tile has not"
    return ""
