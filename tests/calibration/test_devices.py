"""A model spread over devices, as accelerate's `device_map` leaves it: every sum, and every solve, is where its site is."""

from __future__ import annotations

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import LoraConfig
from torch import nn

from models import random_batches, tiny
from nullspace import Covariance, compute_null_spaces, solvers, stream_covariances
from nullspace.integrations.peft import inject_adapters
from reference import excess_over, relative_error

GPUS = [
    pytest.param(("cuda:0", "cpu"), id="a GPU and the host", marks=pytest.mark.gpu),
    pytest.param(("cuda:0", "cuda:1"), id="two GPUs", marks=pytest.mark.gpu),
]


@pytest.fixture(params=[pytest.param(("cpu", "cpu"), id="the host twice"), *GPUS])
def devices(request: pytest.FixtureRequest) -> list[torch.device]:
    found = [torch.device(name) for name in request.param]
    if sum(d.type == "cuda" for d in found) > torch.cuda.device_count():
        pytest.skip("needs more GPUs")
    return found


def spread(model: nn.Module, devices: list[torch.device]) -> dict[str, torch.device]:
    """Put the blocks of a Llama onto devices in turn, what is ahead of them onto the first, what is behind onto the last."""
    inner = model.model
    parts = {"model.embed_tokens": devices[0], "model.rotary_emb": devices[0], "model.norm": devices[-1], "lm_head": devices[-1]}
    parts |= {f"model.layers.{i}": devices[i % len(devices)] for i in range(len(inner.layers))}
    for name, device in parts.items():
        part = model.get_submodule(name).to(device)
        add_hook_to_module(part, AlignDevicesHook(execution_device=device))
    return parts


def rounding(devices: list[torch.device], same: float, other: float) -> float:
    """What to allow: float32 forward passes differ between kinds of devices."""
    return same if {device.type for device in devices} == {"cpu"} else other


@pytest.mark.parametrize("strategy", ["resident", "layerwise"])
def test_every_sum_is_where_its_site_is(devices: list[torch.device], strategy: str) -> None:
    whole, model, batches = tiny("llama"), tiny("llama"), random_batches(padding="right")
    where = spread(model, devices)
    expected = dict(stream_covariances(whole, batches, precision="fp64", progress=False))
    found = dict(stream_covariances(model, batches, strategy=strategy, precision="fp64", progress=False))
    assert list(found) == list(expected)
    for site, covariance in found.items():
        block = ".".join(site.name.split(".")[:3])
        assert covariance.device == covariance.matrix().device == where[block]
        assert covariance.tokens == expected[site].tokens
        assert relative_error(covariance.matrix().cpu(), expected[site].matrix()) <= rounding(devices, 1e-12, 1e-5)


@pytest.mark.parametrize("strategy", ["resident", "layerwise"])
def test_every_site_is_solved_where_it_is(devices: list[torch.device], strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, model, batches = tiny("llama"), tiny("llama"), random_batches()
    where = spread(model, devices)
    solved: list[torch.device] = []
    solve = solvers.partial_eigh
    monkeypatch.setattr(solvers, "partial_eigh", lambda c, *args, **kwargs: solved.append(c.device) or solve(c, *args, **kwargs))
    found = compute_null_spaces(model, batches, rank=8, strategy=strategy, precision="fp64", progress=False)
    assert set(solved) == set(where.values())
    monkeypatch.undo()
    expected = compute_null_spaces(whole, batches, rank=8, precision="fp64", progress=False)
    sums: dict[str, Covariance] = {s.name: c for s, c in stream_covariances(whole, batches, precision="fp64", progress=False)}
    for site in expected.sites:
        assert excess_over(found[site.name].basis, expected[site.name].basis, sums[site.name].matrix()) <= rounding(
            devices, 1e-9, 1e-4
        )
    logits = whole(**batches[0]).logits
    adapted = inject_adapters(model, LoraConfig(r=8, lora_alpha=8), found)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            assert parameter.device == where[".".join(name.split("base_model.model.")[1].split(".")[:3])]
    with torch.no_grad():
        assert relative_error(adapted(**batches[0]).logits.cpu(), logits) <= 1e-5
