"""Starts from directions of a layer's output: eigenvectors of W₀ M W₀ᵀ, a window of r in their spectrum, and a division.

With orthonormal Q (d_out, r), B A is a part of W₀ (B A = Q Qᵀ W₀) or, where A or B is zero, nothing. The starts differ in M, in the
window, and in how B A is divided between A and B:

    pissa, milora    M = I                        the largest, the smallest (or others)   √Σ to each
    olora_tail       M = I                        the smallest                            B = Q, A = V_rᵀ: Σ is left out
    mica             M = I                        the smallest                            B = Q, A = 0
    mica_data        M = C                        the smallest                            B = Q, A = 0
    corda            M = C²                       the largest (ipm), the smallest (kpm)   √Σ to each, then C⁻¹ to A
    corda_exact      M = C                        the same (or others)                    equal norms
    svd_llm          M = C                        the largest                             √Σ to each, then C^-½ to A
    astra            M = C                        the largest (or others)                 B = Q, A = Qᵀ W₀
    sc_lora          M = (1 − β) C₊ − β C₋        the largest                             B = Q, A = Qᵀ W₀

Eigenvectors of W₀ M W₀ᵀ are left singular vectors of W₀ M^½: min(d_out, d_in) of them, largest first. A window is one number
between 0 and 1 (`skipped`), 0 for the largest r and 1 for the smallest.
"""

from __future__ import annotations

import math

import torch

from nullspace import solvers
from nullspace.checks import FRACTION, NOT_NEGATIVE, check_between, check_integer, check_one_of, check_real
from nullspace.errors import InputError
from nullspace.factors.low_rank import LowRank

# Added to the diagonal of C, relative to its mean, by PEFT and the paper's code.
DAMPING = 0.01
# Windows of the largest and of the smallest.
LARGEST, SMALLEST = 0.0, 1.0
CORDA_MODES = {"kpm": SMALLEST, "ipm": LARGEST}
# Singular values below this, relative to the norm of the matrix, count as zero, and nothing is divided by them.
ZERO = 1e-14
# Right singular vectors are computed from the left ones where all of their singular values are above this, relative to the norm of
# the matrix: rounding then turns them by less than 1e-9.
CLEAR = 1e-6


def skipped(most: int, rank: int, window: float) -> int:
    """How many of `most` singular triples, largest first, lie before the `rank` that a window takes: ⌊window · (most − rank) + ½⌋.

    A start takes the triples s + 1 … s + r. s runs from 0 (the largest) to most − r (the smallest), and the window is the part of
    this range that s is at, so that one number serves layers of all sizes: ½ takes those in the middle.

    Raises:
        ValueError: if the rank is not between 1 and `most`, or the window not between 0 and 1.
    """
    most = check_integer("most", most)
    return math.floor(check_real("window", window, FRACTION) * (most - check_between("rank", rank, most)) + 0.5)


@torch.no_grad()
def pissa(weight: torch.Tensor, *, rank: int) -> LowRank:
    """PiSSA's start (arXiv 2404.02948, eq. 2–3): the r largest singular triples, B = U_r √Σ_r, A = √Σ_r V_rᵀ.

    B A is the best rank-r part of W₀ (Eckart–Young).

    Args:
        weight: (d_out, d_in) W₀.
        rank: r, at most the smaller side of the weight.

    Returns:
        `LowRank(A (r, d_in), B (d_out, r))`, float64, on the weight's device, largest singular value first; A positive in the entry
        of largest magnitude of every row.

    Raises:
        ValueError: if r is out of range.
    """
    return milora(weight, rank=rank, window=LARGEST)


