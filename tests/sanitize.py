"""Every kernel of this GPU once on a small ragged case: what compute-sanitizer watches (tests/test_gpu.py)."""

from __future__ import annotations

import re

import torch

import lbg
from tests import cases
from tests.test_gpu import SHIPPED, call, of_config

RACE = re.compile(r"between Write access at (lbg_\w+)\+0x([0-9a-f]+)\s*=*\s*and Read access at \1\+0x([0-9a-f]+)")
SUMMARY = re.compile(r"RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) errors?, \d+ warnings?\)")


def races(output: str, with_roles: set[str]) -> list[str]:
    """What racecheck reports, but for its one mistake about the kernels of these symbols.

    The warps of a kernel of aot/hopper.py read what they are to do from a byte of shared memory. Those that multiply
    write there, as they end, that all is done: behind one barrier of the whole CTA and before another, which the other
    warps wait at elsewhere in the program before they read. racecheck does not pair the two. That write is the last
    thing in its program and that read the first in the others', the next in the binary.
    """
    if not (summary := SUMMARY.search(output)):
        return ["no summary"]
    found = [(kernel, int(write, 16), int(read, 16)) for kernel, write, read in RACE.findall(output)]
    mistaken: dict[str, tuple[str, int, int]] = {}  # one a kernel
    for kernel, write, read in found:
        if kernel in with_roles and 0 < read - write <= 0x100:
            mistaken.setdefault(kernel, (kernel, write, read))
    left = [f"{kernel}: write at {write:#x}, read at {read:#x}" for kernel, write, read in found
            if mistaken.get(kernel) != (kernel, write, read)]  # fmt: skip
    others = int(summary[1]) - len(found)
    return left + [f"{others} of another kind"] * (others != 0)


def main() -> None:
    for config in SHIPPED:
        # Two tiles and a ragged third in M, a ragged second in N, a partial K step.
        case = of_config(cases.Case(2 * config.tile_m + 3, config.tile_n + 16, 2 * config.tile_k + 16), config)
        arguments = cases.make(case, "cuda")
        with lbg.override(config.symbol):
            result = call(case, arguments)
        cases.check(case, arguments, result)
    torch.cuda.synchronize()
    print(f"{len(SHIPPED)} kernels")


if __name__ == "__main__":
    main()
