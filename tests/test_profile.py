"""The profile without a GPU: ncu's CSV, which metrics are asked for, the table, the page, and what is said of failures.

A small program stands in for ncu: it takes ncu's command line and writes what ncu would.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from aot import BuildError
from tests.bench import peers, profile, records
from tests.bench.profile import CONFLICTS, LDGSTS, LDSM, LOADS, METRICS, PER_INSTRUCTION, STORES, Launch, Profile
from tests.bench.records import Shape, Skipped

BIG, SMALL = profile.SHAPES
OURS = "lbg_fused_f16_f32_128x128x32_w4_s3_async"
THEIRS = "fused_linear_bn_gelu_relu_kernel"
# Three metrics, as `ncu --csv --page raw` writes them, between its own messages and the program's output.
CSV = f"""==PROF== Connected to process 4711 (/usr/bin/python3.12)
a line of the program's
==PROF== Profiling "{OURS}" - 0: 0%....50%....100% - 19 passes
==PROF== Disconnected from process 4711
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Device","CC","dram__bytes_read.sum",\
"gpu__time_duration.sum","launch__grid_size","sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active"
"","","","","","","","","Mbyte","nsecond","","%"
"0","4711","python3.12","host","{OURS}","1","0","8.9","1,234.5","3,456,789","4,096","91.25"
"1","4711","python3.12","host","{THEIRS}(int, int)","1","0","8.9","2.5","1,000","16,384","n/a"
"""
KNOWN = {name.partition(".")[0] for metric in METRICS for name in metric.names}


def launched(shape: Shape, of: str, kernel: str, counters: dict[str, float | None]) -> Launch:
    return Launch(shape, of, "float16", "float32", kernel, "", 1e-6, counters)


@pytest.fixture
def found() -> Profile:
    """Every row has its place in METRICS as its value; the second kernel has no tensor pipe."""
    values: dict[str, float | None] = {metric.label: float(place) for place, metric in enumerate(METRICS)}
    ours = values | profile.derived(values)
    theirs = ours | {"tensor pipe, % of active cycles": None, "duration, us": 2745.4}
    launches = [
        launched(BIG, "lbg float16", OURS, ours),
        launched(BIG, "original kernel", THEIRS, theirs),
        launched(SMALL, "lbg float16", OURS, ours),
    ]
    facts = {"gpu": "NVIDIA H200", "kernels": "sm_90", "lbg": "0.1.0"}
    return Profile(facts, "2025.3.1", profile.chosen(KNOWN), launches, [Skipped("lbg x", "everywhere", "no kernel")])


def cells(table: str, label: str) -> list[str]:
    """What stands behind a label in a table."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    (row,) = [row[1:] for row in rows if row[0] == label]
    return row


# ---- what ncu writes


def test_csv_is_read_between_messages() -> None:
    (ours, counters), (theirs, others) = profile.parse(CSV)
    assert (ours, theirs) == (OURS, f"{THEIRS}(int, int)")
    assert counters["dram__bytes_read.sum"] == pytest.approx(1234.5e6)
    assert counters["gpu__time_duration.sum"] == pytest.approx(3456.789)  # us
    assert counters["launch__grid_size"] == 4096 and others["launch__grid_size"] == 16384
    assert others["sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active"] is None


def test_nothing_of_the_machine_is_read() -> None:
    assert not {"Host Name", "Process Name", "Process ID"} & {name for _, row in profile.parse(CSV) for name in row}


@pytest.mark.parametrize(
    ("text", "unit", "value"),
    [
        ("1,234,567", "", 1234567),
        ("0.5", "msecond", 500),
        ("2", "s", 2e6),
        ("800", "ns", 0.8),
        ("1.75", "cycle/nsecond", 1.75e9),
        ("1,755,000,000", "hz", 1.755e9),
        ("1.8", "Ghz", 1.8e9),
        ("49.15", "Kbyte/block", 49150),
        ("168", "register/thread", 168),
        ("55.49", "%", 55.49),
        ("n/a", "%", None),
        ("nan", "%", None),
        ("", "", None),
    ],
)
def test_numbers_come_in_one_unit_a_kind(text: str, unit: str, value: float | None) -> None:
    assert profile.number(text, unit) == (value if value is None else pytest.approx(value))


@pytest.mark.parametrize("text", ["", "==PROF== Connected\n", CSV.partition('"0","4711"')[0]])
def test_output_without_a_kernel_is_refused(text: str) -> None:
    with pytest.raises(BuildError, match="ncu saw no kernel"):
        profile.parse(text)


