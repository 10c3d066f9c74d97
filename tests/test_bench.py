"""The benchmark without a GPU: arithmetic, tables, JSON, plots, and which peers are left out."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from aot import BuildError
from tests.bench import __main__ as bench
from tests.bench import overheads, peers, records, tables
from tests.bench.peers import Peer
from tests.bench.records import LIMIT, OURS, PEER, Prediction, Report, Shape, Skipped, Timing

BIG, SMALL, RAGGED = Shape(4096, 4096, 4096), Shape(16, 4096, 4096), Shape(4097, 4095, 4088)
# Microseconds at BIG, SMALL and RAGGED; None where it could not run.
TIMES: dict[tuple[str, str, str, str], tuple[float | None, ...]] = {
    ("lbg float16", OURS, "float16", "float16"): (200, 10, 1000),
    ("lbg float32", OURS, "float32", "float32"): (300, 20, 2000),
    ("cuBLAS", LIMIT, "float16", "float16"): (100, 8, 800),
    ("eager", PEER, "float16", "float16"): (400, 30, 500),
    ("compile", PEER, "float16", "float16"): (300, 40, None),
    ("autocast eager", PEER, "float32", "float16"): (600, 40, 4000),
}


@pytest.fixture
def report() -> Report:
    facts = dict.fromkeys(("driver", "clocks", "power limit", "torch", "cuda", "triton, of the peers", "python"), "0")
    facts |= {"gpu": "NVIDIA H200", "kernels": "sm_89 on sm_90", "lbg": "0.1.0", "commit": "abc", "date": "2026-01-01"}
    found = Report(facts, 4000.0, [BIG, SMALL, RAGGED])
    for (peer, kind, x, out), times in TIMES.items():
        for shape, us in zip(found.shapes, times):
            if us is not None:
                warm = us / 2 if shape == SMALL else None
                error = None if kind == LIMIT else 1e-4
                found.timings.append(
                    Timing(peer, kind, x, out, shape, us, us - 1, us + 1, warm, error, "lbg_fused_any")
                )
    found.skipped = [Skipped("compile", str(RAGGED), "no C compiler"), Skipped("compile", "1x1x1", "no C compiler")]
    found.predictions = [Prediction("RTX 4090", BIG, "lbg_fused_89", 924.8)]
    found.accumulation = {"float32": {1024: 1e-6, 4096: 4e-6}, "fp16_accumulate": {1024: 3e-4}}
    found.first_result_ms = {"lbg": 1.25, "compile": 7888.0}
    found.host_us = {"lbg.fused": 13.5, "eager": 80.0}
    return found


def row(table: str, *cells: str) -> list[str]:
    """The one row of a table that starts with these cells."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    found = [row for row in rows if row[: len(cells)] == list(cells)]
    assert len(found) == 1, f"{cells} is in {len(found)} rows of\n{table}"
    return found[0]


# ---- arithmetic


def test_shape_from_text_and_back() -> None:
    assert Shape.parse("16384x4096x512") == Shape(16384, 4096, 512)
    assert str(Shape.parse("1x2x3")) == "1x2x3"
    assert Shape(3, 5, 7).flop == 210
    assert Shape(3, 5, 7).least_bytes(x_bytes=4, out_bytes=2) == 3 * 7 * 4 + 5 * 7 * 2 + 3 * 5 * 2


@pytest.mark.parametrize("text", ["", "1x2", "1x2x3x4", "axbxc", "0x1x1", "-1x2x3", "1x2x3x"])
def test_what_is_no_shape_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a shape is MxNxK"):
        Shape.parse(text)


def test_geometric_mean_leaves_out_what_is_missing() -> None:
    assert records.geometric_mean([2.0, 8.0, None]) == pytest.approx(4.0)
    assert records.geometric_mean([None]) is None


def test_limits_in_microseconds() -> None:
    shape = Shape(1000, 1000, 1000)
    assert records.tensor_limit_us(shape, tflops=2.0) == pytest.approx(1000)  # 2e9 FLOP at 2e12 a second
    assert records.memory_limit_us(shape, 2, 4, gb_per_s=8.0) == pytest.approx(1000)  # 8e6 bytes at 8e9 a second
    assert records.weight_read_us(shape, gb_per_s=2.0) == pytest.approx(1000)


@pytest.mark.parametrize(
    ("gpu", "expected"),
    [
        ("NVIDIA GeForce RTX 4090", (165.2, "datasheet")),
        ("NVIDIA GH200 480GB", (989.4, "datasheet")),
        ("NVIDIA H100 PCIe", (756.5, "datasheet")),
    ],
)
def test_tensor_limit_of_known_gpus(report: Report, gpu: str, expected: tuple[float, str]) -> None:
    report.facts["gpu"] = gpu
    assert records.tensor_tflops(report) == expected


