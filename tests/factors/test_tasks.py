"""InfLoRA's start and O-LoRA's term against their definitions and the authors' formulas."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from nullspace import factors

D, D_OUT = 24, 40


def inputs(seed: int, *, rank: int = D, tokens: int = 4 * D) -> torch.Tensor:
    """(D, tokens) of a rank, with singular values over three decades."""
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(n, rank, generator=generator, dtype=torch.float64) for n in (D, tokens)]
    return draw[0] * torch.logspace(0, -3, rank, dtype=torch.float64) @ draw[1].mT


def space(x: torch.Tensor, share: float) -> torch.Tensor:
    """(D, k): by an SVD of the inputs themselves, the fewest main directions that hold a share of ‖X‖²."""
    u, sigma, _ = np.linalg.svd(x.numpy(), full_matrices=False)
    held = (sigma**2).cumsum() / (sigma**2).sum()
    return torch.from_numpy(u[:, : int((held < share - 1e-12).sum()) + 1])


def same_space(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool(torch.linalg.svdvals(torch.linalg.qr(a).Q.mT @ torch.linalg.qr(b).Q).min() > 1 - 1e-9)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.999])
def test_rows_are_the_main_directions_of_what_is_left_of_the_task(share: float) -> None:
    x_t, x_k = inputs(0), inputs(1)
    a, b = factors.inflora(7.0 * x_t @ x_t.mT, 1e-5 * x_k @ x_k.mT, D_OUT, rank=5, share=share)
    m = space(x_k, share)
    left = x_t - m @ (m.mT @ x_t)
    u, _, _ = torch.linalg.svd(left)
    assert same_space(a.mT, u[:, :5])
    for row, direction in zip(a, u.mT, strict=False):  # one by one, in their order
        assert abs(float(row @ direction)) == pytest.approx(3**-0.5, rel=1e-7)
    assert (a @ m).abs().max() < 1e-13
    torch.testing.assert_close(3 * a @ a.mT, torch.eye(5, dtype=torch.float64), atol=1e-12, rtol=0)
    assert (a.gather(1, a.abs().argmax(1, keepdim=True)) > 0).all()
    assert torch.equal(b, torch.zeros(D_OUT, 5, dtype=torch.float64))
    update = torch.randn(D_OUT, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64) @ a
    bound = (1 - share) ** 0.5 * torch.linalg.matrix_norm(update, 2) * x_k.norm()
    assert 0 < float((update @ x_k).norm()) <= float(bound)


def authors(cur_matrix: torch.Tensor, feature: torch.Tensor, rank: int) -> torch.Tensor:
    """A as `methods/inflora.py` has it of `cur_matrix`, whose left singular vectors it takes; `feature`: M with M Mᵀ = P."""
    u, _, _ = torch.linalg.svd(cur_matrix - feature @ feature.mT @ cur_matrix, full_matrices=False)
    return u[:, :rank].mT / 3**0.5


def test_it_is_the_authors_formula_with_inputs_in_the_place_of_second_moments() -> None:
    """Their `cur_matrix` is C where the paper has X: another order and choice of directions, unless that is corrected."""
    x_t, x_k = inputs(3), inputs(4)
    c_t, c_k = x_t @ x_t.mT, x_k @ x_k.mT
    a = factors.inflora(c_t, c_k, D_OUT, rank=4, share=0.95).A
    corrected = authors(x_t, space(x_k, 0.95), 4)
    assert (a.mT @ a - corrected.mT @ corrected).abs().max() < 1e-10
    as_released = authors(c_t, space(c_k, 0.95), 4)
    assert (a.mT @ a - as_released.mT @ as_released).abs().max() > 1e-3
    first = factors.inflora(c_t, c_k, D_OUT, rank=4, share=0.0).A  # nothing came before: both agree
    released = torch.linalg.svd(c_t).U[:, :4].mT / 3**0.5
    assert (first.mT @ first - released.mT @ released).abs().max() < 1e-10


def test_degenerate_moments() -> None:
    x_k = inputs(5, rank=6)
    few = inputs(6, rank=2)
    a = factors.inflora(few @ few.mT, x_k @ x_k.mT, D_OUT, rank=8, share=1.0).A  # more rows than the task has directions
    assert torch.linalg.matrix_rank(a) == 8
    assert (a @ x_k).norm() < 1e-9 * a.norm() * x_k.norm()
    equal = factors.inflora(torch.eye(D), torch.eye(D), D_OUT, rank=D // 2, share=0.5).A  # repeated eigenvalues
    torch.testing.assert_close(3 * equal @ equal.mT, torch.eye(D // 2, dtype=torch.float64), atol=1e-12, rtol=0)
    every = factors.inflora(few @ few.mT, x_k @ x_k.mT, D, rank=D, share=0.0).A  # rank = d_in = d_out
    torch.testing.assert_close(3 * every.mT @ every, torch.eye(D, dtype=torch.float64), atol=1e-12, rtol=0)
    cut = factors.inflora(few @ few.mT + torch.eye(D), inputs(9) @ inputs(9).mT, D_OUT, rank=3, share=1.0).A  # P would be I
    assert same_space(cut.mT, torch.linalg.svd(inputs(9)).U[:, -3:])
    last = factors.inflora(inputs(7) @ inputs(7).mT, x_k @ x_k.mT, D_OUT, rank=D - 6, share=1.0).A  # all that is left
    assert same_space(torch.cat([last.mT, space(x_k, 1.0)], 1), torch.eye(D, dtype=torch.float64))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"rank": 0}, "rank"),
    ({"rank": D + 1}, "rank"),
    ({"share": 1.5}, "share must be"),
    ({"share": float("nan")}, "share must be"),
    ({"c_keep": torch.eye(7)}, "two second moments of one layer"),
    ({"c_keep": torch.zeros(D, D)}, "the second moment of the earlier inputs is zero"),
    ({"c_task": torch.zeros(D, D)}, "the second moment of the task's inputs is zero"),
    ({"c_task": torch.full((D, D), float("inf"))}, "holds NaN or Inf"),
]


@pytest.mark.parametrize(("options", "match"), BAD)
def test_bad_input_is_refused(options: dict[str, Any], match: str) -> None:
    given = {"c_task": torch.eye(D), "c_keep": torch.eye(D), "d_out": D_OUT, "rank": 2, **options}
    with pytest.raises(ValueError, match=match):
        factors.inflora(**given)


def test_a_task_within_the_earlier_inputs_is_refused() -> None:
    x_k = inputs(8, rank=5)
    with pytest.raises(ValueError, match="no direction that is left"):
        factors.inflora(x_k @ x_k.mT, x_k @ x_k.mT, D_OUT, rank=2, share=1.0)


def test_overlap() -> None:
    """The sum that `src/uie_trainer_lora.py` adds to the loss, and its gradient."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(3, D, generator=generator, dtype=torch.float64, requires_grad=True)
    earlier = [torch.randn(r, D, generator=generator, dtype=torch.float64) for r in (2, 4)]
    found = factors.overlap(a, torch.cat(earlier))
    theirs = sum(torch.abs(torch.mm(each, a.T)).sum() for each in earlier)
    torch.testing.assert_close(found, theirs)
    ours, wanted = (torch.autograd.grad(value, a)[0] for value in (found, theirs))
    torch.testing.assert_close(ours, wanted)
    basis = torch.linalg.qr(torch.randn(D, 7, generator=generator, dtype=torch.float64)).Q.mT
    assert float(factors.overlap(basis[:3], basis[3:])) < 1e-12
    with pytest.raises(ValueError, match="different widths"):
        factors.overlap(a, torch.eye(7))
