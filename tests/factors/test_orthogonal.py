"""A random start whose product is zero."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nullspace import factors


@pytest.mark.parametrize(("d_in", "d_out", "r"), [(60, 24, 8), (24, 60, 2), (1, 1, 2), (4, 3, 6)])
def test_an_orthogonal_start_is_nothing_made_of_two_factors(d_in: int, d_out: int, r: int) -> None:
    a, b = factors.orthogonal(d_in, d_out, rank=r, generator=torch.Generator().manual_seed(0))
    assert (a.shape, b.shape, a.dtype) == ((r, d_in), (d_out, r), torch.float64)
    assert float((b @ a).abs().max()) <= 1e-15
    assert np.linalg.matrix_rank(a.numpy()) == min(r // 2, d_in)
    assert np.linalg.matrix_rank(b.numpy()) == min(r // 2, d_out)
    again = factors.orthogonal(d_in, d_out, rank=r, generator=torch.Generator().manual_seed(0))
    other = factors.orthogonal(d_in, d_out, rank=r, generator=torch.Generator().manual_seed(1))
    assert torch.equal(a, again.A)
    assert torch.equal(b, again.B)
    assert not torch.equal(a, other.A)
    assert not torch.equal(b, other.B)


def test_an_orthogonal_start_has_entries_of_a_tenth_of_the_root_of_half() -> None:
    """Each is a sum over r / 2 normal coefficients of 1/10 and as many entries of an orthogonal r × r matrix."""
    a, b = factors.orthogonal(400, 300, rank=16, generator=torch.Generator().manual_seed(0))
    for factor in (a, b):
        assert float(factor.square().mean()) == pytest.approx(0.01 / 2, rel=0.1)


@pytest.mark.parametrize("r", [3, 1, 0, -2])
def test_an_odd_rank_is_refused(r: int) -> None:
    with pytest.raises(ValueError, match=f"must be even, not {r}"):
        factors.orthogonal(6, 4, rank=r)
