"""The variants `gluon-kahan` and `gluon-plain` of `syrk_accumulate`, for Hopper's warpgroup products.

A program owns a 128 × 128 tile, as in `syrk`, and sums it by the same chains. One warp fills a ring of `stages` windows of both
operands. Two warpgroups, of 64 rows of the tile each, multiply and add; they share the ring and have no barrier in common, so that
one adds while the other multiplies. Gluon's names belong to a version of Triton: import this module through `syrk.gluon_obstacle`.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Triton 3.9 has the first name, 3.6 the second.
_copy_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
# Registers of a thread of the second warpgroup, and of the loading warp; the first warpgroup has what is left.
REGISTERS = {"kahan": 240, "plain": 200}


@gluon.jit
def _load(xa, xb, row, column, first, last, a, b, ready, empty, BLOCK_K: gl.constexpr, STAGES: gl.constexpr):
    for start in range(first, last, BLOCK_K):
        step = (start - first) // BLOCK_K
        stage = step % STAGES
        # A barrier that nobody has completed yet counts as having completed the phase before its first.
        mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
        bar = ready.index(stage)
        mbarrier.expect(bar, 2 * BLOCK_K * 128 * 2)  # bytes: both operands, 128 columns of 16 bits
        _copy_tile(xa, [start, row], bar, a.index(2 * stage))
        _copy_tile(xa, [start, row + 64], bar, a.index(2 * stage + 1))
        _copy_tile(xb, [start, column], bar, b.index(stage))


@gluon.jit
def _consume(
    g,
    tile,
    row,
    column,
    d,
    first,
    last,
    a,
    b,
    ready,
    empty,
    HALF: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    VARIANT: gl.constexpr,
):
    """Sum 64 rows of a tile, the upper or the lower half, and add them to g."""
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16])
    high = gl.zeros([64, 128], gl.float32, layout)
    low = gl.zeros([64, 128], gl.float32, layout)
    for start in range(first, last, BLOCK_K):
        step = (start - first) // BLOCK_K
        stage = step % STAGES
        mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
        left = a.index(2 * stage + HALF).permute([1, 0])
        if VARIANT == "kahan":
            low = warpgroup_mma(left, b.index(stage), low, is_async=True)
            low = warpgroup_mma_wait(0, deps=[low])
            mbarrier.arrive(empty.index(stage), count=1)
            total = high + low
            low = low - (total - high)
            high = total
        else:
            zero = gl.zeros([64, 128], gl.float32, layout)
            chain = warpgroup_mma(left, b.index(stage), zero, use_acc=False, is_async=True)
            chain = warpgroup_mma_wait(0, deps=[chain])
            mbarrier.arrive(empty.index(stage), count=1)
            high = high + chain
    rows = HALF * 64 + gl.arange(0, 64, gl.SliceLayout(1, layout))
    columns = gl.arange(0, 128, gl.SliceLayout(0, layout))
    inside = (row + rows < d)[:, None] & ((column + columns)[None, :] <= (row + rows)[:, None])
    entries = g + gl.load(tile + 2) + rows.to(gl.int64)[:, None] * gl.load(tile + 3) + columns[None, :]
    gl.store(entries, gl.load(entries, mask=inside, other=0.0) + (high.to(gl.float64) + low.to(gl.float64)), mask=inside)


# A partition is a function, and two of one function must not share constants.
@gluon.jit
def _consume_upper(
    g, tile, row, column, d, first, last, a, b, ready, empty, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, VARIANT: gl.constexpr
):
    _consume(g, tile, row, column, d, first, last, a, b, ready, empty, 0, BLOCK_K, STAGES, VARIANT)


@gluon.jit
def _consume_lower(
    g, tile, row, column, d, first, last, a, b, ready, empty, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, VARIANT: gl.constexpr
):
    _consume(g, tile, row, column, d, first, last, a, b, ready, empty, 1, BLOCK_K, STAGES, VARIANT)


@gluon.jit(do_not_specialize=["tokens", "share"])
def _syrk_gluon(
    g,
    xa,
    xb,
    tiles,
    tokens,
    share,
    d,
    part_stride,
    DTYPE: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    VARIANT: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    tile = tiles + 4 * gl.program_id(0)
    row = gl.load(tile).to(gl.int32) * 128
    column = gl.load(tile + 1).to(gl.int32) * 128
    first = gl.program_id(1) * share
    last = gl.minimum(first + share, tokens)
    g += gl.program_id(1).to(gl.int64) * part_stride
    a = gl.allocate_shared_memory(DTYPE, [2 * STAGES, BLOCK_K, 64], xa.layout)
    b = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_K, 128], xb.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    gl.warp_specialize(
        [
            (_consume_upper, (g, tile, row, column, d, first, last, a, b, ready, empty, BLOCK_K, STAGES, VARIANT)),
            (_consume_lower, (g, tile, row, column, d, first, last, a, b, ready, empty, BLOCK_K, STAGES, VARIANT)),
            (_load, (xa, xb, row, column, first, last, a, b, ready, empty, BLOCK_K, STAGES)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )


def layouts(block_k: int, dtype: torch.dtype) -> tuple[gl.NVMMASharedLayout, gl.NVMMASharedLayout]:
    """The layouts of half a tile's rows and of its columns in shared memory."""
    kind = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    return tuple(gl.NVMMASharedLayout.get_default_for([block_k, width], kind) for width in (64, 128))


def launch(
    g: torch.Tensor, x: torch.Tensor, tiles: torch.Tensor, share: int, part_stride: int, *, block_k: int, stages: int, variant: str
) -> None:
    """Launch the kernel: `share` tokens a program, as many programs a tile as that makes."""
    (tokens, d), (half, whole) = x.shape, layouts(block_k, x.dtype)
    _syrk_gluon[(len(tiles), -(-tokens // share))](
        g,
        TensorDescriptor.from_tensor(x, [block_k, 64], half),
        TensorDescriptor.from_tensor(x, [block_k, 128], whole),
        tiles,
        tokens,
        share,
        d,
        part_stride,
        DTYPE=gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16,
        BLOCK_K=block_k,
        STAGES=stages,
        VARIANT=variant,
        REGISTERS=REGISTERS[variant],
        num_warps=4,
        enable_fp_fusion=False,
    )
