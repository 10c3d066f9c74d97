"""The tuner without a GPU: times come from a formula; what is kept, chosen, written and said is what is tested."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("numpy")

import numpy as np

from aot import BuildError, candidates, configs, costs, evidence, rules, selection, tune
from aot.candidates import Candidate, Excluded
from aot.configs import CONFIGS, ROWS
from aot.fitting import CONSTANTS, predicted_us
from aot.journal import Head, Journal, Key, Timed, read
from aot.model import Cost
from aot.tune import Compiled, Package
from tests.bench import fit
from tests.bench import tune as bench

NAMES = {"f16": "float16", "bf16": "bfloat16", "f32": "float32"}
SHAPES = [(m, n, k) for m in (1, 16, 64, 256, 1024, 4096, 16384) for n, k in ((4096, 4096), (1024, 4096), (4096, 512))]
FACTS = {"date": "2026-11-24", "driver": "580"}
KIND = "x16"


def cost(config: configs.Config) -> Cost:
    """Constants by a formula that is of this file alone: larger tiles take longer a step, and less for an element."""
    operands = config.tile_m * configs.ELEMENT_BYTES[config.x] + config.tile_n * configs.ELEMENT_BYTES[config.weight]
    load_us = config.tile_k * operands / (49_000 if config.aligned else 6_000)
    matrix_us = config.tile_m * config.tile_n * config.tile_k / 11e6
    step_us = max(load_us, matrix_us) + min(load_us, matrix_us) / 10
    store_us = config.tile_m * config.tile_n * configs.ELEMENT_BYTES[config.out] / 49_000
    return Cost(2.0, 0.7 + store_us, step_us, 0.7 / (config.stages - 1), *[0.0] * 4, 22_000)


def kernel(config: configs.Config) -> dict[str, Any]:
    """lbg.Config's fields of a config."""
    fields = asdict(config) | {name: NAMES[getattr(config, name)] for name in ("x", "weight", "out")}
    extra = {"symbol": config.symbol, "compiled_arch": config.arch, "tma": config.tma, "persistent": config.persistent}
    extra |= {"pieces": config.pieces, "row_major": config.row_major}
    extra |= {"shared_bytes": 0, "registers": 128, "ctas_per_sm": 1} | asdict(cost(config))
    return {name: value for name, value in (fields | extra).items() if name in bench.lbg.Config.__dataclass_fields__}


def package(arch: int = 90, runs_on: int | None = None, digest: str = "abc") -> Package:
    report = {"ctas_per_sm": {"all": 1}}
    made = tuple(
        Compiled(KIND, promise, each.config, each.why, report)
        for promise in evidence.PROMISES
        for each in candidates.candidates(arch, KIND, promise)
        if isinstance(each, Candidate)
    )
    closing = {KIND: candidates.conservative(arch, KIND).symbol}
    return Package(arch, runs_on or arch, digest, made, closing, (Excluded("a tile", "a reason"),))


def head(made: Package, device: str = "NVIDIA H200") -> Head:
    every = [c.config for c in made.compiled] + [candidates.conservative(made.arch, KIND)]
    kernels = {config.symbol: kernel(config) for config in every}
    return Head(Key(device, "580", made.digest), made.arch, made.runs_on, 132, FACTS, kernels)


def synthetic_us(made: Package, noise: float = 0.0, seed: int = 0) -> bench.Measure:
    """Times by the model, each off by up to `noise`."""
    rows = {symbol: bench.lbg.Config(**row) for symbol, row in head(made).kernels.items()}
    draw = random.Random(seed)

    def measure(item: bench.Item, symbols: list[str]) -> tuple[dict[str, float], dict[str, str]]:
        sizes = np.array([(item.case.m, item.case.n, item.case.k)])
        cost = {s: {name: getattr(rows[s], name) for name in CONSTANTS} for s in symbols}
        us = {s: float(predicted_us(rows[s], sizes, 132, cost[s])[0]) for s in symbols}
        return {s: value * (1 + draw.uniform(-noise, noise)) for s, value in us.items()}, {}

    return measure


