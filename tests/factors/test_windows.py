"""Windows of the spectrum, and starts from them: SVDs by NumPy, the outputs on data, and the formulas of the authors' code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from nullspace import factors, solvers

EXACT = 1e-10
WINDOWS = (0.0, 0.3, 0.5, 1.0)
# (d_out, d_in, r): square, wide, tall, one direction, and all of them.
SHAPES = [(20, 20, 4), (12, 30, 4), (30, 12, 4), (12, 30, 1), (12, 30, 12), (30, 12, 12), (1, 5, 1), (5, 1, 1)]
shapes = pytest.mark.parametrize(("d_out", "d_in", "r"), SHAPES)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weight_of(kind: str, d_out: int, d_in: int) -> torch.Tensor:
    """`separated`: singular values fall geometrically; `deficient`: half of them are zero; `repeated`: all are one; `zero`."""
    s = min(d_out, d_in)
    steep, half = 1e3 ** -torch.linspace(0, 1, s, dtype=torch.float64), torch.arange(s) < (s + 1) // 2
    sigma = {"separated": steep, "deficient": steep * half, "repeated": steep * 0 + 1, "zero": steep * 0}[kind]
    u, v = (torch.linalg.qr(normal(d, s, seed=d)).Q for d in (d_out, d_in))
    return (u * sigma) @ v.T


KINDS = ("separated", "deficient", "repeated", "zero")


def inputs(kind: str, d_in: int) -> torch.Tensor:
    """(tokens, d_in): `many` in all directions, some steep, or `few` tokens."""
    x = normal(3 * d_in if kind == "many" else max(1, d_in // 3), d_in, seed=9) + 0.3
    return x * 1e-2 ** torch.linspace(0, 1, d_in, dtype=torch.float64)


def part(most: int, r: int, window: float) -> slice:
    first = int(np.floor(window * (most - r) + 0.5))
    return slice(first, first + r)


def close(one: torch.Tensor | np.ndarray, other: torch.Tensor | np.ndarray, size: float = 1.0) -> bool:
    return bool(np.linalg.norm(np.asarray(one) - np.asarray(other)) <= EXACT * size)


# ------------------------------------------------------------------------------------------------ windows


def test_a_window_runs_from_the_largest_to_the_smallest() -> None:
    for most in range(1, 9):
        for r in range(1, most + 1):
            firsts = [factors.skipped(most, r, w) for w in np.linspace(0, 1, 41)]
            assert firsts[0] == 0
            assert firsts[-1] == most - r
            assert firsts == sorted(firsts)
            assert set(firsts) == set(range(most - r + 1))
    assert factors.skipped(9, 3, 0.5) == 3  # as many before as after


@shapes
@pytest.mark.parametrize("window", WINDOWS)
def test_milora_takes_the_triples_of_its_window_and_leaves_the_others(d_out: int, d_in: int, r: int, window: float) -> None:
    weight = weight_of("separated", d_out, d_in)
    a, b = factors.milora(weight, rank=r, window=window)
    u, sigma, vt = np.linalg.svd(weight.numpy(), full_matrices=False)
    chosen = part(len(sigma), r, window)
    assert close(b @ a, (u[:, chosen] * sigma[chosen]) @ vt[chosen])
    assert close(b.T @ b, np.diag(sigma[chosen]))
    rest = np.linalg.svd((weight - b @ a).numpy(), compute_uv=False)
    assert close(rest, np.sort(np.concatenate([np.delete(sigma, np.r_[chosen]), np.zeros(r)]))[::-1])


def test_the_ends_of_a_window_are_the_starts_that_are_named_for_them() -> None:
    weight, c = weight_of("separated", 12, 30), inputs("many", 30).T @ inputs("many", 30)
    for mine, named in (
        (factors.milora(weight, rank=4, window=0), factors.pissa(weight, rank=4)),
        (factors.milora(weight, rank=4, window=1), factors.milora(weight, rank=4)),
        (factors.corda_exact(weight, c, rank=4, window=0), factors.corda_exact(weight, c, rank=4, mode="ipm")),
        (factors.corda_exact(weight, c, rank=4, window=1), factors.corda_exact(weight, c, rank=4)),
        (factors.astra(weight, c, rank=4), factors.astra(weight, c, rank=4, window=0)),
    ):
        assert all(torch.equal(one, other) for one, other in zip(mine, named, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@shapes
def test_skipped_left_singular_vectors_are_those_of_the_whole_svd(d_out: int, d_in: int, r: int, kind: str) -> None:
    m = weight_of(kind, d_out, d_in)
    sigma = np.linalg.svd(m.numpy(), compute_uv=False)
    for skip in range(len(sigma) - r + 1):
        for end, first in (("top", skip), ("bottom", len(sigma) - r - skip)):
            values, u = solvers.left_singular(m, r, end=end, skip=skip)
            assert close(values, sigma[first : first + r])
            assert close(u.T @ u, np.eye(r))
            assert close((m @ (m.T @ u)), u * values.square())
    with pytest.raises(ValueError, match=f"skip must be at most {len(sigma) - r}"):
        solvers.left_singular(m, r, skip=len(sigma) - r + 1)


# ------------------------------------------------------------------------------------------------ of the outputs on data


@pytest.mark.parametrize("data", ["many", "few"])
@pytest.mark.parametrize("window", WINDOWS)
@shapes
def test_astra_and_corda_exact_are_eigenvectors_of_the_outputs(d_out: int, d_in: int, r: int, window: float, data: str) -> None:
    weight, x = normal(d_out, d_in), inputs(data, d_in)
    y = weight @ x.T
    second, c = y @ y.T, x.T @ x
    a, b = factors.astra(weight, 7 * c, rank=r, window=window)
    assert close(b.T @ b, np.eye(r))
    assert close(a, b.T @ weight, float(weight.norm()))
    values = np.linalg.eigvalsh(second.numpy())[::-1][part(min(d_out, d_in), r, window)]
    assert close(second @ b, b * torch.tensor(values.copy()), float(second.norm()))
    exact = factors.corda_exact(weight, c, rank=r, window=window)
    if data == "many":  # or else zero eigenvalues, whose vectors may turn
        assert close(exact.B @ exact.A, b @ a, float(weight.norm()))
    for one, other in ((exact.B.norm(dim=0), exact.A.norm(dim=1)), (torch.ones(r), b.norm(dim=0))):
        assert close(one, other, 10.0)


def test_astra_is_what_its_code_computes() -> None:
    """Which divides every sample by |max y|, sums Y Yᵀ, and takes the last r columns of `torch.linalg.eigh`: the largest."""
    weight = normal(12, 20)
    samples = [normal(15, 20, seed=k) for k in range(6)]
    total, c = torch.zeros(12, 12, dtype=torch.float64), torch.zeros(20, 20, dtype=torch.float64)
    for x in samples:
        y = x @ weight.T
        total += (y / y.max().abs()).T @ (y / y.max().abs())
        c += x.T @ x / y.max().square()
    q = torch.linalg.eigh(total / len(samples)).eigenvectors[:, -4:]
    a, b = factors.astra(weight, c, rank=4)
    assert close(b @ a, q @ q.T @ weight, float(weight.norm()))
    same = factors.sc_lora(weight, c, c, rank=4, beta=0.0)
    assert close(b @ a, same.B @ same.A, float(weight.norm()))


@pytest.mark.parametrize("data", ["many", "few"])
@shapes
def test_mica_data_writes_where_the_data_have_least_output(d_out: int, d_in: int, r: int, data: str) -> None:
    weight, x = normal(d_out, d_in), inputs(data, d_in)
    y = weight @ x.T
    a, b = factors.mica_data(weight, x.T @ x, rank=r)
    assert torch.equal(a, torch.zeros(r, d_in, dtype=torch.float64))
    assert close(b.T @ b, np.eye(r))
    sigma = np.zeros(min(d_out, d_in))
    present = np.linalg.svd(y.numpy(), compute_uv=False)[: len(sigma)]
    sigma[: len(present)] = present
    assert float((b.T @ y).norm()) <= np.linalg.norm(sigma[len(sigma) - r :]) + 1e-7 * float(y.norm())


def test_with_inputs_in_all_directions_alike_mica_data_is_mica() -> None:
    weight = weight_of("separated", 12, 30)
    one, other = factors.mica(weight, rank=4), factors.mica_data(weight, 3 * torch.eye(30), rank=4)
    assert close(one.B, other.B)
    assert not one.A.any()


# ------------------------------------------------------------------------------------------------ of the weight


@pytest.mark.parametrize("kind", KINDS)
@shapes
def test_mica_and_olora_tail_take_the_smallest_triples(d_out: int, d_in: int, r: int, kind: str) -> None:
    weight = weight_of(kind, d_out, d_in)
    sigma = np.linalg.svd(weight.numpy(), compute_uv=False)[min(d_out, d_in) - r :]
    a, b = factors.olora_tail(weight, rank=r)
    mica = factors.mica(weight, rank=r)
    for left in (b, mica.B):
        assert close(left.T @ left, np.eye(r))
        assert close(np.linalg.svd((left.T @ weight).numpy(), compute_uv=False), sigma)
    assert close(a @ a.T, np.eye(r))
    assert close(weight @ a.T, b * torch.tensor(sigma))
    assert close(b.T @ weight, torch.tensor(sigma)[:, None] * a)
    assert (a.gather(1, a.abs().argmax(1, keepdim=True)) > 0).all()
    assert (mica.B.gather(0, mica.B.abs().argmax(0, keepdim=True)) > 0).all()
    assert torch.equal(mica.A, torch.zeros(r, d_in, dtype=torch.float64))


def test_olora_tail_is_minor_singular_vectors_without_their_values() -> None:
    weight = weight_of("separated", 30, 12)
    u, _, vt = torch.linalg.svd(weight, full_matrices=False)
    a, b = factors.olora_tail(weight, rank=3)
    assert close(b @ a, u[:, -3:] @ vt[-3:])
    minor = factors.milora(weight, rank=3)
    assert close(b, minor.B / minor.B.norm(dim=0))
    assert float((b @ a).norm()) == pytest.approx(3**0.5)


# ------------------------------------------------------------------------------------------------ what they refuse

WEIGHT, C, NAN = torch.ones(4, 6), torch.eye(6), float("nan")
OF_WEIGHT = (factors.olora_tail, factors.mica, factors.milora)
OF_MOMENT = (factors.astra, factors.mica_data)


def _spoilt(t: torch.Tensor) -> torch.Tensor:
    t = t.clone()
    t[1, 2] = NAN
    return t


REFUSED: list[tuple[Callable[[], Any], str]] = [
    *((lambda r=r, f=f: f(WEIGHT, rank=r), "rank must be between 1 and 4") for r in (0, 5) for f in OF_WEIGHT),
    *((lambda r=r, f=f: f(WEIGHT, C, rank=r), "rank must be between 1 and 4") for r in (0, 5) for f in OF_MOMENT),
    *((lambda f=f: f(_spoilt(WEIGHT), rank=1), "NaN or Inf") for f in OF_WEIGHT),
    *((lambda f=f: f(_spoilt(WEIGHT), C, rank=1), "NaN or Inf") for f in OF_MOMENT),
    *((lambda f=f: f(WEIGHT, _spoilt(C), rank=1), "NaN or Inf") for f in OF_MOMENT),
    *((lambda f=f: f(WEIGHT, 0 * C, rank=1), "inputs are all zero") for f in OF_MOMENT),
    *((lambda f=f: f(WEIGHT, torch.eye(4), rank=1), r"needs a second moment \(d_in, d_in\)") for f in OF_MOMENT),
    *((lambda w=w: factors.milora(WEIGHT, rank=1, window=w), "window must be between 0 and 1") for w in (-0.1, 1.1, NAN)),
    (lambda: factors.skipped(4, 5, 0.5), "rank must be between 1 and 4"),
    (lambda: factors.skipped(4, 1, NAN), "window must be between 0 and 1"),
    (lambda: factors.astra(WEIGHT, C, rank=1, window=2), "window must be between 0 and 1"),
    (lambda: factors.corda_exact(WEIGHT, C, rank=1, window=NAN), "window must be between 0 and 1"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=range(len(REFUSED)))
def test_what_makes_no_sense_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
