"""`convert_to_lora`: other methods' adapters as LoRAs, against PEFT's function of this name on the inputs themselves."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from calibrated import covariances_for
from plain_peft import PlainPeft
from safetensors.torch import save_file
from tasks import stir
from torch import nn

from models import random_batches, tiny
from nullspace import Covariance, Covariances, Site
from nullspace.integrations.peft import convert_to_lora
from reference import recorded_inputs

PREFIX, RANK = "base_model.model.", 3
TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}
METHODS: dict[str, Any] = {
    "loha": lambda targets: peft.LoHaConfig(r=4, alpha=4, target_modules=targets),
    "lokr": lambda targets: peft.LoKrConfig(r=4, alpha=4, target_modules=targets),
    "vera": lambda targets: peft.VeraConfig(r=16, target_modules=targets, d_initial=0.5),
}
CASES = [(method, "llama") for method in METHODS] + [("vera", "gpt2")]


def adapted(method: str, family: str = "llama") -> peft.PeftModel:
    """A model whose adapter has been changed by more than a training would."""
    targets = TARGETS[family]
    if method == "vera" and family == "llama":  # whose layers share one A and one B, so they have to be of one shape
        targets = ["q_proj", "o_proj"]
    model = peft.get_peft_model(tiny(family), METHODS[method](targets)).eval()
    stir(model, 0.2)
    return model


def changes(model: peft.PeftModel, family: str) -> dict[str, torch.Tensor]:
    """Layer → what its adapter adds, from its own forward pass: ΔW, (d_out, d_in) float64."""
    found = {}
    double = copy.deepcopy(model).double()
    base = tiny(family).double()
    for name, module in double.named_modules():
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            plain = base.get_submodule(name.removeprefix(PREFIX))
            units = torch.eye(plain.weight.shape[0 if family == "gpt2" else 1], dtype=torch.float64)
            with torch.no_grad():
                found[name] = (module(units) - plain(units)).mT
    return found


@pytest.mark.parametrize(("method", "family"), CASES)
def test_each_layer_is_the_best_of_its_rank_on_the_inputs_and_never_worse_than_pefts(method: str, family: str) -> None:
    model = adapted(method, family)
    config, tensors = convert_to_lora(model, RANK, covariances=covariances_for(family))
    own_config, own_tensors = peft.convert_to_lora(model, RANK)
    assert config.to_dict() == own_config.to_dict()
    assert {key: (t.shape, t.dtype) for key, t in tensors.items()} == {key: (t.shape, t.dtype) for key, t in own_tensors.items()}
    deltas = changes(model, family)
    inputs = recorded_inputs(tiny(family), random_batches(), [name.removeprefix(PREFIX) for name in deltas])
    assert deltas
    for name, delta in deltas.items():
        x = inputs[name.removeprefix(PREFIX)].double().mT
        size = float((delta @ x).norm())

        def error(of: dict[str, torch.Tensor], name: str = name, delta: torch.Tensor = delta, x: torch.Tensor = x) -> float:
            product = of[f"{name}.lora_B.weight"].double() @ of[f"{name}.lora_A.weight"].double()
            return float(((delta - product) @ x).norm())

        best = float(torch.linalg.svdvals(delta @ x)[RANK:].norm())
        assert error(tensors) == pytest.approx(best, abs=1e-5 * size)
        assert error(tensors) <= error(own_tensors) + 1e-5 * size
        assert size > 0


def test_the_ranks_that_peft_chooses_by_a_share_are_kept() -> None:
    model = adapted("loha")
    config, tensors = convert_to_lora(model, 0.7, covariances=covariances_for("llama"))
    own, _ = peft.convert_to_lora(model, 0.7)
    assert config.rank_pattern == own.rank_pattern
    assert len(set(config.rank_pattern.values())) > 1
    for name, rank in config.rank_pattern.items():
        assert len(tensors[f"{PREFIX}{name}.lora_A.weight"]) == rank


@pytest.mark.processes
def test_what_is_saved_loads_in_plain_peft_and_at_full_rank_is_the_adapter(tmp_path: Path, plain_peft: PlainPeft) -> None:
    model, batch = adapted("lokr"), random_batches(1)[0]
    tiny("llama").save_pretrained(tmp_path / "base")
    with torch.no_grad():
        before = model(**batch).logits
    config, tensors = convert_to_lora(model, 48, covariances=covariances_for("llama"))
    config.save_pretrained(tmp_path / "lora")
    save_file(tensors, tmp_path / "lora" / "adapter_model.safetensors")
    after = plain_peft.logits(tmp_path / "lora", batch, base=tmp_path / "base")
    assert float((after - before).norm()) <= 1e-4 * float(before.norm())


def test_pefts_factors_of_miss_stay_as_they_are() -> None:
    model = peft.get_peft_model(tiny("llama"), peft.MissConfig(r=4, target_modules=["q_proj"]))
    stir(model, 0.2)
    _, tensors = convert_to_lora(model, 2, covariances=covariances_for("llama"))
    _, own = peft.convert_to_lora(model, 2)
    assert all(torch.equal(tensors[key], own[key]) for key in own)


def test_layers_without_a_second_moment_and_other_models_are_refused() -> None:
    model = adapted("loha")
    name = "model.layers.0.self_attn.q_proj"
    few = Covariances([(Site((name,), 48), Covariance.from_matrix(torch.eye(48)))])
    with pytest.raises(ValueError, match=r"down_proj.*no second moment"):
        convert_to_lora(model, RANK, covariances=few)
    stir(model.get_base_model(), 0.5)
    with torch.no_grad():
        model.get_base_model().get_submodule(name).get_base_layer().weight.add_(1.0)
    with pytest.raises(ValueError, match=r"another|other"):
        convert_to_lora(model, RANK, covariances=covariances_for("llama"))
    with pytest.raises(TypeError, match="support"):
        convert_to_lora(nn.Linear(3, 3), RANK, covariances=few)


def test_a_change_that_holds_nan_names_the_layer() -> None:
    model = adapted("loha")
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))
    with pytest.raises(ValueError, match=r"'model.layers.0.self_attn.q_proj' .*NaN"):
        convert_to_lora(model, RANK, covariances=covariances_for("llama"))
