"""What the kernels must compute, in plain torch: their specification and their test oracle."""

from __future__ import annotations

import torch


def syrk_accumulate(g: torch.Tensor, x_nd: torch.Tensor) -> None:
    """Add the lower triangle of `x_nd.T @ x_nd` into `g`, in place; the strict upper triangle of `g` is left as it is.

    Args:
        g: (d, d) float64.
        x_nd: (tokens, d), any floating dtype. The product is taken in float64, where products of 16-bit numbers are exact.
    """
    x = x_nd.to(torch.float64)
    g.add_(torch.tril(x.T @ x))
