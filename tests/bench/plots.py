"""The pictures of a report: times by shape, times over M, cold start and host time.

python -m tests.bench.plots FILE.json [--out STEM]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from matplotlib.transforms import ScaledTranslation

from tests.bench.records import (
    OURS,
    Report,
    memory_limit_us,
    ratio,
    tensor_limit_us,
    tensor_tflops,
)

# Colours after Okabe and Ito, told apart by every kind of sight; a marker of its own for each besides.
STYLES = {
    "lbg float16": ("#d55e00", "o"),
    "lbg float16 to float32": ("#e69f00", "o"),
    "lbg float16 acc16": ("#8c4a00", "X"),
    "lbg float32": ("#d55e00", "o"),
    "lbg float32 to float16": ("#e69f00", "o"),
    "cuBLAS": ("#000000", "|"),
    "cast + cuBLAS": ("#000000", "|"),
    "eager": ("#0072b2", "s"),
    "tf32 eager": ("#999999", "s"),
    "autocast eager": ("#0072b2", "s"),
    "cuBLAS + epilogue": ("#009e73", "^"),
    "compile": ("#56b4e9", "D"),
    "autocast compile": ("#56b4e9", "D"),
    "compile max": ("#004c7a", "v"),
    "autocast compile max": ("#004c7a", "v"),
    "compile max graphs": ("#cc79a7", "<"),
    "autocast compile max graphs": ("#cc79a7", "<"),
    "original kernel": ("#5e3c99", "P"),
    "original module": ("#5e3c99", "P"),
}
PANELS = (("float16", "cuBLAS"), ("float32", "cast + cuBLAS"))  # x's dtype, and the limit that times are divided by
BYTES = {"float16": 2, "float32": 4, "bfloat16": 2}


def draw(report: Report, stem: Path) -> list[Path]:
    """Writes STEM-shapes.png, STEM-rows.png and STEM-host.png; one with nothing to show is left out."""
    drawn = []
    pictures: tuple[tuple[str, Callable[[Report], Figure | None]], ...] = (
        ("shapes", by_shape), ("rows", over_rows), ("host", overheads),
    )  # fmt: skip
    for name, picture in pictures:
        figure = picture(report)
        if figure is not None:
            drawn.append(stem.with_name(f"{stem.name}-{name}.png"))
            figure.savefig(drawn[-1], dpi=130)
            plt.close(figure)
    return drawn


def _finish(figure: Figure, report: Report, title: str) -> Figure:
    """Title above; below, what a number means nothing without."""
    facts = report.facts
    figure.suptitle(f"{title}\n{facts['gpu']}, lbg {facts['lbg']} {facts['kernels']} kernels", fontsize=12)
    first = f"driver {facts['driver']}; {facts['clocks']}; power limit {facts['power limit']}; commit {facts['commit']}"
    second = (
        f"torch {facts['torch']}, CUDA {facts['cuda']}, triton of the peers {facts['triton, of the peers']}, "
        f"Python {facts['python']}; {facts['date']}"
    )
    figure.text(0.5, 0.01, f"{first}\n{second}", ha="center", va="bottom", fontsize=8, color="#555555")
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    return figure


def _layer(peer: str) -> int:
    """Ours above the others, and its plain mode above its variants."""
    return 3 + peer.startswith(OURS) + (peer in ("lbg float16", "lbg float32"))


def _legend_below(axis: Axes, figure: Figure) -> None:
    """Below the axis label, at a distance that does not depend on the height of the axes."""
    below = axis.transAxes + ScaledTranslation(0, -0.5, figure.dpi_scale_trans)
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 0), bbox_transform=below, ncol=3, frameon=False)


def _peers_of(report: Report, x: str) -> list[str]:
    return [peer for peer in report.peers() if any((t.peer, t.x) == (peer, x) for t in report.timings)]


def by_shape(report: Report) -> Figure | None:
    """Each peer's time in units of the bare product's: left of 1 is faster than cuBLAS without an epilogue."""
    panels = [(x, limit) for x, limit in PANELS if any(report.find(shape, limit) for shape in report.shapes)]
    if not panels:
        return None
    figure, axes = plt.subplots(
        1, len(panels), figsize=(7 * len(panels), 2.6 + 0.42 * len(report.shapes)), sharey=True, squeeze=False
    )
    for axis, (x, limit) in zip(axes[0], panels):
        peers = [peer for peer in _peers_of(report, x) if peer != limit]
        for index, peer in enumerate(peers):
            aside = 0.6 * (0.5 - (index + 0.5) / len(peers))  # so that equals do not hide one another
            points = [
                (ratio(report.find(shape, peer), report.find(shape, limit)), aside - row)
                for row, shape in enumerate(report.shapes)
            ]
            points = [(value, row) for value, row in points if value is not None]
            if not points:
                continue
            colour, marker = STYLES.get(peer, ("#999999", "."))
            ours = peer.startswith(OURS)
            axis.scatter(
                *zip(*points), color=colour, marker=marker, s=90 if ours else 45, label=peer, zorder=_layer(peer),
                edgecolor="white", linewidth=0.6,
            )  # fmt: skip
        axis.axvline(1, color="black", linewidth=1.2, label=f"{limit} (a limit)")
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_xlabel(f"time / time of {limit}: less is better")
        axis.set_title(f"{x} x", fontsize=11)
        axis.grid(True, color="#dddddd")
        axis.set_axisbelow(True)
        for row in range(0, len(report.shapes), 2):
            axis.axhspan(-row - 0.5, -row + 0.5, color="#f3f3f3", zorder=0)
        axis.set_ylim(0.5 - len(report.shapes), 0.5)
        _legend_below(axis, figure)
    axes[0][0].set_yticks([-row for row in range(len(report.shapes))], [str(shape) for shape in report.shapes])
    axes[0][0].set_ylabel("M x N x K")
    return _finish(figure, report, "relu(gelu(batch_norm(linear(x)))) against the bare cuBLAS product")


def over_rows(report: Report) -> Figure | None:
    """Time over M at N=K=4096, between the lines that memory and tensor cores draw."""
    shapes = sorted({t.shape for t in report.timings if (t.shape.n, t.shape.k) == (4096, 4096) and t.shape.m != 16383})
    if len(shapes) < 2:
        return None
    tflops, source = tensor_tflops(report)
    figure, axes = plt.subplots(1, 2, figsize=(14, 8.5), sharey=True)
    for axis, (x, limit) in zip(axes, PANELS):
        for peer in _peers_of(report, x):
            found = [timing for timing in (report.find(shape, peer) for shape in shapes) if timing]
            if not found:
                continue
            colour, marker = STYLES.get(peer, ("#999999", "."))
            ours = peer.startswith(OURS)
            axis.plot(
                [timing.shape.m for timing in found], [timing.us for timing in found], color=colour, marker=marker,
                markersize=5, linewidth=2 if ours else 1.1, label=f"{peer} (a limit)" if peer == limit else peer,
                linestyle="--" if peer == limit else "-", zorder=_layer(peer),
            )  # fmt: skip
        rows = [shape.m for shape in shapes]
        bytes_of = BYTES[x]
        memory = [memory_limit_us(shape, bytes_of, 2, report.copy_gb_per_s) for shape in shapes]
        axis.plot(rows, memory, color="#777777", linestyle=":", linewidth=1.6,
                  label=f"memory limit, {report.copy_gb_per_s / 1e3:.2f} TB/s as a copy")  # fmt: skip
        tensor = [tensor_limit_us(shape, tflops) for shape in shapes]
        axis.plot(rows, tensor, color="#777777", linestyle="-.", linewidth=1.6,
                  label=f"tensor limit, {tflops:.0f} TFLOPS, {source}")  # fmt: skip
        axis.fill_between(rows, list(map(max, memory, tensor)), 0.01, color="#eeeeee", zorder=0)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_ylim(bottom=0.5 * min(memory))
        axis.set_xticks([row for row in rows if row.bit_length() % 2], [str(r) for r in rows if r.bit_length() % 2])
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_xlabel("M, rows of x")
        axis.set_title(f"{x} x, N = K = 4096", fontsize=11)
        axis.grid(True, which="major", color="#dddddd")
        _legend_below(axis, figure)
    axes[0].set_ylabel("microseconds (weights out of L2 where calls are short)")
    return _finish(figure, report, "time over M")


def overheads(report: Report) -> Figure | None:
    """Cold start on a log axis, as it spans four powers of ten; host time on a linear one."""
    panels = [
        ("first result of a new process", "milliseconds, log scale", report.first_result_ms, True),
        ("one call on the host, M=16, N=K=64", "microseconds", report.host_us, False),
    ]
    panels = [panel for panel in panels if panel[2]]
    if not panels:
        return None
    height = 2.2 + 0.4 * max(len(values) for _, _, values, _ in panels)
    figure, axes = plt.subplots(1, len(panels), figsize=(7 * len(panels), height), squeeze=False)
    for axis, (title, unit, values, log) in zip(axes[0], panels):
        labels = list(values)[::-1]
        bars = axis.barh(
            labels, [values[label] for label in labels],
            color=["#d55e00" if "lbg" in label else "#7f9fbf" for label in labels],
        )  # fmt: skip
        axis.bar_label(bars, [f" {values[label]:,.1f}" for label in labels], fontsize=9)
        if log:
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axis.margins(x=0.3 if log else 0.18)
        axis.set_xlabel(unit)
        axis.set_title(title, fontsize=11)
        axis.grid(True, axis="x", color="#dddddd")
        axis.set_axisbelow(True)
    return _finish(figure, report, "cold start and host time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="the JSON that python -m tests.bench wrote")
    parser.add_argument("--out", type=Path, help="stem of the pictures; the report's own by default")
    arguments = parser.parse_args()
    for path in draw(Report.read(arguments.report), arguments.out or arguments.report.with_suffix("")):
        print(path)


if __name__ == "__main__":
    main()
