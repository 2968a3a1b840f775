"""The study's methods: each starts where the base is, trains what it says, and what it has changed is what its model computes."""

from __future__ import annotations

import copy
import statistics
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from calibrated import covariances_for
from guarded import project_in_forward
from steps import logits

pytest.importorskip("benchmarks.evidence.methods", reason="needs the repository's root on the path: python -m pytest")
from peft.optimizers import create_lorafa_optimizer
from peft.tuners.lora.intruders import reduce_intruder_dimension

from benchmarks.evidence import posts
from benchmarks.evidence.allocations import factors_of, summary
from benchmarks.evidence.methods import BUDGETED, EVERY, METHODS, Prepared, change_of, prepare
from benchmarks.holding_parts import with_adapters
from models import random_batches, tiny
from nullspace import Covariances
from nullspace.factors import LowRank
from nullspace.integrations.peft import Confinement, StartDecay, lora_layers
from nullspace.model.sites import find_targets

RANK = 4
FROZEN = {"lora-fa": "lora_A", "lora-null v2": "lora_A", "contrast": "lora_A", "mica": "lora_B"}
CALLBACKS: dict[str, list[type]] = {"confine": [Confinement], "oplora": [Confinement], "lora decay to start 0.3": [StartDecay]}


@pytest.fixture(scope="module")
def base() -> torch.nn.Module:
    return tiny("llama")


@pytest.fixture(scope="module")
def sources() -> dict[str, Covariances]:
    return {"keep": covariances_for("llama"), "task": covariances_for("llama", seed=5)}


def prepared_of(base: torch.nn.Module, sources: dict[str, Covariances], method: str, seed: int = 0) -> Prepared:
    return prepare(copy.deepcopy(base), method, rank=RANK, seed=seed, **sources)


def train(prepared: Prepared, rate: float = 1e-2) -> None:
    """Two steps, with what a Trainer calls."""
    parameters = [p for p in prepared.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=prepared.weight_decay)
    calls: Any = prepared.callbacks
    for each in calls:
        each.on_train_begin(None, None, None, optimizer=optimizer)
    prepared.model.train()
    for seed in (0, 1):
        batch = random_batches(1, 2, 24, seed=seed)[0]
        prepared.model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for each in calls:
            each.on_optimizer_step(None, None, None)
    prepared.model.eval()


def added(base: torch.nn.Module, change: Any) -> torch.nn.Module:
    model = copy.deepcopy(base)
    for name, delta in change.items():
        model.get_submodule(name).weight.data.add_((delta.B @ delta.A).float())
    return model


