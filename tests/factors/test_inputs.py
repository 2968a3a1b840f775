"""Starts from directions of the input, against what defines them: whole SVDs by NumPy, and centred activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from factored import assert_close, heard, moment

from nullspace import Covariance, factors
from nullspace.factors import b_zero, lora_null

# (d_out, d_in, k, r): the smallest, square, wide, tall, the whole space, r < k, and bases of more columns than W has rows.
SHAPES = [
    (1, 1, 1, 1),
    (1, 3, 1, 1),
    (3, 1, 1, 1),
    (3, 2, 1, 1),
    (40, 40, 8, 8),
    (24, 60, 8, 8),
    (60, 24, 8, 8),
    (12, 12, 12, 12),
    (40, 40, 8, 3),
    (24, 60, 8, 1),
    (60, 24, 24, 23),
    (4, 60, 8, 4),
    (4, 60, 8, 3),
    (1, 60, 8, 1),
]
shapes = pytest.mark.parametrize(("d_out", "d_in", "k", "r"), SHAPES)


def weight_and_basis(d_out: int, d_in: int, k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(d_out, d_in, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(d_in, k, generator=generator, dtype=torch.float64)).Q
    return weight, basis


def literal(weight: torch.Tensor, basis: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """U′, Σ′, V′ᵀ of the d_out × d_in product W U Uᵀ."""
    w, u = weight.double().numpy(), basis.double().numpy()
    return np.linalg.svd(w @ u @ u.T)


# ------------------------------------------------------------------------------------------------ lora_null


@shapes
def test_b_a_is_the_best_rank_r_part_of_the_projected_weight(d_out: int, d_in: int, k: int, r: int) -> None:
    weight, basis = weight_and_basis(d_out, d_in, k)
    a, b = lora_null(weight, basis, rank=r)
    assert (a.shape, b.shape) == ((r, d_in), (d_out, r))
    assert a.dtype == b.dtype == torch.float64
    left, sigma, right = literal(weight, basis)
    assert_close(b @ a, (left[:, :r] * sigma[:r]) @ right[:r])


@pytest.mark.parametrize(("d_out", "d_in", "k"), sorted({(d_out, d_in, k) for d_out, d_in, k, _ in SHAPES if k <= d_out}))
def test_by_default_b_a_is_the_whole_projected_weight(d_out: int, d_in: int, k: int) -> None:
    weight, basis = weight_and_basis(d_out, d_in, k)
    a, b = lora_null(weight, basis)
    assert a.shape[0] == k
    assert_close(b @ a, weight @ basis @ basis.T)
    assert_close((weight - b @ a) @ basis, torch.zeros(d_out, k), size=float(weight.norm()))  # the residual does not hear U


@shapes
def test_the_factors_are_those_of_equations_9_to_11(d_out: int, d_in: int, k: int, r: int) -> None:
    weight, basis = weight_and_basis(d_out, d_in, k)
    a, b = lora_null(weight, basis, rank=r)
    left, sigma, right = literal(weight, basis)
    root = np.sqrt(sigma[:r])
    # The signs of a singular pair are free, but the same in both.
    sign = np.sign((b.numpy() * left[:, :r]).sum(0))
    assert_close(b, left[:, :r] * root * sign)
    assert_close(a, (right[:r].T * root * sign).T)


@shapes
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_the_factors_share_the_singular_values_evenly(d_out: int, d_in: int, k: int, r: int, scale: float) -> None:
    weight, basis = weight_and_basis(d_out, d_in, k)
    a, b = lora_null(weight, basis, rank=r, sigma_scale=scale)
    sigma = scale * literal(weight, basis)[1][:r]
    for factor in (a, b):
        assert_close(np.linalg.svd(factor.numpy(), compute_uv=False), np.sqrt(sigma))
    assert_close(b.T @ b, np.diag(sigma))
    assert_close(a @ a.T, np.diag(sigma))


@shapes
def test_a_hears_nothing_outside_the_basis(d_out: int, d_in: int, k: int, r: int) -> None:
    weight, basis = weight_and_basis(d_out, d_in, k)
    a, _ = lora_null(weight, basis, rank=r)
    assert_close(a @ basis @ basis.T, a)
    outside = torch.eye(d_in, dtype=torch.float64) - basis @ basis.T
    assert_close(a @ outside, torch.zeros(r, d_in), size=float(a.norm()))


@shapes
def test_only_the_space_counts_and_not_its_basis(d_out: int, d_in: int, k: int, r: int) -> None:
    weight, basis = weight_and_basis(d_out, d_in, k)
    turn = torch.linalg.qr(torch.randn(k, k, generator=torch.Generator().manual_seed(7), dtype=torch.float64)).Q
    for factor, turned in zip(lora_null(weight, basis, rank=r), lora_null(weight, basis @ turn, rank=r), strict=True):
        assert_close(turned, factor)


@shapes
def test_the_largest_entry_of_every_row_of_a_is_positive(d_out: int, d_in: int, k: int, r: int) -> None:
    weight, basis = weight_and_basis(d_out, d_in, k)
    a, _ = lora_null(weight, basis, rank=r)
    assert (a.gather(1, a.abs().argmax(1, keepdim=True)) > 0).all()


@pytest.mark.parametrize("scale", [0.25, 2.0, 4.0])
def test_sigma_scale_scales_b_a_and_both_factors_alike(scale: float) -> None:
    weight, basis = weight_and_basis(24, 60, 8)
    plain, scaled = lora_null(weight, basis, rank=5), lora_null(weight, basis, rank=5, sigma_scale=scale)
    assert_close(scaled.B @ scaled.A, scale * plain.B @ plain.A)
    assert_close(scaled.A, scale**0.5 * plain.A)
    assert_close(scaled.B, scale**0.5 * plain.B)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("which", ["weight", "basis"])
def test_narrow_input_is_factored_in_float64(which: str, dtype: torch.dtype) -> None:
    weight, basis = weight_and_basis(24, 60, 8)
    weight, basis = (weight.to(dtype), basis) if which == "weight" else (weight, basis.to(dtype))
    for factor, wide in zip(lora_null(weight, basis), lora_null(weight.double(), basis.double()), strict=True):
        assert factor.dtype == torch.float64
        assert torch.equal(factor, wide)


@pytest.mark.parametrize(("d_out", "d_in", "k"), [(1, 1, 1), (24, 60, 8), (60, 24, 8)])
def test_a_zero_weight_gives_zero_factors(d_out: int, d_in: int, k: int) -> None:
    _, basis = weight_and_basis(d_out, d_in, k)
    a, b = lora_null(torch.zeros(d_out, d_in), basis)
    assert torch.equal(a, torch.zeros(k, d_in, dtype=torch.float64))
    assert torch.equal(b, torch.zeros(d_out, k, dtype=torch.float64))


def test_a_weight_that_is_deaf_to_most_of_the_basis() -> None:
    weight, basis = weight_and_basis(24, 60, 8)
    weight = weight - weight @ basis[:, 2:] @ basis[:, 2:].T
    a, b = lora_null(weight, basis)
    assert_close(b @ a, weight @ basis[:, :2] @ basis[:, :2].T)
    # √ of rounding: 1e-16 of σ₁ shows as 1e-8 in a factor.
    assert float(a[2:].norm()) <= 1e-7 * float(a.norm())


@pytest.mark.parametrize("column_major", [False, True])
def test_inputs_are_left_alone_and_equal_ones_give_equal_bits(column_major: bool) -> None:
    weight, basis = weight_and_basis(24, 60, 8)
    basis = basis.T.contiguous().T if column_major else basis.contiguous()
    copies = weight.clone(), basis.clone()
    first, second = lora_null(weight, basis), lora_null(weight, basis)
    assert torch.equal(first.A, second.A)
    assert torch.equal(first.B, second.B)
    first.A.zero_()
    first.B.zero_()
    assert torch.equal(weight, copies[0])
    assert torch.equal(basis, copies[1])


@pytest.mark.parametrize(
    ("weight", "basis"),
    [((4, 6), (5, 2)), ((4, 6), (2, 6)), ((6,), (6, 2)), ((4, 6), (6,)), ((2, 4, 6), (6, 2)), ((4, 6), (1, 6, 2))],
    ids=str,
)
def test_shapes_that_do_not_fit_are_refused(weight: tuple[int, ...], basis: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"a weight \(.*\) needs a basis \(d_in, k\), not \("):
        lora_null(torch.ones(weight), torch.ones(basis))


@pytest.mark.parametrize(
    ("d_out", "k", "rank", "limit"), [(9, 4, 0, 4), (9, 4, -1, 4), (9, 4, 5, 4), (3, 4, 4, 3), (3, 4, None, 3)]
)
def test_a_rank_out_of_range_is_refused(d_out: int, k: int, rank: int | None, limit: int) -> None:
    weight, basis = weight_and_basis(d_out, 9, k)
    message = rf"rank must be between 1 and {limit}, not {k if rank is None else rank} .*{k} columns.*{d_out} rows"
    with pytest.raises(ValueError, match=message):
        lora_null(weight, basis, rank=rank)
    with pytest.raises(ValueError, match=message):
        b_zero(basis, d_out, rank=rank)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_not_positive_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match="sigma_scale must be a positive number"):
        lora_null(*weight_and_basis(4, 6, 2), sigma_scale=scale)


# ------------------------------------------------------------------------------------------------ b_zero


@shapes
def test_b_zero_starts_at_nothing_in_the_quietest_directions(d_out: int, d_in: int, k: int, r: int) -> None:
    _, basis = weight_and_basis(d_out, d_in, k)
    a, b = b_zero(basis, d_out, rank=r)
    assert torch.equal(a, basis[:, :r].T)
    assert torch.equal(b, torch.zeros(d_out, r, dtype=torch.float64))


def test_b_zero_takes_the_whole_basis_by_default() -> None:
    _, basis = weight_and_basis(24, 60, 8)
    a, b = b_zero(basis, 24)
    assert torch.equal(a, basis.T)
    assert b.shape == (24, 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_b_zero_is_float64_whatever_the_basis(dtype: torch.dtype) -> None:
    basis = weight_and_basis(24, 60, 8)[1].to(dtype)
    a, b = b_zero(basis, 24)
    assert a.dtype == b.dtype == torch.float64
    assert torch.equal(a, basis.T.double())


@pytest.mark.parametrize("column_major", [False, True])
@pytest.mark.parametrize(("d_in", "k"), [(1, 1), (60, 1), (60, 8)])
def test_b_zero_does_not_share_memory_with_the_basis(d_in: int, k: int, column_major: bool) -> None:
    _, basis = weight_and_basis(24, d_in, k)
    basis = basis.T.contiguous().T if column_major else basis.contiguous()
    copy = basis.clone()
    a, _ = b_zero(basis, 24)
    assert a.is_contiguous()
    a.zero_()
    assert torch.equal(basis, copy)


# ------------------------------------------------------------------------------------------------ eva


@pytest.mark.parametrize(("d_in", "d_out", "r"), [(30, 40, 5), (30, 8, 8), (30, 40, 30), (1, 1, 1)])
def test_eva_is_the_svd_of_the_centred_activations(d_in: int, d_out: int, r: int) -> None:
    x = heard(d_in, tokens=100, quietest=0.1) + 5.0
    a, b = factors.eva(moment(x), x.mean(0), len(x), d_out, rank=r)
    right = np.linalg.svd((x - x.mean(0)).numpy(), full_matrices=False)[2][:r]
    np.testing.assert_allclose(a.numpy(), right * np.sign((a.numpy() * right).sum(1, keepdims=True)), rtol=0, atol=1e-9)
    assert (a.gather(1, a.abs().argmax(1, keepdim=True)) > 0).all()
    assert torch.equal(b, torch.zeros(d_out, r, dtype=torch.float64))
    # Uncentred, the mean would come first.
    if d_in > 1:
        assert abs(float(a[0] @ x.mean(0) / x.mean(0).norm())) < 0.9


def test_a_token_that_counts_twice_is_two_tokens_to_eva() -> None:
    x = heard(12, tokens=50)
    once, twice = Covariance(12, precision="fp64"), Covariance(12, precision="fp64")
    once.update(x[:20])
    once.scale(2.0)
    twice.update(torch.cat([x[:20], x[:20]]))
    for covariance in (once, twice):
        rest = Covariance(12, precision="fp64")
        rest.update(x[20:])
        covariance.merge(rest)
    assert (once.tokens, twice.tokens, once.mass, twice.mass) == (50, 70, 70.0, 70.0)
    expected = np.cov(torch.cat([x[:20], x]).numpy().T, bias=True) * 70
    for covariance in (once, twice):
        centred = factors.centred(covariance.matrix(), covariance.mean(), covariance.mass)
        np.testing.assert_allclose(centred.numpy(), expected, rtol=0, atol=1e-12 * np.linalg.norm(expected))


# ------------------------------------------------------------------------------------------------ what eva refuses

C, MEAN, NAN = torch.eye(6), torch.zeros(6), float("nan")

REFUSED: list[tuple[Callable[[], Any], str]] = [
    *((lambda r=r: factors.eva(C, MEAN, 9, 4, rank=r), "rank must be between 1 and 4") for r in (0, 5)),
    (lambda: factors.eva(C, MEAN, 9, 40, rank=7), "rank must be between 1 and 6"),
    (lambda: factors.eva(C, torch.zeros(5), 9, 4, rank=1), r"not \(6, 6\) and \(5,\)"),
    (lambda: factors.eva(torch.ones(6, 4), torch.zeros(4), 9, 4, rank=1), r"not \(6, 4\) and \(4,\)"),
    (lambda: factors.eva(C, torch.full((6,), NAN), 9, 4, rank=1), "NaN or Inf"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=range(len(REFUSED)))
def test_what_makes_no_sense_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
