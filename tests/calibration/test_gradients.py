"""Second moments weighted by the gradient of a loss, against autograd on dense inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated import RANK, covariances_for
from peft import LoraConfig
from torch import nn

from models import random_batches, tiny
from nullspace import Covariances, gradient_covariances
from nullspace.integrations.peft import inject_adapters


def labelled(family: str = "llama", *, padded: bool = False) -> list[dict[str, torch.Tensor]]:
    """Batches whose first tokens have no label, as a prompt; of other lengths, or padded."""
    batches = random_batches(3, 2, 24)
    for number, batch in enumerate(batches):
        batch["labels"] = batch["input_ids"].clone()
        batch["labels"][:, : 5 + 3 * number] = -100
        if padded:
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            batch["attention_mask"][1, 15:] = 0
            batch["labels"][1, 15:] = -100
    return batches


def dense(model: nn.Module, batches: list[dict[str, torch.Tensor]], sites: list[tuple[str, ...]]) -> dict[str, torch.Tensor]:
    """Σ ‖∂loss/∂y‖² x xᵀ from all inputs and output gradients, as autograd gives them."""
    kept: dict[str, Any] = {}

    def keep(name: str) -> Any:
        return lambda _, args, output: kept.__setitem__(name, (args[0].detach(), output))

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for site in sites for name in site]
    sums: dict[str, torch.Tensor] = {}
    for batch in batches:
        logits = model.eval()(**{name: value for name, value in batch.items() if name != "labels"}).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
        for site in sites:
            gradients = torch.autograd.grad(loss, [kept[name][1] for name in site], retain_graph=True)
            x = kept[site[0]][0].flatten(0, 1)
            squares = sum(g.square().sum(-1).flatten() for g in gradients)
            sums[site[0]] = sums.get(site[0], 0) + x.mT @ (squares[:, None] * x)
    for handle in handles:
        handle.remove()
    return sums


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("padded", [False, True])
def test_moments_are_those_of_the_dense_formula(family: str, padded: bool, tmp_path: Path) -> None:
    model, batches = tiny(family).double(), labelled(padded=padded)
    found = gradient_covariances(model, batches, progress=False)
    assert [site.members for site in found.sites] == [site.members for site in covariances_for(family).sites]
    expected = dense(tiny(family).double(), batches, [site.members for site in found.sites])
    for site in found.sites:
        assert (found[site.name].matrix() - expected[site.name]).norm() <= 1e-6 * expected[site.name].norm(), (
            site
        )  # transformers' loss is float32
        # Tokens behind the last label, and padding, have no gradient.
        assert found[site.name].tokens <= 3 * (2 * 23 - (9 if padded else 0)), site
    found.save(tmp_path / "kept")
    twice = Covariances.merge([Covariances.load(tmp_path / "kept"), found])
    name = found.sites[0].name
    torch.testing.assert_close(twice[name].matrix(), 2 * found[name].matrix(), rtol=1e-14, atol=0)


def test_the_division_into_batches_does_not_matter() -> None:
    model, batches = tiny("llama").double(), labelled()
    alone = [{name: value[i : i + 1] for name, value in batch.items()} for batch in batches for i in range(2)]
    together, apart = (gradient_covariances(model, loader, progress=False) for loader in (batches, alone))
    for site in together.sites:
        torch.testing.assert_close(apart[site.name].matrix(), together[site.name].matrix(), rtol=1e-10, atol=1e-16)


def test_a_model_in_training_with_checkpoints_and_frozen_parts_is_left_as_it_was() -> None:
    model = tiny("llama").train()
    model.gradient_checkpointing_enable()
    model.model.embed_tokens.requires_grad_(False)
    before = {name: (p.requires_grad, p.clone()) for name, p in model.named_parameters()}
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    found = gradient_covariances(model, labelled(), progress=False)
    expected = gradient_covariances(tiny("llama").requires_grad_(False), labelled(), progress=False)
    assert all(torch.equal(found[site.name].matrix(), expected[site.name].matrix()) for site in expected.sites)
    assert model.training
    assert model.is_gradient_checkpointing
    for name, p in model.named_parameters():
        assert p.requires_grad == before[name][0]
        assert p.grad is None
        assert torch.equal(p, before[name][1])
    assert [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()] == hooks
    # In the place of the task's moments.
    inject_adapters(model, LoraConfig(r=RANK), method="contrast", covariances=found, preserve=covariances_for("llama"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda batch: batch.pop("labels"), "batch 2: the model returns no loss. Give batches with 'labels'"),
        (lambda batch: batch["labels"].fill_(-100), "batch 2: all of its labels are -100"),
        (lambda batch: batch.update(input_ids=torch.full((2, 24), 9999)), "batch 2 .*no embedding"),
    ],
)
def test_batches_without_a_loss_are_refused_by_number(change: Any, words: str) -> None:
    model, batches = tiny("llama"), labelled()
    change(batches[1])
    with pytest.raises(ValueError, match=words):
        gradient_covariances(model, batches, progress=False)
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match=r"empty|no batch"):
        gradient_covariances(model, [], progress=False)


def test_layers_without_a_gradient_are_refused_by_name() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
    with pytest.raises(ValueError, match=r"no tokens at 'model\.layers\.1\.mlp\.gate_proj': none of them has a gradient"):
        gradient_covariances(model, labelled(), progress=False)
