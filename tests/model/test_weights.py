"""Weights that accelerate keeps on the disk are read, whatever other hooks a module has."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import disk_offload
from accelerate.hooks import ModelHook, SequentialHook, add_hook_to_module
from accelerate.utils import has_offloaded_params
from torch import nn

from nullspace.model import weights
from nullspace.model.weights import Loaded, execution_device, refuse_meta, tensor_of


@pytest.mark.parametrize("hooked", [False, True])
def test_a_module_with_a_hook_of_its_own_is_read_too(tmp_path: Path, hooked: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    weight, x = model[0].weight.detach().clone(), torch.ones(1, 4)
    before = model(x)
    if hooked:
        add_hook_to_module(model[0], ModelHook())
    disk_offload(model, tmp_path, torch.device("cpu"), offload_buffers=True)
    layer = model[0]
    assert layer.weight.device.type == "meta"
    assert has_offloaded_params(layer) is not hooked  # accelerate does not look into a chain of hooks
    assert torch.equal(tensor_of(layer, "weight"), weight)
    assert execution_device(layer) == torch.device("cpu")
    refuse_meta(model)
    loaded = Loaded(model, torch.device("cpu"))
    own = layer._parameters["weight"]
    with loaded:
        assert torch.equal(layer.weight, weight)
        assert torch.equal(model(x), before)
    assert layer._parameters["weight"] is own
    loaded.close()
    assert torch.equal(model(x), before)  # accelerate loads the weights again


def test_a_parameter_at_the_root_and_hooks_in_chains_of_chains_are_read_too(tmp_path: Path) -> None:
    """accelerate chains two hooks of its own at a root with parameters; another `append` makes a chain of that chain."""
    model = nn.Sequential(nn.Linear(4, 4))
    model.register_parameter("scale", nn.Parameter(torch.arange(4.0)))
    disk_offload(model, tmp_path, torch.device("cpu"))
    assert isinstance(model._hf_hook, SequentialHook)
    for part in (model, model[0]):
        add_hook_to_module(part, ModelHook(), append=True)
        add_hook_to_module(part, ModelHook(), append=True)
    assert any(isinstance(hook, SequentialHook) for hook in model[0]._hf_hook.hooks)
    assert execution_device(model) == execution_device(model[0]) == torch.device("cpu")
    refuse_meta(model)
    assert torch.equal(tensor_of(model, "scale"), torch.arange(4.0))
    loaded = Loaded(model, torch.device("cpu"))
    with loaded:
        assert {tensor.device.type for tensor in model.parameters()} == {"cpu"}
        assert model(torch.ones(1, 4)).shape == (1, 4)
    loaded.close()


class FakeStream:
    def __init__(self, log: list[str], name: str) -> None:
        self._log, self._name, self._events = log, name, 0

    def record_event(self) -> FakeEvent:
        self._events += 1
        return FakeEvent(self._log, f"{self._name} {self._events}")

    def wait_event(self, event: FakeEvent) -> None:
        self._log.append(f"{self._name} < {event.name}")


class FakeEvent:
    def __init__(self, log: list[str], name: str) -> None:
        self._log, self.name = log, name

    def synchronize(self) -> None:
        self._log.append(f"host < {self.name}")


def test_all_blocks_are_read_on_one_stream_with_two_pinned_copies_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    streams: dict[Any, FakeStream] = {}

    def side_stream(device: torch.device, use: str, number: int = 0) -> FakeStream:
        return streams.setdefault((device, use, number), FakeStream(log, use))

    monkeypatch.setattr(weights, "side_stream", side_stream)
    monkeypatch.setattr(weights, "with_index", lambda device: device)
    monkeypatch.setattr(weights, "upload", lambda tensor, device: log.append("copies") or tensor.clone())
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: FakeStream(log, "computes"))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: log.append("memory is used by the model's stream"))
    for _ in range(2):
        block = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        loaded = Loaded(block, torch.device("cuda", 0))
        with loaded:
            pass
        loaded.close()
    used = ["memory is used by the model's stream"] * 3
    first = ["copies", "copies", "host < weights 1", "copies", "computes < weights 4", *used]
    assert log == [*first, "copies", "copies", "host < weights 5", "copies", "computes < weights 8", *used]
    assert len(streams) == 1
