"""The audit: what is read from machine code, the chips' facts, the model, and how it is held to measured times."""

from __future__ import annotations

import json
import math
import subprocess
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pytest

from aot import BuildError, audit, model, sass
from aot.chips import CHIPS, LIMITS, REFERENCE, ctas_per_sm, named
from aot.compile import Artifact, Report
from aot.configs import ELEMENT_BYTES, Config
from aot.journal import Head, Key, Record, Timed
from tests.bench.records import DATASHEET_TFLOPS, Shape

# ---- machine code

# Two K steps' worth of a loop; a wait that lies behind the kernel and jumps back into it; the trap at the end.
ADA = """
        /*0000*/                   S2R R0, SR_CTAID.X ;                     /* 0x0000000000007919 */
        /*0010*/                   LDSM.16.M88.4 R4, [R2] ;                 /* 0x000000000204783b */
        /*0020*/                   LDSM.16.MT88.2 R8, [R2+0x400] ;          /* 0x000400000208783b */
        /*0030*/              @!P0 LDGSTS.E.BYPASS.128 [R3], [R6.64], P1 ;  /* 0x0000000006037fae */
        /*0040*/                   HMMA.16816.F32 R12, R4, R8, R12 ;        /* 0x00000008040c723c */
        /*0050*/                   HMMA.16816.F32.BF16 R16, R4, R9, R16 ;   /* 0x0000000904107023 */
        /*0060*/                   LDGDEPBAR ;                              /* 0x00000000000079af */
        /*0070*/                   IADD3 R2, R2, 0x20, RZ ;                 /* 0x0000002002027810 */
        /*0080*/              @!UP0 UIADD3 UR4, UR4, 0x1, URZ ;             /* 0x0000000104047890 */
        /*0090*/                   F2FP.F16.F32.PACK_AB R5, R5, R6 ;        /* 0x000000060505723e */
        /*00a0*/              @!P2 BRA 0x200 ;                              /* 0x0000000000002947 */
        /*00b0*/               @P3 BRA 0x10 ;                               /* 0xffffff5000003947 */
        /*00c0*/                   HMMA.1688.F32 R12, R4, R8, R12 ;         /* 0x00000008040c723c */
        /*00d0*/                   MUFU.EX2 R4, R4 ;                        /* 0x0000000400047308 */
        /*00e0*/                   STG.E.128 [R6.64], R12 ;                 /* 0x0000000c06007986 */
        /*00f0*/                   EXIT ;                                   /* 0x000000000000794d */
        /*0200*/                   NANOSLEEP 0x10 ;                         /* 0x000000100000795d */
        /*0210*/               @P2 BRA 0x200 ;                              /* 0xfffffff000002947 */
        /*0220*/                   BRA 0xb0 ;                               /* 0xfffffe8000007947 */
        /*0230*/                   BRA 0x230;                               /* 0xfffffff000007947 */
"""


def test_a_main_loop_is_the_shortest_that_multiplies() -> None:
    body = sass.main_loop(sass.loops(sass.read(ADA)))
    assert (body[0].address, body[-1].address) == (0x10, 0xB0)
    assert sass.mix(body) == {"shared load": 2, "async copy": 1, "matrix": 2, "barrier": 1, "integer": 2, "convert": 1,
                              "branch": 2}  # fmt: skip
    assert sum(map(sass.products, body)) == 2 * 2048 and sum(map(sass.shared_bytes, body)) == 512 + 256 + 512
    assert sass.main_loop([]) == []


# A tile loop around the main one, with a first K step and the epilogue; and the loop of the warp that loads.
HOPPER = """
        /*0100*/                   HGMMA.64x256x16.F32 R24, gdesc[UR12], RZ, !UPT ;
        /*0110*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR10+0x32000], R133 ;
        /*0120*/                   HGMMA.64x256x16.F32 R24, gdesc[UR12], R24 ;
        /*0130*/                   HGMMA.64x256x16.F32 R24, gdesc[UR12], R24, gsb0 ;
        /*0140*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0150*/               @P0 BRA 0x110 ;
        /*0160*/                   UTMASTG.2D [UR8], [UR4] ;
        /*0170*/               @P1 BRA 0x100 ;
        /*0200*/                   UTMALDG.2D [UR16], [UR8], desc[UR6] ;
        /*0210*/               @P1 BRA 0x200 ;
"""


