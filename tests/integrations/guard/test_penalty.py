"""`penalty` and the gauge: the drift of a live adapter, by r × r matrices, against the dense formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from calibrated import covariances_for, sources_for, spaces_for
from peft import LoraConfig, PeftModel, get_peft_model

from models import random_batches, tiny
from nullspace.integrations.peft import clora, drift_of, freeze_a, inject_adapters, lora_layers, penalty
from nullspace.model.linear import weight_of

CONFIG: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


def dense(model: PeftModel, family: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Σ ‖ΔW X‖² / ‖W₀ X‖² in float64 from whole matrices, with gradients of A and B; and the summands."""
    original = dict(tiny(family).named_modules())
    parts = {}
    for name, layer in lora_layers(model, "default").items():
        w0 = weight_of(original[name]).detach().double()
        now = layer.get_base_layer().weight.detach().double()
        added = layer.scaling["default"] * layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
        c = covariances_for(family)[name].matrix()
        if layer.fan_in_fan_out:
            w0, now = w0.mT, now.mT
        change = now + added - w0
        parts[name] = torch.trace(change @ c @ change.mT) / torch.trace(w0 @ c @ w0.mT)
    return torch.stack(list(parts.values())).sum(), parts


def shaken(model: PeftModel) -> PeftModel:
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.02 * torch.randn_like(p))
    return model


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "plain": ("llama", {}, {}),
    "Conv1D": ("gpt2", {}, {}),
    "rsLoRA, patterns": ("llama", {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 32}}, {}),
    "residual": ("llama", {}, {"method": "lora-null"}),
    "residual, Conv1D": ("gpt2", {}, {"method": "corda-kpm"}),
    "residual, frozen A": ("llama", {}, {"method": "lora-null", "freeze_a": True, "residual": "base"}),
    "two adapters": ("llama", {}, {"method": "lora-null", "residual": "adapter"}),
}


@pytest.mark.parametrize("case", CASES)
def test_value_and_gradients_are_those_of_the_dense_formula(case: str) -> None:
    family, options, method = CASES[case]
    config = LoraConfig(**{**CONFIG, **options})
    if method:
        model = inject_adapters(tiny(family), config, **method, **sources_for(method["method"], family))
    else:
        model = get_peft_model(tiny(family), config)
    hold = penalty(model, covariances_for(family))
    assert float(hold().detach()) <= 1e-10
    shaken(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if case == "two adapters":
        wanted, parts = dense_of_two(model, family)
    else:
        wanted, parts = dense(model, family)
    found = hold()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=0)
    ours = torch.autograd.grad(found, parameters)
    theirs = torch.autograd.grad(wanted, parameters)
    for our, their in zip(ours, theirs, strict=True):
        assert (our - their).norm() <= 1e-3 * their.norm()
    drift = drift_of(model, covariances_for(family))
    if method and method.get("residual") != "adapter":  # what it has started as is not known to a gauge that comes later
        return
    assert drift.layers.keys() == parts.keys()
    for name, square in parts.items():
        assert drift.layers[name] == pytest.approx(float(square.detach().sqrt()), rel=1e-4)
    assert drift.worst == drift.layers[drift.worst_layer] == max(drift.layers.values())


