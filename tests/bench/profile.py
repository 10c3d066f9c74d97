"""What Nsight Compute counts in lbg's kernels and in the original's, side by side: a table, a page and JSON.

    python -m tests.bench.profile [--original PATH] [--shapes MxNxK ...] [--out DIR] [--evidence FILE]

Needs ncu (NVIDIA Nsight Compute), leave to read the GPU's counters, torch and the wheel; no triton. Every result is
checked against float64 before its kernel is profiled (tests/bench/launches.py). Caches are flushed before each of ncu's
passes; clocks are left as they are.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from aot import BuildError
from tests.bench import tables
from tests.bench.records import Shape, Skipped, file_stem, write_evidence

ROOT = Path(__file__).resolve().parents[2]
SHAPES = (Shape(16384, 4096, 4096), Shape(16, 4096, 4096))
# The original at M=16384, N=K=4096, as the user of this project measured it: an RTX 4090, Nsight Compute.
USERS_SHAPE = SHAPES[0]
USERS_COLUMN = "original, on the user's RTX 4090"
USERS = {
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": 11.48,
    "launch__grid_size": 16384.0,
    "sm__warps_active.avg.pct_of_peak_sustained_active": 33.17,
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": 49.91,
    "lts__t_sector_hit_rate.pct": 55.49,
}


HOW = (
    f"Measured on this GPU by Nsight Compute, but for the column `{USERS_COLUMN}`: those five are what the user of"
    " this project measured of the original program, on an RTX 4090, with Nsight Compute. Written by `python3 "
    "build.py profile`.\n\n"
    "Every result was checked against float64 first. One launch each, after a warm-up; ncu runs it once for every"
    " pass, with L2 and L1 flushed before (`--cache-control all`) and the clocks left as they are "
    "(`--clock-control none`): a duration is not the benchmark's, and may move from run to run. Loads by TMA and "
    "operands that wgmma reads pass the counters of the LSU by, those of shared-memory wavefronts and bank "
    "conflicts. On a GeForce GPU, where float32 accumulation is half as fast as float16's, the tensor pipe's row "
    "compares kernels of one accumulation only."
)


@dataclass(frozen=True)
class Metric:
    """One row of the table. Names differ by arch: of several, the first that the GPU has is taken."""

    label: str
    unit: str
    names: tuple[str, ...]

    @property
    def always_asked(self) -> bool:
        """ncu's list of a GPU's counters leaves out what it knows of the launch itself."""
        return self.label in USERS or self.names[0].startswith("launch__")


CONFLICTS, LOADS, STORES, LDSM, LDGSTS = (
    "bank conflicts, all",
    "shared-memory loads, warp instructions",
    "shared-memory stores, warp instructions",
    "ldmatrix, warp instructions",
    "cp.async, warp instructions",
)
PER_INSTRUCTION = "bank conflicts a shared-memory instruction"
ACTIVE, ELAPSED = ".avg.pct_of_peak_sustained_active", ".avg.pct_of_peak_sustained_elapsed"
WAVEFRONTS, BANK = "l1tex__data_pipe_lsu_wavefronts_mem_shared", "l1tex__data_bank_conflicts_pipe_lsu"
METRICS = (
    *(Metric(name, "%" if "pct" in name else "", (name,)) for name in USERS),
    Metric("duration, us", "us", ("gpu__time_duration.sum",)),
    Metric("SM clock, MHz", "MHz", ("smsp__cycles_elapsed.avg.per_second", "sm__cycles_elapsed.avg.per_second",
                                    "gpc__cycles_elapsed.avg.per_second")),
    # Of all the tensor pipe, else of the part that multiplies 16-bit values (Hopper's wgmma counts there too), else how
    # many instructions it took.
    Metric("tensor pipe, % of active cycles", "%", (f"sm__pipe_tensor_cycles_active{ACTIVE}",
                                                    f"sm__pipe_tensor_op_hmma_cycles_active{ACTIVE}",
                                                    f"sm__inst_executed_pipe_tensor{ACTIVE}",
                                                    f"sm__inst_executed_pipe_tensor_op_hmma{ACTIVE}")),
    Metric("issue slots, % of active cycles", "%", (f"smsp__issue_active{ACTIVE}", f"sm__inst_issued{ACTIVE}",
                                                    f"smsp__inst_issued{ACTIVE}")),
    Metric("shared-memory wavefronts, % of peak", "%", (f"{WAVEFRONTS}{ELAPSED}",
                                                        f"l1tex__data_pipe_lsu_wavefronts{ELAPSED}")),
    Metric("shared-memory wavefronts", "", (f"{WAVEFRONTS}.sum", "l1tex__data_pipe_lsu_wavefronts.sum")),
    Metric("data bank reads, % of peak", "%", (f"l1tex__data_bank_reads{ELAPSED}",)),
    Metric("data bank writes, % of peak", "%", (f"l1tex__data_bank_writes{ELAPSED}",)),
    Metric(CONFLICTS, "", (f"{BANK}_mem_shared.sum", f"{BANK}.sum")),
    Metric("bank conflicts, loads", "", (f"{BANK}_mem_shared_op_ld.sum",)),
    Metric("bank conflicts, stores", "", (f"{BANK}_mem_shared_op_st.sum",)),
    Metric("bank conflicts, cp.async", "", (f"{BANK}_mem_shared_op_ldgsts.sum",
                                            "smsp__sass_l1tex_data_bank_conflicts_pipe_lsu_mem_shared_op_ldgsts.sum")),
    Metric(LOADS, "", ("smsp__sass_inst_executed_op_shared_ld.sum", "smsp__inst_executed_op_shared_ld.sum")),
    Metric(STORES, "", ("smsp__sass_inst_executed_op_shared_st.sum", "smsp__inst_executed_op_shared_st.sum")),
    Metric(LDSM, "", ("smsp__inst_executed_op_ldsm.sum", "smsp__sass_inst_executed_op_ldsm.sum")),
    Metric(LDGSTS, "", ("smsp__inst_executed_op_ldgsts.sum", "smsp__sass_inst_executed_op_ldgsts.sum")),
    Metric("L2, % of peak", "%", (f"lts__throughput{ELAPSED}", f"lts__t_sectors{ELAPSED}")),
    Metric("DRAM read, MB", "MB", ("dram__bytes_read.sum",)),
    Metric("DRAM written, MB", "MB", ("dram__bytes_write.sum",)),
    Metric("registers a thread", "", ("launch__registers_per_thread",)),
    Metric("threads a CTA", "", ("launch__block_size",)),
    Metric("shared memory a CTA, KB", "KB", ("launch__shared_mem_per_block", "launch__shared_mem_per_block_allocated")),
    Metric("waves", "waves", ("launch__waves_per_multiprocessor",)),
    Metric("CTAs an SM, by registers", "", ("launch__occupancy_limit_registers",)),
    Metric("CTAs an SM, by shared memory", "", ("launch__occupancy_limit_shared_mem",)),
    Metric("CTAs an SM, by warps", "", ("launch__occupancy_limit_warps",)),
    Metric("CTAs an SM, by the hardware's slots", "", ("launch__occupancy_limit_blocks",)),
)  # fmt: skip
# Of ncu's units, which differ by version, in the base unit of its kind: us, bytes, Hz.
SCALES = {
    "ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0, "ms": 1e3, "msecond": 1e3, "s": 1e6, "second": 1e6,
    "kbyte": 1e3, "mbyte": 1e6, "gbyte": 1e9, "khz": 1e3, "mhz": 1e6, "ghz": 1e9,
    "cycle/usecond": 1e6, "cycle/us": 1e6, "cycle/nsecond": 1e9, "cycle/ns": 1e9,
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One kernel that ncu saw. x and out are dtypes by PyTorch's names."""

    shape: Shape
    of: str  # the benchmark's name of it
    x: str
    out: str
    kernel: str  # its symbol
    config: str  # of the original: which of its autotune configs
    error: float | None  # relative, in norm, against float64
    counters: Mapping[str, float | None] = field(default_factory=dict)  # by Metric.label; us, bytes, Hz, %, counts


