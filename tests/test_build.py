"""The build: each failure stops it with a clear text, the cache compiles only what changed, and configs keep rules."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import asdict, astuple, fields, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs the build's environment", exc_type=ImportError)

import build
from aot import BuildError, compile, costs, emit, model, package, rules
from aot.candidates import BARRIER_BYTES
from aot.chips import FULL_RATE, LIMITS, REFERENCE
from aot.configs import (
    ARCHS,
    CONFIGS,
    DTYPES,
    ELEMENT_BYTES,
    FP16_CHUNK,
    Config,
    check_classes,
    class_of,
    ctas_per_sm,
    regime,
)

SMALL = Config(89, "f16", "f16", "f16", False, True, 16, 64, 64, 4, 3)
LARGE = Config(89, "f16", "f16", "f16", False, True, 128, 256, 64, 4, 3)
ASYNC = Config(89, "f32", "f16", "f16", False, True, 64, 64, 32, 4, 4, kernel="async", warps_m=2, unit_k=32)
HOPPER = replace(SMALL, arch=90, tile_m=64)
WS = Config(90, "f16", "f16", "f16", False, True, 128, 128, 64, 12, 2, 2, kernel="ws")
QUARTERS = replace(WS, epilogue_parts=4)  # and so halves of a result that run the same instructions
PAIR = replace(WS, tile_m=256, cluster=2)
PINGPONG = replace(WS, kernel="pingpong", epilogue_parts=4)
RING = Config(90, "f16", "f16", "f16", False, True, 64, 64, 64, 8, 3, kernel="ring")
SHIFT = replace(RING, aligned=False, warps=20, kernel="shift", out_aligned=False, any_rows=True)
SHIFT_WS = replace(SHIFT, tile_m=128, tile_n=256, warps=12, stages=4, epilogue_parts=4, kernel="shift_ws")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> compile.Artifact:
    """The smallest kernel, compiled."""
    return compile.build(SMALL, 89, tmp_path_factory.mktemp("small") / "small.cubin")


@pytest.fixture
def kernels(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a changed copy of a file of kernels, each (old, new) once, where the build finds it."""

    for name in ("kernels", "ada", "hopper", "unaligned"):
        importlib.import_module(f"aot.{name}")  # or the import of one would put another's original back

    def change(*changes: tuple[str, str], file: str = "kernels") -> None:
        text = root.joinpath("aot", f"{file}.py").read_text()
        for old, new in changes:
            assert text.count(old) == 1, f"{old!r} is in aot/{file}.py {text.count(old)} times"
            text = text.replace(old, new)
        path = tmp_path / f"changed_{file}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec and spec.loader
        module: ModuleType = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(f"aot.{file}", module)

    return change


# ---- what stops a build


def compile_all(folder: Path, monkeypatch: pytest.MonkeyPatch, *configs: Config) -> tuple[list[compile.Artifact], int]:
    """The build's whole compile step, over other configs and in another folder."""
    monkeypatch.setattr("build.ROOT", folder)
    monkeypatch.setattr("aot.configs.CONFIGS", configs)
    return build.compile_all([89], None, 2, folder / "generated")


def test_a_fast_kernel_that_spills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BuildError, match=rf"^{LARGE.symbol} \(sm_89\): a fast kernel spills [1-9]\d* bytes; take a"):
        compile_all(tmp_path, monkeypatch, LARGE)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".cubin", ".json")]  # nor is it in the cache


def test_pip_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("build.build", lambda *_: (_ for _ in ()).throw(BuildError("missing tool: ptxas")))
    with pytest.raises(SystemExit, match=r"^lbg: missing tool: ptxas$"):
        build.build_wheel(str(tmp_path))


STORE = "        tl.store(out_ptrs, y, mask=(offs_m[:, None] < M) & (cols[None, :] < N))\n"


def test_a_kernel_that_stores_twice(tmp_path: Path, kernels: Callable[..., None]) -> None:
    kernels((STORE, STORE.replace(" y,", " parts[part].to(out_ptr.dtype.element_ty),") + STORE))
    with pytest.raises(BuildError, match=r"an intermediate store: 2 stores per output element, 0 inside a loop; the"):
        compile.build(SMALL, 89, tmp_path / "cubin")


def test_a_kernel_that_stores_in_its_loop(tmp_path: Path, kernels: Callable[..., None]) -> None:
    step = "            acc = multiply_add(x, tl.load(w_ptrs), acc, FP16_ACCUMULATE)\n"
    kernels((step, step + "            tl.store(out_ptr + offs_n, acc.to(out_ptr.dtype.element_ty).max(0))\n"))
    with pytest.raises(
        BuildError, match=r"an intermediate store: .* stores per output element, [1-9]\d* inside a loop"
    ):
        compile.build(SMALL, 89, tmp_path / "cubin")