def dense_of_two(model: PeftModel, family: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    parts = {}
    for name, layer in lora_layers(model, "default").items():
        w0 = layer.get_base_layer().weight.detach().double()
        s, c = layer.scaling["default"], covariances_for(family)[name].matrix()
        products = (layer.lora_B[n].weight.double() @ layer.lora_A[n].weight.double() for n in ("default", "default_subtracted"))
        change = s * sum(products)
        parts[name] = torch.trace(change @ c @ change.mT) / torch.trace(w0 @ c @ w0.mT)
    return torch.stack(list(parts.values())).sum(), parts


def test_it_trains() -> None:
    """A penalty alone takes the change back."""
    model = shaken(get_peft_model(tiny("llama"), LoraConfig(**CONFIG)))
    hold = penalty(model, covariances_for("llama"))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    first = hold()
    for _ in range(5):
        with torch.autocast("cpu", dtype=torch.bfloat16):  # is not used
            value = hold()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(hold().detach()) < 0.9 * float(first.detach())


def test_a_frozen_a_is_multiplied_once() -> None:
    model = get_peft_model(tiny("llama"), LoraConfig(**CONFIG))
    freeze_a(model)
    hold = penalty(shaken(model), covariances_for("llama"))
    first = float(hold().detach())
    with torch.no_grad():
        for layer in lora_layers(model, "default").values():
            layer.lora_A["default"].weight.mul_(2)  # a checkpoint that is loaded
    assert float(hold().detach()) == pytest.approx(4 * first, rel=1e-5)


def test_what_cannot_be_measured_is_refused_by_name() -> None:
    covariances = covariances_for("llama")
    for options, text in (
        ({"use_dora": True}, "DoRA"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens', a Embedding: only those of linear layers"),
        ({"target_modules": ["lm_head"]}, "there is no covariance for 'lm_head'"),
    ):
        with pytest.raises(ValueError, match=text):
            penalty(get_peft_model(tiny("llama"), LoraConfig(**{**CONFIG, **options})), covariances)
    with pytest.raises(ValueError, match="of another model"):
        penalty(get_peft_model(tiny("llama", seed=1), LoraConfig(**CONFIG)), covariances)
    with pytest.raises(ValueError, match="no LoRA adapter named 'other'; it has 'default'"):
        penalty(get_peft_model(tiny("llama"), LoraConfig(**CONFIG)), covariances, adapter_name="other")
    with pytest.raises(TypeError, match="a PeftModel is needed, not LlamaForCausalLM"):
        penalty(tiny("llama"), covariances)  # type: ignore[arg-type]
    for hold in (penalty, lambda model, spaces: clora(model, 3, spaces)):
        with pytest.raises(TypeError, match=r"Covariances are needed .*, not NullSpaces"):
            hold(get_peft_model(tiny("llama"), LoraConfig(**CONFIG)), spaces_for("llama"))
    merged = get_peft_model(tiny("llama"), LoraConfig(**CONFIG))
    merged.merge_adapter()
    with pytest.raises(ValueError, match=r"merged into the weight of .* unmerge_adapter"):
        penalty(merged, covariances)


def test_batches_are_what_covariances_are_of() -> None:
    """The gauge's drift of the first layer, whose inputs do not move, is that of outputs."""
    model = shaken(get_peft_model(tiny("llama"), LoraConfig(**CONFIG)))
    name = "model.layers.0.self_attn.q_proj"
    outputs: dict[str, list[torch.Tensor]] = {"before": [], "after": []}
    layer = lora_layers(model, "default")[name]
    moved, base = layer, layer.get_base_layer()
    moved.register_forward_hook(lambda *args: outputs["after"].append(args[2].detach()) and None)
    base.register_forward_hook(lambda *args: outputs["before"].append(args[2].detach().clone()) and None)
    with torch.no_grad():
        for batch in random_batches():
            model(**batch)
    before, after = (torch.cat([each.flatten(0, 1) for each in outputs[key]]).double() for key in ("before", "after"))
    measured = float((after - before).norm() / before.norm())
    assert drift_of(model, covariances_for("llama")).layers[name] == pytest.approx(measured, rel=1e-4)


def projected(model: PeftModel, family: str, k: int, start: dict[str, Any] | None = None) -> torch.Tensor:
    """Σ ‖A P‖² + ‖Bᵀ Q‖² in float64, with P and Q by decompositions of their own; with `start`, of what A and B have changed by."""
    original, total = dict(tiny(family).named_modules()), []
    for name, layer in lora_layers(model, "default").items():
        w0, c = weight_of(original[name]).detach().double(), covariances_for(family)[name].matrix()
        w0 = w0.mT if layer.fan_in_fan_out else w0
        p, q = (torch.linalg.svd(moment).U[:, :k] for moment in (c, w0 @ c @ w0.mT))
        a, b = (getattr(layer, factor)["default"].weight.double() for factor in ("lora_A", "lora_B"))
        if start is not None:
            a, b = a - start[name][0], b - start[name][1]
        total += [(a @ p).square().sum(), (b.mT @ q).square().sum()]
    return torch.stack(total).sum()


@pytest.mark.parametrize("case", ["plain", "Conv1D", "residual"])
def test_clora_with_the_leading_inputs_is_the_dense_formula(case: str) -> None:
    family, _, method = CASES[case]
    if method:
        model = inject_adapters(tiny(family), LoraConfig(**CONFIG), **method, **sources_for(method["method"], family))
    else:
        model = get_peft_model(tiny(family), LoraConfig(**CONFIG))
    layers = lora_layers(model, "default").items()
    factors = {name: [getattr(layer, f)["default"].weight for f in ("lora_A", "lora_B")] for name, layer in layers}
    start = {name: [p.detach().double() for p in pair] for name, pair in factors.items()} if method else None
    hold = clora(model, 3, covariances_for(family))
    shaken(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    wanted, value = projected(model, family, 3, start), hold()
    torch.testing.assert_close(value.double(), wanted, rtol=1e-4, atol=0)
    for our, their in zip(torch.autograd.grad(value, parameters), torch.autograd.grad(wanted, parameters), strict=True):
        assert (our - their).norm() <= 1e-3 * their.norm()


def test_clora_with_random_matrices_is_that_of_its_seed_and_takes_them_into_the_null_space() -> None:
    model = shaken(get_peft_model(tiny("llama"), LoraConfig(**CONFIG)))
    holds = [clora(model, 0.5, seed=seed) for seed in (3, 3, 4)]
    values = [float(hold().detach()) for hold in holds]
    assert values[0] == values[1] != values[2]
    layers = lora_layers(model, "default").values()
    whole = sum(
        float(getattr(layer, f)["default"].weight.detach().square().sum()) for layer in layers for f in ("lora_A", "lora_B")
    )
    assert 0.3 * whole < values[0] < 0.5 * whole  # half of d_in of A, at most half of d_out of B
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.4)
    for _ in range(20):
        holds[0]().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(holds[0]().detach()) < 1e-6 * values[0]
    assert float(holds[2]().detach()) > 0.1 * values[2]
    for k, seed, text in (
        (0, 0, "k must be at least 1"),
        (1.5, 0, "k must be a number of directions"),
        (4, -1, "seed must be at least 0"),
    ):
        with pytest.raises(ValueError, match=text):
            clora(model, k, seed=seed)
