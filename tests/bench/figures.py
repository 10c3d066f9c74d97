"""The figures that the README quotes: first result of a process, host time of a call, and time against the original.

    python -m tests.bench.figures [--original PATH] [--json FILE]

Every result is checked before it is timed. Medians of interleaved repeats on random data; the original, which needs
triton and its file, is left out by name when either is missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lbg
from tests import cases
from tests.cases import F16, F32, Case


def facts() -> dict[str, str]:
    """What a number means nothing without."""
    query = "driver_version,clocks.sm,clocks.mem,power.limit"
    smi = subprocess.run(
        ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True
    )
    driver, sm, memory, power = (smi.stdout.strip().splitlines() or ["?, ?, ?, ?"])[0].split(", ")
    return {
        "gpu": torch.cuda.get_device_name(), "driver": driver, "sm_clock": sm, "memory_clock": memory,
        "power_limit": power, "torch": torch.__version__, "lbg": lbg.__version__,
    }  # fmt: skip


def interleaved_ms(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median device time of each call.

    The calls take turns in an order drawn anew each round: at the power limit a call's clock depends on what ran
    before it, and no one call may always follow the hottest.
    """
    order = random.Random(0)
    for call in calls.values():
        for _ in range(3):
            call()
    times: dict[str, list[float]] = {label: [] for label in calls}
    for _ in range(repeats):
        for label, call in order.sample(list(calls.items()), len(calls)):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            times[label].append(start.elapsed_time(end))
    return {label: statistics.median(values) for label, values in times.items()}


FIRST_RESULT = """
import sys, time
import torch
start = time.perf_counter()
x = torch.rand(16384, 4096, device="cuda").half()
weight = torch.rand(4096, 4096, device="cuda").half() / 4096
scale = torch.rand(4096, device="cuda")
torch.cuda.synchronize()
context = time.perf_counter()
import lbg
imported = time.perf_counter()
result = torch.ops.lbg.fused(x, weight, scale, scale)
torch.cuda.synchronize()
end = time.perf_counter()
assert "triton" not in sys.modules
expected = torch.nn.functional.gelu((x[:8].double() @ weight.double().T) * scale + scale)
torch.testing.assert_close(result[:8].double(), expected, rtol=1e-3, atol=1e-3)
print(context - start, imported - context, end - imported)
"""