def items(made: Package, shapes: list[tuple[int, int, int]] = SHAPES) -> list[bench.Item]:
    return list(bench.plan([bench.lbg.Config(**row) for row in head(made).kernels.values()], shapes))


def measured(path: Path, made: Package, measure: bench.Measure | None = None, device: str = "NVIDIA H200") -> Journal:
    journal = Journal(path, head(made, device))
    assert bench.run(items(made), journal, measure or synthetic_us(made)) == 0
    return journal


# ---- measuring: nothing is lost


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, asked = package(), []
    usual = synthetic_us(made)

    def measure(item: bench.Item, symbols: list[str]) -> tuple[dict[str, float], dict[str, str]]:
        asked.append((item.promise, item.shape))
        if len(asked) == 5:
            raise KeyboardInterrupt
        return usual(item, symbols)

    with pytest.raises(KeyboardInterrupt):
        bench.run(items(made), Journal(tmp_path / "j", head(made)), measure)
    assert len(read(tmp_path / "j").timed) == 4
    with (tmp_path / "j").open("a") as file:
        file.write('{"timed": {"kind": "x1')  # torn by a power cut
    again = Journal(tmp_path / "j", head(made))
    assert bench.run(items(made), again, measure) == 0
    assert len(again.record.timed) == len(items(made)) == len(asked) - 1
    assert (
        read(tmp_path / "j") == again.record
        and f"{len(asked) - 5} of {len(asked) - 5}, 0 s left" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("change", "told"),
    [({"device": "NVIDIA L4"}, "of device NVIDIA H200; this is NVIDIA L4"), ({"driver": "590"}, "of driver 580"),
     ({"candidates": "def"}, "of candidates abc")],
)  # fmt: skip
def test_a_journal_of_something_else_is_refused(tmp_path: Path, change: dict[str, str], told: str) -> None:
    first = head(package())
    Journal(tmp_path / "j", first)
    with pytest.raises(BuildError, match=rf"{told}.*take another file"):
        Journal(tmp_path / "j", replace(first, key=replace(first.key, **change)))


def test_what_is_no_journal(tmp_path: Path) -> None:
    (tmp_path / "j").write_text("{}\n")
    with pytest.raises(BuildError, match="is no journal of the tuner"):
        read(tmp_path / "j")
    with pytest.raises(BuildError, match=r"No such file.*tests\.bench\.tune --journal .* writes it"):
        read(tmp_path / "none")


def test_a_budget_ends_a_run_between_shapes(tmp_path: Path) -> None:
    made, now = package(), [0.0]

    def measure(item: bench.Item, symbols: list[str]) -> tuple[dict[str, float], dict[str, str]]:
        now[0] += 10
        return dict.fromkeys(symbols, 1.0), {}

    journal = Journal(tmp_path / "j", head(made))
    assert bench.run(items(made), journal, measure, 25, lambda: now[0]) == len(items(made)) - 3
    assert len(journal.record.timed) == 3


def test_a_wrong_candidate_is_dropped_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, asked = package(), []
    usual = synthetic_us(made)
    bad = made.compiled[0].config.symbol  # shipped, and the fastest of many shapes

    def measure(item: bench.Item, symbols: list[str]) -> tuple[dict[str, float], dict[str, str]]:
        asked.extend(symbols)
        us, wrong = usual(item, symbols)
        return us, {bad: "relative error 1"} if us.pop(bad, None) else wrong

    journal = measured(tmp_path / "j", made, measure)
    assert asked.count(bad) == 1 and bad in journal.record.dropped()
    assert f"dropped: {bad}: relative error 1" in capsys.readouterr().err
    decision = tune.decide(KIND, "rows", journal.record, made, ROWS[90][KIND]["rows"], False)
    assert bad not in {m.kernel for row in decision.rows for m in row.evidence}
    assert any(f"{bad} is dropped: 1x4096x4096: relative error 1" in line for line in decision.log), decision.log


