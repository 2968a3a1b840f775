"""`confine` with what else training is set up with: clipping, mixed precision, quantised bases, patterns, resuming."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated import covariances_for
from guarded import CONFIG, LEAK, adapted, outside, quiet, rows, step, trained, trainer_of
from peft import LoraConfig, PeftModel, get_peft_model

from models import random_batches, tiny
from nullspace import analysis
from nullspace.factors import LowRank
from nullspace.integrations.peft import confine, drift_of, lora_layers, oplora, penalty

BATCH = random_batches(1, 4, 24, seed=7)[0]
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "rsLoRA": ("llama", {"use_rslora": True}),
    "patterns": ("llama", {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 6}, "alpha_pattern": {"k_proj": 32}}),
    "Conv1D": ("gpt2", {}),
    "dropout, bias": ("llama", {"lora_dropout": 0.3, "lora_bias": True}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_configurations(name: str) -> None:
    family, options = SETTINGS[name]
    model, covariances = adapted(family, **options), covariances_for(family)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    with confine(model, covariances, LEAK):
        start = rows(model)
        step(model, optimizer)
    assert outside(rows(model), start, covariances) <= 1e-6
    assert all(analysis.leak(a, covariances[name].matrix()) <= LEAK for name, a in rows(model).items())


def test_a_trainer_that_accumulates_clips_and_resumes(tmp_path: Path) -> None:
    """The reference is what is loaded, and the directions are those of the first run."""
    covariances, runs = covariances_for("llama"), {}
    for name, checkpoint in (("straight", None), ("resumed", tmp_path / "straight" / "checkpoint-2")):
        torch.manual_seed(len(runs))
        model = get_peft_model(tiny("llama"), LoraConfig(**CONFIG))  # of another A
        with torch.no_grad():
            for layer in lora_layers(model, "default").values():
                layer.lora_A["default"].weight.normal_()
        confinement = confine(model, covariances, LEAK)
        trainer = trainer_of(
            model, tmp_path / name, callbacks=[confinement], gradient_accumulation_steps=2, max_grad_norm=0.1, num_train_epochs=9
        )
        runs[name] = rows(model), model
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    assert outside(rows(runs["straight"][1]), runs["straight"][0]) <= 1e-6
    for name, a in rows(runs["resumed"][1]).items():
        torch.testing.assert_close(a, rows(runs["straight"][1])[name], rtol=1e-4, atol=1e-5)
        basis = quiet(covariances[name].matrix())
        assert (a.double() - a.double() @ basis @ basis.mT).norm() <= 1e-6 * a.norm()


def test_steps_that_a_scaler_skips() -> None:
    model = adapted()
    optimizer, scaler = torch.optim.AdamW(trained(model), lr=1e-2), torch.amp.GradScaler("cpu", init_scale=2.0**16)
    confinement = confine(model, covariances_for("llama"), LEAK, optimizer=optimizer)
    start, skipped = rows(model), 0
    for number in range(4):
        batch = random_batches(1, 2, 24, seed=number)[0]
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(**batch, labels=batch["input_ids"]).loss
        scaler.scale(loss * (1e30 if number == 1 else 1.0)).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(trained(model), 0.1)
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        confinement.project()  # a callback too
        skipped += scaler.get_scale() < before
    assert skipped == 1
    assert outside(rows(model), start) <= 1e-6


def test_in_sixteen_bits_the_rounding_is_warned_of_and_does_not_grow() -> None:
    model = get_peft_model(tiny("llama").bfloat16(), LoraConfig(**CONFIG), autocast_adapter_dtype=False)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    with pytest.warns(UserWarning, match=r"A is in torch.bfloat16, and what rounding adds to it reads all directions"):
        confine(model, covariances_for("llama"), LEAK, optimizer=optimizer)
    start = rows(model)
    step(model, optimizer, 10)
    assert outside(rows(model), start) <= torch.finfo(torch.bfloat16).eps


def test_several_adapters() -> None:
    model = adapted()
    model.add_adapter("other", LoraConfig(**CONFIG))
    before = rows(model)
    confine(model, covariances_for("llama"), LEAK, adapter_name="other")
    assert all(torch.equal(a, before[name]) for name, a in rows(model).items())
    basis = quiet(covariances_for("llama")["model.layers.1.mlp.down_proj"].matrix())
    a = rows(model, "other")["model.layers.1.mlp.down_proj"].double()
    assert (a - a @ basis @ basis.mT).norm() <= 1e-6 * a.norm()
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="the active adapters are 'default', 'other': say which one is meant"):
        confine(model, covariances_for("llama"), LEAK)


def test_damping_weakens_the_change_of_each_step() -> None:
    """A ← A_before + (A − A_before) (I + C / (τ tr C / d))⁻¹, by an independent solve; a second call changes nothing."""
    covariances, tau = covariances_for("llama"), 0.05
    model = adapted(init_lora_weights=False)
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(trained(each), lr=0.5) for each in (model, twin)]
    confinement = confine(model, covariances, damping=tau, optimizer=optimizers[0])
    for number in range(2):
        before = rows(model)
        twin.load_state_dict(model.state_dict())
        for each, optimizer in zip((model, twin), optimizers, strict=True):
            batch = random_batches(1, 2, 24, seed=number)[0]
            each(**batch, labels=batch["input_ids"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        confinement.project()
        for name, free in rows(twin).items():
            c = covariances[name].matrix()
            damped = torch.linalg.solve(torch.eye(len(c)) + c / (tau * c.trace() / len(c)), (free - before[name]).double().mT).mT
            torch.testing.assert_close(rows(model)[name].double(), before[name].double() + damped, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="damping must be a positive number, not 0"):
        confine(model, covariances, damping=0)


@pytest.mark.usefixtures("one_layout_of_four_bits")
def test_a_four_bit_base() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = tiny("llama")
    covariances = covariances_for("llama")
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            packed = bnb.nn.Linear4bit(module.in_features, module.out_features, bias=False, quant_type="nf4")
            packed.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, packed.to("cpu"))
    lora = get_peft_model(model, LoraConfig(**CONFIG))
    hold = penalty(lora, covariances)
    optimizer = torch.optim.AdamW(trained(lora), lr=1e-2)
    with confine(lora, covariances, LEAK):
        start = rows(lora)
        step(lora, optimizer)
    assert outside(rows(lora), start) <= 1e-6
    start = rows(lora)
    with oplora(lora, 5):
        step(lora, optimizer)
    drift = drift_of(lora, covariances)
    for name, layer in lora_layers(lora, "default").items():
        a, b = (each["default"].weight.detach().double() for each in (layer.lora_A, layer.lora_B))
        with torch.no_grad():
            weight = layer.get_base_layer()(torch.eye(layer.in_features)).T  # as it computes
        changed, leading = a - start[name].double(), torch.linalg.svd(weight.double()).Vh[:5]
        assert 0 < (changed @ leading.mT).norm() <= 1e-5 * changed.norm()
        change, c = LowRank(a, layer.scaling["default"] * b), covariances[name].matrix()
        assert drift.layers[name] == pytest.approx(analysis.drift(weight, c, change), rel=1e-2)
    assert float(hold().detach()) == pytest.approx(sum(value**2 for value in drift.layers.values()), rel=1e-5)


def test_the_result_is_a_plain_adapter(tmp_path: Path) -> None:
    model = adapted()
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    with confine(model, covariances_for("llama"), LEAK):
        step(model, optimizer)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny("llama"), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**BATCH).logits, model.eval()(**BATCH).logits)
