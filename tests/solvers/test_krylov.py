"""Shift-invert, against `eigh`."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from matrices import TINY, assert_eigenpairs, psd, spectrum_of, with_eigenvalues

from benchmarks.solver_counts import Counts
from nullspace.solvers import bottom_eigenpairs, decomposition_cost, krylov, triangular
from nullspace.solvers.cost import choose_method, invert_cost, tuning
from nullspace.solvers.krylov import Tuning, complement, shift_invert, smaller_remains
from nullspace.solvers.triangular import Factor

# As on a CPU; as on CUDA, with the whole inverse, substitution by blocks, and the library's triangular solver.
TUNINGS = {
    "cpu": tuning(700, 40),
    "cuda": tuning(700, 40, "cuda"),
    "cuda, blocks": Tuning(8, 256, cholesky=True),
    "cuda, library": Tuning(8, 0, cholesky=True),
}


@functools.cache
def known_matrix(kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """X, C = XᵀX, and all pairs of C."""
    d = 700
    values = spectrum_of(kind, d)
    x = torch.from_numpy(np.sqrt(values))[:, None] * with_eigenvalues([1.0] * d, seed=3)[1].T
    c = x.T @ x
    c = (c + c.T) / 2
    return x, c, *torch.linalg.eigh(c)


@pytest.mark.parametrize(
    ("route", "k"), [("cpu", 1), ("cpu", 20), ("cpu", 40), ("cuda", 20), ("cuda, library", 40), ("cuda, blocks", 40)]
)
@pytest.mark.parametrize("kind", ["layer", "steep", "massive", "some zeros", "wide null space", "all equal"])
def test_shift_invert_finds_what_eigh_finds(kind: str, k: int, route: str) -> None:
    d = 700
    x, c, every, all_vectors = known_matrix(kind)
    result = shift_invert(c, k, TUNINGS[route])
    assert result is not None, "it fell back"
    known, vectors = result
    assert len(known) >= k + 1
    assert float((c @ vectors - vectors * known[:k]).norm() / c.norm()) <= TINY
    assert float((vectors.T @ vectors - torch.eye(k, dtype=torch.float64)).norm()) <= TINY
    assert float((known[:k] - every[:k]).abs().max()) <= 1e-14 * float(every[-1]) * math.sqrt(d)
    # The next ones too, from which the gap and the estimate of rounding are taken: never below the truth.
    assert bool((known - every[: len(known)] >= -1e-13 * every[-1]).all())
    ours, best = float((x @ vectors).norm()), float((x @ all_vectors[:, :k]).norm())
    assert ours <= (1 + 1e-9) * best + 1e-8 * float(x.norm()) * ("null" in kind or "zeros" in kind)


def test_the_small_problem_of_a_gpu_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    c = known_matrix("layer")[1]
    expected = shift_invert(c, 20, TUNINGS["cuda"])
    monkeypatch.setattr(krylov, "largest_pairs", krylov.largest_by_eigh)
    result = shift_invert(c, 20, TUNINGS["cuda"])
    assert expected is not None
    assert result is not None
    torch.testing.assert_close(result[0], expected[0], rtol=1e-12, atol=0.0)
    torch.testing.assert_close((result[1].mT @ expected[1]).abs(), torch.eye(20, dtype=torch.float64), rtol=0.0, atol=1e-9)


@pytest.mark.parametrize(("largest", "converges"), [(1e3, True), (1.2, False)])
def test_a_flat_spectrum_is_given_up_early(largest: float, converges: bool) -> None:
    """Eigenvalues that are evenly spaced from 1 on: the flatter, the more columns. Wide blocks would need more still."""
    c = with_eigenvalues(list(np.linspace(1, largest, 900)))[0]
    with Counts() as counts:
        assert (shift_invert(c, 24, Tuning(8)) is not None) == converges
    assert counts.ritz <= (8 if converges else 2)


def test_shift_invert_falls_back_where_there_is_no_inverse() -> None:
    c = with_eigenvalues([-1.0, 0.0, *np.linspace(1, 2, 398)])[0]
    assert all(shift_invert(c, 3, route) is None for route in TUNINGS.values())
    assert_eigenpairs(c, *bottom_eigenpairs(c, 3, method="shift-invert"), 3)


@pytest.mark.parametrize("k", [1, 20, 40])
def test_a_repeated_eigenvalue_is_not_mistaken_for_a_few(k: int) -> None:
    c = with_eigenvalues(list(spectrum_of("repeated", 700)))[0]
    values, vectors = bottom_eigenpairs(c, k, method="shift-invert")
    assert_eigenpairs(c, values, vectors, k)
    torch.testing.assert_close(values, torch.linalg.eigvalsh(c)[:k], rtol=0.0, atol=1e-14)


@pytest.mark.parametrize("route", ["cpu", "cuda"])
def test_equal_inputs_give_equal_bits(route: str) -> None:
    c = known_matrix("layer")[1]
    first, second = (shift_invert(c, 20, TUNINGS[route]) for _ in range(2))
    assert first is not None
    assert second is not None
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_what_was_missed_is_noticed() -> None:
    c, q = with_eigenvalues([0.5, *np.linspace(1, 4, 299)])
    factor = Factor(torch.linalg.cholesky(c))
    assert not smaller_remains(complement(factor, q[:, :5]), 1 / (1 + 3 * 3 / 298))
    assert smaller_remains(complement(factor, q[:, 1:6]), 1 / (1 + 4 * 3 / 298))


@pytest.mark.parametrize(("kind", "device"), [("layer", "cpu"), ("layer", "cuda"), ("some zeros", "cuda")])
def test_beside_c_and_its_factor_nothing_has_d_squared_entries(kind: str, device: str) -> None:
    d, k = 900, 24
    c = with_eigenvalues(list(spectrum_of(kind, d)))[0]
    with Counts() as counts:
        assert shift_invert(c, k, tuning(d, k, device)) is not None
    assert counts.peak >= 8 * d * d  # the factor
    # One matrix more would not fit into what the space and the small problem leave of this.
    assert counts.peak <= invert_cost(d, k, tuning(d, k, device))[0] - 8 * d * d
    assert counts.ritz <= 3


def test_the_widest_layer_of_a_70b_model_fits_24_gb_beside_the_sums_of_its_block() -> None:
    triangles = 4 * (28672**2 + 3 * 8192**2)
    assert choose_method(28672, 128, "cuda") == "shift-invert"
    assert decomposition_cost(28672, 128, "cuda")[0] + triangles <= 24e9


@pytest.mark.parametrize(
    ("d", "k", "every", "method"),
    [(4096, 128, False, "shift-invert"), (3584, 128, False, "shift-invert"), (3072, 128, False, "eigh"), (4096, 128, True, "eigh")],
)
def test_what_auto_takes_on_cuda(d: int, k: int, every: bool, method: str) -> None:
    assert choose_method(d, k, "cuda", every=every) == method
    # By count, shift-invert is the cheaper one wherever it is taken.
    if method == "shift-invert":
        assert decomposition_cost(d, k, "cuda")[1] <= 9.0 * d**3 / 2


@pytest.mark.parametrize("block", [0, 1, 7, 64, 99, 100, 1000])
def test_the_factor_is_applied_alike_by_blocks_of_any_order(block: int) -> None:
    d = 100
    c = psd(d)
    x = torch.randn(d, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    solved = Factor(torch.linalg.cholesky(c), block).solve(x)
    torch.testing.assert_close(c @ solved, x, rtol=0.0, atol=1e-9)


def test_a_large_triangle_is_inverted_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triangular, "PANEL", 16)
    lower = torch.linalg.cholesky(psd(90))
    inverse = lower.clone()
    triangular.invert_(inverse)
    assert torch.equal(inverse, inverse.tril())
    torch.testing.assert_close(inverse @ lower, torch.eye(90, dtype=torch.float64), rtol=0.0, atol=1e-9)
