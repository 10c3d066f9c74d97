"""lbg beside everything that computes the same function, on this machine's GPU: one table, a page, JSON and plots.

    python -m tests.bench [--original PATH] [--out docs/benchmarks]

Every result is checked against float64 before it is timed. A peer that cannot run is named, with the reason.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

import lbg
from aot import BuildError
from tests import cases
from tests.bench import overheads, tables, timing
from tests.bench.machine import facts
from tests.bench.peers import Inputs, Peer, all_peers
from tests.bench.records import (
    LIMIT,
    OURS,
    PEER,
    SHAPES,
    Prediction,
    Report,
    Shape,
    Skipped,
    Timing,
    evidence_arch,
    file_stem,
    write_evidence,
)
from tests.cases import F16, F32, Case

QUICK = tuple(Shape(*sizes) for sizes in ((16384, 4096, 4096), (64, 4096, 4096), (128, 1024, 512), (4097, 4095, 4088)))
SWEEP = tuple(Shape(2**power, 4096, 4096) for power in range(15))  # the plot over M
# Where max-autotune, which takes 10 to 30 s a shape to compile, is asked without --all-shapes.
TELLING = tuple(Shape(*sizes) for sizes in (*((m, 4096, 4096) for m in (16384, 1024, 64, 1)), (2048, 3072, 768)))
GRAPHS_BELOW_US = 100
ACCUMULATION_K = tuple(2**power for power in range(10, 15))


def measure(shape: Shape, peers: list[Peer], repeats: int) -> tuple[list[Timing], list[Skipped]]:
    """Checks, then times, every peer at one shape."""
    torch.compiler.reset()  # each shape is compiled for itself, as often as it takes
    inputs = Inputs(shape, timing.weights_beyond_l2(2 * shape.n * shape.k))
    product_us = timing.one_call_us(lambda: torch.nn.functional.linear(inputs.x16, inputs.weights16[0]))
    by_graphs = product_us < GRAPHS_BELOW_US
    if not by_graphs:
        del inputs.weights16[1:]
    subjects: dict[str, timing.Subject] = {}
    errors: dict[str, float | None] = {}
    skipped = []
    for peer in peers:
        start = time.perf_counter()
        try:
            subject = peer.make(inputs)
            first, *_ = [call() for call in subject.calls]
            errors[peer.name] = check(peer, inputs, first)
            subjects[peer.name] = subject
        except Exception as error:
            if peer.kind == OURS:
                raise
            skipped.append(Skipped(peer.name, str(shape), reason(error)))
        if (seconds := time.perf_counter() - start) > 2:
            print(f"          {shape}, {peer.name}: {seconds:.0f} s to prepare", file=sys.stderr)
    times = (timing.by_graphs if by_graphs else timing.by_events)(subjects, repeats)
    found = []
    for peer in peers:
        if peer.name in times:
            us, warm_us = times[peer.name].us, times[peer.name].warm_us
            low, median, high = statistics.quantiles(us, n=4) if len(us) > 1 else us * 3
            warm = statistics.median(warm_us) if warm_us else None
            x, out = (str(dtype).removeprefix("torch.") for dtype in (peer.x, peer.out))
            numbers = median, low, high, warm, errors[peer.name]
            found.append(Timing(peer.name, peer.kind, x, out, shape, *numbers, kernel(peer, inputs)))
    return found, skipped


def reason(error: Exception) -> str:
    """One line; a ValueError is the benchmark's own."""
    text = next(iter(str(error).strip().splitlines()), "")
    return (text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}")[:200]


def check(peer: Peer, inputs: Inputs, result: torch.Tensor) -> float | None:
    """The relative error of a result; raises ValueError if it is wrong. A bare product, a limit, has none."""
    shape = inputs.shape
    if result.shape != (shape.m, shape.n) or result.dtype is not peer.out:
        raise ValueError(f"{peer.name} gave {list(result.shape)}, {result.dtype}")
    if peer.kind == LIMIT:
        return None
    found = inputs.error(result, peer.x)
    # Tensor cores cut off what does not fit the sum: the error of float32 accumulation grows with K itself.
    bound = peer.bound + cases.FLOAT32_BOUND * shape.k / 8192
    if not found <= bound or not torch.isfinite(result).all():
        raise ValueError(f"{peer.name} is wrong: relative error {found:.1e}, {bound:.1e} allowed")
    return found


def kernel(peer: Peer, inputs: Inputs) -> str:
    if peer.kind != OURS:
        return ""
    weight = inputs.weights_bf16[0] if peer.x is cases.BF16 else inputs.weights16[0]
    x = inputs.x(peer.x)
    explained = lbg.explain(x, weight, out_dtype=peer.out, fp16_accumulate=peer.fp16_accumulate)
    return explained.chosen.symbol if explained.chosen else ""


def accumulation() -> dict[str, dict[int, float]]:
    """Relative error in norm against float64, by mode and K; beside, of cuBLAS's product with a float64 epilogue."""
    products = ("cuBLAS float32", False, F32), ("cuBLAS float16", True, F16)
    found: dict[str, dict[int, float]] = {"float32": {}, "fp16_accumulate": {}} | {mode: {} for mode, *_ in products}
    for k in ACCUMULATION_K:
        arguments = cases.make(Case(512, 1024, k, out=F32), "cuda")
        expected = cases.reference(arguments)
        for mode, fp16 in (("float32", False), ("fp16_accumulate", True)):
            found[mode][k] = cases.error(lbg.fused(*arguments, out_dtype=F32, fp16_accumulate=fp16), expected)
        x, weight, scale, shift = arguments
        for mode, fp16, out in products:
            torch.backends.cuda.matmul.allow_fp16_accumulation = fp16
            product = torch.mm(x, weight.T, out_dtype=out).double()
            found[mode][k] = cases.error(cases.activation(product * scale.double() + shift.double()), expected)
        torch.backends.cuda.matmul.allow_fp16_accumulation = False
    return found


