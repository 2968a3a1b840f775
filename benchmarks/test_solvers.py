"""The solvers under pytest-benchmark, small enough to be run by the way: `python -m pytest benchmarks/test_solvers.py`.

The methods of one matrix come one after the other; `python -m benchmarks.solvers` is the thorough comparison, up to full size.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from benchmarks.solvers import SPECTRA, activations, methods, second_moment


@functools.lru_cache(maxsize=1)
def matrix(spectrum: str, d: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = activations(spectrum, d)
    return x, second_moment(x)


@pytest.mark.parametrize("method", methods(1024))
@pytest.mark.parametrize("k", [32, 64])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_bottom_eigenpairs(benchmark: Any, spectrum: str, k: int, method: str) -> None:
    x, c = matrix(spectrum, 1024)
    rounds = {"rounds": 1} if method == "torch.lobpcg" else {"rounds": 3, "warmup_rounds": 1}
    _, vectors = benchmark.pedantic(methods(1024)[method], args=(c, k), **rounds)
    best = torch.linalg.eigh(c)[1][:, :k]
    benchmark.extra_info["excess leak"] = excess = float((x @ vectors).norm() / (x @ best).norm()) - 1
    if method != "torch.lobpcg":
        assert excess <= 1e-9
