"""Every kernel of this GPU once on a small ragged case: what compute-sanitizer watches (tests/test_gpu.py)."""

from __future__ import annotations

import torch

import lbg
from tests import cases
from tests.test_gpu import SHIPPED, call, of_config


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
