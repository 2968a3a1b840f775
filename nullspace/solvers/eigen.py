"""Eigenproblems of dense symmetric positive semi-definite matrices, in float64, and the effective rank of a spectrum."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import scipy.linalg
import torch
from threadpoolctl import ThreadpoolController

from nullspace.checks import check_between, check_integer
from nullspace.solvers import lapack

METHODS = ("auto", "eigh", "lapack-subset", "shift-invert")

# LAPACK's tridiagonal form and inverse iteration give only the wanted vectors, the divide-and-conquer driver behind
# torch.linalg.eigh all of them, but with GEMM. Measured with one thread, time of the first over that of the second:
#     k / d        0.02   0.10   0.25   0.33   0.50
#     d = 64       1.24   1.28   1.52   1.65   1.97
#     d = 128      0.68   0.77   1.02   1.20   1.60
#     d = 576      0.39   0.50   0.83   0.90   1.29
#     d = 1536     0.30   0.45   0.56   0.73   1.12
#     d = 3072     0.33   0.39   0.61   0.81   1.36
SUBSET_FRACTION = 1 / 4
SUBSET_MIN_D = 128
# Below this order, more BLAS threads than one only wait for each other. Reduction to tridiagonal form with one and with two:
# d = 576: 12 and 17 ms, d = 1536: 230 and 155 ms.
THREADS_MIN_D = 1024
# Matrices side by side, one thread each, against one after the other with all threads, k = 32, 2 CPU cores: 90 of d = 576 in 1.0
# and 2.0 s, 30 of d = 1536 in 4.5 and 5.6 s. Where other work takes one of the cores, BLAS threads that wait for each other make
# the second ten times as long, and the first twice.
SIDE_BY_SIDE_BYTES = 2**30
# Whoever decomposes side by side draws so many sites a thread first, so that none waits for one that has a larger site; but no more
# than weigh this many bytes.
TURNS = 4
TOGETHER_BYTES = 2**25
# Shift-invert against the subset driver, 2 CPU cores, k = 128, time of the first over that of the second
# (benchmarks/results/solvers-cpu.json): d = 2048: 1.1 to 1.2, d = 4096: 0.44 to 0.65, d = 8192: 0.36.
INVERT_FRACTION = 1 / 24
INVERT_MIN_D = 3072
# Inside shift-invert. How often the shift is raised tenfold if Cholesky fails with eps · trace, the least that rounding allows.
SHIFT_RAISES = 2
# Vectors beside the wanted ones, whose sum is then counted in: width of a block (its inverse), first and last number of columns
# with which convergence is looked at. Narrow blocks converge with fewer columns, wider ones take fewer and larger products.
GUARD = 16
NARROW = 4
FIRST_CHECK, CHECK_EVERY, MAX_COLUMNS = 5, 2, 10
# A Ritz pair (θ, u) of the inverse is found when ‖(C + σI)⁻¹u − θu‖ ≤ RITZ_TOLERANCE · θ, and the whole result good when
# ‖CU − UΛ‖ ≤ RESIDUAL · ‖C‖.
RITZ_TOLERANCE, RESIDUAL = 1e-7, 1e-12
POLISHES = 4
# Inverse iteration on the tridiagonal matrix leaves some 1e-15 of its norm; where it leaves more, the vectors are found otherwise.
PAIR_TOLERANCE = 1e-13
# Singular values from squares: how far apart the wanted ones may lie, and how near to singular a matrix may be that is inverted.
SQUARE_LIMIT, NEARLY_SINGULAR = 1e5, 1e12
# What rounding leaves of an eigenvalue that is zero, relative to the trace.
ZERO_EIGENVALUE = 16 * torch.finfo(torch.float64).eps
# Columns and steps of the search for what was missed.
PROBES, PROBE_STEPS = 8, 4


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
    """The k smallest eigenpairs of a symmetric matrix, and what other eigenvalues the method finds on the way.

    Args, cost and errors: as `bottom_eigenpairs`.
        every: all eigenvalues are wanted: `"auto"` leaves out the method that does not give them.

    Returns:
        Eigenvalues (m,), ascending, k ≤ m ≤ d, and orthonormal vectors (d, k), float64, on the device of `c`. m = d but for
        shift-invert, which finds a few beyond the k-th; m > k wherever k < d.
    """
    d = _check_symmetric(c)
    check_between("k", k, d)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, not {method!r}")
    on_cpu = c.device.type == "cpu"
    if method == "shift-invert" or (method == "auto" and on_cpu and not every and d >= INVERT_MIN_D and k <= d * INVERT_FRACTION):
        found = _shift_invert(c.to(torch.float64), k)
        if found is not None:
            return found[0], _fix_signs(found[1])
        method = "auto"
    if method == "auto":
        method = "lapack-subset" if on_cpu and d >= SUBSET_MIN_D and k <= d * SUBSET_FRACTION else "eigh"
    if method == "lapack-subset" and d > 2:
        values, vectors = _tridiagonal_eigh(c.detach().to("cpu", torch.float64).numpy(), k, overwrite)
        eigenvalues, basis = torch.from_numpy(values).to(c.device), torch.from_numpy(vectors).to(c.device)
    else:
        eigenvalues, basis = torch.linalg.eigh(c.to(torch.float64))
        basis = basis[:, :k]
    return eigenvalues, _fix_signs(basis)


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
        raise ValueError(f"a root has at least as many rows as columns, not {tuple(root.shape)}")
    check_between("k", k, d)
    if not bool(torch.isfinite(root).all()):
        raise ValueError("the matrix holds NaN or Inf")
    _, sigma, vectors = torch.linalg.svd(root.to(torch.float64), full_matrices=False)
    return sigma.flip(0).square(), _fix_signs(vectors[-k:].flip(0).mT)


def top_eigenpairs(c: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest eigenvalues, descending, and their vectors. See `bottom_eigenpairs`.

    Raises:
        ValueError: as `bottom_eigenpairs`.
    """
    values, vectors = bottom_eigenpairs(-c.to(torch.float64), k, overwrite=True)
    return -values, vectors


