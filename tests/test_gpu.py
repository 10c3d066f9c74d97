"""The shipped kernels on a real GPU: every one of them forced in turn, then the operator and the module around them."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lbg
from tests import cases
from tests.bad_calls import BAD_CALLS
from tests.cases import BF16, F16, F32, Case

pytestmark = pytest.mark.gpu

DTYPE = {"float16": F16, "bfloat16": BF16, "float32": F32}


def shipped_here() -> list[lbg.Config]:
    """The kernels for this machine's GPU; none without one."""
    if not torch.cuda.is_available():
        return []
    major, minor = torch.cuda.get_device_capability()
    return [config for config in lbg.configs() if config.arch == major * 10 + minor]


SHIPPED = shipped_here()


@pytest.fixture(autouse=True, scope="module")
def _needs_a_gpu() -> None:
    if not SHIPPED:
        archs = sorted({f"sm_{config.arch}" for config in lbg.configs()})
        pytest.fail(f"-m gpu needs a CUDA GPU that a kernel is shipped for ({', '.join(archs)})")


def of_config(case: Case, config: lbg.Config) -> Case:
    dtypes = (DTYPE[config.x], DTYPE[config.weight], DTYPE[config.out], config.fp16_accumulate)
    return cases.of_class(case, dtypes)


def call(case: Case, arguments: cases.Arguments) -> Tensor:
    """The operator into an `out` full of NaN, so that an element that nobody wrote is seen."""
    out = torch.full((case.m, case.n), torch.nan, dtype=case.out, device="cuda")
    lbg.fused(*arguments, fp16_accumulate=case.fp16_accumulate, out=out)
    return out


def runs(config: lbg.Config, case: Case, arguments: cases.Arguments) -> bool:
    """Whether the kernel takes the case; every generic one takes all."""
    dtypes = DTYPE[config.x], DTYPE[config.weight], DTYPE[config.out]
    if 0 in (case.m, case.n) or dtypes != (case.x, case.weight, case.out):
        return False
    x, weight, *_ = arguments
    with lbg.override(config.symbol):  # without it a GPU of full rate has no kernel for fp16_accumulate
        explanation = lbg.explain(x, weight, out_dtype=case.out, fp16_accumulate=case.fp16_accumulate)
    return any(c.config == config and c.why_not is None for c in explanation.candidates)


def bits(result: torch.Tensor) -> torch.Tensor:
    """As integers, which tell 0 from -0."""
    return result.view({2: torch.int16, 4: torch.int32}[result.element_size()])


# ---- every kernel


@pytest.mark.parametrize("config", SHIPPED, ids=lambda config: config.symbol)
def test_every_kernel_is_right_on_every_case_that_it_takes(config: lbg.Config) -> None:
    taken = 0
    for case in (of_config(case, config) for case in cases.cases()):
        arguments = cases.make(case, "cuda")
        if runs(config, case, arguments):
            with lbg.override(config.symbol):
                cases.check(case, arguments, call(case, arguments))
            taken += 1
    possible = [case for case in cases.cases() if 0 not in (case.m, case.n)]
    if config.row_major:
        possible = [case for case in possible if case.layout not in ("inner-stride", "transposed")]
    assert taken == len(possible) if not config.aligned else taken >= len(cases.ALIGNED), taken


