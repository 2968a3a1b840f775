"""Inputs of the kernels: random rows, rows with a real layer's spectrum, rows with outliers; and the sums that are compared."""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.solvers import FRACTIONS, LOG_SPECTRUM
from nullspace import Covariance, csrc_triton
from nullspace.csrc_triton.tiles import Tiling
from nullspace.moments.sums_torch import full_precision_matmul
from nullspace.moments.sums_triton import TritonSums
from nullspace.moments.triangle import PANEL_ROWS, LowerTriangle

MASSIVE_ROWS, MASSIVE_SCALE = 32, 1e3
STEEPNESS = 1e-6


def draw(tokens: int, d: int, device: torch.device, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    """Gaussian rows (tokens, d)."""
    return torch.randn(tokens, d, generator=torch.Generator(device).manual_seed(seed), device=device).to(dtype)


def activations(tokens: int, d: int, chunk: int, device: torch.device, *, rank: int) -> list[torch.Tensor]:
    """bfloat16 rows along random directions, in chunks: a real layer's spectrum, stretched so that λ_rank / λ_max = 1e-6."""
    logs = np.interp(np.linspace(0, 1, d), FRACTIONS, LOG_SPECTRUM)
    logs *= np.log10(STEEPNESS) / logs[d - rank]
    generator = torch.Generator(device).manual_seed(1)
    directions = torch.linalg.qr(torch.randn(d, d, generator=generator, device=device)).Q
    directions *= torch.tensor(10 ** (logs / 2), dtype=torch.float32, device=device)
    with full_precision_matmul(device.type):
        return [
            (torch.randn(chunk, d, generator=generator, device=device) @ directions.T).bfloat16()
            for _ in range(-(-tokens // chunk))
        ]


def with_massive_rows(chunks: list[torch.Tensor]) -> list[torch.Tensor]:
    """The same with 32 rows scaled by 1e3."""
    rows = torch.randperm(sum(map(len, chunks)), generator=torch.Generator().manual_seed(0))[:MASSIVE_ROWS]
    scaled = [chunk.clone() for chunk in chunks]
    for row in rows.tolist():
        scaled[row // len(chunks[0])][row % len(chunks[0])] *= MASSIVE_SCALE
    return scaled


def cublas_float32(x: torch.Tensor) -> torch.Tensor:
    """The full product of 16-bit inputs, in float32 sums, as a float32 matrix."""
    return torch.mm(x.T, x, out_dtype=torch.float32) if x.is_cuda else x.float().T @ x.float()


def float64_sum(chunks: list[torch.Tensor]) -> torch.Tensor:
    """All products in float64."""
    d = chunks[0].shape[1]
    g = chunks[0].new_zeros(d, d, dtype=torch.float64)
    for chunk in chunks:
        for part in chunk.split(4096):
            wide = part.double()
            g.addmm_(wide.T, wide)
    return g


def float32_sum(chunks: list[torch.Tensor]) -> torch.Tensor:
    """cuBLAS over each chunk, the chunks added in float64."""
    g = chunks[0].new_zeros(chunks[0].shape[1], chunks[0].shape[1], dtype=torch.float64)
    for chunk in chunks:
        g += cublas_float32(chunk)
    return g


def kernel_sum(chunks: list[torch.Tensor], tiling: Tiling | None = None) -> torch.Tensor:
    """The kernel alone, a launch a chunk."""
    triangle = LowerTriangle(chunks[0].shape[1], device=chunks[0].device)
    for chunk in chunks:
        csrc_triton.syrk_accumulate(triangle.packed, chunk, panel_rows=PANEL_ROWS, tiling=tiling)
    return triangle.square()


def new_covariance(d: int, device: torch.device) -> Covariance:
    """One that sums by the Triton kernels, on a CPU too, where Triton interprets them."""
    covariance = Covariance(d, device=device)
    if device.type == "cpu":
        covariance._sums = TritonSums(d, device)
    return covariance


def covariance_sum(chunks: list[torch.Tensor]) -> torch.Tensor:
    """The kernels as the engine uses them: outlier tokens apart."""
    covariance = new_covariance(chunks[0].shape[1], chunks[0].device)
    for chunk in chunks:
        covariance.update(chunk)
    return covariance.matrix()


def resolution(g: torch.Tensor, exact: torch.Tensor) -> float:
    """δ = ‖E − αG‖ / ‖G‖ with the α that makes it least: an error that is proportional to the result moves no eigenvector."""
    error = g - exact
    alpha = (error * exact).sum() / exact.square().sum()
    return float(error.sub_(exact, alpha=float(alpha)).norm() / exact.norm())


def leak(basis: torch.Tensor, chunks: list[torch.Tensor]) -> float:
    """‖XU‖_F, from X itself."""
    return sum(float((part.double() @ basis).square().sum()) for chunk in chunks for part in chunk.split(4096)) ** 0.5
