"""What a call costs besides the kernel: the first result of a new process, and the host's time."""

from __future__ import annotations

import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch.nn import functional

import lbg
from tests.bench.peers import Inputs, four_ops
from tests.bench.records import Shape, Skipped
from tests.bench.timing import Call, host_us

HOST_SHAPE = Shape(16, 64, 64)

# A new process: CUDA's context and inputs, then what is timed (which sets `result`), then a check of it.
PROCESS = """
import sys, time
import torch
from torch.nn import functional
before = time.perf_counter()
x = torch.rand(16384, 4096, device="cuda").half()
weight = torch.rand(4096, 4096, device="cuda").half() / 4096
ones, zeros = torch.ones(4096, device="cuda"), torch.zeros(4096, device="cuda")
linear, norm = torch.nn.Linear(4096, 4096, bias=False, device="cuda"), torch.nn.BatchNorm1d(4096, device="cuda").eval()
linear.weight = torch.nn.Parameter(weight.float())
def four_ops(x, weight, mean, variance):
    return functional.relu(functional.gelu(functional.batch_norm(functional.linear(x, weight), mean, variance)))
torch.cuda.synchronize()
context = time.perf_counter()
{imports}
imported = time.perf_counter()
with torch.inference_mode():
    {body}
torch.cuda.synchronize()
end = time.perf_counter()
expected = functional.gelu(x[:8].double() @ weight.double().T)
torch.testing.assert_close(result[:8].double(), expected, rtol=2e-3, atol=2e-3)
{after}
print(context - before, imported - context, end - imported)
"""
LBG = "result = torch.ops.lbg.fused(x, weight, ones, zeros)"
EAGER = "result = four_ops(x, weight, zeros.half(), ones.half())"
COMPILE = "result = torch.compile(four_ops, dynamic=False)(x, weight, zeros.half(), ones.half())"
ORIGINAL = """
    import importlib.util
    spec = importlib.util.spec_from_file_location("original", {path!r})
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    result = module.fused_linear_bn_gelu_relu(x, linear, norm)
""".strip()


def first_results(original: Path | None) -> tuple[dict[str, float], list[Skipped]]:
    """Milliseconds from a process that has a CUDA context to its first result at M=16384, N=K=4096.

    Medians of new processes; whatever compiles finds its caches empty.

    Args:
        original: the original program, or a folder that holds it.
    """
    program = next(iter(original.glob("*.py")), None) if original and original.is_dir() else original
    found: dict[str, float] = {}
    skipped: list[Skipped] = []
    no_triton = "" if importlib.util.find_spec("triton") else "triton is not installed"
    context, found["import lbg"], found["lbg"] = _process(LBG, "import lbg", "assert 'triton' not in sys.modules", 5)
    found["eager"] = _process(EAGER, repeats=3)[2]
    others = {
        "compile, empty cache": (COMPILE, no_triton),
        "original, JIT, empty cache": (
            ORIGINAL.format(path=str(program)),
            no_triton or ("" if program else "needs the program itself in --original"),
        ),
    }
    for label, (body, why_not) in others.items():
        try:
            if why_not:
                raise RuntimeError(why_not)
            found[label] = _process(body)[2]
        except RuntimeError as error:
            skipped.append(Skipped(label, "first result", str(error)))
    return {"CUDA context and inputs": context} | found, skipped


def _process(body: str, imports: str = "", after: str = "", repeats: int = 1) -> tuple[float, float, float]:
    """(context and inputs, imports, first result) of a new process, median milliseconds."""
    runs = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as cache:
            environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": f"{cache}/triton"}
            script = Path(cache, "process.py")  # torch.compile reads the source from a file
            script.write_text(PROCESS.format(body=body, imports=imports, after=after))
            done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError((done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1])
        runs.append([1e3 * float(value) for value in done.stdout.split()])
    context, imported, first = (statistics.median(column) for column in zip(*runs))
    return context, imported, first


def host_times() -> tuple[dict[str, float], list[Skipped]]:
    """Median host microseconds of one call at M=16, N=K=64."""
    inputs = Inputs(HOST_SHAPE, 1)
    x, weight, scale, shift = inputs.x16, inputs.weights16[0], *inputs.fold
    calls: dict[str, Call] = {
        "F.linear": lambda: functional.linear(x, weight),
        "torch.ops.lbg.fused": lambda: torch.ops.lbg.fused(x, weight, scale, shift),
        "lbg.fused": lambda: lbg.fused(x, weight, scale, shift),
        "eager": lambda: four_ops(x, weight, *inputs.vectors16),
    }
    skipped: list[Skipped] = []
    more: dict[str, Call] = {}
    for label, mode in (("compile", "default"), ("compile, graphs", "reduce-overhead")):
        compiled = torch.compile(four_ops, mode=mode, dynamic=False)
        try:
            with torch.inference_mode():
                for _ in range(3):
                    compiled(x, weight, *inputs.vectors16)
            more[label] = lambda compiled=compiled: compiled(x, weight, *inputs.vectors16)
        except Exception as error:  # whatever keeps torch.compile from working here
            skipped.append(Skipped(label, "host time", type(error).__name__))
    with torch.inference_mode():
        found = {f"{label}, inference_mode": us for label, us in host_us(calls | more).items()}
    with torch.no_grad():
        found |= {f"{label}, no_grad": us for label, us in host_us(calls).items()}
    return found, skipped
