"""What a GPU told about one arch's kernels: one JSON file of sections, such as `tune`, `benchmark` and `profile`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aot import BuildError


def write_section(path: Path, arch: int, section: str, data: Mapping[str, Any]) -> None:
    """Puts one section into the file at once, or not at all; other sections stay.

    Raises:
        BuildError: the file is of another arch.
    """
    found = json.loads(path.read_text()) if path.exists() else {"arch": f"sm_{arch}"}
    if found.get("arch") != f"sm_{arch}":
        raise BuildError(f"{path}: evidence of {found.get('arch')}; wanted is that of sm_{arch}")
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(found | {section: data}, indent=1) + "\n")
    partial.replace(path)