@torch.no_grad()
def milora(weight: torch.Tensor, *, rank: int, window: float = SMALLEST) -> LowRank:
    """MiLoRA's start (arXiv 2406.09044): the r smallest of the min(d_out, d_in) singular triples, divided as PiSSA's.

    The residual W₀ − B A is the matrix of rank min(d_out, d_in) − r that is nearest to W₀ (arXiv 2503.02659, eq. 4).

    Args:
        weight, rank: as `pissa`.
        window: which r triples: 1 the smallest, 0 the largest (PiSSA), between them intermediate ones (arXiv 2602.03493); see
            `skipped`.

    Returns and errors: as `pissa`, largest of the r singular values first; for a window that is not between 0 and 1.
    """
    weight = weight.to(torch.float64)
    sigma, u = _left(weight, rank, window)
    return _projected(weight, u, sigma)


@torch.no_grad()
def olora_tail(weight: torch.Tensor, *, rank: int) -> LowRank:
    """OLoRA-tail (arXiv 2606.02437, section 4.1.2), for reinforcement learning: B = U_r, A = V_rᵀ of the r smallest triples.

    MiLoRA's directions without their singular values: A and B have orthonormal rows and columns, ‖B A‖ = √r whatever the weight,
    and W₀ − B A keeps the outputs. (OLoRA, PEFT's `init_lora_weights="olora"`, takes the first r columns of a QR decomposition of
    W₀ and has another product.)

    Args and errors: as `pissa`.

    Returns:
        `LowRank(A (r, d_in), B (d_out, r))`, float64, on the weight's device, largest of the r singular values first; A positive in
        the entry of largest magnitude of every row.
    """
    weight = weight.to(torch.float64)
    sigma, u = _left(weight, rank, SMALLEST)
    if bool(sigma[-1] > CLEAR * torch.linalg.matrix_norm(weight)):
        left, _, right = torch.linalg.svd(u.mT @ weight, full_matrices=False)
        a = left @ right  # Σ_r V_rᵀ without Σ_r, with orthonormal rows
    else:
        u, _, right = torch.linalg.svd(weight, full_matrices=False)
        u, a = u[:, -rank:], right[-rank:]
    sign = solvers.column_signs(a.mT)
    return LowRank(A=sign[:, None] * a, B=sign * u)


@torch.no_grad()
def mica(weight: torch.Tensor, *, rank: int) -> LowRank:
    """MiCA's start (arXiv 2604.01694): B = the left singular vectors of the r smallest singular values, to be frozen; A = 0.

    W₀ stays. Whatever training makes of A, an update B A writes into these r directions of the output alone. It is what PEFT's
    `init_lora_weights="mica"` starts with, which decomposes W₀ in float32.

    Args and errors: as `pissa`.

    Returns:
        `LowRank(A (r, d_in), B (d_out, r))`, float64, on the weight's device, B with orthonormal columns, largest of the r singular
        values first, positive in the entry of largest magnitude.
    """
    return _smallest(weight, rank)


@torch.no_grad()
def mica_data(weight: torch.Tensor, c: torch.Tensor, *, rank: int) -> LowRank:
    """MiCA for the outputs on data: B = the eigenvectors of W₀ C W₀ᵀ with the r smallest eigenvalues, to be frozen; A = 0.

    W₀ stays. W₀ C W₀ᵀ is the second moment of the layer's outputs without its bias, so that ‖Bᵀ W₀ X‖ is the least that r
    directions of the min(d_out, d_in) can have: an update B A writes where the data have hardly any output.

    Args:
        weight: (d_out, d_in) W₀.
        c: (d_in, d_in) second moment of the layer's inputs, in any scale.
        rank: r, at most the smaller side of the weight.

    Returns:
        As `mica`.

    Raises:
        ValueError: if the shapes do not fit, r is out of range, or C is zero or holds NaN or Inf.
    """
    weight, (c,) = _with_moments(weight, c)
    return _smallest(_outputs(weight, c), rank)