def test_warps_with_roles_have_loops_of_their_own() -> None:
    bodies = sass.loops(sass.read(HOPPER))
    assert [i.address for i in sass.main_loop(bodies)] == [0x110, 0x120, 0x130, 0x140, 0x150]
    assert [[i.address for i in body] for body in sass.innermost(bodies, "TMA load")] == [[0x200, 0x210]]


@pytest.mark.parametrize(
    ("opcode", "operands", "kind", "products", "shared_bytes", "store_bytes"),
    [
        ("HMMA.16816.F16", "R1, R2, R3, R1", "matrix", 2048, 0, 0),
        ("HMMA.1688.F32", "R1, R2, R3, R1", "matrix", 1024, 0, 0),
        # a quarter each of x's 64 x 16 and weight's 128 x 16 elements
        ("HGMMA.64x128x16.F32", "R24, gdesc[UR8], R24, gsb0", "matrix", 32768, 512 + 1024, 0),
        ("HGMMA.64x128x16.F32", "R24, R4, gdesc[UR8], R24", "matrix", 32768, 1024, 0),
        ("LDSM.16.M88", "R4, [R2]", "shared load", 0, 128, 0),
        ("LDSM.16.M88.4", "R4, [R2]", "shared load", 0, 512, 0),
        ("STSM.16.M88.4", "[R2], R4", "shared store", 0, 512, 0),
        ("LDS", "R4, [R2]", "shared load", 0, 128, 0),
        ("LDS.64", "R4, [R2]", "shared load", 0, 256, 0),
        ("STS.128", "[R2], R4", "shared store", 0, 512, 0),
        ("STS.U16", "[R2], R4", "shared store", 0, 64, 0),
        ("LDGSTS.E.BYPASS.LTC128B.128", "[R2], [R4.64]", "async copy", 0, 512, 0),
        ("LDG.E.128", "R4, [R2.64]", "global load", 0, 0, 0),
        ("STG.E.U16", "[R2.64], R4", "global store", 0, 0, 2),
        ("STG.E", "[R2.64], R4", "global store", 0, 0, 4),
        ("UTMALDG.2D", "[UR16], [UR8]", "TMA load", 0, 0, 0),
        ("HFMA2.MMA", "R1, -RZ, RZ, 0, 0", "convert", 0, 0, 0),
        ("F2FP.BF16.F32.PACK_AB", "R1, R2, R3", "convert", 0, 0, 0),
        ("FFMA", "R1, R2, R3, R4", "float", 0, 0, 0),
        ("IMAD.WIDE.U32", "R1, R2, R3, R4", "integer", 0, 0, 0),
        ("ULDC.64", "UR4, c[0x0][0x118]", "integer", 0, 0, 0),
        ("BAR.SYNC.DEFER_BLOCKING", "0x0", "barrier", 0, 0, 0),
        ("NOP", "", "other", 0, 0, 0),
    ],
)
def test_an_instruction(
    opcode: str, operands: str, kind: str, products: int, shared_bytes: int, store_bytes: int
) -> None:
    one = sass.Instruction(0, opcode, operands=operands)
    assert (one.kind, sass.products(one), sass.shared_bytes(one), sass.store_bytes(one)) == (
        kind, products, shared_bytes, store_bytes
    )  # fmt: skip


# ---- chips


@pytest.mark.parametrize(
    ("name", "cycles", "tflops"),
    [
        ("RTX 4090", "mma_cycles", DATASHEET_TFLOPS["RTX 4090"]),
        ("RTX 4090", "mma_cycles_fp16", 330.3),
        ("L40S", "mma_cycles", DATASHEET_TFLOPS["L40S"]),
        ("L4", "mma_cycles", 121),
        ("H100 SXM", "wgmma_cycles", DATASHEET_TFLOPS["H100"]),
        ("H200", "wgmma_cycles", DATASHEET_TFLOPS["H200"]),
        ("H100 SXM", "mma_cycles", 640),  # measured
    ],
)
def test_a_chips_peak_is_its_datasheets(name: str, cycles: str, tflops: float) -> None:
    chip = named(name)
    assert chip.tflops(getattr(chip, cycles)) == pytest.approx(tflops, rel=5e-3)


