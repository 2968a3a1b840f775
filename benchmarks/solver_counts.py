"""What shift-invert computes, counted: flops by operation, columns that are solved for, Rayleigh–Ritz problems.

    python -m benchmarks.solver_counts --widths 4096 14336                                   # solver-counts.json
    python -m benchmarks.solver_counts --widths 2048 --certify --name solver-as-on-cuda    # every spectrum, against eigh

The matrices have a real layer's spectrum along random directions, made by cosine transforms, which makes d = 14336 cheap.
Counts do not depend on the device, nor on what else runs there. Seconds are not recorded. The command counts whatever
`method="shift-invert"` does in the checkout where it runs, also in one without tunings (56b4afb and before).
"""

from __future__ import annotations

import argparse
import collections
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import scipy.fft
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.environment import RESULTS, write_result
from benchmarks.solvers import FRACTIONS, LOG_SPECTRUM
from nullspace.solvers import cost, krylov, lapack

K = 128
SPECTRA = ("layer", "steep", "massive", "some zeros", "wide null space", "repeated", "all equal", "flat")
# Eigenproblems of a smaller order are not counted as Rayleigh–Ritz problems: those of a search for missed pairs.
SMALL = 64


def eigh(n: int) -> float:
    return 9.0 * n**3


def householder(rows: int, columns: int) -> float:
    """R by reflections, and the columns of Q."""
    return 4.0 * rows * columns**2 - 4 / 3 * columns**3


# Flops of an operation with these inputs.
FORMULAS: dict[str, Callable[..., float]] = {
    "mm": lambda a, b: 2.0 * a.shape[0] * a.shape[1] * b.shape[1],
    "addmm_": lambda _, a, b: 2.0 * a.shape[0] * a.shape[1] * b.shape[1],
    "linalg_cholesky_ex": lambda a: a.shape[0] ** 3 / 3,
    "linalg_solve_triangular": lambda a, b: float(b.numel() * a.shape[0]),
    "linalg_qr": lambda a: householder(*a.shape),
    "_linalg_eigh": lambda a: eigh(a.shape[0]),
    "_linalg_svd": lambda a: 22.0 * a.shape[0] * a.shape[1] ** 2,  # Golub and Van Loan, both sides
}