def test_launches_get_the_counters_of_their_place() -> None:
    names = {"grid": "launch__grid_size", "not here": None, "not written": "sm__throughput.avg"}
    launches = [launched(BIG, "lbg float16", OURS, {}), launched(BIG, "original kernel", THEIRS, {})]
    full = profile.joined(launches, profile.parse(CSV), names)
    assert [launch.counters["grid"] for launch in full] == [4096, 16384]
    assert full[0].counters["not written"] is None and "not here" not in full[0].counters
    assert [replace(launch, counters={}) for launch in full] == launches


@pytest.mark.parametrize("kernels", [(OURS,), (THEIRS, OURS), (OURS, THEIRS, OURS)], ids=["few", "order", "many"])
def test_other_kernels_than_were_launched_are_refused(kernels: tuple[str, ...]) -> None:
    launches = [launched(BIG, "lbg float16", kernel, {}) for kernel in kernels]
    with pytest.raises(BuildError, match=f"ncu saw {OURS}, .*; launched were {', '.join(kernels)}"):
        profile.joined(launches, profile.parse(CSV), {})


@pytest.mark.parametrize(
    ("instructions", "conflicts", "ratio"),
    [((10.0, 20.0, 30.0, 40.0), 50.0, 0.5), ((10.0, None, 30.0, 40.0), 50.0, None), ((0.0,) * 4, 0.0, None),
     ((1.0, 0.0, 0.0, 0.0), None, None)],
    ids=["all", "one is not counted", "no instruction", "no conflicts counted"],
)  # fmt: skip
def test_conflicts_an_instruction(
    instructions: tuple[float | None, ...], conflicts: float | None, ratio: float | None
) -> None:
    counters = dict(zip((LOADS, STORES, LDSM, LDGSTS), instructions)) | {CONFLICTS: conflicts}
    assert profile.derived(counters) == {PER_INSTRUCTION: ratio}


# ---- what ncu is asked for


TENSOR = "tensor pipe, % of active cycles"


@pytest.mark.parametrize(
    ("known", "name"),
    [
        ({"sm__pipe_tensor_cycles_active", "sm__pipe_tensor_op_hmma_cycles_active"}, "sm__pipe_tensor_cycles_active"),
        ({"sm__pipe_tensor_op_hmma_cycles_active"}, "sm__pipe_tensor_op_hmma_cycles_active"),
        ({"sm__inst_executed_pipe_tensor", "sm__throughput"}, "sm__inst_executed_pipe_tensor"),
        (set(), None),
    ],
)
def test_the_first_metric_that_the_gpu_has_is_taken(known: set[str], name: str | None) -> None:
    assert profile.chosen(known)[TENSOR] == (name and f"{name}.avg.pct_of_peak_sustained_active")


def test_the_users_five_and_those_of_the_launch_are_always_asked_for() -> None:
    names = profile.chosen(set())
    assert [names[name] for name in profile.USERS] == list(profile.USERS)
    assert names["registers a thread"] == "launch__registers_per_thread"
    assert names["duration, us"] is None


def test_labels_are_told_apart() -> None:
    assert len({metric.label for metric in METRICS} | {PER_INSTRUCTION}) == len(METRICS) + 1
    assert set(profile.USERS) < {metric.label for metric in METRICS}


def test_command_line() -> None:
    words = profile.command(Path("/ncu"), ["a__b.sum", "c__d"], Path("/log"), ["python", "-m", "x"])
    options = dict(zip(words[2::2], words[3::2]))
    assert words[:2] == [Path("/ncu"), "--csv"] and words[-3:] == ["python", "-m", "x"]
    assert options["--metrics"] == "a__b.sum,c__d" and options["--log-file"] == Path("/log")
    assert options["--page"] == "raw" and options["--profile-from-start"] == "off"
    assert options["--clock-control"] == "none", "whose lock needs leave to change the GPU's settings"


# ---- text


def test_table_has_a_column_a_kernel_and_the_users(found: Profile) -> None:
    table = profile.table(found, BIG)
    assert cells(table, "") == ["lbg float16", "original kernel", profile.USERS_COLUMN]
    assert cells(table, "launch__grid_size") == ["1", "1", "16384"]
    assert cells(table, "sm__throughput.avg.pct_of_peak_sustained_elapsed") == ["0.00", "0.00", "11.48"]
    assert cells(table, "duration, us")[1:] == ["2745", "-"]
    assert cells(table, TENSOR)[1:] == ["-", "-"]


