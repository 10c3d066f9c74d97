"""Why these kernels: what their machine code takes of a chip, and the time that it comes to. Needs no GPU.

    python3 build.py audit [--arch sm_XY] [--chip NAME] [--json FILE]
    python3 build.py audit --against TIMES.json    the model against what `tests.bench.fit --validate --times` kept

The times are predicted (aot/model.py, docs/audit.md): nothing that this command prints was measured, but for the times
that --against reads.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from aot import BuildError, costs, journal, model, rules
from aot.chips import CHIPS, REFERENCE, SUB_CORES, Chip, named
from aot.compile import MOST_OTHER_SLOTS, Artifact
from aot.configs import ARCHS, NAMES, Config, class_of
from tests.bench.records import SHAPES, Shape

ROOT = Path(__file__).resolve().parents[1]
# What a fast sm_89 kernel has to reach, all on an RTX 4090.
LEAST_TENSOR_SHARE = 0.95  # of the predicted time, on LARGE shapes
LARGE_FLOP = 1e11
LONGEST_MS = {(16384, 4096, 4096): 3.50}  # with float32 accumulation
# What the model has to reach against measured times.
LEAST_RANK_CORRELATION = 0.8
MOST_REGRET = 0.05  # on the median shape

MODELLED = "predicted from machine code and the chip's facts; nothing below was measured on it"


# ---- one kernel


@dataclass(frozen=True)
class Target:
    what: str
    value: float
    bound: str
    holds: bool


def slots_share(artifact: Artifact, chip: Chip) -> float:
    """Issue slots of all but the matrix instructions in the main loop, over the cycles that those take."""
    config, report = artifact.config, artifact.report
    others = (report.loop_instructions - report.loop_mma) * config.multiplying_warps / SUB_CORES
    return others / (model.step(config, report, chip).matrix_us * chip.clock_mhz * report.loop_steps)


def targets(artifact: Artifact, chip: Chip) -> list[Target]:
    """Of one fast kernel for sm_89. Few rows wait for the weight, whatever else the loop issues."""
    config, report = artifact.config, artifact.report
    held = model.bounds(config, report, chip)["all"]
    rows = [
        Target("matrix instructions, of those that whole K steps need", report.loop_steps / round(report.loop_steps),
               "1", report.loop_steps % 1 == 0),
        Target("bytes spilt", report.spill_bytes, "0", report.spill_bytes == 0),
        Target("CTAs an SM, or else 3 stages", held, ">= 2", held >= 2 or config.stages >= 3),
    ]  # fmt: skip
    if config.tile_m >= 64:
        share = slots_share(artifact, chip)
        rows.append(Target("other issue slots, of the matrix instructions' cycles", round(share, 4),
                           f"<= {MOST_OTHER_SLOTS:g}", share <= MOST_OTHER_SLOTS))  # fmt: skip
    return rows


def ruled_out(artifact: Artifact) -> str | None:
    """Why a candidate for sm_89 is not worth a GPU's time; None if it is, and for an arch without static targets."""
    if artifact.config.arch != 89 or not artifact.config.aligned:
        return None
    missed = next((target for target in targets(artifact, REFERENCE[89]) if not target.holds), None)
    return missed and f"{missed.what}: {missed.value:g}, wanted {missed.bound}"


def kernel_row(artifact: Artifact, chip: Chip) -> dict[str, Any]:
    config, report = artifact.config, artifact.report
    step, held = model.step(config, report, chip), model.bounds(config, report, chip)
    by = [name for name in ("registers", "shared", "warps") if held[name] == held["all"]]
    cycles = {name.removesuffix("_us"): round(us * chip.clock_mhz, 1) for name, us in asdict(step).items()}
    shared = report.loop_shared_bytes / report.loop_steps
    return {
        "symbol": config.symbol,
        "mix": report.loop_mix,
        "loader mix": report.loader_mix,
        "K steps a pass": report.loop_steps,
        "other slots of matrix cycles": round(slots_share(artifact, chip), 4),
        "shared bytes a K step": round(shared + (model.operand_bytes(config) if config.tma else 0)),
        "cycles a K step": cycles,  # of a CTA with the SM to itself
        "registers": report.registers,
        "spill bytes": report.spill_bytes,
        "CTAs an SM": held["all"],
        "limited by": by or ["blocks"],
        "stores an output": report.stores_per_output,
        "cost": asdict(model.cost(config, report, chip)),
        "targets": [asdict(t) for t in targets(artifact, chip)] if config.arch == 89 and config.aligned else [],
    }


