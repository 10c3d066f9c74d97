"""The launcher layer against a stand-in libcuda.so.1: what it calls, with what, in what order, and how it fails."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lbg
from aot import fitting
from aot.chips import is_full_rate
from tests import cases
from tests.bench import fit
from tests.cases import CLASSES, shapes

HERE = Path(__file__).resolve().parent
PRELUDE = """
import ctypes, json, os, threading, lbg
from tests.stand_in.call import launch
def show(value): print(json.dumps(value))
"""
ADA, HOPPER = "NVIDIA GeForce RTX 4090:89:128", "NVIDIA H100 80GB HBM3:90:132"
AFTER_LOAD = ["cuCtxGetCurrent", "cuCtxPushCurrent_v2", "cuLaunchKernelEx", "cuCtxPopCurrent_v2"]


@dataclass
class Outcome:
    printed: Any  # the program's last line, as JSON
    calls: list[dict[str, Any]]  # what the stand-in recorded, in order

    def of(self, function: str) -> list[dict[str, Any]]:
        return [call for call in self.calls if call["call"] == function]

    @property
    def names(self) -> list[str]:
        return [call["call"] for call in self.calls]


Start = Callable[..., Outcome]


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a libcuda.so.1 built from stand_in/libcuda.cpp."""
    folder = tmp_path_factory.mktemp("stand-in")
    flags = ["-std=c++20", "-shared", "-fPIC", f"-I{HERE.parent / 'csrc'}", "-Wl,-soname,libcuda.so.1"]
    subprocess.run(
        ["g++", *flags, str(HERE / "stand_in" / "libcuda.cpp"), "-o", str(folder / "libcuda.so.1")], check=True
    )
    return folder


@pytest.fixture
def start(stand_in: Path, tmp_path: Path) -> Start:
    """Runs a program in a process of its own that finds the stand-in; `show(value)` there is what comes back."""

    def run(program: str, *, libcuda: Path = stand_in, gpus: str = ADA, **settings: str) -> Outcome:
        log = tmp_path / "calls.jsonl"
        log.unlink(missing_ok=True)
        environment = os.environ | {
            "LD_LIBRARY_PATH": str(libcuda),
            "LBG_STAND_IN_LOG": str(log),
            "LBG_STAND_IN_GPUS": gpus,
            **{f"LBG_STAND_IN_{name}": value for name, value in settings.items()},
        }
        done = subprocess.run(
            [sys.executable, "-c", PRELUDE + program], capture_output=True, text=True, env=environment, cwd=HERE.parent
        )
        assert done.returncode == 0, f"{program}\n{done.stdout}{done.stderr}"
        calls = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        return Outcome(json.loads(done.stdout.splitlines()[-1]) if done.stdout else None, calls)

    return run


# ---- a launch


EVERY_KERNEL = """
texts = []
for device, arch in enumerate((89, 90)):
    for config in lbg.configs():
        if config.arch == arch:
            with lbg.override(config.symbol):
                kinds = dict(x=config.x, weight=config.weight, out=config.out, fp16_accumulate=config.fp16_accumulate)
                strides = (3, 700, 5, 900, 2, 4, 7, 1100)
                if config.row_major:
                    strides = (4160, 1, 4112, 1, 1, 1, 352, 1) if config.aligned else (4163, 1, 4117, 1, 1, 1, 355, 1)
                sizes = (300, 336, 4096) if config.aligned else (301, 333, 4099)
                texts.append(launch(*sizes, strides=strides, device=device, stream=0x99, **kinds))
show(texts)
"""