def test_the_users_numbers_stand_at_their_shape_alone(found: Profile) -> None:
    assert cells(profile.table(found, SMALL), "") == ["lbg float16"]


def test_conflicts_an_instruction_stand_in_the_table(found: Profile) -> None:
    places = {metric.label: place for place, metric in enumerate(METRICS)}
    ratio = places[CONFLICTS] / sum(places[label] for label in (LOADS, STORES, LDSM, LDGSTS))
    assert cells(profile.table(found, BIG), PER_INSTRUCTION) == [f"{ratio:.3f}", f"{ratio:.3f}", "-"]


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(None, "%", "-"), (91.254, "%", "91.25"), (803.44, "us", "803.4"), (1.755e9, "MHz", "1755"),
     (134.2e6, "MB", "134.2"), (98304.0, "KB", "98.3"), (16384.0, "", "16384"), (0.97, "waves", "0.97")],
)  # fmt: skip
def test_cells(value: float | None, unit: str, text: str) -> None:
    assert profile.cell(value, unit) == text


def test_page_has_everything(found: Profile) -> None:
    page = profile.page(found)
    assert page.startswith("# NVIDIA H200, sm_90 kernels, profile\n")
    for text in (str(BIG), str(SMALL), OURS, THEIRS, "2025.3.1", "`gpu__time_duration.sum`", "no kernel", "55.49"):
        assert text in page, text
    assert "those five are what the user of this project measured of the original program, on an RTX 4090" in page
    assert "## Not on this GPU\n\nNothing." in page and "verification" not in page


def test_page_says_what_the_gpu_does_not_have(found: Profile) -> None:
    for launch in found.launches:
        launch.counters[TENSOR] = None  # type: ignore[index]
        launch.counters.pop("L2, % of peak", None)  # type: ignore[attr-defined]
    found.names["L2, % of peak"] = None
    assert profile.missing(found) == [TENSOR, "L2, % of peak"]
    page = profile.page(found)
    assert f"## Not on this GPU\n\n{TENSOR}, L2, % of peak" in page and "\n| L2, % of peak" not in page


def test_page_of_a_verification_build_claims_nothing_of_ada(found: Profile) -> None:
    page = profile.page(replace(found, facts=found.facts | {"kernels": "sm_89 on sm_90"}))
    assert "the PTX of the sm_89 kernels" in page and "what they do on their own GPUs is not" in page


# ---- failures in words


def failed(stdout: str = "", stderr: str = "", code: int = 1) -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess([], code, stdout, stderr)


@pytest.mark.parametrize(
    ("done", "log", "message"),
    [
        (failed(), "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission", "NVreg_RestrictProfilingToAdmin"),
        (failed("Device X\n==ERROR== ERR_NVGPUCTRPERM - The user"), "", "--cap-add=SYS_ADMIN"),
        (failed("==ERROR== No device found.\n"), "", "ncu: No device found."),
        (failed(), "==ERROR== A driver resource was unavailable.\n", "ncu: A driver resource was unavailable."),
        (failed(stderr="Traceback\nlbg float16 is wrong: relative error 5.0e-01\n"),
         "==ERROR== The application returned an error code (1).\n", "lbg float16 is wrong: relative error 5.0e-01"),
        (failed(code=7), "==PROF== Connected\n", "ncu ended with exit code 7 and counted nothing"),
    ],
    ids=["permission", "permission, asked for metrics", "ncu's own", "in the log", "the program's", "silence"],
)  # fmt: skip
def test_failures_are_explained(done: subprocess.CompletedProcess[str], log: str, message: str) -> None:
    assert message in profile.explained(done, log)


def test_no_ncu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(profile.shutil, "which", lambda name: None)
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter(()))
    assert profile.main([]) == 1
    assert "profile: missing tool: ncu (NVIDIA Nsight Compute" in capsys.readouterr().err
    with pytest.raises(BuildError, match="is no program"):
        profile.find_ncu(tmp_path / "nothing")


