"""What dispatch expects of each kernel's time: measured where evidence_sm_XY.json has its symbol, or that of the
float16 kernel whose instructions it runs with bfloat16 data; else modelled.

The formula is csrc/lbg.h's predicted_us, the model aot/model.py; `build.py tune` and `python -m tests.bench.fit`
measure and write. Kernels for sm_89 have two costs, as its GPUs differ in what bounds a kernel: for a GeForce, and for
those whose tensor cores are twice as fast with float32 accumulation. No cubin depends on a cost, so that a new one
compiles nothing again.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from aot import evidence, model
from aot.chips import FULL_RATE, REFERENCE, is_full_rate
from aot.compile import Report
from aot.configs import Config
from aot.model import Cost


@cache
def measured(arch: int, full_rate: bool = False) -> dict[str, Cost]:
    """By symbol; empty for an arch that has not been measured, or not on a GPU of that rate."""
    costs = evidence.read(arch)["tune"].get("costs", {})
    if costs and is_full_rate(arch, costs["gpu"]) != full_rate:
        return {}
    return {symbol: Cost(**row["cost"]) for symbol, row in costs.get("kernels", {}).items()}


def float16_twin(config: Config) -> Config:
    x, weight, out = ("f16" if dtype == "bf16" else dtype for dtype in (config.x, config.weight, config.out))
    return replace(config, x=x, weight=weight, out=out)


def cost(config: Config, report: Report, full_rate: bool = False) -> Cost:
    """What is not measured is modelled from the config's own report, for its arch's reference chip or, of an arch that
    has one, the chip that stands for those of full rate."""
    full_rate = full_rate and config.arch in FULL_RATE
    found = measured(config.arch, full_rate)
    own = found.get(config.symbol) or found.get(float16_twin(config).symbol)
    return own or model.cost(config, report, (FULL_RATE if full_rate else REFERENCE)[config.arch])
