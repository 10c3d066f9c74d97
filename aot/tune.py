"""`python3 build.py tune`: which kernels are shipped, chosen anew by measurement.

    python3 build.py tune                                   on a machine with the GPU: all of it
    python3 build.py tune --arch sm_90 --compile-only       the candidates and their package, with no GPU
    python3 build.py tune --arch sm_90 --journal FILE       the choice, from what another machine has measured
    python3 build.py tune --arch sm_89 --verify-on sm_90    sm_89's candidates on a Hopper GPU: there only their results
                                                            are the 4090's; what is chosen goes by predicted times

Candidates (aot/candidates.py) are compiled on all cores; one that breaks a rule of the build or of the audit is dropped
with the reason. The rest become a package, `lbg` with other kernels, so that what is measured are the launchers that
are shipped. tests/bench/tune.py measures; aot/selection.py chooses; aot/evidence_sm_XY.json is written. An interrupted
run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from aot import BuildError, audit, candidates, costs, environment, evidence, journal, model, rules, selection
from aot.candidates import Candidate, Excluded
from aot.chips import REFERENCE
from aot.compile import Artifact, Report
from aot.configs import (
    MOST_IN_REGIME,
    PERSISTENT,
    ROWS,
    Config,
    Tile,
    check_classes,
    check_evidence,
    classes,
    kind_of,
    regime,
    shipped,
)
from aot.evidence import ARCHS, Measurement, Row

ROOT = Path(__file__).resolve().parents[1]
SHAPES_IN_EVIDENCE = 3  # of a row: those where it gains most over the others
NATIVE = "measured natively"
VERIFICATION = (
    "measured through the verification build, sm_{compiled} PTX assembled for sm_{runs}: no time of an {chip}"
)
PREDICTED = "; chosen by the time predicted for an {chip}, {us:.4g} us here, the measured one counting a tenth"


@dataclass(frozen=True)
class Compiled:
    """A candidate that may be measured. `report` is of its cubin for its own arch, which a prediction rests on."""

    kind: str
    promise: str
    config: Config
    why: str
    report: dict[str, Any]


@dataclass(frozen=True)
class Package:
    """What a candidate package holds, kept beside it as candidates.json."""

    arch: int
    runs_on: int
    digest: str  # of the extension: the journal's
    compiled: tuple[Compiled, ...]
    conservative: dict[str, str]  # symbol by kind
    excluded: tuple[Excluded, ...]

    def save(self, path: Path) -> None:
        evidence.write_whole(path, evidence.text_of(asdict(self)) + "\n")

    @staticmethod
    def load(path: Path) -> Package:
        try:
            data = json.loads(path.read_text())
            made = tuple(Compiled(**row | {"config": Config(**row["config"])}) for row in data.pop("compiled"))
            return Package(**data | {"compiled": made, "excluded": tuple(Excluded(**x) for x in data["excluded"])})
        except FileNotFoundError:
            raise BuildError(f"{path}: no such file; build.py tune --compile-only writes it") from None
        except (ValueError, KeyError, TypeError) as error:
            raise BuildError(f"{path} is no list of candidates: {error!r}") from None


# ---- compiling


def wanted(arch: int, only: Sequence[str]) -> tuple[dict[str, Candidate], dict[str, tuple[str, str]], list[Excluded]]:
    """(candidates by symbol, their kind and promise, what is left out) before anything is compiled."""
    found: dict[str, Candidate] = {}
    places: dict[str, tuple[str, str]] = {}
    excluded: list[Excluded] = []
    for kind in only or candidates.representative(arch):
        for promise in evidence.PROMISES:
            for each in candidates.candidates(arch, kind, promise):
                if isinstance(each, Excluded):
                    excluded.append(each)
                else:
                    found[each.config.symbol] = each
                    places[each.config.symbol] = kind, promise
    return found, places, excluded


def compile_candidates(arch: int, only: Sequence[str], jobs: int, folder: Path) -> tuple[list[Artifact], Package]:
    """Compiles for the arch itself: the candidates, then what the user's rules say to try of the plain ones."""
    import build

    kinds = only or list(candidates.representative(arch))
    found, places, excluded = wanted(arch, only)
    artifacts: dict[str, Artifact] = {}

    def drop(config: Config, error: Exception) -> None:
        text = str(error) if isinstance(error, BuildError) else f"{type(error).__name__}: {error}"
        excluded.append(Excluded(config.symbol, " ".join(text.split())[:300]))

    def compiled(configs: Iterable[Config]) -> None:
        for artifact in build.compile_configs(list(configs), None, jobs, folder, drop)[0]:
            if reason := audit.ruled_out(artifact):
                excluded.append(Excluded(artifact.config.symbol, f"the audit rules it out: {reason}"))
            else:
                artifacts[artifact.config.symbol] = artifact

    compiled(each.config for each in found.values())
    after: dict[str, Candidate] = {}
    for symbol, artifact in artifacts.items():
        if artifact.config.kernel == "tile" and (artifact.config.warps, artifact.config.stages) == rules.CONSERVATIVE:
            report = artifact.report
            facts = rules.facts(report.registers, report.spill_bytes, report.ctas_per_sm, candidates.INPUTS)
            for each in candidates.follow_ups(artifact.config, facts):
                if each.config.symbol not in found:
                    after[each.config.symbol] = each
                    places[each.config.symbol] = places[symbol]
    compiled(each.config for each in after.values())
    found |= after
    order = [symbol for symbol in found if symbol in artifacts]
    made = tuple(
        Compiled(*places[symbol], found[symbol].config, found[symbol].why, asdict(artifacts[symbol].report))
        for symbol in order
    )
    closing = {kind: candidates.conservative(arch, kind).symbol for kind in kinds}
    return [artifacts[symbol] for symbol in order], Package(arch, arch, "", made, closing, tuple(excluded))