def test_a_kernel_that_broke_a_run_is_left_out_of_the_next(tmp_path: Path) -> None:
    made = package()
    bad = made.compiled[0].config.symbol
    Journal(tmp_path / "j", head(made)).stop(bad, "illegal address")
    assert all(bad not in timed.us for timed in measured(tmp_path / "j", made).record.timed)


def test_the_plan_takes_telling_shapes_first_and_ragged_ones_where_results_are(root: Path) -> None:
    found = items(package(), [])
    assert [(item.promise, item.shape) for item in found[:2]] == [
        ("rows", "16384x4096x4096"),
        ("any_out", "16384x4095x4096"),
    ]
    assert len({(item.promise, item.shape) for item in found}) == len(found)
    assert all(item.symbols[-1].endswith("_any") and item.case.k % 8 == 0 for item in found)


# ---- choosing

REGIME = dict.fromkeys("abcdef", "many rows")


@pytest.mark.parametrize(
    ("times", "incumbents", "expected"),
    [
        ([{"a": 100, "b": 101}, {"a": 101, "b": 100}], [], {"a"}),  # each gains under 2 % over the other
        ([{"a": 100, "b": 103}, {"a": 103, "b": 100}], [], {"a", "b"}),
        ([{"a": 101.9, "b": 100}], ["a"], {"a"}),  # the incumbent wins
        ([{"a": 102.1, "b": 100}], ["a"], {"b"}),
        ([{"a": 100, "b": 100.5}, {"a": 100, "b": 150}], ["a", "b"], {"a"}),  # an incumbent that nothing needs
        ([{"a": 100}, {"b": 100}], ["a"], {"a", "b"}),  # each runs where the other cannot
        ([{s: 100 if s == best else 200 for s in "abcdef"} for best in "abcdef"], [], 3),  # and the conservative one
        ([{s: 100 if s == best else 150 for s in "abcd"} for best in "abcd"] * 2
         + [{"a": 150, "b": 150, "c": 150, "d": 10}], ["a", "b", "c"], 3),
    ],
)  # fmt: skip
def test_what_is_chosen(times: list[dict[str, float]], incumbents: list[str], expected: set[str] | int) -> None:
    choice = selection.choose(times, incumbents, REGIME)
    found = set(choice.chosen)
    assert found == expected if isinstance(expected, set) else len(found) == expected, choice
    assert "d" in found or not incumbents or "d" not in times[-1], choice.log


def test_what_is_left_in_a_choice_is_worth_two_percent_somewhere() -> None:
    draw = random.Random(1)
    for _ in range(20):
        times = [{s: 100 * draw.uniform(1, 1.2) for s in "abcdef"} for _ in range(8)]
        chosen = selection.choose(times, ["a", "b"], REGIME).chosen
        assert len(chosen) == 1 or all(np.exp(selection.worth(times, chosen, s)) >= rules.LEAST_GAIN for s in chosen)
        assert 1 <= len(chosen) <= 3


def test_a_rerun_on_the_same_device_gives_the_same_choice(tmp_path: Path) -> None:
    made = package()
    for seed in range(5):
        first = measured(tmp_path / f"{seed}", made, synthetic_us(made, 0.01, seed)).record
        second = measured(tmp_path / f"{seed}again", made, synthetic_us(made, 0.01, seed + 100)).record
        before = tune.decide(KIND, "rows", first, made, ROWS[90][KIND]["rows"], False)
        after = tune.decide(KIND, "rows", second, made, before.rows, True)
        assert [row.tile for row in after.rows] == [row.tile for row in before.rows], (seed, after.log)


