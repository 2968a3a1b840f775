"""The solvers on a simulated GPU: every method, on the matrix's device, with the values of the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("simulated.runtime", exc_type=ImportError)

from nullspace.solvers import bottom_eigenpairs, effective_rank, spectrum, top_eigenpairs
from nullspace.solvers.eigen import METHODS

CUDA = torch.device("cuda", 1)


def matrix(d: int, *, singular: bool = False) -> torch.Tensor:
    """(d, d): a spectrum over eight decades, in random directions; half of it zero if singular."""
    q = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64)).Q
    values = torch.logspace(-8, 0, d, dtype=torch.float64)
    if singular:
        values[: d // 2] = 0
    return (q * values) @ q.mT


@pytest.mark.parametrize("singular", [False, True])
@pytest.mark.parametrize("d", [40, 512])
@pytest.mark.parametrize("method", METHODS)
def test_bottom_eigenpairs(method: str, d: int, singular: bool, gpu: Any) -> None:
    c = matrix(d, singular=singular)
    c = (c + c.mT) / 2
    values, vectors = bottom_eigenpairs(c.to(CUDA), 8, method=method)
    assert values.device == vectors.device == CUDA
    vectors = vectors.cpu()
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(8, dtype=torch.float64), atol=1e-12, rtol=0)
    excess = torch.einsum("dk,de,ek->", vectors, c, vectors) - torch.linalg.eigvalsh(c)[:8].sum()
    assert float(excess) <= 1e-9 * float(c.trace())


def test_tops_spectra_and_ranks(gpu: Any) -> None:
    c = matrix(96)
    c = (c + c.mT) / 2
    values, vectors = top_eigenpairs(c.to(CUDA), 4)
    assert values.device == vectors.device == CUDA
    expected = torch.linalg.eigvalsh(c)
    torch.testing.assert_close(values.cpu(), expected.flip(0)[:4])
    found = spectrum(c.to(CUDA))
    assert found.device == CUDA
    torch.testing.assert_close(found.cpu(), expected, atol=1e-12, rtol=0)
    assert effective_rank(found.clamp(min=0)) == pytest.approx(effective_rank(expected.clamp(min=0)))
