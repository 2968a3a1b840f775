"""What a step may change of the A's of one site: an orthogonal projection, or a smooth damping."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch

from nullspace import solvers
from nullspace.artifacts.null_space import NullSpace
from nullspace.errors import InputError
from nullspace.model.sites import Site
from nullspace.moments.covariance import Covariance


class Allowed(NamedTuple):
    """The directions that a site's A may change in."""

    directions: int
    """k; d_in where changes are damped."""
    d_in: int
    leak: float
    """√(Σ λ / tr C) of these directions."""
    least: float | None = None
    """The same of the first r directions, r the rank: the least budget; None where fewer are known, or changes are damped."""


class Projection:
    """Rows times P = U_k U_kᵀ. Of U_k and its complement the smaller one is kept.

    Args:
        basis: (d_in, m) orthonormal columns.
        inside: whether these are U_k, or its complement.
    """

    def __init__(self, basis: torch.Tensor, *, inside: bool) -> None:
        self._basis, self._inside = basis, inside

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """(n, d_in) → (n, d_in)."""
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


def projection_of(known: Covariance | NullSpace, leak: float, rank: int, device: torch.device) -> tuple[Projection, Allowed]:
    """The projection onto as many of the directions of smallest inputs as together are within the budget.

    Args:
        known: a second moment, or its null space, whose basis is used as far as it is within the budget.
        leak: the budget, of √(Σ λ / tr C).
        rank: of the site's adapters, for `Allowed.least`.
        device: where to solve, and to keep the projection in float32.
    """
    if isinstance(known, NullSpace):
        values, vectors, trace = known.eigenvalues, known.basis, known.trace
    else:
        c = known.matrix().to(device)
        trace = float(c.trace())
        values, vectors = solvers.partial_eigh(c, max(1, known.d_in // 4), every=True)
    joint = values.clamp(min=0).cumsum(0) / trace if trace > 0 else torch.zeros_like(values)
    # Rounding leaves up to ZERO_EIGENVALUE · tr C of a zero.
    within = int((joint <= leak**2 + solvers.ZERO_EIGENVALUE * torch.arange(1, len(joint) + 1).to(joint)).sum())
    d_in, given = vectors.shape
    if within > given:
        vectors = solvers.bottom_eigenpairs(c, d_in)[1]
    inside = vectors.shape[1] < d_in or 2 * within <= d_in
    kept = vectors[:, :within] if inside else vectors[:, within:]
    reached = float(joint[within - 1].sqrt()) if within else 0.0
    allowed = Allowed(within, d_in, reached, float(joint[rank - 1].sqrt()) if rank <= len(joint) else None)
    return Projection(kept.to(device, torch.float32).contiguous(), inside=inside), allowed


def check_enough(allowed: Mapping[Site, Allowed], ranks: Mapping[Site, int], leak: float) -> None:
    """Raise `ValueError`, naming a site and the leak that would do, if fewer directions than the rank are within the budget."""
    short = [site for site in allowed if allowed[site].directions < ranks[site]]
    if not short:
        return
    first, needed = short[0], [allowed[site].least for site in short]
    known = [least for least in needed if least is not None]
    instead = "give covariances, or null spaces of a larger rank"
    if len(known) == len(needed):
        instead = f"leak={_rounded_up(max(known))} is the least that does for all"
    raise InputError(
        f"leak={leak:g} leaves {len(short)} of {len(allowed)} sites fewer directions than the rank of their adapters, such as "
        f"{first.name!r} {allowed[first].directions} of {first.d_in} for rank {ranks[first]}: {instead}"
    )


def _rounded_up(value: float) -> str:
    """To two digits."""
    step = 10.0 ** (math.floor(math.log10(value)) - 1) if value > 0 else 1.0
    return f"{math.ceil(value / step) * step:.2g}"


def damping_of(site: Site, known: Covariance | NullSpace, strength: float, device: torch.device) -> tuple[Damping, Allowed]:
    """The damping by a site's second moment.

    Raises:
        ValueError: for a null space, which is not all that damping needs; naming the site, if its inputs are all zero.
    """
    if not isinstance(known, Covariance):
        raise InputError("damping needs the second moments: give Covariances (nullspace.compute_covariances), not NullSpaces")
    if not known.trace > 0:
        raise InputError(
            f"site {site.name!r}: its calibration inputs are all zero. Leave its layers out, or add data that reach it"
        )
    return Damping(known.matrix().to(device), strength), Allowed(site.d_in, site.d_in, 1.0)
