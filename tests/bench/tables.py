"""A report as text: one table for the terminal, and a page in Markdown with everything."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from tests.bench.records import (
    OURS,
    PEER,
    Report,
    Shape,
    Timing,
    geometric_mean,
    ratio,
    weight_read_us,
)

# (ours, x's dtype, the limit): the rows of the main table. Ours competes with all peers of the same x.
CONTESTS = (
    ("lbg float16", "float16", "cuBLAS"),
    ("lbg float32", "float32", "cast + cuBLAS"),
    ("lbg float32 to float16", "float32", "cast + cuBLAS"),  # autocast gives float16 too
)
SMALL_M = 64
# A ragged shape, and the aligned one nearest in size.
NEIGHBOURS = {
    Shape(16383, 4096, 4096): Shape(16384, 4096, 4096),
    Shape(4096, 4104, 4096): Shape(4096, 4096, 4096),
    Shape(4097, 4095, 4088): Shape(4096, 4096, 4096),
}


def time(us: float | None) -> str:
    """Microseconds to three figures or more."""
    return "-" if us is None else f"{us:.2f}" if us < 10 else f"{us:.1f}" if us < 1000 else f"{us:.0f}"


def times_over(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _us(timing: Timing | None) -> str:
    return time(timing.us if timing else None)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table that is aligned as plain text too."""
    lines = [list(header), *map(list, rows)]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines)


def main_table(report: Report) -> str:
    """Every shape: ours, the best of the peers, and the bare product as a limit; then the geometric means."""
    rows = []
    means: list[list[str]] = []
    for ours_name, x, limit_name in CONTESTS:
        faster: list[float | None] = []
        slower: list[float | None] = []
        for shape in report.shapes:
            ours, limit = report.find(shape, ours_name), report.find(shape, limit_name)
            best = report.best_peer(shape, x)
            if ours is None:
                continue
            faster.append(ratio(best, ours))
            slower.append(ratio(ours, limit))
            dtypes = f"{ours.x} to {ours.out}"
            rows.append([
                str(shape), dtypes, _us(ours), time(ours.warm_us), _us(best), best.peer if best else "-",
                times_over(faster[-1]), _us(limit), times_over(slower[-1]),
            ])  # fmt: skip
        if faster:
            mean = [times_over(geometric_mean(values)) for values in (faster, slower)]
            means.append(["geometric mean", dtypes, "", "", "", "", mean[0], "", mean[1]])
    header = [
        "M x N x K", "x to result", "lbg us", "warm us", "best peer us", "best peer", "best / lbg", "cuBLAS us",
        "lbg / cuBLAS",
    ]  # fmt: skip
    return markdown(header, rows + means)


def medians(report: Report, shapes: Sequence[Shape]) -> str:
    """Every peer at every shape, microseconds; warm ones behind a stroke."""

    def cell(timing: Timing | None) -> str:
        return "-" if timing is None else _us(timing) + (f" / {time(timing.warm_us)}" if timing.warm_us else "")

    rows = []
    for peer in report.peers():
        found = [report.find(shape, peer) for shape in shapes]
        one = next((timing for timing in found if timing), None)
        if one:
            rows.append([peer, f"{one.x} to {one.out}", *map(cell, found)])
    return markdown(["us", "x to result", *map(str, shapes)], rows)


def small_rows(report: Report) -> str:
    rows = []
    for shape in sorted(shape for shape in _shapes(report) if shape.m <= SMALL_M):
        read_us = weight_read_us(shape, report.copy_gb_per_s)
        ours, product = report.find(shape, "lbg float16"), report.find(shape, "cuBLAS")
        if ours:
            rows.append([
                str(shape), _us(ours), _us(product), time(read_us), times_over(ours.us / read_us),
                times_over(product.us / read_us if product else None),
            ])  # fmt: skip
    header = ["M x N x K", "lbg float16 us", "cuBLAS us", "weight's read us", "lbg / read", "cuBLAS / read"]
    return markdown(header, rows)


def ragged(report: Report) -> str:
    """Time a FLOP of ragged shapes, in units of the aligned neighbour's."""
    rows = []
    for shape, neighbour in NEIGHBOURS.items():
        for name in ("lbg float16", "lbg float32", "cuBLAS", "compile"):
            pair = report.find(shape, name), report.find(neighbour, name)
            over = ratio(*pair)
            if over is not None:
                rows.append([
                    str(shape), name, _us(pair[0]), str(neighbour), _us(pair[1]),
                    times_over(over * neighbour.flop / shape.flop),
                ])  # fmt: skip
    header = ["ragged", "of", "us", "aligned", "us", "time a FLOP, ragged / aligned"]
    return markdown(header, rows) if rows else ""


