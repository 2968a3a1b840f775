"""Frozen A: B from zero on the untouched base trains as on the residual one; and what an adapter records of its start."""

from __future__ import annotations

import functools
import json
import os
import shutil
import stat
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated import RANK, sources_for, spaces_for
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from typer.testing import CliRunner

from models import random_batches, tiny
from nullspace import cli
from nullspace.artifacts import records
from nullspace.integrations.peft import (
    ForgettingCallback,
    attach_subtracted,
    confine,
    describe,
    export_lora,
    freeze_a,
    inject_adapters,
    lora_layers,
    read_course,
    save_init,
    write_init,
)
from nullspace.integrations.peft.origin import KEY, recorded

BATCH = random_batches(1, 2, 12, seed=7)[0]
Q = {"r": RANK, "lora_alpha": 12, "target_modules": ["q_proj"]}


layers_of = functools.partial(lora_layers, adapter_name="default")


def config(task: str | None = "CAUSAL_LM", **more: Any) -> LoraConfig:
    return LoraConfig(**{**Q, **more}, task_type=task)


def steps(model: PeftModel, count: int, **options: Any) -> None:
    """Of AdamW in float64; a larger eps, as Adam divides rounding by gradients of that size."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, eps=1e-5, **options)
    for _ in range(count):
        optimizer.zero_grad()
        model(**BATCH, labels=BATCH["input_ids"]).loss.backward()
        optimizer.step()


def updates(model: PeftModel) -> dict[str, torch.Tensor]:
    """Layer → the weight that it computes with, less that of the untouched model."""
    before = dict(tiny("llama").double().named_parameters())
    found = {}
    for name, layer in layers_of(model).items():
        product = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        found[name] = (layer.get_base_layer().weight + product - before[f"{name}.weight"]).detach()
    return found


def in_double(residual: str) -> PeftModel:
    return inject_adapters(tiny("llama").double(), config(), spaces_for("llama"), freeze_a=True, residual=residual).eval()


# ---- B from zero on the untouched base


def test_without_decay_training_takes_the_same_steps_as_on_the_residual_base() -> None:
    zero, residual = in_double("auto"), in_double("base")
    assert not any(layer.lora_B["default"].weight.any() for layer in layers_of(zero).values())
    assert all(layer.lora_B["default"].weight.any() for layer in layers_of(residual).values())
    for model in (zero, residual):
        assert next(model.parameters()).dtype == torch.float64
        steps(model, 3, weight_decay=0.0)
    mine, theirs = updates(zero), updates(residual)
    for name, update in mine.items():
        assert update.norm() > 1e-3
        assert (update - theirs[name]).abs().max() <= 1e-12, name


def test_decay_draws_the_update_to_zero_and_on_a_residual_base_takes_the_first_product_away() -> None:
    zero, residual = in_double("auto"), in_double("base")
    products = {
        name: (layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach()
        for name, layer in layers_of(residual).items()
    }
    for model in (zero, residual):
        steps(model, 1, weight_decay=0.5)
    theirs = updates(residual)
    for name, update in updates(zero).items():
        difference = theirs[name] - update
        assert (difference + 1e-2 * 0.5 * products[name]).abs().max() <= 1e-12, name


@pytest.mark.parametrize(("method", "frozen"), [("lora-null", "A"), ("orthogonal", "A"), ("lora-null", "B")])
def test_a_start_with_one_factor_frozen_writes_nothing_but_the_adapter(method: str, frozen: str, tmp_path: Path) -> None:
    name_of, other = f"freeze_{frozen.lower()}", {"A": "lora_B", "B": "lora_A"}[frozen]
    freeze: dict[str, Any] = {name_of: True}
    base = tiny("llama")
    base.name_or_path = base.config._name_or_path = "the/base"
    state = {name: value.clone() for name, value in base.state_dict().items()}
    sources = sources_for(method, "llama")
    torch.manual_seed(1)
    write_init(tmp_path / "two", base, config(), method=method, **freeze, progress=False, **sources)
    torch.manual_seed(1)
    model = inject_adapters(base, config(), method=method, **freeze, **sources)
    save_init(tmp_path / "one", model, sources.get("spaces"))
    weights = {
        name.replace("base_model.model.", "").replace("base_layer.", ""): value for name, value in model.state_dict().items()
    }
    assert all(torch.equal(weights[name], value) for name, value in state.items())
    for out in (tmp_path / "one", tmp_path / "two"):
        assert not {"base", "subtracted"} & {path.name for path in out.iterdir()}
        assert not any(t.any() for key, t in load_file(out / "adapter" / "adapter_model.safetensors").items() if other in key)
        written = json.loads((out / "adapter" / "adapter_config.json").read_text())
        assert written["base_model_name_or_path"] == "the/base"
        assert written["auto_mapping"][KEY][name_of] is True
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / "adapter" / name).read_bytes() == (tmp_path / "two" / "adapter" / name).read_bytes()
    steps(model, 1)
    model.save_pretrained(tmp_path / "trained")
    export_lora(tmp_path / "trained", tmp_path / "one", tmp_path / "exported")
    exported = json.loads((tmp_path / "exported" / "adapter_config.json").read_text())
    assert exported["r"] == RANK  # an export is another adapter, for the same base
    assert exported["auto_mapping"][KEY].keys() == {"model", "revision", "residual", "base"}
    assert any(f"call {name_of} after loading" in note for note in describe(tmp_path / "trained")["notes"])


# ---- what is recorded passes through plain PEFT


def started(folder: Path, task: str | None = "CAUSAL_LM", seed: int = 0, **options: Any) -> PeftModel:
    torch.manual_seed(seed)
    base = tiny("llama")
    if seed:
        torch.nn.init.normal_(base.model.layers[0].self_attn.q_proj.weight)
    base.name_or_path = base.config._name_or_path = "the/base"
    model = inject_adapters(base, config(task), **{"method": "pissa", **options}).eval()
    save_init(folder, model)
    return model


@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
def test_the_record_is_saved_with_the_trained_adapter_and_plain_peft_loads_it_without_a_word(
    task: str | None, tmp_path: Path
) -> None:
    model = started(tmp_path / "init", task, residual="adapter", freeze_a=True)
    first = recorded(model.peft_config["default"])
    assert first.keys() == {"freeze_a", "model", "revision", "residual", "base", "factors"}
    model.save_pretrained(tmp_path / "trained", selected_adapters=["default"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = PeftModel.from_pretrained(tiny("llama"), tmp_path / "trained", is_trainable=True)
    assert recorded(again.peft_config["default"]) == first
    again.save_pretrained(tmp_path / "by-peft")
    kept = recorded(records.read_json(tmp_path / "by-peft" / "adapter_config.json"))
    assert kept == ({} if task is None else first)  # without a task PEFT writes the dictionary anew …
    with pytest.warns(UserWarning, match="needs the second adapter"):
        freeze_a(again)
    again.save_pretrained(tmp_path / "by-us")  # … and here it is kept
    mapping = json.loads((tmp_path / "by-us" / "adapter_config.json").read_text())["auto_mapping"]
    assert mapping[KEY] == first
    assert task is not None or mapping["base_model_class"] == "LlamaForCausalLM"


def attached(model: PeftModel, folder: Path) -> None:
    attach_subtracted(model, folder / "subtracted")


def confined(model: PeftModel, folder: Path) -> None:
    with pytest.warns(UserWarning, match="nothing to confine"):
        confine(model, spaces_for("llama"))


def called_back(model: PeftModel, folder: Path) -> None:
    sources = sources_for("corda-kpm", "llama")
    ForgettingCallback(sources["covariances"]).on_init_end(None, None, None, model=model)


@pytest.mark.parametrize("helper", [attached, confined, called_back])
def test_a_is_frozen_again_on_reload(helper: Callable[[PeftModel, Path], None], tmp_path: Path) -> None:
    for frozen in (True, False) if helper is attached else (True,):
        folder = tmp_path / str(frozen)
        started(folder, residual="adapter", freeze_a=frozen)
        again = PeftModel.from_pretrained(tiny("llama"), folder / "adapter", is_trainable=True)
        assert any(p.requires_grad for name, p in again.named_parameters() if "lora_A" in name)
        helper(again, folder)
        assert frozen != any(p.requires_grad for name, p in again.named_parameters() if "lora_A.default" in name)


def test_b_is_frozen_again_on_reload_and_an_export_warns_where_it_has_changed(tmp_path: Path) -> None:
    model = started(tmp_path / "init", method="lora-null", spaces=spaces_for("llama"), residual="adapter", freeze_b=True)
    record = recorded(model.peft_config["default"])
    assert (record["freeze_a"], record["freeze_b"]) == (False, True)
    steps(model, 1)
    model.save_pretrained(tmp_path / "trained", selected_adapters=["default"])
    export_lora(tmp_path / "trained", tmp_path / "init", tmp_path / "exported")
    assert records.read_json(tmp_path / "exported" / "adapter_config.json")["r"] == RANK
    again = PeftModel.from_pretrained(tiny("llama"), tmp_path / "trained", is_trainable=True)
    attached(again, tmp_path / "init")
    assert {n.split(".")[-3] for n, p in again.named_parameters() if p.requires_grad} == {"lora_A"}
    for p in (p for name, p in again.named_parameters() if "lora_B.default" in name):
        p.requires_grad_(True)
    steps(again, 1)
    again.save_pretrained(tmp_path / "both", selected_adapters=["default"])
    with pytest.warns(UserWarning, match=r"trained with B frozen, but B has changed in 3 layers.*without freeze_b.*columns"):
        export_lora(tmp_path / "both", tmp_path / "init", tmp_path / "again")


# ---- whether two folders belong together


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two starts of equal settings and shapes, and what each was trained to, with A too."""
    folder = tmp_path_factory.mktemp("pairs")
    for name, seed in (("one", 0), ("two", 1)):
        model = started(folder / name, seed=seed, residual="base", freeze_a=False)
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.add_(0.02 * torch.randn_like(parameter))
        model.save_pretrained(folder / f"{name}-trained")
    return folder