def in_table_order(arch: int, configs: Iterable[Config]) -> list[Config]:
    """As dispatch has them: class by class, in a class the conservative kernel last."""
    order = list(classes(arch))

    def place(config: Config) -> tuple[int, bool, bool]:
        dtypes = (config.x, config.weight, config.out, config.fp16_accumulate)
        return order.index(dtypes), not config.aligned, not config.out_aligned

    return sorted(configs, key=place)


def make_package(
    arch: int, verify_on: int | None, only: Sequence[str], jobs: int, folder: Path
) -> tuple[Path, Package]:
    """(wheel, what is in it). The ordinary path from cubins to a wheel, with the candidates as the table."""
    import build
    from aot import emit, package

    artifacts, made = compile_candidates(arch, only, jobs, folder)
    if not artifacts:
        raise BuildError(f"no candidate for sm_{arch} is left: " + "; ".join(each.why for each in made.excluded[-3:]))
    closing = [candidates.conservative(arch, kind) for kind in made.conservative]
    table = in_table_order(arch, [*(artifact.config for artifact in artifacts), *closing])
    artifacts, _ = build.compile_configs(table, verify_on, jobs, folder)
    version = f"{package.version(ROOT, [arch], None)}+candidates.sm{arch}" + (f".on.sm{verify_on}" if verify_on else "")
    emit.write(artifacts, version, folder)
    library = package.extension(ROOT, folder)
    wheel = package.wheel(ROOT, version, library, folder)
    made = replace(made, runs_on=verify_on or arch, digest=digest_of(library))
    made.save(folder / "candidates.json")
    return wheel, made


def digest_of(library: Path) -> str:
    """What a journal knows its candidates by: their extension, byte for byte."""
    return hashlib.sha256(library.read_bytes()).hexdigest()[:16]


def told(made: Package) -> str:
    """Candidates by kind, and everything that is left out, with its reason."""
    lines = [f"  left out: {each.name}: {each.why}" for each in made.excluded]
    for kind in made.conservative:
        counts = [sum(c.kind == kind and c.promise == promise for c in made.compiled) for promise in evidence.PROMISES]
        lines.append(f"  {kind}: {counts[0]} candidates, {counts[1]} for results of any alignment")
    return "\n".join(lines)


# ---- measuring