@torch.no_grad()
def corda(
    weight: torch.Tensor,
    c: torch.Tensor,
    *,
    rank: int,
    mode: str = "kpm",
    damping: float = DAMPING,
    trace: float | None = None,
) -> LowRank:
    """CorDA's start (arXiv 2406.05223, eq. 2–5): SVD(W₀ C) = U Σ Vᵀ, and r triples of it: B = U_r √Σ_r, A = √Σ_r V_rᵀ C⁻¹.

    As U_rᵀ W₀ C = Σ_r V_rᵀ, A is Σ_r^-½ U_rᵀ W₀ and B A = U_r U_rᵀ W₀: C⁻¹ is never formed. The scale of C does not change B A,
    only its division: B grows with the square root of the scale, and A shrinks.

    This minimises ‖(W₀ − W₀′) C‖ over the W₀′ of the residual's rank (kpm); the paper's objective is ‖(W₀ − W₀′) X‖, for which see
    `corda_exact`.

    Args:
        weight: (d_out, d_in) W₀.
        c: (d_in, d_in) second moment of the layer's inputs, in any scale.
        rank: r, at most the smaller side of the weight.
        mode: `"kpm"` (knowledge-preserved: the last r triples; C of data to be preserved) or `"ipm"` (instruction-previewed: the
            first r; C of the task's data).
        damping: added to the diagonal of C, relative to its mean. 0 leaves C as it is; it may be singular.
        trace: C is scaled to it: `Covariance.peft_trace` for PEFT's division of B A; by default d_in, a mean diagonal of 1.

    Returns:
        As `pissa`: singular values descending.

    Raises:
        ValueError: if the shapes do not fit, r, mode or damping is out of range, or C is zero or holds NaN or Inf.
    """
    check_one_of("mode", mode, CORDA_MODES)
    check_real("damping", damping, NOT_NEGATIVE)
    weight, (c,) = _with_moments(weight, c)
    if trace is not None and not 0.0 < trace < float("inf"):
        raise InputError(f"trace must be a positive number, not {trace}")
    mean = 1.0 if trace is None else trace / len(c)
    c = c * (mean / _mean_diagonal(c))
    c.diagonal().add_(damping * mean)
    product = weight @ c
    sigma, u = _left(product, rank, CORDA_MODES[mode])
    return _projected(weight, u, torch.where(sigma > ZERO * torch.linalg.matrix_norm(product), sigma, 0.0))


@torch.no_grad()
def corda_exact(weight: torch.Tensor, c: torch.Tensor, *, rank: int, mode: str = "kpm", window: float | None = None) -> LowRank:
    """The optimum that CorDA approximates: SVD(W₀ C^½) = U Σ Vᵀ, B A = U_r Σ_r V_rᵀ C^-½ = U_r U_rᵀ W₀.

    W₀ − B A minimises ‖(W₀ − W₀′) X‖_F over all W₀′ of its rank (kpm: arXiv 2503.02659, eq. 5), and B A does so over those of
    rank r (ipm). U holds eigenvectors of W₀ C W₀ᵀ. Theorem 2 there states this optimum for CorDA's start, but the SVD of W₀ C
    is optimal in another norm.

    Args and errors: as `corda`, and:
        window: in place of the mode: which r triples, 0 the largest (ipm), 1 the smallest (kpm), between them intermediate ones
            (arXiv 2602.03493 takes such of W₀); see `skipped`.

    Returns:
        As `pissa`, but with ‖u_iᵀ W₀‖ in place of Σ_r: the rows of A and the columns of B have equal norms.
    """
    check_one_of("mode", mode, CORDA_MODES)
    weight, (c,) = _with_moments(weight, c)
    _, u = _left(_outputs(weight, c), rank, CORDA_MODES[mode] if window is None else window)
    return _projected(weight, u, None)