# ---- what dispatch would choose


def why_not(config: Config, shape: Shape) -> bool:
    """Whether contiguous operands of this shape break what the kernel relies on (csrc/dispatch.cpp's broken())."""
    return (config.aligned and shape.k % 8 != 0) or (config.out_aligned and shape.n % 8 != 0)


def choose(rows: Sequence[Artifact], shape: Shape, chip: Chip, us: dict[str, float] | None = None) -> Artifact:
    """csrc/dispatch.cpp's choose() among a class: by `us`, by symbol, or else by what dispatch expects."""

    def expected(a: Artifact) -> float:
        if us is not None:
            return us[a.config.symbol]
        at_once = max(1, a.report.ctas_per_sm["all"])
        made, sms = costs.cost(a.config, a.report, chip.full_rate), chip.sm_count
        held = REFERENCE[a.report.arch].l2_share * sms
        return model.predicted_us(a.config, made, at_once, shape.m, shape.n, shape.k, sms, held)

    legal = [a for a in rows if not why_not(a.config, shape)]
    return min(rules.contenders(legal, lambda a: a.config), key=expected)


def label(config: Config) -> str:
    x, weight, out = (NAMES[dtype] for dtype in (config.x, config.weight, config.out))
    mode = ", fp16_accumulate" if config.fp16_accumulate else ""
    return f"x {x}, weight {weight}, result {out}{mode}"


def shape_row(rows: Sequence[Artifact], shape: Shape, chip: Chip) -> dict[str, Any]:
    chosen = choose(rows, shape, chip)
    config, report = chosen.config, chosen.report
    predicted = model.predict(config, report, chip, shape.m, shape.n, shape.k)
    peak = chip.tflops(model.mma_cycles(config, report, chip))
    tensor = shape.flop / peak / 1e6 / predicted.us
    found = {"class": label(config), "shape": str(shape), "kernel": config.symbol, "us": predicted.us,
             "limiter": predicted.limiter, "tensor share": round(tensor, 4), "shares": predicted.shares}  # fmt: skip
    if chip == REFERENCE[89] and shape.flop >= LARGE_FLOP:
        held = [Target("of the tensor pipe's peak", round(tensor, 4), f">= {LEAST_TENSOR_SHARE:g}",
                       tensor >= LEAST_TENSOR_SHARE)]  # fmt: skip
        longest = LONGEST_MS.get((shape.m, shape.n, shape.k))
        if longest is not None and not config.fp16_accumulate:
            held.append(Target("ms", round(predicted.us / 1e3, 3), f"<= {longest:g}", predicted.us <= longest * 1e3))
        found["targets"] = [asdict(target) for target in held]
    return found


def by_class(artifacts: Sequence[Artifact]) -> list[list[Artifact]]:
    groups: dict[object, list[Artifact]] = defaultdict(list)
    for artifact in artifacts:
        groups[class_of(artifact.config)].append(artifact)
    return list(groups.values())


def audit(artifacts: Sequence[Artifact], chip: Chip, shapes: Sequence[Shape] = SHAPES) -> dict[str, Any]:
    """All that the command says, for JSON. On a chip of full rate fp16_accumulate's kernels are not dispatched to."""
    classes = [rows for rows in by_class(artifacts) if not (chip.full_rate and rows[0].config.fp16_accumulate)]
    return {
        "said": f"{chip.name}: {MODELLED}",
        "chip": asdict(chip),
        "kernels": [kernel_row(artifact, chip) for artifact in artifacts],
        "shapes": [shape_row(rows, shape, chip) for rows in classes for shape in shapes],
    }


# ---- tables


def table(rows: Sequence[Sequence[object]]) -> str:
    """The first row is the head; the first column is left-aligned, the others right-aligned."""
    text = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*text)]
    return "\n".join(
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))) for row in text
    )


KINDS = ("matrix", "shared load", "shared store", "async copy", "global load", "integer", "convert", "float",
         "barrier", "branch", "other")  # fmt: skip