def measure(wheel: Path, journal_path: Path, extra: Sequence[str]) -> int:
    """Runs tests/bench/tune.py in an environment with the candidates' wheel and no triton; its exit status."""
    import build

    python = build.clean_environment(wheel)
    command = [str(python), "-m", "tests.bench.tune", "--journal", str(journal_path.resolve()), *extra]
    return subprocess.run(command, cwd=ROOT).returncode


def gpu_arch() -> int | None:
    """Of the first GPU, None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(0)
    return int(10 * major + minor)


# ---- choosing


def predicted_us(compiled: Compiled, sizes: tuple[int, int, int]) -> float:
    """The time of a candidate on its arch's reference chip, by the audit's model."""
    report = Report(**compiled.report)
    return model.predict(compiled.config, report, REFERENCE[compiled.config.arch], *sizes).us


def order_of(tile: Tile) -> tuple[int, bool, int]:
    """From large M to small, as a class lists its kernels."""
    return -tile.tile_m, tile.kernel not in PERSISTENT, -tile.tile_m * tile.tile_n


@dataclass(frozen=True)
class Decision:
    """What is shipped for one kind and promise, and how that came about."""

    rows: tuple[Row, ...]
    log: tuple[str, ...]


def decide(
    kind: str, promise: str, record: journal.Record, made: Package, current: Sequence[Row], again: bool
) -> Decision:
    """The rows for a kind and promise. `again`: the current ones are this device's own choice of an earlier run."""
    dropped = record.dropped()
    group = {c.config.symbol: c for c in made.compiled if (c.kind, c.promise) == (kind, promise)}
    runs = [timed for timed in record.timed if (timed.kind, timed.promise) == (kind, promise)]
    right = [{s: us for s, us in timed.us.items() if s in group and s not in dropped} for timed in runs]
    if not any(right):
        return Decision(tuple(current), ())  # not measured: its rows stay as they are
    predictions: list[dict[str, float]] = []
    scores = right
    if made.runs_on != made.arch:  # no time of the chip that the kernels are for
        predictions = [{s: predicted_us(group[s], timed.sizes) for s in us} for timed, us in zip(runs, right)]
        scores = [selection.blended(p, us) if us else {} for p, us in zip(predictions, right)]
    incumbents = [s for row in current for s in group if candidates.tile_from(group[s].config) == Tile(**row.tile)]
    choice = selection.choose(
        scores, incumbents, {s: regime(c.config) for s, c in group.items()}, selection.MARGIN if again else 0.0
    )
    chosen = sorted(choice.chosen, key=lambda symbol: order_of(candidates.tile_from(group[symbol].config)))
    rows = []
    for symbol in chosen:
        shapes = sorted((i for i, us in enumerate(right) if symbol in us),
                        key=lambda i: _lead(scores[i], chosen, symbol))[-SHAPES_IN_EVIDENCE:]  # fmt: skip
        found = [
            _measurement(
                symbol, runs[i], right[i], scores[i], chosen, record, made, predictions[i] if predictions else {}
            )
            for i in reversed(shapes)
        ]
        rows.append(Row(_tile_fields(candidates.tile_from(group[symbol].config)), tuple(found), group[symbol].why))
    gone = [f"{kind}, {promise}: {s} is dropped: {error}" for s, error in dropped.items() if s in group]
    return Decision(tuple(rows), tuple(gone) + tuple(f"{kind}, {promise}: {line}" for line in choice.log))


def _lead(us: Mapping[str, float], chosen: Sequence[str], symbol: str) -> float:
    """How many times as slow the best of the other chosen ones is."""
    others = [us[other] for other in chosen if other != symbol and other in us]
    return min(others, default=us[symbol]) / us[symbol]


