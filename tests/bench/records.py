"""What a benchmark run found, as records that go to JSON and back, and the arithmetic on them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from aot import BuildError
from aot.evidence import write_section

OURS, PEER, LIMIT = "lbg", "peer", "limit"  # kinds of a timing; a limit does less than the whole function

# Dense fp16 tensor TFLOPS with float32 accumulation, by NVIDIA's datasheets and the Ada whitepaper.
DATASHEET_TFLOPS = {
    "RTX 4090": 165.2, "RTX 6000 Ada": 364.2, "L40S": 362.1, "H100 PCIe": 756.5, "H100": 989.4, "H200": 989.4,
    "GH200": 989.4,
}  # fmt: skip


@dataclass(frozen=True, order=True)
class Shape:
    m: int
    n: int
    k: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """From `MxNxK`.

        Raises:
            ValueError: not three whole numbers from 1 up.
        """
        sizes = [int(size) for size in text.split("x") if size.isdecimal()]
        if len(sizes) != 3 or text.count("x") != 2 or 0 in sizes:
            raise ValueError(f"a shape is MxNxK, such as 16384x4096x4096; got {text!r}")
        return cls(*sizes)

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k}"

    @property
    def flop(self) -> int:
        return 2 * self.m * self.n * self.k

    def least_bytes(self, x_bytes: int, out_bytes: int, weight_bytes: int = 2) -> int:
        """Each operand read once and the result written once; element sizes in bytes."""
        return self.m * self.k * x_bytes + self.n * self.k * weight_bytes + self.m * self.n * out_bytes


# What is measured, and what `build.py audit` predicts.
SHAPES = tuple(
    Shape(*sizes)
    for sizes in (
        *((m, 4096, 4096) for m in (16384, 4096, 1024, 256, 64, 16, 1)),
        (128, 1024, 512), (16384, 1024, 4096), (4096, 11008, 4096), (8192, 8192, 8192), (2048, 3072, 768),
        (16383, 4096, 4096), (4096, 4104, 4096), (4097, 4095, 4088),  # ragged: M; N % 16 == 8; all three
    )
)  # fmt: skip


@dataclass(frozen=True)
class Timing:
    """Device time of one call. x and out are dtypes by PyTorch's names."""

    peer: str
    kind: str
    x: str
    out: str
    shape: Shape
    us: float  # median: of single calls between events, or of graph replays with weights that L2 does not hold
    low_us: float  # quartiles of the same
    high_us: float
    warm_us: float | None  # median of graph replays with one weight; None where calls were timed by events
    error: float | None  # relative, in norm, against float64; None of a bare product
    kernel: str = ""  # lbg's choice


@dataclass(frozen=True)
class Skipped:
    peer: str
    where: str  # a shape, or "everywhere"
    reason: str


@dataclass(frozen=True)
class Prediction:
    """What lbg's dispatch model expects of a GPU that the run did not have."""

    gpu: str
    shape: Shape
    kernel: str
    us: float


@dataclass
class Report:
    facts: dict[str, str]
    copy_gb_per_s: float  # of a device-to-device copy, bytes read plus bytes written
    shapes: list[Shape] = field(default_factory=list)  # the tables'; timings hold more values of M for the plot
    timings: list[Timing] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    predictions: list[Prediction] = field(default_factory=list)
    accumulation: dict[str, dict[int, float]] = field(default_factory=dict)  # mode, K: relative error
    first_result_ms: dict[str, float] = field(default_factory=dict)
    host_us: dict[str, float] = field(default_factory=dict)

    def find(self, shape: Shape, peer: str) -> Timing | None:
        return next((timing for timing in self.timings if (timing.shape, timing.peer) == (shape, peer)), None)

    def best_peer(self, shape: Shape, x: str) -> Timing | None:
        """The fastest that computes the whole function from the same x, and is not ours."""
        rivals = [timing for timing in self.timings if (timing.shape, timing.kind, timing.x) == (shape, PEER, x)]
        return min(rivals, key=lambda timing: timing.us, default=None)

    def peers(self) -> list[str]:
        """Every peer timed, in the order of the run."""
        return list(dict.fromkeys(timing.peer for timing in self.timings))

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Report:
        found = json.loads(path.read_text())
        found["shapes"] = [Shape(**shape) for shape in found["shapes"]]
        for key, record in (("timings", Timing), ("skipped", Skipped), ("predictions", Prediction)):
            rows = [row | ({"shape": Shape(**row["shape"])} if "shape" in row else {}) for row in found[key]]
            found[key] = [record(**row) for row in rows]
        found["accumulation"] = {
            mode: {int(k): error for k, error in row.items()} for mode, row in found["accumulation"].items()
        }
        return cls(**found)


def file_stem(facts: dict[str, str]) -> str:
    """Such as nvidia-h200-sm_90."""
    words = f"{facts['gpu']} {facts['kernels']}".lower().replace(",", "").split()
    return "-".join(words)


def evidence_arch(facts: dict[str, str]) -> int:
    """The arch that a run's figures are evidence for.

    Raises:
        BuildError: the run was of a verification build, whose times are no GPU's that it is shipped for.
    """
    compiled_for, _, on = facts["kernels"].partition(" on ")
    if on:
        raise BuildError(f"--evidence takes runs of kernels on their own arch; these are {compiled_for}'s on {on}")
    return int(compiled_for.removeprefix("sm_"))


def write_evidence(path: Path, section: str, data: dict[str, Any]) -> None:
    """Puts a run into the file of its arch's evidence, which people send to others: the home folder reads ~ in it."""
    shown = json.dumps(data).replace(json.dumps(str(Path.home()))[1:-1], "~")
    write_section(path, evidence_arch(data["facts"]), section, json.loads(shown))


def ratio(over: Timing | None, under: Timing | None) -> float | None:
    """over's time in units of under's; None where either was not timed."""
    return over.us / under.us if over and under else None


def geometric_mean(values: Iterable[float | None]) -> float | None:
    """Of those that are there; None if none is."""
    logs = [math.log(value) for value in values if value is not None]
    return math.exp(sum(logs) / len(logs)) if logs else None


def memory_limit_us(shape: Shape, x_bytes: int, out_bytes: int, gb_per_s: float) -> float:
    """Microseconds to move the fewest bytes at that bandwidth."""
    return shape.least_bytes(x_bytes, out_bytes) / gb_per_s / 1e3


def weight_read_us(shape: Shape, gb_per_s: float) -> float:
    """Microseconds to read a 16-bit weight once: what bounds a small M."""
    return 2 * shape.n * shape.k / gb_per_s / 1e3


def tensor_limit_us(shape: Shape, tflops: float) -> float:
    return shape.flop / tflops / 1e6


def tensor_tflops(report: Report) -> tuple[float, str]:
    """The rate that bounds a large M, and where it is from: the datasheet, else the best product of the run."""
    gpu = report.facts["gpu"]
    if names := [name for name in DATASHEET_TFLOPS if name in gpu]:
        return DATASHEET_TFLOPS[max(names, key=len)], "datasheet"
    return max((timing.shape.flop / timing.us / 1e6 for timing in report.timings), default=math.nan), "best of this run"
