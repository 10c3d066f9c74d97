"""What ncu watches: lbg's kernels and the original's, each checked against float64, then launched once to be profiled.

    python -m tests.bench.launches MANIFEST --shapes MxNxK ... [--original PATH]

is what tests.bench.profile has ncu run. Only the one launch of each stands between the profiler's start and stop;
MANIFEST gets them in that order, as JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch.cuda import profiler

import lbg
from tests.bench.__main__ import check, kernel, reason, selected
from tests.bench.machine import facts
from tests.bench.original import Kernel
from tests.bench.peers import Inputs, Peer, all_peers, archs
from tests.bench.profile import Launch
from tests.bench.records import OURS, Shape, Skipped

ORIGINAL = "original kernel"
PROFILED = ("lbg float16 to float32", "lbg float16", "lbg float32", "lbg float16 acc16", ORIGINAL)


def profiled(original: Path | None) -> tuple[list[Peer], list[Skipped]]:
    """Those of the benchmark's peers that are profiled, in the order of the table; those that cannot be, and why."""
    peers, skipped = selected(all_peers(original), [ORIGINAL])
    _, arch = archs()
    own_mode = any(config.arch == arch and config.fp16_accumulate for config in lbg.configs())
    found = {peer.name: peer for peer in peers if own_mode or not peer.fp16_accumulate}
    if not own_mode:
        why_not = f"sm_{arch} ships no kernel for it: it runs those that accumulate in float32"
        skipped.append(Skipped("lbg float16 acc16", "everywhere", why_not))
    return [found[name] for name in PROFILED if name in found], skipped


def launch(peer: Peer, inputs: Inputs) -> Launch:
    """Checks a peer's result, which also warms it up, then has the profiler see one launch.

    Raises:
        ValueError: the result is wrong.
    """
    call = peer.make(inputs).calls[0]
    symbol, config = kernel(peer, inputs), ""
    if isinstance(call, partial) and isinstance(call.args[0], Kernel):  # the original's, of the config chosen
        symbol, config = call.args[0].facts.symbol, call.args[0].facts.label
    error = check(peer, inputs, call())
    torch.cuda.synchronize()
    profiler.start()
    call()
    torch.cuda.synchronize()
    profiler.stop()
    x, out = (str(dtype).removeprefix("torch.") for dtype in (peer.x, peer.out))
    return Launch(inputs.shape, peer.name, x, out, symbol, config, error)


def run(shapes: list[Shape], original: Path | None) -> tuple[list[Launch], list[Skipped]]:
    peers, skipped = profiled(original)
    launches = []
    for shape in shapes:
        inputs = Inputs(shape, 1)
        for peer in peers:
            try:
                launches.append(launch(peer, inputs))
            except ValueError as error:
                if peer.kind == OURS:  # a wrong result of lbg ends the run
                    raise
                skipped.append(Skipped(peer.name, str(shape), reason(error)))
        del inputs
        gc.collect()
        torch.cuda.empty_cache()
    return launches, skipped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--shapes", type=Shape.parse, nargs="+", required=True)
    parser.add_argument("--original", type=Path)
    parser.add_argument("--commit")
    options = parser.parse_args()
    about = facts(options.commit)
    with torch.inference_mode():
        launches, skipped = run(options.shapes, options.original)
    found = {
        "facts": about,
        "launches": [asdict(each) for each in launches],
        "skipped": [asdict(each) for each in skipped],
    }
    options.manifest.write_text(json.dumps(found))


if __name__ == "__main__":
    try:
        main()
    except (RuntimeError, ValueError) as error:
        sys.exit(str(error))
