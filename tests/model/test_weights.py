"""Weights that accelerate keeps on the disk are read, whatever other hooks a module has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import disk_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import has_offloaded_params
from torch import nn

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
