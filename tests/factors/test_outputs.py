"""Starts from directions of the output, against what defines them: SVDs and inverses by NumPy, explicit outputs, the optimum."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from factored import assert_close, heard, moment, separated

from nullspace import factors
from nullspace.factors import lora_null
from reference import leak, optimal_leak

# ------------------------------------------------------------------------------------------------ pissa and milora

# (d_out, d_in, r): square, wide, tall, one direction, all but one, and all of them.
WEIGHTS = [(40, 40, 6), (24, 60, 6), (60, 24, 6), (24, 60, 1), (60, 24, 23), (12, 30, 12), (30, 12, 12), (1, 5, 1), (5, 1, 1)]
weights = pytest.mark.parametrize(("d_out", "d_in", "r"), WEIGHTS)


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


# ------------------------------------------------------------------------------------------------ what they refuse

WEIGHT, C = torch.ones(4, 6), torch.eye(6)


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
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=range(len(REFUSED)))
def test_what_makes_no_sense_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
