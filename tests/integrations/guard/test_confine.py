"""`confine`: after any optimizer's steps, A has changed only in the directions that it is confined to."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import transformers
from calibrated import covariances_for, spaces_for
from peft import LoraConfig, PeftModel, get_peft_model

from models import random_batches, tiny
from nullspace import Covariances, analysis
from nullspace.integrations.peft import confine, freeze_a, inject_adapters, lora_layers

LEAK = 0.3
BATCH = random_batches(1, 2, 24, seed=7)[0]
CONFIG: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


def adapted(family: str = "llama", **options: Any) -> PeftModel:
    return get_peft_model(tiny(family), LoraConfig(**{**CONFIG, **options}))


def trained(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def rows(model: PeftModel, adapter: str = "default") -> dict[str, torch.Tensor]:
    return {name: layer.lora_A[adapter].weight.detach().clone() for name, layer in lora_layers(model, adapter).items()}


def step(model: PeftModel, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    model.train()
    for seed in range(steps):
        batch = random_batches(1, 2, 24, seed=seed)[0]
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def quiet(c: torch.Tensor, leak: float) -> torch.Tensor:
    """(d, k): by an independent decomposition, the most directions with a joint leak within the budget."""
    u, values, _ = torch.linalg.svd(c)
    joint = values.flip(0).cumsum(0) / c.trace()
    return u.flip(1)[:, : int((joint <= leak**2).sum())]


def assert_inside(model: PeftModel, covariances: Covariances, start: dict[str, torch.Tensor], *, tolerance: float = 1e-6) -> None:
    for name, a in rows(model).items():
        basis = quiet(covariances[name].matrix(), LEAK)
        change = (a - start[name]).double()
        assert change.norm() > 0, name
        assert (change - change @ basis @ basis.mT).norm() <= tolerance * a.norm(), name


OPTIMIZERS: dict[str, Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.3),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "Adafactor": lambda p: transformers.Adafactor(p, lr=1e-2, relative_step=False, scale_parameter=False),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer(name: str) -> None:
    model, covariances = adapted(), covariances_for("llama")
    optimizer = OPTIMIZERS[name](trained(model))
    with torch.no_grad():
        before = model(**BATCH).logits
    confinement = confine(model, covariances, LEAK, optimizer=optimizer)
    with torch.no_grad():
        assert torch.equal(model(**BATCH).logits, before)
    start = rows(model)
    step(model, optimizer)
    assert_inside(model, covariances, start)
    for name, a in rows(model).items():
        allowed = confinement.allowed[name]
        assert allowed.directions == quiet(covariances[name].matrix(), LEAK).shape[1]
        assert analysis.leak(a, covariances[name].matrix()) <= allowed.leak + 1e-6
        assert allowed.leak <= LEAK


def test_rows_of_a_plain_start_keep_their_norms() -> None:
    model = adapted()
    before = rows(model)
    confine(model, covariances_for("llama"), LEAK)
    for name, a in rows(model).items():
        torch.testing.assert_close(a.norm(dim=1), before[name].norm(dim=1))


def test_of_another_start_the_change_alone_is_confined() -> None:
    covariances = covariances_for("llama")
    model = inject_adapters(tiny("llama"), LoraConfig(**CONFIG), method="corda-kpm", covariances=covariances)
    start = rows(model)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    with confine(model, covariances, LEAK, optimizer=optimizer):
        assert all(torch.equal(a, start[name]) for name, a in rows(model).items())
        step(model, optimizer)
    assert_inside(model, covariances, start)
    confined = rows(model)
    step(model, optimizer)  # no longer
    with pytest.raises(AssertionError):
        assert_inside(model, covariances, confined)


def test_null_spaces_are_used_as_far_as_they_are_within_the_budget() -> None:
    model, spaces = adapted(), spaces_for("llama")
    confinement = confine(model, spaces, LEAK)
    for name, a in rows(model).items():
        k = confinement.allowed[name].directions
        basis = spaces[name].basis[:, :k]
        assert k == int((spaces[name].eigenvalues.cumsum(0) <= LEAK**2 * spaces[name].trace).sum())
        assert (a.double() - a.double() @ basis @ basis.mT).norm() <= 1e-6 * a.norm()
    with pytest.raises(ValueError, match=r"site '.*q_proj': \d directions of 48 .* rank 4 needs 4 of them; leak=\S+ is the least"):
        confine(adapted(), spaces, 1e-3)
    with pytest.raises(ValueError, match="its null space has 8 in all: give covariances"):
        confine(adapted(r=12), spaces, 0.9)


def test_frozen_rows_are_left_alone() -> None:
    model = adapted()
    freeze_a(model)
    before = rows(model)
    with pytest.warns(UserWarning, match=r"A does not train \(freeze_a\) in 21 layers, .*there is nothing to confine"):
        confinement = confine(model, covariances_for("llama"), LEAK)
    assert not confinement.allowed
    assert all(torch.equal(a, before[name]) for name, a in rows(model).items())
