"""Adapters of experts that are one tensor: every method, against PEFT's own product, and what PEFT cannot do there."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch
from mixtures import MIXTURES, mixture, moments
from peft import LoraConfig
from peft.tuners.lora import ParamWrapper
from torch import nn

from models import random_batches
from nullspace import Covariances, NullSpaces
from nullspace.artifacts.residual import residual_mark
from nullspace.integrations.peft import check_servable, fit_config, freeze_a, inject_adapters, lora_layers
from nullspace.methods import METHODS
from nullspace.model.experts import expert_matrices, expert_of
from nullspace.model.sites import find_targets

RANK = 4
BATCH = random_batches(1, 2, 24)[0]
GATE_UP, DOWN = (f"model.layers.1.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj"))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model(**BATCH).logits


@functools.cache
def covariances_for(family: str, seed: int = 1, pooled: bool = False) -> Covariances:
    return moments(mixture(family), seed=seed, pooled=pooled)


@functools.cache
def spaces_for(family: str, pooled: bool = False) -> NullSpaces:
    return NullSpaces.from_covariances(covariances_for(family, pooled=pooled), rank=RANK, progress=False)


def sources_for(method: str, family: str) -> dict[str, Any]:
    needs = METHODS[method].needs
    return {
        **({"spaces": spaces_for(family)} if "spaces" in needs else {}),
        **({"covariances": covariances_for(family)} if "covariances" in needs else {}),
        **({"preserve": covariances_for(family, seed=2)} if "preserve" in needs else {}),
    }


def wrappers(model: nn.Module) -> dict[str, ParamWrapper]:
    """Parameter → PEFT's wrapper of it."""
    named = model.get_base_model().named_modules()
    return {f"{n.replace('.base_layer', '')}.{m.parameter_name}": m for n, m in named if isinstance(m, ParamWrapper)}


