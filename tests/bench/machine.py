"""The machine that a benchmark runs on."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import platform
import shutil
import subprocess
import time
from pathlib import Path

import torch

import lbg
from tests.bench.peers import archs


def facts(commit: str | None = None) -> dict[str, str]:
    """What a number means nothing without."""
    root = Path(__file__).resolve().parents[2]
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    compiled_arch, arch = archs()
    triton = importlib.util.find_spec("triton") and importlib.metadata.version("triton")
    return {
        "gpu": torch.cuda.get_device_name(),
        "kernels": f"sm_{arch}" if compiled_arch == arch else f"sm_{compiled_arch} on sm_{arch}",
        "driver": nvidia_smi("driver_version"),
        "clocks": clocks_under_load(),
        "power limit": nvidia_smi("power.limit"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "triton, of the peers": triton or "none",
        "python": platform.python_version(),
        "lbg": lbg.__version__,
        "commit": commit or output(*git),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }


def output(*command: str) -> str:
    """What a command prints, or "unknown"."""
    if shutil.which(command[0]) is None:
        return "unknown"
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def nvidia_smi(query: str) -> str:
    device = f"--id=GPU-{torch.cuda.get_device_properties().uuid}"
    return output("nvidia-smi", device, f"--query-gpu={query}", "--format=csv,noheader")


def clocks_under_load() -> str:
    """SM and memory clocks in the middle of some seconds of products."""
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.float16)
    start = time.perf_counter()
    while time.perf_counter() - start < 0.5:
        torch.nn.functional.linear(x, x)
        torch.cuda.synchronize()
    for _ in range(1000):
        torch.nn.functional.linear(x, x)
    sm, _, memory = nvidia_smi("clocks.sm,clocks.mem").partition(", ")
    torch.cuda.synchronize()
    return f"SM {sm} under load, memory {memory}" if memory else "unknown"
