"""One config to one cubin and its report, with no GPU; every rule that can stop a build is checked here.

The steps: triton compiles the kernel to PTX for the config's arch, ptxas assembles it (for another arch in a
verification build), and the SASS is read back for what the report states.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from aot import BuildError, sass
from aot.chips import LIMITS, REFERENCE
from aot.configs import BY_TENSOR_MAPS, ELEMENT_BYTES, FP16_CHUNK, SHIFTING, Config, ctas_per_sm
from aot.sass import Instruction

os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # line info holds the folder that was built in

# What ptxas 12.9 reads. Triton would write newer PTX for sm_90, which only a 13.x ptxas assembles, and what that writes
# needs a CUDA 13 driver.
PTX_VERSION = 88

# Of the cycles that a main loop's matrix instructions take, on sm_89: issue slots of all its other instructions.
MOST_OTHER_SLOTS = 0.5

# Beside kernels.py, whose functions they all share.
SOURCES: dict[str, tuple[str, ...]] = {
    "tile": (),
    "async": ("ada.py",),
    **dict.fromkeys(BY_TENSOR_MAPS, ("hopper.py",)),
    **dict.fromkeys(SHIFTING, ("hopper.py", "unaligned.py")),
}

TRITON_TYPES = {"f16": "fp16", "bf16": "bf16", "f32": "fp32"}
POINTERS = ("x_ptr", "weight_ptr", "scale_ptr", "shift_ptr", "out_ptr")
SIZES = ("M", "N", "K")
STRIDES = (
    "stride_xm", "stride_xk", "stride_wn", "stride_wk", "stride_scale", "stride_shift", "stride_om", "stride_on"
)  # fmt: skip
# Strides that are 1 for every kernel but the generic one; hints() has the rest of what they rely on.
UNIT_STRIDES = ("stride_xk", "stride_wk", "stride_scale", "stride_shift", "stride_on")


@dataclass(frozen=True)
class Report:
    """What one cubin is, as printed and as written beside the wheel. Bytes and counts are per kernel or per thread."""

    symbol: str
    arch: int  # the cubin's
    compiled_arch: int  # the PTX's
    tile: str
    warps: int
    stages: int
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
    ctas_per_sm: dict[str, int]
    stores_per_output: float  # global stores, over the output elements of the tiles that a CTA holds: 1 is the rule
    stores_in_loop: int
    store_width_bytes: int  # of the narrowest store instruction, a thread
    loop_instructions: int  # in the main loop, a warp
    loop_mma: int  # matrix instructions among them
    loop_mix: dict[str, int]  # the same by kind (aot/sass.py)
    loop_steps: float  # K steps of a tile that a pass of it multiplies
    loop_shared_bytes: int  # that a pass of it moves to or from shared memory, a CTA; the TMA unit's apart
    loader_mix: dict[str, int]  # in the loops of warps that only load, a warp of each
    other_instructions: int  # outside of all these, a warp: before the main loop and after it
    mma: int  # in the whole kernel
    size_bytes: int
    seconds: float


@dataclass(frozen=True)
class Artifact:
    config: Config
    arguments: tuple[str, ...]  # the cubin's runtime parameters, in order
    boxes: dict[str, tuple[int, int, int]]  # of the arguments that are tensor maps: rows, columns, CUtensorMapSwizzle
    cubin: Path
    report: Report


def tool(name: str) -> str:
    """A program of the CUDA toolkit that triton's package carries."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not os.access(path, os.X_OK):
        raise BuildError(f"missing tool: {name} is not in the installed triton package ({path})")
    return str(path)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = "; ".join((done.stderr or done.stdout).strip().splitlines())
        raise BuildError(f"{Path(command[0]).name} failed ({done.returncode}): {said}")
    return done.stdout + done.stderr


