"""Two second moments in one basis."""

from __future__ import annotations

import pytest
import torch

from nullspace.solvers import diagonalise


@pytest.mark.parametrize(("n_t", "n_k"), [(140, 140), (10, 140), (140, 10), (10, 10)])
@pytest.mark.parametrize("massive", [False, True])
def test_both_are_diagonal_in_one_basis(n_t: int, n_k: int, massive: bool) -> None:
    d = 33
    torch.manual_seed(0)
    x_t, x_k = (torch.randn(n, d, dtype=torch.float64) * torch.logspace(0, -3, d, dtype=torch.float64) for n in (n_t, n_k))
    if massive:
        x_t[0, 20], x_k[0, 20] = 3e4, 1e4
    t, k = (x.mT @ x / x.norm() ** 2 for x in (x_t, x_k))
    t += 1e-3 / d * torch.eye(d, dtype=torch.float64)
    first, second, v, z = diagonalise(t, k)
    size = (t + k).diagonal().sqrt()
    for m, values in ((t, first), (k, second)):
        assert bool(((z * values) @ z.mT - m).abs().le(1e-12 * size * size[:, None]).all())
        assert bool((v.mT @ m @ v - values.diag()).abs().le(1e-9).all())
    assert bool((z.mT @ v - torch.eye(d)).abs().le(1e-9).all())
    assert bool((first + second - 1).abs().le(1e-9).all())
    assert bool((first > 0).all())
    assert int((second == 0).sum()) == max(0, d - n_k)


def test_noise_makes_small_values_zero() -> None:
    t, k = torch.eye(3, dtype=torch.float64), torch.tensor([1.0, 1e-3, 1e-9], dtype=torch.float64).diag()
    assert int((diagonalise(t, k).second > 0).sum()) == 3
    assert int((diagonalise(t, k, noise=1e-6).second > 0).sum()) == 2


@pytest.mark.parametrize("bad", ["shape", "nan", "indefinite", "singular"])
def test_bad_matrices_are_refused(bad: str) -> None:
    t, k = torch.eye(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    if bad == "shape":
        k = torch.eye(4)
    elif bad == "nan":
        k[1, 1] = float("nan")
    elif bad == "indefinite":
        t = -2 * t
    else:
        t, k = torch.ones(3, 3), torch.ones(3, 3)
    with pytest.raises(ValueError, match=r"site|NaN|positive definite"):
        diagonalise(t, k)