def kernel_table(rows: Sequence[dict[str, Any]]) -> str:
    head = ["kernel", *KINDS, "steps", "slots", "matrix", "issue", "shared", "L2", "shared B", "regs", "CTAs", "by",
            "stores"]  # fmt: skip
    lines: list[list[object]] = [list(head)]
    for row in rows:
        cycles = row["cycles a K step"]
        lines.append([row["symbol"], *(row["mix"].get(kind, 0) for kind in KINDS), f"{row['K steps a pass']:g}",
                      f"{row['other slots of matrix cycles']:.1%}",
                      *(f"{cycles[name]:.0f}" for name in ("matrix", "issue", "shared", "l2")),
                      row["shared bytes a K step"], row["registers"], row["CTAs an SM"], ",".join(row["limited by"]),
                      f"{row['stores an output']:g}"])  # fmt: skip
    return table(lines)


def shape_table(rows: Sequence[dict[str, Any]]) -> str:
    parts, last = [], ""
    lines: list[list[object]] = []

    def close() -> None:
        if lines:
            parts.append(f"{last}\n{table([['MxNxK', 'us', 'limiter', 'its share', 'of peak', 'kernel'], *lines])}")

    for row in rows:
        if row["class"] != last:
            close()
            lines, last = [], row["class"]
        lines.append([row["shape"], f"{row['us']:.1f}", row["limiter"], f"{row['shares'][row['limiter']]:.0%}",
                      f"{row['tensor share']:.1%}", row["kernel"]])  # fmt: skip
    close()
    return "\n\n".join(parts)


def target_lines(found: dict[str, Any]) -> list[str]:
    """The targets of one kind together: how many hold, and each that does not."""
    kinds: dict[str, list[tuple[str, dict[str, Any]]]] = defaultdict(list)
    for row in found["kernels"]:
        for target in row["targets"]:
            kinds[f"{target['what']}: {target['bound']}"].append((row["symbol"], target))
    for row in found["shapes"]:
        for target in row.get("targets", ()):
            what = f"{target['what']}: {target['bound']} (predicted)"
            kinds[what].append((f"{row['class']}, {row['shape']}", target))
    lines = []
    for what, rows in kinds.items():
        values = [target["value"] for _, target in rows]
        worst = f"{min(values):g} to {max(values):g}"
        missed = [(name, target) for name, target in rows if not target["holds"]]
        state = "holds" if not missed else "does not hold"
        lines.append(f"{state:<13}  {what}; {len(rows) - len(missed)} of {len(rows)}, values {worst}")
        lines += [f"{'':<15}{name}: {target['value']:g}" for name, target in missed]
    return lines


def said(found: dict[str, Any], chip: Chip) -> str:
    assumed = f" Of the chip's facts these are assumptions: {', '.join(chip.assumed)}." if chip.assumed else ""
    head = f"""{chip.name}, {chip.sm_count} SMs at {chip.clock_mhz} MHz. All times are {MODELLED}.{assumed}
Counts are of a warp's pass through the main loop; 'slots' is what all but its matrix instructions issue, over the
cycles that those take; matrix, issue, shared and L2 are cycles of one CTA's K step with an SM to itself. Bank conflicts
are not in machine code: shared memory is counted as free of them. 'its share' is what the limiter would take alone, of
the predicted time; 'of peak' is of the tensor cores' peak in the class's mode, tile padding and last waves off."""
    parts = [head, kernel_table(found["kernels"]), shape_table(found["shapes"])]
    if lines := target_lines(found):
        parts.append("Targets on this chip:\n" + "\n".join(lines))
    return "\n\n".join(parts)


# ---- against measured times


