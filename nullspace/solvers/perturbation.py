"""The effect of an error of a second moment on its bottom eigenspace; and matrices from which directions are projected out."""

from __future__ import annotations

import torch

# A leak below this counts as zero, and so does an excess over it.
NO_LEAK = 1e-8


def deflated(c: torch.Tensor, e_dm: torch.Tensor) -> torch.Tensor:
    """P C P + ‖C‖_F E Eᵀ with P = I − E Eᵀ: C on the complement of E; the columns of E get its largest eigenvalue.

    Args:
        c: (d, d) symmetric.
        e_dm: (d, m), orthonormal columns.

    Memory: 8 · d² bytes, the result.
    """
    norm = torch.linalg.matrix_norm(c)
    norm = torch.where(norm > 0, norm, 1.0)
    image = c @ e_dm
    half = image - e_dm @ ((e_dm.mT @ image) / 2)
    result = torch.addmm(c, half, e_dm.mT, alpha=-1)
    return result.addmm_(e_dm, half.mT, alpha=-1).addmm_(norm * e_dm, e_dm.mT)


def deflated_root(root: torch.Tensor, e_dm: torch.Tensor) -> torch.Tensor:
    """R with Rᵀ R = `deflated(rootᵀ root, e_dm)`, up to the norm that E gets: the rows of `root` projected, then those of Eᵀ."""
    norm = torch.linalg.matrix_norm(root)
    return torch.cat([root - (root @ e_dm) @ e_dm.mT, torch.where(norm > 0, norm, 1.0) * e_dm.mT])


def estimated_excess(
    eigenvalues: torch.Tensor, rank: int, error_norm: float, trace: float, *, d_in: int | None = None, squared: bool = True
) -> float:
    """Estimates how much rounding has raised the leak of the bottom `rank` eigenvectors of a second moment: leak / optimum − 1.

    Second-order perturbation theory with a random error of entry size e = ‖E‖_F / d: the basis picks up the energy
    Σ_{i ≤ r < j} e² / max(λ_j − λ_i, e). An error E of X instead of C puts e · (σ_i + σ_j) in the place of e: the entries of
    EᵀX + XᵀE in the singular basis. Where even λ_{r+1} is below ‖E‖₂ the computed eigenvalues say nothing, and all of ‖E‖₂ counts.

    Args:
        eigenvalues: ascending, more than r of them; unknown ones count as the last one, which they exceed.
        rank: r < d.
        error_norm: ‖E‖_F (`Covariance.error_norm`).
        trace: tr C: a leak below 1e-8 counts as zero.
        d_in: order of C; by default, as many as there are eigenvalues.
        squared: whether the error is one of C; otherwise of X.
    """
    if trace == 0:
        return 0.0
    values = eigenvalues.to(torch.float64).clamp(min=0)
    unknown = (d_in or len(values)) - len(values)
    values = torch.cat([values, values[-1:].expand(unknown)])
    near, far = values[:rank, None], values[None, rank:]
    entry = torch.full_like(near - far, error_norm / len(values))
    if not squared:
        entry = entry * (near.sqrt() + far.sqrt())
    entry = entry.clamp(min=torch.finfo(torch.float64).tiny)
    picked_up = float((entry * (entry / torch.maximum(far - near, entry))).sum())
    noise = float(2 * entry[:, 0].max() * len(values) ** 0.5)  # the spectral norm of a random matrix of such entries
    if values[rank] <= noise:
        picked_up += float((noise - values[:rank]).clamp(min=0).sum())
    return (1 + picked_up / max(float(values[:rank].sum()), NO_LEAK**2 * trace)) ** 0.5 - 1


def bounded_excess(values: torch.Tensor, error_norm: float, trace: float, *, squared: bool = True) -> float:
    """Bounds how much rounding has raised the leak of a basis: leak / optimum − 1.

    With S the sum of the r computed eigenvalues and e = ‖E‖: the energy ‖UᵀX‖²_F is at most S + r e for the computed basis and at
    least S − r e for the best one (Ky Fan 1949). An error E of X instead of C changes ‖UᵀX‖_F by at most √r · e: √S ± √r · e.

    Args:
        values: (r,), the computed bottom eigenvalues.
        error_norm: ‖E‖_F, which bounds the spectral norm.
        trace: tr C: a leak below 1e-8 counts as zero.
        squared: whether the error is one of C; otherwise of X.
    """
    if trace == 0:
        return 0.0
    energy, negligible = float(values.sum()), NO_LEAK**2 * trace
    if squared:
        most, least = energy + len(values) * error_norm, energy - len(values) * error_norm
    else:
        spread = len(values) ** 0.5 * error_norm
        most, least = (energy**0.5 + spread) ** 2, max(energy**0.5 - spread, 0.0) ** 2
    return (max(most, negligible) / max(least, negligible)) ** 0.5 - 1
