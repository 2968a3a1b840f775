"""`ForgettingCallback` in a Trainer: logs, reporters, budgets, and the card of what is saved."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from calibrated import covariances_for, spaces_for
from guarded import CONFIG, adapted, rows, trainer_of, word_tokenizer
from peft import LoraConfig, PeftModel

from models import tiny
from nullspace.integrations.peft import ForgettingCallback, drift_of, freeze_a, inject_adapters, lora_layers, save_init

TEXTS = ["w3 w9 w4 w50 w71 w7", "w8 w8 w39"]


class Reporter(transformers.TrainerCallback):
    """As W&B's callback: it keeps what it is given at the time."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, *, logs: Any = None, **_: Any) -> None:
        self.seen.append(dict(logs))


def kl(model: PeftModel, base: torch.nn.Module) -> float:
    total = count = 0.0
    for text in TEXTS:
        ids = word_tokenizer()(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            p, q = (each.eval()(input_ids=ids).logits[0].double().log_softmax(-1) for each in (base, model))
        total += float((p.exp() * (p - q)).sum())
        count += ids.numel()
    return total / count


def test_the_log_the_reporters_and_the_history_have_drift_and_kl(tmp_path: Path) -> None:
    model, covariances = adapted(lora_dropout=0.2), covariances_for("llama")
    callback, reporter = ForgettingCallback(covariances, texts=TEXTS, tokenizer=word_tokenizer()), Reporter()
    trainer = trainer_of(model, tmp_path, callbacks=[reporter])
    assert callback.attach(trainer) is callback
    trainer.train()
    history = [each for each in trainer.state.log_history if "loss" in each]
    assert [each["step"] for each in history] == [1, 2, 3, 4]
    for entry, seen, reading in zip(history, reporter.seen, callback.readings, strict=False):
        for name, value in (("drift", reading.drift.median), ("worst_drift", reading.drift.worst), ("kl_to_base", reading.kl)):
            assert entry[name] == seen[name] == value
    last, now = callback.readings[-1], drift_of(model, covariances)
    assert last.step == 4
    assert now.layers == pytest.approx(last.drift.layers)
    assert last.kl == pytest.approx(kl(model, tiny("llama")), rel=1e-4)
    assert last.kl > 0
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())


def test_without_attach_the_reporters_are_named(tmp_path: Path) -> None:
    callback = ForgettingCallback(covariances_for("llama"))
    trainer = trainer_of(adapted(), tmp_path, callbacks=[callback], max_steps=1)
    trainer.args.report_to = ["somewhere"]
    with pytest.warns(UserWarning, match=r"somewhere will not get drift and KL: call attach\(trainer\)"):
        trainer.train()
    assert "drift" in trainer.state.log_history[0]
    assert "kl_to_base" not in trainer.state.log_history[0]


def test_stops_at_a_budget(tmp_path: Path) -> None:
    callback = ForgettingCallback(covariances_for("llama"), drift_budget=1e-9)
    trainer = trainer_of(adapted(), tmp_path, callbacks=[callback])
    with pytest.warns(UserWarning, match=r"after step 1 drift is \S+, above drift_budget=1e-09: the training stops"):
        trainer.train()
    assert trainer.state.global_step == 1


class Rates(transformers.TrainerCallback):
    """The learning rate of every step."""

    def __init__(self) -> None:
        self.taken: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, optimizer: Any = None, **_: Any) -> None:
        self.taken.append(float(optimizer.param_groups[0]["lr"]))


@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_slows_down_for_good(tmp_path: Path, schedule: str) -> None:
    usual, slower = Rates(), Rates()
    slows = ForgettingCallback(covariances_for("llama"), drift_budget=1e-12, on_budget="slow", slow_by=0.25)
    trainer_of(adapted(), tmp_path, callbacks=[usual], lr_scheduler_type=schedule, save_strategy="no").train()
    trainer = trainer_of(adapted(), tmp_path, callbacks=[slows, slower], lr_scheduler_type=schedule, save_strategy="no")
    with pytest.warns(UserWarning, match="drift_budget=1e-12: the learning rates are multiplied by 0.25"):
        trainer.train()
    assert slower.taken == pytest.approx([rate * 0.25**count for count, rate in enumerate(usual.taken)])


