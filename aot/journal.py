"""What a tuner's run has measured so far: a file of JSON lines, each on disk before the next is begun.

The first line says what was measured (device, driver, candidates) and what their kernels are; each other one is a kind
of class at one shape, or a candidate that stopped the run. Standard library alone: it is written where the GPU is and
read where the build is.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from aot import BuildError


@dataclass(frozen=True)
class Key:
    """A journal goes on only where all of this is the same."""

    device: str
    driver: str
    candidates: str  # digest of the package whose kernels are measured


@dataclass(frozen=True)
class Head:
    key: Key
    arch: int  # that the kernels were compiled for
    runs_on: int  # that the GPU has: another one in a verification build
    sm_count: int
    facts: dict[str, str]
    kernels: dict[str, dict[str, Any]]  # lbg.Config by symbol


@dataclass(frozen=True)
class Timed:
    """Every candidate of one kind and promise at one shape: verified, then timed."""

    kind: str
    promise: str  # "rows" or "any_out"
    shape: str  # MxNxK
    us: dict[str, float]  # median by symbol, the conservative kernel's among them
    wrong: dict[str, str] = field(default_factory=dict)  # what was wrong with each that has no time here

    @property
    def name(self) -> tuple[str, str, str]:
        return self.kind, self.promise, self.shape

    @property
    def sizes(self) -> tuple[int, int, int]:
        m, n, k = map(int, self.shape.split("x"))
        return m, n, k


@dataclass(frozen=True)
class Record:
    head: Head
    timed: tuple[Timed, ...]
    stopped: dict[str, str]  # by symbol: candidates whose failure ended a run

    def dropped(self) -> dict[str, str]:
        """Candidates that were wrong anywhere, with the first error: none of them may be chosen."""
        found = dict(self.stopped)
        for timed in self.timed:
            for symbol, error in timed.wrong.items():
                found.setdefault(symbol, f"{timed.shape}: {error}")
        return found


def read(path: Path) -> Record:
    """Raises BuildError for a file that is missing or no journal. A torn last line is what an interruption leaves."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise BuildError(f"{path}: {error.strerror}; python -m tests.bench.tune --journal {path} writes it") from None
    try:
        head = json.loads(lines[0])["head"]
        rows = [json.loads(line) for line in lines[1:-1]]
        timed = tuple(Timed(**row["timed"]) for row in rows if "timed" in row)
        stopped = {row["stopped"]["symbol"]: row["stopped"]["error"] for row in rows if "stopped" in row}
        return Record(Head(**head | {"key": Key(**head["key"])}), timed, stopped)
    except (ValueError, KeyError, TypeError) as error:
        raise BuildError(f"{path} is no journal of the tuner: {error!r}") from None


class Journal:
    """A journal to write to: a new one, or one that goes on."""

    def __init__(self, path: Path, head: Head) -> None:
        """Raises BuildError where the file is of another device, driver or candidates."""
        self.path = path
        text = path.read_bytes() if path.exists() else b""
        if b"\n" not in text:
            self.record = Record(head, (), {})
            path.write_bytes(b"")
            self._append({"head": asdict(head)})
            return
        self.record = read(path)
        for name, before in asdict(self.record.head.key).items():
            if before != (now := getattr(head.key, name)):
                raise BuildError(f"{path} is of {name} {before}; this is {now}: take another file for it")
        whole = text.rindex(b"\n") + 1
        if whole < len(text):
            os.truncate(path, whole)

    def add(self, timed: Timed) -> None:
        self.record = Record(self.record.head, (*self.record.timed, timed), self.record.stopped)
        self._append({"timed": asdict(timed)})

    def stop(self, symbol: str, error: str) -> None:
        """Notes a candidate after which the GPU can go on only in a new process; that one leaves it out."""
        self.record = Record(self.record.head, self.record.timed, self.record.stopped | {symbol: error})
        self._append({"stopped": {"symbol": symbol, "error": error}})

    def _append(self, row: dict[str, Any]) -> None:
        with self.path.open("ab") as file:
            file.write(json.dumps(row).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