@dataclass(frozen=True)
class Profile:
    facts: dict[str, str]
    ncu: str  # version
    names: dict[str, str | None]  # by Metric.label, ncu's name for it; None: not on this GPU
    launches: list[Launch]
    skipped: list[Skipped]

    def shapes(self) -> list[Shape]:
        return list(dict.fromkeys(launch.shape for launch in self.launches))


# ---- ncu


def find_ncu(asked: Path | None = None) -> Path:
    """As given, on the PATH, or where NVIDIA's installers put it.

    Raises:
        BuildError: it is nowhere; the text says what to install.
    """
    if asked:
        if not os.access(asked, os.X_OK):
            raise BuildError(f"--ncu {asked} is no program")
        return asked.resolve()
    if on_path := shutil.which("ncu"):
        return Path(on_path)
    places = [*Path("/opt/nvidia").glob("nsight-compute/*/ncu"), *Path("/usr/local").glob("cuda*/bin/ncu")]
    if not places:
        raise BuildError(
            "missing tool: ncu (NVIDIA Nsight Compute, 2022.3 or newer for sm_89 and sm_90) is neither on the PATH nor "
            "in /usr/local/cuda*/bin or /opt/nvidia/nsight-compute; it comes with the CUDA toolkit, and alone from "
            "https://developer.nvidia.com/nsight-compute; --ncu PATH names another place"
        )
    return max(places)


