"""What a step may change of the A's of one site, or of a layer's Bᵀ: an orthogonal projection, or a smooth damping."""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Mapping
from typing import NamedTuple

import torch

from nullspace import solvers
from nullspace.artifacts.null_space import NullSpace
from nullspace.checks import Range, check_integer, check_real
from nullspace.errors import AdapterWarning, InputError
from nullspace.integrations.peft.guard.adapted import check_reached
from nullspace.model.sites import Site
from nullspace.moments.covariance import Covariance

_SHARE = Range("a number of directions, or a share between 0 and 1", lambda value: 0.0 < value < 1.0)


class Allowed(NamedTuple):
    """The directions that a site's A may change in, or, of `allowed_outputs`, a layer's B."""

    directions: int
    """k; d_in where changes are damped."""
    d_in: int
    """d_out, of B."""
    leak: float
    """√(Σ λ / tr C) of these directions. `oplora`: of W₀ C W₀ᵀ for B; without covariances, C = I."""


class Projection:
    """Rows times P = U_k U_kᵀ. Of U_k and its complement the smaller one is kept.

    Args:
        basis: (d, m) orthonormal columns.
        inside: whether these are U_k, or its complement.
    """

    def __init__(self, basis: torch.Tensor, *, inside: bool) -> None:
        self._basis, self._inside = basis, inside

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """(n, d) → (n, d)."""
        self._basis = self._basis.to(rows)  # kept where it was needed last
        along = (rows @ self._basis) @ self._basis.mT
        return along if self._inside else rows - along


class Damping:
    """Rows times (I + C / (τ · tr C / d))⁻¹: what is small on the inputs is changed as before, what is large hardly.

    Args:
        c: (d_in, d_in) second moment.
        strength: τ.
    """

    def __init__(self, c: torch.Tensor, strength: float) -> None:
        shifted = c / (strength * c.trace() / len(c))
        shifted.diagonal().add_(1)
        self._matrix = torch.cholesky_inverse(torch.linalg.cholesky(shifted)).to(torch.float32)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """(n, d_in) → (n, d_in)."""
        self._matrix = self._matrix.to(rows)
        return rows @ self._matrix


def kept_as(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """On the device of a parameter, in float32; in float64 for one in float64."""
    return values.to(like.device, torch.promote_types(like.dtype, torch.float32)).contiguous()


def projection_of(known: Covariance | NullSpace, leak: float, rank: int, like: torch.Tensor) -> tuple[Projection, Allowed]:
    """The projection onto as many of the directions of smallest inputs as together are within the budget, and at least r.

    Args:
        known: a second moment, or its null space, whose basis is used as far as it is within the budget.
        leak: the budget, of √(Σ λ / tr C).
        rank: r, of the site's adapters.
        like: A of one of these. Its device is where to solve, and to keep the projection.
    """
    if isinstance(known, NullSpace):
        values, vectors, trace = known.eigenvalues, known.basis, known.trace
    else:
        c = known.matrix().to(like.device)
        trace = float(c.trace())
        values, vectors = solvers.partial_eigh(c, max(1, known.d_in // 4), every=True)
    joint = values.clamp(min=0).cumsum(0) / trace if trace > 0 else torch.zeros_like(values)
    # Rounding leaves up to ZERO_EIGENVALUE · tr C of a zero.
    within = int((joint <= leak**2 + solvers.ZERO_EIGENVALUE * torch.arange(1, len(joint) + 1).to(joint)).sum())
    within = max(within, min(rank, len(joint)))
    d_in, given = vectors.shape
    if within > given:
        vectors = solvers.bottom_eigenpairs(c, d_in)[1]
    inside = vectors.shape[1] < d_in or 2 * within <= d_in
    kept = vectors[:, :within] if inside else vectors[:, within:]
    reached = float(joint[within - 1].sqrt())
    return Projection(kept_as(kept, like), inside=inside), Allowed(within, d_in, reached)


def check_enough(allowed: Mapping[Site, Allowed], ranks: Mapping[Site, int], leak: float) -> None:
    """Warn, naming a site and the leak that they reach, where r directions are not within the budget; r is the adapter's rank.

    Raises:
        ValueError: naming a site, if fewer than r directions are known.
    """
    few = next((site for site in allowed if allowed[site].directions < ranks[site]), None)
    if few is not None:
        raise InputError(
            f"{allowed[few].directions} of {few.d_in} directions are known at {few.name!r}, whose adapters have rank {ranks[few]}: "
            "give covariances, or null spaces of a larger rank"
        )
    beyond = [site for site in allowed if allowed[site].leak > leak + solvers.NO_LEAK]
    if beyond:
        worst = max(beyond, key=lambda site: allowed[site].leak)
        warnings.warn(
            f"leak={leak:g} is less than r directions have at {len(beyond)} of {len(allowed)} sites: A is confined there to as "
            f"many as its rank, whose leak is up to {allowed[worst].leak:.2g} ({worst.name!r}, {ranks[worst]} of {worst.d_in})",
            AdapterWarning,
            stacklevel=3,
        )


def damping_of(site: Site, known: Covariance | NullSpace, strength: float, like: torch.Tensor) -> tuple[Damping, Allowed]:
    """The damping by a site's second moment.

    Raises:
        ValueError: for a null space, which is not all that damping needs; naming the site, if its inputs are all zero.
    """
    if not isinstance(known, Covariance):
        raise InputError("damping needs the second moments: give Covariances (nullspace.compute_covariances), not NullSpaces")
    check_reached(site, known)
    return Damping(known.matrix().to(like.device), strength), Allowed(site.d_in, site.d_in, 1.0)


def check_directions(k: float) -> float:
    """k of `directions_of`, as an `int` or a `float`.

    Raises:
        TypeError: if it is no number.
        ValueError: if it is out of range.
    """
    share = isinstance(k, numbers.Real) and not isinstance(k, numbers.Integral)
    return check_real("k", k, _SHARE) if share else check_integer("k", k)


def directions_of(k: float, d: int) -> int:
    """How many of d leading directions k stands for: at most half of them if it is a number, or a share of them; at least one."""
    return max(1, int(k * d) if isinstance(k, float) else min(k, d // 2))
