"""Eigenpairs of positive semi-definite matrices, against the definition, NumPy and the singular values of X; effective rank."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nullspace import solvers
from nullspace.solvers import METHODS, bottom_eigenpairs, effective_rank, eigen, spectrum, top_eigenpairs
from nullspace.solvers.eigen import SUBSET_MIN_D
from reference import leak, optimal_leak

# Backward stable: residual and loss of orthogonality are a small multiple of d · 2e-16.
TINY = 1e-12

# (d, k): the smallest, all of them, and both sides of where "auto" changes its mind (d = 128, k = d / 4).
SIZES = [
    (1, 1),
    (2, 1),
    (2, 2),
    (9, 9),
    (SUBSET_MIN_D - 1, 5),
    (SUBSET_MIN_D, 32),
    (SUBSET_MIN_D, 33),
    (257, 1),
    (257, 40),
    (257, 257),
]


def tokens_of(n: int, d: int, *, quietest: float = 1e-3, seed: int = 0) -> torch.Tensor:
    """(n, d) float64 whose scale falls from 1 to `quietest` along directions that are no axes."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    return (torch.randn(n, d, generator=generator, dtype=torch.float64) * quietest ** torch.linspace(0, 1, d)) @ directions.T


def psd(d: int, seed: int = 0) -> torch.Tensor:
    x = tokens_of(3 * d, d, seed=seed)
    return x.T @ x


