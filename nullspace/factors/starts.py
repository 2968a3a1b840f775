"""The two factors of an adapter before training, from a weight and second moments of its inputs: one pure function a method.

Most of them take the part of W₀ in r directions of its *output*, B A = Q Qᵀ W₀ with orthonormal Q. They differ in these directions,
and in how the product is divided between A and B:

    pissa, milora    eigenvectors of W₀ W₀ᵀ                      the largest, the smallest
    corda            eigenvectors of W₀ C² W₀ᵀ                   the largest (ipm), the smallest (kpm)
    corda_exact      eigenvectors of W₀ C W₀ᵀ                    the same
    sc_lora          eigenvectors of W₀ ((1 − β) C₊ − β C₋) W₀ᵀ  the largest

The others choose directions of the input: lora_null and b_zero the null space of the activations, eva their largest components.
"""

from __future__ import annotations

import torch

from nullspace import solvers
from nullspace.checks import FRACTION, NOT_NEGATIVE, check_between, check_integer, check_one_of, check_real
from nullspace.errors import InputError
from nullspace.factors.low_rank import LowRank
from nullspace.solvers.singular import thin_svd

CORDA_MODES = ("kpm", "ipm")
# Added to the diagonal of C, relative to its mean, by PEFT and the paper's code.
DAMPING = 0.01
# Singular values below this, relative to the norm of the matrix, count as zero, and nothing is divided by them.
ZERO = 1e-14


@torch.no_grad()
def lora_null(weight: torch.Tensor, basis: torch.Tensor, *, rank: int | None = None, sigma_scale: float = 1.0) -> LowRank:
    """LoRA-Null's start (arXiv 2503.02659, eq. 8–11): SVD(W₀ U Uᵀ) = U′ Σ′ V′ᵀ, B = U′ √Σ′, A = √Σ′ V′ᵀ.

    The d_out × d_in product is never formed. By Theorem 4 the thin SVD W₀ U = P Σ Qᵀ gives U′ = P, Σ′ = Σ and V′ = U Q, as U
    has orthonormal columns. B A = W₀ U Uᵀ for r = k; for r < k it is the best rank-r part of it (Eckart–Young).

    Args:
        weight: (d_out, d_in) W₀.
        basis: (d_in, k) U_null, orthonormal columns.
        rank: r of the adapter, at most k and d_out; k by default.
        sigma_scale: Σ′ is multiplied by it (the paper's Table 5), and so is B A: more plasticity, less preservation.

    Returns:
        `LowRank(A (r, d_in), B (d_out, r))`, float64, on the weight's device. A is positive in the entry of largest
        magnitude of every row, so that equal inputs give equal factors.

    Cost: 2 · d_out · d_in · k + O(d_out · k²) flops.

    Raises:
        ValueError: if the shapes do not fit, r is out of range, or `sigma_scale` is not a positive number.
    """
    if weight.ndim != 2 or basis.ndim != 2 or weight.shape[1] != basis.shape[0]:
        raise InputError(f"a weight {tuple(weight.shape)} needs a basis (d_in, k), not {tuple(basis.shape)}")
    rank = _check_rank(basis.shape[1], weight.shape[0], rank)
    check_real("sigma_scale", sigma_scale)
    basis = basis.to(weight.device, torch.float64)
    p, sigma, qt = thin_svd(weight.to(torch.float64) @ basis)
    right = qt[:rank] @ basis.T
    root = solvers.column_signs(right.mT) * (sigma_scale * sigma[:rank]).sqrt()
    return LowRank(A=root[:, None] * right, B=p[:, :rank] * root)


def b_zero(basis: torch.Tensor, d_out: int, *, rank: int | None = None) -> LowRank:
    """A = U_nullᵀ and B = 0: the weight stays untouched (the paper's code calls it `singular_aware_2`).

    Args:
        basis: (d_in, k), columns by ascending eigenvalue.
        d_out: rows of the weight, which itself is not needed.
        rank: r of the adapter, at most k and d_out; k by default. The r directions of the smallest eigenvalues are taken.

    Returns:
        `LowRank(A (r, d_in), B (d_out, r))`, float64, on the device of the basis.

    Raises:
        ValueError: if r is out of range.
    """
    rank = _check_rank(basis.shape[1], d_out, rank)
    a = basis[:, :rank].T.to(torch.float64).clone(memory_format=torch.contiguous_format)  # never a view of the basis
    return LowRank(A=a, B=a.new_zeros(d_out, rank))


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
    return _from_singular(weight, rank, "top")


@torch.no_grad()
def milora(weight: torch.Tensor, *, rank: int) -> LowRank:
    """MiLoRA's start (arXiv 2406.09044): the r smallest of the min(d_out, d_in) singular triples.

    The residual W₀ − B A is the matrix of rank min(d_out, d_in) − r that is nearest to W₀ (arXiv 2503.02659, eq. 4).

    Args, returns and errors: as `pissa`, largest of the r singular values first.
    """
    return _from_singular(weight, rank, "bottom")


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
    sigma, u = _left(product, rank, "bottom" if mode == "kpm" else "top")
    return _projected(weight, u, torch.where(sigma > ZERO * torch.linalg.matrix_norm(product), sigma, 0.0))