def test_no_gpu(stand_in: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert profile.main(["--ncu", str(stand_in)]) == 1
    assert "profile: a profile needs a CUDA GPU" in capsys.readouterr().err


# ---- the parent from end to end

STAND_IN = """#!/usr/bin/env python3
import json, sys
from pathlib import Path
words = sys.argv[1:]
told = json.loads(Path(__file__).with_name("told.json").read_text())
if words == ["--query-metrics"]:
    print("Device NVIDIA H200 (GH100)\\n----- ----")
    print("\\n".join(f"{name:<40} Counter  what it is" for name in told["known"]))
elif words == ["--version"]:
    print("NVIDIA (R) Nsight Compute Command Line Profiler\\nVersion 2025.3.1.0 (build 1)")
else:
    child = words[words.index("-m") + 1 :]
    Path(__file__).with_name("child.json").write_text(json.dumps(child))
    asked = words[words.index("--metrics") + 1].split(",")
    head = ["ID", "Process Name", "Host Name", "Kernel Name", *asked]
    rows = [head, [""] * len(head)]
    rows += [[str(i), "python", "host", kernel, *["1,000"] * len(asked)] for i, kernel in enumerate(told["kernels"])]
    lines = ["==PROF== Connected to process 1", *(",".join(f'"{word}"' for word in row) for row in rows)]
    Path(words[words.index("--log-file") + 1]).write_text("\\n".join(told["log"] or lines) + "\\n")
    if told["manifest"]:
        Path(child[1]).write_text(json.dumps(told["manifest"]))
    print(told["stderr"], file=sys.stderr)
    sys.exit(told["code"])
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "ncu"
    path.write_text(STAND_IN)
    path.chmod(0o755)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return path


@pytest.fixture
def tell(stand_in: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Tells the stand-in what to write; returns the arguments of a profile that runs it."""

    def told(of: str = "sm_90", **others: object) -> list[str]:
        launches = [{**vars(launched(shape, "lbg float16", OURS, {})), "shape": vars(shape)} for shape in (BIG, SMALL)]
        skipped = [{"peer": "original kernel", "where": "everywhere", "reason": f"{Path.home()}/model.py: no"}]
        facts = {"gpu": "NVIDIA H200", "kernels": of, "date": "2026-01-01"}
        manifest = {"facts": facts, "launches": launches, "skipped": skipped}
        saying = {"known": sorted(KNOWN - {"lts__throughput", "lts__t_sectors"}), "kernels": [OURS, OURS], "log": None,
                  "manifest": manifest, "stderr": "", "code": 0}  # fmt: skip
        tmp_path.joinpath("told.json").write_text(json.dumps(saying | others))
        return ["--ncu", str(stand_in), "--out", str(tmp_path / "out"), "--evidence", "evidence.json"]

    return told


@pytest.fixture
def sections(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """What would be written into a file of evidence: (file, arch, section, data) each time."""
    written: list[tuple[object, ...]] = []
    monkeypatch.setattr(records, "write_section", lambda *arguments: written.append(arguments))
    return written


@pytest.mark.usefixtures("sections")
def test_a_profile(tell: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert profile.main(tell() + ["--original", "model.py", "--commit", "abc"]) == 0
    said = capsys.readouterr().out
    assert "| launch__grid_size " in said and "not on this GPU: L2, % of peak\n" in said
    written = sorted(path.name for path in tmp_path.joinpath("out").iterdir())
    assert written == ["nvidia-h200-sm_90-profile.json", "nvidia-h200-sm_90-profile.md"]
    numbers = json.loads(tmp_path.joinpath("out", written[0]).read_text())
    assert numbers["ncu"] == "2025.3.1.0" and numbers["launches"][1]["counters"]["launch__grid_size"] == 1000
    child = json.loads(tmp_path.joinpath("child.json").read_text())
    assert child[0] == "tests.bench.launches"
    assert child[2:] == ["--original", str(Path("model.py").resolve()), "--commit", "abc",
                         "--shapes", str(BIG), str(SMALL)]  # fmt: skip


def test_evidence_names_no_home(tell: Callable[..., list[str]], sections: list[tuple[object, ...]]) -> None:
    arguments = tell()
    assert profile.main(arguments) == 0
    ((path, arch, section, data),) = sections
    assert (str(path), arch, section) == (arguments[-1], 90, "profile")
    assert data["skipped"][0]["reason"] == "~/model.py: no"  # type: ignore[index]
    assert '"host"' not in json.dumps(data)


def test_a_verification_build_is_no_evidence(
    tell: Callable[..., list[str]],
    sections: list[tuple[object, ...]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert profile.main(tell(of="sm_89 on sm_90")) == 1
    assert "these are sm_89's on sm_90" in capsys.readouterr().err
    assert sections == []
    assert tmp_path.joinpath("out", "nvidia-h200-sm_89-on-sm_90-profile.md").exists()


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"known": []}, "counted nothing"),
        ({"kernels": [OURS, THEIRS]}, "What ncu wrote is in"),
        ({"log": ["==ERROR== ERR_NVGPUCTRPERM - no"], "code": 1}, "NVreg_RestrictProfilingToAdminUsers=0"),
        ({"log": ["==ERROR== ERR_NVGPUCTRPERM - no"]}, "NVreg_RestrictProfilingToAdminUsers=0"),
        ({"manifest": None, "code": 1, "stderr": "lbg ships no kernel for X"}, "profile: lbg ships no kernel for X"),
    ],
    ids=["no metrics", "another kernel", "permission", "permission, exit code 0", "the program's"],
)
def test_a_profile_that_fails_says_why(
    others: dict[str, object], message: str, tell: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert profile.main(tell(**others)) == 1
    assert message in capsys.readouterr().err


# ---- what is launched


def test_what_is_profiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from tests.bench import launches

    *ours, acc16, theirs = launches.PROFILED
    for arch, names, left_out in ((89, [*ours, acc16], [theirs]), (90, ours, [theirs, acc16])):
        for module in (peers, launches):
            monkeypatch.setattr(module, "archs", lambda arch=arch: (arch, arch))
        chosen, skipped = launches.profiled(tmp_path)
        assert [peer.name for peer in chosen] == names
        assert [row.peer for row in skipped] == left_out
        assert f"holds no kernel compiled for sm_{arch}" in skipped[0].reason


def test_a_launch_is_checked_and_warm_before_the_profiler_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.bench import launches

    order: list[str] = []
    monkeypatch.setattr(launches.profiler, "start", lambda: order.append("start"))
    monkeypatch.setattr(launches.profiler, "stop", lambda: order.append("stop"))
    monkeypatch.setattr(launches.torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(launches, "kernel", lambda peer, inputs: OURS)
    monkeypatch.setattr(launches, "check", lambda peer, inputs, result: order.append("check") or 2e-4)
    subject = peers.Subject([lambda: order.append("call")])  # type: ignore[list-item, func-returns-value]
    peer = peers.Peer("lbg float16", records.OURS, torch.float16, torch.float16, make=lambda inputs: subject)

    class Stub:
        shape = SMALL

    assert launches.launch(peer, Stub()) == Launch(SMALL, "lbg float16", "float16", "float16", OURS, "", 2e-4)  # type: ignore[arg-type]
    assert order == ["call", "check", "start", "call", "stop"]


def test_a_launch_of_the_original_names_its_config(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.bench import launches, original

    kernel = object.__new__(original.Kernel)
    kernel.facts = original.Image(THEIRS, 90, 90, 64, 64, 32, 4, 4, 0, 2, "3.9.0")
    monkeypatch.setattr(original, "fused", lambda kernel, x: torch.zeros(1))
    for name in ("start", "stop"):
        monkeypatch.setattr(launches.profiler, name, lambda: None)
    monkeypatch.setattr(launches.torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(launches, "check", lambda peer, inputs, result: 1e-6)
    subject = peers.Subject([partial(original.fused, kernel, None)])
    peer = peers.Peer("original kernel", records.PEER, torch.float16, torch.float32, make=lambda inputs: subject)

    class Stub:
        shape = BIG

    found = launches.launch(peer, Stub())  # type: ignore[arg-type]
    assert (found.kernel, found.config) == (THEIRS, "64x64x32 w4 s4, triton 3.9.0")


# ---- the commands that the guide gives


def test_build_py_says_what_is_missing_before_it_builds(root: Path) -> None:
    pytest.importorskip("triton", reason="needs the build's environment", exc_type=ImportError)
    command = [sys.executable, root / "build.py", "profile", "--ncu", "/no/ncu", "--original", "model.py"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "build.py: --ncu /no/ncu is no program\n"


def test_the_guides_options_are_there(root: Path) -> None:
    guide = root.joinpath("docs", "rtx-4090.md").read_text()
    for module in ("tests.bench", "tests.bench.profile"):
        done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, cwd=root)
        for line in guide.splitlines():
            if line.startswith("    ") and f"-m {module} " in line:
                assert set(re.findall(r"--\w+", line)) <= set(re.findall(r"--\w+", done.stdout)), line
        assert "--original" in done.stdout and f"-m {module} " in guide
