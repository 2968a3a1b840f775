"""`syrk_accumulate_grouped`: the products of `syrk_accumulate` for many groups of rows, each into its own matrix, in one launch.

The experts of a mixture get few tokens each: a launch an expert would leave most of a GPU idle. Here a program owns one tile of
one group's triangle. It sums that group's own rows, by the same three levels as `syrk_accumulate`, and ends at once if the group
has none. Rows may be listed by index: rows that arrived in any order need not be moved to be grouped.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nullspace.csrc_triton.selected import _add_selected, _programs, _selected, has_matrix_products
from nullspace.csrc_triton.syrk import INTERPRETED, _add_tile, _on, _tiles, check_input, check_tiling, packed_size
from nullspace.csrc_triton.tiles import DOUBLE, Tiling, tiling_for
from nullspace.errors import InputError, InputTypeError

# Columns of one program that sums rows.
COLUMNS = 128


@triton.jit
def _bounds(offsets, group, limit):
    """The first row of a group and how many there are, within the rows that exist."""
    begin = tl.load(offsets + group).to(tl.int64)
    end = tl.load(offsets + group + 1).to(tl.int64)
    return begin, (tl.minimum(end, limit) - begin).to(tl.int32)


@triton.jit(do_not_specialize=["tile_count", "limit"])
def _syrk_grouped(
    g,
    x,
    tiles,
    tile_count,
    listed,
    offsets,
    limit,
    d,
    stride,
    group_stride,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WINDOW: tl.constexpr,
    VARIANT: tl.constexpr,
    GATHER: tl.constexpr,
    PRODUCTS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    # Group by group: the programs that run together read the same rows.
    group = tl.program_id(0) // tile_count
    tile = tiles + 4 * (tl.program_id(0) % tile_count)
    begin, tokens = _bounds(offsets, group, limit)
    if tokens > 0:
        g += group.to(tl.int64) * group_stride
        if GATHER:
            listed += begin
        else:
            x += begin * stride
        _add_tile(
            g,
            x,
            listed,
            tile,
            0,
            tokens,
            tokens,
            d,
            stride,
            BLOCK,
            BLOCK_K,
            WINDOW,
            VARIANT,
            False,
            GATHER,
            PRODUCTS,
            INTERPRETED,
        )


@triton.jit(do_not_specialize=["tile_count", "limit", "programs"])
def _syrk_rows_grouped(
    g,
    x,
    tiles,
    tile_count,
    rows,
    offsets,
    limit,
    programs,
    d,
    stride,
    group_stride,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MATRIX: tl.constexpr,
):
    group = tl.program_id(0) // programs
    begin, selected = _bounds(offsets, group, limit)
    g += group.to(tl.int64) * group_stride
    last = tl.where(selected > 0, tile_count, 0)
    for index in tl.range(tl.program_id(0) % programs, last, programs):
        _add_selected(g, x, tiles + 4 * index, rows + begin, selected, d, stride, BLOCK, BLOCK_K, MATRIX)


@triton.jit(do_not_specialize=["limit"])
def _sum_rows(total, x, rows, offsets, limit, d, stride, BLOCK_K: tl.constexpr, COLUMNS: tl.constexpr):
    group = tl.program_id(0)
    begin, selected = _bounds(offsets, group, limit)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    if selected > 0:
        sums = tl.zeros((COLUMNS,), tl.float64)
        for start in tl.range(0, selected, BLOCK_K):
            sums += tl.sum(_selected(x, rows + begin, start, selected, columns, d, stride, BLOCK_K), axis=0)
        entries = total + group.to(tl.int64) * d + columns
        tl.store(entries, tl.load(entries, mask=columns < d) + sums, mask=columns < d)


def syrk_accumulate_grouped(
    g: torch.Tensor,
    x: torch.Tensor,
    offsets: torch.Tensor,
    *,
    rows: torch.Tensor | None = None,
    panel_rows: int | None = None,
    tiling: Tiling | None = None,
) -> None:
    """Add the lower triangle of `s.T @ s` into `g[e]`, in place, s being the rows `offsets[e]` to `offsets[e + 1]` of x; for all e.

    The sums are those of `syrk_accumulate`, group by group, with the same precision. The offsets are read on the device: the host
    does not wait for it. The same input gives the same bits.

    Args:
        g: float64 on a CUDA device: (groups, d, d) with a contiguous last axis, or, with `panel_rows`, (groups, entries): a packed
            triangle of `LowerTriangle` a group, contiguous.
        x: (n, d) in bfloat16, float16 or float32, sorted by group, on the same device; rows may be strided, the last axis is
            contiguous. No row of a group may hold NaN or Inf, or a norm whose square overflows float32.
        offsets: (groups + 1,) int32 or int64 on the device, ascending, from 0 or more to n or less.
        rows: (m,) int32 or int64 on the device: row k of the sorted rows is row `rows[k]` of x; the offsets count these. None: x
            itself is sorted.
        panel_rows: rows of a packed panel, a multiple of the tile.
        tiling: the shape and the variant of the work; None: the table's choice for this device and width. The variants are those
            of plain Triton (others are replaced by `Tiling.in_triton`); descriptors and splits are not used.

    Raises:
        ValueError: for a shape, stride, device or tiling that does not fit.
        TypeError: for another dtype.
    """
    _check(g, x, offsets, rows, panel_rows)
    groups, d = len(g), x.shape[1]
    limit = len(x) if rows is None else len(rows)
    chosen = (tiling or tiling_for(x.dtype, x.device, d)).in_triton()
    check_tiling(chosen)
    if groups == 0 or limit == 0:
        return
    tiles = _tiles(g[0], d, chosen.block, panel_rows)
    with _on(x.device):
        _syrk_grouped[(groups * len(tiles),)](
            g,
            x,
            tiles,
            len(tiles),
            x if rows is None else rows,
            offsets,
            limit,
            d,
            x.stride(0),
            g.stride(0),
            BLOCK=chosen.block,
            BLOCK_K=chosen.block_k,
            WINDOW=chosen.window,
            VARIANT=chosen.variant,
            GATHER=rows is not None,
            PRODUCTS="tf32x3" if x.dtype == torch.float32 else "ieee",
            INTERPRETED=INTERPRETED,
            num_warps=chosen.warps,
            num_stages=chosen.stages,
            enable_fp_fusion=False,
        )


def syrk_accumulate_rows_grouped(
    g: torch.Tensor, x: torch.Tensor, rows: torch.Tensor, offsets: torch.Tensor, *, panel_rows: int | None = None
) -> None:
    """Add the lower triangle of `s.T @ s` into `g[e]`, s being the rows `rows[offsets[e]:offsets[e + 1]]` of x; for all e.

    Every product is taken in float64. The offsets are read on the device.

    Args:
        g, x, offsets, panel_rows: as in `syrk_accumulate_grouped`.
        rows: (m,) int32 or int64: indices into x, on its device.

    Raises:
        ValueError, TypeError: as in `syrk_accumulate_grouped`.
    """
    _check(g, x, offsets, rows, panel_rows)
    groups, d = len(g), x.shape[1]
    if groups == 0 or len(x) == 0 or len(rows) == 0:
        return
    tiles = _tiles(g[0], d, DOUBLE.block, panel_rows)
    programs = min(len(tiles), _programs(x.device))
    with _on(x.device):
        _syrk_rows_grouped[(groups * programs,)](
            g,
            x,
            tiles,
            len(tiles),
            rows,
            offsets,
            len(rows),
            programs,
            d,
            x.stride(0),
            g.stride(0),
            BLOCK=DOUBLE.block,
            BLOCK_K=DOUBLE.block_k,
            MATRIX=has_matrix_products(x.device),
            num_warps=DOUBLE.warps,
            num_stages=DOUBLE.stages,
            enable_fp_fusion=True,
        )


def sum_rows_grouped(total: torch.Tensor, x: torch.Tensor, rows: torch.Tensor, offsets: torch.Tensor) -> None:
    """Add the sum of the rows `rows[offsets[e]:offsets[e + 1]]` of x to `total[e]`, in float64; for all e.

    The offsets are read on the device. The same input gives the same bits.

    Args:
        total: (groups, d) float64, contiguous.
        x, rows, offsets: as in `syrk_accumulate_rows_grouped`.

    Raises:
        ValueError, TypeError: as in `syrk_accumulate_grouped`.
    """
    check_input(total, x)
    d = x.shape[1]
    if total.ndim != 2 or total.shape[1] != d or not total.is_contiguous():
        raise InputError(f"total must be (groups, {d}) and contiguous, not {tuple(total.shape)} with strides {total.stride()}")
    _check_lists(len(total), x, offsets, rows)
    if len(total) == 0 or len(x) == 0 or len(rows) == 0:
        return
    with _on(x.device):
        _sum_rows[(len(total), -(-d // COLUMNS))](
            total, x, rows, offsets, len(rows), d, x.stride(0), BLOCK_K=32, COLUMNS=COLUMNS, enable_fp_fusion=True
        )


def _check(g: torch.Tensor, x: torch.Tensor, offsets: torch.Tensor, rows: torch.Tensor | None, panel_rows: int | None) -> None:
    check_input(g, x)
    d = x.shape[1]
    if panel_rows is None:
        if g.ndim != 3 or g.shape[1:] != (d, d) or (d > 1 and (g.stride(2) != 1 or g.stride(1) < d)):
            raise InputError(
                f"g must be (groups, {d}, {d}) with a contiguous last axis; it is {tuple(g.shape)} with strides {g.stride()}"
            )
    elif g.ndim != 2 or g.shape[1] != packed_size(d, panel_rows) or g.stride(1) != 1:
        raise InputError(
            f"g must be (groups, {packed_size(d, panel_rows)}) with contiguous rows (d = {d}, {panel_rows} rows a panel), "
            f"not {tuple(g.shape)} with strides {g.stride()}"
        )
    _check_lists(len(g), x, offsets, rows)


def _check_lists(groups: int, x: torch.Tensor, offsets: torch.Tensor, rows: torch.Tensor | None) -> None:
    if offsets.shape != (groups + 1,):
        raise InputError(f"offsets must be ({groups + 1},) for {groups} groups, not {tuple(offsets.shape)}")
    if rows is not None and rows.ndim != 1:
        raise InputError(f"rows must be one list of indices, not {tuple(rows.shape)}")
    for name, indices in (("offsets", offsets), ("rows", rows)):
        if indices is None:
            continue
        if indices.dtype not in (torch.int32, torch.int64):
            raise InputTypeError(f"{name} must be int32 or int64, not {indices.dtype}")
        if indices.device != x.device or not indices.is_contiguous():
            raise InputError(f"{name} must be contiguous and on {x.device}, where x is; it is on {indices.device}")
