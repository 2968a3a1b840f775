"""The smallest eigenpairs by shift-invert: a block Krylov iteration on (C + σI)⁻¹, from a Cholesky factor of C + σI."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from nullspace.solvers.lapack import bottom_pairs
from nullspace.solvers.triangular import Factor, shifted_cholesky

# How often the shift is raised tenfold if Cholesky fails with eps · trace, the least that rounding allows.
SHIFT_RAISES = 2
# Vectors that are computed beside the k wanted ones, which makes k + GUARD: these converge last, and are not waited for.
GUARD = 16
# In multiples of k + GUARD: the least order of a matrix, and the most columns of the whole space.
LEAST_ORDER, MAX_COLUMNS = 10, 12
# Columns when convergence is first checked: FIRST_CHECK[0] · (k + GUARD) + FIRST_CHECK[1] · width, since wide blocks need more. To
# the next check, (k + GUARD) / DIGIT + width columns a decimal digit that is missing.
FIRST_CHECK, DIGIT = (3.5, 9.0), 12
# A Ritz pair (θ, u) of the inverse has converged when ‖(C + σI)⁻¹u − θu‖ ≤ RITZ_TOLERANCE · θ, and the result is accepted when
# ‖CU − UΛ‖ ≤ RESIDUAL · ‖C‖ and ‖UᵀU − I‖ ≤ ORTHOGONAL, after at most POLISHES steps of subspace iteration.
EPS = torch.finfo(torch.float64).eps
RITZ_TOLERANCE, RESIDUAL, ORTHOGONAL = 1e-6, 1e-12, 1e-13
POLISHES = 4
# Columns and steps of the search for a pair that was missed, and how much larger than the k-th its θ is then.
PROBES, PROBE_STEPS, LARGER = 8, 3, 2e-3


class Tuning(NamedTuple):
    """How shift-invert runs on a device; `cost.tuning` chooses.

    Attributes:
        width: columns of a block. Narrow blocks converge with fewer columns in all, wide ones take fewer and larger products.
        block: how the factor is applied (`triangular.Factor`).
        cholesky: blocks are made orthonormal by CholeskyQR, which is matrix products, instead of Householder's reflections; where
            that fails, by reflections.
    """

    width: int
    block: int = 0
    cholesky: bool = False


class Ritz(NamedTuple):
    """Approximate eigenpairs of the inverse.

    Attributes:
        theta: (m,) float64 on the host, descending.
        image: (d, m), column i is (C + σI)⁻¹ u_i / θ_i: a step of inverse iteration behind the Ritz vector u_i.
    """

    theta: torch.Tensor
    image: torch.Tensor


def shift_invert(c: torch.Tensor, k: int, tuning: Tuning) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The k smallest eigenpairs by block Krylov iteration on the inverse; None where that does not converge.

    The wanted end of C is the far end of (C + σI)⁻¹, where Krylov spaces converge fast, and a shift moves no vector. With
    LLᵀ = C + σI, a step is two triangular solves and a reorthogonalisation against all columns so far (Golub and Van Loan,
    "Matrix Computations", block Lanczos). One Rayleigh–Ritz problem ends it, of a matrix with as many columns as the space has; a
    second one where the first shows that the space is too small. The recurrence gives (C + σI)⁻¹U of the Ritz vectors
    without a solve, and that is the result. It has been checked: ‖CU − UΛ‖ ≤ 1e-12 ‖C‖ (Frobenius norms), U is orthonormal, and a
    search in the complement has met no smaller eigenvalue.

    Args:
        c: (d, d) float64, symmetric positive semi-definite.
        k: how many, at least 1.
        tuning: for the device and the size.

    Returns:
        Eigenvalues (k + GUARD,), ascending, and orthonormal vectors (d, k). None as well where d < LEAST_ORDER · (k + GUARD).

    Memory: beside C, a factor of 8 · d² bytes, and 8 · d · (MAX_COLUMNS + 4) · (k + GUARD) bytes at most.
    """
    wanted = k + GUARD
    if LEAST_ORDER * wanted > len(c):
        return None
    trace, norm = torch.stack([c.diagonal().sum(), torch.linalg.matrix_norm(c)]).tolist()
    if not (trace > 0 and norm < math.inf):
        return None
    # Squares of the factor's inverse stay within float64's range if the eigenvalues are near 1.
    scale = 2.0 ** math.frexp(trace)[1]
    norm, estimate = norm / scale, 0.0
    least = shift = EPS * trace / scale
    # First narrow blocks and the least shift. With fewer than k zero eigenvalues, (C + σI)⁻¹ then spans 1e16, and rounding drowns
    # the other wanted pairs: the second attempt uses σ ≈ λ_k / 16, of which the first one has an estimate. An eigenvalue that is
    # repeated more often than a block has columns needs wide blocks.
    for attempt, width in enumerate((tuning.width, tuning.width, wanted)):
        if attempt == 1 and estimate == 0:
            continue
        lower, shift = shifted_cholesky(c, scale, max(shift, estimate / 16), SHIFT_RAISES)
        if lower is None:
            return None
        factor = Factor(lower, tuning.block)
        ritz, estimate = inverse_krylov(factor, shift, 100 * least, norm, k, tuning._replace(width=width))
        pairs = None if ritz is None else _certified(c, scale, norm, factor, ritz, k)
        if pairs is not None:
            return pairs[0] * scale, pairs[1]
        if ritz is None and (attempt == 1 or estimate == 0):
            return None  # convergence is slow: wide blocks would need more columns still
        del lower, factor, ritz  # before the next factor is made
    return None


