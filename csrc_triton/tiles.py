"""The tiling of a kernel on a device, and the order in which it visits the tiles of a triangle."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

# Block rows that are visited together, column by column, so that their operands stay in the L2 cache.
GROUP = 8


class Tiling(NamedTuple):
    """The shape of one program's work.

    Attributes:
        block: rows and columns of an output tile.
        block_k: tokens a step of the pipeline.
        window: tokens a tensor-core chain, a multiple of `block_k`; a chain's sum goes into the compensated float32 pair.
        warps: warps a program.
        stages: depth of the software pipeline.
        descriptor: operands through tensor descriptors (TMA), where the input's alignment allows it.
    """

    block: int
    block_k: int
    window: int
    warps: int
    stages: int
    descriptor: bool


# By compute capability, for 16-bit inputs. None was timed yet. Known is that the compiled loop keeps everything in
# registers and that shared memory fits (tests/csrc_triton/test_compiled.py). `python -m benchmarks.gpu_syrk` times them.
# Windows: Hopper rounds once in 16 tokens, 25 binary places behind the largest product; Ampere once in 8, 24 places behind, and
# needs windows half as long for the same resolution (simulated: tests/tensor_core.py). Other devices get Ampere's.
HALF = {
    (9, 0): Tiling(block=128, block_k=128, window=128, warps=8, stages=3, descriptor=True),
    (8, 0): Tiling(block=128, block_k=32, window=64, warps=8, stages=4, descriptor=False),
}
HALF_DEFAULT = Tiling(block=128, block_k=32, window=64, warps=8, stages=3, descriptor=False)
# float32 inputs: three TF32 products a step, and twice the shared memory.
SINGLE = Tiling(block=64, block_k=16, window=128, warps=4, stages=3, descriptor=False)
# Selected rows, products in float64.
DOUBLE = Tiling(block=64, block_k=16, window=0, warps=4, stages=1, descriptor=False)


def tiling_for(dtype: torch.dtype, device: torch.device) -> Tiling:
    """The tiling of `syrk_accumulate` for inputs of `dtype` on `device`."""
    if dtype == torch.float32:
        return SINGLE
    return HALF.get(torch.cuda.get_device_capability(device), HALF_DEFAULT) if device.type == "cuda" else HALF_DEFAULT


@functools.lru_cache(maxsize=64)
def triangle_tiles(d: int, block: int, leading: int, panel_rows: int | None, device: torch.device) -> torch.Tensor:
    """The tiles of a lower triangle of order d, in the order in which to visit them.

    Args:
        d: order of the matrix.
        block: rows and columns of a tile.
        leading: elements from one row of a (d, d) matrix to the next.
        panel_rows: None for a (d, d) matrix; else the matrix is packed as row panels, as `LowerTriangle` keeps it: panel p
            holds rows [p · panel_rows, (p + 1) · panel_rows) and the columns up to its last row's, one panel behind the other.
        device: where the list is wanted.

    Returns:
        (tiles, 4) int64: block row, block column, offset of the tile's first element, elements from one of its rows to the next.
    """
    blocks = -(-d // block)
    i, j = torch.tril_indices(blocks, blocks)
    order = ((i // GROUP * blocks + j) * blocks + i).argsort()
    i, j = i[order], j[order]
    row, column = i * block, j * block
    if panel_rows is None:
        stride = torch.full_like(i, leading)
        offset = row * leading + column
    else:
        panel = row // panel_rows
        stride = ((panel + 1) * panel_rows).clamp(max=d)
        offset = panel_rows**2 * (panel * (panel + 1) // 2) + (row - panel * panel_rows) * stride + column
    return torch.stack([i, j, offset, stride], dim=1).to(device)