def test_a_chip_that_is_not_in_the_table() -> None:
    with pytest.raises(BuildError, match=r"^no chip is named 'RTX 4080'; there are RTX 4090, L40S, L4, H100 SXM, H200"):
        named("RTX 4080")
    with pytest.raises(BuildError, match=r"NVIDIA A100.* of these times; name one with --chip"):
        audit.chip_of("NVIDIA A100-SXM4-80GB")
    assert audit.chip_of("NVIDIA H100 80GB HBM3").name == "H100 SXM" and audit.chip_of("NVIDIA H200").name == "H200"
    assert audit.chip_of("NVIDIA L40S").name == "L40S" and audit.chip_of("NVIDIA L4").name == "L4"


def test_an_sm_holds_no_more_blocks_than_its_arch_has() -> None:
    assert ctas_per_sm(LIMITS[89], 1, 16, 0)["all"] == 24


# ---- the model

ADA_X16 = Config(89, "f16", "f16", "f16", False, True, 128, 128, 32, 4, 3, kernel="async", warps_m=2, unit_k=16)
# As compiled: lbg_fused_f16_f16_128x128x32_w4_s3_async.
REPORT = Report(
    symbol=ADA_X16.symbol, arch=89, compiled_arch=89, tile=ADA_X16.tile, warps=4, stages=3, registers=228,
    spill_bytes=0, stack_bytes=0, shared_bytes=49152,
    ctas_per_sm={"registers": 2, "shared": 2, "warps": 12, "all": 2}, stores_per_output=1, stores_in_loop=0,
    store_width_bytes=16, loop_instructions=298, loop_mma=192,
    loop_mix={"matrix": 192, "shared load": 57, "async copy": 24, "integer": 14, "barrier": 9, "branch": 2},
    loop_steps=3.0, loop_shared_bytes=152064, loader_mix={}, other_instructions=1846, mma=192,
    size_bytes=1, seconds=1.0,
)  # fmt: skip
RTX_4090 = REFERENCE[89]
LARGE = 16384, 4096, 4096


def test_what_a_k_step_takes_of_each_unit() -> None:
    step = model.step(ADA_X16, REPORT, RTX_4090)
    cycles = [us * RTX_4090.clock_mhz for us in astuple(step)]
    # 128 * 128 * 32 / 2048 on 4 sub-cores at 32 cycles; 298 slots over 3 steps; bytes over 128; 16 KB over the L2 rate
    assert cycles == pytest.approx([2048, 298 / 3, 152064 / 3 / 128, 16384 / RTX_4090.l2_bytes_per_cycle])
    assert step.sm_us(math.inf) == step.matrix_us < step.sm_us(model.OVERLAP) < step.sm_us(1)
    fp16 = model.step(replace(ADA_X16, fp16_accumulate=True), REPORT, RTX_4090)
    assert fp16.matrix_us == pytest.approx(step.matrix_us / 2)


def test_wgmma_is_told_from_mma_by_its_size() -> None:
    wide = replace(ADA_X16, arch=90, kernel="ws", warps=12, tile_n=256, tile_k=64, epilogue_parts=2)
    report = replace(REPORT, loop_mma=4, loop_steps=1.0)
    chip = REFERENCE[90]
    assert model.mma_cycles(wide, report, chip) == 4 and model.mma_cycles(ADA_X16, REPORT, chip) == chip.mma_cycles
    assert model.step(wide, report, chip).matrix_us * chip.clock_mhz == pytest.approx(128 * 256 * 64 / 2048)


def us(shape: tuple[int, int, int] = LARGE, chip: Any = RTX_4090, config: Config = ADA_X16, **changes: Any) -> float:
    return model.predict(config, replace(REPORT, **changes), chip, *shape).us