def first_result(repeats: int = 7) -> dict[str, float]:
    """Milliseconds of a new process: CUDA's context and the inputs, `import lbg`, and the first result after it."""
    runs = []
    for _ in range(repeats):
        done = subprocess.run([sys.executable, "-c", FIRST_RESULT], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        runs.append([1e3 * float(value) for value in done.stdout.split()])
    context, imported, first = (statistics.median(column) for column in zip(*runs))
    return {"context and inputs": context, "import lbg": imported, "first result": first}


def host_us(calls: dict[str, Callable[[], object]], count: int = 500, repeats: int = 21) -> dict[str, float]:
    """Median host microseconds of one call, on shapes small enough that the GPU never makes the host wait."""
    times: dict[str, list[float]] = {label: [] for label in calls}
    for _ in range(repeats):
        for label, call in calls.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(count):
                call()
            times[label].append((time.perf_counter() - start) / count * 1e6)
    return {label: statistics.median(values) for label, values in times.items()}


def host_times() -> dict[str, float]:
    arguments = cases.make(Case(16, 64, 64), "cuda")
    x, weight, scale, shift = arguments
    found = {}
    for mode, context in (("inference_mode", torch.inference_mode), ("no_grad", torch.no_grad)):
        with context():
            times = host_us({
                "torch.nn.functional.linear": lambda: torch.nn.functional.linear(x, weight),
                "torch.ops.lbg.fused": lambda: torch.ops.lbg.fused(x, weight, scale, shift),
                "torch.ops.lbg.fused.default": lambda: torch.ops.lbg.fused.default(x, weight, scale, shift),
                "lbg.fused": lambda: lbg.fused(x, weight, scale, shift),
            })  # fmt: skip
        found |= {f"{label}, {mode}": value for label, value in times.items()}
    return found


def against_the_original(path: Path | None, repeats: int) -> dict[str, float]:
    """M=16384, N=K=4096: ours, cuBLAS's bare product and, if it is there, the original's kernel, best config."""
    arguments = cases.make(Case(16384, 4096, 4096, out=F32), "cuda")
    x, weight, scale, shift = arguments
    expected = cases.reference(cases.Arguments(x[:256], weight, scale, shift))
    run_on = 10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1]
    arch = next(config.compiled_arch for config in lbg.configs() if config.arch == run_on)
    calls: dict[str, Callable[[], object]] = {}
    results: dict[str, Callable[[], Tensor]] = {}
    out = {F32: torch.empty(16384, 4096, device="cuda"), F16: torch.empty(16384, 4096, device="cuda", dtype=F16)}
    for dtype in (F32, F16):
        calls[f"lbg sm_{arch}, float16 to {str(dtype)[6:]}"] = lambda dtype=dtype: lbg.fused(*arguments, out=out[dtype])
        results[f"lbg sm_{arch}, float16 to {str(dtype)[6:]}"] = lambda dtype=dtype: out[dtype]
    wide = x.float()
    calls[f"lbg sm_{arch}, float32 to float32"] = lambda: lbg.fused(wide, weight, scale, shift, out=out[F32])
    results[f"lbg sm_{arch}, float32 to float32"] = lambda: out[F32]
    calls[f"lbg sm_{arch}, fp16_accumulate"] = lambda: lbg.fused(*arguments, out=out[F32], fp16_accumulate=True)
    results[f"lbg sm_{arch}, fp16_accumulate"] = lambda: out[F32]
    if path is not None and (path.is_dir() or importlib.util.find_spec("triton")):
        from tests.bench import original

        weight_t, zeros = weight.t().contiguous(), torch.zeros_like(shift)
        for facts_of_image, image in original.images(path, arch, run_on):
            label, kernel = f"original sm_{arch}, {facts_of_image.label}", original.Kernel(facts_of_image, image)
            calls[label] = lambda kernel=kernel: kernel(x, weight_t, (zeros, scale, shift), out[F32])
            results[label] = lambda: out[F32]
    else:
        print("the original is left out: " + ("no triton to compile it" if path else "no --original"))
    for label, result in results.items():
        result().fill_(torch.nan)
        calls[label]()
        found = cases.error(result()[:256], expected)
        if not found < 1e-3:
            raise RuntimeError(f"{label} is wrong: relative error {found:.1e}")
    calls["cuBLAS float16 product alone"] = lambda: torch.nn.functional.linear(x, weight)
    return interleaved_ms(calls, repeats)


def aligned_and_generic(repeats: int) -> dict[str, float]:
    """What an unaligned shape costs: the generic kernel beside the fast one of nearly the same size."""
    found: dict[str, Callable[[], object]] = {}
    for m, n, k in ((4096, 4096, 4096), (4097, 4095, 4088)):
        arguments = cases.make(Case(m, n, k), "cuda")
        cases.check(Case(m, n, k), arguments, lbg.fused(*arguments))
        chosen = lbg.explain(arguments.x, arguments.weight).chosen
        assert chosen is not None
        found[f"{m}x{n}x{k}, {chosen.symbol}"] = lambda arguments=arguments: lbg.fused(*arguments)
    return interleaved_ms(found, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", type=Path, help="the original program, or a folder of its compiled kernels")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    parser.add_argument("--repeats", type=int, default=30)
    arguments = parser.parse_args()
    found: dict[str, Any] = {"facts": facts()}
    found["first result of a process, ms"] = first_result()
    found["host time of a call, us"] = host_times()
    with torch.inference_mode():
        found["M=16384, N=K=4096, ms"] = against_the_original(arguments.original, arguments.repeats)
        found["aligned and generic, ms"] = aligned_and_generic(arguments.repeats)
    found["facts"] |= {f"{key} after": value for key, value in facts().items() if "clock" in key}
    for title, rows in found.items():
        print(title)
        for label, value in rows.items():
            print(f"  {label:<52} {value if isinstance(value, str) else format(value, '.3f')}")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