def test_tensor_limit_of_an_unknown_gpu_is_the_best_of_the_run(report: Report) -> None:
    report.facts["gpu"] = "a card of next year"
    rate, source = records.tensor_tflops(report)
    assert rate == pytest.approx(BIG.flop / 100e-6 / 1e12)
    assert source == "best of this run"


def test_best_peer_is_neither_ours_nor_a_limit(report: Report) -> None:
    best = [report.best_peer(shape, "float16") for shape in report.shapes]
    assert [timing.peer if timing else None for timing in best] == ["compile", "eager", "eager"]
    assert report.best_peer(BIG, "bfloat16") is None


# ---- text


def test_main_table(report: Report) -> None:
    table = tables.main_table(report)
    assert row(table, str(BIG), "float16 to float16")[2:] == ["200.0", "-", "300.0", "compile", "1.50", "100.0", "2.00"]
    assert row(table, str(SMALL), "float16 to float16")[2:6] == ["10.0", "5.00", "30.0", "eager"]
    assert row(table, str(BIG), "float32 to float32")[5:] == ["autocast eager", "2.00", "-", "-"]
    means = row(table, "geometric mean", "float16 to float16")
    assert means[6] == f"{math.prod((1.5, 3, 0.5)) ** (1 / 3):.2f}"
    assert means[8] == f"{math.prod((2, 1.25, 1.25)) ** (1 / 3):.2f}"


def test_headline_counts_shapes(report: Report) -> None:
    assert tables.ahead_of_every_peer(report) == (
        "Faster than every peer of the same x: lbg float16 at 2 of 3 shapes, lbg float32 at 3 of 3 shapes."
    )


def test_small_rows_against_the_weights_read(report: Report) -> None:
    read_us = 2 * 4096 * 4096 / 4000e9 * 1e6
    assert row(tables.small_rows(report), str(SMALL))[3:5] == [f"{read_us:.2f}", f"{10 / read_us:.2f}"]


def test_ragged_is_compared_by_the_flop(report: Report) -> None:
    found = row(tables.ragged(report), str(RAGGED), "lbg float16")
    assert found[-1] == f"{1000 / 200 * BIG.flop / RAGGED.flop:.2f}"


def test_accumulation_growth(report: Report) -> None:
    table = tables.accumulation(report)
    assert row(table, "4096") == ["4096", "4.00e-06", "-", "4.00", "-", "2.00"]


def test_what_is_left_out_is_named_once_with_the_reason(report: Report) -> None:
    assert row(tables.skipped(report), "compile") == ["compile", f"{RAGGED}, 1x1x1", "no C compiler"]


def test_page_has_everything(report: Report) -> None:
    page = tables.page(report, "stem")
    assert page.startswith("# NVIDIA H200, sm_89 on sm_90 kernels\n")
    for text in ("stem-shapes.png", "stem-rows.png", "stem-host.png", "abc", "7888.0", "924.8", "no C compiler"):
        assert text in page, text


def test_file_stem(report: Report) -> None:
    assert records.file_stem(report.facts) == "nvidia-h200-sm_89-on-sm_90"


