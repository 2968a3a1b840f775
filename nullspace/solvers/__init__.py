"""Dense eigenproblems and singular values in float64, on plain tensors."""

from nullspace.solvers.checks import column_signs
from nullspace.solvers.cost import decomposition_cost, side_by_side
from nullspace.solvers.eigen import (
    METHODS,
    ZERO_EIGENVALUE,
    bottom_eigenpairs,
    effective_rank,
    numerical_rank,
    partial_eigh,
    spectrum,
    top_eigenpairs,
)
from nullspace.solvers.pencil import Pencil, diagonalise
from nullspace.solvers.perturbation import NO_LEAK, bounded_excess, deflated, deflated_root, estimated_excess
from nullspace.solvers.singular import bottom_right_singular, left_singular
from nullspace.solvers.threads import one_thread_each
from nullspace.solvers.together import decompose, make_room

__all__ = [
    "METHODS",
    "NO_LEAK",
    "ZERO_EIGENVALUE",
    "Pencil",
    "bottom_eigenpairs",
    "bottom_right_singular",
    "bounded_excess",
    "column_signs",
    "decompose",
    "decomposition_cost",
    "deflated",
    "deflated_root",
    "diagonalise",
    "effective_rank",
    "estimated_excess",
    "left_singular",
    "make_room",
    "numerical_rank",
    "one_thread_each",
    "partial_eigh",
    "side_by_side",
    "spectrum",
    "top_eigenpairs",
]
