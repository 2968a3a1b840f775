"""A change of a weight, cut to a smaller rank where its inputs notice it least."""

from __future__ import annotations

import torch

from nullspace import solvers
from nullspace.checks import check_integer
from nullspace.errors import InputError
from nullspace.factors.filters import unit_trace
from nullspace.factors.low_rank import LowRank


@torch.no_grad()
def truncated(update: LowRank, c: torch.Tensor | None = None, *, rank: int) -> LowRank:
    """The best change of rank r in ‖(ΔW − ΔW_r) X‖_F, X the inputs with second moment C = X Xᵀ.

    ΔW_r = U Uᵀ ΔW, U the r leading left singular vectors of ΔW C^½ (Eckart–Young): nothing is divided by C, which may be singular.
    They are the eigenvectors of ΔW C ΔWᵀ, of which a k × k matrix is formed: R A C Aᵀ Rᵀ with B = Q R. Where ΔW X has a rank s < r,
    any U that holds its s directions is as good; the others are then the leading ones of what is left of ΔW itself.

    Args:
        update: A (k, d_in) and B (d_out, k), with the adapter's scaling in one of them.
        c: (d_in, d_in) second moment of the layer's inputs, in any scale; None for the identity, the best in ‖ΔW − ΔW_r‖_F.
        rank: r, at least 1. Of a change of rank k ≤ r the factors are returned as they are.

    Returns:
        `LowRank(A (r, d_in), B (d_out, r))`, float64; rows of A by descending effect, positive in the entry of largest magnitude,
        with the norm of their column of B.

    Cost: 2 · k · d_in² + O(k² · (d_in + d_out)) flops.

    Raises:
        TypeError, ValueError: if the shapes do not fit, the rank is no integer of at least 1, or something holds NaN or Inf.
    """
    rank = check_integer("rank", rank)
    if update.A.ndim != 2 or update.B.ndim != 2 or update.B.shape[1] != len(update.A):
        raise InputError(f"a B (d_out, k) is needed for an A (k, d_in), not {tuple(update.B.shape)} for {tuple(update.A.shape)}")
    a, b = (factor.detach().to(torch.float64) for factor in update)
    if not bool(a.isfinite().all() and b.isfinite().all()):
        raise InputError("the change holds NaN or Inf")
    if c is not None and c.shape != (a.shape[1], a.shape[1]):
        raise InputError(f"a change of {a.shape[1]} columns needs a second moment of this size, not {tuple(c.shape)}")
    c = None if c is None else unit_trace(c, "the inputs").to(a.device)
    if len(a) <= rank:
        return LowRank(a, b)
    q, r = torch.linalg.qr(b)
    rows = r @ a
    u = _leading(rows if c is None else rows @ c, rows, rank)
    left = u.mT @ rows
    root, sign = torch.linalg.vector_norm(left, dim=1).sqrt(), solvers.column_signs(left.mT)
    return LowRank(sign[:, None] * left / torch.where(root > 0, root, 1.0)[:, None], q @ (u * (sign * root)))


def _leading(weighted: torch.Tensor, rows: torch.Tensor, rank: int) -> torch.Tensor:
    """(k, r) orthonormal: leading eigenvectors of `weighted` rowsᵀ; where these are fewer, those of the rest of `rows` follow."""
    gram = weighted @ rows.mT
    values, vectors = torch.linalg.eigh((gram + gram.mT) / 2)
    zero = len(values) * torch.finfo(torch.float64).eps * values[-1].clamp(min=0)
    seen = min(rank, int((values > zero).sum()))
    u = vectors.flip(1)[:, :seen]
    if seen == rank:
        return u
    rest = torch.linalg.svd(rows - u @ (u.mT @ rows), full_matrices=False).U[:, : rank - seen]
    return torch.linalg.qr(torch.cat([u, rest], dim=1)).Q
