"""Device time by events and by CUDA-graph replay, and host time by the clock."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

Call = Callable[[], Tensor]
GRAPH_CALLS = 24  # at least, in one graph: the launch of the graph itself, some 5 us, then hardly shows
OWN_GRAPH_CALLS = 10  # of a warm call that replays a graph itself
AHEAD_CYCLES = 3_000_000  # 1 to 2 ms in which the GPU waits and the host queues work: launches then cost no time


@dataclass(frozen=True)
class Subject:
    """What is timed: the same call with each of several weights."""

    calls: Sequence[Call]
    own_graph: bool = False  # it replays a CUDA graph itself, so that it cannot be captured in another


@dataclass(frozen=True)
class Times:
    """Microseconds of one call, one value a repeat."""

    us: list[float]
    warm_us: list[float]


@dataclass(frozen=True)
class _Run:
    """A stretch between two events: what comes before the first, what is timed, how many calls that is."""

    before: Callable[[], object] | None
    timed: Callable[[], object]
    calls: int


def weights_beyond_l2(weight_bytes: int) -> int:
    """How many weights, used in turn, pass through more than three times the L2 of the current device."""
    return max(2, 3 * torch.cuda.get_device_properties().L2_cache_size // weight_bytes + 1)


def by_events(subjects: dict[str, Subject], repeats: int) -> dict[str, Times]:
    """For long calls: each between two events. L2 holds what the call before left there."""
    runs = {(name, "us"): _Run(None, subject.calls[0], 1) for name, subject in subjects.items()}
    return _collect(_interleaved_us(runs, repeats))


def by_graphs(subjects: dict[str, Subject], repeats: int) -> dict[str, Times]:
    """For short calls: a graph of one call for each weight (cold), and one of calls with the same weight (warm).

    A subject with its own graph is called as it is, between events: cold behind a read of three times the L2.
    """
    stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
    beyond_l2 = torch.ones(3 * torch.cuda.get_device_properties().L2_cache_size // 4, device="cuda")
    runs: dict[tuple[str, str], _Run] = {}
    # torch.compile frees cuBLAS's workspaces as it records a graph, on its second call, and torch returns what is free
    # to the driver then. What is captured here may write to them, so it has to have recorded before.
    for subject in subjects.values():
        if subject.own_graph:
            _repeat(subject.calls[0], 3)
    for name, subject in subjects.items():
        if subject.own_graph:
            call = subject.calls[0]
            runs[name, "us"] = _Run(partial(_wait_and_read, beyond_l2), call, 1)
            runs[name, "warm_us"] = _Run(_wait, partial(_repeat, call, OWN_GRAPH_CALLS), OWN_GRAPH_CALLS)
        else:
            rounds = -(-GRAPH_CALLS // len(subject.calls))
            for kind, calls in (("us", list(subject.calls) * rounds), ("warm_us", [subject.calls[0]] * GRAPH_CALLS)):
                runs[name, kind] = _Run(None, _captured(calls, stream, pool).replay, len(calls))
    return _collect(_interleaved_us(runs, repeats))


def _wait() -> None:
    torch.cuda._sleep(AHEAD_CYCLES)


def _wait_and_read(beyond_l2: Tensor) -> None:
    _wait()
    beyond_l2.amax()


def _repeat(call: Call, count: int) -> None:
    for _ in range(count):
        call()


def _captured(calls: Sequence[Call], stream: torch.cuda.Stream, pool: object) -> torch.cuda.CUDAGraph:
    """torch.cuda.graph without its garbage collections, which would take longer than the benchmark."""
    graph = torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()  # cuBLAS allocates a workspace for each stream: before the capture
        graph.capture_begin(pool=pool)
        try:
            for call in calls:
                call()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph


def _interleaved_us(runs: dict[tuple[str, str], _Run], repeats: int) -> dict[tuple[str, str], list[float]]:
    """Microseconds a call, each repeat.

    The runs take turns in an order drawn anew each round: at the power limit the clock depends on what ran before, and
    no one may always follow the hottest.
    """
    order = random.Random(0)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for warming_up in [True, True] + [False] * repeats:
        events = {}
        _wait()
        for key in order.sample(list(runs), len(runs)):
            run = runs[key]
            if run.before:
                run.before()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run.timed()
            end.record()
            events[key] = start, end
        torch.cuda.synchronize()
        if not warming_up:
            for key, (start, end) in events.items():
                times[key].append(1e3 * start.elapsed_time(end) / runs[key].calls)
    return times


def _collect(times: dict[tuple[str, str], list[float]]) -> dict[str, Times]:
    names = dict.fromkeys(name for name, _ in times)
    return {name: Times(times[name, "us"], times.get((name, "warm_us"), [])) for name in names}


def one_call_us(call: Call) -> float:
    """A first look, to choose a method by."""
    times = by_events({"": Subject([call])}, 5)
    return statistics.median(times[""].us)


def copy_gb_per_s(repeats: int = 20) -> float:
    """Of a device-to-device copy of 1 GiB, bytes read plus bytes written."""
    source = torch.randint(2**30, (2**28,), device="cuda", dtype=torch.int32)
    target = torch.empty_like(source)
    times = by_events({"": Subject([lambda: target.copy_(source)])}, repeats)
    return 2 * source.nbytes / statistics.median(times[""].us) / 1e3


def host_us(calls: dict[str, Call], count: int = 300, repeats: int = 21) -> dict[str, float]:
    """Median host microseconds of one call, on shapes small enough that the GPU never makes the host wait."""
    times: dict[str, list[float]] = {label: [] for label in calls}
    for _ in range(repeats):
        for label, call in calls.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(count):
                call()
            times[label].append((time.perf_counter() - start) / count * 1e6)
    return {label: statistics.median(values) for label, values in times.items()}
