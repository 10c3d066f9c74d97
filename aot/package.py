"""Generated sources to an extension (ninja and g++), and the extension to a wheel (setuptools)."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

from aot import BuildError
from aot.environment import project

PLATFORM = "manylinux_2_34_x86_64"  # the newest glibc symbol that Debian 12's g++ pulls in
PYTHON_TAG = "cp310"
TORCH_TARGET = "0x020a000000000000"  # the stable ABI of torch 2.10
SOURCES = ("dispatch", "driver", "runtime", "ops", "python")
EXPORTS = "{ global: PyInit__C; lbg_run; local: *; };\n"


def extension(root: Path, folder: Path) -> Path:
    """Compiles csrc/ and the sources generated into `folder`; returns the shared library."""
    import torch
    from ninja import BIN_DIR, ninja_syntax

    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if not compiler:
        raise BuildError("missing tool: g++ (a C++20 compiler) is not on the PATH; set CXX to another")
    torch_folder = Path(torch.__file__).parent
    folder.joinpath("exports.map").write_text(EXPORTS)
    with folder.joinpath("build.ninja").open("w") as file:
        ninja = ninja_syntax.Writer(file)
        # The prefix maps keep this machine's folders out of the binary; torch's may lie in root, and the last one wins.
        # Without math-errno a square root is one instruction, and dispatch takes many.
        ninja.variable(
            "flags",
            "-std=c++20 -O2 -fno-math-errno -fPIC -fvisibility=hidden -Wall -Wextra -Werror "
            f"-DTORCH_TARGET_VERSION={TORCH_TARGET} -I{root}/csrc -isystem {torch_folder}/include "
            f"-ffile-prefix-map={root}=. -ffile-prefix-map={torch_folder}=torch",
        )
        ninja.rule("compile", f"{compiler} $flags -MMD -MF $out.d -c $in -o $out", depfile="$out.d", deps="gcc")
        ninja.rule("assemble", f"{compiler} -c $in -o $out")
        # --no-as-needed: libtorch.so only forwards to libtorch_cpu.so, whose name is no part of the interface.
        ninja.rule(
            "link",
            f"{compiler} -shared -s -o $out $in -L{torch_folder}/lib -Wl,--no-as-needed -ltorch -Wl,--as-needed "
            "-Wl,-z,lazy -Wl,--version-script=exports.map",
        )
        objects = [ninja.build(f"{name}.o", "compile", str(root / "csrc" / f"{name}.cpp"))[0] for name in SOURCES]
        objects += ninja.build("kernels.o", "compile", "kernels.cpp")
        cubins = sorted(str(path.relative_to(folder)) for path in folder.glob("cubins/*.cubin"))
        objects += ninja.build("cubins.o", "assemble", "cubins.S", implicit=cubins)
        ninja.build("_C.abi3.so", "link", objects, implicit=["exports.map"])
    done = subprocess.run([str(Path(BIN_DIR, "ninja")), "--quiet"], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"the extension does not compile:\n{done.stdout}{done.stderr}")
    return folder / "_C.abi3.so"


@contextmanager
def _reproducible(root: Path) -> Iterator[None]:
    """SOURCE_DATE_EPOCH as given, else the commit's time, else 1980 (zip's zero); one umask; the project's folder."""
    before, folder, umask = os.environ.get("SOURCE_DATE_EPOCH"), os.getcwd(), os.umask(0o022)
    if before is None:
        commit = subprocess.run(["git", "log", "-1", "--format=%ct"], cwd=root, capture_output=True, text=True)
        os.environ["SOURCE_DATE_EPOCH"] = commit.stdout.strip() or "315532800"
    os.chdir(root)
    try:
        yield
    finally:
        os.chdir(folder)
        os.umask(umask)
        if before is None:
            del os.environ["SOURCE_DATE_EPOCH"]


def _setup(root: Path, version: str, library: Path | None, command: str, directory: Path) -> Path:
    """Runs a setuptools command with pyproject.toml's metadata, `version`, and the library as the extension.

    Returns what it wrote, moved into `directory` once it is whole.
    """
    import setuptools
    from setuptools.command.build_ext import build_ext
    from setuptools.command.sdist import sdist

    class Distribution(setuptools.Distribution):
        def parse_config_files(self, *args: object, **kwargs: object) -> None:
            super().parse_config_files(*args, **kwargs)
            self.metadata.version = version  # a verification build's says so

    class CopyLibrary(build_ext):
        def build_extension(self, ext: setuptools.Extension) -> None:
            target = Path(self.get_ext_fullpath(ext.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(library, target)

    class WholeSource(sdist):
        def add_defaults(self) -> None:
            super().add_defaults()
            for folder in ("aot", "csrc", "tests", "docs"):
                self.filelist.extend(
                    str(path)
                    for path in sorted(Path(folder).rglob("*"))
                    if path.is_file() and "__pycache__" not in path.parts
                )
            self.filelist.extend(["build.py", "CHANGELOG.md", "CONTRIBUTING.md"])

    output = StringIO()
    build = root / "build"
    build.mkdir(exist_ok=True)
    # A fresh folder each time: what an earlier build left must not reach this wheel.
    with (
        tempfile.TemporaryDirectory(dir=build) as base,
        _reproducible(root),
        redirect_stdout(output),
        redirect_stderr(output),
    ):
        setuptools.setup(
            distclass=Distribution,
            script_name="build.py",
            script_args=["--quiet", command, "--dist-dir", f"{base}/dist"],
            ext_modules=[setuptools.Extension("lbg._C", [], py_limited_api=True)] if library else [],
            cmdclass={"build_ext": CopyLibrary, "sdist": WholeSource},
            options={
                "build": {"build_base": base},
                "egg_info": {"egg_base": base},
                "bdist_wheel": {"py_limited_api": PYTHON_TAG, "plat_name": PLATFORM},
            },
        )
        written = next(Path(base, "dist").iterdir())
        directory.mkdir(parents=True, exist_ok=True)
        partial = directory / f"{written.name}.{os.getpid()}.partial"
        shutil.copyfile(written, partial)
        return partial.replace(directory / written.name)


def version(root: Path, archs: list[int], verify_on: int | None) -> str:
    plain: str = project(root)["project"]["version"]
    return plain if verify_on is None else f"{plain}+verify.sm{archs[0]}.on.sm{verify_on}"


def wheel(root: Path, built_version: str, library: Path, directory: Path) -> Path:
    path = _setup(root, built_version, library, "bdist_wheel", directory)
    if path.name != f"lbg-{built_version}-{PYTHON_TAG}-abi3-{PLATFORM}.whl":
        raise BuildError(f"setuptools named the wheel {path.name}; it must be {PYTHON_TAG}-abi3-{PLATFORM}")
    return path


def sdist(root: Path, built_version: str, directory: Path) -> Path:
    return _setup(root, built_version, None, "sdist", directory)
