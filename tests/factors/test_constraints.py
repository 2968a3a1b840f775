"""Leading directions of inputs and outputs: what a change that is kept out of them leaves as it is; CLoRA's penalty."""

from __future__ import annotations

import pytest
import torch

from nullspace.factors import LowRank, clora, leading_inputs, leading_outputs, leading_singular

SHAPES = [(9, 6), (6, 9), (7, 7)]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs_of(kind: str, d: int) -> torch.Tensor:
    """X (d, tokens)."""
    x = random(d, 40, seed=1) * torch.logspace(0, -3, d, dtype=torch.float64)[:, None]
    if kind == "rank-deficient":
        return x[:, :2].contiguous()
    if kind == "repeated":
        return torch.linalg.qr(random(d, d, seed=2)).Q
    return x


def outside(change: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return change - u @ (u.mT @ change) - (change - u @ (u.mT @ change)) @ v @ v.mT


@pytest.mark.parametrize("kind", ["of data", "rank-deficient", "repeated"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_change_outside_is_zero_on_the_leading_inputs_and_writes_no_leading_output(shape: tuple[int, int], kind: str) -> None:
    weight, x = random(*shape), inputs_of(kind, shape[1])
    c = x @ x.mT
    for k in (1, 3, min(shape)):
        v, u = leading_inputs(c, k=k), leading_outputs(weight, c, k=k)
        for each, moment in ((v, c), (u, weight @ c @ weight.mT)):
            basis = each.basis
            assert basis.shape == (len(moment), k)
            torch.testing.assert_close(basis.mT @ basis, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-12)
            values = torch.linalg.eigvalsh(moment)
            torch.testing.assert_close(torch.trace(basis.mT @ moment @ basis), values[-k:].sum(), rtol=1e-10, atol=0)
            left = float(values[:-k].clamp(min=0).sum() / values.sum()) if k < len(values) else 0.0
            assert each.leak == pytest.approx(left**0.5, abs=1e-7)
        change = outside(random(*shape, seed=3), u.basis, v.basis)
        along = v.basis @ v.basis.mT @ x
        assert float((change @ along).norm()) <= 1e-12 * float(x.norm())
        assert float((u.basis.mT @ change).norm()) <= 1e-12


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["any", "repeated", "rank-deficient"])
def test_the_leading_singular_triples_are_kept(shape: tuple[int, int], kind: str) -> None:
    """Also where singular values coincide at the edge, and where they are zero: U and V belong together."""
    u, s, vh = torch.linalg.svd(random(*shape), full_matrices=False)
    if kind == "repeated":
        s = torch.ones_like(s)
    elif kind == "rank-deficient":
        s[2:] = 0
    weight = (u * s) @ vh
    k = 4
    right, left = (each.basis for each in leading_singular(weight, k=k))
    for basis in (left, right):
        torch.testing.assert_close(basis.mT @ basis, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-10)
    after = weight + outside(random(*shape, seed=3), left, right)
    triple = left.mT @ weight @ right
    torch.testing.assert_close(torch.linalg.svdvals(triple), s.sort(descending=True).values[:k], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(after @ right, left @ triple, rtol=0, atol=1e-10)
    torch.testing.assert_close(left.mT @ after, triple @ right.mT, rtol=0, atol=1e-10)


def test_white_inputs_have_the_spaces_of_the_weight() -> None:
    weight, white = random(9, 6), torch.eye(6, dtype=torch.float64)
    of_weight, of_outputs = leading_singular(weight, k=3)[1], leading_outputs(weight, white, k=3)
    torch.testing.assert_close(of_weight.basis @ of_weight.basis.mT, of_outputs.basis @ of_outputs.basis.mT)
    assert of_weight.leak == pytest.approx(of_outputs.leak, rel=1e-10)


def test_what_has_no_leading_directions_is_refused() -> None:
    weight, c = random(9, 6), torch.eye(6, dtype=torch.float64)
    for call, text in (
        (lambda: leading_inputs(torch.zeros(6, 6), k=2), "second moment of the inputs is zero"),
        (lambda: leading_outputs(weight, torch.zeros(6, 6), k=2), "second moment of the inputs is zero"),
        (lambda: leading_inputs(c * float("nan"), k=2), "NaN or Inf"),
        (lambda: leading_inputs(c, k=7), "k must be between 1 and 6, not 7"),
        (lambda: leading_outputs(weight, c, k=10), "k must be between 1 and 6, not 10"),
        (lambda: leading_singular(weight, k=7), "k must be between 1 and 6, not 7"),
        (lambda: leading_outputs(weight, torch.eye(9), k=2), r"a weight \(9, 6\) needs a second moment"),
        (lambda: leading_singular(weight[0], k=1), r"a weight \(d_out, d_in\) is needed, not \(6,\)"),
    ):
        with pytest.raises(ValueError, match=text):
            call()
    with pytest.raises(TypeError, match="k must be an integer"):
        leading_inputs(c, k=2.0)  # type: ignore[arg-type]
    nothing = leading_outputs(torch.zeros(9, 6), c, k=2)
    assert nothing.leak == 0.0
    assert leading_singular(torch.zeros(9, 6), k=2)[0].leak == 0.0


def test_clora_is_the_sum_of_squared_projections() -> None:
    a, b, p, q = random(3, 6), random(9, 3, seed=1), random(6, 2, seed=2), random(9, 2, seed=3)
    expected = sum(float((row @ p).square().sum()) for row in a) + sum(float((column @ q).square().sum()) for column in b.mT)
    assert float(clora(LowRank(a, b), p, q)) == pytest.approx(expected, rel=1e-12)
