"""`syrk_accumulate_rows`: the product of a few selected rows, such as outlier tokens, in float64 throughout."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nullspace.csrc_triton.syrk import _on, _tiles, check_single, triton_version
from nullspace.csrc_triton.tiles import DOUBLE


@triton.jit
def _selected(x, rows, start, selected, columns, d, stride, BLOCK_K: tl.constexpr):
    """(BLOCK_K, BLOCK) float64: the given columns of the rows of x that `rows` lists from `start` on; zero from `selected` on."""
    k = start + tl.arange(0, BLOCK_K)
    source = x + tl.load(rows + k, mask=k < selected, other=0).to(tl.int64)[:, None] * stride
    return tl.load(source + columns[None, :], mask=(k < selected)[:, None] & (columns < d)[None, :], other=0.0).to(tl.float64)


@triton.jit
def _selected_product(x, rows, selected, i, j, d, stride, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """(BLOCK, BLOCK) float64: the product of columns i and j of the selected rows, by matrix instructions."""
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
    return total


@triton.jit
def _selected_row(x, rows, k, selected, columns, d, stride):
    """(BLOCK,) float64: columns of row `rows[k]` of x; of the last selected one, if k is beyond it."""
    source = x + tl.load(rows + tl.minimum(k, selected - 1)).to(tl.int64) * stride
    return tl.load(source + columns, mask=columns < d, other=0.0).to(tl.float64)


@triton.jit
def _selected_outer_products(x, rows, selected, i, j, d, stride, BLOCK: tl.constexpr):
    """`_selected_product` of one row or more, by a multiplication and an addition an entry and row: for compilers that have no
    float64 matrix product for a device."""
    total = tl.zeros((BLOCK, BLOCK), tl.float64)
    left = _selected_row(x, rows, 0, selected, i, d, stride)
    right = _selected_row(x, rows, 0, selected, j, d, stride)
    for k in tl.range(1, selected + 1):
        next_left = _selected_row(x, rows, k, selected, i, d, stride)
        next_right = _selected_row(x, rows, k, selected, j, d, stride)
        total += left[:, None] * right[None, :]
        left, right = next_left, next_right
    return total


@triton.jit
def _add_selected(g, x, tile, rows, selected, d, stride, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, MATRIX: tl.constexpr):
    """Add one tile of the product of the `selected` rows of x that `rows` lists, in float64."""
    i = tl.load(tile).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    j = tl.load(tile + 1).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    if MATRIX:
        total = _selected_product(x, rows, selected, i, j, d, stride, BLOCK, BLOCK_K)
    else:
        total = _selected_outer_products(x, rows, selected, i, j, d, stride, BLOCK)
    inside = (i[:, None] < d) & (j[None, :] <= i[:, None])
    down, across = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    entries = g + tl.load(tile + 2) + down * tl.load(tile + 3) + across
    tl.store(entries, tl.load(entries, mask=inside) + total, mask=inside)


@triton.jit(do_not_specialize=["tile_count"])
def _syrk_rows(g, x, tiles, tile_count, rows, count, d, stride, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, MATRIX: tl.constexpr):
    selected = tl.load(count).to(tl.int32)
    # As many programs as fill the device loop over the tiles. With no row selected, the usual case, they end at once.
    last = tl.where(selected > 0, tile_count, 0)
    for index in tl.range(tl.program_id(0), last, tl.num_programs(0)):
        _add_selected(g, x, tiles + 4 * index, rows, selected, d, stride, BLOCK, BLOCK_K, MATRIX)


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
    check_single(g, x, panel_rows)
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
            MATRIX=has_matrix_products(x.device),
            num_warps=DOUBLE.warps,
            num_stages=DOUBLE.stages,
            enable_fp_fusion=True,
        )


def has_matrix_products(device: torch.device) -> bool:
    """Whether to multiply by matrix instructions on a device."""
    return device.type != "cuda" or multiplies_float64(torch.cuda.get_device_capability(device), triton_version())


def multiplies_float64(capability: tuple[int, int], version: tuple[int, int]) -> bool:
    """Whether Triton of a version compiles float64 matrix products for a compute capability, within registers.

    For 10 it does from version 3.8 on. 12 has no such instruction: what Triton makes of the product keeps 700 bytes a thread in
    local memory, and the outer products keep none (`benchmarks/results/compiled.json`).
    """
    return capability[0] < 10 or (capability[0] == 10 and version >= (3, 8))


def _programs(device: torch.device) -> int:
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