def test_more_to_do_takes_longer() -> None:
    for grown in ((32768, 4096, 4096), (16384, 8192, 4096), (16384, 4096, 8192)):
        assert us(grown) > us() * 1.9, grown
    assert us(loop_instructions=3000) > us() and us(loop_shared_bytes=10 * REPORT.loop_shared_bytes) > us()
    assert us(other_instructions=10**5) > us()
    assert us(registers=255, shared_bytes=99 * 1024) > us()  # one CTA an SM


def test_a_better_chip_is_no_slower() -> None:
    for field in ("sm_count", "clock_mhz", "dram_gb_per_s", "l2_bytes_per_cycle"):
        better = replace(RTX_4090, **{field: 2 * getattr(RTX_4090, field)})
        for shape in (LARGE, (16, 4096, 4096), (4097, 4095, 4088)):
            assert us(shape, better) <= us(shape), (field, shape)


@pytest.mark.parametrize(
    ("limiter", "shape", "changes", "chip"),
    [
        ("tensor pipe", LARGE, {}, {}),
        ("issue slots", LARGE, {"loop_instructions": 10**5}, {}),
        ("shared memory", LARGE, {"loop_shared_bytes": 10**7}, {}),
        ("L2", LARGE, {}, {"l2_bytes_per_cycle": 1}),
        ("DRAM", LARGE, {}, {"dram_gb_per_s": 10}),
        ("load latency", (16, 128, 4096), {}, {"dram_latency_us": 10}),
        ("waves and tail", (64, 64, 4096), {}, {}),
        ("launch", (16, 16, 32), {}, {}),
    ],
)  # fmt: skip
def test_a_limiter_has_its_name(
    limiter: str, shape: tuple[int, int, int], changes: dict[str, Any], chip: dict[str, Any]
) -> None:
    found = model.predict(ADA_X16, replace(REPORT, **changes), replace(RTX_4090, **chip), *shape)
    assert found.limiter == limiter and found.shares[limiter] == max(found.shares.values()), found


def test_a_weight_that_l2_does_not_hold_is_read_by_each_group_of_rows() -> None:
    once = 2 * (16384 * 4096 + 4096 * 4096 + 16384 * 4096)
    assert model.dram_bytes(ADA_X16, 256, *LARGE, RTX_4090.l2_holds) == once
    assert model.dram_bytes(ADA_X16, 256, *LARGE, 2**24) == once + 15 * 2 * 4096 * 4096
    # Groups of 4 of a persistent kernel whose rows have 16 tiles; 132 CTAs have two such in flight.
    assert model.dram_bytes(replace(PINGPONG, tile_n=256), 132, *LARGE, 2**24) == once + 15 * 2 * 4096 * 4096


