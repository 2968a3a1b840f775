"""The variant `gemm` of `syrk_accumulate`: products of whole matrices by cuBLAS, for widths whose triangle has too few tiles.

The chains are as short as those of the other variants: a batched product of `window` tokens each, in float32. Its (d, d) results
go through memory and are added in float64, about 8 d² bytes a window against 2 · window · d² operations.
"""

from __future__ import annotations

import torch

# Entries of the float32 products that are in memory at a time: 256 MiB.
ENTRIES = 2**26


def add_products(g: torch.Tensor, x: torch.Tensor, window: int, panel_rows: int | None) -> None:
    """Add the lower triangle of `x.T @ x` into `g`, in place, as `syrk_accumulate` does; x is bfloat16 or float16."""
    tokens, d = x.shape
    whole = tokens - tokens % window
    rows = window * max(1, ENTRIES // d**2)
    total = x.new_zeros(d, d, dtype=torch.float64)
    for start in range(0, whole, rows):
        total += _products(x[start : min(start + rows, whole)].unflatten(0, (-1, window)))
    if whole < tokens:
        total += _products(x[None, whole:])
    total.tril_()
    if panel_rows is None:
        g.add_(total)
        return
    done = 0
    for first in range(0, d, panel_rows):
        last = min(first + panel_rows, d)
        size = (last - first) * last
        g[done : done + size].view(last - first, last).add_(total[first:last, :last])
        done += size


def _products(x_wnd: torch.Tensor) -> torch.Tensor:
    """(d, d) float64: the sum over w of `x[w].T @ x[w]`, each in float32."""
    if x_wnd.device.type != "cuda":  # only CUDA's products have a wider result than their inputs
        x_wnd = x_wnd.float()
        return torch.bmm(x_wnd.mT, x_wnd).sum(0, dtype=torch.float64)
    return torch.bmm(x_wnd.mT, x_wnd, out_dtype=torch.float32).sum(0, dtype=torch.float64)
