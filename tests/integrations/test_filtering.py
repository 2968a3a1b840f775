"""`filter_adapter` and `adapter_drift`, against dense products on materialised inputs, and against PEFT's own forward."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn

from models import tiny
from nullspace import Covariances, stream_covariances
from nullspace.artifacts.identity import weights_of
from nullspace.factors import RIDGE
from nullspace.integrations.peft import (
    adapter_drift,
    filter_adapter,
)
from nullspace.model.linear import is_conv1d
from nullspace.model.sites import find_targets
from reference import recorded_inputs, second_moment

RANK = 4
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}
quiet = functools.partial(filter_adapter, progress=False)


def batches(first: int, last: int) -> list[dict[str, torch.Tensor]]:
    """Token ids from a part of the vocabulary: what a task and other text differ in."""
    generator = torch.Generator().manual_seed(first)
    return [{"input_ids": torch.randint(first, last, (4, 48), generator=generator)} for _ in range(3)]


TASK, KEEP = batches(3, 60), batches(40, 210)


@functools.cache
def moments(family: str) -> tuple[Covariances, Covariances]:
    """Of the task and of what must be kept."""
    model = tiny(family)
    made = [Covariances(stream_covariances(model, each, precision="fp64", progress=False)) for each in (TASK, KEEP)]
    weights = weights_of(find_targets(model))
    task, keep = (Covariances([(site, each[site.name]) for site in each.sites], weights) for each in made)
    return task, keep


@functools.cache
def inputs(family: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Layer → its inputs in the untouched model, (tokens, d_in) float64."""
    names = [name for name in moments(family)[0] if name.endswith(tuple(TARGETS[family]))]
    both = (recorded_inputs(tiny(family), each, names) for each in (TASK, KEEP))
    task, keep = ({name: x.double() for name, x in each.items()} for each in both)
    return task, keep


def stir(model: nn.Module, size: float = 0.02, seed: int = 3) -> None:
    """In place of a training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def dense_filter(family: str, name: str, strength: float) -> torch.Tensor:
    """F of the formula, (d_in, d_in) float64, from the inputs themselves."""
    c_task, c_keep = (second_moment(x[name]) / x[name].square().sum() for x in inputs(family))
    t = c_task + RIDGE / len(c_task) * torch.eye(len(c_task), dtype=torch.float64)
    return torch.linalg.solve(t + strength * c_keep, t).mT.contiguous()


def effects(model: PeftModel, family: str) -> dict[str, torch.Tensor]:
    """Layer → what the adapted layer of PEFT computes beyond the untouched one: ΔW of every unit input, (d_out, d_in)."""
    model = model.double().eval()
    modules = {name: m for name, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    base = tiny(family).double()
    changes = {}
    with torch.no_grad():
        for name, module in modules.items():
            units = torch.eye(module.in_features, dtype=torch.float64)
            changes[name] = (module(units) - base.get_submodule(name)(units)).mT
    return changes


def check_filtered(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor], family: str, strength: float) -> None:
    assert before.keys() == after.keys()
    for name, change in before.items():
        wanted = change @ dense_filter(family, name, strength)
        assert (after[name] - wanted).norm() <= 2e-6 * change.norm(), name


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"lora_alpha": 12},
    "rslora": {"lora_alpha": 12, "use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 9, "layers.1.mlp.down_proj": 2}},
    "gpt2": {"fan_in_fan_out": True},
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_layers_answer_as_the_formula_says_and_as_forecast(kind: str, tmp_path: Path) -> None:
    family = "gpt2" if kind == "gpt2" else "llama"
    model = get_peft_model(tiny(family), LoraConfig(**{"r": RANK, "target_modules": TARGETS[family], **CONFIGS[kind]}))
    stir(model)
    model.save_pretrained(tmp_path / "trained")
    task, keep = moments(family)
    result = quiet(tmp_path / "trained", task, keep, tmp_path / "out", strength=2.0, base=tiny(family))
    live = quiet(model, task, keep, strength=2.0)
    assert live.path == result.path
    before, after, in_place = (
        effects(each, family)
        for each in (
            PeftModel.from_pretrained(tiny(family), tmp_path / "trained"),
            PeftModel.from_pretrained(tiny(family), tmp_path / "out"),
            model,
        )
    )
    check_filtered(before, after, family, 2.0)
    check_filtered(before, in_place, family, 2.0)
    # The forecast is what happens to the outputs.
    x_task, x_keep = inputs(family)
    base = tiny(family).double()
    at = result.path.strengths.index(2.0)
    for layer in result.path.layers:
        name, forecast = layer.layer, layer.forecasts[at]
        moved = [float((x[name] @ after[name].mT).norm() / (x[name] @ before[name].mT).norm()) for x in (x_task, x_keep)]
        assert forecast.drift == pytest.approx(moved[1], rel=1e-4)
        assert forecast.response == pytest.approx(moved[0], rel=2e-2)  # with the ridge
        module: Any = base.get_submodule(name)
        weight = module.weight.detach() if not is_conv1d(module) else module.weight.detach().mT
        output = float((x_keep[name] @ weight.mT).norm())
        assert layer.drift == pytest.approx(float((x_keep[name] @ before[name].mT).norm()) / output, rel=1e-4)
    assert result.after.drift is not None
    drift = adapter_drift(tmp_path / "out", keep, tiny(family), progress=False)
    assert drift.median == pytest.approx(result.after.drift, rel=1e-4)
    assert (drift.worst, drift.worst_layer) == (pytest.approx(result.after.worst_drift, rel=1e-4), result.after.worst_layer)


def test_strength_zero_changes_no_bit_and_the_rest_of_the_adapter_never_changes(tmp_path: Path) -> None:
    model = get_peft_model(tiny("llama"), LoraConfig(r=RANK, lora_alpha=12, target_modules=["q_proj"], **CONFIGS["patterns"]))
    stir(model)
    model.bfloat16().save_pretrained(tmp_path / "trained")
    for strength in (0.0, 1.0):
        quiet(tmp_path / "trained", *moments("llama"), tmp_path / "out", strength=strength, overwrite=True)
        before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("trained", "out"))
        assert {t.dtype for t in after.values()} == {torch.bfloat16}
        changed = {key for key, t in before.items() if not torch.equal(t, after[key])}
        assert changed == (set() if strength == 0 else {key for key in before if "lora_A" in key})
        old, new = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("trained", "out"))
        assert {key for key in old if old[key] != new[key]} <= {"inference_mode"}
