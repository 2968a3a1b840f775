"""Weights, inputs and comparisons of the tests of factors."""

from __future__ import annotations

import numpy as np
import torch

EXACT = 1e-10


def assert_close(actual: torch.Tensor | np.ndarray, expected: torch.Tensor | np.ndarray, *, size: float | None = None) -> None:
    """Relative to the norm of what is expected."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    assert np.linalg.norm(actual - expected) <= EXACT * (np.linalg.norm(expected) if size is None else size)


def separated(d_out: int, d_in: int, condition: float = 1e3, seed: int = 0) -> torch.Tensor:
    """A weight whose singular values fall geometrically: each has a direction of its own."""
    generator = torch.Generator().manual_seed(seed)
    s = min(d_out, d_in)
    u, v = (torch.linalg.qr(torch.randn(d, s, generator=generator, dtype=torch.float64)).Q for d in (d_out, d_in))
    return (u * condition ** -torch.linspace(0, 1, s, dtype=torch.float64)) @ v.T


def heard(d_in: int, *, tokens: int = 400, quietest: float = 1e-2, seed: int = 0) -> torch.Tensor:
    """(tokens, d_in) float64 inputs, steep along directions that are no axes, with a mean that is not zero."""
    generator = torch.Generator().manual_seed(seed + 100)
    turn = torch.linalg.qr(torch.randn(d_in, d_in, generator=generator, dtype=torch.float64)).Q
    x = torch.randn(tokens, d_in, generator=generator, dtype=torch.float64) + 0.3
    return (x * quietest ** torch.linspace(0, 1, d_in)) @ turn.T


def moment(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x
