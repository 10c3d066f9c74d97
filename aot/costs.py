"""What dispatch expects of each kernel's time: measured where costs_sm_XY.json has its symbol, else modelled.

The formula is csrc/lbg.h's predicted_us, the model aot/model.py. `python -m tests.bench.fit` measures and writes the
files. No cubin depends on a cost, so that a new one compiles nothing again.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from aot import model
from aot.chips import REFERENCE
from aot.compile import Report
from aot.configs import Config
from aot.model import Cost


@cache
def measured(arch: int) -> dict[str, Cost]:
    """By symbol; empty for an arch that has not been measured."""
    path = Path(__file__).with_name(f"costs_sm_{arch}.json")
    if not path.exists():
        return {}
    rows = json.loads(path.read_text())["kernels"]
    return {symbol: Cost(**row["cost"]) for symbol, row in rows.items()}


def cost(config: Config, report: Report) -> Cost:
    """What is not measured is modelled from the config's own report, for its arch's reference chip."""
    return measured(config.arch).get(config.symbol) or model.cost(config, report, REFERENCE[config.arch])