def test_every_row_of_a_choice_has_its_evidence(tmp_path: Path) -> None:
    made = package()
    record = measured(tmp_path / "j", made).record
    before = evidence.read(90)
    section, _ = tune.section(record, made, before, "the command")
    rows = evidence.rows({"arch": "sm_90", "tune": section})
    assert rows["x32"] == ROWS[90]["x32"]  # was not measured
    for row in [*rows[KIND]["rows"], *rows[KIND]["any_out"]]:
        assert row.evidence and not row.pending
        for measurement in row.evidence:
            assert measurement.gain == pytest.approx(measurement.conservative_us / measurement.us)
            assert (measurement.device, measurement.date, measurement.how) == ("NVIDIA H200", "2026-11-24", tune.NATIVE)
    assert configs.check_evidence(90, {KIND: rows[KIND]}) == []
    counts = [sum(1 for c in configs.shipped(90, rows) if c.x == c.out == c.weight == "f16" and configs.regime(c) == r)
              for r in {configs.regime(c) for c in configs.shipped(90, rows)}]  # fmt: skip
    assert max(counts) < configs.MOST_IN_REGIME  # the conservative one closes every class
    twins = [
        costs.float16_twin(c).symbol
        for c in configs.shipped(90, rows)
        if c.aligned and configs.kind_of(90, c.x, c.out, False) == KIND
    ]
    kernels = section["costs"]["kernels"]
    assert set(twins) <= set(kernels), "constants of float16's rows, and of bfloat16's by them"
    assert not [symbol for symbol in kernels if "bf16" in symbol]


def test_constants_of_more_shapes_stay_and_so_does_what_is_said_of_them(tmp_path: Path) -> None:
    made = package()
    record = measured(tmp_path / "j", made).record
    rows, before = ROWS[90], {"gpu": "NVIDIA H200", "command": "a fit of more shapes"}
    first = tune.costs_of(record, made, rows, before)
    assert "command" not in first and first["kernels"]
    more = {symbol: row | {"shapes": 1000} for symbol, row in first["kernels"].items()}
    assert tune.costs_of(record, made, rows, before | {"kernels": more}) == before | {"kernels": more}
    # Of a new kernel the run tells; what was said of rows that start anywhere, which it has not, stays beside.
    _, *less = more
    before |= {"any_rows": {"command": "another"}, "kernels": {symbol: more[symbol] for symbol in less}}
    found = tune.costs_of(record, made, rows, before)
    assert "command" not in found and found["any_rows"] == {"command": "another"} and len(found["kernels"]) > len(less)


def test_a_verification_build_is_chosen_by_predictions_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = package(89, 90)
    record = measured(tmp_path / "j", made).record
    favourite = next(c for c in made.compiled if c.promise == "rows" and c.why == "async" and c.config.tile_m == 128)
    monkeypatch.setattr(tune, "predicted_us", lambda c, sizes: 10.0 if c is favourite else 20.0)
    section, _ = tune.section(record, made, evidence.read(89), "the command")
    row = section["kinds"][KIND]["rows"][0]
    assert row["tile"]["tile_n"] == favourite.config.tile_n and len(section["kinds"][KIND]["rows"]) == 1
    how = row["evidence"][0]["how"]
    assert "no time of an RTX 4090" in how and "predicted for an RTX 4090, 10 us" in how and "costs" not in section


def test_a_journal_of_other_candidates_chooses_nothing(tmp_path: Path) -> None:
    record = measured(tmp_path / "j", package()).record
    with pytest.raises(BuildError, match=r"the journal is of candidates abc; candidates\.json has def"):
        tune.section(record, package(digest="def"), evidence.read(90), "")


def test_a_tile_that_another_class_of_its_kind_spills_is_not_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made, out = package(), tmp_path / "evidence.json"
    measured(tmp_path / "j", made)
    made.save(tmp_path / "candidates.json")
    chosen, _ = tune.section(read(tmp_path / "j"), made, evidence.read(90), "")
    first = chosen["kinds"][KIND]["rows"][0]["tile"]

    def compile_configs(some: list[configs.Config], *rest: Any) -> None:
        for config in some:
            if (
                config.weight == "bf16"
                and config.x == config.out
                and candidates.tile_from(config) == tune.Tile(**first)
            ):
                rest[-1](config, BuildError(f"{config.symbol} spills"))

    monkeypatch.setattr("build.compile_configs", compile_configs)
    tune.write_choice(tmp_path / "j", tmp_path / "candidates.json", 90, out, "", 1)
    assert first not in [row["tile"] for row in evidence.read(90, out)["tune"]["kinds"][KIND]["rows"]]
    assert "left out: lbg_fused_bf16_bf16" in capsys.readouterr().out


