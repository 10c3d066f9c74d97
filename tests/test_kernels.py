"""The kernel family's arithmetic without a GPU: in Triton's interpreter, and the derivation of its constants."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import fit_epilogue

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("group", ["classes", "edges", "walks", "layouts", "activation", "special_values"])
def test_interpreted(group: str) -> None:
    command = [sys.executable, "-m", "tests.interpret", group]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert rows
    for what, error, bound in rows:
        assert error <= bound, f"{what}: error {error:.2e} over {bound:.1e}"


@pytest.mark.parametrize(("degree", "error"), [(5, 3.216e-7), (3, 1.053e-4)])
def test_the_constants_are_the_best_fit(degree: int, error: float) -> None:
    source = ROOT.joinpath("aot", "kernels.py").read_text()
    body = source[source.index("    if dtype == tl.float32:") : source.index("    y = v * (1.0 - tl.exp2(-tl.abs(p)))")]
    wide, narrow_and_last = body.split("    else:\n")
    narrow, last = narrow_and_last.rsplit("    p = ", 1)
    assert last == "p * v - 1.0\n"
    found = re.findall(r"([+-]?) ?(\d+\.\d{8,})", {5: wide, 3: narrow}[degree])
    constants = [float(sign + digits) for sign, digits in found]
    coefficients, largest = fit_epilogue.fit(degree)
    np.testing.assert_allclose([*constants, -1.0], coefficients[::-1], rtol=2**-23)
    assert largest == pytest.approx(error, rel=1e-3)
