"""Fixtures of more than one file: the built wheel, the project's folder."""

from __future__ import annotations

import atexit
import os
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def root() -> Path:
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def wheel(root: Path) -> Path:
    """The newest wheel of this version in dist/, a verification build aside."""
    from aot.environment import project

    version = project(root)["project"]["version"]
    found = sorted(root.glob(f"dist/lbg-{version}-cp310-abi3-*.whl"), key=lambda path: path.stat().st_mtime)
    if not found:
        pytest.fail(f"dist/ holds no wheel of lbg {version}: run python3 build.py first")
    return found[-1]


def pytest_sessionfinish(exitstatus: int) -> None:
    """Ends this process without the interpreter's teardown, where triton's bindings list what they still hold."""

    def end() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exitstatus)

    if "triton" in sys.modules:
        atexit.register(end)