@pytest.mark.filterwarnings("ignore::nullspace.errors.NullspaceWarning")
@pytest.mark.parametrize("method", METHODS)
def test_a_method_starts_at_the_base_and_trains_what_it_says(
    base: torch.nn.Module, sources: dict[str, Covariances], method: str
) -> None:
    prepared = prepared_of(base, sources, method)
    torch.testing.assert_close(logits(prepared.model), logits(base), atol=2e-5, rtol=1e-4)
    assert [type(each) for each in prepared.callbacks] == CALLBACKS.get(method, [])
    start = {name: p.detach().clone() for name, p in prepared.model.named_parameters()}
    train(prepared)
    changed = {name for name, p in prepared.model.named_parameters() if not torch.equal(p, start[name])}
    parts = {"lora_A", "lora_B"} - {FROZEN.get(method)}
    layers = [name for name in start if "lora_" in name and (method != "lora-mlp" or ".mlp." in name)]
    assert changed == {name for name in layers if any(part in name for part in parts)}
    assert len(changed) == len(parts) * 3 * (3 if method == "lora-mlp" else 7)
    change = change_of(prepared)
    assert all(float((delta.B @ delta.A).norm()) > 0 for delta in change.values() if isinstance(delta, LowRank))
    trained = logits(prepared.model)
    assert (trained - logits(base)).abs().max() > 1e-2
    torch.testing.assert_close(logits(added(base, change)), trained, atol=5e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::nullspace.errors.NullspaceWarning")
@pytest.mark.parametrize("method", BUDGETED)
def test_a_method_with_a_budget_has_the_ranks_and_the_change_that_it_says(
    base: torch.nn.Module, sources: dict[str, Covariances], method: str
) -> None:
    prepared = prepared_of(base, sources, method)
    torch.testing.assert_close(logits(prepared.model), logits(base), atol=2e-5, rtol=1e-4)
    steps, calls = 4, prepared.callbacks
    for each in calls:
        each.on_train_begin(None, SimpleNamespace(max_steps=steps), None, model=prepared.model)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW([p for p in prepared.model.parameters() if p.requires_grad], lr=5e-2)
    for step in range(steps):
        batch = random_batches(1, 2, 24, seed=step)[0]
        prepared.model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        for each in calls:
            each.on_optimizer_step(None, SimpleNamespace(global_step=step), None)  # type: ignore[arg-type]
        optimizer.zero_grad()
    prepared.model.eval()
    ranks = [int(each.A.any(1).sum()) for each in factors_of(prepared.model).values()]
    said = summary(prepared.model)
    assert said["ranks"] == {"least": min(ranks), "median": statistics.median(ranks), "most": max(ranks)}
    assert (len(set(ranks)) > 1) == (method != "eva")
    layers = find_targets(base)
    frozen = "contrast" in method or "v2" in method
    uniform = sum(RANK * (sum(layer.weight.shape) if not frozen else len(layer.weight)) for layer in layers.values())
    if "budget" in method:
        assert 0.95 * uniform <= said["parameters"] <= uniform
    else:
        assert sum(ranks) == RANK * len(layers) or method == "adalora"
        assert sum(ranks) <= RANK * len(layers)
    trained = logits(prepared.model)
    assert (trained - logits(base)).abs().max() > 1e-3
    torch.testing.assert_close(logits(added(base, change_of(prepared))), trained, atol=5e-5, rtol=1e-4)


def test_declarations() -> None:
    for how in EVERY.values():
        rates = sorted(how.rates)
        assert 2 <= len(rates) <= 3
        assert all(1.999 <= high / low <= 4.001 for low, high in pairwise(rates)), rates
        assert set(how.needs) <= {"keep", "task"}
    with pytest.raises(ValueError, match="keep and task"):
        prepare(tiny("llama"), "contrast", rank=RANK, seed=0)


def test_a_seed_decides_where_a_random_start_is(base: torch.nn.Module) -> None:
    starts = [prepared_of(base, {}, "lora", seed).before for seed in (3, 3, 4)]
    for name, first in starts[0].items():
        torch.testing.assert_close(starts[1][name].A, first.A, rtol=0, atol=0)
        assert not torch.equal(starts[2][name].A, first.A)


def test_oplora_does_not_touch_the_leading_singular_spaces(base: torch.nn.Module) -> None:
    prepared = prepared_of(base, {}, "oplora")
    train(prepared)
    for name, delta in change_of(prepared).items():
        assert isinstance(delta, LowRank)
        weight = base.get_submodule(name).weight.detach().double()
        u, sigma, vh = torch.linalg.svd(weight, full_matrices=False)
        k = len(sigma) // 2
        whole = delta.B @ delta.A
        assert float((u[:, :k].mT @ whole).norm()) < 1e-5 * float(whole.norm())
        assert float((whole @ vh[:k].mT).norm()) < 1e-5 * float(whole.norm())
        torch.testing.assert_close(torch.linalg.svdvals(weight + 1e-3 * whole)[:k], sigma[:k])


def test_oplora_trains_as_with_projections_in_every_forward_pass(base: torch.nn.Module) -> None:
    """What the study did when its figures were recorded."""
    ours, theirs = (prepared_of(copy.deepcopy(base).double(), {}, method) for method in ("oplora", "lora"))
    project_in_forward(theirs.model)
    theirs = theirs._replace(before=factors_of(theirs.model))
    for each in (ours, theirs):
        train(each)
    expected = change_of(theirs)
    for name, delta in change_of(ours).items():
        wanted, found = (part.B @ part.A for part in (expected[name], delta))
        assert float((found - wanted).norm()) <= 1e-9 * float(wanted.norm()), name


def test_mica_reads_out_by_the_smallest_left_singular_vectors(base: torch.nn.Module) -> None:
    for name, start in prepared_of(base, {}, "mica").before.items():
        u = torch.linalg.svd(base.get_submodule(name).weight.detach().double(), full_matrices=False).U
        inside = (u[:, -RANK:].mT @ start.B.double()).square().sum()
        assert float(inside) == pytest.approx(RANK, abs=1e-4)
        assert not start.A.any()


def test_lora_fa_steps_as_with_peft_s_optimizer(base: torch.nn.Module) -> None:
    """ε far above the gradients makes a step of Adam one along the gradient, where the correction is seen."""
    ours, theirs = (prepared_of(base, {}, method) for method in ("lora-fa", "lora"))
    optimizers = [
        torch.optim.AdamW([p for p in ours.model.parameters() if p.requires_grad], lr=1e6, eps=1e6, weight_decay=0),
        create_lorafa_optimizer(theirs.model, r=RANK, lora_alpha=RANK, lr=1e6),
    ]
    optimizers[1].param_groups[0]["eps"] = 1e6
    batch = random_batches(1, 2, 24)[0]
    for each, optimizer in zip((ours, theirs), optimizers, strict=True):
        each.model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
    for name, layer in lora_layers(theirs.model, "default").items():
        wanted, found = layer.lora_B["default"].weight, lora_layers(ours.model, "default")[name].lora_B["default"].weight
        assert torch.nn.functional.cosine_similarity(found.flatten(), wanted.flatten(), dim=0) > 0.9999


def test_a_penalty_is_in_the_loss_of_training_alone(base: torch.nn.Module, sources: dict[str, Covariances]) -> None:
    prepared = prepared_of(base, sources, "penalty")
    train(prepared)
    batch = random_batches(1, 2, 24)[0]
    losses = [prepared.model.train(mode)(**batch, labels=batch["input_ids"]).loss.item() for mode in (True, False)]
    assert losses[0] > losses[1] + 1e-3


def test_intruders_are_reduced_as_by_peft(base: torch.nn.Module) -> None:
    prepared = prepared_of(base, {}, "lora")
    generator = torch.Generator().manual_seed(1)
    change = {
        name: LowRank(
            torch.randn(RANK, start.A.shape[1], generator=generator), torch.randn(len(start.B), RANK, generator=generator) / 9
        )
        for name, start in prepared.before.items()
        if ".layers.0." in name
    }
    quiet = next(iter(change))
    change[quiet] = LowRank(change[quiet].A, 1e-6 * change[quiet].B)
    model = copy.deepcopy(base)
    reduced = posts.intruder(model, change)
    theirs = with_adapters(copy.deepcopy(base), {"default": change})
    reduce_intruder_dimension(theirs, new_adapter_name="new", logging_sink=None)
    merged = theirs.merge_and_unload()
    for name, delta in reduced.items():
        weight = base.get_submodule(name).weight + delta.B @ delta.A
        torch.testing.assert_close(weight, merged.get_submodule(name).weight, atol=1e-5, rtol=1e-5)
        whole = change[name].B @ change[name].A
        assert (delta.A.shape, delta.B.shape) == (change[name].A.shape, change[name].B.shape)
        assert torch.allclose(delta.B @ delta.A, whole) == (name == quiet), name
    assert model.state_dict().keys() == base.state_dict().keys()
    assert all(torch.equal(value, base.state_dict()[name]) for name, value in model.state_dict().items())
