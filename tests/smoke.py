"""The wheel at work in an environment that has torch and no triton: the operator against the four PyTorch modules.

Runs on the GPU if there is one that kernels are shipped for, else on the CPU, and prints one line.
"""

from __future__ import annotations

import importlib.util
import sys

import torch

import lbg


def device() -> str:
    if not torch.cuda.is_available():
        return "cpu"
    major, minor = torch.cuda.get_device_capability()
    return "cuda" if any(config.arch == major * 10 + minor for config in lbg.configs()) else "cpu"


def main() -> None:
    if importlib.util.find_spec("triton"):
        sys.exit("triton is installed here: this must be shown without it")
    where = device()
    torch.manual_seed(0)
    m, n, k = (16384, 4096, 4096) if where == "cuda" else (1024, 1024, 1024)
    modules = torch.nn.Sequential(torch.nn.Linear(k, n), torch.nn.BatchNorm1d(n), torch.nn.GELU(), torch.nn.ReLU()).to(
        where
    )
    with torch.no_grad():
        for statistics in range(3):
            modules(torch.randn(256, k, device=where) + statistics)  # training mode: real running statistics
    modules.eval()
    x = torch.randn(m, k, device=where)
    linear, norm = modules[0], modules[1]
    with torch.inference_mode():
        scale, shift = lbg.fold(linear.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
        y = torch.ops.lbg.fused(x, linear.weight.half(), scale, shift)
        expected = modules(x)
        error = ((y - expected).norm() / expected.norm()).item()
    # float32 x and weight are rounded to float16 (2^-11 relative each); the modules keep float32.
    if not error < 1e-3:
        sys.exit(f"torch.ops.lbg.fused differs from the PyTorch modules: relative error {error:.2e}")
    if "triton" in sys.modules:
        sys.exit("triton was imported")
    name = torch.cuda.get_device_name() if where == "cuda" else "CPU"
    print(f"[{m}, {k}] x [{n}, {k}] on {name}, relative error {error:.1e} against the PyTorch modules, no triton")


if __name__ == "__main__":
    main()