def _measurement(
    symbol: str,
    timed: journal.Timed,
    us: Mapping[str, float],
    scores: Mapping[str, float],
    chosen: Sequence[str],
    record: journal.Record,
    made: Package,
    predicted: Mapping[str, float],
) -> Measurement:
    head, chip = record.head, REFERENCE[made.arch].name
    conservative_us = timed.us.get(made.conservative[timed.kind])
    runner_up = min((s for s in chosen if s != symbol and s in us), key=lambda s: scores[s], default=None)
    how = NATIVE
    if predicted:
        how = VERIFICATION.format(compiled=made.arch, runs=made.runs_on, chip=chip)
        how += PREDICTED.format(chip=chip, us=predicted[symbol])
        how += f", {predicted[runner_up]:.4g} us of the runner-up" if runner_up else ""
    return Measurement(
        shape=timed.shape,
        kernel=symbol,
        us=us[symbol],
        conservative_us=conservative_us,
        gain=conservative_us / us[symbol] if conservative_us else None,
        runner_up=runner_up,
        runner_up_us=us[runner_up] if runner_up else None,
        device=head.key.device,
        date=head.facts.get("date", ""),
        how=how,
    )


def _tile_fields(tile: Tile) -> dict[str, Any]:
    return {name: value for name, value in asdict(tile).items() if value != Tile.__dataclass_fields__[name].default}


def costs_of(record: journal.Record, made: Package, rows: evidence.Rows, before: Mapping[str, Any]) -> dict[str, Any]:
    """The cost constants by symbol. A kernel that was fitted on as many shapes before keeps its own; others take the
    fit of this run, and other classes of a kind that of the one which was measured (`of`). A bfloat16 kernel that has
    none of its own gets none: aot/costs.py takes its float16 twin's."""
    from aot.fitting import Time, fit_all

    measured_in = candidates.representative(made.arch)
    twins = {}  # of what is shipped, the kernel that was measured
    for config in shipped(made.arch, rows):
        if config.row_major:
            dtypes = measured_in[kind_of(made.arch, config.x, config.out, config.fp16_accumulate)]
            twins[config] = replace(config, x=dtypes[0], weight=dtypes[1], out=dtypes[2]).symbol
    # A fit is to choices: what is not shipped takes no part.
    wanted = set(twins.values())
    times = [
        Time(*timed.sizes, symbol, us, False)
        for timed in record.timed
        for symbol, us in timed.us.items()
        if symbol in wanted
    ]
    kernels = {symbol: SimpleNamespace(**row) for symbol, row in record.head.kernels.items()}
    fitted = fit_all(SimpleNamespace(sm_count=record.head.sm_count, kernels=kernels, times=times))
    standing = before.get("kernels", {}) if before.get("gpu") == record.head.key.device else {}
    found: dict[str, Any] = {}
    for config, twin in twins.items():
        new, old = fitted.get(twin), standing.get(config.symbol)
        if not old and config.weight == "bf16" and costs.float16_twin(config).symbol in found:
            continue
        if old and (not new or old["shapes"] >= new["shapes"]):
            found[config.symbol] = old
        elif new:
            found[config.symbol] = new if twin == config.symbol else new | {"of": twin}
    if all(row == standing.get(symbol) for symbol, row in found.items()):
        return {**before, "kernels": found}  # what is said of the run that they are of stays too
    head = {"measured": record.head.facts.get("date"), "gpu": record.head.key.device, "facts": record.head.facts}
    if standing and "any_rows" in before:  # no candidates are of those, and their constants stay
        head["any_rows"] = before["any_rows"]
    return head | {"kernels": found}


def section(
    record: journal.Record, made: Package, before: dict[str, Any], command: str
) -> tuple[dict[str, Any], list[str]]:
    """(the section `tune` with what this run chose, what changed and why). `before` is the whole file as it is."""
    if record.head.key.candidates != made.digest:
        raise BuildError(
            f"the journal is of candidates {record.head.key.candidates}; candidates.json has {made.digest}"
        )
    tune, rows = before["tune"], evidence.rows(before)
    log: list[str] = []
    verification = made.runs_on != made.arch
    again = tune.get("device") == record.head.key.device and tune.get("runs_on") == made.runs_on
    for kind in rows:
        for promise in evidence.PROMISES:
            decision = decide(kind, promise, record, made, rows[kind][promise], again)
            rows[kind][promise] = decision.rows
            log += decision.log
    check_evidence(made.arch, rows)
    check_classes(list(shipped(made.arch, rows)))
    how = "every candidate checked against float64, then timed in turns; medians, weights not in L2"
    if verification:
        how += (
            f". Through the verification build on sm_{made.runs_on}: no time here is an {REFERENCE[made.arch].name}'s"
        )
    found: dict[str, Any] = {
        "device": record.head.key.device,
        "runs_on": made.runs_on,
        "date": record.head.facts.get("date", ""),
        "command": command,
        "how": how,
        "facts": record.head.facts,
        "rules": f"at most {MOST_IN_REGIME} a regime, the conservative one among them; "
        f"under {rules.LEAST_GAIN - 1:.0%} gain is dropped",
        "log": log,
        "kinds": {kind: {promise: [row.written() for row in some] for promise, some in promises.items()}
                  for kind, promises in rows.items()},
    }  # fmt: skip
    made_costs = tune.get("costs") if verification else costs_of(record, made, rows, tune.get("costs", {}))
    return found | ({"costs": made_costs} if made_costs else {}), log


