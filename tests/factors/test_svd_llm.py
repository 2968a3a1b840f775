"""SVD-LLM: the best matrix of a rank on the inputs themselves, whose singular values are the losses; and the paper's formula."""

from __future__ import annotations

import pytest
import torch

from nullspace.factors import LowRank, corda_exact, svd_llm, truncated

SHAPES = [(24, 24), (12, 30), (30, 12), (1, 7), (7, 1)]
KINDS = ["full", "massive", "few tokens", "repeated", "steep"]
shapes = pytest.mark.parametrize(("d_out", "d_in"), SHAPES)


def made(d_out: int, d_in: int, kind: str = "full") -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and inputs with tokens in rows."""
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(d_out, d_in, generator=generator, dtype=torch.float64)
    x = torch.randn(5 * d_in, d_in, generator=generator, dtype=torch.float64) + 0.3
    if kind == "massive":
        x[0, 0] = 1e4
    if kind == "few tokens":
        x = x[: max(1, d_in // 3)]
    if kind == "repeated":  # C = 9 · 1, and a weight whose singular values come in pairs
        x = 3 * torch.eye(d_in, dtype=torch.float64)
        u, _, vt = torch.linalg.svd(weight, full_matrices=False)
        weight = u * (torch.arange(len(vt)) // 2 + 1.0) @ vt
    if kind == "steep":
        x = x * torch.logspace(0, -4, d_in, dtype=torch.float64)
    return weight, x


def by_cholesky(weight: torch.Tensor, c: torch.Tensor, rank: int) -> torch.Tensor:
    """W′ as the paper has it: SVD(W S) with the Cholesky factor S of C, and S⁻¹ taken literally."""
    lower = torch.linalg.cholesky(c)
    u, sigma, vt = torch.linalg.svd(weight @ lower, full_matrices=False)
    return torch.linalg.solve_triangular(lower, u[:, :rank] * sigma[:rank] @ vt[:rank], upper=False, left=False)


@shapes
@pytest.mark.parametrize("kind", KINDS)
def test_the_error_on_the_inputs_is_the_optimum_and_each_singular_value_is_a_loss(d_out: int, d_in: int, kind: str) -> None:
    weight, x = made(d_out, d_in, kind)
    c, size = x.T @ x, float((weight @ x.T).norm())
    exact = torch.zeros(min(d_out, d_in), dtype=torch.float64)
    of_outputs = torch.linalg.svdvals(weight @ x.T)[: len(exact)]  # nothing is squared
    exact[: len(of_outputs)] = of_outputs
    for rank in {1, (len(exact) + 1) // 2, len(exact)}:
        a, b = svd_llm(weight, c, rank=rank)
        assert (a.shape, b.shape, a.dtype) == ((rank, d_in), (d_out, rank), torch.float64)
        assert float(((weight - b @ a) @ x.T).norm()) == pytest.approx(float(exact[rank:].norm()), abs=2e-7 * size)
        same = corda_exact(weight, c, rank=rank, mode="ipm")
        assert float((b @ a - same.B @ same.A).norm()) <= 1e-9 * float(weight.norm())
        losses = torch.stack([torch.outer(column, row) @ x.T for column, row in zip(b.mT, a, strict=True)]).flatten(1).norm(dim=1)
        assert torch.allclose(losses, exact[:rank], rtol=1e-6, atol=2e-7 * size)
        known = exact[:rank] > 1e-6 * size
        assert torch.allclose(b.square().sum(0)[known], losses[known], rtol=1e-6)
        assert bool((a.gather(1, a.abs().argmax(1, keepdim=True)) >= 0).all())


@shapes
@pytest.mark.parametrize("kind", ["full", "massive", "repeated", "steep"])
def test_the_product_is_that_of_the_paper_where_cholesky_succeeds(d_out: int, d_in: int, kind: str) -> None:
    weight, x = made(d_out, d_in, kind)
    most = min(d_out, d_in)
    for rank in {min(2, most), most} if kind == "repeated" else range(1, most + 1):  # between equal values any vectors will do
        wanted, (a, b) = by_cholesky(weight, x.T @ x, rank), svd_llm(weight, x.T @ x, rank=rank)
        assert float((b @ a - wanted).norm()) <= 1e-5 * float(wanted.norm())


def test_it_is_a_cut_of_the_weight_itself_and_knows_no_scale_and_no_signs() -> None:
    weight, x = made(12, 30)
    c = x.T @ x
    a, b = svd_llm(weight, c, rank=4)
    cut = truncated(LowRank(weight, torch.eye(12, dtype=torch.float64)), c, rank=4)
    assert torch.allclose(b @ a, cut.B @ cut.A, atol=1e-9)
    scaled = svd_llm(weight, 16 * c, rank=4)
    assert torch.allclose(scaled.B, 2 * b, rtol=1e-9)  # σ grows by 4, the root of the scale
    assert torch.allclose(scaled.A, a / 2, rtol=1e-9)
    assert torch.allclose(svd_llm(weight.float(), c, rank=4).A, svd_llm(weight.float().double(), c, rank=4).A)


def test_a_weight_that_its_inputs_do_not_reach_stays_finite() -> None:
    weight = torch.zeros(4, 6)
    weight[:, 5] = 1.0
    c = torch.diag(torch.tensor([1.0, 1, 1, 1, 1, 0]))
    a, b = svd_llm(weight, c, rank=2)  # W X = 0
    assert bool(a.isfinite().all() and b.isfinite().all())
    zero = svd_llm(torch.zeros(4, 6), c, rank=2)
    assert not (zero.B @ zero.A).any()


@pytest.mark.parametrize(
    ("c", "rank", "words"),
    [
        (torch.eye(6), 0, "rank"),
        (torch.eye(6), 5, "rank"),
        (torch.eye(5), 1, "second moment"),
        (torch.zeros(6, 6), 1, "all zero"),
        (torch.full((6, 6), float("nan")), 1, "NaN"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(c: torch.Tensor, rank: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        svd_llm(torch.ones(4, 6), c, rank=rank)
