"""Singular values and left singular vectors, against the matrices they were made of and NumPy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from matrices import TINY, spectrum_of, with_eigenvalues

from nullspace import solvers
from nullspace.solvers import singular
from nullspace.solvers.cost import tuning


def with_singular_values(n: int, d: int, sigma: torch.Tensor, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, d) with these min(n, d) singular values, and its left singular vectors in the same order."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(m, len(sigma), generator=generator, dtype=torch.float64)).Q for m in (n, d))
    return (u * sigma) @ v.T, u


def falling(n: int, d: int, condition: float) -> torch.Tensor:
    return condition ** -torch.linspace(0, 1, min(n, d), dtype=torch.float64)


def fast_route(m: torch.Tensor, k: int, end: str) -> bool:
    return (singular.left_top if end == "top" else singular.left_bottom)(m.double(), k) is not None


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
    monkeypatch.setattr(singular, "SQUARE_LIMIT", 0.5)
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


def root_of(kind: str, d: int) -> torch.Tensor:
    """The triangular factor of a matrix with this spectrum, or of one with few rows, or with a few rows of 1e5 times the norm."""
    values = spectrum_of(kind if kind in ("steep", "massive", "some zeros", "wide null space") else "layer", d)
    x = torch.from_numpy(np.sqrt(values))[:, None] * with_eigenvalues([1.0] * d, seed=3)[1].T
    if "few rows" in kind:
        x[: d // 30] = 0
    if "massive rows" in kind:
        x = torch.cat([x, 1e5 * torch.randn(3, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)])
    return torch.linalg.qr(x, mode="r").R


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("kind", ["layer", "steep", "massive", "some zeros", "wide null space", "massive rows", "few massive rows"])
def test_the_bottom_of_a_root_is_that_of_a_whole_svd(kind: str, device: str) -> None:
    d, k = 520, 36
    root = root_of(kind, d)
    before = root.clone()
    result = singular.inverse_of_root(root, k, tuning(d, k, device))
    assert result is not None, "it fell back"
    assert torch.equal(root, before)
    squares, vectors = result
    _, sigma, best = torch.linalg.svd(root)
    sigma, best, norm = sigma.flip(0), best.flip(0)[:k].T, float(root.norm())
    assert len(squares) > k
    assert (squares.diff() >= 0).all()
    assert float((vectors.T @ vectors - torch.eye(k)).norm()) <= TINY
    # A backward stable SVD has an error of some eps · ‖R‖, and a squared matrix one of 1e-8 · ‖R‖.
    assert float((squares[:k].sqrt() - sigma[:k]).abs().max()) <= 1e-14 * norm
    assert float((root @ vectors).norm()) <= (1 + 1e-9) * float((root @ best).norm()) + 1e-13 * norm
    again = singular.inverse_of_root(root, k, tuning(d, k, device))
    assert again is not None
    assert torch.equal(again[1], vectors)


def test_a_root_of_any_shape_has_the_same_bottom_as_its_triangle(monkeypatch: pytest.MonkeyPatch) -> None:
    root = root_of("massive rows", 520)
    tall = torch.cat([root[::2], torch.zeros(9, 520), root[1::2]])
    one, other = solvers.bottom_right_singular(root, 8), solvers.bottom_right_singular(tall, 8)
    torch.testing.assert_close(one[0], other[0], rtol=1e-9, atol=0.0)
    assert len(one[0]) < 520 == len(solvers.bottom_right_singular(root, 8, every=True)[0])
    monkeypatch.setattr(singular, "inverse_of_root", lambda *_: None)
    whole = solvers.bottom_right_singular(root, 8)
    torch.testing.assert_close(one[0][:8], whole[0][:8], rtol=1e-9, atol=0.0)
    torch.testing.assert_close(one[1], whole[1], rtol=0.0, atol=1e-7)