def refused(arch: int, rows: evidence.Rows, jobs: int) -> dict[tuple[str, str, Tile], str]:
    """What cannot be shipped of these rows, and why, by (kind, promise, tile). A tile was measured in one class of its
    kind; in another the same tile may spill."""
    import build

    found: dict[tuple[str, str, Tile], str] = {}

    def drop(config: Config, error: Exception) -> None:
        if not config.aligned:
            raise error  # a conservative one: there is nothing to take in its place
        kind = kind_of(arch, config.x, config.out, config.fp16_accumulate)
        promise = "rows" if config.out_aligned else "any_out"
        found[kind, promise, candidates.tile_from(config)] = " ".join(str(error).split())[:300]

    build.compile_configs(list(shipped(arch, rows)), None, jobs, ROOT / "build" / f"chosen-sm_{arch}", drop)
    return found


def without(made: Package, tiles: Mapping[tuple[str, str, Tile], str]) -> Package:
    """The package as if these tiles were no candidates."""
    kept, gone = [], []
    for each in made.compiled:
        reason = tiles.get((each.kind, each.promise, candidates.tile_from(each.config)))
        if reason is None:
            kept.append(each)
        else:
            gone.append(Excluded(each.config.symbol, f"not in every class of its kind: {reason}"))
    if len(gone) < len(tiles):
        raise BuildError(f"a row that this run does not choose anew cannot be built: {', '.join(tiles.values())}")
    return replace(made, compiled=tuple(kept), excluded=(*made.excluded, *gone))


def write_choice(journal_path: Path, candidates_path: Path, arch: int, out: Path, command: str, jobs: int) -> None:
    record, made = journal.read(journal_path), Package.load(candidates_path)
    if made.arch != arch or record.head.arch != arch:
        raise BuildError(f"{journal_path} is of sm_{record.head.arch}, {candidates_path} of sm_{made.arch}; "
                         f"wanted is sm_{arch}")  # fmt: skip
    before = evidence.read(arch, out if out.exists() else None)
    tune, log = section(record, made, before, command)
    while broken := refused(arch, evidence.rows({"arch": f"sm_{arch}", "tune": tune}), jobs):
        print("\n".join(f"left out: {reason}" for reason in broken.values()))
        made = without(made, broken)
        tune, log = section(record, made, before, command)
    evidence.write_section(out, arch, "tune", tune)
    print("\n".join(log) or "the choice is as it was")
    rows, seen = evidence.rows(evidence.read(arch, out)), {(timed.kind, timed.promise) for timed in record.timed}
    kept = [f"{kind} ({promise})" for kind in rows for promise in rows[kind] if (kind, promise) not in seen]
    print(f"{sum(len(some) for promises in rows.values() for some in promises.values())} rows in {out}; "
          f"not measured, and as they were: {', '.join(kept) or 'none'}")  # fmt: skip


# ---- the command


