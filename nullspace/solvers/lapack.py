"""LAPACK's steps to the eigenpairs of a symmetric matrix, called without Python's global lock.

`scipy.linalg.lapack` and `scipy.linalg.eigh` hold the lock, so that matrices in several threads are solved one after the other.
SciPy also publishes C pointers to the same routines, each in a capsule whose name is the C signature (`scipy.linalg.cython_lapack`,
for Cython code), and `ctypes` releases the lock around a call. Where a pointer is missing or has another signature (such as 64-bit
integers), the routine of `scipy.linalg.lapack` does the same work.

What that is worth: null spaces of SmolLM2-135M (90 sites of d = 576, 30 of d = 1536, rank 128, 8 × 512 tokens, 2 CPU cores, two
runs each in turn) take 26.3 s; with `eigh(subset_by_index=…, driver="evr")` in the place of these steps 31.4 s, at equal CPU time.
Of the solves alone, `"evr"` takes 1.83 times as long (1.73 to 1.86), and the wrappers of `scipy.linalg.lapack` 1.53 times. With all
eigenvalues (`spectrum=True`), which a subset driver gives by a second reduction only, it is 2.55 and 1.57 times.

All arrays are float64. Nothing is checked here: `nullspace.solvers.eigen` does that.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.linalg
from scipy.linalg import cython_lapack, lapack

from nullspace.errors import InputError
from nullspace.solvers.threads import one_blas_thread

# Inverse iteration on the tridiagonal matrix leaves a residual of some 1e-15 of its norm; where it leaves more than this, another
# driver computes the vectors.
PAIR_TOLERANCE = 1e-13
# Below this order the reduction to tridiagonal form is faster with one BLAS thread than with two: d = 576: 12 and 17 ms,
# d = 1536: 230 and 155 ms.
THREADS_MIN_D = 1024

# C signatures. Cython writes `double` as a name that contains the module's; that is replaced before the comparison.
SIGNATURES = {
    "dsytrd": "void (char *, int *, double *, int *, double *, double *, double *, double *, int *, int *)",
    "dsterf": "void (int *, double *, double *, int *)",
    "dstein": "void (int *, double *, double *, int *, double *, int *, int *, double *, int *, double *, int *, int *, int *)",
    "dormtr": "void (char *, char *, char *, int *, int *, double *, int *, double *, double *, int *, double *, int *, int *)",
}
DOUBLE = r"\b__pyx_t_\w*cython_lapack_d\b"


def bottom_pairs(c: np.ndarray, k: int, overwrite: bool) -> tuple[np.ndarray, np.ndarray]:
    """All eigenvalues and the k bottom vectors, step by step: LAPACK's drivers give a subset of both or all of both.

    Args:
        c: (d, d), d > 2, symmetric, finite.
        k: how many vectors, 1 ≤ k ≤ d.
        overwrite: `c` may be destroyed, which saves a copy where it is C-contiguous.

    Returns:
        (d,), ascending, and orthonormal columns (d, k), F-contiguous.
    """
    # Scaling, as in dsyevr, keeps tiny and huge matrices away from the ends of the range.
    scale = max(c.max(), -c.min()) or 1.0
    work = np.divide(c, scale, out=c if overwrite and c.flags.c_contiguous else None, order="C")
    with one_blas_thread if len(c) < THREADS_MIN_D else contextlib.nullcontext():
        diagonal, beside, tau = tridiagonal(work)
    with one_blas_thread:
        values = eigenvalues(diagonal, beside)
        vectors = eigenvectors(diagonal, beside, values[:k])
        if vectors is None or not _are_eigenpairs(diagonal, beside, values[:k], vectors):
            vectors = _robust_eigenvectors(diagonal, beside, k)
        return values * scale, rotate(work, tau, vectors)


def tridiagonal(a: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A = Q T Qᵀ with T tridiagonal: `dsytrd`.

    Args:
        a: (d, d), d ≥ 2, symmetric, C-contiguous; its upper triangle is read. Overwritten by the reflectors that `rotate` needs.

    Returns:
        The diagonal of T (d,), its neighbour (d − 1,) and the scales of the reflections (d − 1,).

    Cost: 4/3 · d³ flops, half of them bound by memory; 8 · 64 · d bytes beside the arguments.
    """
    d = len(a)
    dsytrd = _routine("dsytrd")
    # A row-major array is, in LAPACK's own order, its transpose: the upper triangle is the lower one there, and nothing is copied.
    if dsytrd is None:
        _, diagonal, beside, tau, _ = lapack.dsytrd(a.T, lower=1, lwork=int(lapack.dsytrd_lwork(d, lower=1)[0]), overwrite_a=True)
        return diagonal, beside, tau
    diagonal, beside, tau, size = np.empty(d), np.empty(d - 1), np.empty(d - 1), np.empty(1)
    dsytrd(b"L", d, a, d, diagonal, beside, tau, size, -1)
    work = np.empty(int(size[0]))
    dsytrd(b"L", d, a, d, diagonal, beside, tau, work, len(work))
    return diagonal, beside, tau


