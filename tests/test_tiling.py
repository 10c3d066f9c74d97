"""How the persistent sm_90 kernels share out their tiles: aot/hopper.py's own functions, run as Python, CTA by CTA.

They are arithmetic of whole numbers and no more, so that what they read as `gl` and `tl` is a few lines here.
"""

from __future__ import annotations

import random
from types import FunctionType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton", reason="needs the build's environment", exc_type=ImportError)

from aot import hopper, kernels

HELPERS = (
    hopper.are_beside,
    hopper.full_box,
    hopper.last_wave,
    hopper.narrow_columns,
    hopper.piece_time,
    hopper.read_time,
    hopper.tile_time,
    kernels.tile_position,
)


class Launch:
    """`ctas` CTAs of a kernel, or clusters of them, and which of them is run."""

    def __init__(self, ctas: int) -> None:
        self.ctas, self.cta = ctas, 0
        gl = SimpleNamespace(
            where=lambda condition, then, other: then if condition else other,
            cdiv=lambda a, b: -(-a // b),
            minimum=min,
            maximum=max,
            static_range=range,
            num_programs=lambda axis: self.ctas,
            program_id=lambda axis: self.cta,
        )
        constants = {name: getattr(hopper, name).value for name in ("FEW_COLUMNS", "L2_BYTES")}
        self.names: dict[str, Any] = {"gl": gl, "tl": gl, **constants}
        for helper in HELPERS:
            self.names[helper.fn.__name__] = self.python(helper)

    def python(self, function: Any) -> FunctionType:
        return FunctionType(function.fn.__code__, self.names)

    def narrow(self, m: int, n: int, tile_m: int, tile_n: int, pieces: int, k: int = 64, x_bytes: int = 2) -> int:
        return self.names["narrow_columns"](m, n, k, x_bytes, tile_m, tile_n, max(1, tile_m // 128), pieces)

    def tiling(self, m: int, n: int, tile_m: int, tile_n: int, pieces: int) -> Any:
        """A Tiling, but for K."""
        methods = {name: self.python(each) for name, each in vars(hopper.Tiling).items() if hasattr(each, "fn")}
        tiling = type("Tiling", (), methods)()
        tiling.M, tiling.N, tiling.TILE_M, tiling.TILE_N, tiling.PIECES = m, n, tile_m, tile_n, pieces
        tiling.narrow = self.narrow(m, n, tile_m, tile_n, pieces)
        return tiling


def walk(launch: Launch, tiling: Any) -> list[list[tuple[int, int, int]]]:
    """(tile, piece, columns) of what each CTA computes, in the order of load() and consume()."""
    found: list[list[tuple[int, int, int]]] = []
    for cta in range(launch.ctas):
        launch.cta = cta
        found.append([])
        for tile in range(cta, tiling.whole(), launch.ctas):
            found[-1].append((tile, 0, tiling.TILE_N))
        for pieces in range(2, tiling.PIECES + 1, 2):
            begin, end = tiling.share(pieces)
            for number in range(begin, end):
                found[-1].append((*tiling.piece(number, pieces), tiling.TILE_N // pieces))
    return found


@pytest.mark.parametrize("pieces", [1, 2, 4])
@pytest.mark.parametrize("ctas", [1, 3, 10, 66, 132])
def test_ctas_compute_every_element_and_no_block_twice(pieces: int, ctas: int) -> None:
    draw = random.Random(ctas)
    sizes = [
        (draw.randint(1, draw.choice((60, 300, 1500))), draw.randint(1, draw.choice((60, 700)))) for _ in range(60)
    ]
    narrow = 0
    for m, n in sizes:
        launch = Launch(ctas)
        tiling = launch.tiling(m, n, 16, 32, pieces)
        narrow += tiling.narrow > 1
        blocks = [block for each in walk(launch, tiling) for block in each]
        assert len(set(blocks)) == len(blocks), (m, n)
        seen = np.zeros((m, n), bool)
        for tile, piece, columns in blocks:
            row, column = tiling.origin(tile, piece, columns)
            # One of a matrix smaller than a tile begins at 0 and runs over its end.
            assert (row + 16 <= m or row == 0) and (column + columns <= n or column == 0), (m, n)
            seen[row : row + 16, column : column + columns] = True
        assert seen.all(), (m, n)
    assert bool(narrow) == (pieces == 4), "narrow last columns where there can be none, or no shape that has them"


@pytest.mark.parametrize("pieces", [2, 4])
def test_the_tiles_of_a_last_wave_are_cut_if_their_pieces_have_a_place(pieces: int) -> None:
    for tiles, cut in ((33, 4), (34, 2), (66, 2), (67, 1), (132, 1), (132 + 33, 4), (132 + 66, 2)):
        launch = Launch(132)
        computed = walk(launch, launch.tiling(128 * tiles, 256, 128, 256, pieces))
        smaller = {columns for each in computed for _, _, columns in each} - {256}
        assert smaller == ({256 // min(cut, pieces)} if cut > 1 else set()), tiles
        assert max(map(len, computed)) == -(-tiles // 132)


def test_narrow_last_columns_are_pieces_if_they_take_no_longer() -> None:
    # Rows of tiles: 3 of a tile in quarters and half of one, 20 of one in quarters and a quarter, 40 of one in halves
    # and a quarter; for 50 of those, or 53, there is no place, so all are tiles; and 3 of one and more than half.
    sizes = ((300, 336), (2560, 280), (5120, 280), (6400, 280), (6706, 280), (300, 392))
    assert [Launch(132).narrow(m, n, 128, 256, 4) for m, n in sizes] == [2, 4, 4, 1, 1, 1]
    # Of tiles of twice the rows on 66 clusters: as above, but no place for 25 and 27.
    assert [Launch(66).narrow(m, n, 256, 256, 4) for m, n in sizes] == [2, 4, 4, 1, 1, 1]
    # What would read a large x once more: after the tiles, or beside the last of several waves, but not of one.
    for m, n, k, x_bytes, pieces in (
        (13282, 616, 8088, 4, 1), (13282, 616, 512, 4, 2), (13282, 616, 8088, 2, 1), (4541, 368, 13024, 4, 2),
        (10807, 64, 4936, 4, 4), (4096, 4104, 4096, 4, 4), (60000, 4104, 4096, 4, 1)
    ):  # fmt: skip
        assert Launch(66).narrow(m, n, 256, 256, 4, k, x_bytes) == pieces, (m, n, k)
    # Tiles of half the elements take half the time, in which half of those bytes come: of twice they were pieces.
    assert [Launch(132).narrow(4768, 400, 128, 128, 4, k, 4) for k in (512, 8000)] == [4, 1]
    # 16 CTAs have no tile in the last wave, and each has the time for two quarters, if the kernel cuts any.
    launch = Launch(132)
    assert [launch.narrow(4096, 4104, 128, 256, pieces) for pieces in (4, 2, 1)] == [4, 1, 1]
    computed = walk(launch, launch.tiling(4096, 4104, 128, 256, 4))
    assert sorted(sum(columns == 64 for _, _, columns in each) for each in computed) == [0] * 116 + [2] * 16
