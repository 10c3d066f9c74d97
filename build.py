#!/usr/bin/env python3
"""Builds lbg: configs -> cubins -> launchers -> extension -> wheel, and checks the wheel as a user would have it.

    python3 build.py                        the wheel for every shipped GPU, checked in a clean environment
    python3 build.py --arch sm_89           for one GPU architecture
    python3 build.py --arch sm_89 --verify-on sm_90
                                            the sm_89 kernels' own PTX assembled for sm_90: the shipped 4090 program on
                                            a Hopper GPU. Its wheel says so in its version.
    python3 build.py --evidence FILE        FILE, from a GPU's owner, becomes its arch's evidence: the kernels to build
    python3 build.py tune [--help]          the kernels to ship, chosen anew by measurement on this machine's GPU
    python3 build.py test [pytest options]  build, then lint, type-check and run every test that needs no GPU
    python3 build.py profile [its options]  build, then what Nsight Compute counts in the kernels on this GPU
                                            (tests/bench/profile.py)

Needs Python >= 3.10 and g++: no GPU, no CUDA toolkit. What else it needs it installs into build/env. A second build
compiles only what has changed. It is also the PEP 517 backend: `pip install .` and `pip wheel .` do the same.
"""

from __future__ import annotations

import argparse
import atexit
import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # as a PEP 517 backend this file is imported from elsewhere

from aot import BuildError, environment, evidence  # noqa: E402
from aot.evidence import ARCHS  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aot.compile import Artifact, Report
    from aot.configs import Config

# Commands with options of their own, by the module whose main() takes them.
COMMANDS = {"audit": "aot.audit", "tune": "aot.tune"}


def arch_number(name: str) -> int:
    number = name.removeprefix("sm_")
    if not number.isdigit() or int(number) not in ARCHS:
        raise argparse.ArgumentTypeError(f"{name} is not one of {', '.join(f'sm_{arch}' for arch in ARCHS)}")
    return int(number)


def end_quietly() -> None:
    """Has this process end without the interpreter's teardown, where triton's bindings list what they still hold."""
    atexit.register(os._exit, 0)


def compile_all(archs: list[int], verify_on: int | None, jobs: int, folder: Path) -> tuple[list[Artifact], int]:
    """Every config of `archs` as a cubin in `folder`/cubins; (artifacts in table order, how many were compiled now)."""
    from aot.configs import CONFIGS

    return compile_configs([config for config in CONFIGS if config.arch in archs], verify_on, jobs, folder)


def compile_configs(
    configs: Sequence[Config],
    verify_on: int | None,
    jobs: int,
    folder: Path,
    drop: Callable[[Config, Exception], None] | None = None,
) -> tuple[list[Artifact], int]:
    """compile_all() of these configs. What fails stops it, or is handed to `drop` and left out."""
    from tqdm import tqdm

    from aot.compile import cached

    done: dict[int, tuple[Artifact, bool]] = {}
    # spawn: triton starts threads, which a fork would not carry over
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=end_quietly) as pool:
        futures = {
            pool.submit(cached, config, verify_on or config.arch, ROOT / "build" / "cache"): index
            for index, config in enumerate(configs)
        }
        try:
            for future in tqdm(as_completed(futures), total=len(futures), desc="cubins", unit="kernel", disable=None):
                try:
                    done[futures[future]] = future.result()
                except Exception as error:
                    if drop is None:
                        raise
                    drop(configs[futures[future]], error)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    cubins = folder / "cubins"
    shutil.rmtree(cubins, ignore_errors=True)
    cubins.mkdir(parents=True)
    artifacts = []
    for index, (made, _) in sorted(done.items()):
        path = cubins / f"{configs[index].file}.cubin"
        shutil.copyfile(made.cubin, path)  # its time is now: ninja must see that it changed, to an older one too
        artifacts.append(replace(made, config=configs[index], cubin=path))
    return artifacts, sum(fresh for _, fresh in done.values())


def report_table(reports: list[Report]) -> str:
    head = (
        f"{'kernel':<52} arch regs spill stack shared CTAs/SM (reg,smem,warp) stores width mma loop/all    size seconds"
    )
    rows = [
        f"{r.symbol:<52} {r.arch:>4} {r.registers:>4} {r.spill_bytes:>5} {r.stack_bytes:>5} {r.shared_bytes:>6} "
        f"{r.ctas_per_sm['all']:>7} {'({registers},{shared},{warps})'.format(**r.ctas_per_sm):>15} "
        f"{r.stores_per_output:>6g} {r.store_width_bytes:>5} {f'{r.loop_mma}/{r.mma}':>12} "
        f"{r.size_bytes:>7} {r.seconds:>7}"
        for r in reports
    ]
    return "\n".join([head, *rows])