def test_a_ring_reads_the_smaller_operand_for_each_set_of_the_larger_ones_rows_in_flight() -> None:
    k, ring = 4096, replace(RING, tile_n=32, out="f16")
    # (M, N), bytes of the smaller operand, how often it is read if L2 does not hold it: of 128 rows of tiles, of 128
    # columns, 132 CTAs have one in flight; of 512 columns, of 64 rows, two
    for (m, n), smaller, reads in (((8192, 4096), 2 * 4096 * k, 128), ((4096, 16384), 4 * 4096 * k, 512 // 2)):
        once = 4 * m * k + 2 * n * k + 2 * m * n
        assert model.dram_bytes(ring, 132, m, n, k, smaller) == once
        assert model.dram_bytes(ring, 132, m, n, k, smaller - 1) == once + (reads - 1) * smaller


RING = replace(ADA_X16, arch=90, kernel="ring", warps=8, tile_m=64, tile_k=64, x="f32")
PINGPONG = replace(ADA_X16, arch=90, kernel="pingpong", warps=12, tile_n=128, tile_k=64, epilogue_parts=4)
PAIR = replace(PINGPONG, kernel="ws", tile_m=256, tile_n=256, cluster=2)
COSTS = (
    model.Cost(2.0, 1.5, 0.8, 0.3, 0.0, 0.0, 0.0, 0.0, 6930.0),
    model.Cost(1.5, 2.0, 0.2, 0.3, 0.1, 0.2, 0.05, 0.02, 30000.0),
)
SHAPES = (
    (1, 4096, 4096),
    (16, 8, 8),
    (15, 4104, 4088),
    (100, 200, 4112),
    (100, 200, 4128),
    (4097, 4095, 4088),
    LARGE,
    (8192, 8192, 24),
)


def test_the_formula_is_that_of_dispatch(root: Path, tmp_path: Path) -> None:
    program = tmp_path / "predict"
    sources = [root / "tests" / "cpp" / "predict.cpp", root / "csrc" / "dispatch.cpp"]
    subprocess.run(["g++", "-std=c++17", f"-I{root / 'csrc'}", *sources, "-o", program], check=True)
    cases = [(config, cost, ctas, shape, sms, share) for config in (ADA_X16, RING, PINGPONG, PAIR) for cost in COSTS
             for ctas in (1, 3) for shape in SHAPES for sms in (58, 132) for share in (1000, 200_000)]  # fmt: skip
    numbers: list[object] = []
    for config, cost, ctas, shape, sms, share in cases:
        numbers += [ELEMENT_BYTES[dtype] for dtype in (config.x, config.weight, config.out)]
        numbers += [config.tile_m, config.tile_n, config.tile_k, ctas, *astuple(cost), *shape, sms]
        numbers += [int(config.tma), int(config.persistent), share, config.cluster, config.pieces]
    told = subprocess.run([program, *map(str, numbers)], capture_output=True, text=True, check=True).stdout.split()
    mine = [model.predicted_us(config, cost, ctas, *shape, sms, share * sms)
            for config, cost, ctas, shape, sms, share in cases]  # fmt: skip
    assert len(cases) == len(told) and [float(text) for text in told] == pytest.approx(mine, rel=1e-7)


# ---- the command's tables


def artifact(config: Config = ADA_X16, **changes: Any) -> Artifact:
    return Artifact(config, (), {}, Path(), replace(REPORT, symbol=config.symbol, **changes))


GENERIC = replace(ADA_X16, aligned=False, out_aligned=False, kernel="tile", stages=2)
ANY_OUT = replace(ADA_X16, out_aligned=False)
CLASS = [artifact(), artifact(ANY_OUT), artifact(GENERIC)]


@pytest.mark.parametrize(
    ("shape", "chosen"),
    [((128, 128, 64), ADA_X16), ((128, 127, 64), ANY_OUT), ((128, 128, 63), GENERIC), ((128, 127, 63), GENERIC)],
)
def test_the_audit_chooses_as_dispatch_does(shape: tuple[int, int, int], chosen: Config) -> None:
    # the last resorts would be quicker
    quick = {ADA_X16.symbol: 3.0, ANY_OUT.symbol: 2.0, GENERIC.symbol: 1.0}
    assert audit.choose(CLASS, Shape(*shape), RTX_4090, quick).config == chosen


def test_a_chip_of_full_rate_is_asked_for_its_own_costs_and_no_fp16_accumulate() -> None:
    assert [chip.name for chip in CHIPS.values() if chip.full_rate] == ["L40S", "L4"]
    # On 142 SMs tiles of 128x128 leave the last wave all but empty; but smaller ones draw twice as much from L2.
    small = replace(ADA_X16, tile_m=64, tile_n=64, tile_k=64)
    rows = [artifact(), artifact(small, loop_instructions=212, loop_mma=96, other_instructions=800)]
    for chip, chosen in ((replace(RTX_4090, sm_count=142), small), (CHIPS["L40S"], ADA_X16)):
        assert audit.choose(rows, Shape(4096, 4096, 4096), chip).config == chosen, chip
    mode = [artifact(replace(ADA_X16, fp16_accumulate=True))]
    assert [len(audit.audit(mode, chip, [Shape(*LARGE)])["shapes"]) for chip in (RTX_4090, CHIPS["L40S"])] == [1, 0]


def test_what_the_command_says() -> None:
    found = audit.audit(CLASS, RTX_4090, [Shape(*LARGE), Shape(16, 4096, 4096)])
    text = audit.said(found, RTX_4090)
    assert "predicted from machine code" in text and "nothing below was measured on it" in text
    assert "assumptions: l2_bytes_per_cycle, dram_latency_us, launch_us" in text
    assert "holds          bytes spilt: 0; 2 of 2, values 0 to 0" in text
    assert found["shapes"][0]["limiter"] == "tensor pipe" and found["shapes"][0]["kernel"] == ADA_X16.symbol
    assert found["kernels"][0]["limited by"] == ["registers", "shared"] and json.dumps(found)


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({}, []),
        ({"spill_bytes": 8}, ["bytes spilt"]),
        ({"loop_steps": 2.5}, ["matrix instructions, of those that whole K steps need"]),
        ({"loop_instructions": 192 + 192 * 17}, ["other issue slots, of the matrix instructions' cycles"]),
    ],
)
def test_a_target_that_a_kernel_misses(changes: dict[str, Any], missed: list[str]) -> None:
    assert [t.what for t in audit.targets(artifact(**changes), RTX_4090) if not t.holds] == missed