def signature(config: Config) -> tuple[dict[str, str], dict[str, object], dict[tuple[int, ...], list[list[object]]]]:
    """(types, constants, hints) for triton: an aligned kernel's promises become constants and divisibility."""
    if config.tma:
        return tma_signature(config)
    size_type = "i32" if config.row_major else "i64"
    pointees = (config.x, config.weight, "f32", "f32", config.out)
    types = {name: "*" + TRITON_TYPES[dtype] for name, dtype in zip(POINTERS, pointees)}
    types |= dict.fromkeys(SIZES, size_type) | dict.fromkeys(STRIDES, "i64")
    constants: dict[str, object] = dict.fromkeys(UNIT_STRIDES, 1) if config.row_major else {}
    constants |= {
        "TILE_M": config.tile_m,
        "TILE_N": config.tile_n,
        "TILE_K": config.tile_k,
        **({} if config.persistent else {"GROUP_M": config.group_m}),
        "SYMBOL": config.symbol,
    }
    if config.kernel == "shift":
        constants |= {"STAGES": config.stages}
    elif config.kernel == "shift_ws":
        constants |= {"STAGES": config.stages, "EPILOGUE_PARTS": config.epilogue_parts}
    else:
        constants |= {"EPILOGUE_PARTS": config.epilogue_parts, "FP16_ACCUMULATE": config.fp16_accumulate}
        constants |= async_constants(config) if config.kernel == "async" else {"LOADS": config.loads}
    names = [*types, *(name for name in constants if name not in types)]
    types |= dict.fromkeys(constants, "constexpr")
    return types, constants, hints(config, names)