def build(
    archs: list[int], verify_on: int | None, jobs: int, directory: Path
) -> tuple[Path, dict[str, float], list[Report]]:
    """The wheel and its report in `directory`; (wheel, seconds of each step, reports)."""
    from aot import emit, package
    from aot.configs import CONFIGS, ROWS, check_classes, check_evidence

    check_classes(CONFIGS)
    for arch in archs:
        for warning in check_evidence(arch, ROWS[arch]):
            print(f"warning: {warning}", file=sys.stderr)
    version = package.version(ROOT, archs, verify_on)
    folder = ROOT / "build" / ("generated" if verify_on is None else f"verify-sm_{archs[0]}-on-sm_{verify_on}")
    seconds: dict[str, float] = {}
    start = time.perf_counter()

    def lap(step: str) -> None:
        nonlocal start
        now = time.perf_counter()
        seconds[step], start = now - start, now

    artifacts, compiled = compile_all(archs, verify_on, jobs, folder)
    lap(f"cubins: {len(artifacts)} ({compiled} compiled, {len(artifacts) - compiled} from the cache)")
    emit.write(artifacts, version, folder)
    library = package.extension(ROOT, folder)
    lap("extension")
    wheel = package.wheel(ROOT, version, library, directory)
    reports = [artifact.report for artifact in artifacts]
    directory.joinpath(f"lbg-{version}.report.json").write_text(
        json.dumps([asdict(r) for r in reports], indent=1) + "\n"
    )
    lap(f"wheel: {wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB")
    return wheel, seconds, reports


def clean_environment(wheel: Path) -> Path:
    """An environment with torch and this wheel, and no triton; returns its python."""
    torch = next(pin for pin in environment.build_requirements(ROOT) if pin.startswith("torch=="))
    # numpy: torch warns without it
    python = environment.make(ROOT / "build" / "clean-env", [torch, "numpy"], without=("triton",))
    environment.pip(python, "install", "--force-reinstall", "--no-deps", str(wheel))
    return python


# PEP 517. pip runs these in an environment that it has made from pyproject.toml.


def get_requires_for_build_wheel(config_settings: object = None) -> list[str]:
    requirements: list[str] = environment.project(ROOT)["dependency-groups"]["kernels"]
    return requirements


def build_wheel(wheel_directory: str, config_settings: object = None, metadata_directory: str | None = None) -> str:
    try:
        wheel, _, _ = build(list(ARCHS), None, os.cpu_count() or 1, ROOT / "dist")
    except BuildError as error:
        raise SystemExit(f"lbg: {error}") from None
    shutil.copy2(wheel, wheel_directory)
    return wheel.name


def build_sdist(sdist_directory: str, config_settings: object = None) -> str:
    from aot import package

    return package.sdist(ROOT, package.version(ROOT, [], None), Path(sdist_directory)).name


def main() -> None:
    if sys.argv[1:2] and sys.argv[1] in COMMANDS:
        environment.enter(ROOT)
        sys.exit(importlib.import_module(COMMANDS[sys.argv[1]]).main(sys.argv[2:]))

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "command", nargs="?", choices=["test", "profile", *COMMANDS], help="what to do besides building"
    )
    parser.add_argument(
        "--arch",
        type=arch_number,
        action="append",
        metavar="sm_XY",
        help="a GPU architecture to build for; repeat for several (default: sm_89 and sm_90)",
    )
    parser.add_argument(
        "--verify-on",
        type=arch_number,
        metavar="sm_XY",
        help="assemble the PTX of the one --arch for this architecture instead: a verification build",
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compile processes (default: one a core)")
    parser.add_argument("--evidence", type=Path, metavar="FILE", help="take FILE as its arch's evidence first")
    arguments, rest = parser.parse_known_args()
    if rest and arguments.command is None:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if arguments.verify_on and len(arguments.arch or []) != 1:
        parser.error("--verify-on needs exactly one --arch, the one to verify")
    if arguments.verify_on and arguments.verify_on < arguments.arch[0]:
        parser.error(f"PTX of sm_{arguments.arch[0]} cannot be assembled for the older sm_{arguments.verify_on}")
    if arguments.jobs < 1:
        parser.error(f"--jobs must be at least 1; got {arguments.jobs}")

    if arguments.evidence and arguments.command == "profile":
        rest += ["--evidence", str(arguments.evidence)]  # where that writes, not what is built
    elif arguments.evidence:  # before the configs are read from it
        print(f"{arguments.evidence} is now {evidence.adopt(arguments.evidence).relative_to(ROOT)}")
    environment.enter(ROOT)
    if arguments.command == "profile":
        from tests.bench import profile

        profile.options_of(rest)  # what is missing is said before anything is built
    wheel, seconds, reports = build(arguments.arch or list(ARCHS), arguments.verify_on, arguments.jobs, ROOT / "dist")
    if arguments.command == "profile":
        environment.pip(Path(sys.executable), "install", "--force-reinstall", "--no-deps", str(wheel))
        sys.exit(profile.main(rest))
    print(report_table(reports))
    start = time.perf_counter()
    python = clean_environment(wheel)
    checked = subprocess.run([python, ROOT / "tests" / "smoke.py"], capture_output=True, text=True, cwd=ROOT / "build")
    if checked.returncode:
        raise BuildError(f"the wheel does not work in a clean environment:\n{checked.stdout}{checked.stderr}")
    seconds[f"clean environment: {checked.stdout.strip()}"] = time.perf_counter() - start
    print()
    for step, time_s in seconds.items():
        print(f"{time_s:7.1f} s  {step}")
    print(f"           dist/{wheel.name}")
    if arguments.command == "test":
        from tests import suite

        sys.exit(suite.run(ROOT, wheel, rest))


if __name__ == "__main__":
    try:
        main()
    except BuildError as error:
        sys.exit(f"build.py: {error}")