def eigenvalues(diagonal: np.ndarray, beside: np.ndarray) -> np.ndarray:
    """All eigenvalues of a tridiagonal matrix, (d,), ascending: `dsterf`. About 30 d² flops.

    Raises:
        numpy.linalg.LinAlgError: if the iteration does not converge.
    """
    dsterf = _routine("dsterf")
    if dsterf is None:
        values, info = lapack.dsterf(diagonal, beside)
    else:
        values = diagonal.copy()
        info = dsterf(len(values), values, beside.copy())
    if info:
        raise np.linalg.LinAlgError(f"dsterf: {info} off-diagonal elements did not converge")
    return values


def eigenvectors(diagonal: np.ndarray, beside: np.ndarray, values: np.ndarray) -> np.ndarray | None:
    """Vectors of known eigenvalues of a tridiagonal matrix by inverse iteration: `dstein`.

    Args:
        diagonal: (d,), d ≥ 2.
        beside: (d − 1,), the neighbour of the diagonal.
        values: (k,), ascending.

    Returns:
        (d, k), F-contiguous; None if one of them did not converge. The caller checks that they are orthonormal.

    Cost: O(d k²) flops where the values are close to each other (within 1e-3 of the norm), otherwise O(d k).
    """
    d, k = len(diagonal), len(values)
    # One block from the first row to the last, even where T falls apart into several: `dsterf` does not say which value is whose.
    block, ends = np.ones(d, np.intc), np.zeros(d, np.intc)
    ends[0] = d
    dstein = _routine("dstein")
    if dstein is None:
        vectors, info = lapack.dstein(diagonal, beside, values, block, ends)
    else:
        vectors = np.empty((d, k), order="F")
        work, whole_work, failed = np.empty(5 * d), np.empty(d, np.intc), np.empty(k, np.intc)
        diagonal, beside, values = (np.ascontiguousarray(x) for x in (diagonal, beside, values))
        info = dstein(d, diagonal, beside, k, values, block, ends, vectors, d, work, whole_work, failed)
    return None if info else vectors


def rotate(reflectors: np.ndarray, tau: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Q V, the vectors of A from those of T: `dormtr`.

    Args:
        reflectors: (d, d), which `tridiagonal` left in `a`.
        tau: (d − 1,), the third array that `tridiagonal` returned.
        vectors: (d, k), F-contiguous; overwritten.

    Returns:
        (d, k), F-contiguous.

    Cost: 2 d² k flops, 8 · 64 · k bytes.
    """
    d, k = vectors.shape
    dormtr = _routine("dormtr")
    if dormtr is None:
        # Q = diag(1, Q′), and Q′ in the layout of a QR factorisation below the first row.
        q, below = reflectors.T[1:, :-1], np.asfortranarray(vectors[1:])
        work = lapack.dormqr("L", "N", q, tau, below, -1)[1]
        vectors[1:] = lapack.dormqr("L", "N", q, tau, below, int(work[0]), overwrite_c=True)[0]
        return vectors
    size = np.empty(1)
    dormtr(b"L", b"L", b"N", d, k, reflectors, d, tau, vectors, d, size, -1)
    work = np.empty(int(size[0]))
    dormtr(b"L", b"L", b"N", d, k, reflectors, d, tau, vectors, d, work, len(work))
    return vectors


@functools.cache
def _routine(name: str) -> Callable[..., int] | None:
    """A routine that takes bytes, integers and arrays, and returns `info`, LAPACK's last argument; None without such a pointer."""
    capsule = getattr(cython_lapack, "__pyx_capi__", {}).get(name)
    if capsule is None:
        return None
    signature = _name(capsule)
    if re.sub(DOUBLE, "double", signature.decode()) != SIGNATURES[name]:
        return None
    pointer = _pointer(capsule, signature)
    foreign = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * SIGNATURES[name].count("*"))(pointer)

    def call(*arguments: bytes | int | np.ndarray) -> int:
        info = ctypes.c_int(0)
        foreign(*map(_passed, arguments), ctypes.byref(info))
        if info.value < 0:
            raise InputError(f"{name}: argument {-info.value} is wrong")
        return info.value

    return call


def _passed(argument: bytes | int | np.ndarray) -> Any:
    """An argument as Fortran takes it: by its address."""
    if isinstance(argument, np.ndarray):
        return argument.ctypes.data
    return ctypes.byref(ctypes.c_int(argument)) if isinstance(argument, int) else argument


_name = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(("PyCapsule_GetName", ctypes.pythonapi))
_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_GetPointer", ctypes.pythonapi))


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
