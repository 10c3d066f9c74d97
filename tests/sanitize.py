"""Every kernel of this GPU once on a small ragged case: what compute-sanitizer watches (tests/test_gpu.py)."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

import lbg
from tests import cases
from tests.test_gpu import SHIPPED, call, of_config

ACCESS = r"(Read|Write) access at (lbg_\w+)\+0x([0-9a-f]+)"
RACE = re.compile(rf"Race reported between {ACCESS}(?:[^\n]*\n=+ +and {ACCESS})+")
SUMMARY = re.compile(r"RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) errors?, \d+ warnings?\)")


def races(output: str, role_writes: Mapping[str, int]) -> list[str]:
    """What racecheck reports, but for its one mistake about the kernels of these symbols.

    The warps of an sm_90 kernel in Gluon read what they are to do from a byte of shared memory. Those that multiply
    write there, as they end, that all is done, and in a cluster before that, that all are to wait for the other CTA:
    behind one barrier of the whole CTA and before another, which the other warps wait at elsewhere in the program
    before they read. racecheck does not pair the two. Those writes are the last in their program and that read the
    first in the others', the next in the binary. `role_writes` says how many writes there are.
    """
    if not (summary := SUMMARY.search(output)):
        return ["no summary"]
    found = [re.findall(ACCESS, report[0]) for report in RACE.finditer(output)]
    left, mistaken = [], set()  # one a kernel
    for accesses in found:
        kernels = {kernel for _, kernel, _ in accesses}
        writes, reads = ([int(at, 16) for what, _, at in accesses if what == kind] for kind in ("Write", "Read"))
        most = min(0 if kernel in mistaken else role_writes.get(kernel, 0) for kernel in kernels)
        alike = len(kernels) == len(reads) == 1 and len(writes) <= most
        if alike and all(0 < reads[0] - write <= 0x100 * len(writes) for write in writes):
            mistaken |= kernels
        else:
            told = ", ".join(f"{what.lower()} at {int(at, 16):#x}" for what, _, at in accesses)
            left.append(f"{', '.join(sorted(kernels))}: {told}")
    others = int(summary[1]) - len(found)
    return left + [f"{others} of another kind"] * (others != 0)


def main() -> None:
    for config in SHIPPED:
        # Two tiles and a ragged third in M, a ragged second in N, a partial K step; rows off 16 bytes if they may.
        rest = 16 if config.aligned else 15
        case = of_config(cases.Case(2 * config.tile_m + 3, config.tile_n + rest, 2 * config.tile_k + rest), config)
        arguments = cases.make(case, "cuda")
        with lbg.override(config.symbol):
            result = call(case, arguments)
        cases.check(case, arguments, result)
    torch.cuda.synchronize()
    print(f"{len(SHIPPED)} kernels")


if __name__ == "__main__":
    main()