def test_every_launch_is_right(start: Start) -> None:
    outcome = start(EVERY_KERNEL, gpus=f"{ADA},{HOPPER}")
    shipped = sorted(lbg.configs(), key=lambda config: config.arch)  # stable: the order of the program's launches
    launches = outcome.of("cuLaunchKernelEx")
    assert outcome.printed == [""] * len(shipped) == [""] * len(launches)
    pointers = [0x10000, 0x20000, 0x30000, 0x40000, 0x50000]
    for config, call in zip(shipped, launches):
        m, n, k = (300, 336, 4096) if config.aligned else (301, 333, 4099)
        strides = [3, 700, 5, 900, 2, 4, 7, 1100]
        if config.row_major:
            strides = [4160, 4112, 352] if config.aligned else [4163, 4117, 355]
        rows, columns = -(-m // config.tile_m), -(-n // config.tile_n)
        grid = rows * columns
        if config.persistent:
            at_once = config.ctas_per_sm * 132 // config.cluster
            grid = min(grid * config.pieces, at_once)
        grid *= config.cluster
        assert call["symbol"] == config.symbol and call["context"] == (config.arch == 90), config
        assert (call["grid"], call["block"]) == ([grid, 1, 1], [config.warps * 32, 1, 1]), config
        assert (call["shared_bytes"], call["stream"]) == (config.shared_bytes, 0x99), config
        assert call["early"] == begins_early(config, m, n, k, 132), config
        assert call["cluster"] == [config.cluster, 1, 1], config
        if config.tma:
            x, weight, scale, shift, out = pointers
            maps = [
                [x, m, k, 4160, 1],
                [weight, n, k, 4112, 1] * (2 if config.pieces > 1 else 1),
                [out, m, n, 352, 1] if config.persistent and config.out_aligned else [out],
            ]
            asks_l2 = [] if config.persistent else [weight, 4112]
            wanted = [*maps[0], *maps[1], scale, shift, *maps[2], m, n, k, 352, *asks_l2, 0, 0]
        else:
            wanted = [*pointers, m, n, k, *strides, 0, 0]
        assert call["params"] == wanted, config


def begins_early(config: lbg.Config, m: int, n: int, k: int, sm_count: int) -> bool:
    """Whether a launch may overlap what the stream ran before: only kernels that wait for that by themselves, and not
    tiles of 64 rows that share the weight among so many CTAs for so long that L2 is what bounds them."""
    tiles = -(-m // config.tile_m) * -(-n // config.tile_n)
    shares_l2 = not config.persistent and config.tile_m <= 64 and m > 2 * config.tile_m and 2 * tiles > sm_count
    return config.tma and (k <= 1024 or not shares_l2)


@pytest.mark.parametrize(("version", "early"), [("12020", 0), ("12030", 1)])
def test_a_launch_is_early_where_graphs_keep_it_so(start: Start, version: str, early: int) -> None:
    outcome = start("show([launch(m, 4096, 4096) for m in (16, 256, 4096)])", gpus=HOPPER, VERSION=version)
    assert outcome.printed == [""] * 3
    few, shared, many = outcome.of("cuLaunchKernelEx")
    assert "_64x128x64_" in shared["symbol"]  # 128 CTAs, four to a weight row
    assert [few["early"], shared["early"], many["early"]] == [early, 0, early]


def test_a_kernel_that_does_not_wait_by_itself_is_never_early(start: Start) -> None:
    outcome = start("show([launch(m, 4096, 4096) for m in (1, 16, 4096)] + [launch(8, 64, 65)])")
    assert outcome.printed == [""] * 4 and [call["early"] for call in outcome.of("cuLaunchKernelEx")] == [0] * 4


def test_tensor_maps_are_those_that_triton_makes(start: Start) -> None:
    outcome = start("""
texts = []
for c in lbg.configs():
    if c.persistent and c.out_aligned and (c.tile_m, c.tile_n) == (128, 256):
        with lbg.override(c.symbol):
            texts.append(launch(16384, 4096, 4096, x=c.x, weight=c.weight, out=c.out))
show(texts)""", gpus=HOPPER)  # fmt: skip
    maps, launches = outcome.of("cuTensorMapEncodeTiled"), outcome.of("cuLaunchKernelEx")
    assert outcome.printed == [""] * 8 and [call["grid"] for call in launches] == [[132, 1, 1]] * 8
    for dtype in (6, 7, 9):  # CUtensorMapDataType: float16, float32, bfloat16
        bytes, wide = (4, 32) if dtype == 7 else (2, 64)  # of an element; of 128 bytes, the widest swizzle
        wanted = {
            0x10000: ([4096, 16384], [4096 * bytes], {128}),
            0x20000: ([4096, 4096], [8192], {256, 64}),  # a tile's, and of a quarter of one
            0x50000: ([4096, 16384], [4096 * bytes], {64}),  # of half of a tile's rows
        }
        for data, (sizes, strides, rows) in wanted.items():
            if (dtype, data) == (7, 0x20000):
                continue
            made = [call for call in maps if (call["dtype"], call["data"]) == (dtype, data)]
            assert {tuple(call["box"]) for call in made} == {(wide, most) for most in rows}, made
            for call in made:
                assert (call["sizes"], call["strides"]) == (sizes, strides), call
                # no interleave, 128-byte swizzle, 128-byte L2 promotion, zeros past the edges
                assert call["element_strides"] == [1, 1] and call["modes"] == [0, 3, 2, 0], call


def test_a_box_has_few_rows_more_than_a_small_x(start: Start) -> None:
    sizes = {1: 1, 2: 2, 3: 4, 4: 4, 5: 8, 8: 8, 9: 16, 16: 16, 17: 24, 33: 40, 57: 64, 64: 64, 65: 64}
    outcome = start(f"""
symbol = next(c.symbol for c in lbg.configs() if c.symbol.endswith("_ring") and c.tile_m == 64)
with lbg.override(symbol):
    show([launch(m, 512, 128) for m in {list(sizes)}])""", gpus=HOPPER)  # fmt: skip
    assert outcome.printed == [""] * len(sizes)
    maps = [call for call in outcome.of("cuTensorMapEncodeTiled") if call["data"] == 0x10000]
    assert [(call["sizes"], call["box"][1]) for call in maps] == [([128, m], rows) for m, rows in sizes.items()]


def test_a_launch_has_a_cta_for_each_piece_or_fills_the_gpu(start: Start) -> None:
    outcome = start("""
texts = []
for kernel, symbol in ((kernel, next(c.symbol for c in lbg.configs() if c.symbol.endswith(kernel)))
                       for kernel in ("_128x256x64_w12_s4_ws", "_128x128x64_w12_s6_pp", "_256x256x64_w12_s4_c2_ws")):
    with lbg.override(symbol):
        texts += [launch(128 * rows, 256, 64) for rows in (1, 33, 34, 66, 67, 198)]
show(texts)""", gpus=HOPPER)  # fmt: skip
    assert outcome.printed == [""] * 18
    grids = [call["grid"][0] for call in outcome.of("cuLaunchKernelEx")]
    assert grids[:6] == [4, 132, 132, 132, 132, 132]  # an SM for a quarter of a tile, where there are as many
    assert grids[6:12] == [2, 66, 68, 132, 132, 132]  # tiles of half the size, none of them cut
    assert grids[12:] == [8, 132, 132, 132, 132, 132]  # two SMs for a quarter of a tile of twice the size


def test_a_tensor_map_is_made_once_a_thread_and_anew_for_what_differs(start: Start) -> None:
    outcome = start("""
import threading
def one(*sizes):  # of one kernel
    with lbg.override(symbol): return launch(*sizes)
symbol = next(c.symbol for c in lbg.configs() if c.persistent and (c.x, c.out) == ("float16", "float16"))
calls = [lambda: one(16384, 4096, 4096), lambda: one(16384, 4096, 4096), lambda: one(16384, 4096, 2048),
         lambda: one(8192, 4096, 4096), lambda: launch(16384, 4096, 4096, out="float32")]
texts = [call() for call in calls]
thread = threading.Thread(target=lambda: texts.append(calls[0]()))
thread.start(); thread.join()
show(texts)""", gpus=HOPPER)  # fmt: skip
    assert outcome.printed == [""] * 6
    counts, seen = [], 0
    for call in outcome.calls:
        if call["call"] == "cuTensorMapEncodeTiled":
            seen += 1
        elif call["call"] == "cuLaunchKernelEx":
            counts.append(seen)
            seen = 0
    # all, weight for two boxes; none; x and weight of another K; x and the result of other rows; the result's dtype
    # and, as its place in the table may have been taken, whatever else; all of another thread
    assert counts[:3] == [4, 0, 3] and counts[3] >= 2 and counts[4] >= 1 and counts[5] == 4, counts


NO_MAP = {
    "K is 0": {"k": 0},
    "rows overlap": {"strides": (0, 1, 64, 1, 1, 1, 512, 1)},
    "a long stride": {"strides": (2**38, 1, 64, 1, 1, 1, 512, 1)},
}


def test_what_no_tensor_map_holds_takes_another_kernel(start: Start) -> None:
    outcome = start(
        f"""
sizes = dict(m=512, n=512, k=64, strides=(64, 1, 64, 1, 1, 1, 512, 1))
symbol = next(c.symbol for c in lbg.configs() if c.persistent)
with lbg.override(symbol):
    texts = [launch(**sizes)] + [launch(**(sizes | change)) for change in {NO_MAP!r}.values()]
show([*texts, *(launch(**(sizes | change)) for change in {NO_MAP!r}.values())])""",
        gpus=HOPPER,
    )
    assert outcome.printed[0] == "" and outcome.printed[-len(NO_MAP) :] == [""] * len(NO_MAP)
    assert all("cannot run" in text for text in outcome.printed[1 : 1 + len(NO_MAP)]), outcome.printed
    assert [call["symbol"].endswith("_ws") for call in outcome.of("cuLaunchKernelEx")] == [True] + [False] * len(NO_MAP)


def test_the_map_of_a_single_row_has_a_stride_that_maps_can_hold(start: Start) -> None:
    outcome = start("""
symbol = next(c.symbol for c in lbg.configs() if c.persistent)
with lbg.override(symbol):
    show([launch(1, 512, 72)])""", gpus=HOPPER)  # fmt: skip
    assert outcome.printed == [""]
    assert [call["strides"] for call in outcome.of("cuTensorMapEncodeTiled")] == [[144], [144], [144], [1024]]


def test_strides_of_single_elements_are_normalised(start: Start) -> None:
    outcome = start("""
show([launch(1, 64, 128, strides=(7, 1, 128, 1, 1, 1, 13, 1)),
      launch(1, 1, 128, strides=(7, 1, 9, 1, 3, 5, 13, 11)),
      launch(5, 7, 1, strides=(1, 17, 1, 19, 1, 1, 7, 1))])""")
    row, single, thin = outcome.of("cuLaunchKernelEx")
    assert outcome.printed == ["", "", ""]
    assert not row["symbol"].endswith(("_any", "_anyrows")) and row["params"][5:-2] == [1, 64, 128, 0, 128, 0], row
    assert single["params"][5:-2] == [1, 1, 128, 0, 0, 0], single
    assert thin["symbol"].endswith("_anyrows") and thin["params"][5:-2] == [5, 7, 1, 1, 1, 7], thin


UNALIGNED = {
    **{f"pointer {i}": {"addresses": tuple(0x10000 * (j + 1) + 8 * (i == j) for j in range(5))} for i in range(5)},
    "K": {"k": 68, "strides": (72, 1, 72, 1, 1, 1, 64, 1)},
    "N": {"n": 68, "strides": (64, 1, 64, 1, 1, 1, 72, 1)},
    **{
        f"stride {i}": {"strides": (64, 1, 64, 1, 1, 1, 64, 1)[:i] + (value,) + (64, 1, 64, 1, 1, 1, 64, 1)[i + 1 :]}
        for i, value in enumerate((68, 2, 68, 2, 2, 2, 68, 2))
    },
    "K of 2^26": {"k": 2**26 + 4, "strides": (2**26 + 4, 1, 2**26 + 4, 1, 1, 1, 64, 1)},
    "M needs 64 bits": {"m": 2**31},
}


RESULT_ALONE = {"pointer 4", "N", "stride 6"}  # what spoils the result's alignment and no load's
ROWS_ALONE = {*(f"pointer {i}" for i in range(4)), "K", "stride 0", "stride 2"}  # what leaves rows as they are


def test_what_is_not_aligned_takes_a_kernel_that_does_not_rely_on_it(start: Start) -> None:
    outcome = start(
        f"changes = {UNALIGNED!r}\nshow([launch(64, 64, 64)] + "
        "[launch(c.pop('m', 64), c.pop('n', 64), c.pop('k', 64), **c) for c in changes.values()])"
    )
    plain, *rest = outcome.of("cuLaunchKernelEx")
    assert outcome.printed == [""] * (1 + len(UNALIGNED))
    assert not plain["symbol"].endswith(("_any", "_anyout", "_anyrows")), plain
    for what, call in zip(UNALIGNED, rest, strict=True):
        wanted = "_anyout" if what in RESULT_ALONE else "_anyrows" if what in ROWS_ALONE else "_any"
        assert call["symbol"].endswith(wanted), f"{what}: {call}"
    assert rest[-1]["params"][5] == 2**31 and rest[-1]["grid"] == [2**31 // 64, 1, 1], rest[-1]


def test_an_empty_result_launches_nothing(start: Start) -> None:
    outcome = start("show([launch(0, 8, 8), launch(8, 0, 8)])")
    assert outcome.printed == ["", ""] and outcome.calls == []


def test_importing_calls_no_driver(start: Start) -> None:
    assert start("show(len(lbg.configs()) > 0)") == Outcome(True, [])


# ---- loading


def test_a_second_call_loads_nothing(start: Start) -> None:
    outcome = start("show([launch(64, 64, 64), launch(64, 64, 64)])")
    first = outcome.names.index("cuLaunchKernelEx") + 2  # after the context is popped
    assert outcome.printed == ["", ""] and outcome.names[first:] == AFTER_LOAD


@pytest.mark.parametrize("gpu", [ADA, HOPPER])
def test_warmup_loads_the_kernels_of_its_arch_only(start: Start, gpu: str) -> None:
    outcome = start("before = lbg.warmup(0); show([before, lbg.warmup('cuda:0'), launch(64, 64, 64)])", gpus=gpu)
    arch = int(gpu.split(":")[1])
    symbols = [config.symbol for config in lbg.configs() if config.arch == arch]
    assert outcome.printed == [len(symbols), len(symbols), ""]
    assert {call["arch"] for call in outcome.of("cuLibraryLoadData")} == {arch}
    assert [call["symbol"] for call in outcome.of("cuLibraryGetKernel")] == symbols


def test_shared_memory_over_48_kb_is_opted_in_to(start: Start) -> None:
    outcome = start("show(lbg.warmup(0))", gpus=HOPPER)
    wanted = [(c.symbol, 8, c.shared_bytes, 0) for c in lbg.configs() if c.arch == 90 and c.shared_bytes > 48 * 1024]
    found = [tuple(call[key] for key in ("symbol", "attribute", "value", "device")) for call in
             outcome.of("cuKernelSetAttribute")]  # fmt: skip
    assert found == wanted and wanted  # the stand-in refuses a launch that comes before


def test_a_gpu_with_less_shared_memory_is_told_so(start: Start) -> None:
    outcome = start("show(launch(16384, 4096, 4096))", gpus=HOPPER, OPTIN="65536")
    assert "bytes of shared memory a block and NVIDIA H100 80GB HBM3 allows 65536" in outcome.printed
    assert not outcome.of("cuLaunchKernelEx")


def test_a_second_device_is_readied_apart_and_loads_nothing_again(start: Start) -> None:
    outcome = start("show([launch(16384, 4096, 4096, device=d) for d in (0, 1, 0)])", gpus=f"{HOPPER},{HOPPER}")
    assert outcome.printed == ["", "", ""] and len(outcome.of("cuLibraryLoadData")) == 1
    assert [call["device"] for call in outcome.of("cuKernelSetAttribute")] == [0, 1]
    assert [call["device"] for call in outcome.of("cuDevicePrimaryCtxRetain")] == [0, 1]
    assert [call["context"] for call in outcome.of("cuLaunchKernelEx")] == [0, 1, 0]


def test_loading_is_allowed_under_capture_and_the_mode_restored(start: Start) -> None:
    outcome = start("show([launch(64, 64, 64), launch(64, 64, 64)])")
    modes = [(call["from"], call["to"]) for call in outcome.of("cuThreadExchangeStreamCaptureMode")]
    assert outcome.printed == ["", ""] and modes == [(0, 2), (2, 0)]
    around = [n for n in outcome.names if n in ("cuThreadExchangeStreamCaptureMode", "cuLibraryLoadData")]
    assert around[1] == "cuLibraryLoadData"


def test_eight_racing_threads_load_each_kernel_once(start: Start) -> None:
    outcome = start("""
texts, barrier = [], threading.Barrier(8)
def race():
    barrier.wait()
    for out in ("float16", "float32"):
        texts.append(launch(64, 64, 64, out=out))
threads = [threading.Thread(target=race) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
show(texts)""")
    assert outcome.printed == [""] * 16 and len(outcome.of("cuLaunchKernelEx")) == 16
    assert len({call["thread"] for call in outcome.of("cuLaunchKernelEx")}) == 8
    loaded = [call["symbol"] for call in outcome.of("cuLibraryGetKernel")]
    assert len(loaded) == len(set(loaded)) == len(outcome.of("cuLibraryLoadData")) == 2
    assert len(outcome.of("cuInit")) == len(outcome.of("cuDevicePrimaryCtxRetain")) == 1


# ---- contexts

WITH_CONTEXT = """
cuda = ctypes.CDLL("libcuda.so.1")
context = ctypes.c_void_p()
cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), {device})
cuda.cuCtxPushCurrent_v2(context)
show([launch(64, 64, 64), launch(64, 64, 64)])
"""


def test_a_thread_without_a_context_gets_the_primary_one(start: Start) -> None:
    outcome = start("show([launch(64, 64, 64), launch(64, 64, 64)])")
    assert [call["context"] for call in outcome.of("cuCtxGetCurrent")] == [-1, -1]
    assert [call["context"] for call in outcome.of("cuLaunchKernelEx")] == [0, 0]


def test_a_current_primary_context_is_left_alone(start: Start) -> None:
    outcome = start(WITH_CONTEXT.format(device=0))
    assert outcome.printed == ["", ""]
    assert len(outcome.of("cuCtxPushCurrent_v2")) == 1 and not outcome.of("cuCtxPopCurrent_v2")  # the program's own


def test_another_devices_context_is_put_back(start: Start) -> None:
    outcome = start(WITH_CONTEXT.format(device=1), gpus=f"{ADA},{ADA}")
    assert outcome.printed == ["", ""] and [call["context"] for call in outcome.of("cuLaunchKernelEx")] == [0, 0]
    assert [call["context"] for call in outcome.of("cuCtxGetCurrent")] == [1, 1]


# ---- failures

FAILING = {
    "cuInit": "cuInit",
    "cuDeviceGetCount": "cuDeviceGetCount",
    "cuDeviceGet": "cuDeviceGet",
    "cuDeviceGetName": "cuDeviceGetName",
    "cuDeviceGetAttribute": "cuDeviceGetAttribute",
    "cuDevicePrimaryCtxRetain": "cuDevicePrimaryCtxRetain",
    "cuCtxGetCurrent": "cuCtxGetCurrent",
    "cuCtxPushCurrent_v2": "cuCtxPushCurrent",
    "cuThreadExchangeStreamCaptureMode": "cuThreadExchangeStreamCaptureMode",
    "cuLibraryLoadData": "cuLibraryLoadData",
    "cuLibraryGetKernel": "cuLibraryGetKernel",
    "cuKernelSetAttribute": "cuKernelSetAttribute",
    "cuTensorMapEncodeTiled": "cuTensorMapEncodeTiled",
    "cuLaunchKernelEx": "cuLaunchKernelEx",
}
FAIL_THEN_SUCCEED = """
texts = []
for function in {functions!r}:
    os.environ["LBG_STAND_IN_FAIL"] = function + ":700"
    texts.append(launch(16384, 4096, 4096))
del os.environ["LBG_STAND_IN_FAIL"]
show(texts + [launch(16384, 4096, 4096)])
"""


def test_each_failing_function_is_named_and_forgotten(start: Start) -> None:
    # in the order of a first launch, so that each is reached only because the failure before it was not kept
    outcome = start(FAIL_THEN_SUCCEED.format(functions=list(FAILING)), gpus=HOPPER)
    *texts, last = outcome.printed
    for (function, told), text in zip(FAILING.items(), texts, strict=True):
        wanted = f"{told} failed: CUDA_ERROR_ILLEGAL_ADDRESS (700): an illegal memory access was encountered"
        assert text.endswith(wanted), f"{function}: {text}"
    assert last == "" and [call["result"] for call in outcome.of("cuLaunchKernelEx")] == [700, 0]
    assert outcome.of("cuThreadExchangeStreamCaptureMode")[-1]["to"] == 0
    assert len(outcome.of("cuCtxPushCurrent_v2")) == len(outcome.of("cuCtxPopCurrent_v2")) + 1  # the failed one


@pytest.mark.parametrize("function", ["cuLibraryLoadData", "cuLaunchKernelEx"])
def test_a_failed_launch_tells_kernel_and_sizes(start: Start, function: str) -> None:
    text = start("show(launch(96, 160, 4096, x='float32'))", FAIL=f"{function}:2").printed
    assert text.startswith("kernel lbg_fused_f32asf16_f16_") and function in text, text
    assert "(M=96, N=160, K=4096, x float32, weight float16, result float16)" in text, text
    assert "CUDA_ERROR_OUT_OF_MEMORY (2): out of memory" in text, text


def test_warmup_raises_with_the_kernel(start: Start) -> None:
    outcome = start("""
try: lbg.warmup(0)
except RuntimeError as error: show(str(error))""", FAIL="cuLibraryLoadData:209")  # fmt: skip
    first = next(config.symbol for config in lbg.configs() if config.arch == 89)
    assert outcome.printed.startswith(f"lbg: kernel {first}: cuLibraryLoadData failed: CUDA_ERROR_NO_BINARY_FOR_GPU")


def test_an_error_that_the_driver_cannot_name_keeps_its_number(start: Start) -> None:
    outcome = start("show(launch(64, 64, 64))", FAIL="cuLaunchKernelEx:12345")
    assert outcome.printed.endswith("cuLaunchKernelEx failed: unknown CUresult (12345): no description")


def test_a_driver_that_does_not_open_is_told(start: Start, tmp_path: Path) -> None:
    tmp_path.joinpath("libcuda.so.1").touch()
    text = start("show(launch(64, 64, 64))", libcuda=tmp_path).printed
    assert text.startswith("no NVIDIA driver found: ") and "libcuda.so.1" in text and "CUDA 12.0 or newer" in text, text


def test_a_driver_that_is_too_old_is_told(start: Start) -> None:
    text = start("show(launch(64, 64, 64))", VERSION="11080").printed
    assert text == "the NVIDIA driver is for CUDA 11.8; lbg needs an NVIDIA driver for CUDA 12.0 or newer (525+)"


def test_a_driver_that_does_not_tell_its_version(start: Start) -> None:
    text = start("show(launch(64, 64, 64))", FAIL="cuDriverGetVersion:3").printed
    assert "cuDriverGetVersion" in text and "(3)" in text and "CUDA 12.0 or newer" in text, text


@pytest.mark.parametrize(("gpu", "told"), [("NVIDIA A10:86:72", "8.6"), ("NVIDIA GeForce RTX 5090:120:170", "12.0")])
def test_a_gpu_that_is_not_shipped_for_is_named(start: Start, gpu: str, told: str) -> None:
    outcome = start("show([launch(64, 64, 64), *lbg._C.warmup(0), lbg._C.gpu(0)[0]])", gpus=gpu)
    name, wanted = gpu.split(":")[0], "this build of lbg ships kernels for sm_89, sm_90 only"
    text, warmup, _, described = outcome.printed
    assert text == warmup == described == f"cuda:0 is a {name} (compute capability {told}); {wanted}"
    assert not outcome.of("cuLibraryLoadData") and not outcome.of("cuDevicePrimaryCtxRetain")


@pytest.mark.parametrize("device", [-1, 1, 99])
def test_a_device_that_is_not_there_is_told(start: Start, device: int) -> None:
    text = start(f"show(launch(64, 64, 64, device={device}))").printed
    assert text == f"there is no cuda:{device}; the driver shows 1 GPU(s)"


def test_gpu_tells_name_arch_and_sm_count(start: Start) -> None:
    outcome = start("show([lbg._C.gpu(0), lbg._C.gpu(1)])", gpus=f"{ADA},{HOPPER}")
    assert outcome.printed == [["", "NVIDIA GeForce RTX 4090", 89, 128, 0], ["", "NVIDIA H100 80GB HBM3", 90, 132, 0]]


FULL_RATE = {
    "NVIDIA L40S:89:142": True,
    "NVIDIA L4:89:58": True,
    "NVIDIA RTX 6000 Ada Generation:89:142": True,
    "NVIDIA GeForce RTX 4090 Laptop GPU:89:76": False,
    ADA: False,
    HOPPER: False,
}


@pytest.mark.parametrize(("gpu", "full_rate"), FULL_RATE.items())
def test_dispatch_knows_a_gpu_of_full_rate(start: Start, gpu: str, full_rate: bool) -> None:
    """And launches what explain() says of such a GPU."""
    sizes = [(1, 4096, 4096), (300, 4096, 4096), (4096, 4096, 4096), (16384, 4096, 4096)]
    outcome = start(f"show([lbg._C.gpu(0)[4], [launch(*s, x='float32', out='float32') for s in {sizes}]])", gpus=gpu)
    assert outcome.printed == [full_rate, [""] * len(sizes)]
    name, arch, sm_count = gpu.split(":")
    assert is_full_rate(int(arch), name) == full_rate  # by which measured constants are taken for one kind or the other
    for (m, n, k), call in zip(sizes, outcome.of("cuLaunchKernelEx")):
        x, weight = torch.empty(m, k, device="meta"), torch.empty(n, k, dtype=torch.float16, device="meta")
        found = lbg.explain(x, weight, arch=int(arch), sm_count=int(sm_count), full_rate=full_rate)
        assert found.chosen and found.chosen.symbol == call["symbol"], found
        assert ("of full rate" in found.why) == full_rate, found


def test_an_override_that_cannot_run_is_told(start: Start) -> None:
    outcome = start("""
symbol = next(config.symbol for config in lbg.configs() if config.aligned)
with lbg.override(symbol):
    texts = [launch(64, 64, 65), launch(64, 64, 64, weight="bfloat16", x="bfloat16", out="bfloat16")]
show([symbol, *texts, launch(64, 64, 65)])""")
    symbol, odd_k, other_dtype, after = outcome.printed
    wanted = f"the overriding kernel {symbol} cannot run, so nothing runs M=64, N=64, K="
    assert odd_k.startswith(f"{wanted}65, x float16") and odd_k.endswith("on sm_89"), odd_k
    assert other_dtype.startswith(f"{wanted}64, x bfloat16") and after == ""


def test_override_refuses_an_unknown_kernel() -> None:
    with (
        pytest.raises(ValueError, match=r"no kernel named 'nothing' is shipped; lbg.configs\(\) lists"),
        lbg.override("nothing"),
    ):
        pass
    assert lbg._C.get_override() == ""


# ---- dispatch


@pytest.mark.parametrize(("x", "weight", "out", "fp16_accumulate"), CLASSES)
def test_dispatch_takes_the_lowest_predicted_legal_kernel(
    x: torch.dtype, weight: torch.dtype, out: torch.dtype, fp16_accumulate: bool
) -> None:
    sizes = [(m, n, k) for m, n, k in shapes() if m and n] + [(16384, 4096, 4096), (2**33, 64, 64), (16, 2**31, 32)]
    for arch in (89, 90):
        for sm_count in (20, 58, 100, 128, 200):
            for m, n, k in sizes:
                tensors = torch.empty(m, k, dtype=x, device="meta"), torch.empty(n, k, dtype=weight, device="meta")
                found = lbg.explain(
                    *tensors, out_dtype=out, fp16_accumulate=fp16_accumulate, arch=arch, sm_count=sm_count
                )
                legal = [c for c in found.candidates if c.why_not is None]
                assert found.chosen and legal and legal[0].config is found.chosen, f"{(m, n, k)}: {found}"
                among = [c for c in legal if c.config.row_major] or legal
                among = [c for c in among if c.config.aligned] or among
                among = [c for c in among if c.config.out_aligned] or among
                assert legal[0].predicted_us == min(c.predicted_us for c in among if c.predicted_us), found
                aligned = all(rows.shape[0] == 1 or k * rows.element_size() % 16 == 0 for rows in tensors)
                aligned &= k > 0 and (arch == 90 or k % 8 == 0)  # a tensor map ends anywhere
                assert found.chosen.aligned == (aligned and max(m, n) < 2**31 - 256), found
                assert found.chosen.row_major == (max(m, n) < 2**31 - 256), found
                assert n % 8 == 0 or not found.chosen.out_aligned, found


# arch and SM count of an RTX 4050, an RTX 4070 Ti SUPER with some SMs more, 4090, an H100 PCIe and SXM, and of some
# that are not made; of an L4 and an L40S, which are of full rate.
SM_COUNTS = [(89, 20), (89, 58), (89, 72), (89, 128), (89, 142), (89, 200), (90, 114), (90, 132), (90, 200)]
FULL_RATE_SM_COUNTS = [(89, 58), (89, 142)]
MODES = [(torch.float16, False), (torch.float32, False), (torch.float16, True)]


@cache
def chosen_for(
    m: int, n: int, k: int, arch: int, sm_count: int, mode: tuple[torch.dtype, bool], full_rate: bool = False
) -> lbg.Explanation:
    x, weight = (torch.empty(rows, k, dtype=dtype, device="meta") for rows, dtype in ((m, mode[0]), (n, torch.float16)))
    return lbg.explain(x, weight, fp16_accumulate=mode[1], arch=arch, sm_count=sm_count, full_rate=full_rate)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize(
    ("arch", "sm_count", "full_rate"),
    [(*each, False) for each in SM_COUNTS] + [(*each, True) for each in FULL_RATE_SM_COUNTS],
)
def test_dispatch_fits_the_tile_to_m(arch: int, sm_count: int, full_rate: bool, mode: tuple[torch.dtype, bool]) -> None:
    for n, k in ((4096, 4096), (11008, 4096), (4096, 1024), (1024, 8192)):
        for m, least, most in ((1, 16, 64), (16, 16, 64), (64, 16, 64), (4096, 64, 256), (16384, 64, 256)):
            found = chosen_for(m, n, k, arch, sm_count, mode, full_rate)
            assert found.chosen and found.chosen.aligned and least <= found.chosen.tile_m <= most, found
            assert m < 4096 or found.chosen.tile_n >= 64, found
    if sm_count in (128, 132) and not mode[1]:  # the GPUs that the tiles were chosen for
        chosen = chosen_for(16384, 4096, 4096, arch, sm_count, mode).chosen
        assert chosen and chosen.tile_m == 128, chosen


def test_a_gpu_of_full_rate_accumulates_in_float32(start: Start) -> None:
    forced = next(c.symbol for c in lbg.configs() if c.fp16_accumulate and c.aligned and c.x == c.out == "float16")
    program = f"""
texts = [launch(64, 64, 64, fp16_accumulate=True)]
with lbg.override({forced!r}):
    texts.append(launch(64, 64, 64, fp16_accumulate=True))
show(texts)"""
    for gpu, full_rate in FULL_RATE.items():
        if gpu != HOPPER:
            outcome = start(program, gpus=gpu)
            free, overridden = (call["symbol"] for call in outcome.of("cuLaunchKernelEx"))
            assert outcome.printed == ["", ""] and ("_acc16_" in free) != full_rate and overridden == forced, gpu
    x = torch.empty(64, 64, dtype=torch.float16, device="meta")
    chosen = lbg.explain(x, x, fp16_accumulate=True, arch=89, sm_count=142, full_rate=True).chosen
    assert chosen and not chosen.fp16_accumulate
    with lbg.override(forced):
        chosen = lbg.explain(x, x, fp16_accumulate=True, arch=89, sm_count=142, full_rate=True).chosen
        assert chosen and chosen.symbol == forced


def test_what_measures_asks_a_gpu_of_full_rate_for_fp16_accumulate() -> None:
    x = torch.empty(64, 64, dtype=torch.float16, device="meta")
    case, arguments = cases.Case(64, 64, 64, fp16_accumulate=True), cases.Arguments(x, x, x[0].float(), x[0].float())
    for full_rate in (False, True):
        ask = partial(lbg.explain, arch=89, sm_count=142, full_rate=full_rate)
        found = fit.explain(case, arguments, ask)
        assert found.candidates and all(c.config.fp16_accumulate and not c.why_not for c in found.candidates), found
        kernels = {config.symbol: config for config in lbg.configs() if config.arch == 89}
        assert any(kind[-1] for kind in fit.own_classes(kernels, full_rate)) != full_rate
    assert lbg._C.get_override() == ""


def test_a_gpu_of_full_rate_takes_large_tiles() -> None:
    """There L2 bounds a large product, where a GeForce's tensor cores do."""
    for sm_count in (58, 142):
        for sizes in ((4096, 4096, 4096), (16384, 4096, 4096), (8192, 8192, 8192)):
            for mode, least in zip(MODES[:2], (128 * 128, 128 * 256)):
                chosen = chosen_for(*sizes, 89, sm_count, mode, full_rate=True).chosen
                assert chosen and chosen.tile_m * chosen.tile_n >= least, (sm_count, sizes, chosen)


# M and the tiles of those kernels that took less than 3 % more than the best of all, N=K=4096, float16, on an H100.
MEASURED_BEST = {
    1: ["64x32x128_w8_s8_ring"],
    16: ["64x32x128_w8_s8_ring"],
    64: ["64x32x128_w8_s8_ring"],
    256: ["64x128x64_w8_s8_ring"],
    1024: ["128x256x64_w12_s4_ws", "128x128x64_w12_s6_pp"],
    4096: ["128x128x64_w12_s6_pp", "128x256x64_w12_s4_ws"],
    16384: ["128x256x64_w12_s4_ws"],
}


@pytest.mark.parametrize("m", MEASURED_BEST)
def test_dispatch_takes_what_was_measured_best(m: int) -> None:
    chosen = chosen_for(m, 4096, 4096, 90, 132, MODES[0]).chosen
    assert chosen and chosen.symbol.removeprefix("lbg_fused_f16_f16_") in MEASURED_BEST[m], chosen


def test_clusters_are_for_rows_off_32_bytes() -> None:
    for mode in MODES[:2]:
        for m in (1024, 4096, 16384):
            shared = [chosen_for(m, 4096, k, 90, 132, mode).chosen for k in (4088, 4096)]
            assert [config and config.cluster for config in shared] == [2, 1], shared


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("arch", [89, 90])
def test_more_sms_and_less_work_never_take_longer(arch: int, mode: tuple[torch.dtype, bool]) -> None:
    def time_us(m: int, n: int, k: int, sm_count: int) -> float:
        return chosen_for(m, n, k, arch, sm_count, mode).candidates[0].predicted_us or 0.0

    for m, n, k in ((1, 4096, 4096), (64, 4096, 4096), (64, 1024, 16384), (300, 8192, 512), (2000, 4096, 4096),
                    (16384, 1024, 64)):  # fmt: skip
        by_sms = [time_us(m, n, k, sm_count) for sm_count in (20, 58, 72, 128, 142, 200)]
        assert by_sms == sorted(by_sms, reverse=True), f"{(m, n, k)}: {by_sms}"
        for sizes in ([(f * m, n, k) for f in (1, 2, 5)], [(m, f * n, k) for f in (1, 2, 5)],
                      [(m, n, f * k) for f in (1, 2, 5)]):  # fmt: skip
            times = [time_us(*size, 58) for size in sizes]
            assert times == sorted(times), f"{sizes}: {times}"


@pytest.mark.parametrize(("x", "weight", "out", "fp16_accumulate"), CLASSES)
def test_a_predicted_time_is_the_one_that_the_fit_assumes(
    x: torch.dtype, weight: torch.dtype, out: torch.dtype, fp16_accumulate: bool
) -> None:
    for m, n, k in ((1, 64, 16), (5, 4096, 520), (40, 1000, 4096), (1000, 520, 4104), (16384, 4096, 4096),
                    (4096, 4104, 4096), (2000, 1150, 512),
                    (3000, 16384, 64), (129, 8, 16384)):  # fmt: skip
        tensors = torch.empty(m, k, dtype=x, device="meta"), torch.empty(n, k, dtype=weight, device="meta")
        for arch, sm_count in ((89, 20), (90, 132)):
            found = lbg.explain(*tensors, out_dtype=out, fp16_accumulate=fp16_accumulate, arch=arch, sm_count=sm_count)
            for candidate in found.candidates:
                config = candidate.config
                wanted = fit.predicted_us(config, np.array([(m, n, k)]), sm_count, asdict(config))
                assert candidate.why_not or candidate.predicted_us == pytest.approx(wanted[0], rel=1e-4), candidate


def test_the_fit_finds_the_constants_behind_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels whose times are the formula's, with 2 % of noise, under constants that are not the shipped ones."""
    drawn = random.Random(0)
    kernels = {c.symbol: c for c in lbg.configs() if (c.arch, c.x, c.out) == (89, "float16", "float16")
               and c.out_aligned and not c.fp16_accumulate}  # fmt: skip
    hidden = {
        s: {name: getattr(c, name) * drawn.uniform(0.6, 1.6) for name in fit.CONSTANTS}
        | {"dram_bytes_per_us": c.dram_bytes_per_us}  # the GPU's, and known
        for s, c in kernels.items()
    }
    shapes = np.array([*fit.BENCHMARKS, *fit.random_shapes(100, seed=3)])
    times = {s: fit.predicted_us(c, shapes, 128, hidden[s]) for s, c in kernels.items()}
    measured = [fit.Time(*map(int, shape), s, times[s][i] * drawn.uniform(0.98, 1.02), False)
                for i, shape in enumerate(shapes) for s in kernels]  # fmt: skip
    run = fit.Run({}, 128, kernels, measured)
    # Each alone; and then together, which may give some of a time's accuracy for a choice's.
    for steps, most_rms in ((0, 0.03), (fitting.STEPS, 0.08)):
        monkeypatch.setattr("aot.fitting.STEPS", steps)
        fitted = fit.fit_all(run)
        assert set(fitted) == set(kernels) and all(row["rms"] < most_rms for row in fitted.values()), fitted
        off = fit.summary(fit.regrets(run, fit.all_costs(run, fitted)))
        assert off["p95"] < 0.03 and off["worst"] < 0.08, off


def test_a_fit_to_choices_loses_less_than_each_kernel_fitted_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of times that the formula does not have: each kernel takes up to 40 % longer, where K is long."""
    kernels = {c.symbol: c for c in lbg.configs() if (c.arch, c.x, c.out) == (90, "float16", "float16")
               and c.aligned and c.out_aligned}  # fmt: skip
    shapes = np.array([*fit.BENCHMARKS, *fit.random_shapes(150, seed=4)])
    measured = []
    for place, (symbol, config) in enumerate(kernels.items()):
        times = fit.predicted_us(config, shapes, 132, asdict(config))
        times *= 1 + 0.4 * (place % 3) / 2 * (np.log2(shapes[:, 2]) - 6) / 8
        measured += [fit.Time(*map(int, shape), symbol, us, False) for shape, us in zip(shapes, times)]
    run = fit.Run({}, 132, kernels, measured)

    def lost() -> float:
        rows = fit.regrets(run, fit.all_costs(run, fit.fit_all(run)))
        return sum(row["off"] for row in rows)

    together = lost()
    monkeypatch.setattr("aot.fitting.STEPS", 0)
    assert together < 0.7 * lost()
