"""Measures this GPU's shipped kernels, fits the constants of their predicted times, and tells how good the choices are.

    python -m tests.bench.fit --fit aot/evidence_sm_90.json  measures every kernel over a grid, writes its constants
    python -m tests.bench.fit --validate                     on other shapes: the chosen kernel against the best one

With --any-rows both are of kernels for rows that start anywhere, at sizes off 8, and the constants of the rest stay.
--times FILE keeps what was measured and --from FILE ... takes it, of one run or more, instead of a GPU; --journal FILE,
a tuner's of the same GPU, adds its times of kernels that are shipped now and were not measured then; with --validate
--from, --costs FILE (evidence) chooses by other constants than the wheel's. Needs a GPU that kernels are shipped for
and no triton. Every result is checked before it is timed. Times are medians of rounds in random order, of graphs whose
weights are not in L2; of three times as many rounds where kernels are within 10 % of the best.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import lbg
from aot import BuildError, evidence, journal
from aot.configs import CONFIGS
from aot.fitting import CONSTANTS, HOPELESS, Time, by_shape, fit_all, predicted_us
from aot.rules import contenders
from tests import cases
from tests.bench.machine import facts
from tests.bench.records import SHAPES
from tests.cases import CLASSES, Case

# Shapes that people ask about: the benchmark's, and others.
BENCHMARKS = tuple((shape.m, shape.n, shape.k) for shape in SHAPES) + (
    (16384, 1024, 1024), (16384, 4096, 1024), (512, 4096, 16384), (512, 4096, 4096), (128, 4096, 4096),
    (64, 16384, 4096), (16, 4096, 16384),
)  # fmt: skip
# The same of K off 8, as layers of a few hundred columns have.
ODD_BENCHMARKS = (
    *((m, 4096, k) for m in (1, 16, 64, 256, 1024, 4096) for k in (4090, 4095)),
    (256, 1024, 300), (4096, 1024, 300), (256, 512, 100), (4096, 512, 100), (1024, 1000, 250), (16384, 1024, 479),
)  # fmt: skip
COMMAND = "python -m tests.bench.fit --fit"
LONGEST = 16384
FIT_SEED, SEED = 1, 2  # of the random shapes to fit to, and of those to validate with
POOL_ELEMENTS = LONGEST * LONGEST
# Of the time of a class's calls, what a kernel must spare them: less is within what two runs differ by.
WORTHLESS = 5e-4
TOLD_BY = 20  # shapes at least
HOST_US = 150  # a first call of less is mostly the host's
# Of the best one's time, what a kernel may take to be timed CLOSER times as often: the least of a few medians that are
# near each other is too small, and whichever is chosen then seems to be off it.
CLOSE, CLOSER = 1.1, 3
# of a check against float64: float32 accumulation over K=16384, or float16 partial sums; a wrong tile is far above
ERROR_BOUND = 2e-3


@dataclass(frozen=True)
class Run:
    """What a GPU told. Written and read as JSON."""

    facts: dict[str, str]
    sm_count: int
    kernels: dict[str, lbg.Config]  # by symbol
    times: list[Time]

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)) + "\n")

    def with_run(self, other: Run) -> Run:
        """With another run's times besides."""
        if (other.facts["gpu"], other.sm_count) != (self.facts["gpu"], self.sm_count):
            raise BuildError(f"times of a {self.facts['gpu']} and of a {other.facts['gpu']}: they are no one fit's")
        return Run(self.facts, self.sm_count, self.kernels | other.kernels, self.times + other.times)

    def with_journal(self, path: Path) -> Run:
        """With the times that a tuner's journal has of kernels that this run has none of; of what is shipped alone."""
        record = journal.read(path)
        if record.head.facts["gpu"] != self.facts["gpu"]:
            raise BuildError(f"{path} is of a {record.head.facts['gpu']}, these times of a {self.facts['gpu']}")
        shipped = {config.symbol for config in CONFIGS if config.aligned}
        missing = (shipped & record.head.kernels.keys()) - {time.symbol for time in self.times}
        more = [
            Time(*each.sizes, symbol, us, False)
            for each in record.timed
            for symbol, us in each.us.items()
            if symbol in missing
        ]
        kernels = self.kernels | {symbol: lbg.Config(**record.head.kernels[symbol]) for symbol in missing}
        return Run(self.facts, self.sm_count, kernels, self.times + more).of_shipped()

    def of_shipped(self) -> Run:
        """Without what was measured of kernels that are shipped no more."""
        shipped = {config.symbol for config in CONFIGS}
        kernels = {symbol: config for symbol, config in self.kernels.items() if symbol in shipped}
        return Run(self.facts, self.sm_count, kernels, [time for time in self.times if time.symbol in shipped])

    @staticmethod
    def load(path: Path) -> Run:
        """Raises BuildError for times of a version whose kernels have other constants."""
        data = json.loads(path.read_text())
        try:
            kernels = {symbol: lbg.Config(**row) for symbol, row in data["kernels"].items()}
        except TypeError as error:
            version = data["facts"].get("lbg", "unknown")
            told = f"{path}: times of lbg {version}, whose kernels have other constants ({error}); measure anew"
            raise BuildError(told) from None
        return Run(data["facts"], data["sm_count"], kernels, [Time(**row) for row in data["times"]])