@torch.no_grad()
def svd_llm(weight: torch.Tensor, c: torch.Tensor, *, rank: int) -> LowRank:
    """SVD-LLM's low-rank weight (arXiv 2403.07378, section 3.1): S Sᵀ = C, SVD(W₀ S) = U Σ Vᵀ, W′ = U_r Σ_r V_rᵀ S⁻¹.

    W′ = B A is the best matrix of rank r in ‖(W₀ − W′) X‖_F, and to leave out one triple costs ‖σ_i u_i v_iᵀ S⁻¹ X‖_F = σ_i. Any S
    with S Sᵀ = C gives the same U and Σ. Here it is V Λ^½ of C = V Λ Vᵀ, and as U_rᵀ W₀ S = Σ_r V_rᵀ the inverse is not formed:
    W′ = U_r U_rᵀ W₀, the product of `corda_exact` with `mode="ipm"`. So C may be singular, where a Cholesky factorisation fails.

    B = U_r √Σ_r and A = √Σ_r V_rᵀ S⁻¹, as in the paper's code, whose r for a share ρ of the parameters is
    ⌊ρ · d_out · d_in / (d_out + d_in)⌋.

    Args:
        weight: (d_out, d_in) W₀.
        c: (d_in, d_in) second moment of the layer's inputs; B grows with the fourth root of its scale, and A shrinks.
        rank: r, at most the smaller side of the weight.

    Returns:
        `LowRank(A (r, d_in), B (d_out, r))`, float64, σ descending with σ_i = ‖b_i‖², A positive in the entry of largest magnitude
        of every row. A σ_i that a C in float64 cannot tell from zero is replaced by ‖u_iᵀ W₀‖ in this division.

    Raises:
        ValueError: if the shapes do not fit, r is out of range, or C is zero or holds NaN or Inf.
    """
    weight, (c,) = _with_moments(weight, c)
    sigma, u = _left(_outputs(weight, c), rank, LARGEST)
    sigma = sigma * _mean_diagonal(c).sqrt()
    noise = (len(c) * torch.finfo(torch.float64).eps) ** 0.5 * sigma[0]
    return _projected(weight, u, torch.where(sigma > noise, sigma, 0.0))


@torch.no_grad()
def astra(weight: torch.Tensor, c: torch.Tensor, *, rank: int, window: float = LARGEST) -> LowRank:
    """Astra's start (arXiv 2602.19111): B = Q, A = Qᵀ W₀, with Q r eigenvectors of the outputs' second moment Y Yᵀ = W₀ C W₀ᵀ.

    The paper calls them the tail, Q_{[:, −r:]}. In its code, as in what was proposed to PEFT, eigenvalues are ascending, so that
    these are the r of the *largest* eigenvalues: the default here, where it is `sc_lora` with β = 0. A bias of the layer is part of
    Y there, and not here.

    Args:
        weight: (d_out, d_in) W₀.
        c: (d_in, d_in) second moment of the inputs of the task's data, in any scale.
        rank: r, at most the smaller side of the weight.
        window: which of the min(d_out, d_in) eigenvectors: 0 those of the largest eigenvalues, 1 those of the smallest; see
            `skipped`.

    Returns:
        `LowRank(A (r, d_in), B (d_out, r))`, float64, B with orthonormal columns, largest eigenvalue first; A positive in the entry
        of largest magnitude of every row.

    Raises:
        ValueError: if the shapes do not fit, r or the window is out of range, or C is zero or holds NaN or Inf.
    """
    weight, (c,) = _with_moments(weight, c)
    values, u = _left(_outputs(weight, c), rank, window)
    return _projected(weight, u, torch.ones_like(values))