def test_from_a_journal_to_the_file_and_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune, "refused", lambda *_: {})  # else it compiles
    made, out = package(), tmp_path / "evidence.json"
    measured(tmp_path / "j", made)
    made.save(tmp_path / "candidates.json")
    assert Package.load(tmp_path / "candidates.json") == made
    arguments = ["--arch", "sm_90", "--journal", f"{tmp_path}/j", "--candidates", f"{tmp_path}/candidates.json"]
    assert tune.main([*arguments, "--evidence", str(out)]) == 0
    first = out.read_text()
    assert tune.main([*arguments, "--evidence", str(out)]) == 0 and "the choice is as it was" in capsys.readouterr().out
    before, after = (json.loads(text)["tune"]["kinds"] for text in (first, out.read_text()))
    assert before == after


# ---- the files


def test_the_shipped_files_are_read_and_every_row_outside_the_sets_says_why() -> None:
    for arch in configs.ARCHS:
        rows = evidence.rows(evidence.read(arch))
        assert list(configs.shipped(arch, rows)) == [config for config in CONFIGS if config.arch == arch]
        configs.check_evidence(arch, rows)
        row = rows[KIND]["rows"][0]
        bare = {KIND: {"rows": (replace(row, evidence=(), pending="", tile=row.tile | {"stages": 6}),)}}
        with pytest.raises(BuildError, match="6 stages are outside the user's sets"):
            configs.check_evidence(arch, bare)


def test_a_section_is_written_whole_and_the_others_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "evidence.json"
    evidence.write_section(path, 89, "profile", {"rows": [{"a": 1.23456789}, {"b": 2}]})
    evidence.write_section(path, 89, "benchmark", {"x": [1, 2]})
    found = evidence.read(89, path)
    assert list(found) == ["arch", "tune", "benchmark", "profile"] and found["tune"] == evidence.read(89)["tune"]
    assert '   {"a": 1.23457},\n   {"b": 2}\n' in path.read_text()
    before = path.read_text()

    def fails(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fails)
    with pytest.raises(OSError, match="disk full"):
        evidence.write_section(path, 89, "profile", {})
    assert path.read_text() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "no such file"),
        ("{", "not JSON"),
        ('{"arch": "sm_90"}', "evidence of sm_90; wanted is that of sm_89"),
        ('{"arch": "sm_89", "tune": {}}', "no section tune with kinds"),
    ],
)
def test_a_file_that_is_no_evidence(tmp_path: Path, text: str | None, told: str) -> None:
    if text is not None:
        (tmp_path / "e").write_text(text)
    with pytest.raises(BuildError, match=told):
        evidence.read(89, tmp_path / "e")


def test_an_owners_file_becomes_the_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "sent.json"
    source.write_text(evidence.path_of(89).read_text())
    monkeypatch.setattr(evidence, "path_of", lambda arch: tmp_path / f"evidence_sm_{arch}.json")
    assert evidence.adopt(source).read_text() == source.read_text()
    source.write_text("{}")
    with pytest.raises(BuildError, match="does not begin with the arch"):
        evidence.adopt(source)
    with pytest.raises(BuildError, match=r"gone\.json: cannot be read"):
        evidence.adopt(tmp_path / "gone.json")


# ---- candidates and the command


