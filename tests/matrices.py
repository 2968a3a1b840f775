"""Symmetric matrices with known spectra, and what makes pairs eigenpairs: for the tests of the solvers."""

from __future__ import annotations

import numpy as np
import torch

# Backward stable: residual and loss of orthogonality are a small multiple of d · 2e-16.
TINY = 1e-12

# The logarithm of a real layer's spectrum (SmolLM2-135M, layer 15 o_proj) at fractions of it, from the top.
LAYER = (
    (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.9, 0.97, 0.99, 1.0),
    (0.0, -1.46, -2.07, -2.92, -3.47, -3.94, -4.3, -4.59, -4.76, -5.31),
)


def tokens_of(n: int, d: int, *, quietest: float = 1e-3, seed: int = 0) -> torch.Tensor:
    """(n, d) float64 whose scale falls from 1 to `quietest` along directions that are no axes."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    return (torch.randn(n, d, generator=generator, dtype=torch.float64) * quietest ** torch.linspace(0, 1, d)) @ directions.T


def psd(d: int, seed: int = 0) -> torch.Tensor:
    x = tokens_of(3 * d, d, seed=seed)
    return x.T @ x


def with_eigenvalues(values: list[float], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A symmetric matrix, and its eigenvectors in the order of the values."""
    d = len(values)
    q = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q
    c = (q * torch.tensor(values, dtype=torch.float64)) @ q.T
    return (c + c.T) / 2, q


def assert_eigenpairs(c: torch.Tensor, values: torch.Tensor, vectors: torch.Tensor, k: int) -> None:
    """What makes a set of pairs one of eigenpairs: C V = V Λ, orthonormal, and the sign rule."""
    d = c.shape[0]
    assert (values.shape, vectors.shape) == ((k,), (d, k))
    assert values.dtype == vectors.dtype == torch.float64
    c = c.double()
    assert float((c @ vectors - vectors * values).norm()) <= TINY * float(c.norm())
    assert float((vectors.T @ vectors - torch.eye(k)).abs().max()) <= TINY
    peak = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    assert (peak > 0).all()


def spectrum_of(kind: str, d: int) -> np.ndarray:
    values = 10 ** (np.linspace(0, -12, d) if kind == "steep" else np.interp(np.linspace(0, 1, d), *LAYER))
    if kind == "massive":
        values[:4] *= 1e7
    if kind == "some zeros":
        values[-5:] = 0
    if kind == "wide null space":
        values[-100:] = 0
    if kind == "repeated":
        values[-100:] = values[-100]
    if kind == "all equal":
        values[:] = 3.0
    return values
