"""The tiling of a kernel on a device, and the order in which it visits the tiles of a triangle."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

# Block rows that are visited together, column by column, so that their operands stay in the L2 cache.
GROUP = 8
# Columns whose triangle has about as many tiles of 128 as a GPU has multiprocessors (136). Below, tiles are too few.
NARROW = 2048


# How the sum of a tile is formed; the module docstring of `syrk` says why chains are short.
#   kahan         chains of `window` tokens, added to a float32 pair by Kahan's compensated summation
#   plain         chains of `window` tokens, added to one float32 number: fewer registers, and each addition rounds
#   gluon-kahan,  the same sums in Gluon, for Hopper: a warp loads, and two warpgroups, of half a tile each, do not wait for each
#   gluon-plain   other
#   gemm          cuBLAS products of `window` tokens, full squares in float32, added in float64
VARIANTS = ("kahan", "plain", "gluon-kahan", "gluon-plain", "gemm")
# The variant of plain Triton that takes the place of another where that cannot run: the same chains, added with the same rounding
# (float64, of gemm, and Kahan's pair both add nothing to the error of the chains), so that the account of errors holds.
IN_TRITON = {"gluon-kahan": "kahan", "gluon-plain": "plain", "gemm": "kahan"}


class Tiling(NamedTuple):
    """The shape of one program's work.

    Attributes:
        block: rows and columns of an output tile.
        block_k: tokens a step of the pipeline.
        window: tokens a tensor-core chain, a multiple of `block_k`.
        warps: warps a program that multiply.
        stages: depth of the software pipeline.
        descriptor: operands through tensor descriptors (TMA), where the input's alignment allows it.
        variant: how chains are added, one of `VARIANTS`.
        splits: programs a tile. Each sums an equal part of the tokens into a float64 triangle of its own, and these are added:
            for widths whose tiles are too few for a GPU.
    """

    block: int
    block_k: int
    window: int
    warps: int
    stages: int
    descriptor: bool
    variant: str = "kahan"
    splits: int = 1

    def in_triton(self) -> Tiling:
        """The tiling of plain Triton whose sum has the same errors."""
        return self._replace(variant=IN_TRITON.get(self.variant, self.variant))


# For 16-bit inputs, by compute capability and by the smallest width that a tiling serves. `python -m benchmarks.first_gpu.kernels
# --sweep` prints such rows. Hopper's are the fastest on an H100 of those that lose 3e-8 or less of inputs of 48 columns, steep or
# not: times as fast as cuBLAS's full product, 16k tokens (`benchmarks/results/first_gpu-h100/kernels.json`, `more.json`),
#     window       64     128    192    256    320    512    128, one addition    128, Gluon
#     4096         0.82   1.15   1.31   1.32   1.34   1.00   1.29                 1.01
#     14336        0.79   1.10   1.28   1.35   1.43   1.46   1.30                 0.94
#     resolution   –      2.6e-8 4.1e-8 6.2e-8 8.1e-8 1.5e-7 4.4e-8 to 1.7e-7     2.6e-8
# From 192 on the L2 cache binds, not arithmetic. Tiles of 64 and of 128, with windows of 256 and 8k tokens: 0.66 and 0.30 at
# d = 576, 0.85 and 0.57 at 1024, 0.71 and 0.72 at 2048.
# Windows: Hopper rounds once in 16 tokens, 25 binary places behind the largest product; Ampere once in 8, 24 places behind, and
# needs windows half as long for the same resolution (simulated: benchmarks/resolution.py). Ampere's row is not timed: the compiled
# loop keeps everything in registers, and shared memory fits (tests/csrc_triton/test_compiled.py). Other devices get it.
HALF = {
    (9, 0): {
        1: Tiling(block=64, block_k=64, window=128, warps=4, stages=3, descriptor=True),
        2048: Tiling(block=128, block_k=128, window=128, warps=8, stages=3, descriptor=True),
    },
    (8, 0): {1: Tiling(block=128, block_k=32, window=64, warps=8, stages=4, descriptor=False)},
}
HALF_DEFAULT = {1: Tiling(block=128, block_k=32, window=64, warps=8, stages=3, descriptor=False)}
# float32 inputs: three TF32 products a step, and twice the shared memory.
SINGLE = Tiling(block=64, block_k=16, window=128, warps=4, stages=3, descriptor=False)
# Selected rows, products in float64.
DOUBLE = Tiling(block=64, block_k=16, window=0, warps=4, stages=1, descriptor=False)


def table_of(dtype: torch.dtype, device: torch.device) -> dict[int, Tiling]:
    """The tilings for inputs of `dtype` on `device`, by the smallest width that each serves."""
    if dtype == torch.float32:
        return {1: SINGLE}
    return HALF.get(torch.cuda.get_device_capability(device), HALF_DEFAULT) if device.type == "cuda" else HALF_DEFAULT


def tiling_for(dtype: torch.dtype, device: torch.device, d: int) -> Tiling:
    """The tiling of `syrk_accumulate` for inputs of `dtype` and d columns on `device`."""
    by_width = table_of(dtype, device)
    return by_width[max(width for width in by_width if width <= d)]


def candidates(dtype: torch.dtype, device: torch.device, d: int) -> list[Tiling]:
    """Tilings that may be the fastest at a width, for a benchmark to time. Some may not fit a device's shared memory."""
    base = tiling_for(dtype, device, d)
    if dtype == torch.float32:
        return [base, base._replace(variant="plain"), base._replace(stages=base.stages + 1)]
    result = [base._replace(variant=variant) for variant in ("kahan", "plain")]
    if device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0):
        for step, stages in ((128, 3), (64, 6)):
            whole = Tiling(block=128, block_k=step, window=step, warps=8, stages=stages, descriptor=True)
            result += [whole._replace(variant=variant) for variant in ("kahan", "plain", "gluon-kahan", "gluon-plain")]
        result += [Tiling(block=128, block_k=64, window=window, warps=8, stages=4, descriptor=True) for window in (128, 192, 256)]
    else:
        result += [base._replace(block_k=64), base._replace(stages=base.stages + 1), base._replace(window=2 * base.window)]
    if d < 2 * NARROW:
        small = base._replace(block=64, block_k=min(base.block_k, 64), warps=4)
        result += [base._replace(splits=splits) for splits in (2, 4, 8)] + [small, small._replace(splits=2)]
        result += [base._replace(window=window, variant="gemm") for window in (256, 512)]
    return list(dict.fromkeys(result))


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
