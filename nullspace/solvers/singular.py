"""Singular values and vectors: of the left side from Gram matrices where these suffice, of the right side by inverse iteration."""

from __future__ import annotations

import math

import torch

from nullspace.checks import check_between, check_integer
from nullspace.errors import InputError
from nullspace.solvers import cost, krylov
from nullspace.solvers.checks import check_finite, with_fixed_signs
from nullspace.solvers.eigen import top_eigenpairs
from nullspace.solvers.triangular import Factor

# Singular values from Gram matrices: the largest ratio of two wanted ones, and the largest condition number of a matrix that is
# inverted.
SQUARE_LIMIT, NEARLY_SINGULAR = 1e5, 1e12
# Relative to ‖R‖: singular values of a root that count as zero. How many shifts are tried: each divides the range of the inverse's
# eigenvalues by 1 / eps until the wanted ones are the largest.
ZERO, SHIFTS = 100 * krylov.EPS, 5
# Below this order a whole SVD takes no longer. What ‖RV‖² may exceed its bound by.
ROOT_MIN_D, EXCESS = 512, 1e-9


def bottom_right_singular(root: torch.Tensor, k: int, *, every: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """The bottom of RᵀR from R itself: nothing is squared, and small singular values keep their digits.

    Args:
        root: (n, d) real matrix, n ≥ d; taken in float64.
        k: how many, 1 ≤ k ≤ d.
        every: all singular values are wanted.

    Returns:
        σ² (m,), ascending, and the right singular vectors (d, k) of the k smallest σ, float64, signs as in `bottom_eigenpairs`.
        m = d for a whole SVD, k + 16 for inverse iteration.

    Cost: about 20 d³ flops, 32 · d² bytes. From d = 512 on, if d ≥ 10 (k + 16) and without `every`, it is inverse iteration with
    the triangular factor of R: 16 d² (k + 16) flops and 8 · d² bytes; for a root that is not upper triangular or is nearly
    singular, 4 n d² flops and 40 · d² bytes more. A whole SVD follows where that does not converge.

    Raises:
        ValueError: if `root` has fewer rows than columns or holds NaN or Inf, or k is out of range.
    """
    n, d = root.shape
    if n < d:
        raise InputError(f"a root has at least as many rows as columns, not {tuple(root.shape)}")
    check_between("k", k, d)
    check_finite(root)
    root = root.to(torch.float64)
    pairs = None if every or d < ROOT_MIN_D else inverse_of_root(root, k, cost.tuning(d, k, root.device))
    if pairs is None:
        _, sigma, vectors = torch.linalg.svd(root, full_matrices=False)
        pairs = sigma.flip(0).square(), vectors[-k:].flip(0).mT
    return pairs[0], with_fixed_signs(pairs[1])


def inverse_of_root(root: torch.Tensor, k: int, tuning: krylov.Tuning) -> tuple[torch.Tensor, torch.Tensor] | None:
    """σ² (k + 16,) and the vectors (d, k), as `bottom_right_singular`, by block Krylov iteration; None where it does not converge.

    Rᵀ is a Cholesky factor of RᵀR. A shift, which a singular R needs, makes it that of [R; √shift · I].
    """
    wanted, d = k + krylov.GUARD, root.shape[1]
    norm = float(torch.linalg.matrix_norm(root))
    if krylov.LEAST_ORDER * wanted > d or not 0 < norm < math.inf:
        return None
    scale = 2.0 ** math.frexp(norm)[1]
    norm /= scale
    zero, shift = (ZERO * norm) ** 2, 0.0
    for _ in range(SHIFTS):
        lower = _lower(root, scale, shift)
        if shift == 0 and not bool(lower.diagonal().abs().min() > ZERO * norm):
            shift = krylov.EPS * norm**2
            del lower
            continue
        factor = Factor(lower, tuning.block)
        ritz, estimate = krylov.inverse_krylov(factor, shift, zero, norm, k, tuning, power=0.5)
        largest = estimate if ritz is None else 1 / float(ritz.theta[k - 1]) - shift
        # A shift above σ_k² leaves nothing to tell it from the next ones.
        if ritz is not None and (largest <= zero or largest >= shift):
            return _certified(root, scale, norm, factor, ritz, shift, k)
        if not largest > 0:
            break
        shift = largest / 16
        del lower, factor, ritz  # before the next factor is made
    return None


def _lower(root: torch.Tensor, scale: float, shift: float) -> torch.Tensor:
    """L (d, d) lower triangular with LLᵀ = RᵀR / scale² + shift · I, a copy."""
    rows = root / scale
    d = rows.shape[1]
    if shift:
        rows = torch.cat([rows, shift**0.5 * torch.eye(d, dtype=rows.dtype, device=rows.device)])
    if len(rows) > d or bool(rows.tril(-1).any()):
        rows = torch.linalg.qr(rows, mode="r").R
    return rows.mT


def _certified(
    root: torch.Tensor, scale: float, norm: float, factor: Factor, ritz: krylov.Ritz, shift: float, k: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """σ² of all columns and the k bottom vectors, by a thin SVD of RV; None if the checks fail."""
    # Ritz values of the inverse give upper bounds of σ², to second order in the error of the vectors. What the vectors have along
    # large singular values shows in ‖RV‖.
    bound = float((1 / ritz.theta[:k] - shift).clamp(min=0).sum()) * (1 + EXCESS) + k * (ZERO * norm) ** 2
    image = ritz.image
    for _ in range(krylov.POLISHES):
        columns = krylov.orthonormal(image)
        triangle = torch.linalg.qr(root @ columns / scale, mode="r").R.cpu()
        if not bool(triangle.isfinite().all()):
            return None
        _, sigma, rotation = torch.linalg.svd(triangle)
        vectors = krylov.orthonormal(columns @ rotation.mT.flip(1).to(columns.device))[:, :k]
        values = sigma.flip(0).square()
        remaining = krylov.complement(factor, vectors)
        checks = torch.cat([krylov.loss_of_orthogonality(vectors)[None], remaining.flatten()]).cpu()
        if float(values[:k].sum()) <= bound and checks[0] <= krylov.ORTHOGONAL:
            missed = krylov.smaller_remains(checks[1:].reshape(remaining.shape), float(ritz.theta[k - 1]))
            return None if missed else ((values * scale**2).to(columns.device), vectors)
        image = factor.solve(columns)
    return None


def left_singular(m: torch.Tensor, k: int, *, end: str = "top", skip: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest or smallest singular values of a matrix, or k in between, and their left singular vectors: M = U Σ Vᵀ.

    Of a product W C it is these that give CorDA's factors without an inverse: U_r Σ_r V_rᵀ C⁻¹ = U_r U_rᵀ W.

    The large ones come from the smaller Gram matrix, the small ones from that of R⁻¹, with R of a QR decomposition, in which they
    are the large ones: neither depends on the digits of the other end. A last, thin SVD of UᵀM gives Σ and rotates U. Where
    M is too near to singular, or its singular values lie too far apart, for squares (`SQUARE_LIMIT`), a whole SVD is taken. Below
    that limit, squares turn a vector at the edge by eps · (σ_1 / σ_k)² over its relative gap to the next one.

    Args:
        m: (n, d) real matrix; taken in float64.
        k: how many, 1 ≤ k ≤ min(n, d).
        end: `"top"`: σ_1 … σ_k; `"bottom"`: the last k of the min(n, d) singular values.
        skip: leave out so many of that end: σ_{skip + 1} … σ_{skip + k}, or the k before the last `skip`. The vectors are computed
            together with those that lie between them and the nearer end.

    Returns:
        Singular values (k,), descending, and orthonormal vectors (n, k), float64, on the device of `m`; the entry of largest
        magnitude of every vector is positive.

    Cost: with s = min(n, d) and l = max(n, d), about l s² flops and 4/3 · s³ for the tridiagonal form (top), and
    2 l s² + s³ more for the bottom. 8 · (2 n d + 4 s²) bytes.

    Raises:
        ValueError: if `m` is not a matrix or holds NaN or Inf, k or `skip` is out of range, or `end` is unknown.
    """
    if not check_integer("k", k, least=None) >= 1 or m.ndim != 2 or k > min(m.shape):
        raise InputError(f"k must be between 1 and the smaller side of the matrix {tuple(m.shape)}, not {k}")
    if end not in ("top", "bottom"):
        raise InputError(f"end must be 'top' or 'bottom', not {end!r}")
    rest = min(m.shape) - k
    if check_integer("skip", skip, least=0) > rest:
        raise InputError(f"skip must be at most {rest}, with k = {k} of the matrix {tuple(m.shape)}, not {skip}")
    check_finite(m)
    m = m.to(torch.float64)
    at_top = end == "top"
    if 2 * skip > rest:
        at_top, skip = not at_top, rest - skip
    pairs = left_top(m, k + skip) if at_top else left_bottom(m, k + skip)
    if pairs is None:
        u, sigma, _ = torch.linalg.svd(m, full_matrices=False)
        pairs = (sigma[: k + skip], u[:, : k + skip]) if at_top else (sigma[-k - skip :], u[:, -k - skip :])
    wanted = slice(skip, None) if at_top else slice(0, k)  # both are descending
    return pairs[0][wanted], with_fixed_signs(pairs[1][:, wanted])


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
