"""Eigenproblems of dense symmetric positive semi-definite matrices, in float64, and the effective rank of a spectrum."""

from __future__ import annotations

import numpy as np
import scipy.linalg
import torch
from scipy.linalg import lapack

METHODS = ("auto", "eigh", "lapack-subset")

# LAPACK's subset driver (dsyevr) computes only the wanted vectors, the divide-and-conquer driver behind torch.linalg.eigh all
# of them, but with GEMM. Measured on 2 CPU cores, time of the first over that of the second:
#     k / d        0.02   0.10   0.25   0.50
#     d = 64       0.88   1.28   2.2    3.9
#     d = 576      0.42   0.65   1.2    2.4
#     d = 1536     0.47   0.62   0.89   1.8
#     d = 3072     0.40   0.47   0.92   2.0
SUBSET_FRACTION = 1 / 6
SUBSET_MIN_D = 128


def bottom_eigenpairs(
    c: torch.Tensor, k: int, *, method: str = "auto", overwrite: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k smallest eigenvalues of a symmetric matrix and their vectors: C V = V Λ.

    Args:
        c: (d, d) symmetric positive semi-definite matrix; taken in float64.
        k: how many, 1 ≤ k ≤ d.
        method: `"lapack-subset"` (the steps of LAPACK's `dsyevr` by index; on the CPU), `"eigh"` (all d pairs by
            `torch.linalg.eigh`, on the matrix's device) or `"auto"`: the subset for a CPU matrix with d ≥ 128 and k ≤ d / 6,
            else `"eigh"`.
        overwrite: `c` may be destroyed, which saves a copy of it.

    Returns:
        Eigenvalues (k,), ascending, and orthonormal vectors (d, k), float64, on the device of `c`. The entry of largest
        magnitude of every vector is positive. Where eigenvalues coincide, any orthonormal basis of their space is right and
        one of them is returned. Rounding may turn a zero eigenvalue into ±eps · ‖C‖.

    Cost: 4/3 · d³ flops for the reduction to tridiagonal form (half of them bound by memory), then O(d² k) for the subset driver;
    about 9 d³ in all for `"eigh"`. 16 · d² bytes at most.

    Raises:
        ValueError: if `c` is not square or holds NaN or Inf, k is out of range, or the method is unknown.
    """
    values, vectors = partial_eigh(c, k, method=method, overwrite=overwrite)
    return values[:k].clone(), vectors


def partial_eigh(c: torch.Tensor, k: int, *, method: str = "auto", overwrite: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """All eigenvalues of a symmetric matrix, and the vectors of the k smallest: what one tridiagonal reduction gives.

    Args, cost and errors: as `bottom_eigenpairs`, to which the other eigenvalues add O(d²) flops.

    Returns:
        Eigenvalues (d,), ascending, and orthonormal vectors (d, k), float64, on the device of `c`.
    """
    d = _check_symmetric(c)
    if not 1 <= k <= d:
        raise ValueError(f"k must be between 1 and {d}, not {k}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, not {method!r}")
    if method == "auto":
        subset = c.device.type == "cpu" and d >= SUBSET_MIN_D and k <= d * SUBSET_FRACTION
        method = "lapack-subset" if subset else "eigh"
    if method == "lapack-subset" and d > 2:
        values, vectors = _tridiagonal_eigh(c.detach().to("cpu", torch.float64).numpy(), k, overwrite)
        eigenvalues, basis = torch.from_numpy(values).to(c.device), torch.from_numpy(vectors).to(c.device)
    else:
        eigenvalues, basis = torch.linalg.eigh(c.to(torch.float64))
        basis = basis[:, :k]
    return eigenvalues, _fix_signs(basis)


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
    _check_symmetric(c)
    return torch.linalg.eigvalsh(c.to(torch.float64))


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
        raise ValueError("singular values must be finite and not negative")
    total = sigma.sum()
    if total == 0:
        return 0.0
    return float(torch.exp(torch.special.entr(sigma / total).sum()))


def _tridiagonal_eigh(c: np.ndarray, k: int, overwrite: bool) -> tuple[np.ndarray, np.ndarray]:
    """The steps of LAPACK's dsyevr, one by one, since the driver gives either a subset or all eigenvalues."""
    d = len(c)
    # The transpose of a row-major array is in LAPACK's own order, and nothing is copied. Scaling, as in dsyevr, keeps tiny and
    # huge matrices away from the ends of the range.
    scale = np.abs(c).max() or 1.0
    work = np.divide(c, scale, out=c if overwrite else None).T
    work_size = int(lapack.dsytrd_lwork(d, lower=1)[0])
    reflectors, diagonal, off_diagonal, tau, _ = lapack.dsytrd(work, lower=1, lwork=work_size, overwrite_a=True)
    every, info = lapack.dsterf(diagonal, off_diagonal)
    if info:
        raise np.linalg.LinAlgError(f"dsterf: {info} off-diagonal elements did not converge")
    values, small = scipy.linalg.eigh_tridiagonal(
        diagonal, off_diagonal, select="i", select_range=(0, k - 1), lapack_driver="stemr", check_finite=False
    )
    every[:k] = values
    # C = Q T Qᵀ with Q = diag(1, Q′), and Q′ in the layout of a QR factorisation below the first row (what dormtr does).
    q, q_tau, below = reflectors[1:, :-1], tau, np.asfortranarray(small[1:])
    _, size, _ = lapack.dormqr("L", "N", q, q_tau, below, -1)
    below, _, _ = lapack.dormqr("L", "N", q, q_tau, below, int(size[0]))
    return every * scale, np.concatenate([small[:1], below])


def _check_symmetric(c: torch.Tensor) -> int:
    if c.ndim != 2 or c.shape[0] != c.shape[1] or c.shape[0] == 0:
        raise ValueError(f"expected a square matrix, got shape {tuple(c.shape)}")
    if not bool(torch.isfinite(torch.stack(torch.aminmax(c))).all()):
        raise ValueError("the matrix holds NaN or Inf")
    return c.shape[0]


def _fix_signs(vectors_dk: torch.Tensor) -> torch.Tensor:
    peak = torch.gather(vectors_dk, 0, vectors_dk.abs().argmax(0, keepdim=True))
    return vectors_dk * torch.where(peak < 0, -1.0, 1.0)
