"""The environments that a build makes for itself: one with the pinned build requirements, one as a user would have.

Standard library only: this runs before anything is installed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path
from typing import Any

from aot import BuildError


def project(root: Path) -> dict[str, Any]:
    """pyproject.toml as read."""
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        try:
            from pip._vendor import tomli as tomllib
        except ModuleNotFoundError:
            raise BuildError(
                "missing tool: Python 3.10 needs pip to read pyproject.toml (apt install python3-pip)"
            ) from None
    data: dict[str, Any] = tomllib.loads(root.joinpath("pyproject.toml").read_text())
    return data


def build_requirements(root: Path) -> list[str]:
    data = project(root)
    return [*data["build-system"]["requires"], *data["dependency-groups"]["kernels"]]


def missing(requirements: list[str]) -> list[str]:
    """Those pinned requirements (name==version) that this interpreter does not have in that version."""

    def satisfied(requirement: str) -> bool:
        name, _, version = requirement.partition("==")
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            return False
        return not version or re.split(r"\+", found)[0] == version

    return [requirement for requirement in requirements if not satisfied(requirement)]


def make(folder: Path, *steps: list[str], without: tuple[str, ...] = ()) -> Path:
    """A virtual environment with each step's packages, made once; returns its python.

    The steps are resolved one after another: PyPI's CUDA build of torch pins a triton of its own, which the build's
    replaces. Packages named in `without` are taken out again.
    """
    python = folder / "bin" / "python"
    mark = folder / "complete"
    key = hashlib.sha256(repr((steps, without, sys.version)).encode()).hexdigest()
    if mark.exists() and mark.read_text() == key:
        return python
    if importlib.util.find_spec("ensurepip") is None:
        raise BuildError("missing tool: Python's venv with pip (on Debian and Ubuntu: apt install python3-venv)")
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True, symlinks=True)
    for packages in steps:
        print(f"installing {', '.join(packages)} into {os.path.relpath(folder)}", flush=True)
        pip(python, "install", *packages)
    for name in without:
        pip(python, "uninstall", "--yes", name)
    mark.write_text(key)
    return python


def pip(python: Path, *arguments: str) -> None:
    command = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise BuildError(f"pip {' '.join(arguments)} failed: {' '.join(last)}")


def enter(root: Path) -> None:
    """Where this interpreter lacks a pinned requirement, goes on in the build's own environment and does not return."""
    if not missing(build_requirements(root)):
        return
    data = project(root)
    python = make(root / "build" / "env", data["build-system"]["requires"], data["dependency-groups"]["kernels"])
    if lacking := missing_in(python, build_requirements(root)):
        raise BuildError(f"build/env lacks {', '.join(lacking)}; remove it and build again")
    sys.stdout.flush()
    os.execv(python, [str(python), *sys.argv])


def missing_in(python: Path, requirements: list[str]) -> list[str]:
    code = "import sys; from aot.environment import missing; print('\\n'.join(missing(sys.argv[1:])))"
    done = subprocess.run(
        [str(python), "-c", code, *requirements], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    if done.returncode:
        raise BuildError(f"build/env does not run: {done.stderr.strip().splitlines()[-1]}; remove it and build again")
    return done.stdout.split()
