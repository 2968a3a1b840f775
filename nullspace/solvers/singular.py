"""Singular values and vectors: of the left side from Gram matrices where these suffice, of the right side by a whole SVD."""

from __future__ import annotations

import torch

from nullspace.checks import check_between, check_integer
from nullspace.errors import InputError
from nullspace.solvers.checks import check_finite, with_fixed_signs
from nullspace.solvers.eigen import top_eigenpairs

# Singular values from Gram matrices: the largest ratio of two wanted ones, and the largest condition number of a matrix that is
# inverted.
SQUARE_LIMIT, NEARLY_SINGULAR = 1e5, 1e12


def bottom_right_singular(root: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The bottom of RᵀR from R itself: nothing is squared, and small singular values keep their digits.

    Args:
        root: (n, d) real matrix, n ≥ d; taken in float64.
        k: how many, 1 ≤ k ≤ d.

    Returns:
        σ² (d,), ascending, and the right singular vectors (d, k) of the k smallest σ, float64, signs as in `bottom_eigenpairs`.

    Cost: about 20 d³ flops, 32 · d² bytes.

    Raises:
        ValueError: if `root` has fewer rows than columns or holds NaN or Inf, or k is out of range.
    """
    n, d = root.shape
    if n < d:
        raise InputError(f"a root has at least as many rows as columns, not {tuple(root.shape)}")
    check_between("k", k, d)
    check_finite(root)
    _, sigma, vectors = torch.linalg.svd(root.to(torch.float64), full_matrices=False)
    return sigma.flip(0).square(), with_fixed_signs(vectors[-k:].flip(0).mT)


def left_singular(m: torch.Tensor, k: int, *, end: str = "top") -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest or smallest singular values of a matrix, and their left singular vectors: M = U Σ Vᵀ.

    Of a product W C it is these that give CorDA's factors without an inverse: U_r Σ_r V_rᵀ C⁻¹ = U_r U_rᵀ W.

    The large ones come from the smaller Gram matrix, the small ones from that of R⁻¹, with R of a QR decomposition, in which they
    are the large ones: neither depends on the digits of the other end. A last, thin SVD of UᵀM gives Σ and rotates U. Where
    M is too near to singular, or its singular values lie too far apart, for squares (`SQUARE_LIMIT`), a whole SVD is taken. Below
    that limit, squares turn a vector at the edge by eps · (σ_1 / σ_k)² over its relative gap to the next one.

    Args:
        m: (n, d) real matrix; taken in float64.
        k: how many, 1 ≤ k ≤ min(n, d).
        end: `"top"`: σ_1 … σ_k; `"bottom"`: the last k of the min(n, d) singular values.

    Returns:
        Singular values (k,), descending, and orthonormal vectors (n, k), float64, on the device of `m`; the entry of largest
        magnitude of every vector is positive.

    Cost: with s = min(n, d) and l = max(n, d), about l s² flops and 4/3 · s³ for the tridiagonal form (top), and
    2 l s² + s³ more for the bottom. 8 · (2 n d + 4 s²) bytes.

    Raises:
        ValueError: if `m` is not a matrix or holds NaN or Inf, k is out of range, or `end` is unknown.
    """
    if not check_integer("k", k, least=None) >= 1 or m.ndim != 2 or k > min(m.shape):
        raise InputError(f"k must be between 1 and the smaller side of the matrix {tuple(m.shape)}, not {k}")
    if end not in ("top", "bottom"):
        raise InputError(f"end must be 'top' or 'bottom', not {end!r}")
    check_finite(m)
    m = m.to(torch.float64)
    pairs = left_top(m, k) if end == "top" else left_bottom(m, k)
    if pairs is None:
        u, sigma, _ = torch.linalg.svd(m, full_matrices=False)
        pairs = (sigma[:k], u[:, :k]) if end == "top" else (sigma[-k:], u[:, -k:])
    return pairs[0], with_fixed_signs(pairs[1])


def left_top(m: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The k largest singular values and left vectors from the smaller Gram matrix; None where squares are too inexact."""
    wide = m.shape[0] <= m.shape[1]
    values, vectors = top_eigenpairs(m @ m.mT if wide else m.mT @ m, k)
    if not bool(values[-1] > values[0] / SQUARE_LIMIT**2):
        return None
    return _rotated(m, vectors) if wide else torch.linalg.svd(m @ vectors, full_matrices=False)[1::-1]


def left_bottom(m: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The k smallest singular values and left vectors from (RᵀR)⁻¹, R of a QR decomposition; None where that is too inexact."""
    wide = m.shape[0] <= m.shape[1]
    reflectors, tau = torch.geqrf(m.mT if wide else m)
    r = reflectors[: len(tau)].triu()
    norm = torch.linalg.matrix_norm(r)
    # Rows of M that are zero or repeated leave a zero on the diagonal of R.
    if not bool(r.diagonal().abs().min() > norm / NEARLY_SINGULAR):
        return None
    values, vectors = top_eigenpairs(torch.cholesky_inverse(r, upper=True), k)  # (RᵀR)⁻¹ = R⁻¹ R⁻ᵀ
    if not bool(1 / values[0].sqrt() > norm / NEARLY_SINGULAR) or not bool(values[-1] > values[0] / SQUARE_LIMIT**2):
        return None
    # A step of inverse iteration removes the parts along large singular values that the square has left.
    solved = torch.linalg.solve_triangular(r.mT, vectors, upper=False)
    vectors = torch.linalg.qr(torch.linalg.solve_triangular(r, solved, upper=True)).Q
    if not wide:
        # From right to left vectors by another half of a step, Q R⁻ᵀ V = U Σ⁻¹. M V = U Σ would raise what rounding has left along
        # large singular values by the condition number.
        vectors = torch.linalg.qr(torch.linalg.solve_triangular(r.mT, vectors, upper=False)).Q
        vectors = torch.ormqr(reflectors, tau, torch.cat([vectors, vectors.new_zeros(len(m) - len(r), k)]))
    return _rotated(m, vectors)


def _rotated(m: torch.Tensor, basis_nk: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rayleigh–Ritz for singular vectors: rotates a basis within its span to the singular vectors of M there; their values too."""
    rotation, sigma, _ = torch.linalg.svd(basis_nk.mT @ m, full_matrices=False)
    return sigma, basis_nk @ rotation
