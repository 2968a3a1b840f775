"""`oplora`: after any optimizer's steps, what an adapter adds has no part in the leading directions of inputs and outputs."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated import covariances_for, spaces_for
from guarded import CONFIG, adapted, project_in_forward, step, trained, trainer_of
from peft import LoraConfig, OSFConfig, PeftModel, get_peft_model

from models import random_batches, tiny
from nullspace import Covariances
from nullspace.integrations.peft import freeze_a, inject_adapters, lora_layers, oplora
from nullspace.model.linear import weight_of

K = 5
BATCH = random_batches(1, 2, 24, seed=7)[0]
OPTIMIZERS: dict[str, Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.3),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9),
}
Spaces = dict[str, tuple[torch.Tensor, torch.Tensor]]


@functools.cache
def spaces_of(of: str) -> Spaces:
    """Layer → U and V by independent decompositions in float64, of `"weights"` or `"moments"`."""
    spaces, modules = {}, dict(tiny("llama").named_modules())
    for name in covariances_for("llama"):
        weight, c = weight_of(modules[name]).detach().double(), covariances_for("llama")[name].matrix()
        if of == "weights":
            u, _, vh = torch.linalg.svd(weight, full_matrices=False)
            spaces[name] = u[:, :K], vh[:K].mT
        else:
            spaces[name] = tuple(torch.linalg.svd(moment).U[:, :K] for moment in (weight @ c @ weight.mT, c))
    return spaces


def moments_or_none(of: str) -> Covariances | None:
    return covariances_for("llama") if of == "moments" else None


def changes(model: PeftModel) -> dict[str, torch.Tensor]:
    """ΔW / s by layer, float64."""
    with torch.no_grad():
        return {
            name: layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
            for name, layer in lora_layers(model, "default").items()
        }


def leaks(changed: Mapping[str, torch.Tensor], spaces: Spaces) -> tuple[float, float]:
    """The largest ‖Uᵀ ΔW‖ and ‖ΔW V‖, relative to ‖ΔW‖. Every layer must have changed."""
    assert all(bool(change.any()) for change in changed.values())
    pairs = [(change, *spaces[name], change.norm()) for name, change in changed.items()]
    return (
        max(float((u.mT @ change).norm() / norm) for change, u, _, norm in pairs),
        max(float((change @ v).norm() / norm) for change, _, v, norm in pairs),
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("of", ["weights", "moments"])
def test_any_optimizer(name: str, of: str) -> None:
    model, covariances = adapted().double(), moments_or_none(of)
    optimizer = OPTIMIZERS[name](trained(model))
    with torch.no_grad():
        before = model(**BATCH).logits
    held = oplora(model, K, covariances, optimizer=optimizer)
    with torch.no_grad():
        assert torch.equal(model(**BATCH).logits, before)
    step(model, optimizer)
    assert max(leaks(changes(model), spaces_of(of))) <= 1e-12
    for name, change in changes(model).items():
        assert (held.allowed[name].directions, held.allowed_outputs[name].directions) == tuple(d - K for d in change.mT.shape)
        if covariances is not None:
            c = covariances[name].matrix()
            v = spaces_of(of)[name][1]
            reached = 1 - torch.trace(v.mT @ c @ v) / c.trace()
            assert held.allowed[name].leak == pytest.approx(float(reached) ** 0.5, abs=1e-7)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_products_are_those_of_projections_in_every_forward_pass(name: str) -> None:
    """The paper's ΔW = P_L B A P_R, with clipped gradients; k beyond half of the smaller side is that half."""
    torch.manual_seed(0)
    ours = adapted().double()
    theirs = copy.deepcopy(ours)
    project_in_forward(theirs)
    for model in (ours, theirs):
        optimizer = OPTIMIZERS[name](trained(model))
        if model is ours:
            oplora(model, 10_000, optimizer=optimizer)
        optimizer.register_step_pre_hook(lambda *_, model=model: torch.nn.utils.clip_grad_norm_(trained(model), 0.05) and None)
        step(model, optimizer)
    expected = changes(theirs)
    for name, change in changes(ours).items():
        assert float((change - expected[name]).norm()) <= 1e-9 * float(expected[name].norm()), name


