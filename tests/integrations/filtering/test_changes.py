"""Adapters of every origin, filtered: what they do to the untouched base is ΔW F, in PEFT's own forward."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from tasks import RANK, TARGETS, check_filtered, effects, moments, stir

from models import tiny
from nullspace.integrations.peft import (
    adapter_drift,
    attach_subtracted,
    describe,
    export_lora,
    filter_adapter,
    inject_adapters,
    save_init,
)

quiet = functools.partial(filter_adapter, progress=False)


def started(folder: Path, *, name: str = "llama", **options: Any) -> Any:
    """A model that starts by PiSSA, written to folder/init."""
    base = tiny("llama")
    base.save_pretrained(folder / name)
    base.name_or_path = base.config._name_or_path = str(folder / name)
    config = LoraConfig(r=RANK, lora_alpha=12, target_modules=TARGETS["llama"], rank_pattern={"v_proj": 2})
    model = inject_adapters(base, config, method="pissa", **options)
    save_init(folder / "init", model)
    return model


def loaded(directory: Path) -> Any:
    return PeftModel.from_pretrained(tiny("llama"), directory)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_on_a_residual_base_the_result_is_for_the_untouched_one(frozen: bool, tmp_path: Path) -> None:
    model = started(tmp_path, residual="base", freeze_a=frozen)
    stir(model)
    model.save_pretrained(tmp_path / "trained")
    with pytest.raises(ValueError, match=r"'default' is on a residual base.*filter its directory.*export_lora"):
        quiet(model, *moments("llama"), strength=1.0)
    result = quiet(tmp_path / "trained", *moments("llama"), tmp_path / "out", strength=1.0)  # the start is read beside the base
    before, after = effects(model), effects(loaded(tmp_path / "out"))
    check_filtered(before, after, 1.0, tolerance=1e-5)
    document = describe(tmp_path / "out")
    assert (document["kind"], document["base_kind"], document["rank"]) == ("filtered", "untouched", RANK if frozen else 2 * RANK)
    assert document["base"] == str(tmp_path / "llama")
    drift = adapter_drift(tmp_path / "trained", moments("llama")[1], progress=False)
    assert adapter_drift(tmp_path / "out", moments("llama")[1], progress=False).median == pytest.approx(
        drift.median * result.after.left, rel=0.2
    )
    # Moved, the start has to be named; and a plain adapter of it serves as well.
    shutil.move(tmp_path / "init", tmp_path / "moved")
    with pytest.raises(ValueError, match=r"was trained on a base without what it started with.*initial="):
        quiet(tmp_path / "trained", *moments("llama"), tmp_path / "none", strength=1.0)
    for initial in (tmp_path / "moved", tmp_path / "moved" / "adapter"):
        quiet(tmp_path / "trained", *moments("llama"), tmp_path / "named", strength=1.0, initial=initial, base="b", overwrite=True)
        check_filtered(before, effects(loaded(tmp_path / "named")), 1.0, tolerance=1e-5)
    export_lora(tmp_path / "trained", tmp_path / "moved", tmp_path / "plain")
    quiet(tmp_path / "plain", *moments("llama"), tmp_path / "of-plain", strength=1.0)
    check_filtered(before, effects(loaded(tmp_path / "of-plain")), 1.0, tolerance=1e-5)
    # The untrained adapter changes nothing, and neither does its filter.
    quiet(tmp_path / "moved" / "adapter", *moments("llama"), tmp_path / "untrained", strength=1.0)
    assert all(not change.any() for change in effects(loaded(tmp_path / "untrained")).values())


def test_with_a_second_adapter_the_folder_and_the_model_are_filtered(tmp_path: Path) -> None:
    model = started(tmp_path, residual="adapter")
    stir(model)
    model.save_pretrained(tmp_path / "trained")  # both adapters, the second in a subfolder
    model.save_pretrained(tmp_path / "alone", selected_adapters=["default"])
    quiet(tmp_path / "trained", *moments("llama"), tmp_path / "out", strength=1.0)
    with pytest.raises(ValueError, match="initial="):
        quiet(tmp_path / "alone", *moments("llama"), tmp_path / "none", strength=1.0)
    for initial in ("init", "init/subtracted"):
        quiet(tmp_path / "alone", *moments("llama"), tmp_path / "named", strength=1.0, initial=tmp_path / initial, overwrite=True)
    again = PeftModel.from_pretrained(tiny("llama"), tmp_path / "trained")
    attach_subtracted(again, tmp_path / "trained" / "default_subtracted")
    quiet(again, *moments("llama"), strength=1.0)
    before = effects(model)
    assert again.active_adapters == ["default", "default_subtracted"]
    for after in (effects(again), effects(loaded(tmp_path / "out")), effects(loaded(tmp_path / "named"))):
        check_filtered(before, after, 1.0, tolerance=2e-5)
    assert describe(tmp_path / "out")["base"] == str(tmp_path / "llama")


def test_a_second_adapter_of_another_name_lies_beside_the_first(tmp_path: Path) -> None:
    config = LoraConfig(r=RANK, lora_alpha=12, target_modules=["q_proj"])
    model = inject_adapters(tiny("llama"), config, method="pissa", residual="adapter", adapter_name="math")
    stir(model)
    model.save_pretrained(tmp_path / "trained")
    assert sorted(path.name for path in (tmp_path / "trained").glob("*/")) == ["math", "math_subtracted"]
    for place in ("trained", "trained/math"):
        quiet(tmp_path / place, *moments("llama"), tmp_path / "out", strength=1.0, overwrite=True)
        after = effects(loaded(tmp_path / "out"))
    before = effects(model)
    check_filtered(before, after, 1.0, tolerance=2e-5)
    quiet(model.float(), *moments("llama"), strength=1.0)
    check_filtered(before, effects(model), 1.0, tolerance=2e-5)


@pytest.mark.slow
def test_a_trainers_checkpoint_that_was_resumed(tmp_path: Path) -> None:
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 60, (8, 16))]
    arguments = transformers.TrainingArguments(
        str(tmp_path / "run"),
        max_steps=2,
        per_device_train_batch_size=4,
        save_steps=1,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    transformers.Trainer(started(tmp_path, residual="adapter"), arguments, train_dataset=rows).train()
    model = started(tmp_path / "again", residual="adapter")
    transformers.Trainer(model, arguments, train_dataset=rows).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    result = quiet(tmp_path / "run" / "checkpoint-2", *moments("llama"), tmp_path / "out", drift=1e-3, base=tiny("llama"))
    assert result.after.drift == pytest.approx(1e-3, rel=1e-6)
    check_filtered(effects(model), effects(loaded(tmp_path / "out")), result.strength, tolerance=1e-4)


def test_several_adapters_in_one_folder_and_in_one_model(tmp_path: Path) -> None:
    model = get_peft_model(tiny("llama"), LoraConfig(r=RANK, target_modules=["q_proj"]), adapter_name="one")
    model.add_adapter("two", LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "down_proj"]))
    for name in ("one", "two"):
        model.set_adapter(name)
        stir(model)
    model.save_pretrained(tmp_path / "both")
    with pytest.raises(ValueError, match=r"holds the adapters 'one', 'two': choose one"):
        quiet(tmp_path / "both", *moments("llama"), tmp_path / "out", strength=1.0)
    with pytest.raises(ValueError, match="holds no adapter of the name 'three'"):
        quiet(tmp_path / "both", *moments("llama"), tmp_path / "out", strength=1.0, adapter_name="three")
    quiet(tmp_path / "both", *moments("llama"), tmp_path / "out", strength=1.0, adapter_name="two")
    check_filtered(effects(loaded(tmp_path / "both" / "two")), effects(loaded(tmp_path / "out")), 1.0)
    one = {name: p.clone() for name, p in model.named_parameters() if ".one." in name}
    quiet(model, *moments("llama"), strength=1.0)  # the active one
    check_filtered(effects(loaded(tmp_path / "both" / "two")), {n: e for n, e in effects(model).items() if e.any()}, 1.0)
    assert all(torch.equal(p.float(), one[name]) for name, p in model.named_parameters() if ".one." in name)


def test_peft_initialisations_that_change_the_base_need_their_start(tmp_path: Path) -> None:
    model = get_peft_model(tiny("llama"), LoraConfig(r=RANK, target_modules=["q_proj"], init_lora_weights="pissa"))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "init")
    model.peft_config["default"].init_lora_weights = "pissa"
    stir(model)
    model.save_pretrained(tmp_path / "trained")
    with pytest.raises(ValueError, match=r"init_lora_weights='pissa'.*initial="):
        quiet(tmp_path / "trained", *moments("llama"), tmp_path / "out", strength=1.0)
    with pytest.raises(ValueError, match="residual base"):
        quiet(model, *moments("llama"), strength=1.0)
    quiet(tmp_path / "trained", *moments("llama"), tmp_path / "out", strength=1.0, initial=tmp_path / "init", base="a/base")
    check_filtered(effects(model), effects(loaded(tmp_path / "out")), 1.0, tolerance=1e-5)


def test_an_adapter_of_another_start_or_base_is_refused(tmp_path: Path) -> None:
    model = started(tmp_path, residual="base")
    stir(model)
    model.save_pretrained(tmp_path / "trained")
    get_peft_model(tiny("llama"), LoraConfig(r=RANK, target_modules=["q_proj"])).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="do not belong together"):
        quiet(tmp_path / "trained", *moments("llama"), tmp_path / "out", strength=1.0, initial=tmp_path / "other")
    with pytest.raises(ValueError, match="is a residual base, and the changes are of the untouched model"):
        quiet(tmp_path / "trained", *moments("llama"), tmp_path / "out", strength=1.0, base=tmp_path / "init" / "base")
    with pytest.raises(ValueError, match="is the residual base of an adapter"):
        adapter_drift(tmp_path / "trained", moments("llama")[1], model.get_base_model(), progress=False)
    with pytest.raises(FileNotFoundError, match="is not a PEFT adapter"):
        quiet(tmp_path / "llama", *moments("llama"), tmp_path / "out", strength=1.0)
    assert not (tmp_path / "out").exists()