def ranks(values: Sequence[float]) -> list[float]:
    """From 1 up; equals share the mean of theirs."""
    order = sorted(range(len(values)), key=values.__getitem__)
    found = [0.0] * len(values)
    first = 0
    while first < len(order):
        last = first
        while last + 1 < len(order) and values[order[last + 1]] == values[order[first]]:
            last += 1
        for index in order[first : last + 1]:
            found[index] = (first + last) / 2 + 1
        first = last + 1
    return found


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation; 0 if either has but one value."""
    if len(set(a)) < 2 or len(set(b)) < 2:
        return 0.0
    return statistics.correlation(ranks(a), ranks(b))


@dataclass(frozen=True)
class Group:
    """The kernels of one class at one shape."""

    shape: Shape
    symbols: list[str]
    predicted: list[float]
    measured: list[float]
    picked: int

    @property
    def regret(self) -> float:
        """How much longer the picked kernel took than the best one."""
        return self.measured[self.picked] / min(self.measured) - 1

    @property
    def held_out(self) -> bool:
        """Whether the fitted constants of aot/model.py and aot/chips.py were fitted without it."""
        return zlib.crc32(str(self.shape).encode()) % 2 == 1


def summary(groups: Sequence[Group]) -> dict[str, Any]:
    regrets = sorted(g.regret for g in groups)
    several = [spearman(g.predicted, g.measured) for g in groups if len(g.symbols) > 2]
    everywhere = [us for g in groups for us in g.predicted], [us for g in groups for us in g.measured]
    off = [abs(p / m - 1) for p, m in zip(*everywhere)]
    return {
        "shapes": len(groups),
        "times": len(off),
        "spearman": round(spearman(*everywhere), 4),
        "spearman of a shape, median": round(statistics.median(several), 4) if several else None,
        "regret, median": round(statistics.median(regrets), 4),
        "regret, p95": round(regrets[int(0.95 * (len(regrets) - 1))], 4),
        "regret, worst": round(regrets[-1], 4),
        "off, median": round(statistics.median(off), 4),
    }


def groups_of(data: dict[str, Any], artifacts: Sequence[Artifact], chip: Chip) -> list[Group]:
    """Raises BuildError if what was measured are not these kernels."""
    mine = {a.config.symbol: a for a in artifacts}
    for symbol, row in data["kernels"].items():
        report = mine[symbol].report if symbol in mine else None
        if report and (row["registers"], row["shared_bytes"]) != (report.registers, report.shared_bytes):
            raise BuildError(f"{symbol} was measured with {row['registers']} registers and {row['shared_bytes']} bytes "
                             f"of shared memory; here it has {report.registers} and {report.shared_bytes}")  # fmt: skip
    times: dict[tuple[object, ...], dict[str, float]] = defaultdict(dict)
    for row in data["times"]:
        if row["symbol"] in mine:
            key = row["m"], row["n"], row["k"], class_of(mine[row["symbol"]].config)
            times[key][row["symbol"]] = min(row["us"], times[key].get(row["symbol"], row["us"]))
    found = []
    for (m, n, k, _), us in times.items():
        shape, rows = Shape(int(str(m)), int(str(n)), int(str(k))), [mine[symbol] for symbol in us]
        predicted = {a.config.symbol: model.predict(a.config, a.report, chip, shape.m, shape.n, shape.k).us
                     for a in rows}  # fmt: skip
        picked = choose(rows, shape, chip, predicted).config.symbol
        symbols = list(us)
        found.append(Group(shape, symbols, [predicted[s] for s in symbols], [us[s] for s in symbols],
                           symbols.index(picked)))  # fmt: skip
    return found


def against(data: dict[str, Any], artifacts: Sequence[Artifact], chip: Chip) -> dict[str, Any]:
    groups = groups_of(data, artifacts, chip)
    found: dict[str, Any] = {"chip": chip.name, "facts": data["facts"]}
    found["left out"] = sorted(set(data["kernels"]) - {a.config.symbol for a in artifacts})
    halves = {"all shapes": groups, "fitted on": [g for g in groups if not g.held_out],
              "held out": [g for g in groups if g.held_out]}  # fmt: skip
    found |= {name: summary(some) for name, some in halves.items() if some}
    worst = sorted(groups, key=lambda g: -g.regret)[:5]
    found["worst"] = [
        {"shape": str(g.shape), "picked": g.symbols[g.picked], "us": round(g.measured[g.picked], 2),
         "best": g.symbols[g.measured.index(min(g.measured))], "best us": round(min(g.measured), 2)} for g in worst
    ]  # fmt: skip
    whole = found["all shapes"]
    goals = [
        Target("rank correlation of predicted and measured times", whole["spearman"], f">= {LEAST_RANK_CORRELATION:g}",
               whole["spearman"] >= LEAST_RANK_CORRELATION),
        Target("regret of picking by the model, on the median shape", whole["regret, median"], f"<= {MOST_REGRET:g}",
               whole["regret, median"] <= MOST_REGRET),
    ]  # fmt: skip
    found["targets"] = [asdict(goal) for goal in goals]
    return found


def journaled(record: journal.Record) -> dict[str, Any]:
    """A tuner's journal as tests.bench.fit keeps its times."""
    times = [{"m": m, "n": n, "k": k, "symbol": symbol, "us": us}
             for timed in record.timed for m, n, k in [timed.sizes] for symbol, us in timed.us.items()]  # fmt: skip
    return {"facts": record.head.facts, "kernels": record.head.kernels, "times": times}