WS_STORE = "            tma.async_store(out, [first_m, part_n], buffer)\n"
WS_STEP = "            release(rings, step - 1)\n            step += 1\n"
WS_STEP_STORE = "            tma.async_store(result[0], [step, step], rings.out.index(WHO))\n"
RING_STEP = "        mbarrier.arrive(x.empty.index(last), pred=k > 0)\n"


@pytest.mark.parametrize(
    ("config", "changes", "told"),
    [
        (WS, [(WS_STORE, "")], "0 stores per output element, 0 inside"),
        (WS, [(WS_STORE, 2 * WS_STORE)], "2 stores per output element, 0 inside"),
        (PINGPONG, [(WS_STORE, 2 * WS_STORE)], "2 stores per output element, 0 inside"),
        (WS, [(WS_STEP, WS_STEP + WS_STEP_STORE)], "1.66667 stores per output element, 4 inside a loop"),
        # of each consumer's program, above once for tiles and once for halves
        (PINGPONG, [(WS_STEP, WS_STEP + WS_STEP_STORE)], "1.25 stores per output element, 2 inside a loop"),
        (RING, [("= products(x, weight, zeros, K)", "= products(x, weight, zeros, K, out_ptr)"),
                ("def products(x, weight, zeros, K)", "def products(x, weight, zeros, K, out_ptr)"),
                (RING_STEP, RING_STEP + "        gl.store(out_ptr + k, 0.0)\n")],
         r"1\.\d+ stores per output element, 1 inside"),
    ],
    ids=["ws never", "ws twice", "pingpong twice", "ws in its loop", "pingpong in its loops", "ring in its loop"],
)  # fmt: skip
def test_a_hopper_kernel_that_does_not_store_just_once(
    tmp_path: Path, kernels: Callable[..., None], config: Config, changes: list[tuple[str, str]], told: str
) -> None:
    kernels(*changes, file="hopper")
    with pytest.raises(BuildError, match=f"an intermediate store: {told}"):
        compile.build(config, 90, tmp_path / "cubin")