def async_constants(config: Config) -> dict[str, Any]:
    """What lbg_fused_async is told besides of how to share the work out."""
    warps_n = config.warps // config.warps_m
    # A thread stores as many pairs of elements at once as make 16 bytes, if its row of the tile has them.
    columns = config.tile_n // (2 if config.halves else 1)
    pairs = min(8 // ELEMENT_BYTES[config.out], columns // (8 * warps_n)) if config.out_aligned else 1
    chunk_steps = max(1, FP16_CHUNK // config.tile_k) if config.fp16_accumulate else 1
    return {
        "WARPS_M": config.warps_m,
        "WARPS_N": warps_n,
        "STAGES": config.stages,
        "UNROLL": math.lcm(config.stages, chunk_steps),
        "UNIT_K": config.unit_k,
        "PAIRS": max(1, pairs),
        "RAGGED": not config.out_aligned,
        "HALVES": config.halves,
    }


def hints(config: Config, names: list[str]) -> dict[tuple[int, ...], list[list[object]]]:
    """What the arguments among `names` are multiples of (pointers: in bytes). Rows start on 16 bytes, so that loads and
    stores are as wide; csrc/dispatch.cpp's broken() is the other side of this promise."""
    divisible: dict[str, int] = {}
    if config.aligned:
        divisible |= dict.fromkeys(("x_ptr", "weight_ptr", "scale_ptr", "shift_ptr"), 16)
        divisible |= {"stride_xm": 16 // ELEMENT_BYTES[config.x], "stride_wn": 8}
        divisible |= {"K": 8} if config.whole_k else {}
    if config.out_aligned:
        divisible |= {"out_ptr": 16, "N": 8, "stride_om": 16 // ELEMENT_BYTES[config.out]}
    return {(names.index(name),): [["tt.divisibility", unit]] for name, unit in divisible.items() if name in names}


def tma_signature(
    config: Config,
) -> tuple[dict[str, str], dict[str, object], dict[tuple[int, ...], list[list[object]]]]:
    from triton.experimental.gluon import language as gl

    elements = {"f16": gl.float16, "bf16": gl.bfloat16, "f32": gl.float32}

    def tensor_map(dtype: str, rows: int, columns: int, split: bool = False) -> str:
        cga = [] if config.cluster == 1 else [[int(split), 0]]  # a cluster's CTAs have half of the rows each, or all
        layout = gl.NVMMASharedLayout.get_default_for([rows, columns], elements[dtype], cga_layout=cga)
        return f"tensordesc<{TRITON_TYPES[dtype]}[{rows},{columns}],{layout!r}>"

    ws = config.persistent
    out, out_type = "out_ptr", "*" + TRITON_TYPES[config.out]
    if ws:
        out = "out"
        if config.out_aligned:  # a part of a consumer's rows, in each CTA of a cluster
            rows = config.consumer_rows * config.cluster
            out_type = tensor_map(config.out, rows, config.tile_n // config.epilogue_parts, True)
    cuts = config.pieces > 1
    piece = tensor_map(config.weight, config.tile_n // config.pieces, config.tile_k) if cuts else "constexpr"
    x_columns = config.tile_k if ws else 128 // ELEMENT_BYTES[config.x]  # a ring's are as wide as a swizzle
    types = {
        "x": tensor_map(config.x, config.tile_m // config.x_boxes, x_columns, True),
        "weight": tensor_map(config.weight, config.tile_n, config.tile_k if ws else 64),
        **({"weight_piece": piece} if ws else {}),
        "scale_ptr": "*fp32",
        "shift_ptr": "*fp32",
        out: out_type,
        **dict.fromkeys(SIZES, "i32"),
        "stride_om": "i64",
    }
    constants: dict[str, object] = {"weight_piece": None} if ws and not cuts else {}
    if not ws:  # which asks L2 for the weight before it may load it
        types |= {"weight_ptr": "*" + TRITON_TYPES[config.weight], "stride_wn": "i64"}
    constants |= {
        "TILE_M": config.tile_m,
        "TILE_N": config.tile_n,
        "TILE_K": config.tile_k,
        "STAGES": config.stages,
    }
    if ws:
        constants |= {"EPILOGUE_PARTS": config.epilogue_parts}
        constants |= {"OUT_DTYPE": elements[config.out], "OUT_BY_TMA": config.out_aligned}
        constants |= {"IN_TURN": config.kernel == "pingpong", "PIECES": config.pieces}
    else:
        constants |= {"X_STAGES": config.x_stages, "OUT_ALIGNED": config.out_aligned}
    constants |= {"SYMBOL": config.symbol}
    return types | dict.fromkeys(constants, "constexpr"), constants, hints(config, list(types))


@dataclass(frozen=True)
class Compiled:
    """What triton makes of one config."""

    ir: str  # the first stage that shows its loops
    ptx: str
    shared_bytes: int
    boxes: dict[str, tuple[int, int, int]]  # Artifact's


def to_ptx(config: Config) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon import GluonASTSource

    from aot import ada, hopper, kernels, unaligned

    types, constants, hints = signature(config)
    options = {"num_warps": config.program_warps, "enable_fp_fusion": True, "ptx_version": PTX_VERSION}
    options |= {"num_ctas": config.cluster}
    options |= {"maxnreg": hopper.WS_REGISTERS} if config.persistent else {}
    if config.kernel == "tile":
        source = ASTSource(fn=kernels.lbg_fused, signature=types, constexprs=constants, attrs=hints)
        options |= {"num_stages": 1 if config.any_rows else config.stages}  # which looks a step ahead itself
    else:
        in_gluon = {
            "async": ada.lbg_fused_async,
            "ring": hopper.lbg_fused_ring,
            "ws": hopper.lbg_fused_ws,
            "pingpong": hopper.lbg_fused_ws,
            "shift": unaligned.lbg_fused_shift,
            "shift_ws": unaligned.lbg_fused_shift_ws,
        }
        source = GluonASTSource(fn=in_gluon[config.kernel], signature=types, constexprs=constants, attrs=hints)
    with tempfile.TemporaryDirectory() as cache, triton.knobs.cache.scope():
        triton.knobs.cache.dir = cache  # ours is keyed by content and holds the report too
        compiled = triton.compile(source, target=GPUTarget("cuda", config.arch, 32), options=options)
    metadata = compiled.metadata
    for scratch in ("global_scratch_size", "profile_scratch_size"):
        if size := getattr(metadata, scratch):
            raise BuildError(
                f"{config.symbol}: {scratch} is {size}; a launcher passes no scratch memory, so it must be 0"
            )
    if metadata.name != config.symbol:
        raise BuildError(f"{config.symbol}: triton named the kernel {metadata.name}; a launcher would not find it")
    maps = [name for name, kind in types.items() if kind.startswith("tensordesc")]
    boxes = {name: (*meta["block_size"], meta["swizzle"]) for name, meta in zip(maps, metadata.tensordesc_meta or ())}
    ptx = compiled.asm["ptx"]
    if not re.search(rf"\.reqntid {config.warps * 32}\b", ptx):
        raise BuildError(f"{config.symbol}: its CTAs are not of {config.warps} warps, those that load among them")
    ir = compiled.asm["ttir" if config.kernel == "tile" else "ttgir"]
    return Compiled(ir, ptx, metadata.shared, boxes)


def assemble(ptx: str, arch: int, cubin: Path) -> tuple[int, int, int]:
    """Writes the cubin; returns (registers, spill bytes, stack bytes) as ptxas tells them."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        target = f"sm_{arch}a" if f".target sm_{arch}a" in ptx else f"sm_{arch}"  # wgmma is of sm_90a only
        log = _run(tool("ptxas"), "-v", "--regAllocOptLevel=2", f"--gpu-name={target}", str(source), "-o", str(cubin))
    found = [
        re.search(pattern, log)
        for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill stores", r"(\d+) bytes stack")
    ]
    spill_loads = re.search(r"(\d+) bytes spill loads", log)
    if not all(found) or not spill_loads:
        raise BuildError(f"ptxas told no registers or spills: {log.strip()}")
    registers, spill_stores, stack = (int(match[1]) for match in found if match)
    return registers, spill_stores + int(spill_loads[1]), stack


def stored_bytes(config: Config, instructions: list[Instruction], boxes: dict[str, tuple[int, int, int]]) -> int:
    """What a CTA stores of the tiles that it holds at once, if each store instruction runs once."""
    threads = config.program_warps * 32
    by_threads = sum(map(sass.store_bytes, instructions)) * threads
    if not (tma_stores := sum(i.opcode.startswith("UTMASTG") for i in instructions)):
        return by_threads
    rows, columns, _ = boxes["out"]
    # a warp's leader stores one box
    at_once = min(config.tile_n // config.epilogue_parts // columns, config.program_warps)
    return by_threads + tma_stores * at_once * rows * columns * ELEMENT_BYTES[config.out]


def store_width(config: Config, instructions: list[Instruction], boxes: dict[str, tuple[int, int, int]]) -> int:
    """Bytes that the narrowest store instruction writes side by side."""
    if "out" in boxes:
        return boxes["out"][1] * ELEMENT_BYTES[config.out]
    return min(filter(None, map(sass.store_bytes, instructions)), default=0)


@dataclass
class Loop:
    """One of triton's IR."""

    indent: int
    multiplies: bool = False
    around: bool = False  # a loop that multiplies

    @property
    def along_k(self) -> bool:
        return self.multiplies and not self.around

    @property
    def along_parts(self) -> bool:
        """Of a tile's result, by halves: so its stores run twice."""
        return not self.multiplies and not self.around


@dataclass(frozen=True)
class Stores:
    """Store operations of triton's IR, of as many elements each."""

    count: int
    twice: int  # that run twice
    along_k: int  # that run with each step


def stores(ir: str) -> Stores:
    """By the IR's indents: in SASS a wait that was moved out of line looks like a loop around all that it jumps back
    over, and where warps have roles, all that they do lies in the loop that waits for one."""
    open_loops: list[Loop] = []
    around_stores: list[list[Loop]] = []
    for line in ir.splitlines():
        indent = len(line) - len(line.lstrip())
        while open_loops and indent <= open_loops[-1].indent:
            open_loops.pop()
        if "scf.for" in line:
            open_loops.append(Loop(indent))
        elif re.search(r"\b(ttng\.warp_group_dot|tt\.dot) ", line) and open_loops:
            open_loops[-1].multiplies = True
            for loop in open_loops[:-1]:
                loop.around = True
        elif re.search(r"\b(tt\.store|ttng\.async_tma_copy_local_to_global) ", line):
            around_stores.append(list(open_loops))
    return Stores(
        count=len(around_stores),
        twice=sum(bool(loops) and loops[-1].along_parts for loops in around_stores),
        along_k=sum(any(loop.along_k for loop in loops) for loops in around_stores),
    )


def check(config: Config, report: Report) -> None:
    """Raises BuildError for a kernel that must not be shipped."""
    limit = min(LIMITS[report.arch].shared_block_bytes, LIMITS[config.arch].shared_block_bytes)
    name = f"{config.symbol} (sm_{report.arch})"
    verification = report.arch != config.arch  # not shipped: what another arch's assembler spills there is no fault
    if config.row_major and report.spill_bytes and not verification:
        raise BuildError(f"{name}: a fast kernel spills {report.spill_bytes} bytes; take a smaller tile or more warps")
    if report.stores_per_output != 1 or report.stores_in_loop:
        raise BuildError(
            f"{name}: an intermediate store: {report.stores_per_output:g} stores per output element, "
            f"{report.stores_in_loop} inside a loop; the rule is 1 and 0"
        )
    # A thread's share of the tile, up to a vector: less means that a hint is missing.
    element = ELEMENT_BYTES[config.out]
    share = config.cta_rows * config.tile_n * element // (config.warps * 32)
    if config.kernel == "async":
        share = min(share, async_constants(config)["PAIRS"] * 2 * element)
    if config.out_aligned and report.store_width_bytes < min(16, share):
        raise BuildError(
            f"{name}: a fast kernel stores {report.store_width_bytes} bytes at a time, not {min(16, share)}"
        )
    if report.shared_bytes > limit:
        raise BuildError(f"{name}: {report.shared_bytes} bytes of shared memory a block; the limit is {limit}")
    if config.arch == 89 and config.aligned and not verification:
        check_main_loop(config, report, name)
    if not report.mma:
        raise BuildError(f"{name}: no matrix instruction; it would run on the plain cores")


def check_main_loop(config: Config, report: Report, name: str) -> None:
    """What a fast kernel for sm_89 may cost besides its matrix instructions, which nobody can see on a GPU here."""
    # As many K steps as the loop is unrolled by, and no product twice.
    if report.loop_steps != (async_constants(config)["UNROLL"] if config.kernel == "async" else 1):
        raise BuildError(f"{name}: {report.loop_mma} matrix instructions a warp are not those of whole K steps")
    chip = REFERENCE[config.arch]
    cycles = report.loop_mma * (chip.mma_cycles_fp16 if config.fp16_accumulate else chip.mma_cycles)
    share = (report.loop_instructions - report.loop_mma) / cycles
    if config.tile_m >= 64 and share > MOST_OTHER_SLOTS:  # fewer rows wait for the weight
        raise BuildError(
            f"{name}: the other instructions of the main loop take {share:.0%} of the matrix instructions' "
            f"cycles; the most is {MOST_OTHER_SLOTS:.0%}"
        )
    if report.ctas_per_sm["all"] < 2 and config.stages < 3:
        raise BuildError(f"{name}: one CTA an SM and {config.stages} stages leave the loads' latency in sight")


def build(config: Config, cubin_arch: int, cubin: Path) -> Artifact:
    """Compiles, assembles, reads back and checks one config."""
    start = time.perf_counter()
    compiled = to_ptx(config)
    registers, spill, stack = assemble(compiled.ptx, cubin_arch, cubin)
    instructions = sass.read(_run(tool("cuobjdump"), "-sass", str(cubin)))
    bodies = sass.loops(instructions)
    main = sass.main_loop(bodies)
    told = stores(compiled.ir)
    roles = config.consumers  # each with a main loop and an epilogue of its own
    loading = [body for body in sass.innermost(bodies, "TMA load") if not any(map(sass.is_mma, body))]
    # The loader's first is of whole tiles, the others of pieces.
    loaders = [i for body in (loading[:1] if config.persistent else loading) for i in body]
    ctas = ctas_per_sm(config, registers, compiled.shared_bytes)
    outputs = config.tiles_at_once * config.cta_rows * config.tile_n * ELEMENT_BYTES[config.out]
    outputs += sum(outputs // pieces for pieces in (2, 4) if pieces <= config.pieces)  # their code stores too
    report = Report(
        symbol=config.symbol,
        arch=cubin_arch,
        compiled_arch=config.arch,
        tile=config.tile,
        warps=config.warps,
        stages=config.stages,
        registers=registers,
        spill_bytes=spill,
        stack_bytes=stack,
        shared_bytes=compiled.shared_bytes,
        ctas_per_sm=ctas,
        stores_per_output=stored_bytes(config, instructions, compiled.boxes)
        * (1 + told.twice / max(told.count, 1))
        / outputs,
        stores_in_loop=told.along_k
        if config.has_roles
        else sum(bool(sass.store_bytes(i)) for body in bodies for i in body),
        store_width_bytes=store_width(config, instructions, compiled.boxes),
        loop_instructions=len(main),
        loop_mma=sum(map(sass.is_mma, main)),
        loop_mix=sass.mix(main),
        loop_steps=config.multiplying_warps * sum(map(sass.products, main)) / config.tile_products,
        loop_shared_bytes=config.multiplying_warps * sum(map(sass.shared_bytes, main)),
        loader_mix=sass.mix(loaders),
        other_instructions=(len(instructions) - len(main) * roles - len(loaders)) // roles,
        mma=sum(map(sass.is_mma, instructions)),
        size_bytes=cubin.stat().st_size,
        seconds=round(time.perf_counter() - start, 2),
    )
    check(config, report)
    types, constants, _ = signature(config)
    return Artifact(config, tuple(name for name in types if name not in constants), compiled.boxes, cubin, report)


def cache_key(config: Config, cubin_arch: int) -> str:
    """Changes with whatever the cubin or its report depends on, and with nothing else: no cost is in either."""
    import triton

    here = Path(__file__).parent
    names = ("compile.py", "sass.py", "kernels.py", *SOURCES[config.kernel])
    sources = "".join(here.joinpath(name).read_text() for name in names)
    chip = REFERENCE[config.arch]
    chips = repr((LIMITS[config.arch], LIMITS[cubin_arch], chip.mma_cycles, chip.mma_cycles_fp16))
    told = repr(signature(config))  # with what a config derives from its fields
    text = "\n".join((triton.__version__, sources, chips, json.dumps(asdict(config)), told, str(cubin_arch)))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def cached(config: Config, cubin_arch: int, cache: Path) -> tuple[Artifact, bool]:
    """(artifact, whether it was compiled now). A kernel that breaks a rule never enters the cache."""
    key = cache_key(config, cubin_arch)
    cubin, record = cache / f"{key}.cubin", cache / f"{key}.json"
    if cubin.exists() and record.exists():
        data = json.loads(record.read_text())
        boxes = {name: tuple(box) for name, box in data["boxes"].items()}
        return Artifact(config, tuple(data["arguments"]), boxes, cubin, Report(**data["report"])), False
    cache.mkdir(parents=True, exist_ok=True)
    partial = cache / f"{key}.{os.getpid()}.partial"
    try:
        artifact = build(config, cubin_arch, partial)
        partial.replace(cubin)
    finally:
        partial.unlink(missing_ok=True)
    scratch = partial.with_suffix(".json")
    data = {"arguments": artifact.arguments, "boxes": artifact.boxes, "report": asdict(artifact.report)}
    scratch.write_text(json.dumps(data, indent=1))
    scratch.replace(record)  # last, so that an interrupted build leaves no record without its cubin
    return replace(artifact, cubin=cubin), True
