"""Sites on simulated GPUs are solved in threads, on streams of their own, beside the next block: no race, and equal bits."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("simulated.runtime", exc_type=ImportError)

from simulated.references import batches_of, model_of, spread

from nullspace import compute_null_spaces
from nullspace.solvers.lanes import CudaLanes


@pytest.mark.parametrize("strategy", ["resident", "layerwise"])
@pytest.mark.parametrize("devices", [1, 2])
def test_null_spaces(devices: int, strategy: str, gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    solved: list[tuple[threading.Thread, torch.device]] = []
    run = CudaLanes.run

    def watched(lanes: CudaLanes, mark: Any, work: Callable[[], Any]) -> Any:
        solved.append((threading.current_thread(), lanes._device))
        return run(lanes, mark, work)

    monkeypatch.setattr(CudaLanes, "run", watched)
    model = model_of("llama").to("cuda") if devices == 1 else spread((0, 1, 0))[0]
    found, again = (compute_null_spaces(model, batches_of("left"), rank=4, strategy=strategy, progress=False) for _ in range(2))
    sites = len({space.site for space in found.values()})
    assert len(solved) >= 2 * sites
    assert threading.main_thread() not in {thread for thread, _ in solved}
    assert {device.index for _, device in solved} == set(range(devices))
    expected = compute_null_spaces(model_of("llama"), batches_of("left"), rank=4, strategy=strategy, progress=False)
    assert list(found) == list(expected)
    for name, space in found.items():
        assert torch.equal(space.basis.cpu(), again[name].basis.cpu())
        assert space.leak == pytest.approx(expected[name].leak, rel=1e-4)