@pytest.mark.parametrize("dtypes", cases.CLASSES, ids=str)
def test_all_kernels_of_a_class_give_the_same_bits(dtypes: tuple[torch.dtype, torch.dtype, torch.dtype, bool]) -> None:
    # Whole tiles and ragged ones; results that start on 16 bytes, and results that do not; and several tiles for each
    # CTA that walks them, of fewer K steps than are on their way at once and of more. On 132 SMs, of tiles of 128x256
    # the last are cut into pieces in the fifth; in the fourth the last columns need half of a tile, for which CTAs
    # without a last tile have the time; in the sixth neither; in the seventh they need half of one, and no CTA has the
    # time; and in the eighth some CTAs have three quarters one after the other, of two K steps each.
    shapes = (
        (300, 192, 4096), (17, 80, 720), (150, 333, 1000), (4000, 1864, 200), (3001, 3000, 712), (4600, 1504, 264),
        (12800, 376, 72), (20000, 312, 72), (70, 333, 4093), (600, 700, 999), (4001, 3003, 203), (300, 1000, 7)
    )  # fmt: skip
    layouts = ("padded-rows", "padded-x", "padded-weight")
    padded = [Case(*shape, layout=layout) for shape in ((150, 336, 1001), (4001, 3000, 203)) for layout in layouts]
    for case in (cases.of_class(case, dtypes) for case in (*(Case(*shape) for shape in shapes), *padded)):
        arguments = cases.make(case, "cuda")
        results = {}
        for config in SHIPPED:
            if runs(config, case, arguments):
                with lbg.override(config.symbol):
                    results[config.symbol] = call(case, arguments)
        first, *others = results
        assert others, f"{case}: only {first} runs"
        cases.check(case, arguments, results[first])
        differing = [symbol for symbol in others if not torch.equal(bits(results[symbol]), bits(results[first]))]
        assert not differing, f"{case}: other bits than {first}: {differing}"


@pytest.mark.parametrize("config", [c for c in SHIPPED if c.row_major], ids=lambda config: config.symbol)
def test_every_fast_kernel_repeats_its_bits_on_a_full_gpu(config: lbg.Config) -> None:
    # A slot of shared memory that is given back too early shows only when every SM is busy, and then rarely: of
    # such a kernel once in some ten calls of this size, and in none of 50 of 4096x2048x4096. Of 15872 rows the last
    # tiles are cut into pieces, on 132 SMs. Rows start off 16 bytes where they may.
    for m in (16384, 15872):
        case = of_config(Case(m, 4096, 1024 if config.aligned else 1023), config)
        arguments, others = cases.make(case, "cuda"), torch.zeros((), dtype=torch.int64, device="cuda")
        with lbg.override(config.symbol):
            first = call(case, arguments)
            for _ in range(50):
                others += (call(case, arguments) != first).any()
        assert others.item() == 0, f"{case}: {others.item()} of 50 repeats differ"


def test_fp16_accumulate_is_float32_accumulation_where_it_gains_nothing() -> None:
    case = Case(100, 256, 2048, out=F32, fp16_accumulate=True)
    arguments = cases.make(case, "cuda")
    wide = call(replace(case, fp16_accumulate=False), arguments)
    chosen = lbg.explain(arguments.x, arguments.weight, out_dtype=F32, fp16_accumulate=True).chosen
    assert chosen and torch.equal(call(case, arguments), wide) is not chosen.fp16_accumulate
    assert chosen.fp16_accumulate == (any(config.fp16_accumulate for config in SHIPPED) and not lbg._C.gpu(0)[4])


@pytest.mark.parametrize("dtypes", cases.CLASSES, ids=str)
def test_repeats_are_bit_identical(dtypes: tuple[torch.dtype, torch.dtype, torch.dtype, bool]) -> None:
    case = cases.of_class(Case(1000, 512, 1024), dtypes)
    arguments = cases.make(case, "cuda")
    first = call(case, arguments)
    assert all(torch.equal(call(case, arguments), first) for _ in range(10)), str(case)


@pytest.mark.parametrize("dtypes", cases.CLASSES, ids=str)
@pytest.mark.parametrize("k", [1024, 1023])
def test_a_rows_bits_do_not_depend_on_the_batch(
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype, bool], k: int
) -> None:
    case = cases.of_class(Case(4097, 384, k), dtypes)
    arguments = cases.make(case, "cuda")
    whole = call(case, arguments)
    for start, rows in ((0, 1), (4096, 1), (7, 16), (1001, 17), (64, 64), (3, 129), (500, 2048)):
        part = replace(arguments, x=arguments.x[start : start + rows])
        alone = call(replace(case, m=rows), part)
        assert torch.equal(alone, whole[start : start + rows]), f"{case}: rows {start} to {start + rows}"