def said_against(found: dict[str, Any]) -> str:
    facts = found["facts"]
    lines = [
        f"Measured: on {facts['gpu']}, {facts['date']} ({facts['kernels']}).",
        f"Predicted: for {found['chip']}, from the same cubins' machine code. What is fitted was fitted on one half of "
        "the shapes of earlier runs, on an H200 and an H100.",
        "",
    ]
    names = list(found["all shapes"])
    kinds = [kind for kind in ("all shapes", "fitted on", "held out") if kind in found]
    lines += [table([["", *kinds], *([name, *(found[kind][name] for kind in kinds)] for name in names)]), ""]
    lines += [f"{'holds' if t['holds'] else 'does not hold'}: {t['what']}, {t['value']:g} ({t['bound']})"
              for t in found["targets"]]  # fmt: skip
    lines += ["", "The costliest picks:"]
    lines += ["  {shape}: {picked} {us} us, best {best} {best us} us".format(**row) for row in found["worst"]]
    if found["left out"]:
        lines.append(f"Left out, as they are shipped no more: {', '.join(found['left out'])}")
    return "\n".join(lines)


# ---- the command


def chip_of(gpu: str) -> Chip:
    """The chip that a GPU's name as CUDA has it stands for."""
    found = [chip for chip in CHIPS.values() if chip.name.removesuffix(" SXM") in gpu.split() or chip.name in gpu]
    if not found:
        raise BuildError(f"no chip of {', '.join(CHIPS)} is the {gpu} of these times; name one with --chip")
    return found[0]


def main(arguments: list[str]) -> int:
    import build

    parser = argparse.ArgumentParser(prog="build.py audit", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--arch", type=build.arch_number, action="append", metavar="sm_XY",
                        help="kernels of this architecture alone; repeat for several (default: all)")  # fmt: skip
    parser.add_argument("--chip", help=f"the GPU to predict for: {', '.join(CHIPS)}; default: each arch's first")
    parser.add_argument("--against", type=Path, metavar="TIMES", help="measured times to hold the model to")
    parser.add_argument("--candidates", type=Path, metavar="JSON",
                        help="candidates.json of a tuner's package; TIMES then is its journal")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write all that is said, and more")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes for what the cache lacks")
    options = parser.parse_args(arguments)
    if options.candidates and not options.against:
        parser.error("--candidates says what --against was measured on: give both")

    def artifacts(arch: int, verify_on: int | None = None) -> list[Artifact]:
        name = f"sm_{arch}" + (f"-on-sm_{verify_on}" if verify_on else "")
        folder = ROOT / "build" / "audit" / name
        if options.candidates:
            from aot.tune import Package

            configs = [each.config for each in Package.load(options.candidates).compiled]
            return build.compile_configs(configs, verify_on, options.jobs, folder)[0]
        return build.compile_all([arch], verify_on, options.jobs, folder)[0]

    results: dict[str, Any] = {}
    if options.against:
        tuned = options.candidates is not None
        data = journaled(journal.read(options.against)) if tuned else json.loads(options.against.read_text())
        chip = named(options.chip) if options.chip else chip_of(data["facts"]["gpu"])
        compiled, ran = {(row["compiled_arch"], row["arch"]) for row in data["kernels"].values()}.pop()
        if chip.arch != ran:
            raise BuildError(f"{options.against}: these kernels ran on sm_{ran}; {chip.name} is sm_{chip.arch}")
        results = against(data, artifacts(compiled, ran if ran != compiled else None), chip)
        print(said_against(results))
    else:
        archs = options.arch or ([named(options.chip).arch] if options.chip else list(ARCHS))
        for arch in archs:
            chip = named(options.chip) if options.chip else REFERENCE[arch]
            if chip.arch != arch:
                raise BuildError(f"{chip.name} is sm_{chip.arch}: sm_{arch} kernels do not run there")
            results[f"sm_{arch}"] = audit(artifacts(arch), chip)
            print(said(results[f"sm_{arch}"], chip), end="\n\n")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0
