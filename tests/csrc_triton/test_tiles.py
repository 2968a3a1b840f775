"""The list of tiles: each tile of the triangle once, and where it lies."""

from __future__ import annotations

import pytest
import torch

from nullspace.csrc_triton.tiles import GROUP, triangle_tiles
from nullspace.moments.triangle import PANEL_ROWS, LowerTriangle

CPU = torch.device("cpu")
ORDERS = [1, 64, 65, 300, 1000, 4096, 28672]


@pytest.mark.slow
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("d", ORDERS)
def test_every_tile_of_the_triangle_is_visited_once(d: int, block: int) -> None:
    blocks = -(-d // block)
    visited = [(i, j) for i, j, _, _ in triangle_tiles(d, block, d, None, CPU).tolist()]
    assert len(visited) == blocks * (blocks + 1) // 2
    assert set(visited) == {(i, j) for i in range(blocks) for j in range(i + 1)}


def test_neighbours_in_time_share_operands() -> None:
    visited = triangle_tiles(28672, 128, 28672, None, CPU)[:, :2]
    for wave in visited.split(132)[:-1]:  # as many as an H100 has multiprocessors
        # A wave of full groups needs GROUP row blocks and about 132 / GROUP column blocks; row by row it would need 133.
        assert len(wave.flatten().unique()) <= 3 * GROUP + 132 // GROUP + 2


def test_offsets_into_a_square_do_not_overflow() -> None:
    d = 50_000  # 2.5e9 entries
    i, j, offset, stride = triangle_tiles(d, 128, d, None, CPU).T
    assert offset.dtype == torch.int64
    assert [int(o) for o in offset[:1000]] == [128 * int(a) * d + 128 * int(b) for a, b in zip(i[:1000], j[:1000], strict=True)]
    assert int(offset.max()) == 128 * int(i.max()) * d + 128 * int(i.max())
    assert (stride == d).all()


@pytest.mark.parametrize("block", [64, 128, PANEL_ROWS])
@pytest.mark.parametrize("d", [1, PANEL_ROWS - 1, PANEL_ROWS, PANEL_ROWS + 1, 3 * PANEL_ROWS + 70])
def test_offsets_into_panels_are_those_of_the_triangle(d: int, block: int) -> None:
    triangle = LowerTriangle(d)
    triangle.packed.copy_(torch.arange(len(triangle.packed)))
    square = triangle.square()  # entry (i, j), j ≤ i: where it lies in `packed`
    for i, j, offset, stride in triangle_tiles(d, block, 0, PANEL_ROWS, CPU).tolist():
        for row in (i * block, min((i + 1) * block, d) - 1):
            column = j * block
            assert offset + (row - i * block) * stride == int(square[row, column])


def test_offsets_into_panels_of_a_wide_matrix_do_not_overflow() -> None:
    d = 70_000  # 2.45e9 entries in the triangle
    _, _, offset, _ = triangle_tiles(d, 128, 0, PANEL_ROWS, CPU).T
    assert int(offset.min()) == 0
    assert 2**31 < int(offset.max()) < d * (d + PANEL_ROWS) // 2
