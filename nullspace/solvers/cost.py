"""Which solver is used at which size, how many matrices are solved at once, and what that takes."""

from __future__ import annotations

import torch

from nullspace.solvers import krylov

# LAPACK's tridiagonal form and inverse iteration compute only the wanted vectors; the divide-and-conquer driver behind
# torch.linalg.eigh computes all of them, with GEMM. Measured with one thread, time of the first over that of the second:
#     k / d        0.02   0.10   0.25   0.33   0.50
#     d = 64       1.24   1.28   1.52   1.65   1.97
#     d = 128      0.68   0.77   1.02   1.20   1.60
#     d = 576      0.39   0.50   0.83   0.90   1.29
#     d = 1536     0.30   0.45   0.56   0.73   1.12
#     d = 3072     0.33   0.39   0.61   0.81   1.36
SUBSET_FRACTION = 1 / 4
SUBSET_MIN_D = 128
# Shift-invert against the subset driver, 2 CPU cores, k = 128, time of the first over that of the second
# (benchmarks/results/solvers-cpu.json): d = 2048: 1.1 to 1.2, d = 4096: 0.44 to 0.65, d = 8192: 0.36.
INVERT_FRACTION = 1 / 24
INVERT_MIN_D = 3072
# Below this order the reduction to tridiagonal form is faster with one BLAS thread than with two: d = 576: 12 and 17 ms,
# d = 1536: 230 and 155 ms.
THREADS_MIN_D = 1024
# Matrices side by side, one thread each, against one after the other with all threads, k = 32, 2 CPU cores: 90 of d = 576 in 1.0
# and 2.0 s, 30 of d = 1536 in 4.5 and 5.6 s. Where other work takes one of the cores, BLAS threads wait for each other: the second
# then takes ten times as long, and the first twice. No more matrices at once than take this many bytes, two of d² each.
SIDE_BY_SIDE_BYTES = 2**30


def choose_method(d: int, k: int, device: torch.device | str = "cpu", *, every: bool = False) -> str:
    """The method for the k smallest eigenpairs of a matrix of order d: one of `METHODS` other than `"auto"`.

    Args:
        d, k: order, and number of pairs.
        device: where the matrix is.
        every: all eigenvalues are wanted, which shift-invert does not give.
    """
    if torch.device(device).type == "cpu":
        if not every and d >= INVERT_MIN_D and k <= d * INVERT_FRACTION:
            return "shift-invert"
        if d >= SUBSET_MIN_D and k <= d * SUBSET_FRACTION:
            return "lapack-subset"
    return "eigh"


def side_by_side(d: int, device: torch.device | str = "cpu") -> int:
    """How many d × d matrices are best decomposed at once: as many as PyTorch has threads, with one thread each.

    One after the other on a GPU, where threads wait for the same device; from d = 3072 on, where most of the work is in large
    products and n copies cost memory; and where n of them would take more than 1 GiB.
    """
    if torch.device(device).type != "cpu" or d >= INVERT_MIN_D:
        return 1
    return max(1, min(torch.get_num_threads(), SIDE_BY_SIDE_BYTES // (16 * d * d)))


def decomposition_cost(d: int, rank: int, device: str) -> tuple[int, float, float]:
    """What the bottom of one (d, d) second moment takes, by the method that `partial_eigh` chooses.

    Returns:
        Bytes at the peak, the square itself included and the triangle not; flops; and the flops of `torch.linalg.eigh` that take
        the same time: half of a tridiagonal reduction is bound by memory, and triangular solves are no matrix products
        (`benchmarks/results/solvers-cpu.json`).
    """
    k, square = min(rank, d - 1), 8 * d * d
    method = choose_method(d, k, device)
    if method == "shift-invert":
        wanted = k + krylov.GUARD
        columns = krylov.MAX_COLUMNS * wanted
        # A copy for the Cholesky factor, and PyTorch's own while it is made; later, the factor and the Krylov basis.
        size = max(3 * square, 2 * square + 8 * (columns * d + columns**2 + 4 * d * wanted))
        flops = d**3 / 3 + 20 * d * d * wanted
        return size, flops, flops / 0.45
    if method == "lapack-subset":
        # The reflectors lie in the square, and LAPACK works on them there; several small ones are at work at once.
        flops = 4 / 3 * d**3 + 4 * d * d * k
        return side_by_side(d) * (square + 64 * 8 * d + 32 * d * k), flops, 3 * flops
    return 4 * square + 16 * d * k, 9.0 * d**3, 9.0 * d**3  # vectors, and a workspace of two squares
