"""What is taken from racecheck's report for its one mistake, and what is not."""

from __future__ import annotations

import pytest

from tests.sanitize import races

ROLE = "lbg_fused_f16_f16_64x32x128_w8_s8_ring"
PLAIN = "lbg_fused_f16_f16_64x64x32_w4_s2_any"


def report(*pairs: tuple[str, int, int], errors: int | None = None) -> str:
    lines = [
        f"========= Error: Race reported between Write access at {kernel}+{write:#x}\n"
        f"=========     and Read access at {kernel}+{read:#x} [5 hazards]\n========= \n"
        for kernel, write, read in pairs
    ]
    count = len(pairs) if errors is None else errors
    return "".join(lines) + f"========= RACECHECK SUMMARY: {count} hazards displayed ({count} errors, 0 warnings)\n"


def of_cluster(read: int, *writes: int) -> str:
    """A report of more than two accesses begins with the read."""
    return (
        f"========= Error: Race reported between Read access at {ROLE}+{read:#x}\n"
        + "".join(f"=========     and Write access at {ROLE}+{write:#x} [9 hazards]\n" for write in writes)
        + "========= \n========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n"
    )


def test_two_writes_are_a_clusters_alone() -> None:
    left = races(of_cluster(0x51F0, 0x5180, 0x5190), {ROLE: 1})
    assert left == [f"{ROLE}: read at 0x51f0, write at 0x5180, write at 0x5190"]


def test_nothing_is_left_of_a_clusters_two_writes() -> None:
    assert races(of_cluster(0x51F0, 0x5080, 0x5130), {ROLE: 2}) == []


@pytest.mark.parametrize("accesses", [(0x51F0, 0x4080, 0x5130), (0x51F0, 0x5080, 0x5100, 0x5130), (0x5080, 0x51F0)])
def test_other_writes_are_left(accesses: tuple[int, ...]) -> None:
    told = ", ".join(f"write at {write:#x}" for write in accesses[1:])
    assert races(of_cluster(*accesses), {ROLE: 2}) == [f"{ROLE}: read at {accesses[0]:#x}, {told}"]


@pytest.mark.parametrize("pairs", [(), ((ROLE, 0x24D0, 0x2580),)], ids=["nothing", "the mistake"])
def test_nothing_is_left(pairs: tuple[tuple[str, int, int], ...]) -> None:
    assert races(report(*pairs), {ROLE: 1}) == []


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
    assert races(output, {ROLE: 1}) == [left]