# ---- measuring


def random_shapes(count: int, seed: int, any_rows: bool = False) -> Iterator[tuple[int, int, int]]:
    """Log-uniform; N and K are multiples of 8, which the fast kernels take, or else K is none."""
    draw = random.Random(seed)

    def size(low: int, unit: int) -> int:
        return max(low, round(math.exp(draw.uniform(math.log(low), math.log(LONGEST))) / unit) * unit)

    for _ in range(count):
        if any_rows:
            yield size(1, 1), size(16, 1), size(16, 8) - draw.randint(1, 7)
        else:
            yield size(1, 1), size(64, 8), size(64, 8)


class Bench:
    """Memory that every measurement draws on: made once, as filling it takes longer than what is timed."""

    def __init__(self) -> None:
        generator = torch.Generator("cuda").manual_seed(0)

        def draw(count: int) -> Tensor:
            return torch.empty(count, device="cuda").normal_(generator=generator)

        self.values, self.scale, self.shift = draw(POOL_ELEMENTS), draw(LONGEST), draw(LONGEST)
        self.pools: dict[tuple[str, torch.dtype], Tensor] = {}
        self.evict = torch.zeros(2**25, dtype=torch.int32, device="cuda")  # 128 MB: more than any L2

    def pool(self, what: str, dtype: torch.dtype) -> Tensor:
        if (what, dtype) not in self.pools:
            values = self.values if what == "weight" else self.values.flip(0)
            self.pools[what, dtype] = values.to(dtype, copy=True)
        return self.pools[what, dtype]

    def arguments(self, case: Case, copies: int) -> list[cases.Arguments]:
        """One call's arguments for each of `copies` weights that share no byte."""
        x = self.pool("x", case.x)[: case.m * case.k].view(case.m, case.k)
        weights = self.pool("weight", case.weight)[: copies * case.n * case.k].view(copies, case.n, case.k)
        scale = self.scale[: case.n] / case.k**0.5
        return [cases.Arguments(x, weight, scale, self.shift[: case.n]) for weight in weights]

    def out(self, case: Case) -> Tensor:
        return self.pool("out", case.out)[: case.m * case.n].view(case.m, case.n)


def call(case: Case, arguments: cases.Arguments, out: Tensor) -> None:
    lbg.fused(*arguments, fp16_accumulate=case.fp16_accumulate, out=out)


def timed_us(work: Callable[[], object], evict: Tensor) -> float:
    evict.sum()  # reads, so that nothing is left to be written back
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def sample_check(case: Case, arguments: cases.Arguments) -> Callable[[str, Tensor], None]:
    """What checks a kernel's result: a sample of its rows and columns, the edges among them, against float64."""
    x, weight, scale, shift = arguments
    rows, columns = (torch.linspace(0, size - 1, min(size, 64), device=x.device).long() for size in (case.m, case.n))
    expected = cases.reference(cases.Arguments(x[rows], weight[columns], scale[columns], shift[columns]))

    def check(symbol: str, result: Tensor) -> None:
        found = cases.error(result[rows][:, columns], expected)
        if not found <= ERROR_BOUND + cases.ROUNDING[case.out]:
            raise RuntimeError(f"{case}: {symbol} is wrong: relative error {found:.1e}")

    return check