def test_a_float32_x_is_copied_as_it_is_and_rounded_where_it_is_read(tmp_path: Path) -> None:
    report = compile.build(ASYNC, 89, tmp_path / "cubin").report
    assert report.shared_bytes == ASYNC.stages * ASYNC.tile_k * (4 * ASYNC.tile_m + 2 * ASYNC.tile_n)
    assert "global load" not in report.loop_mix and "shared store" not in report.loop_mix, report.loop_mix
    assert (report.loop_steps, report.spill_bytes) == (ASYNC.stages, 0)
    values = ASYNC.tile_m * ASYNC.tile_k * (ASYNC.warps // ASYNC.warps_m)  # by each warp that multiplies them
    assert report.loop_mix["convert"] == report.loop_steps * values / 2 / 32 / ASYNC.warps  # two an instruction


def test_a_chunk_of_fp16_accumulate_may_take_several_steps(tmp_path: Path) -> None:
    config = replace(ASYNC, fp16_accumulate=True, stages=3)
    report = compile.build(config, 89, tmp_path / "cubin").report
    assert (report.loop_steps, report.spill_bytes) == (6, 0)  # whole rounds of 3 stages, whole chunks of 2 steps
    sums = report.loop_steps * config.tile_k // FP16_CHUNK * config.tile_m * config.tile_n
    assert report.loop_mix["float"] == sums / 32 / config.warps, report.loop_mix


@pytest.mark.parametrize("change", [{"out": "f32"}, {"out_aligned": False}, {"x": "f32", "stages": 3}], ids=str)
def test_a_hopper_kernel_stores_once_and_spills_nothing(tmp_path: Path, change: dict[str, Any]) -> None:
    # ws: a loop and a step beside it, once for tiles, once for halves and once for quarters, if those are no narrower
    # than a part of the result, in a program for each of two consumers; pingpong's have no pieces, and twice the rows;
    # ring has a step beside the loop of a float32 x alone
    quarters = "out_aligned" not in change
    wanted = {WS: 32, QUARTERS: 32 + 16 * quarters, PAIR: 32}
    wanted |= {PINGPONG: 32, RING: 8 if "x" in change else 4}
    if "out_aligned" in change:
        del wanted[PINGPONG]  # spills: no tile that stores to any address is one
    for config, mma in wanted.items():
        report = compile.build(replace(config, **change), 90, tmp_path / "cubin").report
        assert (report.stores_per_output, report.stores_in_loop, report.spill_bytes) == (1, 0, 0), report
        assert report.mma == mma, report


@pytest.mark.parametrize(
    ("config", "forms"), [(QUARTERS, 3), (PAIR, 2), (PINGPONG, 1)], ids=["quarters", "a cluster", "pingpong"]
)
def test_no_step_reads_a_constant_of_the_launch(tmp_path: Path, config: Config, forms: int) -> None:
    # It would queue with what a float32 x is read by: of the cluster's tile, 8 % of the time.
    bodies = loops_along_k(replace(config, x="f32"), forms, tmp_path / "cubin")
    assert not [i for body in bodies for i in body if i.opcode.startswith("LDC")]


@pytest.mark.parametrize(
    ("config", "forms", "turns"),
    [(QUARTERS, 3, 2), (PAIR, 2, 2), (PINGPONG, 1, 0)],
    ids=["quarters", "a cluster", "pingpong"],
)
@pytest.mark.parametrize(("x", "rings"), [("f16", 1), ("f32", 2)])
def test_consumers_that_share_a_tile_take_its_steps_by_turns(
    tmp_path: Path, config: Config, forms: int, turns: int, x: str, rings: int
) -> None:
    # A step of a tile waits for what it multiplies and, in each consumer's program, for its turn; one of a piece does
    # not, nor one of a consumer that has all of a tile.
    bodies = loops_along_k(replace(config, x=x), forms, tmp_path / "cubin")
    waits = sorted(sum(i.opcode.startswith("SYNCS.PHASECHK") for i in body) for body in bodies)
    assert waits == [rings] * (2 * forms - turns) + [rings + 1] * turns


def loops_along_k(config: Config, forms: int, cubin: Path) -> list[list[compile.sass.Instruction]]:
    """Of each consumer, one for tiles, one for halves, one for quarters; longer ones are waits moved out of line."""
    compile.build(config, 90, cubin)
    bodies = compile.sass.innermost(compile.sass.loops(compile.sass.read(sass(cubin))), "matrix")
    along_k = sorted(bodies, key=len)[: 2 * forms]
    assert len(along_k) == 2 * forms and len(along_k[-1]) < 1.15 * len(along_k[0])
    return along_k


def test_a_kernel_cuts_its_tiles_by_what_dispatch_holds_a_piece_to_take() -> None:
    from aot import hopper

    for pieces in (1, 2, 4):
        assert hopper.piece_time.fn(pieces) == pytest.approx(20 * rules.piece_share(pieces)), pieces


def test_a_kernel_knows_what_of_x_its_chips_l2_holds_and_how_soon_dram_brings_the_rest() -> None:
    from aot import hopper

    chip = REFERENCE[90]
    assert chip.l2_holds < hopper.L2_BYTES.value < chip.l2_bytes
    # A byte for each element of a CTA's tile, of one element of K, by the datasheet's clock, which load lowers.
    element_us = 2 * chip.sm_count / (chip.tflops(chip.wgmma_cycles) * 1e6)
    assert 1 < 1 / (chip.dram_share * chip.sm_count * element_us) < 1.3


def test_a_float32_x_may_have_slots_and_barriers_of_its_own(tmp_path: Path) -> None:
    apart = replace(RING, x="f32", tile_k=128, stages=5, x_stages=4)
    report = compile.build(apart, 90, tmp_path / "cubin").report
    assert (report.stores_per_output, report.stores_in_loop, report.spill_bytes) == (1, 0, 0), report
    assert report.mma == 2 * apart.tile_k // 16  # in the loop and in a step beside it
    operands = apart.tile_k * (apart.x_stages * 4 * apart.tile_m + apart.stages * 2 * apart.tile_n)
    barriers = 2 * 8 * (apart.stages + apart.x_stages)
    assert 0 <= report.shared_bytes - operands - 2 * apart.tile_m * apart.tile_n - barriers < BARRIER_BYTES
    assert apart.symbol.endswith("_s5x4_ring")


@pytest.mark.parametrize("tile_m", [64, 16])
@pytest.mark.parametrize("x", ["f16", "f32"], ids=["float16 x", "float32 x"])
def test_rows_that_start_anywhere_are_loaded_by_16_bytes_and_multiplied_from_shared_memory(
    x: str, tile_m: int, tmp_path: Path
) -> None:
    config = replace(SHIFT, x=x, tile_m=tile_m)
    artifact = compile.build(config, 90, tmp_path / "cubin")
    report = artifact.report
    assert (report.stores_per_output, report.stores_in_loop, report.spill_bytes) == (1, 0, 0), report
    assert report.mma == config.tile_k // 16 == report.loop_mix["matrix"] and not artifact.boxes
    # A slot has the 64 rows that wgmma takes, and a float32 x is in 16 bits there.
    operands = config.stages * 2 * config.tile_k * (64 + config.tile_n)
    assert 0 <= report.shared_bytes - operands - 2 * 64 * config.tile_n < BARRIER_BYTES
    dtypes = "f16" if x == "f16" else "f32asf16"
    assert config.symbol == f"lbg_fused_{dtypes}_f16_{tile_m}x64x64_w20_s3_shift_anyrows"
    ptx, vectors = compile.to_ptx(config).ptx, (tile_m * ELEMENT_BYTES[x] * 4, config.tile_n * 8)
    # Of each group, twice a thread's part of x and of weight, for its first step and for each after it.
    loads = sum(max(1, size // 256) for size in vectors)
    assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) == 2 * 2 * 2 * loads


@pytest.mark.parametrize(
    ("config", "symbol"),
    [
        (SHIFT_WS, "lbg_fused_f16_f16_128x256x64_w12_s4_shift_ws_anyrows"),
        (
            replace(SHIFT_WS, x="f32", stages=3, epilogue_parts=8),
            "lbg_fused_f32asf16_f16_128x256x64_w12_s3_shift_ws_anyrows",
        ),
    ],
    ids=["float16 x", "float32 x"],
)
def test_many_rows_that_start_anywhere_are_copied_by_16_bytes_and_shifted_in_their_slot(
    config: Config, symbol: str, tmp_path: Path
) -> None:
    artifact = compile.build(config, 90, tmp_path / "cubin")
    report = artifact.report
    assert (report.stores_per_output, report.stores_in_loop, report.spill_bytes) == (1, 0, 0), report
    assert report.mma == 2 * 2 * config.tile_k // 16 and not artifact.boxes  # of each consumer, a first step and others
    assert config.symbol == symbol
    ptx, lines = compile.to_ptx(config).ptx, config.tile_m * ELEMENT_BYTES[config.x] // 2 + config.tile_n
    # 16 rows' 128 bytes at a time; of a first step and of those after it; with masks and without.
    assert ptx.count("cp.async.cg.shared.global") == 2 * 2 * lines // 16
    # Of each thread's row the sector before it, masked; each other word of a step comes through shared memory, twice.
    assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) == 2 * (config.tile_m + config.tile_n) // 128


@pytest.mark.parametrize(
    ("change", "columns"),
    [({}, 64), ({"x": "f32"}, 32)],  # of x, 128 bytes
    ids=["float16 x", "float32 x"],
)
def test_a_clusters_ctas_share_the_weights_load_and_end_together(change: dict[str, Any], columns: int) -> None:
    rows = 64  # each consumer's
    compiled = compile.to_ptx(replace(PAIR, **change))
    boxes = {"x": (rows, columns, 3), "weight": (128, 64, 3), "weight_piece": (64, 64, 3), "out": (rows, 64, 3)}
    assert compiled.boxes == boxes  # of a CTA
    loads = re.findall(r"cp\.async\.bulk\.tensor\S+\.global\.mbarrier\S*", compiled.ptx)
    of_x = 128 // rows * (64 // columns)
    # of tiles and of halves
    assert len(loads) == 2 * (of_x + 1) and sum("multicast" in load for load in loads) == 2, loads
    # An arrival at the barrier of a CTA that has ended would be an error.
    ended = re.findall(r"barrier\.cluster\.arrive\.aligned;\s+barrier\.cluster\.wait\.aligned;", compiled.ptx)
    assert len(ended) == 2, ended  # of the warps that multiply, of the others
    assert ".reqnctapercluster 2" in compiled.ptx
    assert "cluster" not in compile.to_ptx(WS).ptx.replace("shared::cluster", "")


@pytest.mark.parametrize(
    "config",
    [WS, replace(WS, x="f32"), PAIR, PINGPONG, RING],
    ids=["ws", "ws, float32 x", "a cluster", "pingpong", "ring"],
)
def test_every_role_waits_for_what_the_stream_ran_before(config: Config) -> None:
    # csrc/dispatch.cpp's early(): what loads, and what stores, may have been launched before that has ended.
    # Two consumers and a loader, or a consumer and two loaders.
    assert len(re.findall(r"griddepcontrol\.wait\b", compile.to_ptx(config).ptx)) == 3


def test_a_config_that_miscounts_its_warps() -> None:
    with pytest.raises(BuildError, match=rf"^{replace(WS, warps=8).symbol}: its CTAs are not of 8 warps"):
        compile.to_ptx(replace(WS, warps=8))


def test_a_kernel_that_needs_scratch_memory(tmp_path: Path, kernels: Callable[..., None]) -> None:
    # a descriptor made in the kernel lives in global scratch memory
    load = "multiply_add(x, tl.load(w_ptrs)"
    made = "tl.make_tensor_descriptor(x_ptr, [M, K], [stride_xm, 1], [TILE_M, TILE_K])"
    kernels((load, f"multiply_add({made}.load([0, 0]), tl.load(w_ptrs)"))
    with pytest.raises(BuildError, match=rf"^{HOPPER.symbol}: global_scratch_size is [1-9]\d*; a launcher passes no"):
        compile.build(HOPPER, 90, tmp_path / "cubin")


def test_profile_scratch_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = SimpleNamespace(global_scratch_size=0, profile_scratch_size=64, shared=0, name=SMALL.symbol)
    monkeypatch.setattr("triton.compile", lambda *_, **__: SimpleNamespace(metadata=metadata, asm={"ptx": ""}))
    with pytest.raises(BuildError, match=r"profile_scratch_size is 64; a launcher passes no scratch memory"):
        compile.to_ptx(SMALL)


def test_more_shared_memory_than_a_block_may_have(tmp_path: Path) -> None:
    wide = replace(LARGE, tile_n=128, warps=8, stages=5)
    wanted = rf"^{wide.symbol} \(sm_89\): 131072 bytes of shared memory a block; the limit is 101376"
    with pytest.raises(BuildError, match=wanted):
        compile.build(wide, 89, tmp_path / "cubin")
    with pytest.raises(BuildError, match=wanted.replace("sm_89", "sm_90")):  # sm_90 has it, the GPU verified for not
        compile.build(wide, 90, tmp_path / "cubin")


def test_a_kernel_without_matrix_instructions(small: compile.Artifact) -> None:
    with pytest.raises(BuildError, match="no matrix instruction"):
        compile.check(SMALL, replace(small.report, mma=0))


def test_a_tool_that_triton_does_not_carry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton.__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(BuildError, match=r"^missing tool: ptxas is not in the installed triton package"):
        compile.tool("ptxas")


def test_no_compiler(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match=r"^missing tool: g\+\+ .* is not on the PATH; set CXX to another"):
        package.extension(root, tmp_path)


def test_ptxas_failing(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"^ptxas failed \(\d+\): .*Missing \.version directive"):
        compile.assemble("not PTX", 89, tmp_path / "cubin")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--arch sm_75", "argument --arch: sm_75 is not one of sm_89, sm_90"),
        ("--arch ada", "argument --arch: ada is not one of sm_89, sm_90"),
        ("--verify-on sm_90", "--verify-on needs exactly one --arch, the one to verify"),
        ("--arch sm_89 --arch sm_90 --verify-on sm_90", "--verify-on needs exactly one --arch, the one to verify"),
        ("--arch sm_90 --verify-on sm_89", "PTX of sm_90 cannot be assembled for the older sm_89"),
        ("--jobs 0", "--jobs must be at least 1; got 0"),
        ("--fast", "unrecognized arguments: --fast"),
    ],
)
def test_a_command_that_makes_no_sense(root: Path, arguments: str, told: str) -> None:
    done = subprocess.run([sys.executable, root / "build.py", *arguments.split()], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == f"build.py: error: {told}", done.stderr


# ---- the whole compile step, and its cache


def test_only_what_changed_is_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = replace(SMALL, out="f32")
    assert compile_all(tmp_path, monkeypatch, SMALL, other)[1] == 2
    assert compile_all(tmp_path, monkeypatch, SMALL, other)[1] == 0
    artifacts, compiled = compile_all(tmp_path, monkeypatch, SMALL, replace(other, group_m=4))
    assert compiled == 1 and [a.config.group_m for a in artifacts] == [8, 4]
    # back again: from the cache, yet newer than what was linked in between
    linked = artifacts[1].cubin.stat().st_mtime_ns
    artifacts, compiled = compile_all(tmp_path, monkeypatch, SMALL, other)
    assert compiled == 0 and artifacts[1].cubin.stat().st_mtime_ns > linked


def test_a_record_without_its_cubin_is_no_cache(tmp_path: Path) -> None:
    artifact, fresh = compile.cached(SMALL, 89, tmp_path)
    artifact.cubin.unlink()
    again, afresh = compile.cached(SMALL, 89, tmp_path)
    assert fresh and afresh and again.cubin.exists()


def test_the_cache_key_tells_configs_and_archs_apart() -> None:
    changes = {"x": "f32", "weight": "bf16", "out": "f32", "fp16_accumulate": True, "aligned": False, "tile_m": 32}
    changes |= {"tile_n": 32, "tile_k": 32, "warps": 8, "stages": 2, "epilogue_parts": 2, "group_m": 4, "arch": 90}
    changes |= {"kernel": "ring", "warps_m": 2, "unit_k": 32, "out_aligned": False, "cluster": 2, "x_stages": 4}
    changes |= {"any_rows": True}
    assert set(changes) == set(Config.__dataclass_fields__)
    keys = [compile.cache_key(replace(SMALL, **{name: value}), 90) for name, value in changes.items()]
    keys += [compile.cache_key(SMALL, 89), compile.cache_key(SMALL, 90)]
    assert len(set(keys)) == len(keys) and keys[-1] == compile.cache_key(SMALL, 90)


def test_the_same_source_gives_the_same_cubin(small: compile.Artifact, tmp_path: Path) -> None:
    assert compile.build(SMALL, 89, tmp_path / "again").cubin.read_bytes() == small.cubin.read_bytes()


# ---- artifacts


@pytest.fixture(scope="module")
def verified(tmp_path_factory: pytest.TempPathFactory) -> compile.Artifact:
    """The small kernel's sm_89 PTX assembled for sm_90."""
    return compile.build(SMALL, 90, tmp_path_factory.mktemp("generated") / "verified.cubin")


def sass(cubin: Path) -> str:
    return subprocess.run(
        [compile.tool("cuobjdump"), "-sass", cubin], capture_output=True, text=True, check=True
    ).stdout


def test_a_cubin_is_of_its_arch_and_holds_its_symbol(small: compile.Artifact, verified: compile.Artifact) -> None:
    for artifact, arch in ((small, 89), (verified, 90)):
        assert f"code for sm_{arch}" in sass(artifact.cubin) and f"Function : {SMALL.symbol}" in sass(artifact.cubin)
        assert (artifact.report.arch, artifact.report.compiled_arch) == (arch, 89), artifact.report
    assert verified.arguments == small.arguments


def test_a_verification_build_says_so(verified: compile.Artifact, root: Path) -> None:
    version = package.version(root, [89], 90)
    plain = package.version(root, list(ARCHS), None)
    assert version == f"{plain}+verify.sm89.on.sm90"
    emit.write([verified], version, verified.cubin.parent)
    text = verified.cubin.with_name("kernels.cpp").read_text()
    assert f'kVersion = "{version}"' in text and f'{{"{SMALL.symbol}", 89, 90, DType::f16' in text
    assert '.incbin "verified.cubin"' in verified.cubin.with_name("cubins.S").read_text()


ALIGNED_ARGUMENTS = ("x_ptr", "weight_ptr", "scale_ptr", "shift_ptr", "out_ptr", "M", "N", "K",
                     "stride_xm", "stride_wn", "stride_om")  # fmt: skip


def test_rows_that_start_on_16_bytes_are_all_that_is_promised() -> None:
    def promised(config: Config) -> dict[str, object]:
        types, _, hints = compile.signature(config)
        return {list(types)[index]: unit for (index,), [[_, unit]] in hints.items()}

    loads = {"x_ptr": 16, "weight_ptr": 16, "scale_ptr": 16, "shift_ptr": 16, "K": 8, "stride_xm": 8, "stride_wn": 8}
    assert promised(SMALL) == loads | {"out_ptr": 16, "N": 8, "stride_om": 8}
    assert promised(replace(SMALL, x="f32", out="f32")) == promised(SMALL) | {"stride_xm": 4, "stride_om": 4}
    assert promised(replace(SMALL, out_aligned=False)) == loads
    for stores in (True, False):
        assert "stride_on" in compile.signature(replace(SMALL, out_aligned=stores))[1]
    vectors = {"scale_ptr": 16, "shift_ptr": 16}  # a tensor map ends anywhere
    asked_for = {"weight_ptr": 16, "stride_wn": 8}  # of L2
    assert promised(WS) == vectors | {"N": 8, "stride_om": 8}
    assert promised(RING) == promised(WS) | {"out_ptr": 16} | asked_for
    assert promised(replace(RING, out_aligned=False)) == vectors | asked_for


def test_a_result_without_alignment_is_stored_by_elements(tmp_path: Path) -> None:
    report = compile.build(replace(SMALL, out_aligned=False), 89, tmp_path / "cubin").report
    assert (report.store_width_bytes, report.stores_per_output) == (2, 1), report


def test_what_is_promised_is_no_argument(small: compile.Artifact) -> None:
    assert small.arguments == ALIGNED_ARGUMENTS
    types, constants, hints = compile.signature(replace(SMALL, aligned=False, out_aligned=False))
    assert len([name for name in types if name not in constants]) == 16 and not hints
    assert types["M"] == types["stride_xm"] == "i64" and compile.signature(SMALL)[0]["M"] == "i32"


def test_rows_that_start_anywhere_promise_their_inner_strides_alone() -> None:
    types, constants, hints = compile.signature(replace(SMALL, aligned=False, out_aligned=False, any_rows=True))
    assert {name: constants[name] for name in compile.UNIT_STRIDES} == dict.fromkeys(compile.UNIT_STRIDES, 1)
    assert types["M"] == "i32" and constants["LOADS"] == "shifted" and not hints
    assert not compile.signature(SHIFT_WS)[2]


@pytest.mark.parametrize("config", [WS, RING], ids=lambda config: config.kernel)
def test_a_hopper_kernels_parameters_are_those_that_its_launcher_passes(tmp_path: Path, config: Config) -> None:
    artifact = compile.build(config, 90, tmp_path / "cubin")
    piece, out, more = (("weight_piece",), "out", ()) if config is WS else ((), "out_ptr", ("weight_ptr", "stride_wn"))
    vectors = ("scale_ptr", "shift_ptr")
    assert artifact.arguments == ("x", "weight", *piece, *vectors, out, "M", "N", "K", "stride_om", *more)
    # 128 bytes each, whose swizzle has number 3
    boxes = {"x": (128, 64, 3), "weight": (128, 64, 3), "weight_piece": (64, 64, 3), "out": (64, 64, 3)}
    assert artifact.boxes == (boxes if config is WS else {"x": (64, 64, 3), "weight": (64, 64, 3)})
    entry = re.search(r"\.entry \w+\((.*?)\)", compile.to_ptx(config).ptx, re.DOTALL)
    assert entry
    found = re.findall(r"\.param (?:\.align 64 )?\.(\w+)[^,]*?(?:\[(\d+)\])?(?:,|$)", entry[1].strip(), re.MULTILINE)
    sizes = [{"b8": int(count or 0), "u32": 4, "u64": 8}[kind] for kind, count in found]
    matrix = [128, 4, 4, 8, 8]
    weights = matrix * (2 if piece else 1)
    ours = [*matrix, *weights, 8, 8, *(matrix if config is WS else [8]), 4, 4, 4, 8, *[8 for _ in more]]
    assert sizes == [*ours, 8, 8], entry[1]  # two scratch pointers last


@pytest.mark.filterwarnings("ignore:setup.py install is deprecated")  # how setuptools makes a wheel
def test_a_verification_wheel_carries_its_version(root: Path, tmp_path: Path) -> None:
    library = tmp_path / "_C.abi3.so"
    library.write_bytes(b"")
    copy = shutil.copytree(root / "src", tmp_path / "src").parent
    shutil.copy2(root / "pyproject.toml", copy)
    for name in ("README.md", "LICENSE"):
        copy.joinpath(name).touch()
    version = package.version(root, [89], 90)
    wheel = package.wheel(copy, version, library, tmp_path / "dist")
    assert wheel.name.startswith(f"lbg-{version}-cp310-abi3-")
    assert f"Version: {version}\n".encode() in zipfile.ZipFile(wheel).read(f"lbg-{version}.dist-info/METADATA")


# ---- configs


@pytest.mark.parametrize(
    ("arch", "warps", "registers", "shared_bytes", "expected"),
    [
        # 250 registers x 32 lanes are 8000, handed out as 8192 a warp; 32 KB + 1 KB a block of 100 KB
        (89, 4, 250, 32768, {"registers": 2, "shared": 3, "warps": 12, "all": 2}),
        # 168 x 32 = 5376 = 21 x 256, no rounding: 65536 / (8 x 5376); 228 KB / 97 KB
        (90, 8, 168, 98304, {"registers": 1, "shared": 2, "warps": 8, "all": 1}),
        (90, 4, 128, 0, {"registers": 4, "shared": 228, "warps": 16, "all": 4}),
        (89, 4, 40, 101376, {"registers": 12, "shared": 1, "warps": 12, "all": 1}),
    ],
)
def test_ctas_per_sm(arch: int, warps: int, registers: int, shared_bytes: int, expected: dict[str, int]) -> None:
    config = replace(SMALL, arch=arch, warps=warps)
    assert ctas_per_sm(config, registers, shared_bytes) == expected


def test_symbols_are_unique_in_an_arch() -> None:
    for arch in ARCHS:
        symbols = [config.symbol for config in CONFIGS if config.arch == arch]
        assert symbols and sorted(symbols) == sorted(set(symbols)), arch
    assert len({config.file for config in CONFIGS}) == len(CONFIGS)


def test_every_config_keeps_tritons_and_our_rules() -> None:
    from aot import kernels

    assert kernels.FP16_CHUNK == FP16_CHUNK
    for config in CONFIGS:
        assert {config.tile_m, config.tile_n, config.tile_k} <= {16, 32, 64, 128, 256}, config
        assert config.warps in (2, 4, 8, 12, 16) or (config.kernel, config.warps) == ("shift", 20), config
        assert config.stages >= 1 and config.arch in LIMITS, config
        if config.fp16_accumulate:  # a tile kernel sums its whole K step in float16
            chunks = config.tile_k % FP16_CHUNK == 0 or FP16_CHUNK % config.tile_k == 0
            assert config.tile_k == FP16_CHUNK or (config.kernel == "async" and chunks), config


def test_every_class_ends_with_its_generic_kernel() -> None:
    check_classes(CONFIGS)
    found = {key: list(rows) for key, rows in itertools.groupby(CONFIGS, class_of)}
    wanted = {(arch, *dtypes, mode) for arch in ARCHS for dtypes in DTYPES for mode in (False, True)
              if not mode or (arch == 89 and dtypes[1] == "f16")}  # fmt: skip
    assert set(found) == wanted
    for key, rows in found.items():
        relied_on = [config.row_major + config.aligned + config.out_aligned for config in rows]
        assert relied_on == sorted(relied_on, reverse=True) and set(relied_on) == {3, 2, 1, 0}, key
        assert relied_on.count(0) == 1, key


GENERIC = Config(89, "f16", "f16", "f16", False, False, 64, 64, 32, 4, 2, out_aligned=False)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([SMALL], f"the last config, {SMALL.symbol}, is not the conservative one: any alignment, 4 warps, 2 stages"),
        ([SMALL, replace(GENERIC, stages=3)], "is not the conservative one"),
        ([SMALL] * 4 + [GENERIC], "5 configs for few rows; the most is 4, the conservative one among them"),
        ([GENERIC, GENERIC], "2 configs for any M"),
        ([SMALL, GENERIC, replace(GENERIC, arch=90), GENERIC], "its configs do not stand together in CONFIGS"),
        ([replace(SMALL, x_stages=4), GENERIC], "stages of x are its own in a ring with a float32 x alone"),
    ],
)
def test_a_class_that_dispatch_cannot_rely_on(rows: list[Config], told: str) -> None:
    with pytest.raises(BuildError, match=rf"^sm_89 f16-f16-f16: .*{told}"):
        check_classes(rows)


