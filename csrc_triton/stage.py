"""`stage_rows` and `zero_rows`: prepare rows for a product without a wait of the host for the device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nullspace.csrc_triton.syrk import _on

ROWS, COLUMNS = 32, 128
# Columns of one program: with few rows, there are then still enough programs for a GPU.
CHUNK = 1024


@triton.jit(do_not_specialize=["count"])
def _stage(
    x,
    rows,
    out,
    squares,
    sums,
    count,
    d,
    stride,
    out_stride,
    GATHER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    k = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    source = tl.load(rows + k, mask=k < count, other=0).to(tl.int64) if GATHER else k.to(tl.int64)
    total = tl.zeros((ROWS,), tl.float64)
    start = tl.program_id(1) * CHUNK
    for first in tl.range(start, tl.minimum(start + CHUNK, d), COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        inside = (k < count)[:, None] & (columns < d)[None, :]
        tile = tl.load(x + source[:, None] * stride + columns[None, :], mask=inside, other=0.0)
        tl.store(out + k.to(tl.int64)[:, None] * out_stride + columns[None, :], tile, mask=inside)
        wide = tile.to(tl.float64)
        total += tl.sum(wide * wide, axis=1)
        tl.store(sums + tl.program_id(0).to(tl.int64) * d + columns, tl.sum(wide, axis=0), mask=columns < d)
    tl.store(squares + tl.program_id(1).to(tl.int64) * count + k, total, mask=k < count)


@triton.jit
def _zero(x, rows, count, d, stride, COLUMNS: tl.constexpr):
    selected = tl.load(count).to(tl.int32)
    for k in tl.range(tl.program_id(0), selected, tl.num_programs(0)):
        start = x + tl.load(rows + k).to(tl.int64) * stride
        for first in tl.range(0, d, COLUMNS):
            columns = first + tl.arange(0, COLUMNS)
            tl.store(start + columns, tl.zeros((COLUMNS,), x.dtype.element_ty), mask=columns < d)


def stage_rows(x: torch.Tensor, out: torch.Tensor, rows: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Copy rows of x to `out` and compute their norms and their sum, in one pass over x.

    Args:
        x: (tokens, d), bfloat16, float16 or float32; rows may be strided, the last axis is contiguous.
        out: (n, d) of the same dtype and device, strided likewise. Row k becomes row `rows[k]` of x.
        rows: (n,) int32 or int64 indices into x, on its device; None: the first n rows.

    Returns:
        `(norms, total)`: (n,) and (d,), float64: ‖row‖ of each row, NaN or Inf if it holds any; and the sum of all.
    """
    n, d = out.shape
    blocks, chunks = -(-n // ROWS), -(-d // CHUNK)
    squares = torch.empty(chunks, n, dtype=torch.float64, device=x.device)
    sums = torch.empty(blocks, d, dtype=torch.float64, device=x.device)
    if n > 0:
        with _on(x.device):
            _stage[(blocks, chunks)](
                x,
                x if rows is None else rows,
                out,
                squares,
                sums,
                n,
                d,
                x.stride(0),
                out.stride(0),
                GATHER=rows is not None,
                ROWS=ROWS,
                COLUMNS=COLUMNS,
                CHUNK=CHUNK,
                enable_fp_fusion=True,
            )
    return squares.sum(0).sqrt(), sums.sum(0)


def zero_rows(x: torch.Tensor, rows: torch.Tensor, count: torch.Tensor) -> None:
    """Set the rows `rows[:count]` of x to zero; `count`, one integer, is read on the device.

    Args:
        x: (tokens, d), last axis contiguous.
        rows: (≥ count,) int32 or int64 indices into x.
        count: one int32 or int64 on the device.
    """
    if len(x) > 0 and len(rows) > 0:
        with _on(x.device):
            _zero[(min(len(rows), 256),)](x, rows, count, x.shape[1], x.stride(0), 1024, enable_fp_fusion=True)
