"""What a change in training is kept out of: the leading directions of a layer's inputs and outputs; and CLoRA's penalty on them.

OPLoRA (arXiv 2510.13003) and OSF (arXiv 2504.07097) hold (I − U Uᵀ) ΔW (I − V Vᵀ), with the k leading singular vectors U, V of W₀.
For white inputs (C = I) these are the leading eigenvectors of W₀ C W₀ᵀ and C. With the C of what must be kept, those of real inputs
take their place: then ΔW X is zero for what X has along V, and nothing is written along the outputs' own leading directions U.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from nullspace import solvers
from nullspace.checks import check_between
from nullspace.errors import InputError
from nullspace.factors.filters import unit_trace
from nullspace.factors.low_rank import LowRank


class Leading(NamedTuple):
    """The k leading eigenvectors of a second moment M (d, d), and how much is left in the other directions."""

    basis: torch.Tensor
    """(d, k) orthonormal columns, float64. Where eigenvalues coincide, one of the bases that are right."""
    leak: float
    """√(1 − Σ λ / tr M): the joint leak of the d − k directions that are left. 0 for M = 0."""


@torch.no_grad()
def leading_inputs(c: torch.Tensor, *, k: int) -> Leading:
    """V_k: the directions in which a layer's inputs are largest.

    Args:
        c: (d_in, d_in) second moment of the inputs, in any scale.
        k: how many, at most d_in. Beyond the rank of C the directions are any of its null space.

    Raises:
        TypeError, ValueError: if C is not square, zero, or holds NaN or Inf; if k is out of range.
    """
    c = unit_trace(c, "the inputs")
    check_between("k", k, len(c))
    values, basis = solvers.top_eigenpairs(c, k)
    return Leading(basis, _left_over(values.sum(), 1.0))


@torch.no_grad()
def leading_outputs(weight: torch.Tensor, c: torch.Tensor, *, k: int) -> Leading:
    """U_k: the k leading eigenvectors of W C Wᵀ, the directions in which a layer's outputs W X are largest.

    Args:
        weight: (d_out, d_in) W.
        c: (d_in, d_in) second moment of the inputs, in any scale.
        k: how many, at most the smaller side of the weight: the outputs have no more directions.

    Cost: with s = min(d_out, d_in), those of `solvers.top_eigenpairs` of order s, and about 2 · d_in · s · (d_in + s) flops; for a
    weight with more rows than columns, 2 · d_out · d_in · (d_in + k) more, for W = Q R and U = Q eig(R C Rᵀ).

    Raises:
        TypeError, ValueError: as `leading_inputs`; if the shapes do not fit.
    """
    if weight.ndim != 2 or c.shape != (weight.shape[1], weight.shape[1]):
        raise InputError(f"a weight {tuple(weight.shape)} needs a second moment (d_in, d_in), not {tuple(c.shape)}")
    check_between("k", k, min(weight.shape))
    weight = weight.to(torch.float64)
    turned, rows = torch.linalg.qr(weight) if len(weight) > weight.shape[1] else (None, weight)
    outputs = rows @ unit_trace(c, "the inputs").to(weight.device) @ rows.mT
    values, basis = solvers.top_eigenpairs((outputs + outputs.mT) / 2, k)
    return Leading(basis if turned is None else turned @ basis, _left_over(values.sum(), outputs.trace()))


@torch.no_grad()
def leading_singular(weight: torch.Tensor, *, k: int) -> tuple[Leading, Leading]:
    """V_k and U_k of the k largest singular triples of W (arXiv 2510.13003): those of inputs and outputs for C = I.

    A change (I − U Uᵀ) ΔW (I − V Vᵀ) leaves these triples of W + ΔW as they are: (W + ΔW) v_i = σ_i u_i, u_iᵀ (W + ΔW) = σ_i v_iᵀ.

    Args:
        weight: (d_out, d_in) W.
        k: how many, at most the smaller side.

    Returns:
        The `Leading` of the inputs, V_k (d_in, k), and that of the outputs, U_k (d_out, k).

    Raises:
        TypeError, ValueError: if k is out of range, or the weight holds NaN or Inf.
    """
    if weight.ndim != 2:
        raise InputError(f"a weight (d_out, d_in) is needed, not {tuple(weight.shape)}")
    check_between("k", k, min(weight.shape))
    weight = weight.to(torch.float64)
    sigma, u = solvers.left_singular(weight, k)
    # V = Wᵀ U / Σ, one triple with U also where singular values coincide. Where they are zero, QR completes the basis.
    v = torch.linalg.qr(weight.mT @ u).Q
    leak = _left_over(sigma.square().sum(), weight.square().sum())
    return Leading(v, leak), Leading(u, leak)


def clora(update: LowRank, inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """‖A P‖² + ‖Bᵀ Q‖²: CLoRA's penalty of one layer (arXiv 2410.16801), differentiable.

    Args:
        update: A (r, d_in) and B (d_out, r).
        inputs: P (d_in, k), orthonormal columns.
        outputs: Q (d_out, k), orthonormal columns.
    """
    return (update.A @ inputs).square().sum() + (update.B.mT @ outputs).square().sum()


def _left_over(taken: torch.Tensor, whole: torch.Tensor | float) -> float:
    """√(1 − taken / whole)."""
    return max(0.0, 1 - float(taken) / float(whole)) ** 0.5 if float(whole) > 0 else 0.0