@pytest.mark.parametrize(("kernels", "arch"), [("sm_89", 89), ("sm_90", 90)])
def test_a_run_is_evidence_for_its_arch(
    report: Report, kernels: str, arch: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    written: list[tuple[object, ...]] = []
    monkeypatch.setattr(records, "write_section", lambda *arguments: written.append(arguments))
    report.facts["kernels"] = kernels
    report.skipped = [Skipped("original kernel", "everywhere", f"{Path.home()}/kernels holds none")]
    records.write_evidence(tmp_path, "benchmark", asdict(report))
    ((*place, data),) = written
    assert place == [tmp_path, arch, "benchmark"]
    assert data["skipped"][0]["reason"] == "~/kernels holds none"  # type: ignore[index]


def test_a_verification_build_is_no_evidence(report: Report) -> None:
    with pytest.raises(BuildError, match="takes runs of kernels on their own arch; these are sm_89's on sm_90"):
        records.evidence_arch(report.facts)


# ---- records and pictures


def test_json_round_trip(report: Report, tmp_path: Path) -> None:
    report.write(tmp_path / "report.json")
    assert Report.read(tmp_path / "report.json") == report


def test_plots(report: Report, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from tests.bench import plots

    drawn = plots.draw(report, tmp_path / "stem")
    assert [path.name for path in drawn] == ["stem-shapes.png", "stem-rows.png", "stem-host.png"]
    for path in drawn:
        assert path.read_bytes().startswith(b"\x89PNG")
    assert plots.draw(Report(report.facts, 1.0), tmp_path / "empty") == []


def test_every_peer_has_a_colour_and_a_marker_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from tests.bench import plots

    monkeypatch.setattr(peers, "archs", lambda: (90, 90))
    for x, _ in plots.PANELS:
        names = [peer.name for peer in peers.all_peers(None) if str(peer.x) == f"torch.{x}"]
        styles = [plots.STYLES[name] for name in names]
        assert len(set(styles)) == len(names), f"two of {names} look the same"


# ---- which peers run


@pytest.fixture
def everyone(monkeypatch: pytest.MonkeyPatch) -> list[Peer]:
    """All peers of a machine without triton and without the original."""
    monkeypatch.setattr(peers, "archs", lambda: (90, 90))
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    return peers.all_peers(None)


def test_peers_that_cannot_run_are_named_with_the_reason(everyone: list[Peer]) -> None:
    chosen, skipped = bench.selected(everyone, None)
    reasons = {row.peer: row.reason for row in skipped}
    assert reasons["compile max"] == "torch.compile needs triton, which is not installed"
    assert reasons["original kernel"] == "no --original given"
    assert {peer.name for peer in chosen} == {peer.name for peer in everyone} - set(reasons)


def test_ours_and_the_limits_always_run(everyone: list[Peer]) -> None:
    chosen, skipped = bench.selected(everyone, ["eager"])
    assert [peer.name for peer in chosen if peer.kind == PEER] == ["eager"]
    assert {peer.name for peer in chosen if peer.kind != PEER} == {p.name for p in everyone if p.kind != PEER}
    assert skipped == []


def test_an_unknown_peer_is_refused_with_the_names_there_are(everyone: list[Peer]) -> None:
    with pytest.raises(SystemExit, match="no peer is called 'egaer'; there are 'eager'"):
        bench.selected(everyone, ["egaer"])


def test_the_original_without_a_fitting_kernel(tmp_path: Path) -> None:
    kernels, why_not = peers.original.load(tmp_path, 89, 90)
    assert kernels == []
    assert why_not == f"{tmp_path} holds no kernel compiled for sm_89 to run on sm_90"


@pytest.mark.parametrize("shape", [Shape(1, 16, 16), Shape(16, 8, 16), Shape(16, 16, 24)])
def test_the_original_is_not_asked_for_sizes_it_was_not_compiled_for(shape: Shape) -> None:
    with pytest.raises(ValueError, match="divisible by 16"):
        peers.original.check_sizes(shape)


def test_predictions_are_of_the_4090(report: Report) -> None:
    if not any(config.arch == 89 for config in peers.lbg.configs()):
        pytest.skip("this wheel ships no sm_89 kernel")
    found = bench.predictions([BIG])
    assert [(row.gpu, row.shape) for row in found] == [("RTX 4090", BIG)]
    assert found[0].us > records.tensor_limit_us(BIG, records.DATASHEET_TFLOPS["RTX 4090"])


# ---- what is computed


@pytest.mark.parametrize("function", [peers.four_ops, peers.epilogue_])
def test_peers_compute_the_same_function(function: object) -> None:
    """Against lbg on the CPU, in float32."""
    torch.manual_seed(0)
    x, weight, (bias, mean, beta) = torch.randn(5, 7), torch.randn(3, 7), torch.randn(3, 3)
    variance, gamma = 0.5 + torch.rand(3), torch.rand(3)
    fold = peers.lbg.fold(bias, mean, variance, gamma, beta, peers.EPS)
    expected = peers.cases.activation(x @ weight.T * fold[0] + fold[1])
    if function is peers.four_ops:
        result = peers.four_ops(x, weight, bias, mean, variance, gamma, beta)
    else:
        result = peers.epilogue_(x @ weight.T, *fold)
    torch.testing.assert_close(result, expected)


def test_a_wrong_result_is_refused() -> None:
    peer = Peer("eager", PEER, torch.float16, torch.float16, make=lambda inputs: None)  # type: ignore[arg-type]

    class Stub:
        shape = Shape(2, 2, 2)

        def error(self, result: torch.Tensor, x: torch.dtype) -> float:
            return 0.5 if result.sum() else 1e-4

    right, wrong = torch.zeros(2, 2, dtype=torch.float16), torch.ones(2, 2, dtype=torch.float16)
    assert bench.check(peer, Stub(), right) == 1e-4  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"eager is wrong: relative error 5.0e-01"):
        bench.check(peer, Stub(), wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"eager gave \[2, 2\], torch.float32"):
        bench.check(peer, Stub(), right.float())  # type: ignore[arg-type]
    assert bench.check(replace(peer, kind=LIMIT), Stub(), wrong) is None  # type: ignore[arg-type]


def test_a_new_process_is_a_complete_program() -> None:
    for body in (overheads.LBG, overheads.EAGER, overheads.COMPILE, overheads.ORIGINAL.format(path="program.py")):
        compile(overheads.PROCESS.format(body=body, imports="import lbg", after=""), "process.py", "exec")
