"""Eigenpairs of positive semi-definite matrices, against the definition, NumPy and the singular values of X."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from matrices import TINY, assert_eigenpairs, psd, spectrum_of, tokens_of, with_eigenvalues

from nullspace import solvers
from nullspace.solvers import METHODS, bottom_eigenpairs, eigen, spectrum, top_eigenpairs
from nullspace.solvers.cost import SUBSET_MIN_D
from reference import leak, optimal_leak

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


@pytest.mark.parametrize("d", [1, 2, 40, 150])
def test_the_spectrum_is_all_eigenvalues(d: int) -> None:
    c = psd(d)
    values = spectrum(c.clone())
    assert values.dtype == torch.float64
    assert (values.diff() >= 0).all()
    np.testing.assert_allclose(values.numpy(), np.linalg.eigvalsh(c.numpy()), rtol=0.0, atol=TINY * float(c.norm()))
    assert float(values.sum()) == pytest.approx(float(c.trace()), rel=TINY)


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


def test_what_a_gpu_has_no_memory_for_is_solved_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(c: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 24.53 GiB")

    c = psd(40)
    monkeypatch.setattr(torch.linalg, "eigh", full)
    with pytest.warns(UserWarning, match="cpu has no memory for all eigenpairs of a matrix of order 40.*computed on the "):
        values, vectors = bottom_eigenpairs(c, 4, method="eigh")
    monkeypatch.undo()
    assert_eigenpairs(c, values, vectors, 4)
