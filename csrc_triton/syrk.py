"""`syrk_accumulate`: the lower triangle of `x.T @ x` at tensor-core speed, added to a float64 matrix.

Each program owns one tile of the triangle. Its sum has three levels:

1. tensor-core chains of `window` tokens, in float32 (Hopper's round toward zero: the error of a chain is a *bias* that grows
   faster than its length, so chains are short);
2. a pair of float32 numbers a tile entry, `high + low`, to which each chain is added by Kahan's compensated summation;
3. the float64 matrix, read and written once a launch.

Kahan's next summand is "what the last addition lost, plus the next chain", so a chain *starts* from `low` instead of zero: the
tensor core itself adds the two, and the two levels need two float32 registers an entry, as many as a plain fused sum with a
separate accumulator. Nothing is atomic, and every tile has one owner: equal inputs give equal bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from nullspace.csrc_triton.tiles import DOUBLE, Tiling, tiling_for, triangle_tiles
from nullspace.errors import InputError, InputTypeError

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def _operand(
    x,
    listed,
    start,
    column,
    tokens,
    d,
    stride,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    GATHER: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """(BLOCK_K, BLOCK) of x, or of its rows that are listed, from row `start` and `column` on; zero outside of it."""
    if DESCRIPTOR:
        tile = x.load([start, column])
    else:
        rows = start + tl.arange(0, BLOCK_K)
        columns = column + tl.arange(0, BLOCK)
        inside = (rows < tokens)[:, None] & (columns < d)[None, :]
        source = tl.load(listed + rows, mask=rows < tokens, other=0).to(tl.int64) if GATHER else rows.to(tl.int64)
        tile = tl.load(x + source[:, None] * stride + columns[None, :], mask=inside, other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def _collect(high, low):
    """Kahan's step: adds low, a chain that started from the last step's error, to high; returns the sum and its error."""
    total = high + low
    return total, low - (total - high)


@triton.jit
def _halves(tile):
    """The left and the right half of the columns."""
    return tile.reshape(tile.shape[0], 2, tile.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def _add(g, high, low, row, column, d, stride):
    """Add high + low to the part of g's triangle whose first entry is g[row, column]."""
    rows = tl.arange(0, high.shape[0])[:, None]
    columns = tl.arange(0, high.shape[1])[None, :]
    inside = (row + rows < d) & (column + columns <= row + rows)
    entries = g + rows * stride + columns
    tl.store(entries, tl.load(entries, mask=inside) + (high.to(tl.float64) + low.to(tl.float64)), mask=inside)


