"""The projector of AlphaEdit: onto the directions in which a layer's inputs have next to nothing."""

from __future__ import annotations

import torch

from nullspace.checks import check_real
from nullspace.errors import InputError
from nullspace.factors.filters import unit_trace

THRESHOLD = 0.02
"""`nullspace_threshold` of the paper's hyperparameters."""
# Relative to tr C: rounding makes no eigenvalue more negative than this.
INDEFINITE = 1e-6


@torch.no_grad()
def alphaedit(c: torch.Tensor, *, threshold: float = THRESHOLD) -> torch.Tensor:
    """P = Û Ûᵀ, Û the eigenvectors of K₀ K₀ᵀ with eigenvalues below a threshold (AlphaEdit, arXiv 2410.02355, section 3.1).

    An edit Δ P leaves the outputs on the inputs K₀ as they are: ‖Δ P K₀‖_F ≤ ‖Δ‖₂ · √(Σ λ), the sum over the eigenvalues below the
    threshold. The threshold is absolute, so that the number of directions depends on the norm of the inputs.

    Args:
        c: (d_in, d_in) second moment of the layer's inputs, *per token* (`Covariance.matrix() / Covariance.mass`), as the paper's
            code has it.
        threshold: positive.

    Returns:
        P, (d_in, d_in) float64, symmetric. Zero if no eigenvalue is below the threshold, the identity if all are.

    Cost: an eigendecomposition, some 9 d_in³ flops, and 2 d_in² for every direction.

    Raises:
        TypeError, ValueError: if C is not square, is zero or holds NaN or Inf; if the threshold is not a positive number.
    """
    threshold, unit = check_real("threshold", threshold), unit_trace(c, "the inputs")
    values, vectors = torch.linalg.eigh(unit)
    if float(values[0]) < -INDEFINITE:
        raise InputError(f"the second moment is not positive semi-definite: an eigenvalue is {float(values[0]):.3g} × its trace")
    few = vectors[:, values < threshold / float(c.diagonal().to(torch.float64).sum())]
    p = few @ few.mT
    return (p + p.mT) / 2
