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
# Matrices side by side, one thread each, against one after the other with all threads, k = 32, 2 CPU cores: 90 of d = 576 in 1.0
# and 2.0 s, 30 of d = 1536 in 4.5 and 5.6 s. Where other work takes one of the cores, BLAS threads wait for each other: the second
# then takes ten times as long, and the first twice. No more matrices at once than take this many bytes, two of d² each.
SIDE_BY_SIDE_BYTES = 2**30

# Shift-invert, by compute capability (None: all others) and smallest d: into how many parts k + GUARD columns are divided, which
# gives the width of a block, and the order of the blocks of L that are inverted (`triangular.Factor`; WHOLE: all of L). On an H100,
# k = 128, seconds (`benchmarks/results/first_gpu-h100/more.json`):
#     width          18      24      36      72      blocks of 2048, width 24     blocks of 1024
#     d = 4096       0.096   0.064   0.091   0.10    0.079                        0.11
#     d = 11008      0.15    0.13    0.15    0.19    0.17                         0.18
#     d = 14336      0.16    0.20    0.19    0.23    0.17                         0.21
# Launches bind a step, so that L⁻¹, two products, pays up to there; from 16384 on the d³ / 3 flops more that it takes do not. Other
# devices: computed, not measured. `python -m benchmarks.first_gpu.solvers` prints such rows.
WHOLE = 2**31
OTHER = (0, 0)  # a capability of which nothing was measured
INVERT_ON_CUDA: dict[tuple[int, int] | None, dict[int, tuple[int, int]]] = {
    (9, 0): {0: (6, WHOLE), 16384: (6, 2048)},
    None: {0: (12, 256), 2048: (12, 512), 4096: (12, 1024)},
}
# On a GPU shift-invert begins here, by compute capability. On an H100, k = 128, it takes 0.041, 0.082 and 0.081 s at d = 2048, 3072
# and 4096, and `torch.linalg.eigh` 0.029, 0.067 and 0.126 s. Where float64 is slow flops decide, and it needs fewer at every d.
INVERT_MIN_D_ON_CUDA: dict[tuple[int, int] | None, int] = {(9, 0): 3584, None: 0}
# On a CPU: the multiple of LEAST_WIDTH next to (k + GUARD) / 6. One thread, d = 4096, k = 128, seconds of the processor on a loaded
# machine, the least of two: 3.6, 4.5, 3.4 and 3.5 with 12, 18, 24 and 36 columns; MKL's triangular solver prefers multiples of 12.
INVERT_ON_CPU = 6
LEAST_WIDTH = 12
# On an H100 (`benchmarks/results/first_gpu-h100/more.json`). Of `torch.linalg.eigh`: flops a second, 9 d³, and the seconds a column
# beside them; it took 0.029, 0.067, 0.126, 1.33 and 2.69 s at d = 2048, 3072, 4096, 11008 and 14336.
EIGH_ON_CUDA, EIGH_COLUMN = 1e13, 12e-6
# Of shift-invert: flops a second, the seconds a step, and the seconds a column of its small eigenproblem; it took 0.064 to 0.081,
# 0.12 to 0.13 and 0.16 s at 4096, 11008 and 14336.
INVERT_ON_H100, INVERT_STEP, SMALL_COLUMN = 3.5e13, 2e-3, 13e-6


def choose_method(
    d: int, k: int, device: torch.device | str = "cpu", *, every: bool = False, capability: tuple[int, int] | None = None
) -> str:
    """The method for the k smallest eigenpairs of a matrix of order d: one of `METHODS` other than `"auto"`.

    Args:
        d, k: order, and number of pairs.
        device: where the matrix is.
        every: all eigenvalues are wanted, which shift-invert does not give.
        capability: of a GPU; by default that of the device.
    """
    kind = torch.device(device).type
    if kind == "cpu":
        if not every and d >= INVERT_MIN_D and k <= d * INVERT_FRACTION:
            return "shift-invert"
        if d >= SUBSET_MIN_D and k <= d * SUBSET_FRACTION:
            return "lapack-subset"
    elif kind == "cuda" and not every:
        least = INVERT_MIN_D_ON_CUDA.get(capability or capability_of(device), INVERT_MIN_D_ON_CUDA[None])
        if d >= max(least, krylov.LEAST_ORDER * (k + krylov.GUARD)):
            return "shift-invert"
    return "eigh"


def capability_of(device: torch.device | str) -> tuple[int, int]:
    """Of a CUDA device; where there is none the H100's, from which forecasts for other cards are scaled."""
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else (9, 0)


