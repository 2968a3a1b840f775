"""Starts from directions of a layer's input, which leave W₀ alone but for `lora_null`: the null space, or the main components."""

from __future__ import annotations

import torch

from nullspace import solvers
from nullspace.checks import check_between, check_integer, check_real
from nullspace.errors import InputError
from nullspace.factors.low_rank import LowRank


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
        raise InputError(f"a weight {tuple(weight.shape)} needs a basis (d_in, k), not {tuple(basis.shape)}")
    rank = _check_rank(basis.shape[1], weight.shape[0], rank)
    check_real("sigma_scale", sigma_scale)
    basis = basis.to(weight.device, torch.float64)
    p, sigma, qt = torch.linalg.svd(weight.to(torch.float64) @ basis, full_matrices=False)
    right = qt[:rank] @ basis.T
    root = solvers.column_signs(right.mT) * (sigma_scale * sigma[:rank]).sqrt()
    return LowRank(A=root[:, None] * right, B=p[:, :rank] * root)


def b_zero(basis: torch.Tensor, d_out: int, *, rank: int | None = None) -> LowRank:
    """A = U_nullᵀ and B = 0: the weight stays untouched (the paper's code calls it `singular_aware_2`).

    Args:
        basis: (d_in, k), columns by ascending eigenvalue.
        d_out: rows of the weight, which itself is not needed.
        rank: r of the adapter, at most k and d_out; k by default. The r directions of the smallest eigenvalues are taken.

    Returns:
        `LowRank(A (r, d_in), B (d_out, r))`, float64, on the device of the basis.

    Raises:
        ValueError: if r is out of range.
    """
    rank = _check_rank(basis.shape[1], d_out, rank)
    a = basis[:, :rank].T.to(torch.float64).clone(memory_format=torch.contiguous_format)  # never a view of the basis
    return LowRank(A=a, B=a.new_zeros(d_out, rank))


@torch.no_grad()
def eva(c: torch.Tensor, mean: torch.Tensor, mass: float, d_out: int, *, rank: int) -> LowRank:
    """EVA's start (arXiv 2410.07170): A = the r top right singular vectors of the *centred* activations, B = 0; W₀ stays.

    Args:
        c: (d_in, d_in) second moment Σ x xᵀ of the inputs, uncentred.
        mean: (d_in,) their mean.
        mass: the number of tokens (the sum of their weights, if they have weights).
        d_out: rows of the weight.
        rank: r, at most d_in and d_out.

    Returns:
        `LowRank(A (r, d_in), B (d_out, r))`, float64, rows of A orthonormal, by descending variance, positive in the entry of
        largest magnitude.

    Raises:
        ValueError: if the shapes do not fit or r is out of range.
    """
    if c.ndim != 2 or c.shape[0] != c.shape[1] or mean.shape != c.shape[:1]:
        raise InputError(f"needs a second moment (d_in, d_in) and a mean (d_in,), not {tuple(c.shape)} and {tuple(mean.shape)}")
    check_between("rank", rank, min(len(c), check_integer("d_out", d_out)))
    _, vectors = solvers.top_eigenpairs(centred(c, mean, mass), rank)
    return LowRank(A=vectors.mT.contiguous(), B=vectors.new_zeros(d_out, rank))


def centred(c: torch.Tensor, mean: torch.Tensor, mass: float) -> torch.Tensor:
    """Σ (x − μ)(x − μ)ᵀ = C − n μ μᵀ, (d, d) float64, a new tensor."""
    c = c.to(torch.float64)
    return torch.addr(c, mean.to(c), mean.to(c), alpha=-mass)


def _check_rank(columns: int, d_out: int, rank: int | None) -> int:
    limit = min(columns, check_integer("d_out", d_out))
    where = f" (a basis of {columns} columns, a weight of {d_out} rows)"
    return check_between("rank", columns if rank is None else rank, limit, where)
