"""`python3 build.py test`: what every change must pass, in the build's own environment and against the built wheel."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from aot import environment

WHY_NOT_GPU = "needs a CUDA GPU that a kernel is shipped for"
HAS_SHIPPED_GPU = """
import sys, torch, lbg
archs = {10 * major + minor for major, minor in map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))}
sys.exit(archs.isdisjoint(config.arch for config in lbg.configs()))
"""


def shell(root: Path, *command: str) -> int:
    """Runs a command in view; prints what it is and, unless it speaks last, how it ended."""
    name = Path(command[0]).name
    print(f"\n$ {' '.join((name, *command[1:]))}", flush=True)
    start = time.perf_counter()
    code = subprocess.run(command, cwd=root).returncode
    if "pytest" not in command:
        print(
            f"{'passed' if code == 0 else f'FAILED with exit code {code}'} ({time.perf_counter() - start:.1f} s)",
            flush=True,
        )
    return code


def gpu_tests(root: Path) -> dict[str, int]:
    """Test functions marked gpu, with how many cases each has here."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "--quiet", "-m", "gpu"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True).stdout
    names = [line.partition("[")[0] for line in listed.splitlines() if "::" in line]
    return {name: names.count(name) for name in names}


def run(root: Path, wheel: Path, pytest_options: list[str]) -> int:
    """Every step, even after one has failed; returns the first exit code that is not 0."""
    python = Path(sys.executable)
    if lacking := environment.missing(environment.project(root)["dependency-groups"]["test"]):
        print(f"installing {', '.join(lacking)}", flush=True)
        environment.pip(python, "install", *lacking)
    environment.pip(python, "install", "--force-reinstall", "--no-deps", str(wheel))
    scripts = Path(sysconfig.get_path("scripts"))
    sources = [
        *root.glob("csrc/*.*"),
        *(path for suffix in ("c", "cpp", "h") for path in root.glob(f"tests/**/*.{suffix}")),
    ]
    codes = [
        shell(root, str(scripts / "ruff"), "check", "."),
        shell(root, str(scripts / "ruff"), "format", "--check", "."),
        shell(root, str(scripts / "mypy")),
        shell(
            root,
            *(str(scripts / "clang-format"), "--dry-run", "--Werror"),
            *sorted(str(path.relative_to(root)) for path in sources),
        ),
    ]
    selection = ["-m", "not gpu"]
    if subprocess.run([python, "-c", HAS_SHIPPED_GPU], cwd=root / "build").returncode == 0:
        selection = []
    elif "-m" not in pytest_options:
        print(f"\nnot run, as each {WHY_NOT_GPU}:")
        for name, count in gpu_tests(root).items():
            print(f"  {name}" + (f" ({count} cases)" if count > 1 else ""))
    codes.append(shell(root, str(python), "-m", "pytest", *selection, *pytest_options))
    return next((code for code in codes if code), 0)