@torch.no_grad()
def sc_lora(weight: torch.Tensor, c_plus: torch.Tensor, c_minus: torch.Tensor, *, rank: int, beta: float = 0.5) -> LowRank:
    """SC-LoRA's start (arXiv 2505.23724): output directions that are large on the task's data and small on data to be preserved.

    Q holds the r top eigenvectors of (1 − β) Cov₊ − β Cov₋ of the layer's outputs, B = Q, A = Qᵀ W₀. With y = W₀ x, Cov = W₀ C W₀ᵀ,
    so no further pass over the data is needed; a bias of the layer is not part of y here.

    Args:
        weight: (d_out, d_in) W₀.
        c_plus: (d_in, d_in) second moment of the inputs of the task's data, *per token* (`Covariance.matrix() / Covariance.mass`).
        c_minus: the same for the data to be preserved.
        rank: r, at most d_out.
        beta: β between 0 (only the task) and 1 (only preservation).

    Returns:
        `LowRank(A (r, d_in), B (d_out, r))`, float64, B with orthonormal columns, largest eigenvalue first.

    Raises:
        ValueError: if the shapes do not fit, or r or β is out of range.
    """
    check_real("beta", beta, FRACTION)
    weight, (c_plus, c_minus) = _with_moments(weight, c_plus, c_minus)
    _check_rank_of(weight, rank, weight.shape[0])
    difference = weight @ ((1 - beta) * c_plus - beta * c_minus) @ weight.mT
    _, q = solvers.top_eigenpairs((difference + difference.mT) / 2, rank)
    return LowRank(A=q.mT @ weight, B=q)


def _outputs(weight: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """(d_out, d_in) W₀ C^½, turned: with its transpose it gives W₀ C W₀ᵀ, at a mean diagonal of C of 1."""
    values, vectors = torch.linalg.eigh(c / _mean_diagonal(c))
    return weight @ (vectors * values.clamp(min=0).sqrt())


def _left(m: torch.Tensor, rank: int, window: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Singular values (r,) and left singular vectors of a window of M, largest first."""
    most = min(m.shape)
    _check_rank_of(m, rank, most)
    return solvers.left_singular(m, rank, skip=skipped(most, rank, window))


def _smallest(m: torch.Tensor, rank: int) -> LowRank:
    """B = the left singular vectors of the r smallest singular values of M (d_out, d_in), A = 0."""
    _, u = _left(m, rank, SMALLEST)
    return LowRank(A=u.new_zeros(rank, m.shape[1]), B=u)


def _projected(weight: torch.Tensor, u: torch.Tensor, sigma: torch.Tensor | None) -> LowRank:
    """B A = U Uᵀ W₀ with B = U √σ and A = √σ⁻¹ Uᵀ W₀; where σ is zero or None, the norm of the row of Uᵀ W₀ replaces it.

    Signs: A is positive in the entry of largest magnitude of every row.
    """
    a = u.mT @ weight
    norms = torch.linalg.vector_norm(a, dim=1)
    scale = norms if sigma is None else torch.where(sigma > 0, sigma, norms)
    root, sign = scale.sqrt(), solvers.column_signs(a.mT)
    return LowRank(A=sign[:, None] * a / torch.where(root > 0, root, 1.0)[:, None], B=u * (sign * root))


def _with_moments(weight: torch.Tensor, *moments: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    for c in moments:
        if weight.ndim != 2 or c.shape != (weight.shape[1], weight.shape[1]):
            raise InputError(f"a weight {tuple(weight.shape)} needs a second moment (d_in, d_in), not {tuple(c.shape)}")
    return weight.to(torch.float64), [c.to(weight.device, torch.float64) for c in moments]


def _mean_diagonal(c: torch.Tensor) -> torch.Tensor:
    mean = c.diagonal().mean()
    if not bool(torch.isfinite(c).all()):
        raise InputError("the second moment holds NaN or Inf")
    if not bool(mean > 0):
        what = (
            "its calibration inputs are all zero"
            if not bool(c.any())
            else f"its second moment has a negative trace ({float(mean)})"
        )
        raise InputError(f"{what}: leave the layer out of the targets, or add data that reach it")
    return mean


def _check_rank_of(weight: torch.Tensor, rank: int, limit: int) -> None:
    check_between("rank", rank, limit, f" (a weight {tuple(weight.shape)})")