class KernelError(RuntimeError):
    """A kernel after which CUDA answers nothing but errors: only a new process can go on."""

    def __init__(self, symbol: str, error: str) -> None:
        super().__init__(error)
        self.symbol = symbol


def copies_of(case: Case) -> int:
    """How many weights a graph may go through, so that none is in L2 when its turn comes."""
    return max(1, min(16, POOL_ELEMENTS // (case.n * case.k)))


def explain(
    case: Case, arguments: cases.Arguments, ask: Callable[..., lbg.Explanation] = lbg.explain
) -> lbg.Explanation:
    """What dispatch says of the case's own mode: a GPU where fp16_accumulate gains nothing has to be asked for it by an
    override."""
    x, weight, *_ = arguments
    asked = partial(ask, x, weight, out_dtype=case.out, fp16_accumulate=case.fp16_accumulate)
    found = asked()
    if case.fp16_accumulate and found.chosen and not found.chosen.fp16_accumulate:
        for config in lbg.configs():
            if config.fp16_accumulate and config.arch == found.chosen.arch:
                with lbg.override(config.symbol):
                    return asked()
    return found


def measure(bench: Bench, case: Case, order: random.Random) -> list[Time]:
    """Every kernel that takes the case and relies on most, as dispatch has it, or on as much as stores to any address:
    checked, then timed."""
    explanation = explain(case, bench.arguments(case, 1)[0])
    legal = [candidate.config for candidate in explanation.candidates if candidate.why_not is None]
    rows = [config for config in legal if config.aligned] or contenders(legal, lambda config: config)
    medians, wrong = time_kernels(bench, case, [row.symbol for row in rows], order, closer=True)
    if wrong:
        raise RuntimeError(next(iter(wrong.values())))
    return [Time(case.m, case.n, case.k, row.symbol, medians[row.symbol], row == explanation.chosen) for row in rows]


def time_kernels(
    bench: Bench, case: Case, symbols: list[str], order: random.Random, closer: bool = False
) -> tuple[dict[str, float], dict[str, str]]:
    """(median us of each kernel that is right, what is wrong with each other one): checked first, then in turns; if
    `closer`, CLOSER times as often where they are close to the best one."""
    arguments, out = bench.arguments(case, copies_of(case)), bench.out(case)
    medians: dict[str, float] = {}
    wrong: dict[str, str] = {}
    check = sample_check(case, arguments[0])

    def shortest_us() -> float:
        """Of three: a late host would have a good kernel left out, and now and then it is late twice."""
        return min(timed_us(lambda: call(case, arguments[0], out), bench.evict) for _ in range(3))

    for symbol in symbols:
        with lbg.override(symbol):
            try:
                out.fill_(torch.nan)
                call(case, arguments[0], out)
                check(symbol, out)
            except RuntimeError as error:
                try:
                    torch.cuda.synchronize()
                except RuntimeError as lasting:
                    raise KernelError(symbol, str(lasting)) from error
                wrong[symbol] = str(error)
                continue
            medians[symbol] = shortest_us()
    if not medians:
        return {}, wrong
    best = min(medians.values())
    for symbol, us in medians.items():
        if us > HOPELESS * max(best, HOST_US):  # or late three times
            with lbg.override(symbol):
                medians[symbol] = min(us, shortest_us())
    copies = max(1, min(len(arguments), round(300 / best)))
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    for symbol, us in medians.items():
        if us <= HOPELESS * max(best, HOST_US):
            graphs[symbol] = torch.cuda.CUDAGraph()
            with lbg.override(symbol), torch.cuda.graph(graphs[symbol]):
                for each in arguments[:copies]:
                    call(case, each, out)
    times: dict[str, list[float]] = {symbol: [] for symbol in graphs}
    rounds = 7 if best < 2000 else 3

    def go_round(symbols: list[str], count: int) -> dict[str, float]:
        for _ in range(count):
            for symbol in order.sample(symbols, len(symbols)):
                times[symbol].append(timed_us(graphs[symbol].replay, bench.evict) / copies)
        return {symbol: statistics.median(values) for symbol, values in times.items()}

    timed = go_round(list(graphs), rounds)
    if closer:
        close = [symbol for symbol, us in timed.items() if us <= CLOSE * min(timed.values())]
        timed = go_round(close, (CLOSER - 1) * rounds)
    return medians | timed, wrong


def shipped_here() -> dict[str, lbg.Config]:
    """By symbol."""
    device = torch.cuda.get_device_properties(0)
    arch = 10 * device.major + device.minor
    kernels = {config.symbol: config for config in lbg.configs() if config.arch == arch}
    if not kernels:
        raise RuntimeError(f"no kernel is shipped for {device.name} (sm_{arch})")
    return kernels


def measure_all(kernels: dict[str, lbg.Config], wanted: list[Case], commit: str | None = None) -> Run:
    bench, order, times = Bench(), random.Random(0), []
    for index, case in enumerate(wanted):
        times += measure(bench, case, order)
        if sys.stderr.isatty() or index % 100 == 99:
            print(f"\r{index + 1} of {len(wanted)} shapes", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    sm_count = torch.cuda.get_device_properties(0).multi_processor_count
    return Run(facts(commit), sm_count, kernels, times)


Class = tuple[torch.dtype, torch.dtype, torch.dtype, bool]


def own_classes(kernels: dict[str, lbg.Config], full_rate: bool) -> list[Class]:
    """Those that have kernels of their own: fp16_accumulate may run the others', and on a GPU of full rate does."""
    modes = {config.fp16_accumulate for config in kernels.values()} - ({True} if full_rate else set())
    return [kind for kind in CLASSES if kind[-1] in modes]


def benchmarks(any_rows: bool) -> tuple[tuple[int, int, int], ...]:
    return ODD_BENCHMARKS if any_rows else BENCHMARKS


def fit_cases(classes: list[Class], count: int, seed: int = FIT_SEED, any_rows: bool = False) -> list[Case]:
    shapes = [*benchmarks(any_rows), *random_shapes(count, seed, any_rows)]
    return [cases.of_class(Case(*shape), kind) for kind in classes for shape in shapes]


def validation_cases(classes: list[Class], count: int, seed: int = SEED, any_rows: bool = False) -> list[Case]:
    """The benchmark shapes in every class; random ones, other than the fit's, class by class in turn."""
    known = [cases.of_class(Case(*shape), kind) for kind in classes for shape in benchmarks(any_rows)]
    drawn = random_shapes(count, seed, any_rows)
    return known + [cases.of_class(Case(*shape), classes[i % len(classes)]) for i, shape in enumerate(drawn)]


# ---- judging


Costs = dict[str, dict[str, float]]  # CONSTANTS by symbol


def foreseen(run: Run, group: list[Time], costs: Costs) -> dict[str, float]:
    """By symbol, the predicted us of those that dispatch has to choose among at one shape."""
    fast = contenders(group, lambda time: run.kernels[time.symbol])
    shape = np.array([(group[0].m, group[0].n, group[0].k)])
    return {t.symbol: float(predicted_us(run.kernels[t.symbol], shape, run.sm_count, costs[t.symbol])[0]) for t in fast}


def regrets(run: Run, costs: Costs | None) -> list[dict[str, Any]]:
    """A row a shape: how much longer the chosen kernel took than the best one. `costs` choose in the wheel's place."""
    rows, own = [], all_costs(run, {}) if costs is None else costs
    for group in by_shape(run):
        best, chosen = min(group, key=lambda t: t.us), next((t for t in group if t.chosen), None)
        if costs is not None or chosen is None:  # or what was chosen is shipped no more
            predicted = foreseen(run, group, own)
            chosen = min((t for t in group if t.symbol in predicted), key=lambda t: predicted[t.symbol])
        row = {"shape": f"{best.m}x{best.n}x{best.k}", "off": round(chosen.us / best.us - 1, 4)}
        known = BENCHMARKS + ODD_BENCHMARKS
        row["kind"] = "benchmark" if (best.m, best.n, best.k) in known else "random"
        row |= {"chosen": chosen.symbol, "us": round(chosen.us, 2)}
        rows.append(row | {"best": best.symbol, "best_us": round(best.us, 2)})
    return rows


def worths(run: Run, costs: Costs) -> dict[str, float]:
    """By kernel, bfloat16's as float16's, how much longer the chosen one would take if it were not shipped: the mean
    over the shapes where it might be chosen, if they are enough to tell. Below 0, dispatch takes it for faster than it
    is and does better without."""
    found: dict[str, list[float]] = {}
    for group in by_shape(run):
        us, predicted = {t.symbol: t.us for t in group}, foreseen(run, group, costs)
        first, *others = sorted(predicted, key=predicted.__getitem__)
        for symbol in predicted:
            instead = others[0] if symbol == first and others else first
            found.setdefault(float16_twin(symbol), []).append(us[instead] / us[first] - 1)
    return {symbol: statistics.mean(some) for symbol, some in found.items() if len(some) >= TOLD_BY}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    off = [row["off"] for row in rows]
    worst = sorted(rows, key=lambda row: -row["off"])[:10]
    return {"shapes": len(rows), "median": float(np.median(off)), "p95": round(float(np.quantile(off, 0.95)), 4),
            "worst": max(off), "worst shapes": worst}  # fmt: skip


def judge(run: Run, costs: Costs | None) -> dict[str, Any]:
    rows, found = regrets(run, costs), {}
    for kind in ("benchmark", "random"):
        if some := [row for row in rows if row["kind"] == kind]:
            found[kind] = summary(some)
            print("{0}: {shapes} shapes; the chosen kernel is off the best by {median:.1%} in the median, {p95:.1%} at "
                  "the 95th percentile, {worst:.1%} at worst".format(kind, **found[kind]))  # fmt: skip
            for row in found[kind]["worst shapes"]:
                print("  {off:6.1%}  {shape:<18} {chosen} {us} us; best {best} {best_us} us".format(**row))
    worth = worths(run, costs or all_costs(run, {}))
    found["without"] = {symbol: round(longer, 5) for symbol, longer in worth.items()}
    if idle := sorted((longer, symbol) for symbol, longer in worth.items() if longer < WORTHLESS):
        print("might be spared: without it, calls of its class take so much longer")
        for longer, symbol in idle:
            print(f"  {longer:+7.2%}  {symbol}")
    return found


def float16_twin(symbol: str) -> str:
    """The kernel whose instructions it runs with bfloat16 data, or itself: aot/costs.py's, by name."""
    return symbol.replace("bf16", "f16")


def all_costs(run: Run, fitted: dict[str, dict[str, Any]]) -> Costs:
    """The fitted ones of a kernel or of its float16 twin, as dispatch has it (aot/costs.py); else the wheel's."""
    found = {}
    for symbol, config in run.kernels.items():
        row = fitted.get(symbol) or fitted.get(float16_twin(symbol))
        found[symbol] = row["cost"] if row else {name: getattr(config, name) for name in CONSTANTS}
    return found


def write_costs(path: Path, run: Run, costs: dict[str, Any], any_rows: bool = False) -> None:
    """Puts them into the file's section `tune`, beside its rows. Constants of the same GPU that are there of shipped
    kernels which this run did not time stay, and what is said of the run that they are of."""
    arch = next(iter(run.kernels.values())).arch
    tune = evidence.read(arch, path if path.exists() else None)["tune"]
    standing = tune.get("costs", {})
    if standing.get("gpu") == costs["gpu"]:
        kept = {symbol: row for symbol, row in standing["kernels"].items() if symbol in run.kernels}
        said = {key: value for key, value in costs.items() if key != "kernels"}
        before = {key: value for key, value in standing.items() if key != "since"}  # of what this fit replaces
        said = {**standing, "any_rows": said} if any_rows else {**before, **said}
        costs = said | {"kernels": kept | costs["kernels"]}
    elif any_rows and standing:
        raise BuildError(f"{path} has constants of a {standing['gpu']}, these are of a {costs['gpu']}")
    evidence.write_section(path, arch, "tune", tune | {"costs": costs})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--fit", type=Path, metavar="FILE", help="where to write the constants: aot/evidence_sm_XY.json")
    what.add_argument("--validate", action="store_true", help="tell how far the choices are from the best")
    parser.add_argument("--any-rows", action="store_true", help="kernels for rows that start anywhere, not the others")
    parser.add_argument("--times", type=Path, help="where to keep what is measured")
    parser.add_argument("--from", type=Path, dest="source", metavar="TIMES", nargs="+",
                        help="take these times, of one GPU: needs none")  # fmt: skip
    parser.add_argument("--journal", type=Path, help="a tuner's, for kernels that have no times yet")
    parser.add_argument("--costs", type=Path, help="choose by these constants instead of the wheel's")
    parser.add_argument("--count", type=int, help="random shapes: 200 of each class to fit, or 200 in all to validate")
    parser.add_argument("--weight", choices=["float16", "bfloat16"], help="classes of such a weight alone")
    parser.add_argument("--seed", type=int, help=f"of the random shapes: {FIT_SEED} to fit, {SEED} to validate")
    parser.add_argument("--json", type=Path, help="where to write how far the choices are from the best")
    parser.add_argument("--commit", help="of the wheel, where the folder is no git checkout, or another's")
    arguments = parser.parse_args()
    if arguments.source:
        run = reduce(Run.with_run, map(Run.load, arguments.source)).of_shipped()
    else:
        kernels = shipped_here()
        classes = own_classes(kernels, bool(lbg._C.gpu(torch.cuda.current_device())[4]))
        if arguments.weight:
            classes = [kind for kind in classes if kind[1] is getattr(torch, arguments.weight)]
        draw, seed = (fit_cases, FIT_SEED) if arguments.fit else (validation_cases, SEED)
        with torch.inference_mode():
            seed = seed if arguments.seed is None else arguments.seed
            wanted = draw(classes, arguments.count or 200, seed, arguments.any_rows)
            run = measure_all(kernels, wanted, arguments.commit)
    if arguments.times:
        run.save(arguments.times)
    if arguments.journal:
        run = run.with_journal(arguments.journal)
    fitted = json.loads(arguments.costs.read_text())["tune"]["costs"]["kernels"] if arguments.costs else None
    if arguments.fit:
        if strange := [symbol for symbol, config in run.kernels.items() if config.compiled_arch != config.arch]:
            raise RuntimeError(f"{strange[0]} is a verification build's: its times are no GPU's that it is shipped for")
        fitted = fit_all(run, benchmarks(arguments.any_rows))
        sources = (("--from", arguments.source or []), ("--journal", [arguments.journal] if arguments.journal else []))
        command = [COMMAND, str(arguments.fit), *(["--any-rows"] if arguments.any_rows else [])]
        command += [" ".join([flag, *map(str, paths)]) for flag, paths in sources if paths]
        head = {"measured": run.facts["date"], "gpu": run.facts["gpu"], "command": " ".join(command)}
        write_costs(arguments.fit, run, head | {"facts": run.facts, "kernels": fitted}, arguments.any_rows)
        print(f"{len(fitted)} of {len(run.kernels)} kernels fitted: rms and worst relative error")
        for symbol, row in fitted.items():
            print(f"  {row['rms']:6.1%} {row['worst']:6.1%}  {symbol:<56} {row['shapes']} shapes  {row['cost']}")
    found = judge(run, None if fitted is None else all_costs(run, fitted))
    if arguments.json:
        arguments.json.write_text(json.dumps({"facts": run.facts} | found, indent=1) + "\n")


if __name__ == "__main__":
    main()