def first_check(wanted: int, width: int) -> int:
    """Columns of the space when the first Rayleigh–Ritz problem is solved, whole blocks."""
    return width * math.ceil(FIRST_CHECK[0] * wanted / width + FIRST_CHECK[1])


def _certified(
    c: torch.Tensor, scale: float, norm: float, factor: Factor, ritz: Ritz, k: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Eigenvalues of all columns and the k bottom vectors, of C / scale, by subspace iteration; None if the checks fail."""
    image = ritz.image
    for _ in range(POLISHES):
        # A solve shrinks the part of vector i along eigenvector j by λ_i / λ_j: the parts along large eigenvalues, which dominate
        # the residual, vanish.
        columns = orthonormal(image)
        product = c @ columns / scale
        values = (columns * product).sum(0)
        basis = columns[:, :k]
        residual = torch.linalg.matrix_norm(product[:, :k] - basis * values[:k])
        remaining = complement(factor, basis)
        checks = torch.cat([torch.stack([residual, loss_of_orthogonality(basis)]), remaining.flatten()]).cpu()  # one wait
        if checks[0] <= RESIDUAL * norm and checks[1] <= ORTHOGONAL:
            if smaller_remains(checks[2:].reshape(remaining.shape), float(ritz.theta[k - 1])):
                return None
            order = values[:k].argsort()
            behind = torch.maximum(values[k:], values[:k].max()).sort().values
            return torch.cat([values[order], behind]), basis[:, order]
        image = factor.solve(columns)
    return None


def orthonormal(columns: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis of the span of columns that are nearly orthogonal: CholeskyQR, twice."""
    q = columns / torch.linalg.vector_norm(columns, dim=0)
    for _ in range(2):
        q = cholesky_qr(q)[0]
    return q


def cholesky_qr(block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Q, R and `info` (not zero where it failed) of a QR decomposition by the Cholesky factor of BᵀB; no wait for the device.

    Q is orthonormal to eps · κ(B)²: a second time makes it so to eps, for κ(B) below 1e7.
    """
    factor, info = torch.linalg.cholesky_ex(block.mT @ block)
    return torch.linalg.solve_triangular(factor, block.mT, upper=False).mT, factor.mT, info


def loss_of_orthogonality(basis: torch.Tensor) -> torch.Tensor:
    """‖UᵀU − I‖, Frobenius."""
    unit = torch.eye(basis.shape[1], dtype=basis.dtype, device=basis.device)
    return torch.linalg.matrix_norm(basis.mT @ basis - unit)


def complement(factor: Factor, basis_dk: torch.Tensor) -> torch.Tensor:
    """(C + σI)⁻¹ in a small Krylov space orthogonal to a basis: its largest eigenvalue is near that of the whole complement."""
    generator = torch.Generator().manual_seed(1)
    block = torch.randn(len(basis_dk), PROBES, generator=generator, dtype=torch.float64).to(basis_dk.device)
    known, images = basis_dk, []
    for _ in range(PROBE_STEPS):
        for _ in range(2):
            block = block - known @ (known.mT @ block)
        known = torch.cat([known, torch.linalg.qr(block).Q], dim=1)
        images.append(block := factor.solve(known[:, -PROBES:]))
    small = known[:, basis_dk.shape[1] :].mT @ torch.cat(images, dim=1)
    return (small + small.mT) / 2


def smaller_remains(complement: torch.Tensor, theta: float) -> bool:
    """Whether the inverse has an eigenvalue above θ, by more than rounding and convergence explain, in a complement."""
    return not bool(torch.linalg.eigvalsh(complement)[-1] <= (1 + LARGER) * theta)


def inverse_krylov(
    factor: Factor, shift: float, zero: float, norm: float, k: int, tuning: Tuning, *, power: float = 1.0
) -> tuple[Ritz | None, float]:
    """Pairs at the bottom of the spectrum.

    Args:
        factor, shift: of C + σI.
        zero: eigenvalues below this count as zero, and are not waited for.
        norm: ‖C‖, or that of its root.
        k: how many must converge.
        tuning: of the space.
        power: 1 / 2 where the residual is to be that of a root.

    Returns:
        k + GUARD pairs, the first k converged, or None if so many columns as there may be are not enough for that. And λ_k where
        the reason may be that θ_1 is much larger than θ_k, otherwise 0.
    """
    wanted = k + GUARD
    most = min(MAX_COLUMNS * wanted, len(factor.lower))
    space = Space(factor, most, tuning)
    columns, behind, before = first_check(wanted, tuning.width), 0, math.inf
    while True:
        grown = space.extended(columns)
        pairs = space.ritz(wanted)
        if pairs is None and tuning.cholesky:
            tuning = tuning._replace(cholesky=False)
            del space
            space = Space(factor, most, tuning)
            continue
        if pairs is None:
            return None, 0.0
        theta, y, error = pairs
        values = 1 / theta - shift
        # Zeros, as far as float64 can tell, have converged; if they are fewer than k, the other θ may drown in their rounding.
        error = torch.where(values < zero, 0.0, error)[:k]
        # Of (C + σI)⁻¹U, column i has a residual of some λ_i · error_i.
        allowed, weight = RESIDUAL / 2 * norm, theta[:k] ** -power
        if error[-1] > 0 and EPS * theta[0] > min(allowed / float(weight[-1]), RITZ_TOLERANCE) * theta[k - 1]:
            return None, float(values[k - 1])
        excess = max(float(error.max()) / RITZ_TOLERANCE, float(torch.linalg.vector_norm(error * weight)) / allowed)
        if excess <= 1:
            return Ritz(theta, space.image(theta, y)), 0.0
        if float(error.max()) <= RITZ_TOLERANCE and (excess > before / 2 or not grown):
            return Ritz(theta, factor.solve(orthonormal(space.image(theta, y)))), 0.0
        # Convergence gathers speed. Where half of the columns that the rate so far asks for are too many, the spectrum is flat.
        added, gained = space.columns - behind, math.log10(before / excess) if before < math.inf else math.inf
        if not grown or space.columns + added * math.log10(excess) / max(gained, 1e-3) / 2 > most:
            return None, 0.0
        behind, before = space.columns, excess
        columns = space.columns + math.ceil((wanted / DIGIT + tuning.width) * math.log10(excess))


class Space:
    """A block Krylov space of (C + σI)⁻¹ from random columns, always the same.

    Args:
        factor: of C + σI.
        most: columns that it may have.
        tuning: the width of a block, and how it is made orthonormal.

    Attributes:
        columns: of the space so far; `basis` holds a block more.
    """

    def __init__(self, factor: Factor, most: int, tuning: Tuning) -> None:
        self._factor, self._most, self._tuning = factor, most, tuning
        d, width = len(factor.lower), tuning.width
        start = torch.randn(d, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self._basis = factor.lower.new_empty(most, d).mT
        self._basis[:, :width] = torch.linalg.qr(start).Q
        # Row block j + 1, column block j: what the recurrence leaves behind block j.
        self._projected = self._basis.new_zeros(most, most)
        self._failed = torch.zeros((), dtype=torch.int32, device=self._basis.device)
        self.columns = 0

    def extended(self, columns: int) -> bool:
        """Add blocks up to so many columns, or as many as there may be; False if that adds none."""
        before = self.columns
        while self.columns < columns and self.columns + 2 * self._tuning.width <= self._most:
            self._step()
        return self.columns > before

    def _step(self) -> None:
        new = slice(self.columns, self.columns + self._tuning.width)
        behind = slice(new.stop, new.stop + self._tuning.width)
        so_far = self._basis[:, : new.stop]
        image = self._factor.solve(so_far[:, new])
        # But for rounding, an image is orthogonal to all blocks but the last two. Where a space is nearly exhausted rounding is all
        # that is left of it, and only twice against all columns makes that orthogonal to them.
        last = slice(max(0, new.start - self._tuning.width), new.stop)
        overlap = so_far[:, last].mT @ image
        q, scale = self._qr(image - so_far[:, last] @ overlap)
        again = so_far.mT @ q
        q = q - so_far @ again
        more = so_far.mT @ q
        q, rescale = self._qr(q - so_far @ more)
        self._projected[: new.stop, new] = (again + more) @ scale
        self._projected[last, new] += overlap
        self._projected[behind, new] = rescale @ scale
        self._basis[:, behind] = q
        self.columns = new.stop

    def _qr(self, block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not self._tuning.cholesky:
            return torch.linalg.qr(block)
        q, r, info = cholesky_qr(block)
        self._failed += info
        return q, r

    def ritz(self, m: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """The m largest Ritz values θ (m,) of the inverse, descending, their vectors in the space (columns, m), and the residuals.

        The residual of pair i is ‖(C + σI)⁻¹u − θu‖ / θ. Values and residuals are on the host, vectors on the device. None if a
        block could not be made orthonormal.
        """
        n, width = self.columns, self._tuning.width
        projected = self._projected[: n + width, :n]
        failed, finite = torch.stack([self._failed, projected.isfinite().all()]).tolist()
        if failed or not finite:
            return None
        upper = projected[:n].triu()
        theta, y = largest_pairs(upper + upper.triu(1).mT, m)
        self._rest = projected[n:, n - width :]
        error = torch.linalg.vector_norm(self._rest @ y[n - width :], dim=0) / theta
        theta, error = torch.stack([theta, error]).cpu()
        return theta, y, error

    def image(self, theta: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """(d, m): (C + σI)⁻¹ u_i / θ_i of the Ritz vectors, by the recurrence."""
        n, width = self.columns, self._tuning.width
        rest = self._rest @ y[n - width :] / theta.to(y.device)
        return self._basis[:, : n + width] @ torch.cat([y, rest])


def largest_pairs(small: torch.Tensor, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The m largest eigenvalues of a symmetric matrix of some hundreds of rows, descending, and their vectors, on its device.

    On a CPU LAPACK's subset driver. On a GPU all pairs: an H100 takes 8 ms for an order of 720 and 18 ms for 1440, the host beside
    it 24 and 126 ms (`benchmarks/results/first_gpu-h100/solvers.json`).
    """
    if small.device.type == "cpu":
        values, vectors = bottom_pairs(-small.numpy(), m, overwrite=True)
        return -torch.from_numpy(values[:m]), torch.from_numpy(vectors)
    return largest_by_eigh(small, m)


def largest_by_eigh(small: torch.Tensor, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`largest_pairs` from all pairs."""
    values, vectors = torch.linalg.eigh(small)
    return values.flip(0)[:m], vectors.flip(1)[:, :m]
