"""Why these kernels: one JSON file an arch, with the rows that are shipped and the measurements that earned them.

`aot/evidence_sm_XY.json` has a section a command: `tune` (rows, their evidence, cost constants), `benchmark` and
`profile`. aot/configs.py reads the rows from it, aot/costs.py the constants; each command writes its own section and
keeps the others. Neither torch nor triton is needed: a machine with a GPU and no build imports this too.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from aot import BuildError

ARCHS = (89, 90)
SECTIONS = ("tune", "benchmark", "profile")
PROMISES = ("rows", "any_out")  # of a kind of class: what stores aligned results, and what stores to any address
DIGITS = 6


@dataclass(frozen=True)
class Measurement:
    """One time of one row, with what it is to be held against. Microseconds; None where it was not measured."""

    shape: str  # MxNxK
    kernel: str  # the symbol that ran: a row serves more than one class
    us: float
    conservative_us: float | None  # of the class's conservative kernel: any alignment, 4 warps, 2 stages
    gain: float | None  # conservative_us / us
    runner_up: str | None  # the next best: a symbol, or in words what it was
    runner_up_us: float | None
    device: str
    date: str
    how: str  # measured natively, or through a verification build, or what else


@dataclass(frozen=True)
class Row:
    """One tile that is shipped in every class of its kind, and why."""

    tile: dict[str, Any]  # aot/configs.py's Tile; what is left out has its default
    evidence: tuple[Measurement, ...]
    note: str = ""  # what decided besides times
    pending: str = ""  # why a row outside the user's sets has no measurement yet

    def written(self) -> dict[str, Any]:
        found: dict[str, Any] = {"tile": self.tile}
        found |= {key: text for key, text in (("note", self.note), ("pending", self.pending)) if text}
        return found | {"evidence": [asdict(measurement) for measurement in self.evidence]}


Rows = dict[str, dict[str, tuple[Row, ...]]]  # by kind of class, then by promise


def path_of(arch: int) -> Path:
    """The file that the build reads."""
    return Path(__file__).with_name(f"evidence_sm_{arch}.json")


def read(arch: int, path: Path | None = None) -> dict[str, Any]:
    """The file's content. Raises BuildError if it is missing, no JSON, of another arch, or without its rows."""
    path = path or path_of(arch)
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise BuildError(f"{path}: no such file; it holds the kernels that are shipped for sm_{arch}") from None
    except ValueError as error:
        raise BuildError(f"{path}: not JSON: {error}") from None
    if not isinstance(found, dict) or found.get("arch") != f"sm_{arch}":
        told = found.get("arch") if isinstance(found, dict) else type(found).__name__
        raise BuildError(f"{path}: evidence of {told}; wanted is that of sm_{arch}")
    if "kinds" not in found.get("tune", {}):
        raise BuildError(f"{path}: no section tune with kinds, the rows that are shipped for sm_{arch}")
    return found


def rows(data: dict[str, Any]) -> Rows:
    """The rows of the section `tune`."""
    found: Rows = {}
    for kind, promises in data["tune"]["kinds"].items():
        if set(promises) != set(PROMISES):
            raise BuildError(f"evidence of {data['arch']}, {kind}: has {', '.join(promises)}; "
                             f"wanted are {' and '.join(PROMISES)}")  # fmt: skip
        try:
            found[kind] = {promise: tuple(map(_row, promises[promise])) for promise in PROMISES}
        except (KeyError, TypeError) as error:
            raise BuildError(f"evidence of {data['arch']}, {kind}: a row cannot be read: {error!r}") from None
    return found


def _row(data: dict[str, Any]) -> Row:
    evidence = tuple(Measurement(**measurement) for measurement in data["evidence"])
    return Row(data["tile"], evidence, data.get("note", ""), data.get("pending", ""))


def write_section(path: Path, arch: int, section: str, data: dict[str, Any]) -> None:
    """Puts `data` into the file's section and keeps the rest; the file is whole at every moment.

    A file that is not there yet begins as the shipped one, so that one file carries all that its owner measured.
    """
    if section not in SECTIONS:
        raise BuildError(f"no section of evidence is called {section!r}; there are {', '.join(SECTIONS)}")
    before = read(arch, path if path.exists() else None)
    after = {"arch": f"sm_{arch}"} | {key: before[key] for key in SECTIONS if key in before} | {section: data}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text_of(_rounded({key: after[key] for key in ("arch", *SECTIONS) if key in after})) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Replaces the file at once: an interrupted write leaves the old one."""
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


def adopt(source: Path) -> Path:
    """Makes `source`, which came from a GPU's owner, the file that the build reads; returns where that is."""
    try:
        text = source.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise BuildError(f"{source}: cannot be read: {error}") from None
    arch = next((arch for arch in ARCHS if f'"sm_{arch}"' in text[:40]), None)
    if arch is None:
        raise BuildError(f"{source}: does not begin with the arch that it is evidence of")
    rows(read(arch, source))
    if source.resolve() != path_of(arch).resolve():
        write_whole(path_of(arch), text)
    return path_of(arch)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def text_of(value: Any, indent: int = 0) -> str:
    """JSON with a line for each row, so that a diff shows which row changed."""
    if _depth(value) <= (2 if isinstance(value, dict) else 1):
        return json.dumps(value)
    space, pairs = " " * (indent + 1), isinstance(value, dict)
    inner = ",\n".join(space + text for text in _lines(value, indent + 1))
    return f"{'{' if pairs else '['}\n{inner}\n{' ' * indent}{'}' if pairs else ']'}"


def _lines(value: Any, indent: int) -> Iterator[str]:
    if isinstance(value, dict):
        yield from (f"{json.dumps(key)}: {text_of(inner, indent)}" for key, inner in value.items())
    else:
        yield from (text_of(inner, indent) for inner in value)


def _depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else None
    return 0 if inner is None else 1 + max(map(_depth, inner), default=0)
