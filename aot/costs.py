"""What dispatch expects of each kernel's time: measured where evidence_sm_XY.json has its symbol, else modelled.

The formula is csrc/lbg.h's predicted_us, the model aot/model.py; `build.py tune` and `python -m tests.bench.fit`
measure and write. No cubin depends on a cost, so that a new one compiles nothing again.
"""

from __future__ import annotations

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


def cost(config: Config, report: Report) -> Cost:
    """What is not measured is modelled from the config's own report, for its arch's reference chip."""
    return measured(config.arch).get(config.symbol) or model.cost(config, report, REFERENCE[config.arch])