def test_the_regime_of_a_kernel_with_tensor_maps_goes_by_its_tiles_area() -> None:
    ring = replace(SMALL, arch=90, kernel="ring")
    sizes = ((64, 32), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256))
    found = [regime(replace(ring, tile_m=m, tile_n=n)) for m, n in sizes]
    assert found == ["few rows", "some rows", "many rows", "many rows", "most rows", "most rows"]
    plain = [regime(replace(SMALL, tile_m=m, tile_n=256)) for m in (16, 32, 64, 128, 256)]
    assert plain == ["few rows", "few rows", "some rows", "many rows", "most rows"]
    anywhere = replace(ring, tile_m=64, tile_n=64, out_aligned=False)
    assert regime(anywhere) == "some rows, any result"
    assert regime(replace(anywhere, aligned=False, any_rows=True)) == "some rows, any rows"
    assert regime(GENERIC) == "any M"


def test_fp16_accumulate_keeps_the_sums_of_a_large_tile_in_halves() -> None:
    large = {config.tile for config in CONFIGS if config.halves}
    small = {config.tile for config in CONFIGS if config.fp16_accumulate and config.kernel == "async"} - large
    assert large == {"128x256x32"} and "128x128x64" in small
    halved = next(config for config in CONFIGS if config.halves)
    with pytest.raises(Exception, match="add_halves") as caught:
        compile.to_ptx(replace(halved, tile_k=128))
    assert "a step must not cross from one chunk to the next" in str(caught.value.__cause__)


