"""Every kernel of this GPU once on a small ragged case: what compute-sanitizer watches (tests/test_gpu.py)."""

from __future__ import annotations

import re

import torch

import lbg
from tests import cases
from tests.test_gpu import SHIPPED, call, of_config

RACE = re.compile(r"between Write access at (lbg_\w+)\+0x([0-9a-f]+)\s*=*\s*and Read access at \1\+0x([0-9a-f]+)")


def races(output: str) -> list[str]:
    """What racecheck reports, but for its one mistake.

    The warps of a kernel of aot/hopper.py read what they are to do from a byte of shared memory. Those that multiply
    write there, as they end, that all is done: behind one barrier of the whole CTA and before another, which the other
    warps wait at elsewhere in the program before they read. racecheck does not pair the two. That write is the last
    thing in its program and that read the first in the others', the next in the binary.
    """
    reported = output.count("Error: Race reported")
    found = [(kernel, int(write, 16), int(read, 16)) for kernel, write, read in RACE.findall(output)]
    roles = {config.symbol for config in SHIPPED if config.tma}
    mistaken = {kernel: (kernel, write, read) for kernel, write, read in found
                if kernel in roles and 0 < read - write <= 0x100}  # fmt: skip
    left = [f"{kernel}: write at {write:#x}, read at {read:#x}" for kernel, write, read in found
            if mistaken.get(kernel) != (kernel, write, read)]  # fmt: skip
    return left + [f"{reported - len(found)} of another kind"] * (reported > len(found))


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
