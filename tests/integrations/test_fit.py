"""What PEFT makes of names: found out before a calibration, and kept exact where PEFT would rewrite them."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import EvaConfig, LoraConfig, PeftModel
from peft.tuners.lora.config import CordaConfig
from torch import nn

from models import SMALL, random_batches, tiny
from nullspace import NullSpaces, compute_null_spaces
from nullspace.integrations.peft import fit_config, get_eva_state_dict, inject_adapters, preprocess_corda, save_init, write_init
from nullspace.model.sites import find_targets

RANK = 4
BATCHES = random_batches(2, 2, 64)
TWO = {**SMALL, "num_hidden_layers": 2}
MLP = ("gate_proj", "up_proj", "down_proj")


def deepseek() -> nn.Module:
    """A dense layer and one with routed and shared experts, whose projections PEFT takes for parameters of the routed ones."""
    torch.manual_seed(0)
    heads = {"num_key_value_heads": 4, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32}
    config = transformers.DeepseekV3Config(**TWO, **heads, **experts, n_shared_experts=1, first_k_dense_replace=1, q_lora_rank=None)
    return transformers.DeepseekV3ForCausalLM(config).eval()


def mamba() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=211, hidden_size=48, state_size=8, num_hidden_layers=2, time_step_rank=8)
    return transformers.MambaForCausalLM(config).eval()


def adapted(model: nn.Module) -> set[str]:
    names = (name.partition(".lora_A.") for name in model.state_dict())
    return {name.removeprefix("base_model.model.") for name, found, _ in names if found}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=BATCHES[0]["input_ids"]).logits


@pytest.fixture(scope="module")
def spaces() -> NullSpaces:
    return compute_null_spaces(deepseek(), BATCHES, rank=RANK, exclude="experts", progress=False)


@pytest.mark.parametrize("how", ["none", "full", "suffixes", "part", "expression", "all-linear"])
def test_exactly_the_named_layers_get_adapters(spaces: NullSpaces, how: str) -> None:
    wanted, targets = set(spaces), None
    if how == "full":
        targets = wanted = {name for name in spaces if name.endswith(("q_proj", *MLP))}
    elif how in ("suffixes", "part"):
        targets = ["q_proj", *(MLP if how == "suffixes" else ["up_proj"])]
        wanted = {name for name in spaces if name.endswith(tuple(targets))}
    elif how == "expression":
        targets = r".*layers\.1\.(mlp\.shared_experts|self_attn)\.\w+"
        wanted = {name for name in spaces if "layers.1." in name}
    elif how == "all-linear":
        targets = "all-linear"
    model = deepseek()
    before = logits(model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        peft_model = inject_adapters(model, LoraConfig(r=RANK, target_modules=targets), spaces)
    assert adapted(peft_model) == wanted
    torch.testing.assert_close(logits(peft_model), before, rtol=0, atol=1e-6)
    assert any("for parameters of its experts too" in str(w.message) for w in said) == (how in ("suffixes", "part", "expression"))


@pytest.mark.parametrize("write", [True, False])
def test_what_is_saved_loads_in_plain_peft(spaces: NullSpaces, write: bool, tmp_path: Path) -> None:
    config = LoraConfig(r=RANK, lora_alpha=6, rank_pattern={"gate_proj": 2}, alpha_pattern={"mlp.gate_proj": 3})
    model = deepseek()
    before = logits(model)
    if write:
        write_init(tmp_path / "out", model, config, spaces, progress=False)
    else:
        save_init(tmp_path / "out", inject_adapters(model, config, spaces), spaces)
    saved = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert isinstance(saved["target_modules"], list)
    assert not any(name.endswith(MLP) for name in saved["target_modules"])
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base").eval()
    assert not torch.allclose(logits(base), before, atol=1e-5)
    loaded = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter", is_trainable=True)
    torch.testing.assert_close(logits(loaded), before, rtol=0, atol=1e-6)
    assert adapted(loaded) == set(spaces)
    layer = loaded.get_submodule("base_model.model.model.layers.0.mlp.gate_proj")
    assert (layer.r["default"], layer.scaling["default"]) == (2, 1.5)
    loaded(input_ids=BATCHES[0]["input_ids"], labels=BATCHES[0]["input_ids"]).loss.backward()
    assert all(p.grad is not None for name, p in loaded.named_parameters() if "lora_" in name)
    torch.testing.assert_close(logits(loaded.merge_and_unload()), before, rtol=0, atol=1e-6)


def test_a_second_adapter_subtracts_there_too(spaces: NullSpaces) -> None:
    model = deepseek()
    before, weights = logits(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    peft_model = inject_adapters(model, LoraConfig(r=RANK), spaces, residual="adapter", freeze_a=True)
    torch.testing.assert_close(logits(peft_model), before, rtol=0, atol=1e-6)
    state = peft_model.get_base_model().state_dict()
    assert all(torch.equal(state[name], w) for name, w in weights.items() if name in state)
    assert {n.partition(".lora_")[2][0] for n, p in peft_model.named_parameters() if p.requires_grad} == {"B"}


def test_a_configuration_that_peft_takes_as_it_is_stays_as_it_is() -> None:
    model = tiny("llama")
    for targets in (["q_proj", "down_proj"], r".*\.q_proj"):
        config = LoraConfig(r=RANK, target_modules=targets)
        fitted = fit_config(config, model, find_targets(model, targets))
        assert (fitted.target_modules, fitted.target_parameters) == (config.target_modules, None)
        assert fitted is not config


def test_a_full_name_that_ends_another_is_kept_exact() -> None:
    model = nn.ModuleDict({"q": nn.Linear(8, 8), "block": nn.ModuleDict({"q": nn.Linear(8, 8)})})
    fitted = fit_config(LoraConfig(r=2, target_modules=["q"]), model, find_targets(model, "q"))
    assert fitted.target_modules == "q"


def test_what_the_wrapper_of_parameters_cannot_do_is_refused_by_name(spaces: NullSpaces) -> None:
    model = deepseek()
    targets = ["model.layers.0.mlp.gate_proj", "model.layers.0.self_attn.q_proj"]
    config = LoraConfig(r=RANK, target_modules=targets, lora_dropout=0.1)
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.mlp\.gate_proj' gets no adapter from PEFT"):
        inject_adapters(model, config, spaces)
    assert not adapted(model)


@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_mambas_out_proj_is_left_out_of_all_linear(targets: Any) -> None:
    model, batches = mamba(), [{"input_ids": batch["input_ids"]} for batch in BATCHES]
    with pytest.warns(UserWarning, match="dt_proj' .* was never called"):
        found = compute_null_spaces(model, batches, rank=RANK, progress=False)
    before = logits(model)
    with pytest.warns(UserWarning, match=r"'backbone\.layers\.0\.mixer\.out_proj' .* gets no adapter from PEFT"):
        peft_model = inject_adapters(model, LoraConfig(r=RANK, target_modules=targets), found)
    assert {name.rpartition(".")[2] for name in adapted(peft_model)} == {"in_proj", "x_proj"}
    torch.testing.assert_close(logits(peft_model), before, rtol=1e-4, atol=1e-5)


def test_mambas_out_proj_is_refused_before_a_calibration_where_it_is_asked_for() -> None:
    model = mamba()
    targets = ["in_proj", "out_proj"]
    with pytest.raises(ValueError, match=r"'backbone\.layers\.0\.mixer\.out_proj' gets no adapter from PEFT: .*Mamba"):
        fit_config(LoraConfig(r=RANK, target_modules=targets), model, find_targets(model, targets))


class Tupled(nn.Linear):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x), None


class WithRouter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.router, self.spare = nn.Linear(12, 12), Tupled(12, 12), nn.Linear(12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(x) + self.router(x)[0]


def test_methods_without_data_look_at_outputs_too() -> None:
    with pytest.warns(UserWarning, match=r"'router' \(Tupled\) returns tuple"):
        peft_model = inject_adapters(WithRouter(), LoraConfig(r=2, target_modules="all-linear"), method="pissa")
    assert adapted(peft_model) == {"up", "spare"}


def test_corda_and_eva_leave_out_the_same() -> None:
    model, x = WithRouter(), torch.randn(40, 12)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights="corda", corda_config=CordaConfig(corda_method="kpm"))
    with pytest.warns(UserWarning, match=r"'router' \(Tupled\) returns tuple.*'spare' was never called"):
        preprocess_corda(model, config, run_model=lambda: model(x))
    assert config.target_modules == ["up"]
    eva = LoraConfig(r=2, target_modules="all-linear", init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
    with pytest.warns(UserWarning, match=r"'router' \(Tupled\) returns tuple.*'spare' was never called"):
        state = get_eva_state_dict(
            WithRouter(), [{"x": x}], eva, prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None, show_progress_bar=False
        )
    assert {name: tuple(a.shape) for name, a in state.items()} == {"up": (2, 12)}


def test_corda_says_before_the_run_what_peft_would_adapt_instead() -> None:
    targets = ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"]
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights="corda", corda_config=CordaConfig(corda_method="kpm"))
    with pytest.raises(ValueError, match=r"it leaves out 'model\.layers\.0\.mlp\.gate_proj' and it takes .*experts"):
        preprocess_corda(deepseek(), config, run_model=lambda: pytest.fail("the model was run"))


def test_layers_that_peft_would_not_read_again_are_left_out(tmp_path: Path) -> None:
    if not hasattr(transformers, "LagunaForCausalLM"):
        pytest.skip("this transformers has no model whose names PEFT renames")
    torch.manual_seed(0)
    sizes = {"num_key_value_heads": 2, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    config = transformers.LagunaConfig(**TWO, **sizes, shared_expert_intermediate_size=32)
    model = transformers.LagunaForCausalLM(config).eval()
    shared = "model.layers.1.mlp.shared_experts.up_proj"
    with pytest.raises(ValueError, match=rf"target '{re.escape(shared)}' gets no adapter: PEFT saves its factors"):
        fit_config(LoraConfig(r=2), model, find_targets(model, [shared]))
    before = logits(model)
    with pytest.warns(UserWarning, match=r"shared_experts\.\w+' .* gets no adapter"):
        write_init(tmp_path / "out", model, LoraConfig(r=2, target_modules="all-linear"), method="milora", progress=False)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base").eval()
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")), before, rtol=0, atol=1e-5)