def test_candidates_keep_the_rules_and_every_exclusion_has_a_reason() -> None:
    for arch in configs.ARCHS:
        for kind in candidates.representative(arch):
            for promise in evidence.PROMISES:
                found = list(candidates.candidates(arch, kind, promise))
                some = [each.config for each in found if isinstance(each, Candidate)]
                assert len({config.symbol for config in some}) == len(some) <= 32
                assert all(not candidates.why_not(config) for config in some)
                assert {configs.tile_of(row) for row in ROWS[arch][kind][promise]} <= {
                    candidates.tile_from(c) for c in some
                }
                assert any((c.kernel, c.warps, c.stages) == ("tile", 4, 2) for c in some)
                assert all(each.why for each in found if isinstance(each, Excluded))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, ""),
        ({"stages": 5}, "shared memory holds 4 stages, not 5"),
        ({"stages": 1}, "shared memory holds 1 stages; a async kernel needs 2"),
        ({"tile_n": 256, "stages": 3}, "256 of a thread's 255 registers would be accumulators; the most is 128"),
        ({"fp16_accumulate": True, "warps": 8}, ""),
        ({"fp16_accumulate": True, "warps": 8, "tile_k": 128, "stages": 1}, "shared memory holds 1 stages"),
        ({"tile_k": 48}, "tile_k is 48; block sizes are powers of two"),
        ({"fp16_accumulate": True, "kernel": "tile"}, "fp16_accumulate sums chunks of 64: K steps of 32 do not make"),
        ({"warps_m": 16, "warps": 16}, "16x1 warps take 16 rows and 8 columns each, which the tile has not"),
    ],
    ids=str,
)
def test_what_no_compiler_need_be_asked(change: dict[str, Any], told: str) -> None:
    tile = configs.Tile(128, 128, 32, 4, 4, kernel="async", warps_m=4, unit_k=16)
    config = replace(configs.config_of(89, ("f32", "f16", "f16", False), tile, "rows"), **change)
    why = candidates.why_not(config)
    assert why.startswith(told) and bool(why) == bool(told), why


def test_the_rules_name_what_follows_a_plain_tile() -> None:
    plain = next(each.config for each in candidates.candidates(89, KIND, "rows")
                 if isinstance(each, Candidate) and each.why.startswith("plain"))  # fmt: skip
    found = list(candidates.follow_ups(plain, rules.Facts(90, 0, False, 4)))
    assert [(c.config.warps, c.config.stages) for c in found] == [(8, 3)] and "under 96" in found[0].why
    assert replace(found[0].config, warps=4, stages=2) == plain


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "tune needs a CUDA GPU, and there is none here: --compile-only makes"),
        (["--compile-only"], "without a GPU, tune needs --arch: sm_89 or sm_90"),
        (["--arch", "sm_90", "--compile-only", "--only", "x17"], "no kind of class 'x17'; it has 'x16'"),
        (["--arch", "sm_90", "--journal", "nowhere"], "nowhere: No such file"),
    ],
)
def test_a_command_that_cannot_be_done(monkeypatch: pytest.MonkeyPatch, arguments: list[str], told: str) -> None:
    monkeypatch.setattr(tune, "gpu_arch", lambda: None)
    with pytest.raises(BuildError, match=told):
        tune.main(arguments)


def test_the_gpu_must_run_what_is_measured() -> None:
    tune.check_gpu(90, 89, 90)
    tune.check_gpu(90, None, None)
    for here, arch in ((90, 89), (80, None)):
        with pytest.raises(BuildError, match=f"this machine's GPU is an sm_{here}"):
            tune.check_gpu(here, arch, None)