def ran(command: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
    # LC_ALL: in other languages ncu writes 1.234,5.
    return subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, cwd=ROOT, env=os.environ | {"LC_ALL": "C"}
    )


def known_counters(ncu: Path) -> set[str]:
    """Names of this GPU's counters, without what stands behind the first point of a metric's name.

    Raises:
        BuildError: ncu lists none.
    """
    done = ran([ncu, "--query-metrics"])
    found = set(re.findall(r'^\s*"?([a-z]\w*__\w+)', done.stdout, re.MULTILINE))
    if not found:
        raise BuildError(explained(done))
    return found


def chosen(known: set[str]) -> dict[str, str | None]:
    """For each row of the table the first of its names that the GPU has; None where it has none."""

    def choose(metric: Metric) -> str | None:
        named = (name for name in metric.names if name.partition(".")[0] in known)
        return next(named, metric.names[0] if metric.always_asked else None)

    return {metric.label: choose(metric) for metric in METRICS}


def command(ncu: Path, names: Iterable[str], log: Path, child: Sequence[str | Path]) -> list[str | Path]:
    """What has ncu count `names` in the kernels that `child` launches between cudaProfilerStart and cudaProfilerStop.

    Clocks: ncu would lock them at their base, which takes leave to change the GPU's settings, and which no user's GPU
    runs at. Caches: flushed before each pass, so that a pass does not find what the one before it left in L2.
    """
    return [
        ncu, "--csv", "--page", "raw", "--print-units", "base", "--log-file", log, "--metrics", ",".join(names),
        "--profile-from-start", "off", "--replay-mode", "kernel", "--cache-control", "all", "--clock-control", "none",
        "--target-processes", "application-only", *child,
    ]  # fmt: skip


def explained(done: subprocess.CompletedProcess[str], log: str = "") -> str:
    """Why ncu gave no counters, and what to do."""
    said = "\n".join((log, done.stdout, done.stderr))
    if "ERR_NVGPUCTRPERM" in said:
        return (
            "ncu may not read this GPU's counters (ERR_NVGPUCTRPERM). Either run `python -m tests.bench.profile` as "
            "root, or let every user read them: put `options nvidia NVreg_RestrictProfilingToAdminUsers=0` into "
            "/etc/modprobe.d/ncu.conf and reboot. In a container: start it with --cap-add=SYS_ADMIN"
        )
    errors = [text.strip() for text in re.findall(r"==ERROR== *(.*)", said)]
    # ncu adds this when the program failed, whose own last words say more
    if own := [text for text in dict.fromkeys(errors) if "application returned an error code" not in text]:
        return f"ncu: {' '.join(own[:3])}"
    last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "")
    return last or f"ncu ended with exit code {done.returncode} and counted nothing"


def number(text: str, unit: str) -> float | None:
    """As ncu writes it, `1,234.5` or `n/a`, in us, bytes, Hz, percent or as a count."""
    try:
        value = float(text.replace(",", ""))
    except ValueError:
        return None
    unit = unit.lower()
    scale = SCALES.get(unit, SCALES.get(unit.partition("/")[0], 1.0))  # Kbyte/block
    return value * scale if math.isfinite(value) else None


def parse(text: str) -> list[tuple[str, dict[str, float | None]]]:
    """(kernel, counters by ncu's name) of each launch, in order, from `ncu --csv --page raw` with its own messages.

    Raises:
        BuildError: there is no such table in it.
    """
    rows = list(csv.reader(line for line in text.splitlines() if line.startswith('"')))
    start = next((index for index, row in enumerate(rows) if "Kernel Name" in row), None)
    if start is None or len(rows) < start + 3:
        raise BuildError("ncu saw no kernel: its output has no table")
    header, units, *launches = rows[start:]
    kernel = header.index("Kernel Name")
    metrics = [column for column, name in enumerate(header) if "__" in name]
    return [
        (row[kernel], {header[column]: number(row[column], units[column]) for column in metrics})
        for row in launches
        if len(row) == len(header)
    ]


