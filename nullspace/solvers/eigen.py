"""Eigenpairs of dense symmetric positive semi-definite matrices, in float64; spectra, numerical and effective ranks."""

from __future__ import annotations

import contextlib
import warnings

import numpy as np
import torch

from nullspace.checks import check_between, check_one_of
from nullspace.errors import InputError, ResourceUseWarning
from nullspace.solvers import cost, lapack
from nullspace.solvers.checks import check_symmetric, with_fixed_signs
from nullspace.solvers.krylov import shift_invert
from nullspace.solvers.triangular import shifted_cholesky

METHODS = ("auto", "eigh", "lapack-subset", "shift-invert")

# Relative to the trace: rounding turns a zero eigenvalue into one up to this size.
ZERO_EIGENVALUE = 16 * torch.finfo(torch.float64).eps


def bottom_eigenpairs(
    c: torch.Tensor, k: int, *, method: str = "auto", overwrite: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k smallest eigenvalues of a symmetric matrix and their vectors: C V = V Λ.

    Args:
        c: (d, d) symmetric positive semi-definite matrix; taken in float64.
        k: how many, 1 ≤ k ≤ d.
        method: `"lapack-subset"` (LAPACK's tridiagonal form and inverse iteration; on the CPU), `"eigh"` (all d pairs by
            `torch.linalg.eigh`, on the matrix's device), `"shift-invert"` (block Krylov on (C + σI)⁻¹, on the matrix's device;
            it falls back to one of the others where it does not converge, and for d < 10 (k + 16)) or `"auto"`. That is, for a CPU
            matrix, shift-invert from d = 3072 on if k ≤ d / 24, the subset from d = 128 on if k ≤ d / 4; for a CUDA matrix,
            shift-invert if d ≥ 10 (k + 16), on an H100 from d = 3584 on; else `"eigh"`. Where a GPU has no memory for `"eigh"`,
            LAPACK computes on the host.
        overwrite: `c` may be destroyed, which saves a copy of it.

    Returns:
        Eigenvalues (k,), ascending, and orthonormal vectors (d, k), float64, on the device of `c`. The entry of largest
        magnitude of every vector is positive. Where eigenvalues coincide, any orthonormal basis of their space is right and
        one of them is returned. Rounding may turn a zero eigenvalue into ±eps · ‖C‖.

    Cost: 4/3 · d³ flops for the reduction to tridiagonal form (half of them bound by memory), then O(d² k) for the subset;
    about 9 d³ in all for `"eigh"`; d³ / 3 + 12 d² (k + 16) for shift-invert. Beside C, 16 · d² bytes at most (24 · d² for
    `"eigh"`); for shift-invert 8 · d² and 8 · d bytes a column, of which there are 20 (k + 16) at most.

    Raises:
        ValueError: if `c` is not square or holds NaN or Inf, k is out of range, or the method is unknown.

    Warns:
        UserWarning: where the host computes what a GPU has no memory for.
    """
    values, vectors = partial_eigh(c, k, method=method, overwrite=overwrite)
    return values[:k].clone(), vectors


def partial_eigh(
    c: torch.Tensor, k: int, *, method: str = "auto", overwrite: bool = False, every: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k smallest eigenpairs of a symmetric matrix, and the other eigenvalues that the method computes.

    Args, cost and errors: as `bottom_eigenpairs`.
        every: all eigenvalues are wanted: `"auto"` leaves out the method that does not give them.

    Returns:
        Eigenvalues (m,), ascending, k ≤ m ≤ d, and orthonormal vectors (d, k), float64, on the device of `c`. m = d but for
        shift-invert, which gives a few beyond the k-th; m > k wherever k < d.
    """
    d = check_symmetric(c)
    check_between("k", k, d)
    check_one_of("method", method, METHODS)
    if method == "auto":
        method = cost.choose_method(d, k, c.device, every=every)
    if method == "shift-invert":
        pairs = shift_invert(c.to(torch.float64), k, cost.tuning(d, k, c.device))
        if pairs is not None:
            return pairs[0], with_fixed_signs(pairs[1])
        method = cost.choose_method(d, k, c.device, every=True)
    pairs = _every_pair(c, k) if method != "lapack-subset" or d <= 2 else None
    eigenvalues, basis = pairs if pairs is not None else _on_host(c, k, overwrite)
    return eigenvalues, with_fixed_signs(basis)


def _every_pair(c: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """All eigenvalues and the k bottom vectors by `torch.linalg.eigh`; None, with a warning, where a GPU has no memory for it."""
    with contextlib.suppress(torch.OutOfMemoryError):
        values, vectors = torch.linalg.eigh(c.to(torch.float64))
        return values, vectors[:, :k]
    warnings.warn(
        f"{c.device} has no memory for all eigenpairs of a matrix of order {len(c)} (torch.linalg.eigh): they are computed on the "
        "host, which takes longer",
        ResourceUseWarning,
        stacklevel=2,
    )
    return None


def _on_host(c: torch.Tensor, k: int, overwrite: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """All eigenvalues and the k bottom vectors by LAPACK, d > 2."""
    values, vectors = lapack.bottom_pairs(c.detach().to("cpu", torch.float64).numpy(), k, overwrite)
    return torch.from_numpy(values).to(c.device), torch.from_numpy(vectors).to(c.device)


def top_eigenpairs(c: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest eigenvalues, descending, and their vectors. See `bottom_eigenpairs`.

    Raises:
        ValueError: as `bottom_eigenpairs`.
    """
    values, vectors = bottom_eigenpairs(-c.to(torch.float64), k, overwrite=True)
    return -values, vectors


def spectrum(c: torch.Tensor) -> torch.Tensor:
    """All eigenvalues of a symmetric matrix, (d,), ascending, float64, without vectors: 4/3 · d³ flops.

    Raises:
        ValueError: if `c` is not square or holds NaN or Inf.
    """
    check_symmetric(c)
    return torch.linalg.eigvalsh(c.to(torch.float64))


def numerical_rank(c: torch.Tensor, noise: float = 0.0, *, enough: int | None = None) -> tuple[int, int]:
    """How many eigenvalues of a symmetric positive semi-definite matrix are certainly not zero, and how many may not be.

    Args:
        c: (d, d); taken in float64.
        noise: ‖E‖ of the unknown error of C.
        enough: if at least so many exceed the noise, the results may be as small as this. It is decided by the leading block of
            this order, whose i-th largest eigenvalue is at most that of C (Cauchy's interlacing theorem).

    Returns:
        How many exceed the noise, and how many exceed what rounding in float64 leaves of zeros.

    Cost: with m = `enough`, or d: m³ / 3 flops if all of the block's do, a Cholesky decomposition, and 8 · m² bytes; otherwise
    4/3 · d³ more and 8 · d² bytes.

    Raises:
        ValueError: if `c` is not square or holds NaN or Inf.
    """
    d = check_symmetric(c)
    c = c.to(torch.float64)
    least = ZERO_EIGENVALUE * float(c.diagonal().sum())
    order = d if enough is None else min(max(enough, 0), d)
    if shifted_cholesky(c[:order, :order], 1.0, -max(noise, least), 0)[0] is not None:
        return order, order
    values = torch.linalg.eigvalsh(c)
    return int((values > max(noise, least)).sum()), int((values > least).sum())


def effective_rank(singular_values: torch.Tensor | np.ndarray) -> float:
    """eRank = exp(−Σ p_i log p_i) with p_i = σ_i / Σσ (arXiv 2503.02659, eq. 2–3; Roy and Vetterli 2007).

    Args:
        singular_values: (n,) non-negative numbers in any order; zeros add nothing.

    Returns:
        Between 1 (one direction) and n (all equal); 0.0 if all are zero.

    Raises:
        ValueError: if a value is negative, NaN or infinite.
    """
    if isinstance(singular_values, np.ndarray):
        singular_values = np.ascontiguousarray(singular_values)  # torch takes no negative strides, and `s[::-1]` is common
    sigma = torch.as_tensor(singular_values, dtype=torch.float64)
    if not bool(torch.isfinite(sigma).all()) or bool((sigma < 0).any()):
        raise InputError("singular values must be finite and not negative")
    total = sigma.sum()
    if total == 0:
        return 0.0
    return float(torch.exp(torch.special.entr(sigma / total).sum()))
