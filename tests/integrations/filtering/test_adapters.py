"""`filter_adapter` against dense products on materialised inputs and PEFT's own forward: forecasts, budgets, refusals."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tasks import RANK, TARGETS, check_filtered, covariances_of, effects, inputs, moments, stir

from models import tiny
from nullspace import Covariance, Covariances
from nullspace.integrations.peft import adapter_drift, drift_of, filter_adapter, filter_path
from nullspace.model.linear import is_conv1d

quiet = functools.partial(filter_adapter, progress=False)
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"lora_alpha": 12},
    "rslora": {"lora_alpha": 12, "use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 9, "layers.1.mlp.down_proj": 2}},
    "gpt2": {"fan_in_fan_out": True},
}


def adapted(family: str = "llama", **config: Any) -> PeftModel:
    model = get_peft_model(tiny(family), LoraConfig(**{"r": RANK, "target_modules": TARGETS[family], **config}))
    stir(model)
    return model


@pytest.mark.parametrize("kind", CONFIGS)
def test_layers_answer_as_the_formula_says_and_as_forecast(kind: str, tmp_path: Path) -> None:
    family = "gpt2" if kind == "gpt2" else "llama"
    model = adapted(family, **CONFIGS[kind])
    model.save_pretrained(tmp_path / "trained")
    task, keep = moments(family)
    result = quiet(tmp_path / "trained", task, keep, tmp_path / "out", strength=2.0, base=tiny(family))
    live = quiet(model, task, keep, strength=2.0)
    assert live.path == result.path
    before, after = (effects(PeftModel.from_pretrained(tiny(family), tmp_path / name), family) for name in ("trained", "out"))
    check_filtered(before, after, 2.0, family=family)
    drift = adapter_drift(tmp_path / "out", keep, tiny(family), progress=False)
    gauge = drift_of(model, keep)
    check_filtered(before, effects(model, family), 2.0, family=family)
    # The forecast is what happens to the outputs.
    x_task, x_keep = inputs(family)
    base = tiny(family).double()
    at = result.path.strengths.index(2.0)
    for layer in result.path.layers:
        name, forecast = layer.layer, layer.forecasts[at]
        moved = [float((x[name] @ after[name].mT).norm() / (x[name] @ before[name].mT).norm()) for x in (x_task, x_keep)]
        assert forecast.drift == pytest.approx(moved[1], rel=1e-4)
        assert forecast.response == pytest.approx(moved[0], rel=2e-2)  # with the ridge
        module: Any = base.get_submodule(name)
        weight = module.weight.detach().mT if is_conv1d(module) else module.weight.detach()
        output = float((x_keep[name] @ weight.mT).norm())
        assert layer.drift == pytest.approx(float((x_keep[name] @ before[name].mT).norm()) / output, rel=1e-4)
        assert drift.layers[name] == pytest.approx(float((x_keep[name] @ after[name].mT).norm()) / output, rel=1e-4)
    for each in (drift, gauge):
        assert each.median == pytest.approx(result.after.drift, rel=1e-4)
        assert (each.worst, each.worst_layer) == (pytest.approx(result.after.worst_drift, rel=1e-4), result.after.worst_layer)


def test_strength_zero_changes_no_bit_and_the_rest_of_the_adapter_never_changes(tmp_path: Path) -> None:
    model = adapted(**CONFIGS["patterns"]).bfloat16()
    model.save_pretrained(tmp_path / "trained")
    for strength in (0.0, 1.0):
        quiet(tmp_path / "trained", *moments("llama"), tmp_path / "out", strength=strength, overwrite=True)
        before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("trained", "out"))
        assert {t.dtype for t in after.values()} == {torch.bfloat16}
        changed = {key for key, t in before.items() if not torch.equal(t, after[key])}
        assert changed == (set() if strength == 0 else {key for key in before if "lora_A" in key})
        old, new = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("trained", "out"))
        assert {key for key in old if old[key] != new[key]} <= {"inference_mode"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "filtered to forget less" in card
    assert "μ = 1" in card
    # What float16 cannot hold is written in float32.
    path = tmp_path / "trained" / "adapter_model.safetensors"
    save_file({key: t.half() for key, t in load_file(path).items()}, path)
    quiet(tmp_path / "trained", *moments("llama"), tmp_path / "out", strength=1.0, scale=1e-6, overwrite=True)
    dtypes = {key.split(".")[-2]: t.dtype for key, t in load_file(tmp_path / "out" / "adapter_model.safetensors").items()}
    assert dtypes == {"lora_A": torch.float32, "lora_B": torch.float16}


def test_budgets_are_met_by_the_filter_that_changes_least(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path / "trained")
    task, keep = moments("llama")
    path = filter_path(
        tmp_path / "trained", task, keep, base=tiny("llama"), strengths=[0, 1e-6, 1e-3, 0.1, 1, 10, 1e6], progress=False
    )
    for figures in ([step.drift for step in path.steps], [step.response for step in path.steps]):
        assert figures == sorted(figures, reverse=True)
    wanted = 0.3 * path.at(0.0).drift
    out = tmp_path / "out"
    by_drift = quiet(tmp_path / "trained", task, keep, out, drift=wanted, base=tiny("llama"))
    assert by_drift.after.drift == pytest.approx(wanted, rel=1e-6)
    assert by_drift.after.drift <= wanted
    measured = adapter_drift(out, keep, tiny("llama"), progress=False)
    assert measured.median == pytest.approx(wanted, rel=1e-4)
    by_response = quiet(tmp_path / "trained", task, keep, out, retain=0.8, overwrite=True)
    assert 0.8 <= by_response.after.response <= 0.8 * (1 + 1e-6)
    scaled = quiet(tmp_path / "trained", task, keep, out, drift=wanted, scale=0.5, base=tiny("llama"), overwrite=True)
    assert 0 < scaled.strength < by_drift.strength
    assert scaled.after.drift == pytest.approx(wanted, rel=1e-6)
    before, after = (effects(PeftModel.from_pretrained(tiny("llama"), tmp_path / name)) for name in ("trained", "out"))
    check_filtered(before, after, scaled.strength, scale=0.5, tolerance=1e-5)
    # Enough is enough, and what cannot be reached is said.
    assert quiet(tmp_path / "trained", task, keep, out, drift=1e9, base=tiny("llama"), overwrite=True).strength == 0
    assert quiet(tmp_path / "trained", task, keep, out, retain=1e-9, overwrite=True).strength == 1e6
    with pytest.raises(ValueError, match=r"no filter brings the median drift to 1e-12: it is 0\.\d+ without one"):
        quiet(tmp_path / "trained", task, keep, out, drift=1e-12, base=tiny("llama"), overwrite=True)
    with pytest.raises(ValueError, match=r"no filter retains 0\.9 of the task's response: with scale 0\.5 it is 0\.5"):
        quiet(tmp_path / "trained", task, keep, out, retain=0.9, scale=0.5, overwrite=True)
    for arguments, words in (
        ({}, "exactly one of strength, drift and retain, not none"),
        ({"strength": 1, "retain": 0.5}, "not strength, retain"),
        ({"strength": -1}, "strength must be a number ≥ 0"),
        ({"strength": float("nan")}, "strength must be"),
        ({"retain": 1.5}, "retain must be above 0 and at most 1"),
        ({"strength": 1, "scale": 0}, "scale must be a positive number"),
        ({"strength": 1, "ridge": 0}, "ridge must be a positive number"),
    ):
        with pytest.raises(ValueError, match=words):
            quiet(tmp_path / "trained", task, keep, tmp_path / "none", **arguments)
    with pytest.raises(TypeError, match="out is needed"):
        quiet(tmp_path / "trained", task, keep, strength=1)
    assert not (tmp_path / "none").exists()


def test_layers_without_their_second_moments_are_refused_by_name(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path / "trained")
    task, keep = moments("llama")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def without(known: Covariances, left_out: str) -> Covariances:
        return Covariances([(site, known[site.name]) for site in known.sites if left_out not in site.members])

    other = tiny("llama", seed=1)
    fake = Covariances([(site, Covariance.from_matrix(torch.zeros(site.d_in, site.d_in))) for site in keep.sites])
    for given, words in (
        ((task, without(keep, "model.layers.1.mlp.down_proj")), r"'model\.layers\.1\.mlp\.down_proj'.*no second moment in keep"),
        (
            (without(task, "model.layers.2.self_attn.v_proj"), keep),
            r"'model\.layers\.2\.self_attn\.q_proj'.*no second moment in task",
        ),
        ((task, moments("gpt2")[1]), "no second moment in keep"),
        ((task, covariances_of(tiny("qwen2"), [{"input_ids": torch.arange(3, 60)[None]}])), "weight|no second moment in keep"),
        ((task, covariances_of(other, [{"input_ids": torch.arange(3, 60)[None]}])), "task and keep are of different models"),
        ((task, fake), "second moment of the inputs to be kept is zero: leave the layer out"),
    ):
        for adapter, place in ((tmp_path / "trained", tmp_path / "out"), (model, None)):
            with pytest.raises(ValueError, match=words):
                quiet(adapter, *given, place, strength=1.0)
    # Of another model, both: the weights tell, where they are at hand.
    both = [covariances_of(other, [{"input_ids": torch.arange(3, 60)[None]}])] * 2
    for arguments in ((model, *both), (tmp_path / "trained", *both, tmp_path / "out")):
        with pytest.raises(ValueError, match="is of another model: the weight of"):
            quiet(*arguments, strength=1.0, base=None if arguments[0] is model else tiny("llama"))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert [path.name for path in tmp_path.iterdir()] == ["trained"]


def test_what_the_filter_does_not_reach_is_kept_and_named(tmp_path: Path) -> None:
    task, keep = moments("llama")
    for config, words in (
        ({"modules_to_save": ["lm_head"]}, "whole tensors.*lm_head"),
        ({"bias": "lora_only", "lora_bias": True}, "biases of B"),
        ({"trainable_token_indices": {"embed_tokens": [3, 5]}}, "trained tokens.*embed_tokens"),
        ({"use_dora": True}, "DoRA magnitudes.*filter and forecast are of the direction B A alone"),
    ):
        model = adapted(**config)
        model.save_pretrained(tmp_path / "trained")
        with pytest.warns(UserWarning, match=words):
            result = quiet(tmp_path / "trained", task, keep, tmp_path / "out", strength=1.0, overwrite=True)
        assert result.rest
        before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("trained", "out"))
        assert {key for key, t in before.items() if not torch.equal(t, after[key])} == {key for key in before if "lora_A" in key}
        if config.get("use_dora"):
            with pytest.raises(ValueError, match=r"uses DoRA.*drift is not known"):
                adapter_drift(tmp_path / "out", keep, tiny("llama"), progress=False)
        else:
            with pytest.warns(UserWarning, match=f"{words}.*is not in the drift"):
                adapter_drift(tmp_path / "out", keep, tiny("llama"), progress=False)
        with pytest.warns(UserWarning, match=words):
            quiet(model, task, keep, strength=1.0)
        again = PeftModel.from_pretrained(tiny("llama"), tmp_path / "out")
        ours = {name: p for name, p in model.named_parameters() if "lora_A" in name}
        assert all(torch.equal(dict(again.named_parameters())[name], p) for name, p in ours.items())


def test_nan_and_merged_adapters_are_refused_and_an_error_leaves_a_model_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, keep = moments("llama")
    model = adapted()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.merge_adapter()
    with pytest.raises(ValueError, match="is merged into"):
        quiet(model, task, keep, strength=1.0)
    model.unmerge_adapter()
    with pytest.raises(ValueError, match="no LoRA adapter named 'other'"):
        quiet(model, task, keep, strength=1.0, adapter_name="other")
    with pytest.raises(TypeError, match="out belongs to the directory"):
        quiet(model, task, keep, tmp_path / "out", strength=1.0)
    # Interrupted in the middle of the writes.
    copies = iter(range(100))

    def copy(self: torch.Tensor, *arguments: Any, _plain: Any = torch.Tensor.copy_) -> torch.Tensor:
        if next(copies) == 4:
            raise KeyboardInterrupt
        return _plain(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", copy)
        with pytest.raises(KeyboardInterrupt):
            quiet(model, task, keep, strength=1.0)
    now = dict(model.named_parameters())
    assert next(copies) > 5
    assert all(
        torch.allclose(now[name], p, atol=1e-6) if "base_layer" in name else torch.equal(now[name], p) for name, p in before.items()
    )
    with torch.no_grad():
        now["base_model.model.model.layers.1.mlp.down_proj.lora_A.default.weight"][0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"NaN or Inf in A or B of 'model\.layers\.1\.mlp\.down_proj'"):
        quiet(model, task, keep, strength=1.0)


def test_sites_with_few_tokens_are_named(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path / "trained")
    task, _ = moments("llama")
    few = covariances_of(tiny("llama"), [{"input_ids": torch.arange(40, 100)[None]}])
    with pytest.warns(
        UserWarning, match=r"of few tokens.*model\.layers\.0\.mlp\.down_proj \(d_in = 112, 60 tokens of the kept text"
    ):
        quiet(tmp_path / "trained", task, few, tmp_path / "out", strength=1.0)


def test_experts_and_layers_that_are_not_linear_are_refused(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path / "trained")
    path = tmp_path / "trained" / "adapter_model.safetensors"
    tensors = load_file(path)
    experts = {f"base_model.model.model.layers.0.mlp.experts.lora_{part}.weight": torch.ones(8, 8) for part in "AB"}
    save_file({**tensors, **experts}, path)
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.mlp\.experts', for which there is no second moment"):
        quiet(tmp_path / "trained", *moments("llama"), tmp_path / "out", strength=1.0)
    save_file({**tensors, **{key: t[:, :, None, None] for key, t in experts.items()}}, path)
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.mlp\.experts' is no linear layer"):
        quiet(tmp_path / "trained", *moments("llama"), tmp_path / "out", strength=1.0)
    save_file({}, path)
    with pytest.raises(ValueError, match="no LoRA factors of a linear layer"):
        quiet(tmp_path / "trained", *moments("llama"), tmp_path / "out", strength=1.0)


def test_moments_may_be_directories_in_another_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted().save_pretrained(tmp_path / "trained")
    for known, name in zip(moments("llama"), ("task", "keep"), strict=True):
        known.save(tmp_path / name)
    tiny("llama").save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    quiet("trained", "task", "keep", "out", strength=1.0, base="base")
    record, config = (json.loads(Path("out", name).read_text()) for name in ("nullspace.json", "adapter_config.json"))
    assert record["filter"]["keep"] == str(tmp_path / "keep")
    assert record["filter"]["drift"][1] < record["filter"]["drift"][0]
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    monkeypatch.chdir("/")
    assert adapter_drift(tmp_path / "out", tmp_path / "keep", progress=False).median > 0
    with pytest.raises(FileExistsError):
        quiet(tmp_path / "trained", tmp_path / "task", tmp_path / "keep", tmp_path / "out", strength=1.0)
