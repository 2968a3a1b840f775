"""A change cut to a smaller rank: the best there is on the inputs themselves, never worse than the cut that does not know them."""

from __future__ import annotations

import pytest
import torch

from nullspace.factors import LowRank, truncated

D, D_OUT, K = 17, 9, 6


def change(kind: str = "full") -> LowRank:
    torch.manual_seed(3)
    a, b = torch.randn(K, D, dtype=torch.float64), torch.randn(D_OUT, K, dtype=torch.float64)
    if kind == "unbalanced":
        a, b = a * torch.logspace(3, -4, K, dtype=torch.float64)[:, None], b * torch.logspace(-4, 2, K, dtype=torch.float64)
    if kind == "of rank 2":
        b = b[:, :2] @ torch.randn(2, K, dtype=torch.float64)
    return LowRank(a, b)


def inputs(kind: str) -> torch.Tensor:
    """Tokens in rows."""
    torch.manual_seed(5)
    x = torch.randn(60, D, dtype=torch.float64) * torch.logspace(0, -3, D, dtype=torch.float64)
    if kind == "massive":
        x[0, 4] = 1e5
    return x[:2] if kind == "few" else x


@pytest.mark.parametrize("of", ["full", "unbalanced", "of rank 2"])
@pytest.mark.parametrize("kind", ["full", "massive", "few"])
def test_the_error_on_the_inputs_is_that_of_the_best_cut_and_never_more_than_frobenius(kind: str, of: str) -> None:
    update, x = change(of), inputs(kind)
    delta = update.B @ update.A
    size = (delta @ x.T).norm()
    for rank in range(1, K + 1):
        weighted, plain = truncated(update, 7.0 * x.T @ x, rank=rank), truncated(update, rank=rank)
        assert weighted.A.shape == (rank, D)
        assert weighted.B.shape == (D_OUT, rank)
        errors = [float(((delta - pair.B @ pair.A) @ x.T).norm()) for pair in (weighted, plain)]
        best = float(torch.linalg.svdvals(delta @ x.T)[rank:].norm())  # Eckart–Young on the outputs themselves
        assert errors[0] == pytest.approx(best, abs=2e-7 * float(size))
        assert errors[0] <= errors[1] + 2e-7 * float(size)
        of_weight = float((delta - plain.B @ plain.A).norm())
        assert of_weight == pytest.approx(float(torch.linalg.svdvals(delta)[rank:].norm()), abs=1e-7 * float(delta.norm()))


def test_directions_that_the_inputs_do_not_have_are_filled_with_the_largest_of_what_is_left() -> None:
    update, x = change(), inputs("few")  # two tokens: ΔW X has rank 2
    cut = truncated(update, x.T @ x, rank=4)
    delta = update.B @ update.A
    two = truncated(update, x.T @ x, rank=2)
    rest = float(torch.linalg.svdvals(delta - two.B @ two.A)[2:].norm())
    assert float((delta - cut.B @ cut.A).norm()) == pytest.approx(rest, rel=1e-6)


def test_factors_are_balanced_and_signed_and_a_small_change_stays_as_it_is() -> None:
    update, x = change("unbalanced"), inputs("full")
    cut = truncated(LowRank(update.A.float(), update.B.float()), x.T @ x, rank=3)
    assert torch.allclose(cut.A.norm(dim=1), cut.B.norm(dim=0), rtol=1e-6)
    assert bool((cut.A.gather(1, cut.A.abs().argmax(1, keepdim=True)) > 0).all())
    same = truncated(update, rank=K + 3)
    assert torch.equal(same.A, update.A)
    assert torch.equal(same.B, update.B)
    zero = truncated(LowRank(update.A, torch.zeros_like(update.B)), x.T @ x, rank=2)
    assert not (zero.B @ zero.A).any()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": 1.5}, "rank"),
        ({"rank": 2, "c": torch.ones(3, 3)}, "17 columns"),
        ({"rank": 2, "c": torch.full((D, D), float("nan"))}, "NaN"),
        ({"rank": 2, "c": torch.zeros(D, D)}, "zero"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(arguments: dict, words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        truncated(change(), arguments.pop("c", None), **arguments)
    with pytest.raises(ValueError, match=r"B .*needed"):
        truncated(LowRank(torch.ones(2, 3), torch.ones(3, 4)), rank=1)
    with pytest.raises(ValueError, match="NaN"):
        truncated(LowRank(torch.full((2, 3), float("nan")), torch.ones(3, 2)), rank=1)