def parsed(arguments: list[str]) -> argparse.Namespace:
    from build import arch_number

    parser = argparse.ArgumentParser(
        "build.py tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", type=arch_number, metavar="sm_XY", help="default: the GPU's")
    parser.add_argument("--verify-on", type=arch_number, metavar="sm_XY", help="assemble the candidates for this arch")
    parser.add_argument(
        "--only", action="append", default=[], metavar="KIND", help="a kind of class; repeat for several"
    )
    parser.add_argument(
        "--shapes", nargs="+", metavar="MxNxK", help="besides, default: the benchmark's and random ones"
    )
    parser.add_argument("--budget-seconds", type=float, help="of measuring; the same command goes on afterwards")
    parser.add_argument("--compile-only", action="store_true", help="stop at the candidates' wheel: needs no GPU")
    parser.add_argument("--journal", type=Path, help="choose from this journal, measured elsewhere: needs no GPU")
    parser.add_argument("--candidates", type=Path, help="the candidates.json of that journal's package")
    parser.add_argument(
        "--evidence", type=Path, metavar="FILE", help="what to write (default: aot/evidence_sm_XY.json)"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compile processes (default: one a core)")
    options = parser.parse_args(arguments)
    if options.verify_on and (not options.arch or options.verify_on < options.arch):
        parser.error("--verify-on needs --arch, the older one to verify")
    if options.journal and options.compile_only:
        parser.error("--journal chooses, --compile-only compiles: give one of them")
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1; got {options.jobs}")
    return options


def folder_of(arch: int, verify_on: int | None) -> Path:
    return ROOT / "build" / (f"candidates-sm_{arch}" + (f"-on-sm_{verify_on}" if verify_on else ""))


def main(arguments: list[str]) -> int:
    options = parsed(arguments)
    # What the evidence says was typed, but for the folders of this machine.
    command = " ".join(["python3 build.py tune", *(Path(word).name if "/" in word else word for word in arguments)])
    here = None if options.journal or options.compile_only else gpu_arch()
    if not (options.journal or options.compile_only):
        check_gpu(here, options.arch, options.verify_on)
    arch = options.arch or here
    if arch is None:
        raise BuildError("without a GPU, tune needs --arch: " + " or ".join(f"sm_{each}" for each in ARCHS))
    if strange := [kind for kind in options.only if kind not in ROWS[arch]]:
        raise BuildError(f"sm_{arch} has no kind of class {strange[0]!r}; it has {', '.join(map(repr, ROWS[arch]))}")
    if not options.compile_only:
        need_numpy()
    folder = folder_of(arch, options.verify_on)
    out = options.evidence or evidence.path_of(arch)
    if options.journal:
        write_choice(
            options.journal, options.candidates or folder / "candidates.json", arch, out, command, options.jobs
        )
        return 0
    wheel, made = make_package(arch, options.verify_on, options.only, options.jobs, folder)
    print(told(made))
    path = folder / "journal.jsonl"
    extra = ["--shapes", *options.shapes] if options.shapes else []
    extra += ["--budget-seconds", f"{options.budget_seconds:g}"] if options.budget_seconds else []
    if options.compile_only:
        verify = f" --verify-on sm_{options.verify_on}" if options.verify_on else ""
        print(f"{len(made.compiled)} candidates in {wheel}\non the machine with the GPU, with that wheel installed:\n"
              f"  {' '.join(['python -m tests.bench.tune --journal FILE', *extra])}\nthen here:\n"
              f"  python3 build.py tune --arch sm_{arch}{verify} --journal FILE")  # fmt: skip
        return 0
    if status := measure(wheel, path, extra):
        return status
    write_choice(path, folder / "candidates.json", arch, out, command, options.jobs)
    return 0


def check_gpu(here: int | None, arch: int | None, verify_on: int | None) -> None:
    """Raises BuildError unless this machine's GPU runs what is to be measured."""
    if here is None:
        raise BuildError("tune needs a CUDA GPU, and there is none here: --compile-only makes the candidates' package "
                         "for a machine that has one; --journal FILE chooses from what that measured")  # fmt: skip
    runs = verify_on or arch or here
    if here != runs or runs not in ARCHS:
        raise BuildError(f"this machine's GPU is an sm_{here}; the candidates would be for sm_{runs}, of "
                         f"{', '.join(f'sm_{each}' for each in ARCHS)}")  # fmt: skip


def need_numpy() -> None:
    """The fit of the constants needs it, and no build does."""
    if importlib.util.find_spec("numpy") is None:
        print("installing numpy", flush=True)
        environment.pip(Path(sys.executable), "install", "numpy")
        importlib.invalidate_caches()