@triton.jit
def _add_tile(
    g,
    x,
    listed,
    tile,
    tokens,
    d,
    stride,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WINDOW: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    GATHER: tl.constexpr,
    PRODUCTS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Add one tile of the product of `tokens` rows of x: the first ones, or those that are listed."""
    row = tl.load(tile).to(tl.int32) * BLOCK
    column = tl.load(tile + 1).to(tl.int32) * BLOCK
    high = tl.zeros((BLOCK, BLOCK), tl.float32)
    low = tl.zeros((BLOCK, BLOCK), tl.float32)
    # One flat loop: a nested one would drain the pipeline at the end of every window. On Hopper a step is a whole window: under a
    # condition some versions of ptxas wait for every single product (test_compiled.py checks for that).
    for start in tl.range(0, tokens, BLOCK_K):
        left = _operand(x, listed, start, row, tokens, d, stride, BLOCK, BLOCK_K, DESCRIPTOR, GATHER, UPCAST)
        right = _operand(x, listed, start, column, tokens, d, stride, BLOCK, BLOCK_K, DESCRIPTOR, GATHER, UPCAST)
        low = tl.dot(left.T, right, low, input_precision=PRODUCTS)
        if WINDOW == BLOCK_K:  # noqa: SIM114 (known to the compiler; the other condition is not)
            high, low = _collect(high, low)
        elif start % WINDOW == WINDOW - BLOCK_K:
            high, low = _collect(high, low)
    # If the last window is incomplete, its chain is still in `low`: high + low includes it, and is exact enough.
    g += tl.load(tile + 2)
    stride_g = tl.load(tile + 3)
    # A quarter at a time: float64 entries and their addresses are six registers each.
    WIDTH: tl.constexpr = BLOCK // 4
    high_left, high_right = _halves(high)
    low_left, low_right = _halves(low)
    high_0, high_1 = _halves(high_left)
    low_0, low_1 = _halves(low_left)
    _add(g, high_0, low_0, row, column, d, stride_g)
    _add(g + WIDTH, high_1, low_1, row, column + WIDTH, d, stride_g)
    high_2, high_3 = _halves(high_right)
    low_2, low_3 = _halves(low_right)
    _add(g + 2 * WIDTH, high_2, low_2, row, column + 2 * WIDTH, d, stride_g)
    _add(g + 3 * WIDTH, high_3, low_3, row, column + 3 * WIDTH, d, stride_g)


@triton.jit(do_not_specialize=["tokens"])
def _syrk(
    g,
    x,
    tiles,
    tokens,
    d,
    stride,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WINDOW: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRODUCTS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    tile = tiles + 4 * tl.program_id(0)
    _add_tile(g, x, x, tile, tokens, d, stride, BLOCK, BLOCK_K, WINDOW, DESCRIPTOR, False, PRODUCTS, UPCAST)


@triton.jit
def _selected(x, rows, start, selected, columns, d, stride, BLOCK_K: tl.constexpr):
    """(BLOCK_K, BLOCK) float64: the given columns of the rows of x that `rows` lists from `start` on; zero from `selected` on."""
    k = start + tl.arange(0, BLOCK_K)
    source = x + tl.load(rows + k, mask=k < selected, other=0).to(tl.int64)[:, None] * stride
    return tl.load(source + columns[None, :], mask=(k < selected)[:, None] & (columns < d)[None, :], other=0.0).to(tl.float64)


@triton.jit
def _add_selected(g, x, tile, rows, selected, d, stride, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """Add one tile of the product of the `selected` rows of x that `rows` lists, in float64."""
    i = tl.load(tile).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    j = tl.load(tile + 1).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK, BLOCK), tl.float64)
    # Each step multiplies what the last one loaded. From a 16-bit load in the same step, Triton 3.6 would derive a layout that
    # float64 products do not support; operands that a loop carries have no such origin.
    left = _selected(x, rows, 0, selected, i, d, stride, BLOCK_K)
    right = _selected(x, rows, 0, selected, j, d, stride, BLOCK_K)
    for start in tl.range(BLOCK_K, selected + BLOCK_K, BLOCK_K):
        next_left = _selected(x, rows, start, selected, i, d, stride, BLOCK_K)
        next_right = _selected(x, rows, start, selected, j, d, stride, BLOCK_K)
        total = tl.dot(left.T, right, total, out_dtype=tl.float64)
        left, right = next_left, next_right
    inside = (i[:, None] < d) & (j[None, :] <= i[:, None])
    down, across = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    entries = g + tl.load(tile + 2) + down * tl.load(tile + 3) + across
    tl.store(entries, tl.load(entries, mask=inside) + total, mask=inside)


@triton.jit(do_not_specialize=["tile_count"])
def _syrk_rows(g, x, tiles, tile_count, rows, count, d, stride, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    selected = tl.load(count).to(tl.int32)
    # As many programs as fill the device loop over the tiles. With no row selected, the usual case, they end at once.
    last = tl.where(selected > 0, tile_count, 0)
    for index in tl.range(tl.program_id(0), last, tl.num_programs(0)):
        _add_selected(g, x, tiles + 4 * index, rows, selected, d, stride, BLOCK, BLOCK_K)


INTERPRETED = isinstance(_syrk, InterpretedFunction)


def syrk_accumulate(g: torch.Tensor, x: torch.Tensor, *, panel_rows: int | None = None, tiling: Tiling | None = None) -> None:
    """Add the lower triangle of `x.T @ x` into `g`, in place; the strict upper triangle is left as it is.

    16-bit inputs: every product is exact. float32 inputs: three TF32 products stand for each (`tf32x3`), which is float32's own
    accuracy. The sum is that of the module's docstring: measured against float64, what of its error is not proportional to the
    result is a few 1e-8 of ‖xᵀx‖_F, whatever the number of tokens. The same input gives the same bits.

    Args:
        g: float64 on a CUDA device: (d, d) with a contiguous last axis, or, with `panel_rows`, the packed row panels of
            `LowerTriangle` (1-D, contiguous).
        x: (tokens, d) in bfloat16, float16 or float32, on the same device; rows may be strided, the last axis is contiguous.
            No row may hold NaN or Inf, or a norm whose square overflows float32.
        panel_rows: rows of a packed panel, a multiple of the tile.
        tiling: the shape of the work; None: the table's choice for this device (`nullspace.csrc_triton.tiles`).

    Raises:
        ValueError: for a shape, stride, device or tiling that does not fit.
        TypeError: for another dtype.
    """
    _check(g, x, panel_rows)
    tokens, d = x.shape
    if tokens == 0:
        return
    chosen = tiling or tiling_for(x.dtype, x.device)
    check_steps(chosen)
    tiles = _tiles(g, d, chosen.block, panel_rows)
    descriptor = chosen.descriptor and _describable(x)
    with _on(x.device):
        _syrk[(len(tiles),)](
            g,
            TensorDescriptor.from_tensor(x, [chosen.block_k, chosen.block]) if descriptor else x,
            tiles,
            tokens,
            d,
            x.stride(0),
            BLOCK=chosen.block,
            BLOCK_K=chosen.block_k,
            WINDOW=chosen.window,
            DESCRIPTOR=descriptor,
            PRODUCTS="tf32x3" if x.dtype == torch.float32 else "ieee",
            # The interpreter multiplies the bits of bfloat16 numbers as if they were integers.
            UPCAST=INTERPRETED and x.dtype == torch.bfloat16,
            num_warps=chosen.warps,
            num_stages=chosen.stages,
            enable_fp_fusion=False,
        )


def syrk_accumulate_rows(
    g: torch.Tensor, x: torch.Tensor, rows: torch.Tensor, count: torch.Tensor, *, panel_rows: int | None = None
) -> None:
    """Add the lower triangle of `s.T @ s` into `g`, s being the rows `rows[:count]` of x; every product is taken in float64.

    `count` is read on the device: the host does not wait for it.

    Args:
        g, x, panel_rows: as in `syrk_accumulate`.
        rows: (≥ count,) int32 or int64: indices into x, on its device. Only the first `count` are read.
        count: one int32 or int64, on the device.

    Raises:
        ValueError, TypeError: as in `syrk_accumulate`.
    """
    _check(g, x, panel_rows)
    tokens, d = x.shape
    if tokens == 0 or len(rows) == 0:
        return
    tiles = _tiles(g, d, DOUBLE.block, panel_rows)
    with _on(x.device):
        _syrk_rows[(min(len(tiles), _programs(x.device)),)](
            g,
            x,
            tiles,
            len(tiles),
            rows,
            count,
            d,
            x.stride(0),
            BLOCK=DOUBLE.block,
            BLOCK_K=DOUBLE.block_k,
            num_warps=DOUBLE.warps,
            num_stages=DOUBLE.stages,
            enable_fp_fusion=True,
        )


def check_steps(tiling: Tiling) -> None:
    """Raise `ValueError` unless a window is made of whole steps."""
    if tiling.window % tiling.block_k != 0:
        raise InputError(f"a window of {tiling.window} tokens is not made of whole steps of {tiling.block_k}")


def check_input(g: torch.Tensor, x: torch.Tensor) -> None:
    """Raise `TypeError` or `ValueError` for dtypes, devices or a shape or stride of x that the kernels do not take."""
    if x.dtype not in DTYPES:
        raise InputTypeError(f"x must be bfloat16, float16 or float32, not {x.dtype}")
    if g.dtype != torch.float64:
        raise InputTypeError(f"g must be float64, not {g.dtype}")
    if x.ndim != 2 or x.shape[1] < 1:
        raise InputError(f"x must be (tokens, d) with d ≥ 1, not {tuple(x.shape)}")
    if x.shape[1] > 1 and x.stride(1) != 1:
        raise InputError(f"the last axis of x must be contiguous; its strides are {x.stride()}")
    if g.device != x.device:
        raise InputError(f"g is on {g.device} and x on {x.device}")


def _check(g: torch.Tensor, x: torch.Tensor, panel_rows: int | None) -> None:
    check_input(g, x)
    d = x.shape[1]
    if panel_rows is None:
        if g.shape != (d, d) or (d > 1 and (g.stride(1) != 1 or g.stride(0) < d)):
            raise InputError(f"g must be ({d}, {d}) with a contiguous last axis; it is {tuple(g.shape)} with strides {g.stride()}")
    elif g.ndim != 1 or not g.is_contiguous() or len(g) != packed_size(d, panel_rows):
        raise InputError(
            f"g must be {packed_size(d, panel_rows)} numbers (d = {d}, {panel_rows} rows a panel), not {tuple(g.shape)}"
        )


def packed_size(d: int, panel_rows: int) -> int:
    """Entries of a lower triangle of order d, packed as row panels."""
    full = d // panel_rows
    return panel_rows**2 * (full * (full + 1) // 2) + (d - full * panel_rows) * d


def _tiles(g: torch.Tensor, d: int, block: int, panel_rows: int | None) -> torch.Tensor:
    if panel_rows is not None and panel_rows % block != 0:
        raise InputError(f"a panel of {panel_rows} rows is not made of whole tiles of {block}")
    return triangle_tiles(d, block, g.stride(0) if panel_rows is None else 0, panel_rows, g.device)


def _describable(x: torch.Tensor) -> bool:
    """Whether a tensor descriptor can address x: 16-byte steps from row to row, and rows that do not overlap."""
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.itemsize % 16 == 0
    return aligned and x.stride(0) >= x.shape[1] and x.stride(1) == 1


def _programs(device: torch.device) -> int:
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _on(device: torch.device) -> torch.cuda.device:
    """A context in which the device of the tensors is the current one, on which Triton launches."""
    return torch.cuda.device(device if device.type == "cuda" else -1)
