"""A task, text that must be kept, and adapters that were trained: what filters are tested with."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from models import tiny
from nullspace import Covariances, stream_covariances
from nullspace.artifacts.identity import weights_of
from nullspace.factors import RIDGE
from nullspace.model.sites import find_targets
from reference import recorded_inputs, second_moment

RANK = 4
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}


def batches(first: int, last: int) -> list[dict[str, torch.Tensor]]:
    """Token ids from a part of the vocabulary: what a task and other text differ in."""
    generator = torch.Generator().manual_seed(first)
    return [{"input_ids": torch.randint(first, last, (4, 48), generator=generator)} for _ in range(3)]


TASK, KEEP = batches(3, 60), batches(40, 210)


def covariances_of(model: nn.Module, data: list[dict[str, torch.Tensor]]) -> Covariances:
    return Covariances(stream_covariances(model, data, precision="fp64", progress=False), weights_of(find_targets(model)))


@functools.cache
def moments(family: str) -> tuple[Covariances, Covariances]:
    """Of the task and of what must be kept."""
    return covariances_of(tiny(family), TASK), covariances_of(tiny(family), KEEP)


@functools.cache
def inputs(family: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Layer → its inputs in the untouched model, (tokens, d_in) float64: of the task, and of what must be kept."""
    both = (recorded_inputs(tiny(family), each, list(moments(family)[0])) for each in (TASK, KEEP))
    task, keep = ({name: x.double() for name, x in each.items()} for each in both)
    return task, keep


def stir(model: nn.Module, size: float = 0.02, seed: int = 3) -> None:
    """In place of a training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))


@functools.cache
def dense_filter(family: str, name: str, strength: float) -> torch.Tensor:
    """F of the formula, (d_in, d_in) float64, from the inputs themselves."""
    c_task, c_keep = (second_moment(x[name]) / x[name].square().sum() for x in inputs(family))
    t = c_task + RIDGE / len(c_task) * torch.eye(len(c_task), dtype=torch.float64)
    return torch.linalg.solve(t + strength * c_keep, t).mT.contiguous()


def effects(model: PeftModel, family: str = "llama") -> dict[str, torch.Tensor]:
    """Layer → what PEFT's own layer computes beyond the untouched one: ΔW, (d_out, d_in) float64. The model becomes float64."""
    model = model.double().eval()
    modules = {name: m for name, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    base = tiny(family).double()
    changes = {}
    with torch.no_grad():
        for name, module in modules.items():
            units = torch.eye(module.in_features, dtype=torch.float64)
            changes[name] = (module(units) - base.get_submodule(name)(units)).mT
    return changes


def check_filtered(
    before: Mapping[str, torch.Tensor],
    after: Mapping[str, torch.Tensor],
    strength: float,
    *,
    family: str = "llama",
    tolerance: float = 2e-6,
    scale: float = 1.0,
) -> None:
    """ΔW′ = ΔW F, times the scale, in every layer; relative to ‖ΔW‖."""
    assert before.keys() == after.keys()
    for name, change in before.items():
        wanted = scale * change @ dense_filter(family, name, strength)
        assert float((after[name] - wanted).norm()) <= tolerance * float(change.norm()), name