def predictions(shapes: list[Shape]) -> list[Prediction]:
    """Of the dispatch model for an RTX 4090, if this wheel ships kernels for it."""
    found = []
    for shape in shapes:
        x = torch.empty(shape.m, shape.k, dtype=F16, device="meta")
        weight = torch.empty(shape.n, shape.k, dtype=F16, device="meta")
        explained = lbg.explain(x, weight, arch=89, sm_count=128)
        if explained.chosen:
            us = next(row.predicted_us for row in explained.candidates if row.config is explained.chosen)
            found.append(Prediction("RTX 4090", shape, explained.chosen.symbol, us or math.nan))
    return found


def selected(peers: list[Peer], names: list[str] | None) -> tuple[list[Peer], list[Skipped]]:
    """Ours, the limits, and the peers asked for (all, if None); those that cannot run here, with the reason."""
    known = [peer.name for peer in peers if peer.kind == PEER]
    if unknown := sorted(set(names or ()) - set(known)):
        raise SystemExit(f"no peer is called {', '.join(map(repr, unknown))}; there are {', '.join(map(repr, known))}")
    wanted = [peer for peer in peers if names is None or peer.kind != PEER or peer.name in names]
    skipped = [Skipped(peer.name, "everywhere", peer.why_not) for peer in wanted if peer.why_not]
    return [peer for peer in wanted if not peer.why_not], skipped


def run(options: argparse.Namespace) -> Report:
    start = time.perf_counter()

    def progress(what: str) -> None:
        """Also keeps what there is: a compiler that hangs must not cost it."""
        report.write(options.out / f"{file_stem(report.facts)}.json")
        print(f"{time.perf_counter() - start:6.1f} s  {what}", file=sys.stderr, flush=True)

    torch.set_float32_matmul_precision("high")  # tf32, of the tf32 peer
    peers, skipped = selected(all_peers(options.original), options.peers)
    report = Report(facts(options.commit), timing.copy_gb_per_s(), list(options.shapes), skipped=skipped)
    if options.evidence:
        evidence_arch(report.facts)  # a run that cannot be evidence must not take its minutes first
    sweep = [] if options.no_sweep else [shape for shape in SWEEP if shape not in report.shapes]
    for shape in [*report.shapes, *sweep]:
        slow_too = options.all_shapes or (shape in TELLING and not options.quick)
        asked = [peer for peer in peers if not peer.slow_to_compile or slow_too]
        with torch.inference_mode():
            found, left_out = measure(shape, asked, options.repeats)
        gc.collect()
        torch.cuda.empty_cache()
        report.timings += found
        report.skipped += left_out
        progress(str(shape))
    if any(peer.slow_to_compile for peer in peers) and not options.all_shapes:
        where = "everywhere" if options.quick else "all but " + ", ".join(map(str, TELLING))
        report.skipped.append(Skipped("max-autotune", where, "takes long to compile: --all-shapes"))
    with torch.inference_mode():
        report.accumulation = accumulation()
    report.predictions = predictions(report.shapes)
    if not options.no_overheads:
        report.first_result_ms, left_out = overheads.first_results(options.original)
        report.skipped += left_out
        progress("first results")
        report.host_us, left_out = overheads.host_times()
        report.skipped += left_out
        progress("host time")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m tests.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", type=lambda text: [Shape.parse(one) for one in text.split(",")], help="MxNxK,...")
    parser.add_argument("--peers", type=lambda text: text.split(","), help="names, divided by commas")
    parser.add_argument(
        "--original", type=Path, help="the original program, or a folder of its compiled kernels (and it)"
    )
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"), help="folder of page, JSON and plots")
    parser.add_argument("--json", type=Path, help="where to write the numbers besides")
    parser.add_argument("--evidence", type=Path, help="the file of this arch's evidence to put the report into too")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--quick", action="store_true", help="four shapes, no max-autotune, no sweep, no overheads")
    parser.add_argument("--all-shapes", action="store_true", help="max-autotune at every shape")
    parser.add_argument("--no-sweep", action="store_true", help="no more values of M for the plot")
    parser.add_argument("--no-overheads", action="store_true", help="no cold start and no host time")
    parser.add_argument("--commit", help="of the wheel, where the folder is no git checkout")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("the benchmark needs a CUDA GPU; python -m tests.bench.plots FILE.json draws without one")
    options.no_overheads |= options.quick
    options.no_sweep |= options.quick or options.shapes is not None
    options.shapes = options.shapes or list(QUICK if options.quick else SHAPES)
    options.out.mkdir(parents=True, exist_ok=True)
    report = run(options)
    stem = file_stem(report.facts)
    report.write(options.out / f"{stem}.json")
    if options.json:
        report.write(options.json)
    options.out.joinpath(f"{stem}.md").write_text(tables.page(report, stem))
    print(tables.main_table(report))
    print(tables.skipped(report))
    try:
        from tests.bench import plots
    except ImportError as error:
        print(f"left out: plots: {error}")
    else:
        for path in plots.draw(report, options.out / stem):
            print(f"wrote {path}")
    print(f"wrote {options.out / stem}.json and .md")
    if options.evidence:
        write_evidence(options.evidence, "benchmark", asdict(report))
        print(f"wrote its section of {options.evidence}")


if __name__ == "__main__":
    try:
        main()
    except BuildError as error:
        sys.exit(f"bench: {error}")
