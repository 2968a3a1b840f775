"""AlphaEdit's projector against the inputs themselves and the SVD of the paper's code; and what an edit through it moves."""

from __future__ import annotations

import pytest
import torch

from nullspace.factors import THRESHOLD, alphaedit

D, TOKENS = 24, 200


def per_token(kind: str = "full") -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs, tokens in rows, and their second moment per token."""
    generator = torch.Generator().manual_seed(2)
    turn = torch.linalg.qr(torch.randn(D, D, generator=generator, dtype=torch.float64)).Q
    x = torch.randn(TOKENS, D, generator=generator, dtype=torch.float64) * torch.logspace(0.5, -3, D, dtype=torch.float64) @ turn
    if kind == "massive":
        x[0, 3] = 1e4
    if kind == "few tokens":
        x = x[:5]
    if kind == "repeated":
        x = torch.diag((torch.arange(D) < 9).double() * 2)
    return x, x.T @ x / len(x)


@pytest.mark.parametrize("kind", ["full", "massive", "few tokens", "repeated"])
@pytest.mark.parametrize("threshold", [THRESHOLD, 1e-4])
def test_it_projects_onto_what_the_inputs_hardly_have(kind: str, threshold: float) -> None:
    x, c = per_token(kind)
    p = alphaedit(c, threshold=threshold)
    values = torch.zeros(D, dtype=torch.float64)
    sigma = torch.linalg.svdvals(x)
    values[: len(sigma)] = sigma.square() / len(x)
    small = values[values < threshold]
    assert torch.equal(p, p.mT)
    assert torch.allclose(p @ p, p, atol=1e-12)
    assert float(p.trace()) == pytest.approx(len(small), abs=1e-9)
    bound = float(small.sum() * len(x)) ** 0.5 + 1e-7 * float(x.norm())  # √ of C's rounding
    edit = torch.randn(7, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert float((edit @ p @ x.T).norm()) <= float(torch.linalg.matrix_norm(edit, 2)) * bound


def test_it_is_that_of_the_papers_code_in_float32() -> None:
    _, c = per_token()
    u, s, _ = torch.linalg.svd(c.float(), full_matrices=False)
    few = u[:, s < THRESHOLD]
    assert 0 < few.shape[1] < D
    assert float((alphaedit(c) - few @ few.mT).norm()) <= 1e-5


def test_everything_and_nothing() -> None:
    _, c = per_token()
    assert torch.allclose(alphaedit(c, threshold=1e9), torch.eye(D, dtype=torch.float64), atol=1e-12)
    assert not alphaedit(torch.eye(3), threshold=1e-3).any()


@pytest.mark.parametrize(
    ("c", "threshold", "words"),
    [
        (torch.zeros(3, 3), 1.0, "zero"),
        (torch.ones(2, 3), 1.0, "d_in"),
        (torch.full((3, 3), float("inf")), 1.0, "NaN or Inf"),
        (torch.diag(torch.tensor([2.0, 1, -1])), 1.0, "positive semi-definite"),
        (torch.eye(3), 0.0, "threshold"),
        (torch.eye(3), float("nan"), "threshold"),
        (torch.eye(3), "1", "threshold"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(c: torch.Tensor, threshold: float, words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        alphaedit(c, threshold=threshold)