def network() -> torch.nn.Sequential:
    """Two layers whose singular values below the leading half are 1."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(12, 20, bias=False), torch.nn.Tanh(), torch.nn.Linear(20, 14, bias=False))
    for layer in (net[0], net[2]):
        u, sigma, vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
        half = len(sigma) // 2
        layer.weight.data = (u * torch.cat([3 + torch.arange(half), torch.ones(len(sigma) - half)])) @ vh
    return net


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_peft_s_osf_is_the_same_on_a_start_of_all_other_triples(name: str) -> None:
    """Its factors U, V and their gradients are those of a LoRA, as Σ is one and is not trained. It projects gradients alone: with
    SGD the products are equal, and with Adam its change leaves the space."""
    weights = [network()[i].weight.detach() for i in (0, 2)]
    x, y = torch.randn(32, 12), torch.randn(32, 14)
    osf = get_peft_model(network(), OSFConfig(target_modules=["0", "2"]))
    for parameter_name, parameter in osf.named_parameters():
        parameter.requires_grad_("U_low" in parameter_name or "V_low" in parameter_name)
    halves = {"rank_pattern": {"2": 7}, "alpha_pattern": {"2": 7}}
    lora = inject_adapters(network(), LoraConfig(r=6, lora_alpha=6, target_modules=["0", "2"], **halves), method="milora")
    optimizers = []
    for model in (osf, lora):
        optimizers.append(OPTIMIZERS[name](trained(model)))
        optimizers[-1].param_groups[0].update(lr=0.05, weight_decay=0)
    oplora(lora, optimizer=optimizers[1])
    for _ in range(3):
        for model, optimizer in zip((osf, lora), optimizers, strict=True):
            (model(x) - y).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    merged = [[whole[i].weight.detach() for i in (0, 2)] for whole in (osf.merge_and_unload(), lora.merge_and_unload())]
    for weight, theirs, ours in zip(weights, *merged, strict=True):
        u, sigma, vh = torch.linalg.svd(weight, full_matrices=False)
        half = len(sigma) // 2
        for changed, kept in ((theirs - weight, name == "SGD"), (ours - weight, True)):
            leak = max(float((u[:, :half].mT @ changed).norm()), float((changed @ vh[:half].mT).norm())) / float(changed.norm())
            assert leak < 1e-4 if kept else leak > 0.05
        if name == "SGD":
            assert float((theirs - ours).norm()) <= 1e-5 * float((theirs - weight).norm())


@pytest.mark.parametrize(("sides", "held"), [("inputs", (False, True)), ("outputs", (True, False))])
def test_one_side(sides: str, held: tuple[bool, bool]) -> None:
    model = adapted()
    with oplora(model, K, covariances_for("llama"), sides=sides) as constraint:
        step(model, torch.optim.AdamW(trained(model), lr=1e-2))
    assert (not constraint.allowed, not constraint.allowed_outputs) == held
    left, right = leaks(changes(model), spaces_of("moments"))
    assert (left > 1e-3, right > 1e-3) == tuple(not side for side in (sides == "outputs", sides == "inputs"))
    assert min(left, right) <= 1e-6


def test_after_the_with_statement_neither_steps_nor_gradients_are_held() -> None:
    model = adapted(init_lora_weights=False)
    before = changes(model)
    with oplora(model, K):
        held = gradients(model)
    for name, (of_a, of_b) in gradients(model).items():
        u, v = (basis.float() for basis in spaces_of("weights")[name])
        torch.testing.assert_close(held[name][0], of_a - of_a @ v @ v.mT, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(held[name][1], of_b - u @ (u.mT @ of_b), rtol=1e-4, atol=1e-6)
    step(model, torch.optim.AdamW(trained(model), lr=1e-2), 1)
    assert min(leaks({name: after - before[name] for name, after in changes(model).items()}, spaces_of("weights"))) > 1e-3


def gradients(model: PeftModel) -> dict[str, tuple[torch.Tensor, ...]]:
    """Layer → the gradients of A and B in the present state."""
    model(**BATCH, labels=BATCH["input_ids"]).loss.backward()
    layers = lora_layers(model, "default").items()
    factors = {name: (layer.lora_A["default"].weight, layer.lora_B["default"].weight) for name, layer in layers}
    found = {name: tuple(factor.grad.clone() for factor in pair) for name, pair in factors.items()}
    model.zero_grad()
    return found


def test_a_trainer_that_accumulates_and_clips_saves_a_plain_adapter(tmp_path: Path) -> None:
    model = adapted()
    options = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1, "max_steps": 2}
    trainer_of(model, tmp_path, callbacks=[oplora(model, K, covariances_for("llama"))], **options).train()
    assert max(leaks(changes(model), spaces_of("moments"))) <= 1e-6
    assert not any(p._backward_hooks for p in trained(model))
    again = PeftModel.from_pretrained(tiny("llama"), tmp_path / "checkpoint-2")
    with torch.no_grad():
        assert torch.equal(again(**BATCH).logits, model.eval()(**BATCH).logits)


STARTS: dict[str, tuple[dict[str, Any], str | None]] = {
    "milora": ({}, None),
    "mica": ({"init_lora_weights": "mica"}, "B does not train in 21 layers, .*there is nothing to confine"),
    "frozen A": ({}, r"A does not train \(freeze_a\) in 21 layers, .*there is nothing to confine"),
}


@pytest.mark.parametrize("start", STARTS)
def test_starts(start: str) -> None:
    """Of starts that lie outside, the whole change does; a factor that does not train is left as it is."""
    options, warning = STARTS[start]
    ours = start == "milora"
    model = inject_adapters(tiny("llama"), LoraConfig(**CONFIG), method=start) if ours else adapted(**options)
    if start == "frozen A":
        freeze_a(model)
    before, factors = changes(model), [p.detach().clone() for p in model.parameters()]
    if warning is None:
        held = oplora(model, K)
    else:
        with pytest.warns(UserWarning, match=warning):
            held = oplora(model, K)
    assert all(torch.equal(p, factor) for p, factor in zip(model.parameters(), factors, strict=True))
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    with held:
        step(model, optimizer)
    changed = {name: change - before[name] for name, change in changes(model).items()}
    left, right = leaks(changed, spaces_of("weights"))
    assert left <= 1e-6
    assert (right <= 1e-6) == (start != "frozen A")


def test_what_cannot_be_spared_is_refused() -> None:
    covariances, model = covariances_for("llama"), adapted()
    with pytest.raises(ValueError, match="k must be at least 1, not 0"):
        oplora(model, 0)
    for share in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match="k must be a number of directions, or a share between 0 and 1, not"):
            oplora(model, share)
    for wrong in ("4", True):
        with pytest.raises(TypeError, match="k must be an integer, not"):
            oplora(model, wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sides must be one of 'both', 'inputs', 'outputs', not 'left'"):
        oplora(model, sides="left")
    with pytest.raises(
        ValueError, match=r"k leaves 2 of the \d+ directions of the inputs of 'model.layers.*has rank 4: spare fewer"
    ):
        oplora(model, 0.97)
    with pytest.raises(TypeError, match=r"Covariances are needed .*, not NullSpaces"):
        oplora(model, K, spaces_for("llama"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="of another model"):
        oplora(get_peft_model(tiny("llama", seed=1), LoraConfig(**CONFIG)), K, covariances)
    with pytest.raises(ValueError, match="uses DoRA"):
        oplora(adapted(use_dora=True), K)
    with torch.no_grad():
        for name, layer in lora_layers(model, "default").items():
            layer.lora_A["default"].weight.copy_(spaces_of("weights")[name][1][:, :4].mT)
    with pytest.raises(
        ValueError, match=r"a row of A has nothing in the \d+ directions .*Start from another A, or spare fewer \(k\)"
    ):
        oplora(model, K)
