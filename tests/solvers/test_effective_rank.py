"""The effective rank of a spectrum, by its properties."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nullspace.solvers import effective_rank

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