def with_eigenvalues(values: list[float], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A symmetric matrix, and its eigenvectors in the order of the values."""
    d = len(values)
    q = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q
    c = (q * torch.tensor(values, dtype=torch.float64)) @ q.T
    return (c + c.T) / 2, q


def assert_eigenpairs(c: torch.Tensor, values: torch.Tensor, vectors: torch.Tensor, k: int) -> None:
    """What makes a set of pairs one of eigenpairs: C V = V Λ, orthonormal, and the sign rule."""
    d = c.shape[0]
    assert (values.shape, vectors.shape) == ((k,), (d, k))
    assert values.dtype == vectors.dtype == torch.float64
    c = c.double()
    assert float((c @ vectors - vectors * values).norm()) <= TINY * float(c.norm())
    assert float((vectors.T @ vectors - torch.eye(k)).abs().max()) <= TINY
    peak = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    assert (peak > 0).all()


# ------------------------------------------------------------------------------------------------ bottom


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("d", "k"), SIZES)
def test_bottom_pairs_are_the_k_smallest(d: int, k: int, method: str) -> None:
    c = psd(d)
    values, vectors = bottom_eigenpairs(c, k, method=method)
    assert_eigenpairs(c, values, vectors, k)
    assert (values.diff() >= 0).all()
    expected = np.linalg.eigvalsh(c.numpy())[:k]
    np.testing.assert_allclose(values.numpy(), expected, rtol=0.0, atol=TINY * float(c.norm()))


@pytest.mark.parametrize(("d", "k"), SIZES)
def test_the_methods_agree(d: int, k: int) -> None:
    c = psd(d)
    both = [bottom_eigenpairs(c, k, method=method) for method in ("eigh", "lapack-subset")]
    torch.testing.assert_close(both[0][0], both[1][0], rtol=0.0, atol=TINY * float(c.norm()))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("k", [1, 30, 200])
def test_no_basis_leaks_less(k: int, method: str) -> None:
    x = tokens_of(600, 200)
    values, vectors = bottom_eigenpairs(x.T @ x, k, method=method)
    optimum = optimal_leak(x, k)
    assert leak(vectors, x) == pytest.approx(optimum, rel=1e-9)
    # Squaring X leaves λ an error of 1e-16 of the largest one, which is 1e6 times the smallest one.
    assert math.sqrt(float(values.sum()) / float(x.square().sum())) == pytest.approx(optimum, rel=1e-8)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("tokens", "d", "k"), [(1, 2, 1), (1, 150, 149), (20, 64, 44), (20, 150, 10), (20, 150, 130)])
def test_a_rank_deficient_matrix_has_a_null_space_that_hears_nothing(tokens: int, d: int, k: int, method: str) -> None:
    x = tokens_of(tokens, d, quietest=1e-1)
    c = x.T @ x
    values, vectors = bottom_eigenpairs(c, k, method=method)
    assert_eigenpairs(c, values, vectors, k)
    assert float(values.abs().max()) <= TINY * float(c.norm())
    assert leak(vectors, x) <= TINY


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("d", "k"), [(1, 1), (5, 2), (150, 10)])
def test_the_zero_matrix_has_any_orthonormal_basis(d: int, k: int, method: str) -> None:
    c = torch.zeros(d, d, dtype=torch.float64)
    values, vectors = bottom_eigenpairs(c, k, method=method)
    assert_eigenpairs(c, values, vectors, k)
    assert torch.equal(values, torch.zeros(k, dtype=torch.float64))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("values", [[1.0] * 3 + [4.0] * 5, [1.0] * 20 + [1.0 + 1e-3] * 130, [0.0] * 30 + [2.0] * 120])
def test_repeated_eigenvalues_have_the_right_space(values: list[float], method: str) -> None:
    c, q = with_eigenvalues(values)
    k = values.count(values[0])
    found, vectors = bottom_eigenpairs(c, k, method=method)
    assert_eigenpairs(c, found, vectors, k)
    torch.testing.assert_close(found, torch.full((k,), values[0], dtype=torch.float64), rtol=0.0, atol=TINY * max(values))
    # The projector is the only thing that is unique; rounding turns the space by eps · ‖C‖ / gap, 1e-12 at most.
    torch.testing.assert_close(vectors @ vectors.T, q[:, :k] @ q[:, :k].T, rtol=0.0, atol=1e-11)


@pytest.mark.parametrize("method", METHODS)
def test_the_vectors_of_a_diagonal_matrix_are_the_axes(method: str) -> None:
    order = torch.randperm(140, generator=torch.Generator().manual_seed(0))
    c = torch.zeros(140, 140, dtype=torch.float64)
    c[order, order] = torch.arange(140, dtype=torch.float64)
    values, vectors = bottom_eigenpairs(c, 12, method=method)
    torch.testing.assert_close(values, torch.arange(12, dtype=torch.float64), rtol=0.0, atol=140 * TINY)
    torch.testing.assert_close(vectors, torch.eye(140, dtype=torch.float64)[:, order[:12]], rtol=0.0, atol=TINY)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("exponent", [-400, -60, 60, 400])
def test_scale_does_not_matter(exponent: int, method: str) -> None:
    c = psd(140)
    values, vectors = bottom_eigenpairs(c * 2.0**exponent, 9, method=method)
    assert_eigenpairs(c, values * 2.0**-exponent, vectors, 9)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("d", [1, 40, 150])
def test_the_input_survives_unless_it_may_be_overwritten_which_saves_a_copy(d: int, overwrite: bool, method: str) -> None:
    c = psd(d)
    used = c.clone()
    values, vectors = bottom_eigenpairs(used, min(d, 8), method=method, overwrite=overwrite)
    assert_eigenpairs(c, values, vectors, min(d, 8))
    # Only LAPACK's own driver works in place; at d = 1 there is nothing to do.
    in_place = overwrite and d > 1 and (method == "lapack-subset" or (method in ("auto", "shift-invert") and d >= SUBSET_MIN_D))
    assert torch.equal(used, c) != in_place


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("d", [1, 40, 150])
def test_the_results_are_the_callers_own(d: int, method: str) -> None:
    c = psd(d)
    values, vectors = bottom_eigenpairs(c, 1, method=method)
    for result in (values, vectors):
        assert result.untyped_storage().nbytes() == 8 * result.numel()  # and no view that keeps all d pairs alive
        result.zero_()
    assert torch.equal(c, psd(d))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("d", [3, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_input_is_solved_in_float64(dtype: torch.dtype, d: int, method: str) -> None:
    c = psd(d).to(dtype)
    before = c.clone()
    for one, other in zip(bottom_eigenpairs(c, 2, method=method), bottom_eigenpairs(c.double(), 2, method=method), strict=True):
        assert one.dtype == torch.float64
        assert torch.equal(one, other)
    assert torch.equal(c, before)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "view",
    [lambda c: c.T, lambda c: c.repeat(1, 2)[:, : len(c)], lambda c: c.repeat_interleave(2, 1)[:, ::2]],
    ids=["transposed", "left half", "every other column"],
)
def test_strides_do_not_matter(view: Callable[[torch.Tensor], torch.Tensor], method: str) -> None:
    c = psd(140)
    c = (c + c.T) / 2
    strided = view(c)
    assert not strided.is_contiguous()
    bottom_eigenpairs(strided, 7, method=method)
    assert torch.equal(strided, c)
    for overwrite in (False, True):
        values, vectors = bottom_eigenpairs(view(c.clone()), 7, method=method, overwrite=overwrite)
        assert_eigenpairs(c, values, vectors, 7)


@pytest.mark.parametrize(
    ("d", "k", "method"),
    [
        (SUBSET_MIN_D - 1, 1, "eigh"),
        (SUBSET_MIN_D, SUBSET_MIN_D // 4, "lapack-subset"),
        (SUBSET_MIN_D, SUBSET_MIN_D // 4 + 1, "eigh"),
    ],
)
def test_auto_is_the_documented_method(d: int, k: int, method: str) -> None:
    c = psd(d)
    other = "eigh" if method == "lapack-subset" else "lapack-subset"
    auto, same, different = (bottom_eigenpairs(c, k, method=name)[1] for name in ("auto", method, other))
    assert torch.equal(auto, same)
    assert not torch.equal(auto, different)  # equal but for rounding, which tells them apart


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("d", [1, 40, 150])
def test_equal_inputs_give_equal_bits(d: int, method: str) -> None:
    first, second = (bottom_eigenpairs(psd(d), min(d, 8), method=method) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


# ------------------------------------------------------------------------------------------------ top, and all


# The logarithm of a real layer's spectrum (SmolLM2-135M, layer 15 o_proj) at fractions of it, from the top.
LAYER = (
    (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.9, 0.97, 0.99, 1.0),
    (0.0, -1.46, -2.07, -2.92, -3.47, -3.94, -4.3, -4.59, -4.76, -5.31),
)


def spectrum_of(kind: str, d: int) -> np.ndarray:
    values = 10 ** (np.linspace(0, -12, d) if kind == "steep" else np.interp(np.linspace(0, 1, d), *LAYER))
    if kind == "massive":
        values[:4] *= 1e7
    if kind == "some zeros":
        values[-5:] = 0
    if kind == "wide null space":
        values[-100:] = 0
    if kind == "repeated":
        values[-100:] = values[-100]
    if kind == "all equal":
        values[:] = 3.0
    return values


@pytest.mark.parametrize("k", [1, 20, 40])
@pytest.mark.parametrize("kind", ["layer", "steep", "massive", "some zeros", "wide null space", "all equal"])
def test_shift_invert_finds_what_eigh_finds(kind: str, k: int) -> None:
    d = 700
    values = spectrum_of(kind, d)
    x = torch.from_numpy(np.sqrt(values))[:, None] * with_eigenvalues([1.0] * d, seed=3)[1].T
    c = x.T @ x
    c = (c + c.T) / 2
    found = eigen._shift_invert(c, k)
    assert found is not None, "it fell back"
    known, vectors = found
    assert len(known) >= k + 1
    assert float((c @ vectors - vectors * known[:k]).norm() / c.norm()) <= TINY
    assert float((vectors.T @ vectors - torch.eye(k, dtype=torch.float64)).norm()) <= TINY
    every = torch.linalg.eigvalsh(c)
    assert float((known[:k] - every[:k]).abs().max()) <= 1e-14 * float(every[-1]) * math.sqrt(d)
    # The next ones too, from which the gap and the estimate of rounding are taken: never below the truth.
    assert bool((known - every[: len(known)] >= -1e-13 * every[-1]).all())
    ours, best = float((x @ vectors).norm()), float((x @ torch.linalg.eigh(c)[1][:, :k]).norm())
    assert ours <= (1 + 1e-9) * best + 1e-8 * float(x.norm()) * ("null" in kind or "zeros" in kind)


def test_shift_invert_falls_back_where_there_is_no_inverse() -> None:
    c = with_eigenvalues([-1.0, 0.0, *np.linspace(1, 2, 398)])[0]
    assert eigen._shift_invert(c, 3) is None
    assert_eigenpairs(c, *bottom_eigenpairs(c, 3, method="shift-invert"), 3)


@pytest.mark.parametrize("k", [1, 20, 40])
def test_a_repeated_eigenvalue_is_not_mistaken_for_a_few(k: int) -> None:
    c = with_eigenvalues(list(spectrum_of("repeated", 700)))[0]
    values, vectors = bottom_eigenpairs(c, k, method="shift-invert")
    assert_eigenpairs(c, values, vectors, k)
    torch.testing.assert_close(values, torch.linalg.eigvalsh(c)[:k], rtol=0.0, atol=1e-14)


def test_what_was_missed_is_noticed() -> None:
    c, q = with_eigenvalues([0.5, *np.linspace(1, 4, 299)])
    factor = torch.linalg.cholesky(c)
    assert not eigen._quieter_left(factor, q[:, :5], math.sqrt(1 + 3 * 3 / 298))
    assert eigen._quieter_left(factor, q[:, 1:6], math.sqrt(1 + 4 * 3 / 298))


@pytest.mark.parametrize(("d", "k"), SIZES)
def test_top_pairs_are_the_k_largest(d: int, k: int) -> None:
    c = psd(d)
    before = c.clone()
    values, vectors = top_eigenpairs(c, k)
    assert_eigenpairs(c, values, vectors, k)
    assert (values.diff() <= 0).all()
    expected = np.linalg.eigvalsh(c.numpy())[::-1][:k]
    np.testing.assert_allclose(values.numpy(), expected, rtol=0.0, atol=TINY * float(c.norm()))
    assert torch.equal(c, before)


def test_top_pairs_are_the_loudest_directions() -> None:
    x = tokens_of(600, 200)
    _, vectors = top_eigenpairs(x.T @ x, 30)
    loudest = np.linalg.svd(x.numpy(), compute_uv=False)[:30]
    assert leak(vectors, x) == pytest.approx(float(np.linalg.norm(loudest) / np.linalg.norm(x.numpy())), rel=TINY)


def test_top_of_a_float32_matrix_is_found_in_float64() -> None:
    c = psd(140).float()
    assert_eigenpairs(c, *top_eigenpairs(c, 6), 6)


# ------------------------------------------------------------------------------------------------ left singular vectors


def with_singular_values(n: int, d: int, sigma: torch.Tensor, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, d) with these min(n, d) singular values, and its left singular vectors in the same order."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(m, len(sigma), generator=generator, dtype=torch.float64)).Q for m in (n, d))
    return (u * sigma) @ v.T, u


def falling(n: int, d: int, condition: float) -> torch.Tensor:
    return condition ** -torch.linspace(0, 1, min(n, d), dtype=torch.float64)


def fast_route(m: torch.Tensor, k: int, end: str) -> bool:
    return (eigen._left_top if end == "top" else eigen._left_bottom)(m.double(), k) is not None


def assert_left_vectors(m: torch.Tensor, sigma: torch.Tensor, u: torch.Tensor, k: int) -> None:
    """What makes them singular: orthonormal, UᵀM with orthogonal rows of length Σ, descending, and the sign rule."""
    assert (sigma.shape, u.shape) == ((k,), (m.shape[0], k))
    assert sigma.dtype == u.dtype == torch.float64
    assert float((u.T @ u - torch.eye(k)).abs().max()) <= TINY
    assert (sigma >= 0).all()
    assert (sigma.diff() <= 0).all()
    projected = u.T @ m.double()
    assert float((projected @ projected.T - sigma.square().diag()).norm()) <= TINY * float(m.double().square().sum())
    assert (u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all()


left_shapes = pytest.mark.parametrize(("n", "d"), [(24, 60), (60, 24), (40, 40)], ids=["wide", "tall", "square"])
ends = pytest.mark.parametrize("end", ["top", "bottom"])


@left_shapes
@ends
@pytest.mark.parametrize("condition", [1e1, 1e3, 1e5, 1e7, 1e9, 1e11, 1e12])
@pytest.mark.parametrize("k", [1, 5, 12, None])
def test_left_singular_vectors_are_those_the_matrix_was_made_of(n: int, d: int, end: str, condition: float, k: int | None) -> None:
    k = k or min(n, d)
    sigma = falling(n, d, condition)
    m, u = with_singular_values(n, d, sigma)
    part = slice(0, k) if end == "top" else slice(len(sigma) - k, None)
    values, vectors = solvers.left_singular(m, k, end=end)
    assert_left_vectors(m, values, vectors, k)
    assert float((values - sigma[part]).abs().max()) <= 1e-13
    # What the factors are made of: the part of M in these directions, to the last digit of M, however quiet they are.
    ours, theirs = vectors @ (vectors.T @ m), u[:, part] @ (u[:, part].T @ m)
    assert float((ours - theirs).norm()) <= 1e-10 * float(m.norm())
    # One by one, as far as squares (of the wanted ones, at most SQUARE_LIMIT apart), or the matrix's own digits, go.
    spread = float(sigma[part][0] / sigma[part][-1]) ** 2 if fast_route(m, k, end) else 1.0
    allowed = 1e-14 * (spread + 1 / float(sigma[part][-1]))
    cosines = (vectors * u[:, part]).sum(0).abs()
    ratio = 1 / (1 - float(sigma[1] / sigma[0]) ** 2)
    assert float((1 - cosines).abs().max()) <= 0.5 * (10 * ratio * allowed) ** 2 + 1e-13


@left_shapes
@pytest.mark.parametrize(
    ("condition", "k", "top", "bottom"),
    [(1e3, 8, True, True), (1e8, 3, True, True), (1e10, 24, False, False), (1e13, 3, True, False), (1e13, 24, False, False)],
)
def test_squares_are_taken_where_they_will_do(n: int, d: int, condition: float, k: int, top: bool, bottom: bool) -> None:
    m, _ = with_singular_values(n, d, falling(n, d, condition))
    assert fast_route(m, k, "top") == top
    assert fast_route(m, k, "bottom") == bottom


@left_shapes
@ends
@pytest.mark.parametrize("gap", [10.0, 2.0, 1.01])
def test_a_gap_is_enough_for_the_subspace_whatever_lies_on_its_sides(n: int, d: int, end: str, gap: float) -> None:
    """Flat on both sides: the vectors are anybody's, their span is not."""
    k = 7
    sigma = torch.ones(min(n, d), dtype=torch.float64)
    sigma[: k if end == "top" else -k] *= gap
    m, u = with_singular_values(n, d, sigma)
    part = slice(0, k) if end == "top" else slice(len(sigma) - k, None)
    values, vectors = solvers.left_singular(m, k, end=end)
    assert fast_route(m, k, end)
    assert_left_vectors(m, values, vectors, k)
    assert float((vectors - u[:, part] @ (u[:, part].T @ vectors)).norm()) <= 1e-14 * gap / (gap - 1) * len(sigma)


def _zero_rows(m: torch.Tensor) -> torch.Tensor:
    m[3:6] = 0
    return m


def _zero_columns(m: torch.Tensor) -> torch.Tensor:
    m[:, 3:6] = 0
    return m


def _repeated_rows(m: torch.Tensor) -> torch.Tensor:
    m[3:6] = m[:3]
    return m


def _repeated_columns(m: torch.Tensor) -> torch.Tensor:
    m[:, 3:6] = m[:, :3]
    return m


@left_shapes
@ends
@pytest.mark.parametrize("spoil", [_zero_rows, _zero_columns, _repeated_rows, _repeated_columns, torch.zeros_like, torch.ones_like])
@pytest.mark.parametrize("k", [1, 3, 10, None])
def test_a_singular_matrix_is_as_good_as_any(n: int, d: int, end: str, spoil: Callable, k: int | None) -> None:
    k = k or min(n, d)
    m = spoil(torch.randn(n, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    values, vectors = solvers.left_singular(m, k, end=end)
    assert_left_vectors(m, values, vectors, k)
    expected = np.linalg.svd(m.numpy(), compute_uv=False)
    expected = expected[:k] if end == "top" else expected[len(expected) - k :]
    assert np.abs(values.numpy() - expected).max() <= TINY * float(m.norm() + 1)


def test_rows_and_columns_that_leave_no_inverse_are_noticed() -> None:
    def noise(n: int, d: int) -> torch.Tensor:
        return torch.randn(n, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    for m in (
        _zero_rows(noise(24, 60)),
        _repeated_rows(noise(24, 60)),
        _zero_columns(noise(60, 24)),
        _repeated_columns(noise(60, 24)),
    ):
        assert not fast_route(m, 3, "bottom")
    # These take no rank from the smaller side.
    for m in (
        _zero_columns(noise(24, 60)),
        _repeated_columns(noise(24, 60)),
        _zero_rows(noise(60, 24)),
        _repeated_rows(noise(60, 24)),
    ):
        assert fast_route(m, 3, "bottom")
    # Far from singular by its rows and its diagonal, and yet singular: Kahan's matrix, whose QR shows nothing.
    d, c = 90, 0.5
    s = (1 - c * c) ** 0.5
    kahan = torch.diag(s ** torch.arange(d, dtype=torch.float64)) @ (torch.eye(d) - c * torch.ones(d, d).triu(1)).double()
    sigma = np.linalg.svd(kahan.numpy(), compute_uv=False)
    assert sigma[-1] < 1e-14 * sigma[0] < float(kahan.diagonal().min())
    assert not fast_route(kahan, 3, "bottom")
    assert_left_vectors(kahan, *solvers.left_singular(kahan, 3, end="bottom"), 3)


@left_shapes
@ends
def test_the_routes_agree(n: int, d: int, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    m, _ = with_singular_values(n, d, falling(n, d, 1e4))
    fast = solvers.left_singular(m, 6, end=end)
    assert fast_route(m, 6, end)
    monkeypatch.setattr(eigen, "SQUARE_LIMIT", 0.5)
    assert not fast_route(m, 6, end)
    for mine, whole in zip(fast, solvers.left_singular(m, 6, end=end), strict=True):
        torch.testing.assert_close(mine, whole, rtol=1e-10, atol=1e-10)


@left_shapes
@ends
def test_all_singular_values_of_both_ends_are_the_same(n: int, d: int, end: str) -> None:
    m, _ = with_singular_values(n, d, falling(n, d, 1e3))
    values, vectors = solvers.left_singular(m, min(n, d), end=end)
    assert_left_vectors(m, values, vectors, min(n, d))
    assert float((vectors @ (vectors.T @ m) - m).norm()) <= TINY * float(m.norm())


@left_shapes
@ends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_matrices_have_their_singular_vectors_found_in_float64(n: int, d: int, end: str, dtype: torch.dtype) -> None:
    m = with_singular_values(n, d, falling(n, d, 1e2))[0].to(dtype)
    before = m.clone()
    for narrow, wide in zip(solvers.left_singular(m, 4, end=end), solvers.left_singular(m.double(), 4, end=end), strict=True):
        assert torch.equal(narrow, wide)
    assert torch.equal(m, before)


@ends
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (2, 2)])
def test_the_smallest_matrices_have_left_singular_vectors(shape: tuple[int, int], end: str) -> None:
    m = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for k in range(1, min(shape) + 1):
        assert_left_vectors(m, *solvers.left_singular(m, k, end=end), k)


@pytest.mark.parametrize("exponent", [-60, -10, 10, 60])
@left_shapes
@ends
def test_left_singular_vectors_do_not_depend_on_the_scale(n: int, d: int, end: str, exponent: int) -> None:
    m, _ = with_singular_values(n, d, falling(n, d, 1e3))
    plain, scaled = solvers.left_singular(m, 5, end=end), solvers.left_singular(m * 2.0**exponent, 5, end=end)
    torch.testing.assert_close(scaled[0], plain[0] * 2.0**exponent, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(scaled[1], plain[1], rtol=0.0, atol=1e-10)


def test_left_singular_refuses_what_it_cannot_do() -> None:
    m = torch.ones(4, 6)
    for k in (0, -1, 5):
        with pytest.raises(ValueError, match=rf"k must be between 1 and the smaller side of the matrix \(4, 6\), not {k}"):
            solvers.left_singular(m, k)
    for shape in ((6,), (2, 4, 6), (0, 6)):
        with pytest.raises(ValueError, match="k must be between 1 and the smaller side"):
            solvers.left_singular(torch.ones(shape), 1)
    with pytest.raises(ValueError, match="end must be 'top' or 'bottom', not 'both'"):
        solvers.left_singular(m, 1, end="both")
    for bad in (float("nan"), float("inf")):
        spoilt = m.clone()
        spoilt[2, 3] = bad
        for end in ("top", "bottom"):
            with pytest.raises(ValueError, match="NaN or Inf"):
                solvers.left_singular(spoilt, 1, end=end)


@pytest.mark.parametrize("d", [1, 2, 40, 150])
def test_the_spectrum_is_all_eigenvalues(d: int) -> None:
    c = psd(d)
    values = spectrum(c.clone())
    assert values.dtype == torch.float64
    assert (values.diff() >= 0).all()
    np.testing.assert_allclose(values.numpy(), np.linalg.eigvalsh(c.numpy()), rtol=0.0, atol=TINY * float(c.norm()))
    assert float(values.sum()) == pytest.approx(float(c.trace()), rel=TINY)


# ------------------------------------------------------------------------------------------------ the steps, and side by side


@pytest.mark.parametrize("share", [0.0, 0.15, 1.0])
@pytest.mark.parametrize("d", [*range(1, 65, 9), 576])
def test_the_steps_give_numpys_eigenpairs(d: int, share: float) -> None:
    c, k = psd(d), max(1, int(share * d))
    known, vectors = solvers.partial_eigh(c, k, method="lapack-subset")
    assert len(known) == d
    np.testing.assert_allclose(known.numpy(), np.linalg.eigh(c.numpy())[0], rtol=0.0, atol=TINY * float(c.norm()))
    assert_eigenpairs(c, known[:k], vectors, k)
    assert float((vectors.T @ vectors - torch.eye(k)).abs().max()) <= 1e-13


@pytest.mark.parametrize("exponent", [-1000, 0, 900])
@pytest.mark.parametrize("kind", ["layer", "steep", "massive", "some zeros", "wide null space", "repeated", "all equal"])
def test_the_steps_master_every_spectrum_at_every_scale(kind: str, exponent: int) -> None:
    c, _ = with_eigenvalues(list(spectrum_of(kind, 160)), seed=5)
    values, vectors = bottom_eigenpairs(torch.ldexp(c, torch.tensor(exponent)), 20, method="lapack-subset")
    assert_eigenpairs(c, torch.ldexp(values, torch.tensor(-exponent)), vectors, 20)


@pytest.mark.parametrize("bad", [lambda v: None, lambda v: v * np.nan, lambda v: v[:, :1].repeat(v.shape[1], 1), lambda v: 2 * v])
@pytest.mark.parametrize("d", [9, 64, 200])
def test_vectors_that_are_none_are_found_otherwise(d: int, bad: Callable[..., object], monkeypatch: pytest.MonkeyPatch) -> None:
    c, k = psd(d), 7
    right = eigen.lapack.eigenvectors
    expected = bottom_eigenpairs(c, k, method="lapack-subset")
    monkeypatch.setattr(eigen.lapack, "eigenvectors", lambda *arguments: bad(right(*arguments)))
    values, vectors = bottom_eigenpairs(c, k, method="lapack-subset")
    assert_eigenpairs(c, values, vectors, k)
    assert torch.equal(values, expected[0])
    torch.testing.assert_close(vectors @ vectors.T, expected[1] @ expected[1].T, rtol=0.0, atol=1e-7)


@pytest.mark.parametrize("d", [9, 140, 576])
def test_without_pointers_the_result_is_the_same_to_rounding(d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    c = psd(d)
    before, k = c.clone(), max(1, d // 8)
    values, vectors = bottom_eigenpairs(c, k, method="lapack-subset")
    monkeypatch.setattr(eigen.lapack, "_routine", lambda name: None)
    other_values, other_vectors = bottom_eigenpairs(c, k, method="lapack-subset")
    assert_eigenpairs(c, other_values, other_vectors, k)
    torch.testing.assert_close(values, other_values, rtol=0.0, atol=TINY * float(c.norm()))
    torch.testing.assert_close(vectors @ vectors.T, other_vectors @ other_vectors.T, rtol=0.0, atol=1e-7)
    assert torch.equal(c, before)


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_a_pool_gives_the_bits_of_lone_calls(workers: int) -> None:
    matrices = [psd(d, seed) for seed, d in enumerate([3, 40, 130, 200, 200, 576, 576, 130])]
    alone = [solvers.partial_eigh(c, 3, method="lapack-subset") for c in matrices]
    with solvers.one_thread_each(workers) as pool:
        together = list(pool.map(lambda c: solvers.partial_eigh(c, 3, method="lapack-subset"), matrices))
    for one, other in zip(alone, together, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def blas_threads() -> list[int]:
    return [library["num_threads"] for library in eigen._blas().info() if library["user_api"] == "blas"]


def test_workers_compute_with_one_thread_and_leave_none_behind() -> None:
    torch_threads, blas = torch.get_num_threads(), blas_threads()
    with solvers.one_thread_each(3) as pool:
        assert list(pool.map(lambda _: torch.get_num_threads(), range(9))) == [1] * 9
        solvers.partial_eigh(psd(200), 3)  # which sets and lifts a limit itself
        list(pool.map(lambda c: solvers.partial_eigh(c, 3), [psd(200)] * 4))
        assert set(blas_threads()) <= {1}
    assert (torch.get_num_threads(), blas_threads()) == (torch_threads, blas)


def test_an_error_in_a_worker_comes_out_and_lifts_the_limit() -> None:
    torch_threads, blas = torch.get_num_threads(), blas_threads()
    with pytest.raises(ValueError, match="NaN or Inf"), solvers.one_thread_each(2) as pool:
        list(pool.map(lambda c: solvers.partial_eigh(c, 1), [psd(200), torch.full((200, 200), torch.nan)]))
    assert (torch.get_num_threads(), blas_threads()) == (torch_threads, blas)


def test_limits_may_overlap_in_any_order() -> None:
    before = blas_threads()
    limit = eigen._OneBlasThread()
    with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
        first.enter_context(limit)
        second.enter_context(limit)
        first.close()
        assert set(blas_threads()) <= {1}
    assert blas_threads() == before


def test_as_many_sites_as_threads_are_decomposed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    assert solvers.side_by_side(576) == solvers.side_by_side(1536, torch.device("cpu")) == 16
    assert solvers.side_by_side(2880) == 8  # 1 GiB
    assert solvers.side_by_side(eigen.INVERT_MIN_D) == solvers.side_by_side(100_000) == 1
    assert solvers.side_by_side(576, "cuda") == solvers.side_by_side(576, torch.device("cuda", 1)) == 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert solvers.side_by_side(576) == 1


# ------------------------------------------------------------------------------------------------ bad input

SOLVERS: dict[str, Callable[[torch.Tensor], object]] = {
    "eigh": lambda c: bottom_eigenpairs(c, 1, method="eigh"),
    "lapack-subset": lambda c: bottom_eigenpairs(c, 1, method="lapack-subset"),
    "top": lambda c: top_eigenpairs(c, 1),
    "spectrum": spectrum,
}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shape", [(0, 0), (3,), (), (3, 2), (2, 3, 3)], ids=str)
def test_what_is_not_square_is_refused(shape: tuple[int, ...], solver: str) -> None:
    with pytest.raises(ValueError, match="expected a square matrix, got shape"):
        SOLVERS[solver](torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [(0, 0), (2, 1), (1, 2)])
def test_nan_and_inf_are_refused(at: tuple[int, int], value: float, solver: str) -> None:
    c = torch.eye(3, dtype=torch.float64)
    c[at] = value
    with pytest.raises(ValueError, match="NaN or Inf"):
        SOLVERS[solver](c)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("k", [-1, 0, 4])
def test_a_number_of_pairs_out_of_range_is_refused(k: int, method: str) -> None:
    for solve in (lambda c: bottom_eigenpairs(c, k, method=method), lambda c: top_eigenpairs(c, k)):
        with pytest.raises(ValueError, match=f"k must be between 1 and 3, not {k}"):
            solve(torch.eye(3))


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match="method must be one of 'auto', 'eigh', 'lapack-subset', 'shift-invert', not 'power'"):
        bottom_eigenpairs(torch.eye(3), 1, method="power")


# ------------------------------------------------------------------------------------------------ effective rank

repeatable = settings(max_examples=150, deadline=None, derandomize=True, database=None)
# Zero, or within what activations can have: sums neither overflow nor lose their digits to subnormal numbers.
sigma_values = st.one_of(st.just(0.0), st.floats(1e-100, 1e100), st.floats(0.1, 10.0))
spectra = st.lists(sigma_values, min_size=1, max_size=50).filter(any).map(lambda values: np.array(values, dtype=np.float64))


@repeatable
@given(spectra)
def test_effective_rank_is_the_exponential_of_the_entropy(sigma: np.ndarray) -> None:
    p = sigma[sigma > 0] / sigma.sum()
    p = p[p > 0]  # 1e-400 of the rest is no float64
    assert effective_rank(sigma) == pytest.approx(float(np.exp(-(p * np.log(p)).sum())), rel=1e-12)
    assert effective_rank(torch.from_numpy(sigma)) == effective_rank(sigma)


@repeatable
@given(spectra, st.floats(1e-50, 1e50))
def test_effective_rank_does_not_depend_on_the_scale(sigma: np.ndarray, scale: float) -> None:
    assert effective_rank(scale * sigma) == pytest.approx(effective_rank(sigma), rel=1e-12)


@repeatable
@given(spectra, st.randoms(use_true_random=False))
def test_effective_rank_does_not_depend_on_order_or_zeros(sigma: np.ndarray, random) -> None:
    shuffled = [*sigma.tolist(), 0.0, 0.0]
    random.shuffle(shuffled)
    assert effective_rank(torch.tensor(shuffled, dtype=torch.float64)) == pytest.approx(effective_rank(sigma), rel=1e-12)


@repeatable
@given(spectra)
def test_effective_rank_lies_between_1_and_n_and_doubles_when_every_direction_does(sigma: np.ndarray) -> None:
    erank = effective_rank(sigma)
    assert 1 - 1e-12 <= erank <= np.count_nonzero(sigma) * (1 + 1e-12)
    assert effective_rank(np.tile(sigma, 2)) == pytest.approx(2 * erank, rel=1e-12)


@pytest.mark.parametrize("n", [1, 2, 7, 1000])
@pytest.mark.parametrize("value", [1e-30, 1.0, 1e30])
def test_equal_directions_count_fully(n: int, value: float) -> None:
    assert effective_rank(torch.full((n,), value, dtype=torch.float64)) == pytest.approx(n, rel=1e-12)


@pytest.mark.parametrize("n", [1, 2, 1000])
def test_one_direction_has_effective_rank_1(n: int) -> None:
    sigma = torch.zeros(n)
    sigma[n // 2] = 3.0
    assert effective_rank(sigma) == 1.0


@pytest.mark.parametrize("n", [0, 1, 5])
def test_no_direction_has_effective_rank_0(n: int) -> None:
    assert effective_rank(torch.zeros(n)) == 0.0


def test_a_sharp_spectrum_has_the_effective_rank_of_its_entropy() -> None:
    assert effective_rank(torch.tensor([1.0, 0.5, 0.5])) == pytest.approx(2**1.5, rel=1e-15)  # 1.5 bits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_singular_values_are_summed_in_float64(dtype: torch.dtype) -> None:
    sigma = torch.rand(3000).to(dtype)
    assert effective_rank(sigma) == effective_rank(sigma.double())


def test_a_reversed_array_is_as_good_as_any() -> None:
    sigma = np.array([0.5, 2.0, 3.0])
    assert effective_rank(sigma[::-1]) == effective_rank(sigma[::-1].copy())


@pytest.mark.parametrize("bad", [-1.0, -1e-300, float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("make", [np.array, torch.tensor])
def test_bad_singular_values_are_refused(make: Callable[..., object], bad: float) -> None:
    sigma = make([1.0, bad, 2.0], dtype=np.float64 if make is np.array else torch.float64)
    with pytest.raises(ValueError, match="finite and not negative"):
        effective_rank(sigma)