def test_a_result_whose_parts_leave_a_buffer_in_use_is_refused() -> None:
    ws = next(config for config in CONFIGS if config.kernel == "ws" and config.out_aligned)
    with pytest.raises(Exception, match="a tile must leave the buffers as it found them"):
        compile.to_ptx(replace(ws, epilogue_parts=1))


def test_a_measured_cost_is_taken_and_compiles_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modelled, fresh = compile.cached(SMALL, 89, tmp_path)
    measured = costs.Cost(*(float(i) for i in range(len(fields(costs.Cost)))))
    expected = model.cost(SMALL, modelled.report, REFERENCE[89])
    assert costs.cost(SMALL, modelled.report) == expected != measured
    monkeypatch.setattr("aot.costs.measured", lambda _, full_rate: {} if full_rate else {SMALL.symbol: measured})
    artifact, afresh = compile.cached(SMALL, 89, tmp_path)
    assert fresh and not afresh and costs.cost(SMALL, artifact.report) == measured
    full_rate = model.cost(SMALL, modelled.report, FULL_RATE[89])
    both = [f"{{{', '.join(map(str, astuple(cost)))}}}" for cost in (measured, full_rate)]
    assert ", ".join(both) in emit.row(0, artifact)


@pytest.mark.parametrize("gpu", ["NVIDIA GeForce RTX 4090", "NVIDIA L40S"])
def test_a_file_of_costs_is_read_by_symbol(
    small: compile.Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: str
) -> None:
    full_rate = "GeForce" not in gpu
    chip = (FULL_RATE if full_rate else REFERENCE)[89]
    expected = model.cost(SMALL, small.report, chip)
    row = {"cost": asdict(expected) | {"launch_us": 9.0}, "rms": 0.02}
    for arch, kernels in ((89, {SMALL.symbol: row}), (90, {})):
        written = {"arch": f"sm_{arch}", "tune": {"kinds": {}, "costs": {"gpu": gpu, "kernels": kernels}}}
        tmp_path.joinpath(f"evidence_sm_{arch}.json").write_text(json.dumps(written))
    monkeypatch.setattr("aot.evidence.path_of", lambda arch: tmp_path / f"evidence_sm_{arch}.json")
    costs.measured.cache_clear()
    assert costs.cost(SMALL, small.report, full_rate).launch_us == 9.0
    assert costs.cost(SMALL, small.report, not full_rate).launch_us != 9.0  # no time of such a GPU
    other = replace(SMALL, out="f32")
    assert costs.cost(other, small.report, full_rate) == model.cost(other, small.report, chip)
    bfloat16 = replace(SMALL, x="bf16", weight="bf16", out="bf16")  # the same instructions
    assert costs.cost(bfloat16, small.report, full_rate).launch_us == 9.0
    costs.measured.cache_clear()