def left_singular(m: torch.Tensor, k: int, *, end: str = "top") -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest or smallest singular values of a matrix, and their left singular vectors: M = U Σ Vᵀ.

    Of a product W C it is these that give CorDA's factors without an inverse: U_r Σ_r V_rᵀ C⁻¹ = U_r U_rᵀ W.

    The large ones come from the smaller Gram matrix, the small ones from that of R⁻¹, with R of a QR decomposition, in which they
    are the large ones: neither asks for the other end's digits. A last SVD of UᵀM, which is thin, gives Σ and turns U. Where M is
    too near to singular, or its singular values lie too far apart, for squares (`SQUARE_LIMIT`), a whole SVD is taken. Until then
    squares cost a vector at the edge some eps · (σ_1 / σ_k)² of its angle to the next one behind it, over their relative gap.

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
        raise ValueError(f"k must be between 1 and the smaller side of the matrix {tuple(m.shape)}, not {k}")
    if end not in ("top", "bottom"):
        raise ValueError(f"end must be 'top' or 'bottom', not {end!r}")
    if not bool(torch.isfinite(m).all()):
        raise ValueError("the matrix holds NaN or Inf")
    m = m.to(torch.float64)
    found = _left_top(m, k) if end == "top" else _left_bottom(m, k)
    if found is None:
        u, sigma, _ = torch.linalg.svd(m, full_matrices=False)
        found = (sigma[:k], u[:, :k]) if end == "top" else (sigma[-k:], u[:, -k:])
    return found[0], _fix_signs(found[1])