@torch.no_grad()
def corda_exact(weight: torch.Tensor, c: torch.Tensor, *, rank: int, mode: str = "kpm") -> LowRank:
    """The optimum that CorDA approximates: SVD(W₀ C^½) = U Σ Vᵀ, B A = U_r Σ_r V_rᵀ C^-½ = U_r U_rᵀ W₀.

    W₀ − B A minimises ‖(W₀ − W₀′) X‖_F over all W₀′ of its rank (kpm: arXiv 2503.02659, eq. 5), and B A does so over those of
    rank r (ipm). U holds eigenvectors of W₀ C W₀ᵀ. Theorem 2 there states this optimum for CorDA's start, but the SVD of W₀ C
    is optimal in another norm.

    Args and errors: as `corda`.

    Returns:
        As `pissa`, but with ‖u_iᵀ W₀‖ in place of Σ_r: the rows of A and the columns of B have equal norms.
    """
    check_one_of("mode", mode, CORDA_MODES)
    weight, (c,) = _with_moments(weight, c)
    values, vectors = torch.linalg.eigh(c / _mean_diagonal(c))
    root = weight @ (vectors * values.clamp(min=0).sqrt())
    _, u = _left(root, rank, "bottom" if mode == "kpm" else "top")
    return _projected(weight, u, None)


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


@torch.no_grad()
def eva(c: torch.Tensor, mean: torch.Tensor, mass: float, d_out: int, *, rank: int) -> LowRank:
    """EVA's start (arXiv 2410.07170): A = the r top right singular vectors of the *centred* activations, B = 0; W₀ stays.

    Args:
        c: (d_in, d_in) second moment Σ x xᵀ of the inputs, uncentred.
        mean: (d_in,) their mean.
        mass: the number of tokens (the sum of their weights, if they have weights).
        d_out: rows of the weight.
        rank: r, at most d_in and d_out.

    Returns:
        `LowRank(A (r, d_in), B (d_out, r))`, float64, rows of A orthonormal, by descending variance, positive in the entry of
        largest magnitude.

    Raises:
        ValueError: if the shapes do not fit or r is out of range.
    """
    if c.ndim != 2 or c.shape[0] != c.shape[1] or mean.shape != c.shape[:1]:
        raise InputError(f"needs a second moment (d_in, d_in) and a mean (d_in,), not {tuple(c.shape)} and {tuple(mean.shape)}")
    check_between("rank", rank, min(len(c), check_integer("d_out", d_out)))
    _, vectors = solvers.top_eigenpairs(centred(c, mean, mass), rank)
    return LowRank(A=vectors.mT.contiguous(), B=vectors.new_zeros(d_out, rank))


def centred(c: torch.Tensor, mean: torch.Tensor, mass: float) -> torch.Tensor:
    """Σ (x − μ)(x − μ)ᵀ = C − n μ μᵀ, (d, d) float64, a new tensor."""
    c = c.to(torch.float64)
    return torch.addr(c, mean.to(c), mean.to(c), alpha=-mass)


@torch.no_grad()
def orthogonal(
    d_in: int, d_out: int, *, rank: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
) -> LowRank:
    """Random A and B, both different from zero, with B A = 0 (PEFT's `init_lora_weights="orthogonal"`, after an idea of D. Bhatta).

    Q is a random orthogonal r × r matrix; A combines its odd rows and B its even ones, with normal coefficients of standard
    deviation 1/10, so that every row of B is orthogonal to every column of A. W₀ stays.

    Args:
        d_in: columns of the weight.
        d_out: its rows.
        rank: r, even.
        generator: of the random numbers; PyTorch's default one otherwise. They are drawn on the CPU for every device.
        device: of the factors.

    Returns:
        `LowRank(A (r, d_in), B (d_out, r))`, float64.

    Raises:
        ValueError: if r is odd or smaller than 2.
    """
    if check_integer("rank", rank, least=None) < 2 or rank % 2:
        raise InputError(f"the rank of an orthogonal start must be even, not {rank}")

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q = torch.linalg.qr(normal(rank, rank)).Q
    a, b = (normal(d_in, rank // 2) @ q[0::2]).mT / 10, normal(d_out, rank // 2) @ q[1::2] / 10
    return LowRank(A=a.contiguous().to(device), B=b.to(device))


def _from_singular(weight: torch.Tensor, rank: int, end: str) -> LowRank:
    weight = weight.to(torch.float64)
    sigma, u = _left(weight, rank, end)
    return _projected(weight, u, sigma)


def _left(m: torch.Tensor, rank: int, end: str) -> tuple[torch.Tensor, torch.Tensor]:
    _check_rank_of(m, rank, min(m.shape))
    return solvers.left_singular(m, rank, end=end)


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


def _check_rank(columns: int, d_out: int, rank: int | None) -> int:
    limit = min(columns, check_integer("d_out", d_out))
    where = f" (a basis of {columns} columns, a weight of {d_out} rows)"
    return check_between("rank", columns if rank is None else rank, limit, where)
