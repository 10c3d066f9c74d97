"""Measures the tuner's candidates on this machine's GPU: `python3 build.py tune` made their package, and chooses.

    python -m tests.bench.tune --journal FILE [--shapes MxNxK ...] [--budget-seconds S]

Needs the candidates' wheel, torch and a GPU that they run on; no triton. Every candidate is checked against float64 at
every shape before it is timed; times are medians of rounds in random order, of graphs whose weights are not in L2.
FILE grows by a line for each kind of class and shape: the same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import lbg
from aot import BuildError
from aot.configs import NAMES, kind_of
from aot.journal import Head, Journal, Key, Timed
from aot.tune import digest_of
from tests import cases
from tests.bench import fit
from tests.bench.machine import facts
from tests.bench.records import Shape
from tests.cases import Case

SHORT = {name: dtype for dtype, name in NAMES.items()}
RANDOM_SHAPES = 120
SEED = 3  # other shapes than those that tests.bench.fit fits and validates on
SECONDS_BETWEEN_LINES = 5
# N, of these, is taken off by one for kernels that store to any address: rows of the result then start anywhere.
ANY_OUT_SHAPES = ((16384, 4096, 4096), (4096, 4096, 4096), (1024, 4096, 4096), (256, 4096, 4096), (64, 4096, 4096),
                  (16, 4096, 4096), (1, 4096, 4096), (16384, 1024, 4096), (4097, 4096, 4088))  # fmt: skip


@dataclass(frozen=True)
class Item:
    """One kind and promise at one shape: a line of the journal."""

    kind: str
    promise: str
    case: Case
    symbols: tuple[str, ...]  # the candidates, and last the conservative kernel

    @property
    def shape(self) -> str:
        return f"{self.case.m}x{self.case.n}x{self.case.k}"


def plan(configs: Iterable[lbg.Config], shapes: Sequence[tuple[int, int, int]] | None) -> Iterator[Item]:
    """What to measure, the telling shapes first: all kinds at one shape, then at the next."""
    groups: dict[tuple[str, str], list[lbg.Config]] = {}
    closing: dict[str, str] = {}
    for config in configs:
        kind = kind_of(config.compiled_arch, SHORT[config.x], SHORT[config.out], config.fp16_accumulate)
        if config.aligned:
            groups.setdefault((kind, "rows" if config.out_aligned else "any_out"), []).append(config)
        else:
            closing[kind] = config.symbol
    drawn = list(fit.random_shapes(RANDOM_SHAPES, SEED))
    by_promise = {
        "rows": shapes or [*(shape for shape in fit.BENCHMARKS if shape[1] % 8 == 0), *drawn],
        "any_out": [(m, n - 1, k) for m, n, k in shapes or [*ANY_OUT_SHAPES, *drawn[: RANDOM_SHAPES // 2]]],
    }
    for place in range(max(map(len, by_promise.values()))):
        for (kind, promise), some in groups.items():
            if place < len(by_promise[promise]):
                first = some[0]
                dtypes = (getattr(torch, first.x), getattr(torch, first.weight), getattr(torch, first.out))
                case = cases.of_class(Case(*by_promise[promise][place]), (*dtypes, first.fp16_accumulate))
                yield Item(kind, promise, case, (*(config.symbol for config in some), closing[kind]))


class Progress:
    """tqdm's bar where it is installed; else a line every few seconds. Both with the time left."""

    def __init__(self, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.total, self.done, self.clock = total, 0, clock
        self.start = self.last = clock()
        self.bar = None
        try:
            from tqdm import tqdm
        except ImportError:
            return
        self.bar = tqdm(total=total, desc="measuring", unit="shape", disable=None)

    def step(self, what: str) -> None:
        self.done += 1
        if self.bar is not None:
            self.bar.update()
        now = self.clock()
        if (self.bar is None or self.bar.disable) and (
            now - self.last >= SECONDS_BETWEEN_LINES or self.done == self.total
        ):
            self.last = now
            left = (now - self.start) / self.done * (self.total - self.done)
            print(f"{self.done} of {self.total}, {left:.0f} s left: {what}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


Measure = Callable[[Item, list[str]], tuple[dict[str, float], dict[str, str]]]


def run(
    items: Sequence[Item],
    journal: Journal,
    measure: Measure,
    budget_seconds: float | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Measures what the journal lacks; how many items are left when the budget is spent.

    A candidate that was wrong once is asked for no more. `measure` gives (median us, errors) by symbol.
    """
    done = {timed.name for timed in journal.record.timed}
    left = [item for item in items if (item.kind, item.promise, item.shape) not in done]
    progress, start = Progress(len(left), clock), clock()
    try:
        for index, item in enumerate(left):
            if budget_seconds is not None and clock() - start >= budget_seconds:
                return len(left) - index
            dropped = journal.record.dropped()
            us, wrong = measure(item, [symbol for symbol in item.symbols if symbol not in dropped])
            journal.add(Timed(item.kind, item.promise, item.shape, us, wrong))
            for symbol, error in wrong.items():
                print(f"dropped: {symbol}: {error}", file=sys.stderr)
            progress.step(f"{item.kind}, {item.promise}, {item.shape}")
    finally:
        progress.close()
    return 0


class OnGpu:
    """What `run` measures with."""

    def __init__(self) -> None:
        self.bench, self.order = fit.Bench(), random.Random(0)

    def __call__(self, item: Item, symbols: list[str]) -> tuple[dict[str, float], dict[str, str]]:
        explanation = fit.explain(item.case, self.bench.arguments(item.case, 1)[0])
        why_not = {candidate.config.symbol: candidate.why_not for candidate in explanation.candidates}
        legal = [symbol for symbol in symbols if why_not[symbol] is None]
        return fit.time_kernels(self.bench, item.case, legal, self.order)


def head(commit: str | None = None) -> Head:
    """Of this GPU and the installed candidates."""
    device = torch.cuda.get_device_properties(0)
    arch = 10 * device.major + device.minor
    kernels = {config.symbol: asdict(config) for config in lbg.configs() if config.arch == arch}
    if not kernels:
        raise BuildError(f"the installed lbg {lbg.__version__} has no kernel for {device.name} (sm_{arch})")
    if "+candidates" not in lbg.__version__:
        raise BuildError(f"lbg {lbg.__version__} is installed; wanted is the candidates' wheel, which "
                         "python3 build.py tune --compile-only makes")  # fmt: skip
    found = facts(commit)
    key = Key(device.name, found["driver"], digest_of(Path(lbg._C.__file__)))
    compiled_arch = next(iter(kernels.values()))["compiled_arch"]
    return Head(key, compiled_arch, arch, device.multi_processor_count, found, kernels)


def sizes(text: str) -> tuple[int, int, int]:
    try:
        shape = Shape.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if shape.k % 8 or shape.n % 8 or max(shape.m, shape.n, shape.k) > fit.LONGEST:
        raise argparse.ArgumentTypeError(f"{text}: N and K are multiples of 8 and no size is over {fit.LONGEST}")
    return shape.m, shape.n, shape.k


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m tests.bench.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--journal", type=Path, required=True, help="what is measured; grows from run to run")
    parser.add_argument(
        "--shapes", type=sizes, nargs="+", metavar="MxNxK", help="in place of the benchmark's and random ones"
    )
    parser.add_argument("--budget-seconds", type=float, help="stop after that long; the same command goes on")
    parser.add_argument("--commit", help="of the candidates, where the folder is no git checkout")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("tests.bench.tune: measuring needs a CUDA GPU that the candidates run on")
    try:
        journal = Journal(options.journal, head(options.commit))
        items = list(plan((lbg.Config(**row) for row in journal.record.head.kernels.values()), options.shapes))
        with torch.inference_mode():
            left = run(items, journal, OnGpu(), options.budget_seconds)
    except BuildError as error:
        raise SystemExit(f"tests.bench.tune: {error}") from None
    except KeyboardInterrupt:
        print(f"interrupted: {len(journal.record.timed)} shapes are in {options.journal}; the same command goes on",
              file=sys.stderr)  # fmt: skip
        return 130
    except fit.KernelError as stopped:
        journal.stop(stopped.symbol, str(stopped))
        print(f"{stopped.symbol} broke the run and is dropped: {stopped}; the same command goes on", file=sys.stderr)
        return 75
    print(f"{len(journal.record.timed)} of {len(items)} in {options.journal}{', the budget is spent' if left else ''}; "
          f"{len(journal.record.dropped())} candidates dropped")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
