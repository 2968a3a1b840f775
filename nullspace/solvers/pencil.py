"""Two second moments diagonalised together."""

from __future__ import annotations

from typing import NamedTuple

import torch

from nullspace.errors import InputError
from nullspace.solvers.checks import check_symmetric

# Rounding of an entry of a second moment, relative to √(K_ii K_jj), which bounds it (Cauchy–Schwarz).
ENTRY_ROUNDING = 4 * torch.finfo(torch.float64).eps


class Pencil(NamedTuple):
    """T and K in one basis: Vᵀ T V = diag(first), Vᵀ K V = diag(second), and Zᵀ V = I.

    With f_i = first and s_i = second: f_i + s_i = 1 up to rounding, T = Z diag(f) Zᵀ and K = Z diag(s) Zᵀ.
    """

    first: torch.Tensor
    """(d,) float64, ≥ 0, ascending up to rounding."""
    second: torch.Tensor
    """(d,) float64, ≥ 0."""
    vectors: torch.Tensor
    """(d, d) float64: V, generalised eigenvectors in columns."""
    dual: torch.Tensor
    """(d, d) float64: Z = (T + K) V."""


@torch.no_grad()
def diagonalise(t: torch.Tensor, k: torch.Tensor, *, noise: float = 0.0) -> Pencil:
    """Diagonalise T and K together.

    T + K is divided by its diagonal on both sides and factorised, R = L Lᵀ; the eigenvectors are those of L⁻¹ (T − K) L⁻ᵀ, whose
    eigenvalues f − s are between −1 and 1. So neither of the two has to be well conditioned, and small values of both f and s are
    as accurate as the rounding of T and K permits.

    Args:
        t: (d, d) symmetric positive definite.
        k: (d, d) symmetric positive semi-definite.
        noise: ‖E‖₂ of the unknown error of K. Values of s that this error, or the rounding of the entries of K, can have caused
            become 0: a K that was computed from few inputs is not of full rank by its rounding.

    Cost: about 9 d³ for the eigenvectors and 7 d³ for the rest. In memory, six matrices of d² float64 numbers.

    Raises:
        ValueError: if the matrices are not square, of different sizes, hold NaN or Inf, or T + K is not positive definite.
    """
    d = check_symmetric(t)
    if check_symmetric(k) != d:
        raise InputError(f"two second moments of one site are needed, not {tuple(t.shape)} and {tuple(k.shape)}")
    t, k = t.to(torch.float64), k.to(t.device, torch.float64)
    total = t + k
    if not bool((total.diagonal() > 0).all()):
        raise InputError("the sum of the two second moments is not positive definite: its diagonal is not positive")
    scale = total.diagonal().rsqrt()
    lower, failed = torch.linalg.cholesky_ex(total * scale[:, None] * scale)
    if bool(failed):
        raise InputError("the sum of the two second moments is not positive definite: use a larger ridge")
    reduced_t, reduced_k = (_reduced(m * scale[:, None] * scale, lower) for m in (t, k))
    _, q = torch.linalg.eigh(reduced_k - reduced_t)
    first = ((q.mT @ reduced_t) * q.mT).sum(1).clamp(min=0)
    second = ((q.mT @ reduced_k) * q.mT).sum(1)
    vectors = torch.linalg.solve_triangular(lower.mT, q, upper=True) * scale[:, None]
    squares = vectors.square()
    rounding = ENTRY_ROUNDING * (squares * k.diagonal().clamp(min=0)[:, None]).sum(0) + noise * squares.sum(0)
    return Pencil(first, torch.where(second > rounding, second, 0.0), vectors, (lower @ q) / scale[:, None])


def _reduced(m: torch.Tensor, lower: torch.Tensor) -> torch.Tensor:
    """L⁻¹ M L⁻ᵀ."""
    half = torch.linalg.solve_triangular(lower, m, upper=False)
    full = torch.linalg.solve_triangular(lower, half.mT, upper=False)
    return (full + full.mT) / 2