def _left_top(m: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    wide = m.shape[0] <= m.shape[1]
    values, vectors = top_eigenpairs(m @ m.mT if wide else m.mT @ m, k)
    if not bool(values[-1] > values[0] / SQUARE_LIMIT**2):
        return None
    return _turned(m, vectors) if wide else torch.linalg.svd(m @ vectors, full_matrices=False)[1::-1]


def _left_bottom(m: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor] | None:
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
    # A step of inverse iteration takes out what the square has left of the large ones.
    solved = torch.linalg.solve_triangular(r.mT, vectors, upper=False)
    vectors = torch.linalg.qr(torch.linalg.solve_triangular(r, solved, upper=True)).Q
    if not wide:
        # From right to left vectors by another half of a step, Q R⁻ᵀ V = U Σ⁻¹. M V = U Σ would raise what rounding has left of the
        # loud directions in V by the condition number.
        vectors = torch.linalg.qr(torch.linalg.solve_triangular(r.mT, vectors, upper=False)).Q
        vectors = torch.ormqr(reflectors, tau, torch.cat([vectors, vectors.new_zeros(len(m) - len(r), k)]))
    return _turned(m, vectors)


def _turned(m: torch.Tensor, basis_nk: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rayleigh and Ritz for singular vectors: the span of a basis stays, its vectors become those of M."""
    rotation, sigma, _ = torch.linalg.svd(basis_nk.mT @ m, full_matrices=False)
    return sigma, basis_nk @ rotation


def spectrum(c: torch.Tensor) -> torch.Tensor:
    """All eigenvalues of a symmetric matrix, (d,), ascending, float64, without vectors: 4/3 · d³ flops.

    Raises:
        ValueError: if `c` is not square or holds NaN or Inf.
    """
    _check_symmetric(c)
    return torch.linalg.eigvalsh(c.to(torch.float64))


def numerical_rank(c: torch.Tensor, noise: float = 0.0) -> tuple[int, int]:
    """How many eigenvalues of a symmetric positive semi-definite matrix are certainly not zero, and how many may not be.

    Args:
        c: (d, d); taken in float64.
        noise: ‖E‖ of what is not known of C.

    Returns:
        How many exceed the noise, and how many exceed what rounding in float64 leaves of zeros.

    Cost: d³ / 3 flops if all do, a Cholesky decomposition; 4/3 · d³ more otherwise. 8 · d² bytes.

    Raises:
        ValueError: if `c` is not square or holds NaN or Inf.
    """
    d = _check_symmetric(c)
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
        raise ValueError("singular values must be finite and not negative")
    total = sigma.sum()
    if total == 0:
        return 0.0
    return float(torch.exp(torch.special.entr(sigma / total).sum()))


def side_by_side(d: int, device: torch.device | str = "cpu") -> int:
    """How many d × d matrices are best decomposed at once: as many as PyTorch has threads, with one thread each.

    One after the other on a GPU, where threads wait for the same device; from d = 3072 on, where most of the work is in large
    products and n copies cost memory; and where n of them would take more than 1 GiB.
    """
    if torch.device(device).type != "cpu" or d >= INVERT_MIN_D:
        return 1
    return max(1, min(torch.get_num_threads(), SIDE_BY_SIDE_BYTES // (16 * d * d)))


@contextlib.contextmanager
def one_thread_each(n: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of n workers, in each of which BLAS and PyTorch compute with one thread.

        n = solvers.side_by_side(d)
        if n > 1:
            with solvers.one_thread_each(n) as pool:
                pairs = list(pool.map(lambda c: solvers.partial_eigh(c, k), matrices))

    What a worker returns has the bits that a lone call has with one thread (`"lapack-subset"` below d = 1024: with any number).
    Until the context ends, BLAS works with one thread in the whole process: nothing else that is large should run meanwhile. Grad
    and inference modes are per thread, and a worker starts with PyTorch's defaults.

    Args:
        n: at least 1.
    """
    threads = torch.get_num_threads()
    try:
        with _one_blas_thread, ThreadPoolExecutor(n, "decomposition", torch.set_num_threads, (1,)) as pool:
            yield pool
    finally:
        # PyTorch's number is a thread's own where it was built with OpenMP, and the process's elsewhere.
        torch.set_num_threads(threads)


def _shift_invert(c: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The k smallest eigenpairs by block Krylov iteration on the inverse; None where that does not converge.

    The wanted end of C is the far end of (C + σI)⁻¹, where Krylov spaces converge fast, and a shift moves no vector. With
    LLᵀ = C + σI, a step is two triangular solves and a reorthogonalisation against all columns so far (Golub and Van Loan,
    "Matrix Computations", block Lanczos). Rayleigh–Ritz on the last space takes the singular values of LᵀU, which keep small
    eigenvalues better than those of UᵀCU. What is returned has been checked: ‖CU − UΛ‖ ≤ 1e-12 ‖C‖ (Frobenius norms), and a search
    in the complement has found nothing quieter.
    """
    wanted = k + GUARD
    if MAX_COLUMNS * wanted > len(c):
        return None
    least = shift = torch.finfo(torch.float64).eps * float(c.diagonal().sum())
    narrow, estimate = max(8, wanted // NARROW), 0.0
    # First narrow blocks and the least shift. Zeros at the bottom, if there are fewer than k, are then so loud in the inverse that
    # rounding blurs the rest: a shift a little below the k-th eigenvalue, of which the first attempt has an estimate, makes them
    # equals. An eigenvalue that is repeated more often than a block is wide takes wide blocks.
    for width in (narrow, narrow, wanted):
        factor, shift = _shifted_cholesky(c, max(shift, estimate / 16))
        if factor is None:
            return None
        columns, estimate = _inverse_krylov(factor, shift, least, wanted, width)
        found = None if columns is None else _polished(c, factor, shift, columns, k)
        if found is not None and not _quieter_left(factor, found[1], float((found[0][k - 1] + shift).clamp(min=0).sqrt())):
            return found
    return None


def _polished(
    c: torch.Tensor, factor: torch.Tensor, shift: float, columns: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Eigenvalues of all columns, and the k bottom vectors, by subspace iteration until C agrees; None if it does not."""
    norm = torch.linalg.matrix_norm(c)
    for _ in range(POLISHES):
        # One solve turns every vector towards the bottom, by λ_i / λ_j from direction j: what is left of the loud ones, which
        # dominate the residual, is gone.
        q = torch.linalg.qr(_solve(factor, columns)).Q
        _, sigma, rotation = torch.linalg.svd(torch.linalg.qr(factor.mT @ q).R)
        columns = (q @ rotation.mT).flip(1)
        values = (sigma.square() - shift).flip(0)
        basis = columns[:, :k]
        if bool(torch.linalg.matrix_norm(c @ basis - basis * values[:k]) <= RESIDUAL * norm):
            return values, basis
    return None


def _quieter_left(factor: torch.Tensor, basis_dk: torch.Tensor, sigma: float) -> bool:
    """Whether something quieter than σ was missed: a few steps of the iteration in the complement of the basis."""
    generator = torch.Generator().manual_seed(1)
    block = torch.randn(len(factor), PROBES, generator=generator, dtype=torch.float64).to(factor.device)
    space: list[torch.Tensor] = []
    for _ in range(PROBE_STEPS):
        for known in (basis_dk, *space, basis_dk, *space):
            block = block - known @ (known.mT @ block)
        space.append(torch.linalg.qr(block).Q)
        block = _solve(factor, space[-1])
    quietest = torch.linalg.svdvals(factor.mT @ torch.cat(space, dim=1))[-1]
    return bool(quietest < (1 - 1e-3) * sigma)


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
    """`wanted` orthonormal columns that span, all but the last GUARD of them to RITZ_TOLERANCE, the bottom of the spectrum.

    Blocks of `width` columns; None if MAX_COLUMNS · wanted of them are not enough. Also an estimate of the largest eigenvalue
    that is wanted.
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


@functools.cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()


class _OneBlasThread:
    """A context in which BLAS works with one thread. The limit holds for the whole process, so that of several threads in such
    contexts, which may overlap in any order, the first sets it and the last lifts it."""

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._limit = _blas().limit(limits=1, user_api="blas")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._limit.restore_original_limits()


_one_blas_thread = _OneBlasThread()


def _tridiagonal_eigh(c: np.ndarray, k: int, overwrite: bool) -> tuple[np.ndarray, np.ndarray]:
    """All eigenvalues and k vectors: the steps of LAPACK's drivers, one by one, since those give either a subset or all of both."""
    # Scaling, as in dsyevr, keeps tiny and huge matrices away from the ends of the range.
    scale = max(c.max(), -c.min()) or 1.0
    work = np.divide(c, scale, out=c if overwrite and c.flags.c_contiguous else None, order="C")
    with _one_blas_thread if len(c) < THREADS_MIN_D else contextlib.nullcontext():
        diagonal, beside, tau = lapack.tridiagonal(work)
    with _one_blas_thread:
        every = lapack.eigenvalues(diagonal, beside)
        vectors = lapack.eigenvectors(diagonal, beside, every[:k])
        if vectors is None or not _are_eigenpairs(diagonal, beside, every[:k], vectors):
            vectors = _robust_eigenvectors(diagonal, beside, k)
        return every * scale, lapack.rotate(work, tau, vectors)


def _are_eigenpairs(diagonal: np.ndarray, beside: np.ndarray, values: np.ndarray, vectors: np.ndarray) -> bool:
    """Whether T V = V Λ and VᵀV = I. With the k smallest of all eigenvalues in Λ, there is then nothing that could be missing."""
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
    # The vectors of close eigenvalues come out orthogonal to some 1e-12 only; QR, which moves none by more, sets that right.
    return np.asfortranarray(np.linalg.qr(vectors)[0])


def _check_symmetric(c: torch.Tensor) -> int:
    if c.ndim != 2 or c.shape[0] != c.shape[1] or c.shape[0] == 0:
        raise ValueError(f"expected a square matrix, got shape {tuple(c.shape)}")
    if not bool(torch.isfinite(torch.stack(torch.aminmax(c))).all()):
        raise ValueError("the matrix holds NaN or Inf")
    return c.shape[0]


def _fix_signs(vectors_dk: torch.Tensor) -> torch.Tensor:
    peak = torch.gather(vectors_dk, 0, vectors_dk.abs().argmax(0, keepdim=True))
    return vectors_dk * torch.where(peak < 0, -1.0, 1.0)