def test_what_fails_to_compile_is_left_out_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two candidates one spills; no other kernel is compiled."""
    pytest.importorskip("triton")
    good = configs.Tile(16, 32, 128, 4, 2, kernel="async", warps_m=1, unit_k=128)
    bad = configs.Tile(128, 256, 64, 4, 3)
    config = [configs.config_of(89, ("f16", "f16", "f16", False), tile, "rows") for tile in (good, bad)]
    monkeypatch.setattr(
        candidates,
        "candidates",
        lambda *place: iter([Candidate(c, "why") for c in config] if place[2] == "rows" else []),
    )
    artifacts, made = tune.compile_candidates(89, [KIND], 2, tmp_path)
    assert [a.config for a in artifacts] == [c.config for c in made.compiled] == config[:1]
    assert "a fast kernel spills" in made.excluded[0].why and made.excluded[0].name == config[1].symbol
    assert "left out" in tune.told(made)


def test_a_fit_takes_from_a_journal_what_it_has_no_times_of(tmp_path: Path) -> None:
    first, second = [config for config in CONFIGS if config.arch == 90 and config.aligned][:2]
    other = replace(first, tile_n=64, stages=2)  # a candidate that is not shipped
    assert other.symbol not in {config.symbol for config in CONFIGS}
    kernels = {config.symbol: kernel(config) for config in (first, second, other)}
    path = tmp_path / "journal.jsonl"
    head = Head(Key("H100", "580", "abc"), 90, 90, 132, {"gpu": "H100"}, kernels)
    Journal(path, head).add(Timed(KIND, "rows", "16x64x128", dict.fromkeys(kernels, 5.0)))
    times = [fit.Time(16, 64, 128, config.symbol, 4.0, False) for config in (first, other)]
    made = {symbol: fit.lbg.Config(**kernels[symbol]) for symbol in (first.symbol, other.symbol)}
    run = fit.Run({"gpu": "H100"}, 132, made, times)
    found = run.with_journal(path)
    assert found.times == [times[0], fit.Time(16, 64, 128, second.symbol, 5.0, False)]
    assert set(found.kernels) == {first.symbol, second.symbol}
    with pytest.raises(BuildError, match="is of a H100, these times of a H200"):
        replace(run, facts={"gpu": "H200"}).with_journal(path)


def test_a_fit_takes_the_times_of_several_runs_of_one_gpu() -> None:
    first, second = [config for config in CONFIGS if config.arch == 90 and config.aligned][:2]
    runs = [
        fit.Run({"gpu": "H100", "date": date}, 132, {config.symbol: fit.lbg.Config(**kernel(config))},
                [fit.Time(16, 64, 128, config.symbol, us, False)])
        for config, date, us in ((first, "today", 4.0), (second, "later", 5.0), (first, "last", 3.5))
    ]  # fmt: skip
    found = runs[0].with_run(runs[1]).with_run(runs[2])
    assert found.facts["date"] == "today" and set(found.kernels) == {first.symbol, second.symbol}
    assert [time.us for time in found.times] == [4.0, 5.0, 3.5]
    ((one, other),) = fit.by_shape(found)
    assert (one.us, other.us) == (3.5, 5.0)  # what is timed twice goes by the shorter time
    with pytest.raises(BuildError, match="times of a H100 and of a H200"):
        runs[0].with_run(replace(runs[1], facts={"gpu": "H200"}))


def test_a_kernel_that_choices_are_better_without_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [config for config in CONFIGS if config.arch == 90 and config.aligned and config.out_aligned][:3]
    shapes = [(16, 64, 64 * number) for number in range(1, fit.TOLD_BY + 1)]
    times = [
        fit.Time(*shape, row.symbol, us, row == rows[0]) for shape in shapes for row, us in zip(rows, (5.0, 4.0, 6.0))
    ]
    run = fit.Run({}, 132, {row.symbol: fit.lbg.Config(**kernel(row)) for row in rows}, times)
    foreseen = {
        row.symbol: dict.fromkeys(CONSTANTS, 0.0) | {"launch_us": us, "dram_bytes_per_us": 1e9}
        for row, us in zip(rows, (1.0, 2.0, 3.0))
    }
    first, *others = (row.symbol for row in rows)
    found = fit.worths(run, foreseen)
    assert found == {first: pytest.approx(-0.2), **dict.fromkeys(others, 0.0)}, "the second takes 4 us for 5"
    assert fit.worths(replace(run, times=times[3:]), foreseen) == {}, "too few shapes to tell"
    assert fit.judge(run, foreseen)["without"][first] == pytest.approx(-0.2)
    assert f"-20.00%  {first}" in capsys.readouterr().out
    # What was chosen when it was timed, and is shipped no more, is another's place to take.
    late = [replace(time, chosen=False) for time in times if time.symbol != first]
    assert {row["chosen"] for row in fit.regrets(replace(run, times=late), foreseen)} == {others[0]}
    own = {row.symbol: fit.lbg.Config(**kernel(row) | foreseen[row.symbol]) for row in rows}
    assert {row["chosen"] for row in fit.regrets(replace(run, kernels=own, times=late), None)} == {others[0]}


def test_a_fit_keeps_the_constants_that_it_has_no_times_for(tmp_path: Path) -> None:
    path, shipped = tmp_path / "evidence.json", evidence.read(90)["tune"]["costs"]
    first, last = (next(symbol for symbol in shipped["kernels"] if symbol.endswith("_anyrows") == any_rows)
                   for any_rows in (False, True))  # fmt: skip
    rows = {config.symbol: fit.lbg.Config(**kernel(config)) for config in CONFIGS if config.arch == 90}
    run = fit.Run({}, 132, rows, [])
    by_hand = shipped | {"since": "what was changed by hand after the times"}
    evidence.write_section(path, 90, "tune", evidence.read(90)["tune"] | {"costs": by_hand})
    fit.write_costs(path, run, {"gpu": shipped["gpu"], "measured": "yesterday", "kernels": {}}, True)
    assert evidence.read(90, path)["tune"]["costs"]["since"] == by_hand["since"]
    for symbol, any_rows in ((first, False), (last, True)):
        new = {"gpu": shipped["gpu"], "measured": "today", "kernels": {symbol: {"shapes": 1}}}
        fit.write_costs(path, run, new, any_rows)
        found = evidence.read(90, path)["tune"]["costs"]
        assert set(found["kernels"]) == set(shipped["kernels"]) and found["kernels"][symbol] == {"shapes": 1}, symbol
        assert (found["any_rows"]["measured"] == "today") == any_rows and found["measured"] == "today", symbol
        assert "since" not in found, symbol
    with pytest.raises(BuildError, match=r"has constants of a .*, these are of a H200"):
        fit.write_costs(path, run, {"gpu": "H200", "kernels": {}}, True)
    fit.write_costs(path, run, {"gpu": "H200", "kernels": {first: {"shapes": 2}}})
    assert evidence.read(90, path)["tune"]["costs"] == {"gpu": "H200", "kernels": {first: {"shapes": 2}}}


def test_times_of_other_constants_are_told_apart(tmp_path: Path) -> None:
    config = next(config for config in CONFIGS if config.arch == 90)
    now = kernel(config)
    before = {name: value for name, value in now.items() if name != "cluster"}
    path = tmp_path / "times.json"
    made = {"facts": {"lbg": "0.0.9"}, "sm_count": 132, "times": []}
    path.write_text(json.dumps(made | {"kernels": {config.symbol: now}}))
    assert fit.Run.load(path).kernels == {config.symbol: fit.lbg.Config(**now)}
    path.write_text(json.dumps(made | {"kernels": {config.symbol: before}}))
    with pytest.raises(BuildError, match=r"times of lbg 0\.0\.9, whose kernels have other constants .*cluster"):
        fit.Run.load(path)


def test_a_bfloat16_kernel_is_judged_by_its_float16_twins_constants() -> None:
    config = next(config for config in CONFIGS if config.arch == 90 and config.aligned and config.x == "f16")
    twin = replace(config, x="bf16", weight="bf16", out="bf16" if config.out == "f16" else "f32")
    kernels = {each.symbol: fit.lbg.Config(**kernel(each)) for each in (config, twin)}
    fitted = {config.symbol: {"cost": dict.fromkeys(CONSTANTS, 7.0)}}
    run = fit.Run({}, 132, kernels, [])
    assert fit.all_costs(run, fitted) == dict.fromkeys(kernels, dict.fromkeys(CONSTANTS, 7.0))
    own = {name: getattr(kernels[twin.symbol], name) for name in CONSTANTS}
    assert fit.all_costs(run, {})[twin.symbol] == own  # the wheel's
