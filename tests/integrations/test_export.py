"""What `export_lora` writes, read as PEFT and as simpler consumers read it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from calibrated import RANK, spaces_for
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from models import random_batches, tiny
from nullspace import cli
from nullspace.integrations.peft import export_lora, inject_adapters, save_init

BATCH = random_batches(1, 2, 16, seed=7)[0]
PATTERNS = {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"k_proj": 40, "down_proj": 5}}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**BATCH).logits


def trained(folder: Path, config: dict[str, Any], *, name: str | None = "the/base", **options: Any) -> PeftModel:
    """A start written to folder/init, and after some change to its parameters folder/trained."""
    base = tiny("llama")
    if name is not None:
        base.name_or_path = base.config._name_or_path = name
    model = inject_adapters(base, LoraConfig(**{"r": RANK, **config}), spaces_for("llama"), **options).eval()
    save_init(folder / "init", model, spaces_for("llama"))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder / "trained")
    return model


def deltas(directory: Path) -> dict[str, torch.Tensor]:
    """Layer → what is added to its weight, by a consumer that knows two keys of the configuration, as llama.cpp does."""
    alpha = json.loads((directory / "adapter_config.json").read_text())["lora_alpha"]
    tensors = load_file(directory / "adapter_model.safetensors")
    found = {}
    for key, a in tensors.items():
        if key.endswith("lora_A.weight"):
            b = tensors[key.replace("lora_A", "lora_B")]
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            found[name] = alpha / b.shape[1] * b.double() @ a.double()
    return found


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize(
    "config",
    [{}, {"lora_alpha": 12, "use_rslora": True}, PATTERNS, {**PATTERNS, "use_rslora": True}],
    ids=["plain", "rslora", "patterns", "both"],
)
def test_who_reads_only_rank_and_alpha_applies_what_peft_does(config: dict[str, Any], frozen: bool, tmp_path: Path) -> None:
    model = trained(tmp_path, config, freeze_a=frozen)
    export_lora(tmp_path / "trained", tmp_path / "init", tmp_path / "out")
    merged = dict(model.merge_and_unload().double().named_parameters())
    before = tiny("llama")
    found = deltas(tmp_path / "out")
    assert len(found) == 21
    for name, delta in found.items():
        wanted = merged[f"{name}.weight"] - before.get_submodule(name).weight.double()
        assert (delta - wanted).norm() <= 1e-5 * wanted.norm() + 1e-6, name
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    rank = RANK if frozen else 2 * RANK
    assert (written["r"], written["lora_alpha"], written["use_rslora"]) == (rank, rank, False)
    assert not written["rank_pattern"]
    assert not written["alpha_pattern"]
    shapes = {t.shape[0] for key, t in load_file(tmp_path / "out" / "adapter_model.safetensors").items() if "lora_A" in key}
    assert shapes == {rank}
    again = PeftModel.from_pretrained(before, tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.allclose(again(**BATCH).logits, merged_logits(merged), atol=1e-5)


def merged_logits(state: dict[str, torch.Tensor]) -> torch.Tensor:
    model = tiny("llama").double()
    model.load_state_dict(state)
    return logits(model.eval()).float()


@pytest.mark.parametrize(("alpha", "dtype"), [(4 * RANK, torch.bfloat16), (3 * RANK, torch.float32)])
def test_a_16_bit_adapter_loses_nothing_to_its_scaling(alpha: int, dtype: torch.dtype, tmp_path: Path) -> None:
    """A power of two is exact in 16 bits; another scaling is written in float32."""
    torch.manual_seed(0)
    model = get_peft_model(tiny("llama"), LoraConfig(r=RANK, lora_alpha=alpha, target_modules=["q_proj", "v_proj"]))
    for name in ("init", "trained"):
        for key, parameter in model.named_parameters():
            if "lora_B" in key and name == "trained":
                parameter.data.normal_()
        model.save_pretrained(tmp_path / name)
        path = tmp_path / name / "adapter_model.safetensors"
        save_file({key: t.bfloat16() for key, t in load_file(path).items()}, path)
    export_lora(tmp_path / "trained", tmp_path / "init", tmp_path / "out", base="the/base")
    exact = load_file(tmp_path / "trained" / "adapter_model.safetensors")
    for name, delta in deltas(tmp_path / "out").items():
        a, b = (exact[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
        assert torch.equal(delta, (alpha / RANK * b) @ a)
    assert {t.dtype for t in load_file(tmp_path / "out" / "adapter_model.safetensors").values()} == {dtype}


def test_the_base_is_always_named_and_found_from_any_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(tmp_path / "a", {})
    tiny("llama").save_pretrained(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    for base, wanted in ((None, "the/base"), ("another/base", "another/base"), ("mine", str(tmp_path / "mine"))):
        export_lora("a/trained", "a/init/adapter", "out", base=base, overwrite=True)
        assert json.loads(Path("out/adapter_config.json").read_text())["base_model_name_or_path"] == wanted
    trained(tmp_path / "b", {}, name=None)
    with pytest.raises(ValueError, match=r"not known by name.*base="):
        export_lora("b/trained", "b/init", "none")
    assert not os.path.exists("none")


@pytest.mark.parametrize("where", ["trained", "init/adapter"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_refused_by_the_tensors_name(value: float, where: str, tmp_path: Path) -> None:
    trained(tmp_path, {"target_modules": ["q_proj", "o_proj"]})
    path = tmp_path / where / "adapter_model.safetensors"
    tensors = load_file(path)
    victim = sorted(tensors)[3]
    tensors[victim][0, 0] = value
    save_file(tensors, path)
    with pytest.raises(ValueError, match=f"NaN or Inf in '{victim}'"):
        export_lora(tmp_path / "trained", tmp_path / "init", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_product_beyond_the_range_of_its_dtype_is_refused(tmp_path: Path) -> None:
    trained(tmp_path, {"target_modules": ["q_proj"], "lora_alpha": 100 * RANK})
    path = tmp_path / "trained" / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if "lora_B" in key)
    save_file({**tensors, key: torch.full_like(tensors[key], 1e37)}, path)
    with pytest.raises(ValueError, match=r"q_proj.*beyond the range"):
        export_lora(tmp_path / "trained", tmp_path / "init", tmp_path / "out")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"use_dora": True}, "DoRA magnitudes.*q_proj"),
        ({"modules_to_save": ["lm_head"]}, "whole tensors.*lm_head"),
        ({"trainable_token_indices": {"embed_tokens": [3, 5]}}, "trained tokens.*embed_tokens"),
        ({"lora_bias": True}, "biases of B"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_more_than_a_plain_lora_is_named(config: dict[str, Any], words: str, tmp_path: Path) -> None:
    config = {"target_modules": ["q_proj"], "lora_alpha": 3 * RANK, **config}
    model = trained(tmp_path, config, method="b-zero")
    with pytest.warns(UserWarning, match=f"not a plain LoRA.*{words}.*llama.cpp"):
        export_lora(tmp_path / "trained", tmp_path / "init", tmp_path / "out")
    again = PeftModel.from_pretrained(tiny("llama"), tmp_path / "out").eval()
    assert torch.allclose(logits(again), logits(model), atol=1e-5)


def test_an_untouched_base_that_lacks_something_is_refused(tmp_path: Path) -> None:
    """A head of another task, a trained head, more tokens: what the adapter was trained beside is not in the named base."""
    torch.manual_seed(0)
    tiny("llama").save_pretrained(tmp_path / "plain")
    config = {"r": 4, "target_modules": ["q_proj"]}

    def exported(name: str, base: torch.nn.Module, **more: Any) -> Path:
        base.name_or_path = str(tmp_path / "plain")
        model = inject_adapters(base, LoraConfig(**config, **more), method="milora")
        save_init(tmp_path / name, model)
        model.save_pretrained(tmp_path / name / "trained")
        return export_lora(tmp_path / name / "trained", tmp_path / name, tmp_path / name / "exported")

    load = transformers.AutoModelForCausalLM.from_pretrained
    assert exported("same", load(tmp_path / "plain")).is_dir()
    assert exported("16-bit", load(tmp_path / "plain", dtype=torch.bfloat16)).is_dir()
    with pytest.raises(ValueError, match="has no 'score'"):
        exported("classes", transformers.LlamaForSequenceClassification.from_pretrained(tmp_path / "plain"))
    for name in ("trained-head", "saved"):
        changed = load(tmp_path / "plain")
        torch.nn.init.normal_(changed.lm_head.weight)
        if name == "saved":  # a head that the adapter brings along is no loss
            with pytest.warns(UserWarning, match="whole tensors"):
                assert exported(name, changed, modules_to_save=["lm_head"]).is_dir()
        else:
            with pytest.raises(ValueError, match=r"'lm_head\.weight' is another one"):
                exported(name, changed)
    larger = load(tmp_path / "plain")
    larger.resize_token_embeddings(220)
    with pytest.raises(ValueError, match=r"'model\.embed_tokens\.weight' has shape \[211, 48\] there and \[220, 48\]"):
        exported("tokens", larger)


def test_the_command_says_the_rank_that_a_server_needs(tmp_path: Path) -> None:
    """A pattern makes some layers wider than the configuration's r."""
    trained(tmp_path, {"r": 3, "target_modules": ["q_proj", "o_proj"], "rank_pattern": {"q_proj": 7}})
    arguments = ["export", str(tmp_path / "trained"), "--initial", str(tmp_path / "init"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert "rank 14, alpha 14, for the/base" in result.stdout
    assert "--max-lora-rank 16" in result.stdout
    result = CliRunner().invoke(cli.app, [*arguments, "--overwrite", "--json"])
    told = json.loads(result.stdout)
    assert (told["rank"], told["alpha"], told["base"], told["max_lora_rank"], told["holds"]) == (14, 14, "the/base", 16, {})
