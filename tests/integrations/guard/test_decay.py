"""`decay_to_start`: AdamW's weight decay, towards the start."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from calibrated import spaces_for
from guarded import CONFIG, adapted, step, trained, trainer_of
from peft import LoraConfig

from models import tiny
from nullspace.integrations.peft import decay_to_start, inject_adapters, read_factors, save_init


def test_towards_zero_it_is_the_decay_of_adamw() -> None:
    models = [adapted(init_lora_weights=False) for _ in range(2)]
    zero = {name: (torch.zeros_like(a), torch.zeros_like(b)) for name, (a, b) in _factors(models[0]).items()}
    theirs = torch.optim.AdamW(trained(models[0]), lr=1e-2, weight_decay=0.3)
    ours = torch.optim.AdamW(trained(models[1]), lr=1e-2, weight_decay=0.0)
    decay_to_start(models[1], 0.3, ours, initial=zero)  # type: ignore[arg-type]
    for model, optimizer in zip(models, (theirs, ours), strict=True):
        step(model, optimizer)
    for a, b in zip(trained(models[0]), trained(models[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def _factors(model: torch.nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    layers = {name: module for name, module in model.base_model.model.named_modules() if hasattr(module, "lora_A")}  # type: ignore[union-attr,operator]
    return {name: (each.lora_A["default"].weight, each.lora_B["default"].weight) for name, each in layers.items()}  # type: ignore[index,union-attr]


def test_with_the_rate_of_each_group_towards_where_a_and_b_were() -> None:
    model = inject_adapters(tiny("llama"), LoraConfig(**CONFIG), spaces_for("llama"))
    start = [p.detach().clone() for p in trained(model)]
    rates = [0.1 * (1 + number % 3) for number in range(len(start))]
    optimizer = torch.optim.SGD([{"params": [p], "lr": rate} for p, rate in zip(trained(model), rates, strict=True)], lr=0.0)
    decay = decay_to_start(model, 0.5, optimizer)
    with torch.no_grad():
        for p in trained(model):
            p.add_(1.0)
            p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, before, rate in zip(trained(model), start, rates, strict=True):
        torch.testing.assert_close(p.detach(), before + 1 - 0.5 * rate)
    decay.detach()
    moved = [p.detach().clone() for p in trained(model)]
    optimizer.step()
    assert all(torch.equal(p, before) for p, before in zip(trained(model), moved, strict=True))


def test_in_a_trainer_that_resumes_the_start_is_the_first_one(tmp_path: Path) -> None:
    def run(name: str, checkpoint: Path | None = None) -> torch.nn.Module:
        torch.manual_seed(0)
        model = adapted()
        trainer = trainer_of(model, tmp_path / name, callbacks=[decay_to_start(model, 5.0)])
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return model

    straight, resumed = run("straight"), run("resumed", tmp_path / "straight" / "checkpoint-2")
    for a, b in zip(trained(straight), trained(resumed), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_start_of_a_residual_base_may_be_given(tmp_path: Path) -> None:
    model = inject_adapters(tiny("llama"), LoraConfig(**CONFIG), spaces_for("llama"))
    save_init(tmp_path / "init", model)
    with torch.no_grad():
        for p in trained(model):
            p.add_(1.0).grad = torch.zeros_like(p)
    optimizer = torch.optim.SGD(trained(model), lr=1.0)
    decay_to_start(model, 1.0, optimizer, initial=tmp_path / "init")
    optimizer.step()
    start = read_factors(tmp_path / "init" / "adapter")
    for name, (a, _) in _factors(model).items():
        torch.testing.assert_close(a.detach().double(), start[name].A, rtol=1e-5, atol=1e-6)


def test_a_second_decay_is_warned_of_and_a_negative_one_refused() -> None:
    model = adapted()
    with pytest.warns(UserWarning, match=r"weight_decay=0.01 pulls A and B towards zero: set it to 0"):
        decay_to_start(model, 0.3, torch.optim.AdamW(trained(model)))
    with pytest.raises(ValueError, match="rate must be a number ≥ 0, not -1"):
        decay_to_start(model, -1)
    with pytest.raises(ValueError, match="object takes no hooks"):
        decay_to_start(model, 0.3, object())
