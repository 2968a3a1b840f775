"""What the kernels must compute, in plain torch: their specification and their test oracle."""

from __future__ import annotations

import itertools

import torch


def syrk_accumulate(g: torch.Tensor, x_nd: torch.Tensor) -> None:
    """Add the lower triangle of `x_nd.T @ x_nd` into `g`, in place; the strict upper triangle of `g` is left as it is.

    Args:
        g: (d, d) float64.
        x_nd: (tokens, d), any floating dtype. The product is taken in float64, where products of 16-bit numbers are exact.
    """
    x = x_nd.to(torch.float64)
    g.add_(torch.tril(x.T @ x))


def syrk_accumulate_rows(g: torch.Tensor, x_nd: torch.Tensor, rows: torch.Tensor, count: torch.Tensor) -> None:
    """`syrk_accumulate` of the rows `rows[:count]` of x."""
    syrk_accumulate(g, x_nd[rows[: int(count)]])


def syrk_accumulate_grouped(g: torch.Tensor, x_nd: torch.Tensor, offsets: torch.Tensor, rows: torch.Tensor | None = None) -> None:
    """`syrk_accumulate` into each `g[e]`, of its own rows `offsets[e]` to `offsets[e + 1]` of x, or of x[rows]."""
    for e, (start, stop) in enumerate(itertools.pairwise(offsets.tolist())):
        syrk_accumulate(g[e], x_nd[start:stop] if rows is None else x_nd[rows[start:stop]])


def sum_rows_grouped(total: torch.Tensor, x_nd: torch.Tensor, rows: torch.Tensor, offsets: torch.Tensor) -> None:
    """Add the sum of the rows `rows[offsets[e]:offsets[e + 1]]` of x to `total[e]`, in float64."""
    for e, (start, stop) in enumerate(itertools.pairwise(offsets.tolist())):
        total[e] += x_nd[rows[start:stop]].sum(0, dtype=torch.float64)


def stage_rows(x_nd: torch.Tensor, out: torch.Tensor, rows: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Copy the rows `rows` of x (None: the first ones) to `out`; their norms (n,) and their sum (d,), in float64."""
    out.copy_(x_nd[: len(out)] if rows is None else x_nd[rows])
    return torch.linalg.vector_norm(out, dim=1, dtype=torch.float64), out.sum(0, dtype=torch.float64)


def zero_rows(x_nd: torch.Tensor, rows: torch.Tensor, count: torch.Tensor) -> None:
    """Set the rows `rows[:count]` of x to zero."""
    x_nd[rows[: int(count)]] = 0