# ---- the operator


@pytest.mark.parametrize("dtypes", cases.CLASSES, ids=str)
def test_the_chosen_kernel_is_right(dtypes: tuple[torch.dtype, torch.dtype, torch.dtype, bool]) -> None:
    for case in (cases.of_class(case, dtypes) for case in cases.cases()):
        arguments = cases.make(case, "cuda")
        result = lbg.fused(*arguments, out_dtype=case.out, fp16_accumulate=case.fp16_accumulate)
        assert result.is_contiguous(), str(case)
        cases.check(case, arguments, result)


@pytest.mark.parametrize("dtypes", cases.CLASSES, ids=str)
def test_a_result_of_any_strides(dtypes: tuple[torch.dtype, torch.dtype, torch.dtype, bool]) -> None:
    for m, n, k in ((300, 192, 256), (5, 192, 256), (70, 77, 264)):
        case = cases.of_class(Case(m, n, k), dtypes)
        arguments = cases.make(case, "cuda")
        wide = torch.empty(m + 2, 2 * n + 9, dtype=case.out, device="cuda")
        tall = torch.empty(n + 2, m + 9, dtype=case.out, device="cuda")
        rows = wide[1:-1]
        for buffer, out in (
            (wide, rows[:, 1 : n + 1]), (wide, rows[:, 8 : n + 8]), (wide, rows[:, : 2 * n : 2]),
            (tall, tall[1:-1, 1 : m + 1].t()),
        ):  # fmt: skip
            buffer.fill_(torch.nan)
            lbg.fused(*arguments, fp16_accumulate=case.fp16_accumulate, out=out)
            cases.check(case, arguments, out)
            assert int(buffer.isnan().sum()) == buffer.numel() - m * n, f"{case}: wrote beside {out.stride()}"


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "shifted"])
@pytest.mark.parametrize("big", ["x", "weight", "out"])
def test_offsets_past_2_to_the_31_elements(big: str, aligned: bool) -> None:
    long, wide, short = 2**31 // 4096 + 300, 4096, 64
    if not aligned:
        wide += 1
    m, n, k = {"x": (long, short, wide), "weight": (short, long, wide), "out": (long, wide, short)}[big]
    case = Case(m, n, k)
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=F16, device="cuda").normal_(generator=generator)

    scale = torch.rand(n, device="cuda") / k**0.5
    arguments = cases.Arguments(draw(m, k), draw(n, k), scale, torch.zeros(n, device="cuda"))
    result = lbg.fused(*arguments)
    rows, columns = (slice(None), slice(n - 64, n)) if big == "weight" else (slice(m - 64, m), slice(None))
    x, weight, scale, shift = arguments
    corner = cases.Arguments(x[rows], weight[columns], scale[columns], shift[columns])
    part = result[rows, columns]
    cases.check(replace(case, m=part.shape[0], n=part.shape[1]), corner, part)