class Counts(TorchDispatchMode):
    """Counts the linear algebra of a block, and the bytes of the tensors that it makes.

    Attributes:
        flops: by operation.
        solved: columns to which (LLᵀ)⁻¹ was applied.
        ritz: eigenproblems and singular value problems of order above `SMALL`.
        operations: calls of PyTorch's operations but views, each of which launches a kernel or more on a GPU.
        peak: bytes of tensors that were made in the block and lived at once; memory inside of an operation is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops, self.solved, self.ritz, self.peak, self.operations = collections.Counter[str](), 0, 0, 0, 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in FORMULAS:
            self.flops[name] += FORMULAS[name](*(a for a in args if isinstance(a, torch.Tensor)))
        if name in ("_linalg_eigh", "_linalg_svd"):
            self.ritz += args[0].shape[-1] > SMALL
        self.operations += not func.is_view
        before = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        self._live = {key: value for key, value in self._live.items() if not value[0].expired()}
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in before:
                storage = tensor.untyped_storage()
                self._live[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return result

    def __enter__(self) -> Counts:
        reduce = lapack.tridiagonal
        owner, name = (krylov.Factor, "solve") if hasattr(krylov, "Factor") else (krylov, "_solve")
        solve = getattr(owner, name)

        def tridiagonal(a: np.ndarray) -> Any:  # of NumPy arrays, which PyTorch does not dispatch
            self.flops["LAPACK's subset"] += 4 / 3 * len(a) ** 3
            self.ritz += len(a) > SMALL
            return reduce(a)

        def solved(factor: Any, x: torch.Tensor) -> torch.Tensor:
            self.solved += x.shape[1]
            return solve(factor, x)

        self._patches = mock.patch.object(lapack, "tridiagonal", tridiagonal), mock.patch.object(owner, name, solved)
        for patch in self._patches:
            patch.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        for patch in self._patches:
            patch.stop()
        super().__exit__(*error)


def eigenvalues(spectrum: str, d: int) -> np.ndarray:
    """(d,), from the top."""
    at = np.linspace(0, 1, d)
    values = 10 ** (-12 * at if spectrum == "steep" else np.interp(at, FRACTIONS, LOG_SPECTRUM))
    if spectrum == "massive":
        values[:4] *= 1e7
    if spectrum == "some zeros":
        values[-5:] = 0
    if spectrum == "wide null space":
        values[-2 * K :] = 0
    if spectrum == "repeated":
        values[-2 * K :] = values[-2 * K]
    if spectrum == "all equal":
        values[:] = 3
    if spectrum == "flat":
        values = 2 - at
    return values


def turned(m: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """A matrix times an orthogonal one, made of cosine transforms, along these axes; overwritten."""
    for sign in np.random.default_rng(0).choice([-1.0, 1.0], (2, m.shape[1])):
        for axis in axes:
            m = scipy.fft.dct(m, axis=axis, norm="ortho", overwrite_x=True)
            m *= np.expand_dims(sign, 1 - axis)
    return m


def second_moment(spectrum: str, d: int) -> torch.Tensor:
    """(d, d) float64 with a spectrum, along directions that are no axes."""
    c = turned(np.diag(eigenvalues(spectrum, d)), (0, 1))
    return torch.from_numpy(c).add_(torch.from_numpy(c.T.copy())).div_(2)


def certified(spectrum: str, d: int, device: str) -> dict[str, Any]:
    """What a tuning's pairs are worth beside those of `torch.linalg.eigh`; None for those that it leaves to `eigh`."""
    c = second_moment(spectrum, d)
    x = torch.from_numpy(turned(np.diag(np.sqrt(eigenvalues(spectrum, d))), (1,)))
    first, second = (krylov.shift_invert(c, K, cost.tuning(d, K, device)) for _ in range(2))
    if first is None or second is None:
        return {"d": d, "spectrum": spectrum, "by eigh": True}
    values, vectors = first[0][:K], first[1]
    best = torch.linalg.eigh(c)[1][:, :K]
    norm, leak, least = (float(torch.linalg.matrix_norm(m)) for m in (x, x @ vectors, x @ best))
    return {
        "d": d,
        "spectrum": spectrum,
        "leak": leak / norm,
        "excess": leak / least - 1,
        "residual": float(torch.linalg.matrix_norm(c @ vectors - vectors * values) / torch.linalg.matrix_norm(c)),
        "orthogonality": float(torch.linalg.matrix_norm(vectors.mT @ vectors - torch.eye(K, dtype=c.dtype))),
        "equal bits twice": all(torch.equal(one, other) for one, other in zip(first, second, strict=True)),
    }


def counted(d: int, k: int, device: str) -> dict[str, Any]:
    """The counts of one solve, with the tuning of a device where there are tunings."""
    c = second_moment("layer", d)
    with Counts() as counts:
        tuned = (cost.tuning(d, k, device),) if hasattr(cost, "tuning") else ()
        pairs = krylov.shift_invert(c, k, *tuned)
    assert pairs is not None
    values, vectors = pairs[0][:k], pairs[1]
    return {
        "d": d,
        "flops": {**counts.flops, "all": sum(counts.flops.values())},
        "columns solved": counts.solved,
        "Rayleigh-Ritz problems": counts.ritz,
        "operations": counts.operations,
        "bytes of tensors beside C": counts.peak,
        "residual": float(torch.linalg.matrix_norm(c @ vectors - vectors * values) / torch.linalg.matrix_norm(c)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="*", default=(4096,))
    parser.add_argument("--as-on", default="cuda", choices=("cpu", "cuda"), help="whose tuning is taken; computed on the CPU")
    parser.add_argument("--certify", nargs="*", choices=SPECTRA, help="compare with torch.linalg.eigh on these spectra; no counts")
    parser.add_argument("--name", default="solver-counts", help="of the result file")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"k": K, "as on": arguments.as_on, "runs": []}
    for d in arguments.widths:
        for spectrum in ["layer"] if arguments.certify is None else arguments.certify or SPECTRA:
            certify = arguments.certify is not None
            result["runs"].append(certified(spectrum, d, arguments.as_on) if certify else counted(d, K, arguments.as_on))
            print(result["runs"][-1], flush=True)
            path = write_result(arguments.name, result, arguments.out)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
