"""Eigenpairs of dense symmetric positive semi-definite matrices, in float64; spectra, numerical and effective ranks."""

from __future__ import annotations

import contextlib

import numpy as np
import scipy.linalg
import torch

from nullspace.checks import check_between, check_one_of
from nullspace.errors import InputError
from nullspace.solvers import cost, lapack
from nullspace.solvers.checks import check_symmetric, with_fixed_signs
from nullspace.solvers.krylov import shift_invert
from nullspace.solvers.threads import one_blas_thread

METHODS = ("auto", "eigh", "lapack-subset", "shift-invert")

# Inverse iteration on the tridiagonal matrix leaves a residual of some 1e-15 of its norm; where it leaves more than this, another
# driver computes the vectors.
PAIR_TOLERANCE = 1e-13
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
            it falls back to one of the others where it does not converge) or `"auto"`: for a CPU matrix, shift-invert from
            d = 3072 on if k ≤ d / 24, the subset from d = 128 on if k ≤ d / 4; else `"eigh"`.
        overwrite: `c` may be destroyed, which saves a copy of it.

    Returns:
        Eigenvalues (k,), ascending, and orthonormal vectors (d, k), float64, on the device of `c`. The entry of largest
        magnitude of every vector is positive. Where eigenvalues coincide, any orthonormal basis of their space is right and
        one of them is returned. Rounding may turn a zero eigenvalue into ±eps · ‖C‖.

    Cost: 4/3 · d³ flops for the reduction to tridiagonal form (half of them bound by memory), then O(d² k) for the subset;
    about 9 d³ in all for `"eigh"`; d³ / 3 + 2 d² (k + 16) a step for shift-invert, some ten steps. Beside C, 16 · d² bytes at
    most (24 · d² for `"eigh"`), and for shift-invert its basis, 8 · d (k + 16) a step.

    Raises:
        ValueError: if `c` is not square or holds NaN or Inf, k is out of range, or the method is unknown.
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
        pairs = shift_invert(c.to(torch.float64), k)
        if pairs is not None:
            return pairs[0], with_fixed_signs(pairs[1])
        method = cost.choose_method(d, k, c.device, every=True)
    if method == "lapack-subset" and d > 2:
        values, vectors = _lapack_subset(c.detach().to("cpu", torch.float64).numpy(), k, overwrite)
        eigenvalues, basis = torch.from_numpy(values).to(c.device), torch.from_numpy(vectors).to(c.device)
    else:
        eigenvalues, basis = torch.linalg.eigh(c.to(torch.float64))
        basis = basis[:, :k]
    return eigenvalues, with_fixed_signs(basis)


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


def numerical_rank(c: torch.Tensor, noise: float = 0.0) -> tuple[int, int]:
    """How many eigenvalues of a symmetric positive semi-definite matrix are certainly not zero, and how many may not be.

    Args:
        c: (d, d); taken in float64.
        noise: ‖E‖ of the unknown error of C.

    Returns:
        How many exceed the noise, and how many exceed what rounding in float64 leaves of zeros.

    Cost: d³ / 3 flops if all do, a Cholesky decomposition; 4/3 · d³ more otherwise. 8 · d² bytes.

    Raises:
        ValueError: if `c` is not square or holds NaN or Inf.
    """
    d = check_symmetric(c)
    c = c.to(torch.float64)
    least = ZERO_EIGENVALUE * float(c.diagonal().sum())
    shifted = c.clone()
    shifted.diagonal().sub_(max(noise, least))
    if not int(torch.linalg.cholesky_ex(shifted).info):
        return d, d
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


def _lapack_subset(c: np.ndarray, k: int, overwrite: bool) -> tuple[np.ndarray, np.ndarray]:
    """All eigenvalues and k vectors, by LAPACK's steps one by one: its drivers give either a subset of both or all of both."""
    # Scaling, as in dsyevr, keeps tiny and huge matrices away from the ends of the range.
    scale = max(c.max(), -c.min()) or 1.0
    work = np.divide(c, scale, out=c if overwrite and c.flags.c_contiguous else None, order="C")
    with one_blas_thread if len(c) < cost.THREADS_MIN_D else contextlib.nullcontext():
        diagonal, beside, tau = lapack.tridiagonal(work)
    with one_blas_thread:
        values = lapack.eigenvalues(diagonal, beside)
        vectors = lapack.eigenvectors(diagonal, beside, values[:k])
        if vectors is None or not _are_eigenpairs(diagonal, beside, values[:k], vectors):
            vectors = _robust_eigenvectors(diagonal, beside, k)
        return values * scale, lapack.rotate(work, tau, vectors)


def _are_eigenpairs(diagonal: np.ndarray, beside: np.ndarray, values: np.ndarray, vectors: np.ndarray) -> bool:
    """Whether T V = V Λ and VᵀV = I. With the k smallest of all eigenvalues in Λ, no pair can then be missing."""
    residual = vectors * (diagonal[:, None] - values)
    residual[1:] += vectors[:-1] * beside[:, None]
    residual[:-1] += vectors[1:] * beside[:, None]
    norm = max(np.abs(diagonal).max(), np.abs(beside).max())
    # Written so that NaN fails too.
    small = bool(np.abs(residual).max() <= PAIR_TOLERANCE * norm)
    return small and bool(np.abs(vectors.T @ vectors - np.eye(len(values))).max() <= PAIR_TOLERANCE)


def _robust_eigenvectors(diagonal: np.ndarray, beside: np.ndarray, k: int) -> np.ndarray:
    _, vectors = scipy.linalg.eigh_tridiagonal(
        diagonal, beside, select="i", select_range=(0, k - 1), lapack_driver="stemr", check_finite=False
    )
    # The vectors of close eigenvalues come out orthogonal to some 1e-12 only; QR restores that, and moves none by more.
    return np.asfortranarray(np.linalg.qr(vectors)[0])
