"""Several tasks in a row: what keeps a new adapter out of the inputs, or out of the rows of A, of the tasks before it."""

from __future__ import annotations

import torch

from nullspace import solvers
from nullspace.checks import FRACTION, check_between, check_integer, check_real
from nullspace.errors import InputError
from nullspace.factors.filters import unit_trace
from nullspace.factors.low_rank import LowRank
from nullspace.factors.outputs import ZERO

SHARE = 0.99
"""Of the earlier tasks' inputs, by energy: what InfLoRA keeps out of."""
# A share is missed by rounding if eigenvalues relative to the trace sum to no more than this.
_ROUNDING = 1e-12


@torch.no_grad()
def inflora(c_task: torch.Tensor, c_keep: torch.Tensor, d_out: int, *, rank: int, share: float = SHARE) -> LowRank:
    """InfLoRA's start (arXiv 2404.00228, section 3.2): A = the r main directions of (I − P) X_t, B = 0; W₀ stays.

    P projects onto the space of the earlier tasks' inputs: the fewest leading eigenvectors of C_k that hold `share` of its trace
    (as GPM has it, arXiv 2103.09762), but at most d_in − r, which leave A its r rows. The rows of A are the r leading eigenvectors
    of (I − P) C_t (I − P), divided by √3, so that they have the norm of the rows that LoRA draws. A P = 0 exactly: with A frozen,
    an update B A leaves the inputs in that space alone, ‖B A X_k‖ ≤ √(1 − share) ‖B A‖ ‖X_k‖; where d_in − r cuts P, with the
    share that is left in it. Of several earlier tasks give the sum of their second moments with equal traces
    (`Covariances.merge(…, normalise=True)`): for n of them the bound of each is √n times as large.

    The authors' code decomposes (I − P) C_t, and C_k for P, where the paper has (I − P) X_t and X_k: its singular values are
    squares of the paper's, so that a share there is one of Σ λ², and A's rows are eigenvectors of (I − P) C_t² (I − P).

    Args:
        c_task: (d_in, d_in) second moment of the inputs of the new task, in any scale.
        c_keep: (d_in, d_in) second moment of the inputs of all that came before, in any scale.
        d_out: rows of the weight, which itself is not needed.
        rank: r, at most d_in and d_out.
        share: ε of the paper, from 0 (P = 0: nothing came before) to 1 (all directions in which the earlier inputs are not zero).

    Returns:
        `LowRank(A (r, d_in), B (d_out, r))`, float64, rows by descending energy, positive in the entry of largest magnitude.

    Cost: 9 · d_in³ flops for the eigenvectors of C_k, 4 · d_in³ and `solvers.top_eigenpairs` for the rest.

    Raises:
        TypeError, ValueError: if the moments do not fit, are zero or hold NaN or Inf; if r or the share is out of range; if P
            leaves nothing of the task's inputs.
    """
    task, keep = unit_trace(c_task, "the task's inputs"), unit_trace(c_keep, "the earlier inputs")
    if task.shape != keep.shape:
        raise InputError(f"two second moments of one layer are needed, not {tuple(task.shape)} and {tuple(keep.shape)}")
    d_in = len(task)
    check_between("rank", rank, min(d_in, check_integer("d_out", d_out)))
    share = check_real("share", share, FRACTION)
    values, vectors = torch.linalg.eigh(keep.to(task.device))
    left = max(rank, int((values.clamp(min=0).cumsum(0) <= 1 - share + _ROUNDING).sum()))
    free = vectors[:, :left]  # rows of A in these coordinates, so that A P = 0 also where the task has fewer than r directions
    _, leading = solvers.top_eigenpairs(free.mT @ task @ free, rank)
    a = (free @ leading).mT
    if not bool(((a @ task) * a).sum() > ZERO):
        raise InputError("the task's inputs have no direction that is left: take a smaller share, or use more data of the task")
    return LowRank(A=(a * solvers.column_signs(a.mT)[:, None] / 3**0.5).contiguous(), B=a.new_zeros(d_out, rank))


def overlap(a: torch.Tensor, earlier: torch.Tensor) -> torch.Tensor:
    """Σ |A A_iᵀ|, the sum over all entries: O-LoRA's term (arXiv 2310.14152), as the authors' code has it. Differentiable.

    Zero if the rows of A are orthogonal to those of all earlier A. That A reads nothing of what earlier tasks' *inputs* hold does
    not follow.

    Args:
        a: (r, d_in).
        earlier: (m, d_in), the rows of all earlier A.

    Raises:
        ValueError: if the widths differ.
    """
    if a.ndim != 2 or earlier.ndim != 2 or a.shape[1] != earlier.shape[1]:
        raise InputError(f"A {tuple(a.shape)} and earlier rows {tuple(earlier.shape)} read inputs of different widths")
    return (a @ earlier.to(a).mT).abs().sum()
