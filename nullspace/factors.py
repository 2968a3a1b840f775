"""From a weight and a basis to the two factors of an adapter: one pure function a method, in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch


class LowRank(NamedTuple):
    """The factors of a rank-r matrix B A."""

    A: torch.Tensor
    """(r, d_in)"""
    B: torch.Tensor
    """(d_out, r)"""


@torch.no_grad()
def lora_null(weight: torch.Tensor, basis: torch.Tensor, *, rank: int | None = None, sigma_scale: float = 1.0) -> LowRank:
    """LoRA-Null's start (arXiv 2503.02659, eq. 8–11): SVD(W₀ U Uᵀ) = U′ Σ′ V′ᵀ, B = U′ √Σ′, A = √Σ′ V′ᵀ.

    The d_out × d_in product is never formed. By Theorem 4 the thin SVD W₀ U = P Σ Qᵀ gives U′ = P, Σ′ = Σ and V′ = U Q, as U
    has orthonormal columns. B A = W₀ U Uᵀ for r = k; for r < k it is the best rank-r part of it (Eckart–Young).

    Args:
        weight: (d_out, d_in) W₀.
        basis: (d_in, k) U_null, orthonormal columns.
        rank: r of the adapter, at most k and d_out; k by default.
        sigma_scale: Σ′ is multiplied by it (the paper's Table 5), and so is B A: more plasticity, less preservation.

    Returns:
        `LowRank(A (r, d_in), B (d_out, r))`, float64, on the weight's device. A is positive in the entry of largest
        magnitude of every row, so that equal inputs give equal factors.

    Cost: 2 · d_out · d_in · k + O(d_out · k²) flops.

    Raises:
        ValueError: if the shapes do not fit, r is out of range, or `sigma_scale` is not a positive number.
    """
    if weight.ndim != 2 or basis.ndim != 2 or weight.shape[1] != basis.shape[0]:
        raise ValueError(f"a weight {tuple(weight.shape)} needs a basis (d_in, k), not {tuple(basis.shape)}")
    rank = _check_rank(basis.shape[1], weight.shape[0], rank)
    if not 0.0 < sigma_scale < float("inf"):
        raise ValueError(f"sigma_scale must be a positive number, not {sigma_scale}")
    basis = basis.to(weight.device, torch.float64)
    p, sigma, qt = torch.linalg.svd(weight.to(torch.float64) @ basis, full_matrices=False)
    right = qt[:rank] @ basis.T
    peak = torch.gather(right, 1, right.abs().argmax(1, keepdim=True))
    sign = torch.where(peak < 0, -1.0, 1.0)
    root = (sigma_scale * sigma[:rank]).sqrt()
    return LowRank(A=sign * root[:, None] * right, B=p[:, :rank] * (sign.T * root))


def b_zero(basis: torch.Tensor, d_out: int, *, rank: int | None = None) -> LowRank:
    """A = U_nullᵀ and B = 0: the weight stays untouched (the paper's code calls it `singular_aware_2`).

    Args:
        basis: (d_in, k), columns by ascending eigenvalue.
        d_out: rows of the weight, which is not needed for anything else.
        rank: r of the adapter, at most k and d_out: the r quietest directions; k by default.

    Returns:
        `LowRank(A (r, d_in), B (d_out, r))`, float64, on the device of the basis.

    Raises:
        ValueError: if r is out of range.
    """
    rank = _check_rank(basis.shape[1], d_out, rank)
    a = basis[:, :rank].T.to(torch.float64).clone(memory_format=torch.contiguous_format)  # never a view of the basis
    return LowRank(A=a, B=a.new_zeros(d_out, rank))


def _check_rank(columns: int, d_out: int, rank: int | None) -> int:
    rank = columns if rank is None else rank
    limit = min(columns, d_out)
    if not 1 <= rank <= limit:
        raise ValueError(f"rank must be between 1 and {limit}, not {rank} (a basis of {columns} columns, a weight of {d_out} rows)")
    return rank
