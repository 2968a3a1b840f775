"""Contrast: an adapter that reads directions in which the task's inputs are large and those of what must be kept are small."""

from __future__ import annotations

import torch

from nullspace import solvers
from nullspace.checks import check_between, check_integer, check_real
from nullspace.errors import InputError
from nullspace.factors.filters import unit_trace
from nullspace.factors.low_rank import LowRank
from nullspace.factors.outputs import DAMPING


@torch.no_grad()
def contrast(c_task: torch.Tensor, c_keep: torch.Tensor, d_out: int, *, rank: int, damping: float = DAMPING) -> LowRank:
    """A = the r leading generalised eigenvectors of (C_t, C_k + ε I), B = 0; W₀ stays.

    Each row a maximises ‖aᵀX_t‖² / (‖aᵀX_k‖² + ε ‖a‖²), orthogonal in C_k + ε I to the rows before it. With A frozen an update B A
    moves the outputs on the kept inputs as little as a gain on the task's inputs allows.

    The scale: LoRA's own A has entries of variance 1 / (3 d_in) (PEFT's default), so that ‖A X_t‖² = r / (3 d_in) · ‖X_t‖² on
    average. A here has exactly this norm, so that B learns as fast as LoRA's B does at the same rate. LoRA's A learns too: where
    its rate is so large that this matters, 1.5 to 2 times the rate makes up for it.

    Args:
        c_task: (d_in, d_in) second moment of the inputs of the task's data, in any scale.
        c_keep: (d_in, d_in) second moment of the inputs of the data to be preserved, in any scale.
        d_out: rows of the weight, which itself is not needed.
        rank: r, at most d_in and d_out.
        damping: ε, relative to the mean eigenvalue of C_k; positive.

    Returns:
        `LowRank(A (r, d_in), B (d_out, r))`, float64, rows of A by descending ratio, positive in the entry of largest magnitude.

    Cost: 7/3 · d_in³ flops and those of `solvers.top_eigenpairs`.

    Raises:
        TypeError, ValueError: if the moments do not fit, are zero or hold NaN or Inf; if r or the damping is out of range.
    """
    task, keep = unit_trace(c_task, "the task's inputs"), unit_trace(c_keep, "the inputs to be kept")
    if task.shape != keep.shape:
        raise InputError(f"two second moments of one layer are needed, not {tuple(task.shape)} and {tuple(keep.shape)}")
    d_in = len(task)
    check_between("rank", rank, min(d_in, check_integer("d_out", d_out)))
    keep = keep.to(task.device)
    keep.diagonal().add_(check_real("damping", damping) / d_in)
    lower = torch.linalg.cholesky(keep)
    half = torch.linalg.solve_triangular(lower, task, upper=False)
    ratio = torch.linalg.solve_triangular(lower, half.mT, upper=False)
    _, leading = solvers.top_eigenpairs((ratio + ratio.mT) / 2, rank)
    a = torch.linalg.solve_triangular(lower.mT, leading, upper=True).mT
    answered = ((a @ task) * a).sum()
    if not bool(answered > 0):
        raise InputError("the task's inputs have no direction that is left: use more data of the task")
    a = a * (solvers.column_signs(a.mT)[:, None] * (rank / (3 * d_in) / answered).sqrt())
    return LowRank(A=a.contiguous(), B=a.new_zeros(d_out, rank))
