"""The smallest eigenpairs by shift-invert: a block Krylov iteration on (C + σI)⁻¹, from a Cholesky factor of C + σI."""

from __future__ import annotations

import torch

# How often the shift is raised tenfold if Cholesky fails with eps · trace, the least that rounding allows.
SHIFT_RAISES = 2
# Vectors that are computed beside the k wanted ones, which makes k + GUARD: these converge last, and are not waited for.
GUARD = 16
# A block has (k + GUARD) / NARROW columns, or k + GUARD. Narrow blocks converge with fewer columns in all; wide ones take fewer and
# larger products.
NARROW = 4
# In multiples of k + GUARD columns: the first check of convergence, and the limit. In steps: from one check to the next.
FIRST_CHECK, MAX_COLUMNS = 5, 10
CHECK_EVERY = 2
# A Ritz pair (θ, u) of the inverse has converged when ‖(C + σI)⁻¹u − θu‖ ≤ RITZ_TOLERANCE · θ, and the result is accepted when
# ‖CU − UΛ‖ ≤ RESIDUAL · ‖C‖, after at most POLISHES steps of subspace iteration.
RITZ_TOLERANCE, RESIDUAL = 1e-7, 1e-12
POLISHES = 4
# Columns and steps of the search for a pair that was missed.
PROBES, PROBE_STEPS = 8, 4