@pytest.mark.parametrize(("method", "family"), [(name, [*MIXTURES][i % 4]) for i, name in enumerate(METHODS)])
def test_every_method_starts_experts_and_leaves_the_outputs(method: str, family: str) -> None:
    model = mixture(family)
    before = logits(model)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    peft_model = inject_adapters(model, LoraConfig(r=RANK, lora_alpha=6), method=method, **sources_for(method, family))
    assert (logits(peft_model) - before).abs().max() <= 3e-6 * before.abs().max()
    layers, wrapped = lora_layers(peft_model, "default"), wrappers(peft_model)
    assert set(layers) == set(find_targets(mixture(family)))
    assert len([name for name in wrapped if not name.endswith(".weight")]) == len({n.partition("[")[0] for n in layers if "[" in n})
    for name, wrapper in wrapped.items():
        if name.endswith(".weight"):
            continue
        # PEFT's own product, in the layout of the parameter.
        delta = wrapper.get_delta_weight("default")
        torch.testing.assert_close(wrapper.get_param() + delta, weights[name], rtol=0, atol=1e-6)
        assert bool((delta.abs().amax(dim=(1, 2)) > 1e-5).all()) == METHODS[method].changes_base
        each = layers[f"{name}[2]"]
        product = each.scaling["default"] * each.lora_B["default"].weight @ each.lora_A["default"].weight
        torch.testing.assert_close(product, delta[2].mT if family == "gpt_oss" else delta[2], rtol=0, atol=1e-6)
    if method not in ("lora-null", "b-zero"):
        return
    for name in (f"{GATE_UP}[0]", f"{GATE_UP}[3]", f"{DOWN}[1]"):
        a, basis = layers[name].lora_A["default"].weight.detach().double(), spaces_for(family)[name].basis
        assert torch.linalg.norm(a - a @ basis @ basis.T) <= 1e-6 * torch.linalg.norm(a)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_the_second_adapter_and_a_frozen_start_leave_the_experts_alone(family: str) -> None:
    for freeze in (False, True):
        model = mixture(family)
        before, weights = logits(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            peft_model = inject_adapters(
                model, LoraConfig(r=RANK), spaces_for(family, pooled=True), residual="adapter", freeze_a=freeze
            )
        assert any("two adapters are active on experts" in str(each.message) for each in said)
        torch.testing.assert_close(logits(peft_model), before, rtol=0, atol=3e-6)
        for name, wrapper in wrappers(peft_model).items():
            assert torch.equal(wrapper.get_param(), weights[name])
        trainable = {name.partition(".lora_")[2][0] for name, p in peft_model.named_parameters() if p.requires_grad}
        assert trainable == ({"B"} if freeze else {"A", "B"})
    # Of one sum for all experts, every expert's A is in the same directions.
    basis = spaces_for(family, pooled=True)[f"{GATE_UP}[0]"].basis
    layers = lora_layers(peft_model, "default")
    for expert in range(4):
        a = layers[f"{GATE_UP}[{expert}]"].lora_A["default"].weight.detach().double()
        assert torch.linalg.norm(a - a @ basis @ basis.T) <= 1e-6 * torch.linalg.norm(a)


def test_b_alone_trains_after_freeze_a_also_where_peft_switches_adapters() -> None:
    peft_model = inject_adapters(mixture("mixtral"), LoraConfig(r=RANK), spaces_for("mixtral"))
    freeze_a(peft_model)
    peft_model.set_adapter("default")
    before = {name: p.clone() for name, p in peft_model.named_parameters() if ".lora_" in name}
    optimizer = torch.optim.Adam([p for p in peft_model.parameters() if p.requires_grad], lr=1e-2)
    peft_model(**BATCH, labels=BATCH["input_ids"]).loss.backward()
    optimizer.step()
    after = dict(peft_model.named_parameters())
    assert {name for name in before if not torch.equal(before[name], after[name])} == {name for name in before if "lora_B" in name}
    assert any("experts" in name for name in before)


@pytest.mark.parametrize(
    ("field", "value"), [("lora_dropout", 0.1), ("use_dora", True), ("lora_bias", True), ("fan_in_fan_out", True)]
)
def test_what_peft_has_not_for_experts_is_refused_before_a_calibration(field: str, value: Any) -> None:
    model = mixture("mixtral")
    config = LoraConfig(r=RANK, target_modules="all-linear", **{field: value})
    message = rf"LoraConfig\.{field}={value}: .*experts\.gate_up_proj.*exclude='experts'.*exclude_modules=\['experts'\]"
    for refused in (
        lambda: fit_config(config, model, find_targets(model)),
        lambda: inject_adapters(model, config, method="milora"),
    ):
        with pytest.raises(ValueError, match=message):
            refused()
    assert not any(isinstance(module, ParamWrapper) for module in model.modules())
    if field == "lora_dropout":  # and without the experts it is as ever
        config.exclude_modules = ["experts"]
        with pytest.warns(UserWarning, match="lora_dropout"):
            peft_model = inject_adapters(model, config, method="milora")
        assert wrappers(peft_model) == {}


def test_all_experts_of_a_parameter_or_none() -> None:
    model, some = mixture("mixtral"), [f"{GATE_UP}[{expert}]" for expert in (0, 1, 3)]
    for refused in (
        lambda: fit_config(LoraConfig(r=RANK), model, find_targets(model, some)),
        lambda: inject_adapters(model, LoraConfig(r=RANK, target_modules=some), method="milora"),
        lambda: inject_adapters(model, LoraConfig(r=RANK, target_modules=["q_proj", *some]), method="pissa"),
    ):
        with pytest.raises(ValueError, match=r"gives all 4 experts of '.*gate_up_proj' .* 3 of them .* number 2\)"):
            refused()
    covariances = covariances_for("mixtral")
    without = Covariances([(site, covariances[site.name]) for site in covariances.sites if site.name != f"{DOWN}[1]"])
    for target in (None, "all-linear"):
        with pytest.raises(ValueError, match=r"experts of '.*layers\.1\.mlp\.experts\.down_proj' .* number 1\)"):
            inject_adapters(model, LoraConfig(r=RANK, target_modules=target), method="eva", covariances=without)


def _adapted(config: LoraConfig, **sources: Any) -> tuple[set[str], Any]:
    """The linear layers, and the parameters of experts, that get adapters; and the model."""
    model = inject_adapters(mixture("mixtral"), config, **(sources or {"method": "orthogonal"}))
    return {str(name).partition("[")[0] for name in lora_layers(model, "default")}, model


def test_the_users_own_configuration_decides() -> None:
    experts = {name.partition("[")[0] for name in expert_matrices(mixture("mixtral"))}
    dense = {name for name in find_targets(mixture("mixtral")) if expert_of(name) is None}
    attention = {name for name in dense if name.endswith("q_proj")}
    config = functools.partial(LoraConfig, r=RANK)
    ours = ["mlp.experts.down_proj"]
    downs = {name for name in experts if name.endswith("down_proj")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert _adapted(config())[0] == dense | experts
        assert _adapted(config(target_modules="all-linear", exclude_modules=["experts"]))[0] == dense
        assert _adapted(config(target_modules="all-linear", exclude_modules=r".*\.down_proj"))[0] == (dense | experts) - downs
        assert _adapted(config(target_modules="all-linear", target_parameters=ours))[0] == dense | downs
    names, model = _adapted(config(target_modules=["q_proj"], target_parameters=ours))
    assert names == attention | downs
    assert list(model.peft_config["default"].target_parameters) == ours  # as it is, so that PEFT takes other adapters beside it
    assert _adapted(config(target_parameters=["experts.gate_up_proj", *ours]), spaces=spaces_for("mixtral"))[0] == experts
    assert _adapted(config(target_modules=list(spaces_for("mixtral"))), spaces=spaces_for("mixtral"))[0] == dense | experts
    assert _adapted(config(target_modules=["self_attn.o_proj"], target_parameters=["q_proj.weight"]))[0] == {
        name for name in dense if name.endswith(("q_proj", "o_proj"))
    }
    for target, message in {
        "experts.nothing": r"'experts\.nothing' matches no parameter of MixtralForCausalLM",
        "gate.weight": r"'model\.layers\.0\.mlp\.gate\.weight' is no weight of a linear layer or of experts",
        "embed_tokens.weight": "is no weight of a linear layer or of experts",
    }.items():
        with pytest.raises(ValueError, match=message):
            inject_adapters(mixture("mixtral"), config(target_parameters=[target]), method="milora")


def test_ranks_and_scalings_are_those_of_the_parameter() -> None:
    config = LoraConfig(
        r=RANK, lora_alpha=6, rank_pattern={"experts.gate_up_proj": 2}, alpha_pattern={r"layers\.0\.mlp\.experts\.down_proj": 1}
    )
    model = inject_adapters(mixture("qwen3_moe"), config, spaces_for("qwen3_moe"))
    layers = lora_layers(model, "default")
    assert {layers[f"{GATE_UP}[{e}]"].r["default"] for e in range(4)} == {2}
    assert layers[f"{GATE_UP}[3]"].lora_A["default"].weight.shape == (2, 32)
    assert layers[f"{GATE_UP}[3]"].lora_B["default"].weight.shape == (48, 2)
    down = layers[f"{DOWN.replace('.1.', '.0.')}[0]"]
    assert (down.r["default"], down.scaling["default"]) == (RANK, 1 / RANK)
    torch.testing.assert_close(logits(model), logits(mixture("qwen3_moe")), rtol=0, atol=3e-6)
    with pytest.raises(ValueError, match=r"'.*experts\.down_proj\[0\]' has rank 25, but its weight is 32 × 24"):
        inject_adapters(
            mixture("qwen3_moe"), LoraConfig(r=25, target_parameters=["experts.down_proj"], target_modules=[]), method="milora"
        )


def test_tied_and_quantised_experts_are_named() -> None:
    model: Any = mixture("mixtral")
    model.model.layers[1].mlp.experts.down_proj = model.model.layers[0].mlp.experts.down_proj
    layers = find_targets(model, "experts")
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.mlp\.experts\.down_proj\[0\]' is tied \(.* and .* are one tensor\)"):
        check_servable(model, layers, "milora")
    assert check_servable(model, layers, "milora", residual="auto") == "adapter"
    model = mixture("mixtral")
    model.model.layers[0].mlp.experts.down_proj.requires_grad_(False)
    model.model.layers[0].mlp.experts.down_proj.data = torch.zeros(4, 32, 24, dtype=torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"'.*down_proj\[0\]' \(ExpertMatrix, torch\.float8_e4m3fn, cpu\) is quantised"):
        check_servable(model, find_targets(model, "experts"), "milora")


def test_a_residual_of_experts_alone_warns_without_its_adapter_and_merges_back() -> None:
    model = mixture("mixtral")
    before = logits(model)
    config = LoraConfig(r=RANK, target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    peft_model = inject_adapters(model, config, spaces_for("mixtral"))
    mark = residual_mark(peft_model.get_base_model())
    assert mark is not None
    assert expert_of(mark["layer"]) is not None
    with (
        peft_model.disable_adapter(),
        pytest.warns(UserWarning, match="the base is the residual of adapter 'default'"),
        torch.no_grad(),
    ):
        peft_model(**BATCH)
    with torch.no_grad():
        model.model.layers[0].mlp.experts.base_layer.base_layer.gate_up_proj.add_(1)
    assert residual_mark(peft_model.get_base_model()) is None  # it is void where the weights are others
    with torch.no_grad():
        model.model.layers[0].mlp.experts.base_layer.base_layer.gate_up_proj.sub_(1)
    torch.testing.assert_close(logits(peft_model.merge_and_unload()), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_single_expert_is_served_where_peft_computes_it_rightly(family: str) -> None:
    four: Any = mixture(family)
    four.config.num_local_experts = four.config.num_experts_per_tok = 1
    model = type(four)(four.config).eval()
    before = logits(model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        peft_model = inject_adapters(model, LoraConfig(r=RANK), method="milora")
    torch.testing.assert_close(logits(peft_model), before, rtol=0, atol=3e-6)
    names = [name for name in lora_layers(peft_model, "default") if expert_of(name)]
    assert len(names) == (4 if family == "mixtral" else 0)
    assert any("a single transposed expert" in str(each.message) for each in said) == (family == "gpt_oss")
