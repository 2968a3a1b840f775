"""Random activations with the spectra that matter."""

from __future__ import annotations

import torch


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def small_integers(tokens: int, d: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    """Products and sums of these are exact in float32 too, so that equality can be asked for."""
    return torch.randint(-8, 9, (tokens, d), generator=torch.Generator().manual_seed(seed)).to(dtype)


def activations(tokens: int, d: int, *, quietest: float, massive: float = 1.0, every: int = 128, seed: int = 0) -> torch.Tensor:
    """Tokens whose singular values fall from 1 to `quietest` along directions that are no axes; every n-th one is scaled."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    x = torch.randn(tokens, d, generator=generator, dtype=torch.float64) * quietest ** torch.linspace(0, 1, d)
    x = x @ directions.T
    x[::every] *= massive
    return x.float()