def accumulation(report: Report) -> str:
    modes = list(report.accumulation)
    sizes = sorted({k for row in report.accumulation.values() for k in row})
    rows = []
    for k in sizes:
        errors = [report.accumulation[mode].get(k) for mode in modes]
        growth = [
            error / report.accumulation[mode][sizes[0]] if error is not None and sizes[0] in report.accumulation[mode]
            else None for mode, error in zip(modes, errors)
        ]  # fmt: skip
        cells = ["-" if error is None else f"{error:.2e}" for error in errors]
        rows.append([str(k), *cells, *map(times_over, growth), times_over(math.sqrt(k / sizes[0]))])
    return markdown(["K", *modes, *(f"growth, {mode}" for mode in modes), "sqrt(K) growth"], rows)


def predictions(report: Report) -> str:
    rows = [[str(row.shape), time(row.us), row.kernel] for row in report.predictions]
    return markdown(["M x N x K", "predicted us", "kernel"], rows)


def chosen(report: Report) -> str:
    rows = [
        [
            str(timing.shape),
            timing.peer,
            timing.kernel,
            _us(timing),
            "-" if timing.error is None else f"{timing.error:.1e}",
        ]
        for timing in report.timings
        if timing.kind == OURS
    ]
    return markdown(["M x N x K", "of", "kernel", "us", "relative error"], rows)


def skipped(report: Report) -> str:
    places: dict[tuple[str, str], list[str]] = {}
    for row in report.skipped:
        places.setdefault((row.peer, row.reason), []).append(row.where)
    rows = [[peer, ", ".join(where), reason] for (peer, reason), where in places.items()]
    return markdown(["left out", "where", "why"], rows)


def _shapes(report: Report) -> list[Shape]:
    return list(dict.fromkeys(timing.shape for timing in report.timings))


def ahead_of_every_peer(report: Report) -> str:
    """In one sentence: at how many shapes ours is the fastest."""
    parts = []
    for ours_name, x, _ in CONTESTS:
        ratios = [ratio(report.best_peer(shape, x), report.find(shape, ours_name)) for shape in report.shapes]
        compared = [value for value in ratios if value is not None]
        if compared:
            parts.append(f"{ours_name} at {sum(value > 1 for value in compared)} of {len(compared)} shapes")
    return f"Faster than every peer of the same x: {', '.join(parts)}."


def page(report: Report, stem: str) -> str:
    """The Markdown page that stands beside STEM.json and STEM-*.png."""
    facts = markdown(["what", "value"], report.facts.items())
    sweep = [shape for shape in sorted(_shapes(report)) if shape not in report.shapes]
    single = {key: f"{value:.1f}" for key, value in report.first_result_ms.items()}
    host = {key: f"{value:.1f}" for key, value in report.host_us.items()}
    peers = ", ".join(peer for peer in report.peers() if any(t.kind == PEER for t in report.timings if t.peer == peer))
    sections = {
        "": f"{ahead_of_every_peer(report)} How this is measured: [README.md](README.md). Written by "
        f"`python -m tests.bench`.\n\n{facts}\n\nCopy bandwidth, read and written: {report.copy_gb_per_s:.0f} GB/s.",
        "Against the best peer": f"Peers: {peers}.\n\n{main_table(report)}\n\n![times by shape]({stem}-shapes.png)",
        f"M up to {SMALL_M}": small_rows(report),
        "Ragged sizes": ragged(report),
        "fp16_accumulate": report.accumulation and "Relative error in norm against float64, M=512, N=1024, float32 "
        "results; for cuBLAS, of its product in float32 or, with allow_fp16_accumulation, in float16, the epilogue "
        f"computed in float64.\n\n{accumulation(report)}",
        "Cold start and the host": report.host_us and markdown(["first result of a process", "ms"], single.items())
        + "\n\n"
        + markdown(["one call on the host", "us"], host.items())
        + f"\n\n![cold start and host time]({stem}-host.png)",
        "Over M": f"{medians(report, sweep) if sweep else ''}\n\n![time over M]({stem}-rows.png)",
        "Every median": medians(report, report.shapes),
        "Which kernel ran": chosen(report),
        "Predicted, not measured: RTX 4090": "What the dispatch model expects, float16 to float16. No RTX 4090 has run "
        f"these kernels yet.\n\n{predictions(report)}" if report.predictions else "",
        "Left out": skipped(report) if report.skipped else "Nothing.",
    }  # fmt: skip
    title = f"# {report.facts['gpu']}, {report.facts['kernels']} kernels"
    body = [f"## {name}\n\n{str(text).strip()}" if name else str(text) for name, text in sections.items() if text]
    return "\n\n".join([title, *body]) + "\n"