def shift_invert(c: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The k smallest eigenpairs by block Krylov iteration on the inverse; None where that does not converge.

    The wanted end of C is the far end of (C + σI)⁻¹, where Krylov spaces converge fast, and a shift moves no vector. With
    LLᵀ = C + σI, a step is two triangular solves and a reorthogonalisation against all columns so far (Golub and Van Loan,
    "Matrix Computations", block Lanczos). Rayleigh–Ritz on the last space takes the singular values of LᵀU, which keep more digits
    of small eigenvalues than UᵀCU does. The result has been checked: ‖CU − UΛ‖ ≤ 1e-12 ‖C‖ (Frobenius norms), and a search in the
    complement has met no smaller eigenvalue.

    Args:
        c: (d, d) float64, symmetric positive semi-definite.
        k: how many, at least 1.

    Returns:
        Eigenvalues (k + GUARD,), ascending, and orthonormal vectors (d, k). None as well where d < MAX_COLUMNS · (k + GUARD).
    """
    wanted = k + GUARD
    if MAX_COLUMNS * wanted > len(c):
        return None
    least = shift = torch.finfo(torch.float64).eps * float(c.diagonal().sum())
    narrow, estimate = max(8, wanted // NARROW), 0.0
    # First narrow blocks and the least shift. With fewer than k zero eigenvalues, (C + σI)⁻¹ then spans 1e16, and rounding drowns
    # the other wanted pairs: the second attempt uses σ ≈ λ_k / 16, of which the first one has an estimate. An eigenvalue that is
    # repeated more often than a block has columns needs wide blocks.
    for width in (narrow, narrow, wanted):
        factor, shift = _shifted_cholesky(c, max(shift, estimate / 16))
        if factor is None:
            return None
        columns, estimate = _inverse_krylov(factor, shift, least, wanted, width)
        pairs = None if columns is None else _polished(c, factor, shift, columns, k)
        if pairs is not None and not smaller_remains(factor, pairs[1], float((pairs[0][k - 1] + shift).clamp(min=0).sqrt())):
            return pairs
    return None


def smaller_remains(factor: torch.Tensor, basis_dk: torch.Tensor, sigma: float) -> bool:
    """Whether L has a singular value below σ in the complement of a basis, by a few steps of the iteration there.

    Args:
        factor: L, (d, d) lower triangular, LLᵀ = C + σI.
        basis_dk: orthonormal columns.
        sigma: the largest singular value that belongs to the basis.
    """
    generator = torch.Generator().manual_seed(1)
    block = torch.randn(len(factor), PROBES, generator=generator, dtype=torch.float64).to(factor.device)
    space: list[torch.Tensor] = []
    for _ in range(PROBE_STEPS):
        for known in (basis_dk, *space, basis_dk, *space):
            block = block - known @ (known.mT @ block)
        space.append(torch.linalg.qr(block).Q)
        block = _solve(factor, space[-1])
    smallest = torch.linalg.svdvals(factor.mT @ torch.cat(space, dim=1))[-1]
    return bool(smallest < (1 - 1e-3) * sigma)


def _polished(
    c: torch.Tensor, factor: torch.Tensor, shift: float, columns: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Eigenvalues of all columns and the k bottom vectors, by subspace iteration; None if the residual stays large."""
    norm = torch.linalg.matrix_norm(c)
    for _ in range(POLISHES):
        # A solve shrinks the part of vector i along eigenvector j by λ_i / λ_j: the parts along large eigenvalues, which dominate
        # the residual, vanish.
        q = torch.linalg.qr(_solve(factor, columns)).Q
        _, sigma, rotation = torch.linalg.svd(torch.linalg.qr(factor.mT @ q).R)
        columns = (q @ rotation.mT).flip(1)
        values = (sigma.square() - shift).flip(0)
        basis = columns[:, :k]
        if bool(torch.linalg.matrix_norm(c @ basis - basis * values[:k]) <= RESIDUAL * norm):
            return values, basis
    return None


def _shifted_cholesky(c: torch.Tensor, shift: float) -> tuple[torch.Tensor | None, float]:
    """L and σ with LLᵀ = C + σI, σ raised a little where rounding asks for it; None if C is zero, or not positive semi-definite."""
    for _ in range(SHIFT_RAISES + 1):
        if not shift > 0:
            break
        factor = c.clone()
        factor.diagonal().add_(shift)
        info = torch.empty((), dtype=torch.int32, device=c.device)
        torch.linalg.cholesky_ex(factor, out=(factor, info))
        if int(info) == 0:
            return factor, shift
        shift *= 10
    return None, 0.0


def _solve(factor: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(LLᵀ)⁻¹ x."""
    return torch.linalg.solve_triangular(factor.mT, torch.linalg.solve_triangular(factor, x, upper=False), upper=True)


def _inverse_krylov(factor: torch.Tensor, shift: float, least: float, wanted: int, width: int) -> tuple[torch.Tensor | None, float]:
    """Columns that span the bottom of the spectrum, and an estimate of the largest wanted eigenvalue.

    Args:
        factor, shift: L and σ.
        least: eps · tr C; eigenvalues below 100 times this count as zero, and are not waited for.
        wanted: k + GUARD.
        width: columns of a block.

    Returns:
        (d, wanted) orthonormal, all but the last GUARD converged to RITZ_TOLERANCE; None if MAX_COLUMNS · wanted columns are not
        enough for that.
    """
    estimate = 0.0
    d = factor.shape[0]
    steps = (MAX_COLUMNS * wanted - width) // width
    start = torch.randn(d, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(factor.device)
    basis = factor.new_empty(d, (steps + 1) * width)
    projected = factor.new_zeros((steps + 1) * width, (steps + 1) * width)
    basis[:, :width] = torch.linalg.qr(start).Q
    for step in range(steps):
        new = slice(step * width, (step + 1) * width)
        behind = slice((step + 1) * width, (step + 2) * width)
        so_far = basis[:, : new.stop]
        image = _solve(factor, basis[:, new])
        overlap = so_far.mT @ image
        q, scale = torch.linalg.qr(image - so_far @ overlap)
        again = so_far.mT @ q  # once more, or the columns of a nearly exhausted space would not be orthogonal
        q, rescale = torch.linalg.qr(q - so_far @ again)
        projected[: new.stop, new] = overlap + again @ scale
        basis[:, behind] = q
        if new.stop < FIRST_CHECK * wanted or (step + 1) % CHECK_EVERY != 0:
            continue
        small = projected[: new.stop, : new.stop]
        theta, y = torch.linalg.eigh(small.triu() + small.triu(1).mT)
        theta, y = theta.flip(0)[:wanted], y.flip(1)[:, :wanted]
        error = torch.linalg.vector_norm((rescale @ scale) @ y[new], dim=0) / theta
        estimate = max(float(1 / theta[-1 - GUARD]) - shift, 0.0)
        null = 1 / theta - shift < 100 * least  # zero, as far as float64 can tell
        if bool(((error <= RITZ_TOLERANCE) | null)[: wanted - GUARD].all()):
            return so_far @ y, estimate
    return None, estimate
