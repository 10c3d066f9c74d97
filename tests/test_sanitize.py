"""What is taken from racecheck's report for its one mistake, and what is not."""

from __future__ import annotations

import pytest

from tests.sanitize import races

ROLE = "lbg_fused_f16_f16_64x32x128_w8_s8_b16_ring"
PLAIN = "lbg_fused_f16_f16_64x64x32_w4_s2_any"


def report(*pairs: tuple[str, int, int], errors: int | None = None) -> str:
    lines = [
        f"========= Error: Race reported between Write access at {kernel}+{write:#x}\n"
        f"=========     and Read access at {kernel}+{read:#x} [5 hazards]\n========= \n"
        for kernel, write, read in pairs
    ]
    count = len(pairs) if errors is None else errors
    return "".join(lines) + f"========= RACECHECK SUMMARY: {count} hazards displayed ({count} errors, 0 warnings)\n"


@pytest.mark.parametrize("pairs", [(), ((ROLE, 0x24D0, 0x2580),)], ids=["nothing", "the mistake"])
def test_nothing_is_left(pairs: tuple[tuple[str, int, int], ...]) -> None:
    assert races(report(*pairs), {ROLE}) == []


@pytest.mark.parametrize(
    ("output", "left"),
    [
        (report((PLAIN, 0x24D0, 0x2580)), f"{PLAIN}: write at 0x24d0, read at 0x2580"),
        (report((ROLE, 0x24D0, 0x2380)), f"{ROLE}: write at 0x24d0, read at 0x2380"),
        (report((ROLE, 0x24D0, 0x2600)), f"{ROLE}: write at 0x24d0, read at 0x2600"),
        (report((ROLE, 0x24D0, 0x2580), (ROLE, 0x100, 0x180)), f"{ROLE}: write at 0x100, read at 0x180"),
        (report((ROLE, 0x24D0, 0x2580), errors=3), "2 of another kind"),
        ("========= Internal Sanitizer Error\n", "no summary"),
    ],
    ids=["a kernel without roles", "read before", "far apart", "a second pair", "another kind", "no summary"],
)
def test_what_is_left(output: str, left: str) -> None:
    assert races(output, {ROLE}) == [left]