@pytest.fixture
def copies(pairs: Path, tmp_path: Path) -> Path:
    shutil.copytree(pairs, tmp_path / "pairs")
    return tmp_path / "pairs"


def test_starts_of_equal_shapes_are_told_apart(copies: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        export_lora(copies / "one-trained", copies / "one", copies / "out")
        read_course("a", copies / "one", copies / "one-trained")
    words = "do not belong together: the digest of the first A and B"
    for call in (
        lambda: export_lora(copies / "one-trained", copies / "two", copies / "none"),
        lambda: read_course("a", copies / "two", copies / "one-trained"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    assert not (copies / "none").exists()
    shutil.copy(copies / "one-trained" / "adapter_model.safetensors", copies / "one" / "adapter")  # trained in place
    with pytest.raises(ValueError, match="no longer holds the factors that it started with"):
        export_lora(copies / "one-trained", copies / "one", copies / "none")


def forget(directory: Path) -> None:
    """Make an adapter one of an earlier version."""
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_mapping": None}))


def test_folders_from_before_are_read_with_a_word_on_what_could_not_be_checked(copies: Path) -> None:
    forget(copies / "one-trained")
    with pytest.warns(UserWarning, match="no record of the first factors is in .*one-trained .*settings and shapes alone"):
        export_lora(copies / "one-trained", copies / "one", copies / "out")
    forget(copies / "one" / "adapter")
    with pytest.warns(UserWarning, match="no record of the first factors is in .*one-trained and .*adapter "):
        export_lora(copies / "one-trained", copies / "one", copies / "out", overwrite=True)


def test_a_residual_base_with_frozen_a_from_before_is_exported_without_a_word(tmp_path: Path) -> None:
    model = started(tmp_path / "init", residual="base", freeze_a=True)
    steps(model, 1)
    model.save_pretrained(tmp_path / "trained")
    forget(tmp_path / "init" / "adapter")
    forget(tmp_path / "trained")
    with warnings.catch_warnings():  # the same A: no other start has it
        warnings.simplefilter("error", UserWarning)
        export_lora(tmp_path / "trained", tmp_path / "init", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == RANK


def test_an_a_that_was_to_be_frozen_and_has_changed_is_said(tmp_path: Path) -> None:
    model = started(tmp_path / "init", freeze_a=True)
    with torch.no_grad():
        next(iter(layers_of(model).values())).lora_A["default"].weight.add_(1.0)
    model.save_pretrained(tmp_path / "trained")
    with pytest.warns(UserWarning, match="recorded as trained with A frozen, but A has changed in 1 layers"):
        export_lora(tmp_path / "trained", tmp_path / "init", tmp_path / "out")


@pytest.mark.parametrize("record", [3, {"freeze_a": "yes"}, {"factors": 1}], ids=str)
def test_a_damaged_record_is_named(record: Any, copies: Path) -> None:
    path = copies / "one-trained" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_mapping": {KEY: record}}))
    with pytest.raises(ValueError, match=r"one-trained.*nullspace in auto_mapping"):
        export_lora(copies / "one-trained", copies / "one", copies / "out")


# ---- export --rank


def test_an_export_is_cut_to_a_rank_by_the_inputs_or_without_them(copies: Path) -> None:
    covariances = sources_for("corda-kpm", "llama")["covariances"]
    covariances.save(copies / "task")
    arguments = ["export", str(copies / "one-trained"), "--initial", str(copies / "one"), "--out"]
    export_lora(copies / "one-trained", copies / "one", copies / "whole")
    more = {"plain": [], "weighted": ["--covariances", str(copies / "task")]}
    for name, options in more.items():
        result = CliRunner().invoke(cli.app, [*arguments, str(copies / name), "--rank", "3", *options])
        assert result.exit_code == 0, result.output
        assert ("The inputs were not looked at" in result.stdout) == (name == "plain")
    errors: dict[str, float] = {}
    whole = load_file(copies / "whole" / "adapter_model.safetensors")
    for name in more:
        tensors = load_file(copies / name / "adapter_model.safetensors")
        errors[name] = 0.0
        for key in (key for key in tensors if "lora_A" in key):
            assert tensors[key].shape[0] == 3
            layer = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            delta, cut = (each[key.replace("lora_A", "lora_B")].double() @ each[key].double() for each in (whole, tensors))
            errors[name] += float(((delta - cut) @ covariances[layer].matrix() * (delta - cut)).sum())
    assert errors["weighted"] < errors["plain"]
    facts = records.read_manifest(copies / "weighted", "export")["truncated"]
    assert (facts["rank"], facts["weighted"], facts["by"]) == (3, True, str(copies / "task"))
    assert 0 < facts["lost"] <= facts["worst"] < 1
    result = CliRunner().invoke(cli.app, [*arguments, str(copies / "none"), "--covariances", str(copies / "task")])
    assert result.exit_code == 2
    with pytest.raises(ValueError, match="give rank="):
        export_lora(copies / "one-trained", copies / "one", copies / "none", covariances=covariances)


# ---- permissions


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_what_is_written_has_the_permissions_that_the_umask_gives(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        started(tmp_path / "init", residual="base")
        write_init(tmp_path / "two", tiny("llama"), config(), method="pissa", progress=False)
        spaces_for("llama").save(tmp_path / "spaces")
        export_lora(tmp_path / "init" / "adapter", tmp_path / "init", tmp_path / "out")
        records.write_tensors(tmp_path / "alone.safetensors", {"a": torch.ones(2)})
    finally:
        os.umask(before)
    paths = list(tmp_path.rglob("*"))
    assert len([path for path in paths if path.suffix == ".safetensors"]) > 6
    for path in paths:
        wanted = (0o777 if path.is_dir() else 0o666) & ~mask
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path