@pytest.mark.parametrize("dtypes", cases.CLASSES, ids=str)
def test_nan_and_infinities(dtypes: tuple[torch.dtype, torch.dtype, torch.dtype, bool]) -> None:
    case = cases.of_class(Case(130, 64, 64), dtypes)
    x, weight, scale, shift = cases.make(case, "cuda")
    shift[:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    x[5, 7] = torch.nan
    weight[9] = weight[9].abs()
    x[6], x[7] = torch.inf, -torch.inf
    result = call(case, cases.Arguments(x, weight, scale.abs(), shift))
    plain = [row for row in range(130) if row not in (5, 6, 7)]
    assert result[plain, 0].isnan().all() and (result[plain, 1] == torch.inf).all() and (result[plain, 2] == 0).all()
    assert result[5].isnan().all() and result[6, 9] == torch.inf and result[7, 9] == 0
    finite = result[plain][:, 3:]
    assert finite.isfinite().all() and not finite.signbit().any(), str(case)


def test_a_result_past_float16_is_infinite() -> None:
    x, weight = torch.full((4, 64), 60.0, device="cuda").half(), torch.full((8, 64), 60.0, device="cuda").half()
    ones, zeros = torch.ones(8, device="cuda"), torch.zeros(8, device="cuda")
    assert (lbg.fused(x, weight, ones, zeros) == torch.inf).all()
    assert torch.equal(
        lbg.fused(x, weight, ones, zeros, out_dtype=F32), torch.full((4, 8), 60.0 * 60 * 64, device="cuda")
    )


@pytest.mark.parametrize("bad", BAD_CALLS)
def test_bad_arguments_raise_and_the_next_call_works(bad: str) -> None:
    args, kwargs = BAD_CALLS[bad]("cuda")
    out = kwargs.get("out")
    before = out.clone() if isinstance(out, Tensor) else None
    with pytest.raises(RuntimeError) as raised:
        (torch.ops.lbg.fused if out is None else torch.ops.lbg.fused.out)(*args, **kwargs)
    assert BAD_CALLS[bad].error("cuda") in str(raised.value)
    torch.cuda.synchronize()
    if before is not None:
        assert torch.equal(out, before), "out was written"
    case = Case(16, 32, 48)
    arguments = cases.make(case, "cuda")
    cases.check(case, arguments, lbg.fused(*arguments))


def test_leading_dimensions() -> None:
    case = Case(6, 32, 48)
    arguments = cases.make(case, "cuda")
    rows = torch.randn(3, 5, 4, 48, device="cuda").half()
    for x in (rows[0, 0, 0], rows[0, 0], rows, rows.transpose(0, 2), rows[:, ::2], rows.permute(1, 2, 0, 3)[1:]):
        result = lbg.fused(x, arguments.weight, arguments.scale, arguments.shift)
        flat = lbg.fused(x.reshape(-1, 48).contiguous(), arguments.weight, arguments.scale, arguments.shift)
        assert result.is_contiguous() and torch.equal(result.view(-1, 32), flat), f"{x.shape} {x.stride()}"


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")  # of other profiles: there are none
def test_one_kernel_of_the_explained_name_and_one_allocation() -> None:
    case = Case(512, 256, 128)
    arguments = cases.make(case, "cuda")
    lbg.fused(*arguments)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        result = lbg.fused(*arguments)
        torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] - before == 1, result.shape
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    chosen = lbg.explain(arguments.x, arguments.weight).chosen
    assert chosen is not None and kernels == [chosen.symbol]


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_it_does_not_synchronize() -> None:
    arguments = cases.make(Case(64, 64, 64), "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        lbg.fused(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_it_runs_on_the_current_stream() -> None:
    case = Case(256, 256, 256)
    arguments = cases.make(case, "cuda")
    late = torch.zeros_like(arguments.x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # a launch on any other stream would read the zeros
        late.copy_(arguments.x)
        result = lbg.fused(late, arguments.weight, arguments.scale, arguments.shift)
    stream.synchronize()
    cases.check(case, arguments, result)


@pytest.mark.parametrize("captured", [False, True], ids=["stream", "graph"])
@pytest.mark.parametrize("dtype", [F16, F32], ids=str)
@pytest.mark.parametrize("m", [1, 16, 256, 2048])
def test_a_call_waits_for_what_the_stream_ran_before(m: int, dtype: torch.dtype, captured: bool) -> None:
    """A launch may begin early, and what it reads and writes is what the kernels before it write and read."""
    case = Case(m, 1024, 1024, x=dtype, out=dtype)
    x, weight, scale, shift = cases.make(case, "cuda")
    given = [(torch.randn_like(x), torch.randn_like(weight) / 32) for _ in range(4)]
    expected = []
    for pair in given:
        expected.append(lbg.fused(*pair, scale, shift))
        torch.cuda.synchronize()
    out, results = torch.empty_like(expected[0]), [torch.empty_like(expected[0]) for _ in range(40)]

    def chain() -> None:
        for i, result in enumerate(results):
            x.copy_(given[i % 4][0])
            weight.copy_(given[i % 4][1])
            lbg.fused(x, weight, scale, shift, out=out)
            result.copy_(out)

    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            chain()
        graph.replay()
    else:
        chain()
    torch.cuda.synchronize()
    wrong = [i for i, result in enumerate(results) if not torch.equal(result, expected[i % 4])]
    assert not wrong, f"{case}: calls {wrong} of {len(results)}"


def test_a_graph_replays_on_new_data() -> None:
    case = Case(100, 256, 256)
    arguments = cases.make(case, "cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = lbg.fused(*arguments)
    for seed in range(3):
        arguments.x.normal_(generator=torch.Generator("cuda").manual_seed(seed))
        graph.replay()
        torch.cuda.synchronize()
        cases.check(case, arguments, result)


def in_new_process(body: str) -> str:
    code = "import sys, threading, torch, lbg\nfrom tests import cases\nfrom tests.cases import Case\n" + body
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_first_call_of_a_process_can_be_captured() -> None:
    assert (
        in_new_process("""
case = Case(300, 512, 512)
arguments = cases.make(case, "cuda")
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    result = torch.ops.lbg.fused(*arguments)
graph.replay()
torch.cuda.synchronize()
cases.check(case, arguments, result)
print("triton" in sys.modules)
""")
        == "False"
    )


def test_eight_threads_race_to_the_first_call() -> None:
    assert (
        in_new_process("""
all_cases = [Case(m, 512, 512) for m in (1, 16, 33, 64, 100, 128, 500, 4096)]
all_arguments = [cases.make(case, "cuda") for case in all_cases]
torch.cuda.synchronize()
barrier, results = threading.Barrier(8), {}
def work(i):
    barrier.wait()
    results[i] = lbg.fused(*all_arguments[i])
threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
torch.cuda.synchronize()
for i in range(8):
    cases.check(all_cases[i], all_arguments[i], results[i])
print(len(results))
""")
        == "8"
    )


def test_threads_with_streams_of_their_own() -> None:
    case = Case(200, 256, 256)
    arguments = cases.make(case, "cuda")
    expected = lbg.fused(*arguments)
    torch.cuda.synchronize()
    failures: list[int] = []

    def work(index: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                if not torch.equal(lbg.fused(*arguments), expected):
                    failures.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_second_gpu_while_the_first_is_current() -> None:
    case = Case(64, 64, 64)
    arguments = cases.make(case, "cuda:1")
    result = lbg.fused(*arguments)
    assert result.device.index == 1 and torch.cuda.current_device() == 0
    cases.check(case, arguments, result)


def test_warmup_loads_every_kernel_of_this_gpu() -> None:
    assert lbg.warmup() == lbg.warmup("cuda:0") == len(SHIPPED)


def test_fold_on_the_gpu_is_the_cpus() -> None:
    vectors = [torch.randn(100), torch.randn(100), torch.rand(100), torch.randn(100), torch.randn(100)]
    for here, there in zip(lbg.fold(*vectors, 1e-5), lbg.fold(*(v.cuda() for v in vectors), 1e-5)):
        torch.testing.assert_close(there.cpu(), here, rtol=1e-6, atol=1e-7)


def test_the_derivative_on_the_gpu() -> None:
    arguments = cases.make(Case(40, 48, 64, x=F32, out=F32), "cuda")
    leaves = [tensor.detach().requires_grad_() for tensor in arguments]
    lbg.fused(*leaves).sum().backward()
    grads = [leaf.grad for leaf in leaves]
    doubles = [tensor.detach().double().requires_grad_() for tensor in arguments]
    cases.reference(cases.Arguments(*doubles)).sum().backward()
    for grad, expected in zip(grads, (double.grad for double in doubles)):
        assert grad is not None and expected is not None and cases.error(grad, expected) < 3e-3


# ---- the module


def module_pair(
    dtype: torch.dtype = F32, features: int = 256
) -> tuple[lbg.LinearBatchNormGELUReLU, torch.nn.Sequential]:
    torch.manual_seed(0)
    module = lbg.LinearBatchNormGELUReLU(features, 128, device="cuda", dtype=dtype)
    for shift in range(3):
        module(torch.randn(64, features, device="cuda", dtype=dtype) + shift)
    plain = torch.nn.Sequential(module.gemm, module.batch_norm, torch.nn.GELU(), torch.nn.ReLU())
    return module.eval(), plain


@pytest.mark.parametrize("features", [256, 251])
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_the_module_gives_what_the_pytorch_modules_give(dtype: torch.dtype, features: int) -> None:
    module, plain = module_pair(dtype, features)
    x = torch.randn(100, features, device="cuda", dtype=dtype)
    with torch.inference_mode():
        assert cases.error(module(x), plain.double()(x.double())) < {F32: 1e-3, F16: 2e-3, BF16: 2e-2}[dtype]


def test_the_module_follows_its_parameters() -> None:
    module, plain = module_pair()
    x = torch.randn(64, 256, device="cuda")

    def right() -> bool:
        with torch.inference_mode():
            return cases.error(module(x), plain(x).double()) < 1e-3

    assert right()
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    module(x).sum().backward()
    optimizer.step()
    assert right()
    module.load_state_dict({name: value + 0.25 for name, value in module.state_dict().items()})
    assert right()
    module.train()(x + 3)
    assert right() is not None and module.eval() is module and right()
    module.to("cpu").to("cuda")
    assert right()


def test_the_module_differentiates_as_the_pytorch_modules() -> None:
    module, plain = module_pair()
    x = torch.randn(64, 256, device="cuda", requires_grad=True)
    module(x).square().sum().backward()
    found = [x.grad, *(p.grad for p in module.parameters())]
    x.grad = None
    module.zero_grad()
    plain(x).square().sum().backward()
    for grad, expected in zip(found, [x.grad, *(p.grad for p in module.parameters())]):
        assert grad is not None and expected is not None and cases.error(grad, expected.double()) < 5e-3


def test_the_modules_first_call_can_be_captured() -> None:
    module, plain = module_pair()
    x = torch.randn(64, 256, device="cuda")
    with torch.inference_mode():
        lbg.fused(x, module.gemm.weight.half(), *lbg.fold(None, *[torch.ones(128, device="cuda")] * 2, None, None, 0.0))
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = module(x)
        graph.replay()
        assert cases.error(result, plain(x).double()) < 1e-3
        assert cases.error(module(x), plain(x).double()) < 1e-3  # and a call outside is not served from the graph


# ---- the sanitizer


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not on the PATH")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_sanitizer_finds_nothing(tool: str) -> None:
    from tests import sanitize  # which imports this module

    command = [
        "compute-sanitizer",
        "--tool",
        tool,
        "--error-exitcode",
        "9",
        "--kernel-name",
        "kernel_substring=lbg_fused",
        "--print-limit",
        "10000",  # racecheck is mistaken once about each kernel, and there are more than the default's 100
    ]
    done = subprocess.run(
        [*command, sys.executable, "-m", "tests.sanitize"],
        capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=500,
    )  # fmt: skip
    assert f"{len(SHIPPED)} kernels" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]
    if tool == "racecheck":
        with_roles = [c for c in SHIPPED if c.tma or "_shift_" in c.symbol]
        races = sanitize.races(done.stdout, {config.symbol: config.cluster for config in with_roles})
        assert not races, "\n".join(races)
        assert done.returncode in (0, 9), done.stdout[-4000:]
    else:
        assert done.returncode == 0, done.stdout[-4000:]
