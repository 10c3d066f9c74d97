"""The wheel: its contents, tags and metadata, what its library asks of a machine, its report, and its bytes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch

import lbg

PLATFORM = "manylinux_2_34_x86_64"
# the last for thread-local storage
SYSTEM_LIBRARIES = {"libstdc++.so.6", "libgcc_s.so.1", "libc.so.6", "libm.so.6", "ld-linux-x86-64.so.2"}


def output(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    ZipFile(wheel).extractall(folder)
    return folder


@pytest.fixture(scope="module")
def library(unpacked: Path) -> Path:
    return unpacked / "lbg" / "_C.abi3.so"


# ---- contents and metadata


def test_it_holds_the_package_and_nothing_else(wheel: Path, root: Path) -> None:
    names = set(ZipFile(wheel).namelist())
    version = wheel.name.split("-")[1]
    sources = {f"lbg/{path.name}" for path in (root / "src" / "lbg").glob("*.py*")}
    package = {name for name in names if not name.startswith(f"lbg-{version}.dist-info/")}
    assert package == {*sources, "lbg/py.typed", "lbg/_C.abi3.so"} and "lbg/_C.pyi" in package
    assert wheel.stat().st_size < 10_000_000


def test_its_tags_are_one_wheel_for_every_python(wheel: Path, unpacked: Path) -> None:
    assert wheel.name.endswith(f"-cp310-abi3-{PLATFORM}.whl")
    (text,) = (path.read_text() for path in unpacked.glob("*.dist-info/WHEEL"))
    assert re.findall(r"^Tag: (.*)$", text, re.M) == [f"cp310-abi3-{PLATFORM}"] and "Root-Is-Purelib: false" in text


def test_it_requires_torch_alone(unpacked: Path) -> None:
    (text,) = (path.read_text() for path in unpacked.glob("*.dist-info/METADATA"))
    assert re.findall(r"^Requires-Dist: (.*)$", text, re.M) == ["torch>=2.10"]
    assert re.findall(r"^Requires-Python: (.*)$", text, re.M) == [">=3.10"]


def test_its_record_is_right(unpacked: Path) -> None:
    (record,) = unpacked.glob("*.dist-info/RECORD")
    listed = {line.split(",")[0] for line in record.read_text().splitlines()}
    assert listed == {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}


# ---- the library


def test_it_needs_torch_and_the_system_only(library: Path) -> None:
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", output("readelf", "-d", library)))
    torch_libraries = {name for name in needed if re.match(r"lib(torch|torch_cpu|c10)\.so$", name)}
    assert torch_libraries and needed - torch_libraries <= SYSTEM_LIBRARIES, needed


def test_it_uses_nothing_of_torchs_cpp_abi(library: Path) -> None:
    symbols = output("nm", "-DC", "--undefined-only", library)
    assert "aoti_torch_" in symbols and not re.search(r"\b(c10|at|caffe2)::", symbols), symbols


def test_it_exports_two_functions(library: Path) -> None:
    exported = [line.split()[-1] for line in output("nm", "-D", "--defined-only", library).splitlines()]
    assert sorted(exported) == ["PyInit__C", "lbg_run"]


def test_its_python_functions_bind_on_first_call(library: Path) -> None:
    bound = dict(re.findall(r"(R_X86_64_\w+) .* (Py\w+)", output("readelf", "-rW", library)))
    assert set(bound) == {"R_X86_64_JUMP_SLO"} or set(bound) == {"R_X86_64_JUMP_SLOT"}, bound


def test_abi3audit_finds_python_310s_limited_api(wheel: Path) -> None:
    output(sys.executable, "-m", "abi3audit", "--strict", wheel)


def test_auditwheel_agrees_with_the_platform_tag(wheel: Path) -> None:
    # It says "linux" first, for libtorch.so comes with torch and is none of the system's; then what glibc asks for.
    told = " ".join(output(sys.executable, "-m", "auditwheel", "show", wheel).split())
    assert f'This constrains the platform tag to "{PLATFORM}"' in told, told


def test_it_holds_no_path_of_the_machine_that_built_it(library: Path, root: Path) -> None:
    contents = library.read_bytes()
    for folder in (root, Path(torch.__file__).parent, Path(sys.prefix), Path.home(), root / "build" / "env"):
        assert str(folder).encode() not in contents, folder
    assert b"site-packages" not in contents


# ---- the report


def test_every_kernel_is_reported_and_obeys_the_rules(wheel: Path) -> None:
    from aot.compile import Report, check
    from aot.configs import CONFIGS

    version = wheel.name.split("-")[1]
    reports = json.loads(wheel.with_name(f"lbg-{version}.report.json").read_text())
    configs = {(config.symbol, config.arch): config for config in CONFIGS}
    shipped = {(c.symbol, c.arch): c for c in lbg.configs()}
    assert {(r["symbol"], r["arch"]) for r in reports} == set(shipped) == set(configs) and len(reports) == len(shipped)
    for row in reports:
        assert set(row) == {field.name for field in fields(Report)}, row
        report, config = Report(**row), configs[row["symbol"], row["arch"]]
        check(config, report)
        assert not (config.aligned and report.spill_bytes) and report.compiled_arch == report.arch, report
        assert (report.stores_per_output, report.stores_in_loop) == (1, 0) and report.loop_mma > 0, report
        assert report.registers <= 255 and report.ctas_per_sm["all"] >= 1 and report.size_bytes > 0, report
        ours = shipped[row["symbol"], row["arch"]]
        assert (ours.registers, ours.shared_bytes) == (report.registers, report.shared_bytes), report
        assert ours.ctas_per_sm == report.ctas_per_sm["all"], report


# ---- the bytes

BUILD = """
import sys
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, "")
import build
from aot import configs
kept = [c for c in configs.CONFIGS if (c.x, c.weight, c.out, c.fp16_accumulate) == ("f16", "f16", "f16", False)]
kept = [c for c in kept if c.arch == 89]
if sys.argv[1] == "after another build":
    configs.CONFIGS = tuple(kept)
    build.compile_all([89], None, 2, Path("build", "elsewhere"))  # in the cache, and older than what is built next
    configs.CONFIGS = tuple(replace(config, group_m=4) for config in kept)
    build.build([89], None, 2, Path("dist"))
configs.CONFIGS = tuple(kept)
build.build([89], None, int(sys.argv[2]), Path("dist"))
"""


def test_two_folders_give_the_same_bytes(root: Path, tmp_path: Path) -> None:
    """Four kernels, built fresh in one folder; and after others of the same names in another."""
    wheels = []
    for name, history, jobs in (("one", "fresh", "1"), ("a folder of another name", "after another build", "2")):
        copy = tmp_path / name.replace(" ", "-")
        for folder in ("aot", "csrc", "src"):
            shutil.copytree(root / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
        for file in ("build.py", "pyproject.toml", "README.md", "LICENSE"):
            if root.joinpath(file).exists():
                shutil.copyfile(root / file, copy / file)
        environment = os.environ | {"SOURCE_DATE_EPOCH": "1700000000"}
        done = subprocess.run(
            [sys.executable, "-c", BUILD, history, jobs], cwd=copy, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        wheels.append(next(copy.glob("dist/*.whl")))
    first, second = (ZipFile(path) for path in wheels)
    assert first.namelist() == second.namelist()
    assert [n for n in first.namelist() if first.read(n) != second.read(n)] == []
    assert wheels[0].read_bytes() == wheels[1].read_bytes()
    assert str(tmp_path).encode() not in first.read("lbg/_C.abi3.so")
