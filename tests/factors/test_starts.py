"""Adapter factors against what defines them: full SVDs and inverses by NumPy, explicit outputs, and the optimum if there is one."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from nullspace import Covariance, factors
from nullspace.factors import b_zero, lora_null
from reference import leak, optimal_leak

EXACT = 1e-10

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


def assert_close(actual: torch.Tensor | np.ndarray, expected: torch.Tensor | np.ndarray, *, size: float | None = None) -> None:
    """Relative to the norm of what is expected."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    assert np.linalg.norm(actual - expected) <= EXACT * (np.linalg.norm(expected) if size is None else size)


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


# ------------------------------------------------------------------------------------------------ pissa and milora

# (d_out, d_in, r): square, wide, tall, one direction, all but one, and all of them.
WEIGHTS = [(40, 40, 6), (24, 60, 6), (60, 24, 6), (24, 60, 1), (60, 24, 23), (12, 30, 12), (30, 12, 12), (1, 5, 1), (5, 1, 1)]
weights = pytest.mark.parametrize(("d_out", "d_in", "r"), WEIGHTS)


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


def triples(m: torch.Tensor, r: int, end: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first or last r of the min(n, d) singular triples: U (n, r), Σ (r,), Vᵀ (r, d)."""
    u, sigma, vt = np.linalg.svd(m.double().numpy(), full_matrices=False)
    part = slice(0, r) if end == "top" else slice(len(sigma) - r, None)
    return u[:, part], sigma[part], vt[part]


def aligned(b: torch.Tensor, left: np.ndarray) -> np.ndarray:
    """The signs, free but common to both, that turn the columns of `left` to those of B."""
    return np.sign((b.numpy() * left).sum(0))


def tail(sigma: np.ndarray, r: int, end: str) -> float:
    """The norm of what is left when r singular values are taken away (`top`), or of these r (`bottom`)."""
    return float(np.linalg.norm(sigma[r:] if end == "top" else sigma[len(sigma) - r :]))


SINGULAR = pytest.mark.parametrize(("start", "end"), [(factors.pissa, "top"), (factors.milora, "bottom")], ids=["pissa", "milora"])


@weights
@SINGULAR
def test_pissa_and_milora_are_singular_triples_of_the_weight(start: Callable, end: str, d_out: int, d_in: int, r: int) -> None:
    weight = separated(d_out, d_in)
    a, b = start(weight, rank=r)
    assert (a.shape, b.shape, a.dtype, b.dtype) == ((r, d_in), (d_out, r), torch.float64, torch.float64)
    left, sigma, right = triples(weight, r, end)
    sign, root = aligned(b, left), np.sqrt(sigma)
    assert_close(b @ a, (left * sigma) @ right, size=1.0)  # of the weight, whose norm is some 1
    # Neighbours are a quarter or more apart: 1e-16 of the loudest is some 1e-12 of the quietest, and √ of that in a factor.
    np.testing.assert_allclose(b.numpy(), left * root * sign, rtol=0, atol=1e-9)
    np.testing.assert_allclose(a.numpy(), (right.T * root * sign).T, rtol=0, atol=1e-9)


@weights
@SINGULAR
def test_pissa_and_milora_share_the_singular_values_evenly(start: Callable, end: str, d_out: int, d_in: int, r: int) -> None:
    weight = separated(d_out, d_in)
    a, b = start(weight, rank=r)
    sigma = np.diag(triples(weight, r, end)[1])
    assert_close(b.T @ b, sigma)
    np.testing.assert_allclose((a @ a.T).numpy(), sigma, rtol=0, atol=1e-10 * sigma.max())
    assert (a.gather(1, a.abs().argmax(1, keepdim=True)) > 0).all()


@pytest.mark.parametrize(("d_out", "d_in", "r"), [shape for shape in WEIGHTS if shape[2] < min(shape[:2])])
@pytest.mark.parametrize("condition", [1.5, 1e3, 1e10])
def test_one_of_them_is_the_best_part_and_the_other_leaves_it(d_out: int, d_in: int, r: int, condition: float) -> None:
    """Eckart and Young: the error is the norm of the singular values that are missing; every other part of that rank has more."""
    weight = separated(d_out, d_in, condition)
    sigma = np.linalg.svd(weight.numpy(), compute_uv=False)
    principal, minor = factors.pissa(weight, rank=r), factors.milora(weight, rank=r)
    error = float((weight - principal.B @ principal.A).norm())
    assert error == pytest.approx(tail(sigma, r, "top"), rel=1e-9, abs=1e-13)
    residual = weight - minor.B @ minor.A  # arXiv 2503.02659, eq. 4
    assert float((weight - residual).norm()) == pytest.approx(tail(sigma, r, "bottom"), rel=1e-9, abs=1e-13)
    assert np.linalg.svd(residual.numpy(), compute_uv=False)[len(sigma) - r :].max() <= 1e-13
    generator = torch.Generator().manual_seed(3)
    for spread in (1e-1, 1e-2, 1.0):
        q = torch.linalg.qr(principal.B / principal.B.norm(dim=0) + spread * torch.randn(d_out, r, generator=generator)).Q
        assert float((weight - q @ (q.T @ weight)).norm()) >= error * (1 - 1e-12)


@SINGULAR
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_weights_have_their_triples_taken_in_float64(start: Callable, end: str, dtype: torch.dtype) -> None:
    weight = separated(24, 60).to(dtype)
    for narrow, wide in zip(start(weight, rank=5), start(weight.double(), rank=5), strict=True):
        assert torch.equal(narrow, wide)


@SINGULAR
def test_a_weight_without_rank_has_factors_all_the_same(start: Callable, end: str) -> None:
    weight = separated(24, 60)
    weight[4:20] = 0
    left, sigma, right = triples(weight, 12, end)
    a, b = start(weight, rank=12)
    assert torch.isfinite(a).all()
    assert torch.isfinite(b).all()
    np.testing.assert_allclose((b @ a).numpy(), (left * sigma) @ right, rtol=0, atol=1e-12)
    a, b = start(torch.zeros(5, 7), rank=3)
    assert torch.equal(a, torch.zeros(3, 7, dtype=torch.float64))
    assert torch.equal(b, torch.zeros(5, 3, dtype=torch.float64))


# ------------------------------------------------------------------------------------------------ corda

MODES = {"kpm": "bottom", "ipm": "top"}
modes = pytest.mark.parametrize("mode", MODES)
cases = pytest.mark.parametrize(("d_out", "d_in", "r"), [(40, 40, 6), (24, 60, 6), (60, 24, 6), (24, 60, 1), (30, 12, 12)])


def moment(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x


def error_on(weight: torch.Tensor, residual: torch.Tensor, x: torch.Tensor) -> float:
    """‖(W − W′) X‖_F, token by token."""
    return float(((weight - residual) @ x.T).norm())


@cases
@modes
def test_corda_is_the_svd_of_w_c_with_the_inverse_taken_literally(d_out: int, d_in: int, r: int, mode: str) -> None:
    weight, c = separated(d_out, d_in, 30.0), moment(heard(d_in, quietest=0.1))
    damped = c / c.diagonal().mean() + 0.01 * torch.eye(d_in, dtype=torch.float64)  # arXiv 2406.05223, eq. 2–5
    left, sigma, right = triples(weight @ damped, r, MODES[mode])
    right = right @ np.linalg.inv(damped.numpy())
    a, b = factors.corda(weight, c, rank=r, mode=mode)
    sign, root = aligned(b, left), np.sqrt(sigma)
    np.testing.assert_allclose((b @ a).numpy(), (left * sigma) @ right, rtol=0, atol=1e-9)
    np.testing.assert_allclose(b.numpy(), left * root * sign, rtol=0, atol=1e-9 * root.max())
    np.testing.assert_allclose(a.numpy(), (right.T * root * sign).T, rtol=0, atol=1e-9 * float(a.abs().max()))
    assert (a.gather(1, a.abs().argmax(1, keepdim=True)) > 0).all()


@cases
@modes
@pytest.mark.parametrize("start", [factors.corda, factors.corda_exact])
def test_the_scale_of_the_second_moment_does_not_matter(d_out: int, d_in: int, r: int, mode: str, start: Callable) -> None:
    weight, c = separated(d_out, d_in, 30.0), moment(heard(d_in))
    plain = start(weight, c, rank=r, mode=mode)
    for scale in (1e-12, 3.0, 1e9):
        for one, other in zip(start(weight, scale * c, rank=r, mode=mode), plain, strict=True):
            assert float((one - other).norm()) <= 1e-8 * float(other.norm())


@pytest.mark.parametrize(("d_out", "d_in"), [(40, 40), (24, 60), (60, 24)])
@modes
@pytest.mark.parametrize("start", [functools.partial(factors.corda, damping=0.0), factors.corda_exact])
@pytest.mark.parametrize("tokens", [1, 10, 22])
def test_a_singular_second_moment_needs_no_damping(d_out: int, d_in: int, mode: str, start: Callable, tokens: int) -> None:
    weight, x = separated(d_out, d_in, 30.0), heard(d_in, tokens=tokens)
    a, b = start(weight, moment(x), rank=6, mode=mode)
    left = torch.linalg.qr(b).Q
    # Still the part of W in r directions of its output, and neither factor dwarfs the other.
    assert_close(b @ a, left @ left.T @ weight)
    if mode == "kpm":
        size = float(a.norm() / b.norm())
        assert 1e-3 < size < 1e3
        heard_by = (weight @ x.T).norm()
        if tokens <= min(d_out, d_in) - 6:  # W X has no more than so many directions: the last 6 are silent
            assert float((b @ a @ x.T).norm()) <= 1e-6 * float(heard_by)


@cases
@modes
def test_corda_exact_is_the_optimum_over_all_matrices_of_its_rank(d_out: int, d_in: int, r: int, mode: str) -> None:
    weight, x = separated(d_out, d_in, 10.0), heard(d_in)
    r = min(r, min(d_out, d_in) - 1)
    sigma = np.linalg.svd((weight @ x.T).numpy(), compute_uv=False)[: min(d_out, d_in)]
    a, b = factors.corda_exact(weight, moment(x), rank=r, mode=mode)
    kept = weight - b @ a if mode == "kpm" else b @ a  # the part that stands for W: of rank min − r, or of rank r
    least = tail(sigma, r, MODES[mode])
    assert error_on(weight, kept, x) == pytest.approx(least, rel=1e-9)  # arXiv 2503.02659, eq. 5
    singular = np.linalg.svd(kept.numpy(), compute_uv=False)
    rank = len(singular) - r if mode == "kpm" else r
    assert singular[rank:].max() <= 1e-12 * singular[0]
    generator = torch.Generator().manual_seed(4)
    u, _, vt = torch.linalg.svd(kept, full_matrices=False)
    for spread in (1e-3, 1e-2, 1.0):  # neighbours of it and strangers, of the same rank, each in its own best scale
        right = vt[:rank] + spread * torch.randn(rank, d_in, generator=generator) / d_in**0.5
        rows = x @ right.T
        other = torch.linalg.lstsq(rows, x @ weight.T).solution.T @ right  # the best W′ of this row space
        assert error_on(weight, other, x) >= least * (1 - 1e-12)
        left = torch.linalg.qr(u[:, :rank] + spread * torch.randn(d_out, rank, generator=generator) / d_out**0.5).Q
        assert error_on(weight, left @ (left.T @ weight), x) >= least * (1 - 1e-12)  # and of this column space
    assert float(((b @ a) - factors.corda(weight, moment(x), rank=r, mode=mode).B @ a).norm()) > 0


def test_the_factors_of_corda_exact_are_of_equal_norm() -> None:
    weight, c = separated(24, 60), moment(heard(60))
    for mode in MODES:
        a, b = factors.corda_exact(weight, c, rank=6, mode=mode)
        torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0), rtol=1e-12, atol=0)
        assert_close(b.T @ b, (b.T @ b).diag().diag())


@modes
@pytest.mark.parametrize(("d_out", "d_in"), [(40, 40), (24, 60), (60, 24)])
def test_cordas_own_start_is_not_the_optimum_it_sets_out_from(d_out: int, d_in: int, mode: str) -> None:
    weight, x = separated(d_out, d_in, 10.0), heard(d_in)
    c = moment(x)

    def error(start: Callable, **options: Any) -> tuple[float, float]:
        a, b = start(weight, c, rank=6, mode=mode, **options)
        kept = weight - b @ a if mode == "kpm" else b @ a
        return error_on(weight, kept, x), float(((weight - kept) @ c).norm())

    exact, literal_, damped = error(factors.corda_exact), error(factors.corda, damping=0.0), error(factors.corda)
    assert exact[0] < 0.999 * literal_[0]
    assert exact[0] < 0.999 * damped[0]
    # It is the optimum of ‖(W − W′) C‖.
    sigma = np.linalg.svd((weight @ c).numpy(), compute_uv=False)[: min(d_out, d_in)]
    assert literal_[1] == pytest.approx(tail(sigma, 6, MODES[mode]), rel=1e-9)
    assert exact[1] > 1.001 * literal_[1]


def test_lora_null_is_another_start_than_both() -> None:
    """Its A is deaf to X whatever W is, at the price of a residual that is further from W on X than it would have to be."""
    weight, x = separated(40, 40, 10.0), heard(40)
    c = moment(x)
    basis = torch.linalg.svd(x).Vh[-6:].T
    products = {}
    for name, (a, b) in {
        "lora_null": lora_null(weight, basis),
        "corda": factors.corda(weight, c, rank=6),
        "corda_exact": factors.corda_exact(weight, c, rank=6),
    }.items():
        products[name] = b @ a, error_on(weight, weight - b @ a, x), leak(torch.linalg.qr(a.T).Q, x)
    for one, other in itertools.combinations(products, 2):
        assert float((products[one][0] - products[other][0]).norm()) > 0.1 * float(products["lora_null"][0].norm())
    assert products["corda_exact"][1] < 0.95 * min(products["lora_null"][1], products["corda"][1])
    assert products["lora_null"][2] == pytest.approx(optimal_leak(x, 6), rel=1e-9)
    assert products["lora_null"][2] < 0.95 * min(products["corda_exact"][2], products["corda"][2])


# ------------------------------------------------------------------------------------------------ sc_lora


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize(("d_out", "d_in"), [(40, 40), (24, 60), (60, 24)])
def test_sc_lora_is_what_the_outputs_themselves_say(d_out: int, d_in: int, beta: float) -> None:
    weight, plus, minus = separated(d_out, d_in, 10.0), heard(d_in, tokens=300), 2 * heard(d_in, tokens=500, seed=1)
    y_plus, y_minus = ((x @ weight.T).numpy() for x in (plus, minus))
    difference = (1 - beta) * y_plus.T @ y_plus / 300 - beta * y_minus.T @ y_minus / 500
    values, vectors = np.linalg.eigh(difference)
    a, b = factors.sc_lora(weight, moment(plus) / 300, moment(minus) / 500, rank=4, beta=beta)
    assert_close(b.T @ b, np.eye(4))
    assert_close(a, b.T @ weight)
    # Eigenvectors, of the four largest values, in this order: so far as the gaps between these go.
    size = np.abs(values).max()
    np.testing.assert_allclose(difference @ b.numpy(), b.numpy() * values[::-1][:4], rtol=0, atol=1e-12 * size)
    quotients = np.einsum("ir,ij,jr->r", b.numpy(), difference, b.numpy())
    np.testing.assert_allclose(quotients, values[::-1][:4], rtol=0, atol=1e-12 * size)
    gap = values[-4] - values[-5]
    projection = vectors[:, -4:] @ vectors[:, -4:].T
    np.testing.assert_allclose((b @ b.T).numpy(), projection, rtol=0, atol=1e-13 * size / gap)
    assert (b.gather(0, b.abs().argmax(0, keepdim=True)) > 0).all()


def test_the_ends_of_beta_hear_one_corpus_alone() -> None:
    weight, plus, minus = separated(24, 60, 10.0), moment(heard(60)), moment(heard(60, seed=1))
    alone = torch.linalg.svd(weight @ torch.linalg.cholesky(plus)).U[:, :4]
    b = factors.sc_lora(weight, plus, minus, rank=4, beta=0.0).B
    assert_close(b @ b.T, alone @ alone.T)
    deaf = torch.linalg.svd(weight @ torch.linalg.cholesky(minus)).U[:, -4:]
    b = factors.sc_lora(weight, plus, minus, rank=4, beta=1.0).B
    np.testing.assert_allclose((b @ b.T).numpy(), (deaf @ deaf.T).numpy(), rtol=0, atol=1e-8)


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


# ------------------------------------------------------------------------------------------------ orthogonal


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


# ------------------------------------------------------------------------------------------------ what they refuse

WEIGHT, C, MEAN = torch.ones(4, 6), torch.eye(6), torch.zeros(6)


def _with(c: torch.Tensor, value: float, at: tuple[int, int]) -> torch.Tensor:
    c = c.clone()
    c[at] = value
    return c


OF_WEIGHT = (factors.pissa, factors.milora)
OF_MOMENT = (factors.corda, factors.corda_exact)
OF_ANY_MOMENT = (*OF_MOMENT, lambda weight, c, rank: factors.sc_lora(weight, C, c, rank=rank))
NAN, INF = float("nan"), float("inf")

REFUSED: list[tuple[Callable[[], Any], str]] = [
    *((lambda r=r, f=f: f(WEIGHT, rank=r), "rank must be between 1 and 4") for r in (0, -1, 5) for f in OF_WEIGHT),
    *((lambda r=r, f=f: f(WEIGHT, C, rank=r), "rank must be between 1 and 4") for r in (0, -1, 5) for f in OF_ANY_MOMENT),
    *((lambda r=r: factors.eva(C, MEAN, 9, 4, rank=r), "rank must be between 1 and 4") for r in (0, 5)),
    (lambda: factors.eva(C, MEAN, 9, 40, rank=7), "rank must be between 1 and 6"),
    *((lambda r=r: factors.orthogonal(6, 4, rank=r), f"must be even, not {r}") for r in (3, 1, 0, -2)),
    *((lambda f=f: f(WEIGHT, C, rank=1, mode="kpn"), "mode must be one of 'kpm', 'ipm'") for f in OF_MOMENT),
    *((lambda d=d: factors.corda(WEIGHT, C, rank=1, damping=d), "damping must be") for d in (-0.1, NAN, INF)),
    *((lambda b=b: factors.sc_lora(WEIGHT, C, C, rank=1, beta=b), "beta must be between") for b in (-0.1, 1.1, NAN)),
    *(
        (lambda f=f, c=c: f(WEIGHT, c, rank=1), r"needs a second moment \(d_in, d_in\), not")
        for f in OF_ANY_MOMENT
        for c in (torch.eye(4), torch.ones(6), torch.ones(6, 4))
    ),
    *((lambda f=f: f(torch.ones(6), C, rank=1), "needs a second moment") for f in OF_ANY_MOMENT),
    *(
        (lambda f=f, v=v, at=at: f(WEIGHT, _with(C, v, at), rank=1), "NaN or Inf")
        for f in OF_ANY_MOMENT
        for v in (NAN, INF)
        for at in ((1, 1), (1, 2))
    ),
    *((lambda f=f, v=v: f(_with(WEIGHT, v, (1, 2)), C, rank=1), "NaN or Inf") for f in OF_ANY_MOMENT for v in (NAN, INF)),
    *((lambda f=f, v=v: f(_with(WEIGHT, v, (1, 2)), rank=1), "NaN or Inf") for f in OF_WEIGHT for v in (NAN, INF)),
    *((lambda f=f: f(WEIGHT, 0 * C, rank=1), "inputs are all zero") for f in OF_MOMENT),
    *((lambda f=f: f(WEIGHT, -C, rank=1), r"negative trace \(-1\.0\)") for f in OF_MOMENT),
    (lambda: factors.eva(C, torch.zeros(5), 9, 4, rank=1), r"not \(6, 6\) and \(5,\)"),
    (lambda: factors.eva(torch.ones(6, 4), torch.zeros(4), 9, 4, rank=1), r"not \(6, 4\) and \(4,\)"),
    (lambda: factors.eva(C, torch.full((6,), NAN), 9, 4, rank=1), "NaN or Inf"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=range(len(REFUSED)))
def test_what_makes_no_sense_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
