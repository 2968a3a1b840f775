"""The bench without a GPU: `make simulate-gpu` runs it, in an environment of its own. The ordinary suite skips it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

SIMULATING = os.environ.get("NULLSPACE_SIMULATE_GPU") == "1"

if SIMULATING:
    os.environ.pop("TRITON_INTERPRET", None)  # of the conftest above: here kernels are compiled


@pytest.fixture
def gpu(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Two simulated GPUs, and Triton's launch path; `gpu.launches` has what was launched."""
    from simulated.kernels import simulated_kernels
    from simulated.runtime import simulated_cuda

    with simulated_cuda(2) as simulation, simulated_kernels(simulation) as launches:
        simulation.launches = launches
        yield simulation


@pytest.fixture(autouse=True)
def _no_fallback() -> Iterator[None]:
    """A kernel that cannot be launched is an error here."""
    import warnings

    from nullspace.errors import ResourceUseWarning

    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceUseWarning)
        yield