def test_a_residual_base_is_compared_with_the_start(tmp_path: Path) -> None:
    """Also when a checkpoint is resumed in another process, where the start is beside the base."""
    covariances, untouched = covariances_for("llama"), tiny("llama")
    model = inject_adapters(tiny("llama"), LoraConfig(**CONFIG), spaces_for("llama"))
    save_init(tmp_path / "init", model)
    callback = ForgettingCallback(covariances, texts=TEXTS, tokenizer=word_tokenizer())
    trainer_of(model, tmp_path / "out", callbacks=[callback]).train()
    assert callback.readings[-1].kl == pytest.approx(kl(model, untouched), rel=1e-3)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "init" / "base", dtype="auto")
    again = PeftModel.from_pretrained(base, tmp_path / "init" / "adapter", is_trainable=True)
    resumed = ForgettingCallback(covariances, texts=TEXTS, tokenizer=word_tokenizer())
    trainer = trainer_of(again, tmp_path / "again", callbacks=[resumed])
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    for ours, theirs in zip(resumed.readings, callback.readings[2:], strict=True):
        assert ours.step == theirs.step
        assert ours.drift.layers == pytest.approx(theirs.drift.layers, rel=1e-3)
        assert ours.kl == pytest.approx(theirs.kl, rel=1e-3)
    loaded = PeftModel.from_pretrained(base, tmp_path / "out" / "checkpoint-4")
    assert drift_of(loaded, covariances).layers == pytest.approx(callback.readings[-1].drift.layers, rel=1e-3)
    assert drift_of(loaded, covariances, initial=tmp_path / "init").layers == pytest.approx(
        callback.readings[-1].drift.layers, rel=1e-3
    )


def test_a_card_has_the_reading_of_what_is_saved(tmp_path: Path) -> None:
    for model, name in (
        (adapted(), "plain"),
        (inject_adapters(tiny("llama"), LoraConfig(**CONFIG), spaces_for("llama")), "residual"),
    ):
        if name == "residual":
            save_init(tmp_path / "init", model)
            freeze_a(model)
        callback = ForgettingCallback(covariances_for("llama"), texts=TEXTS, tokenizer=word_tokenizer())
        trainer = trainer_of(model, tmp_path / name, callbacks=[callback], logging_steps=3)
        trainer.train()
        trainer.save_model(str(tmp_path / name / "final"))
        trainer.save_model(str(tmp_path / name / "final"))  # PEFT writes into the card that is there
        by_step = {reading.step: reading for reading in callback.readings}
        for folder, number in (("checkpoint-2", 2), ("checkpoint-4", 4), ("final", 4)):
            card = (tmp_path / name / folder / "README.md").read_text()
            assert card.count("## Drift from the base model") == 1
            assert f"after step {number}:" in card
            assert f"| {by_step[number].drift.median:.3g} |" in card
            assert f"KL to the base, nats a token (9 tokens) | {by_step[number].kl:.3g} |" in card
            assert ("Its base is a residual model" in card) == (name == "residual")
            assert "library_name: peft" in card


def test_bad_arguments_are_refused() -> None:
    covariances = covariances_for("llama")
    for options, text in (
        ({"on_budget": "halt"}, "on_budget must be one of 'stop', 'slow', 'warn', not 'halt'"),
        ({"kl_budget": 0.1}, "kl_budget needs texts"),
        ({"drift_budget": -1.0}, "drift_budget must be a positive number"),
        ({"drift_budget": math.nan}, "drift_budget must be a positive number"),
        ({"slow_by": 1.0}, "slow_by must be between 0 and 1, without them"),
    ):
        with pytest.raises(ValueError, match=text):
            ForgettingCallback(covariances, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("texts", "tokenizer", "text"), [([], True, "list of strings"), (["w3"], False, "texts need a tokenizer")])
def test_texts_that_cannot_be_read_are_refused_when_the_training_begins(
    tmp_path: Path, texts: list[str], tokenizer: bool, text: str
) -> None:
    callback = ForgettingCallback(covariances_for("llama"), texts=texts, tokenizer=word_tokenizer() if tokenizer else None)
    with pytest.raises(ValueError, match=text):
        trainer_of(adapted(), tmp_path, callbacks=[callback]).train()


def test_several_adapters(tmp_path: Path) -> None:
    model = adapted()
    model.add_adapter("other", LoraConfig(**CONFIG))
    with torch.no_grad():
        for layer in lora_layers(model, "other").values():
            layer.lora_B["other"].weight.normal_()
    callback = ForgettingCallback(covariances_for("llama"))
    trainer_of(model, tmp_path, callbacks=[callback], max_steps=1).train()
    assert callback.readings[-1].drift == drift_of(model, covariances_for("llama"), adapter_name="default")
    assert callback.readings[-1].drift.median < drift_of(model, covariances_for("llama"), adapter_name="other").median
    assert rows(model, "other").keys() == rows(model).keys()
