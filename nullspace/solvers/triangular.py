"""`Factor`: a triangular factor of C + σI, and products with its inverse."""

from __future__ import annotations

import torch

# Blocks of an inverse that is computed in place.
PANEL = 512


class Factor:
    """L with LLᵀ = C + σI; `solve` applies the inverse of that.

    Args:
        lower: L, (d, d) lower triangular, zero above the diagonal.
        block: 0: `solve` is the library's triangular solver. Otherwise the diagonal blocks of L, of this order, are replaced by
            their inverses, in place, and `solve` is 4 d / block matrix products; from d on, two, with L⁻¹ and its transpose.

    Cost of `solve`: 2 d² flops a column; 4 d² with the whole inverse.
    """

    def __init__(self, lower: torch.Tensor, block: int = 0) -> None:
        self.lower, self.block = lower, block
        for at in self._blocks():
            invert_(lower[at, at])

    def solve(self, x: torch.Tensor) -> torch.Tensor:
        """(LLᵀ)⁻¹ x, for x (d, n)."""
        lower = self.lower
        if not self.block:
            half = torch.linalg.solve_triangular(lower, x, upper=False)
            return torch.linalg.solve_triangular(lower.mT, half, upper=True)
        x = x.clone(memory_format=torch.contiguous_format)
        for at in self._blocks():
            x[at] = lower[at, at] @ x[at]
            x[at.stop :].addmm_(lower[at.stop :, at], x[at], alpha=-1)
        for at in reversed(self._blocks()):
            x[at] = lower[at, at].mT @ x[at]
            x[: at.start].addmm_(lower[at, : at.start].mT, x[at], alpha=-1)
        return x

    def _blocks(self) -> list[slice]:
        d = len(self.lower)
        return [slice(at, min(at + self.block, d)) for at in range(0, d, self.block)] if self.block else []


def invert_(lower: torch.Tensor) -> None:
    """Replace a lower triangular matrix, zero above the diagonal, by its inverse: 2/3 · d³ flops, 16 · d · `PANEL` bytes."""
    d = len(lower)
    for start in reversed(range(0, d, PANEL)):
        at, below = slice(start, min(start + PANEL, d)), slice(min(start + PANEL, d), d)
        unit = torch.eye(at.stop - start, dtype=lower.dtype, device=lower.device)
        inverse = torch.linalg.solve_triangular(lower[at, at], unit, upper=False)
        lower[below, at] = lower[below, below] @ (lower[below, at] @ -inverse)
        lower[at, at] = inverse


def shifted_cholesky(c: torch.Tensor, scale: float, shift: float, raises: int) -> tuple[torch.Tensor | None, float]:
    """L and σ with LLᵀ = C / scale + σI.

    Args:
        c: (d, d) float64; unchanged.
        scale: a power of two.
        shift: the first σ to try.
        raises: how often it is raised tenfold where rounding asks for that.

    Returns:
        L (d, d), F-contiguous, zero above the diagonal; None if even the last σ leaves no positive definite matrix.

    Cost: d³ / 3 flops, 8 · d² bytes: LAPACK and cuSOLVER work in the memory of L.
    """
    for _ in range(raises + 1):
        factor = torch.empty(c.shape, dtype=torch.float64, device=c.device).mT  # other strides would make PyTorch copy it
        torch.div(c, scale, out=factor)
        factor.diagonal().add_(shift)
        info = torch.empty((), dtype=torch.int32, device=c.device)
        torch.linalg.cholesky_ex(factor, out=(factor, info))
        if int(info) == 0:
            return factor, shift
        del factor
        shift *= 10
    return None, 0.0