def test_two_stages_need_a_second_cta() -> None:
    lone = artifact(replace(ADA_X16, stages=2), shared_bytes=99 * 1024)
    assert [t.what for t in audit.targets(lone, RTX_4090) if not t.holds] == ["CTAs an SM, or else 3 stages"]


# ---- against measured times


@pytest.mark.parametrize(
    ("a", "b", "found"),
    [([1, 2, 3], [10, 20, 30], 1), ([1, 2, 3], [3, 2, 1], -1), ([1, 1, 2], [1, 1, 5], 1), ([1, 1], [1, 2], 0),
     ([1, 2, 3, 4], [1, 3, 2, 4], 0.8)],
)  # fmt: skip
def test_rank_correlation(a: list[float], b: list[float], found: float) -> None:
    assert audit.spearman(a, b) == pytest.approx(found)


def measured(times: dict[str, float]) -> dict[str, Any]:
    kernels = {symbol: {"registers": 228, "shared_bytes": 49152} for symbol in times}
    rows = [{"m": 128, "n": 128, "k": 64, "symbol": symbol, "us": us} for symbol, us in times.items()]
    facts = {"gpu": "NVIDIA H200", "date": "2026-11-24", "kernels": "sm_89 on sm_90"}
    return {"facts": facts, "kernels": kernels, "times": rows + rows[:1]}


def test_what_a_pick_by_the_model_costs() -> None:
    slow = replace(ADA_X16, tile_m=16)  # the same report: as many instructions for fewer rows
    data = measured({ADA_X16.symbol: 6.0, slow.symbol: 5.0, "gone": 1.0})
    picked = audit.against(data, [artifact(), artifact(slow)], CHIPS["H200"])
    assert picked["left out"] == ["gone"] and picked["all shapes"]["times"] == 2
    expected = 0.2 if us((128, 128, 64), CHIPS["H200"]) < us((128, 128, 64), CHIPS["H200"], slow) else 0.0
    assert picked["all shapes"]["regret, median"] == pytest.approx(expected)
    assert "Measured: on NVIDIA H200" in audit.said_against(picked)


def test_a_tuners_journal_is_times_too() -> None:
    key, rows = Key("NVIDIA H200", "580", "abc"), {ADA_X16.symbol: {"registers": 228, "shared_bytes": 49152}}
    timed = Timed("x16", "rows", "128x128x64", {ADA_X16.symbol: 6.0})
    record = Record(Head(key, 89, 90, 132, {"gpu": "NVIDIA H200"}, rows), (timed,), {})
    picked = audit.against(audit.journaled(record), [artifact()], CHIPS["H200"])
    assert (picked["all shapes"]["times"], picked["all shapes"]["regret, worst"]) == (1, 0.0)


def test_times_of_other_kernels_are_refused() -> None:
    data = measured({ADA_X16.symbol: 6.0})
    with pytest.raises(BuildError, match=rf"^{ADA_X16.symbol} was measured with 228 registers and 49152 bytes"):
        audit.against(data, [artifact(registers=200)], CHIPS["H200"])