def derived(counters: Mapping[str, float | None]) -> dict[str, float | None]:
    """What follows from the counters of one launch."""
    instructions = [counters.get(label) for label in (LOADS, STORES, LDSM, LDGSTS)]
    conflicts = counters.get(CONFLICTS)
    if conflicts is None or None in instructions or not (total := sum(filter(None, instructions))):
        return {PER_INSTRUCTION: None}
    return {PER_INSTRUCTION: conflicts / total}


def joined(
    launches: list[Launch], seen: list[tuple[str, dict[str, float | None]]], names: Mapping[str, str | None]
) -> list[Launch]:
    """The launches with their counters.

    Raises:
        BuildError: ncu saw other kernels than were launched.
    """
    wanted, found = [launch.kernel for launch in launches], [kernel for kernel, _ in seen]
    if len(wanted) != len(found) or not all(name in kernel for name, kernel in zip(wanted, found)):
        raise BuildError(f"ncu saw {', '.join(found)}; launched were {', '.join(wanted)}")
    full = []
    for launch, (_, values) in zip(launches, seen):
        counters = {label: values.get(name) for label, name in names.items() if name}
        full.append(replace(launch, counters=counters | derived(counters)))
    return full


# ---- text


def cell(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    if unit == "us":
        return tables.time(value)
    if unit in ("%", "waves"):
        return f"{value:.2f}"
    scale = {"MHz": 1e6, "MB": 1e6, "KB": 1e3}.get(unit, 1.0)
    return f"{value / scale:.1f}" if unit in ("MB", "KB") else f"{value / scale:.0f}"


def table(profile: Profile, shape: Shape) -> str:
    """A row a metric, a column a kernel; at the shape that the user measured, a column of those five numbers."""
    launches = [launch for launch in profile.launches if launch.shape == shape]
    with_users = shape == USERS_SHAPE
    rows = []
    for metric in METRICS:
        if profile.names[metric.label]:
            row = [metric.label, *(cell(launch.counters[metric.label], metric.unit) for launch in launches)]
            rows.append(row + [cell(USERS.get(metric.label), metric.unit)] * with_users)
        if metric.label == LDGSTS:
            ratios = [launch.counters[PER_INSTRUCTION] for launch in launches]
            texts = ["-" if ratio is None else f"{ratio:.3f}" for ratio in ratios]
            rows.append([PER_INSTRUCTION, *texts, *["-"] * with_users])
    return tables.markdown(["", *(launch.of for launch in launches), *[USERS_COLUMN] * with_users], rows)


def missing(profile: Profile) -> list[str]:
    """Rows that no counter of this GPU can fill, those that it lists and does not count among them."""
    counted = {label for launch in profile.launches for label, value in launch.counters.items() if value is not None}
    return [metric.label for metric in METRICS if metric.label not in counted]


def page(profile: Profile) -> str:
    """The Markdown page that stands beside the JSON."""
    facts = profile.facts
    compiled_for, _, other = facts["kernels"].partition(" on ")
    verification = f"A verification build: the PTX of the {compiled_for} kernels, assembled for this GPU. What they do "
    verification += "here is measured, limits of occupancy included; what they do on their own GPUs is not.\n\n"
    ran_kernels = tables.markdown(
        ["M x N x K", "of", "x to result", "kernel", "relative error"],
        [
            [str(each.shape), each.of, f"{each.x} to {each.out}", f"{each.kernel} {each.config}".strip(),
             "-" if each.error is None else f"{each.error:.1e}"]
            for each in profile.launches
        ],
    )  # fmt: skip
    used = [[label, f"`{name}`"] for label, name in profile.names.items() if name and label != name]
    absent = missing(profile)
    left_out = tables.markdown(
        ["left out", "where", "why"], [[row.peer, row.where, row.reason] for row in profile.skipped]
    )
    sections = {
        "": f"{verification if other else ''}{HOW}\n\n"
        + tables.markdown(["what", "value"], [*facts.items(), ("ncu", profile.ncu)]),
        **{f"M x N x K = {shape}": table(profile, shape) for shape in profile.shapes()},
        "Which kernel ran": ran_kernels,
        "The rows in ncu's names": tables.markdown(["row", "metric"], used)
        + f"\n\n`{PER_INSTRUCTION}`: all conflicts over loads, stores, ldmatrix and cp.async together.",
        "Not on this GPU": ", ".join(absent) if absent else "Nothing.",
        "Left out": left_out if profile.skipped else "Nothing.",
    }
    body = [f"## {name}\n\n{text}" if name else text for name, text in sections.items()]
    return "\n\n".join([f"# {facts['gpu']}, {facts['kernels']} kernels, profile", *body]) + "\n"


# ---- the run


def run(options: argparse.Namespace) -> Profile:
    """Runs the launches under ncu. Where that fails, what ncu wrote stays in the output folder."""
    ncu: Path = options.ncu
    manifest, log = options.out / "launches.json", options.out / "ncu.log"
    for left in (manifest, log):
        left.unlink(missing_ok=True)
    names = chosen(known_counters(ncu))
    child: list[str | Path] = [sys.executable, "-m", "tests.bench.launches", manifest]
    for option, value in (("--original", options.original), ("--commit", options.commit)):
        child += [option, value] if value else []
    child += ["--shapes", *map(str, options.shapes)]
    asked = list(dict.fromkeys(name for name in names.values() if name))
    print(f"{len(asked)} metrics at {', '.join(map(str, options.shapes))}, under {ncu}: a minute or two", flush=True)
    done = ran(command(ncu, asked, log, child))
    written = log.read_text() if log.exists() else ""
    trouble = explained(done, written) if done.returncode or "==ERROR==" in written else ""
    try:
        told = json.loads(manifest.read_text()) if manifest.exists() else {"launches": []}
        launches = [Launch(**row | {"shape": Shape(**row["shape"])}) for row in told["launches"]]
        full = joined(launches, parse(written), names)
    except BuildError as error:
        raise BuildError(f"{trouble or error}. What ncu wrote is in {log}") from None
    if trouble:  # it counted all the same
        print(f"ncu was not content: {trouble}")
    version = re.findall(r"^Version (\S+)", ran([ncu, "--version"]).stdout, re.MULTILINE)
    manifest.unlink()
    log.unlink()
    return Profile(told["facts"], version[0] if version else "unknown", names, full,
                   [Skipped(**row) for row in told["skipped"]])  # fmt: skip


def options_of(arguments: list[str]) -> argparse.Namespace:
    """What is asked for, once it is known that it can be had.

    Raises:
        BuildError: there is no ncu, or no GPU.
    """
    parser = argparse.ArgumentParser(
        "python -m tests.bench.profile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--original", type=Path, help="the original program, or a folder of its compiled kernels")
    parser.add_argument("--shapes", type=Shape.parse, nargs="+", default=list(SHAPES), metavar="MxNxK")
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"), help="folder of page and JSON")
    parser.add_argument("--evidence", type=Path, help="the file of this arch's evidence to put the profile into too")
    parser.add_argument("--ncu", type=Path, help="Nsight Compute's command line, where it is not found by itself")
    parser.add_argument("--commit", help="of the wheel, where the folder is no git checkout")
    options = parser.parse_args(arguments)
    options.ncu = find_ncu(options.ncu)
    if not torch.cuda.is_available():
        raise BuildError(f"a profile needs a CUDA GPU, and a torch that sees it; torch {torch.__version__} sees none")
    options.out = options.out.resolve()  # the launches run in the project's folder
    options.original = options.original and options.original.resolve()
    return options


def main(arguments: list[str]) -> int:
    try:
        options = options_of(arguments)
        options.out.mkdir(parents=True, exist_ok=True)
        profile = run(options)
        stem = options.out / f"{file_stem(profile.facts)}-profile"
        data: dict[str, Any] = asdict(profile)
        Path(f"{stem}.json").write_text(json.dumps(data, indent=1) + "\n")
        Path(f"{stem}.md").write_text(page(profile))
        for shape in profile.shapes():
            print(f"\n{shape}\n{table(profile, shape)}")
        print(f"\nnot on this GPU: {', '.join(missing(profile)) or 'nothing'}")
        for row in profile.skipped:
            print(f"left out: {row.peer}, {row.where}: {row.reason}")
        print(f"wrote {stem}.md and .json")
        if options.evidence:
            write_evidence(options.evidence, "profile", data)
            print(f"wrote its section of {options.evidence}")
    except BuildError as error:
        print(f"profile: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
