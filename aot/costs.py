"""What dispatch expects of each kernel's time: measured where evidence_sm_XY.json has its symbol, or that of the
float16 kernel whose instructions it runs with bfloat16 data; else modelled.

The formula is csrc/lbg.h's predicted_us, the model aot/model.py; `build.py tune` and `python -m tests.bench.fit`
measure and write. No cubin depends on a cost, so that a new one compiles nothing again.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from aot import evidence, model
from aot.chips import REFERENCE
from aot.compile import Report
from aot.configs import Config
from aot.model import Cost


@cache
def measured(arch: int) -> dict[str, Cost]:
    """By symbol; empty for an arch that has not been measured."""
    rows = evidence.read(arch)["tune"].get("costs", {}).get("kernels", {})
    return {symbol: Cost(**row["cost"]) for symbol, row in rows.items()}


def float16_twin(config: Config) -> Config:
    x, weight, out = ("f16" if dtype == "bf16" else dtype for dtype in (config.x, config.weight, config.out))
    return replace(config, x=x, weight=weight, out=out)


def cost(config: Config, report: Report) -> Cost:
    """What is not measured is modelled from the config's own report, for its arch's reference chip."""
    found = measured(config.arch)
    own = found.get(config.symbol) or found.get(float16_twin(config).symbol)
    return own or model.cost(config, report, REFERENCE[config.arch])
