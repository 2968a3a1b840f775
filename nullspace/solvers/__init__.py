"""Dense eigenproblems and singular values in float64, on plain tensors."""

from nullspace.solvers.eigen import (
    METHODS,
    ZERO_EIGENVALUE,
    bottom_eigenpairs,
    bottom_right_singular,
    effective_rank,
    left_singular,
    numerical_rank,
    one_thread_each,
    partial_eigh,
    side_by_side,
    spectrum,
    top_eigenpairs,
)
from nullspace.solvers.perturbation import NO_LEAK, bounded_excess, deflated, deflated_root, estimated_excess
from nullspace.solvers.together import decompose

__all__ = [
    "METHODS",
    "NO_LEAK",
    "ZERO_EIGENVALUE",
    "bottom_eigenpairs",
    "bottom_right_singular",
    "bounded_excess",
    "decompose",
    "deflated",
    "deflated_root",
    "effective_rank",
    "estimated_excess",
    "left_singular",
    "numerical_rank",
    "one_thread_each",
    "partial_eigh",
    "side_by_side",
    "spectrum",
    "top_eigenpairs",
]
