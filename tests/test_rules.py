"""The user's rules, held to every branch of their text (aot/rules.py)."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from aot import BuildError, rules
from aot.rules import Facts


@dataclass(frozen=True)
class Sizes:
    tile_m: int = 128
    tile_n: int = 128
    tile_k: int = 32
    warps: int = 4
    stages: int = 2


ALL = [(8, 3), (8, 2), (4, 3), (4, 2)]


@pytest.mark.parametrize(
    ("facts", "expected", "why"),
    [
        # registers under 96 and no spill: 8 warps and 3 stages, and the conservative config always
        (Facts(95, 0, False, 2), [(8, 3), (4, 2)], "95 registers, under 96, and no spill"),
        (Facts(96, 0, False, 2), ALL, "96 registers, from 96 to 128"),
        (Facts(95, 8, False, 2), [(4, 2)], "spills 8 bytes"),
        # registers over 128, or occupancy limited by registers: 4 warps and 2 stages
        (Facts(128, 0, False, 2), ALL, "128 registers, from 96 to 128"),
        (Facts(129, 0, False, 2), [(4, 2)], "129 registers, over 128"),
        (Facts(110, 0, True, 2), [(4, 2)], "registers limit the CTAs"),
        (Facts(200, 64, True, 4), [(4, 2)], "200 registers, over 128"),
        # where the two meet the second wins
        (Facts(80, 0, True, 2), [(4, 2)], "registers limit the CTAs"),
        # 3 or more distinct inputs prefer 2 stages and 4 warps: first, and nothing is left out
        (Facts(95, 0, False, 3), [(4, 2), (8, 3)], "3 distinct inputs"),
        (Facts(110, 0, False, 4), [(4, 2), (8, 2), (4, 3), (8, 3)], "4 distinct inputs"),
    ],
    ids=str,
)
def test_what_is_tried(facts: Facts, expected: list[tuple[int, int]], why: str) -> None:
    trials = rules.trials(facts)
    assert [(trial.warps, trial.stages) for trial in trials] == expected
    assert why in trials[0].why and all(trial.why for trial in trials)


def test_what_is_always_so() -> None:
    for registers in range(16, 256):
        for spill in (0, 4):
            for limited in (False, True):
                for inputs in range(1, 6):
                    found = [(t.warps, t.stages) for t in rules.trials(Facts(registers, spill, limited, inputs))]
                    assert (4, 2) in found and len(found) <= 4 and len(set(found)) == len(found)
                    assert all(warps in (4, 8) and stages in (2, 3) for warps, stages in found)
                    assert inputs < 3 or found[0] == (4, 2)


@pytest.mark.parametrize(
    ("ctas", "limited"),
    [
        ({"registers": 2, "shared": 3, "warps": 12, "all": 2}, True),
        ({"registers": 3, "shared": 3, "warps": 12, "all": 3}, False),  # shared memory allows no more either
        ({"registers": 4, "shared": 3, "warps": 12, "all": 3}, False),
    ],
)
def test_limited_by_registers_means_by_them_alone(ctas: dict[str, int], limited: bool) -> None:
    assert rules.facts(100, 0, ctas, 4) == Facts(100, 0, limited, 4)


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        (Sizes(), []),
        (Sizes(warps=8, stages=3), []),
        (Sizes(warps=12, stages=4), ["12 warps", "4 stages"]),
        (Sizes(tile_m=512), ["tile_m 512"]),
        (Sizes(tile_n=96, stages=1), ["tile_n 96", "1 stages"]),
    ],
    ids=str,
)
def test_what_is_outside_the_sets(sizes: Sizes, told: list[str]) -> None:
    assert rules.outside(sizes) == told


def test_a_config_outside_the_sets_must_have_earned_it() -> None:
    outside = Sizes(stages=5)
    assert rules.check_earned("row", Sizes(), [], "") == ""
    assert rules.check_earned("row", outside, ["a measurement"], "") == ""
    assert (
        rules.check_earned("row", outside, [], "soon")
        == "row: 5 stages outside the user's sets, not measured yet: soon"
    )
    with pytest.raises(BuildError, match=r"^row: 5 stages are outside the user's sets .* no measurement earned it"):
        rules.check_earned("row", outside, [], "")


@pytest.mark.parametrize("size", [8, 24, 96, 512, 0])
def test_blocks_are_powers_of_two_from_16_to_256(size: int) -> None:
    for name in ("tile_m", "tile_n", "tile_k"):
        with pytest.raises(BuildError, match=rf"^{name} is {size}; block sizes are powers of two from 16 to 256"):
            rules.check_tile(Sizes(**{name: size}))
    rules.check_tile(Sizes(16, 256, 64))


def test_the_grid_is_never_empty() -> None:
    assert rules.grid(1, 1, 128, 128) == 1 and rules.grid(129, 128, 128, 64) == 4
    for m, n in ((0, 8), (8, 0)):
        with pytest.raises(BuildError, match="is an empty grid"):
            rules.grid(m, n, 16, 16)


def test_under_two_percent_is_no_gain() -> None:
    assert rules.gains_enough(100, 102) and not rules.gains_enough(100, 101.9)