def tuning(d: int, k: int, device: torch.device | str = "cpu", *, capability: tuple[int, int] | None = None) -> krylov.Tuning:
    """How shift-invert computes k eigenpairs of a matrix of order d on a device, or on a GPU of a capability."""
    device = torch.device(device)
    if device.type == "cpu":
        return krylov.Tuning(LEAST_WIDTH * max(1, round((k + krylov.GUARD) / INVERT_ON_CPU / LEAST_WIDTH)))
    rows = INVERT_ON_CUDA.get(capability or capability_of(device), INVERT_ON_CUDA[None])
    parts, block = rows[max(least for least in rows if least <= d)]
    return krylov.Tuning(max(8, (k + krylov.GUARD) // parts), block, cholesky=True)


def side_by_side(d: int, device: torch.device | str = "cpu") -> int:
    """How many d × d matrices are best decomposed at once: as many as PyTorch has threads, with one thread each.

    One on a GPU, whose sites have lanes (`nullspace.solvers.lanes`); from d = 3072 on, where most of the work is in large
    products and n copies cost memory; and where n of them would take more than 1 GiB.
    """
    if torch.device(device).type != "cpu" or d >= INVERT_MIN_D:
        return 1
    return max(1, min(torch.get_num_threads(), SIDE_BY_SIDE_BYTES // (16 * d * d)))


def decomposition_cost(d: int, rank: int, device: str, eigh_rate: float = EIGH_ON_CUDA) -> tuple[int, float, float]:
    """What the bottom of one (d, d) second moment takes, by the method that `partial_eigh` chooses.

    Args:
        d, rank: order, and number of pairs.
        device: `"cuda"` or `"cpu"`.
        eigh_rate: of a GPU, the flops a second of its `torch.linalg.eigh`: what waits for launches and for the host takes the same
            time on every GPU, and counts as the more flops the faster it is.

    Returns:
        Bytes at the peak, the square itself included and the triangle not; flops; and the flops of `torch.linalg.eigh` that take
        the same time: half of a tridiagonal reduction is bound by memory, and triangular solves are no matrix products
        (`benchmarks/results/solvers-cpu.json`).
    """
    k, square = min(rank, d - 1), 8 * d * d
    capability = (9, 0) if eigh_rate >= EIGH_ON_CUDA / 4 else OTHER
    method = choose_method(d, k, device, capability=capability)
    if method == "shift-invert":
        chosen = tuning(d, k, device, capability=capability)
        size, flops = invert_cost(d, k, chosen)
        if device == "cpu":
            return size, flops, flops / 0.45
        columns = krylov.first_check(k + krylov.GUARD, chosen.width)
        waiting = INVERT_STEP * columns / chosen.width + SMALL_COLUMN * columns
        return size, flops, flops * EIGH_ON_CUDA / INVERT_ON_H100 + waiting * eigh_rate
    if method == "lapack-subset":
        # The reflectors lie in the square, and LAPACK works on them there; several small ones are at work at once.
        flops = 4 / 3 * d**3 + 4 * d * d * k
        return side_by_side(d) * (square + 64 * 8 * d + 32 * d * k), flops, 3 * flops
    # Beside C, vectors and a workspace of two squares; on an H100, of four.
    workspace, waiting = (4, EIGH_COLUMN * eigh_rate * d) if device == "cuda" else (2, 0.0)
    return (2 + workspace) * square + 16 * d * k, 9.0 * d**3, 9.0 * d**3 + waiting


def invert_cost(d: int, k: int, tuning: krylov.Tuning) -> tuple[int, float]:
    """Bytes at the peak, the square itself included, and flops of shift-invert where one Rayleigh–Ritz problem is enough.

    The bytes are those of C, of its factor and of the largest space. Where it does not converge, `"eigh"` takes its own.
    """
    wanted = k + krylov.GUARD
    space = krylov.first_check(wanted, tuning.width)
    most = min(krylov.MAX_COLUMNS * wanted, d)
    probes = krylov.PROBES * krylov.PROBE_STEPS
    inverted = 2 / 3 * d * min(tuning.block, d) ** 2
    solves = (2 if tuning.block < d else 4) * d * d * (space + probes)
    # The product with C, the columns made orthogonal twice, and the small eigenproblem.
    flops = d**3 / 3 + inverted + solves + 2 * d * d * wanted + 4 * d * space**2 + 4 / 3 * space**3
    return 8 * (2 * d * d + most * (d + 3 * most) + 8 * d * wanted), flops
