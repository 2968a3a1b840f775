"""`filter_checkpoint`: W₀ + (W₁ − W₀) F in every linear weight, all else to the bit, and nothing on an error."""

from __future__ import annotations

import functools
import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tasks import check_filtered, moments, stir

from models import tiny
from nullspace.artifacts import records
from nullspace.integrations.peft import checkpoint_path, combine_adapters, filter_adapter, filter_checkpoint
from nullspace.model.linear import is_conv1d

quiet = functools.partial(filter_checkpoint, progress=False)
pytestmark = pytest.mark.filterwarnings("ignore:.*tensors that training has changed", "ignore:.*of few tokens")


def changes(model: torch.nn.Module, family: str) -> dict[str, torch.Tensor]:
    """Layer → W − W₀, (d_out, d_in) float64."""
    base, changed = tiny(family), {}
    for name in moments(family)[0]:
        module = model.get_submodule(name)
        change = module.weight.detach().double() - base.get_submodule(name).weight.detach().double()
        changed[name] = change.mT if is_conv1d(module) else change
    return changed


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {key: t for path in sorted(folder.glob("*.safetensors")) for key, t in load_file(path).items()}


@pytest.mark.parametrize(("family", "shard"), [("llama", "40KB"), ("llama", "1GB"), ("gpt2", "30KB")])
def test_every_linear_weight_is_filtered_and_all_else_is_as_it_was_tuned(family: str, shard: str, tmp_path: Path) -> None:
    model = tiny(family)
    model.save_pretrained(tmp_path / "base")
    stir(model)
    model.save_pretrained(tmp_path / "tuned", max_shard_size=shard)
    (tmp_path / "tuned" / "tokenizer.json").write_text("{}")
    task, keep = moments(family)
    with pytest.warns(UserWarning, match="have no second moments, and stay as they were tuned"):
        result = quiet(tmp_path / "base", tmp_path / "tuned", task, keep, tmp_path / "out", strength=1.0)
    after = type(model).from_pretrained(tmp_path / "out")
    check_filtered(changes(model, family), changes(after, family), 1.0, family=family)
    tuned, out = tensors(tmp_path / "tuned"), tensors(tmp_path / "out")
    linear = {f"{name}.weight" for name in task}
    assert set(result.rest) == set(out) - linear
    assert all(torch.equal(tuned[key], out[key]) != (key in linear) for key in tuned)
    names = {path.name for path in (tmp_path / "tuned").iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*names, "README.md", "nullspace.json"}
    heads = [records.read_header(folder / "out" / name) for folder in (tmp_path,) for name in names if name.endswith("safetensors")]
    assert sum(map(len, heads)) == len(tuned)
    assert result.after.drift is not None
    assert result.after.drift < result.before.drift  # type: ignore[operator]
    path = checkpoint_path(tmp_path / "base", tmp_path / "tuned", task, keep, strengths=[0, 1], progress=False)
    assert path.steps == (result.before, result.after)


def test_strength_zero_is_the_tuned_checkpoint_and_budgets_are_met(tmp_path: Path) -> None:
    model = tiny("llama").bfloat16()
    model.save_pretrained(tmp_path / "base")
    stir(model)
    model.save_pretrained(tmp_path / "tuned")
    given = (tmp_path / "base", tmp_path / "tuned", *moments("llama"), tmp_path / "out")
    quiet(*given, strength=0.0)
    assert all(torch.equal(t, tensors(tmp_path / "out")[key]) for key, t in tensors(tmp_path / "tuned").items())
    result = quiet(*given, drift=0.1, overwrite=True)
    assert result.after.drift == pytest.approx(0.1, rel=1e-6)
    assert quiet(*given, retain=0.7, overwrite=True).after.response == pytest.approx(0.7, rel=1e-6)
    assert {t.dtype for t in tensors(tmp_path / "out").values()} == {torch.bfloat16}


def test_checkpoints_without_the_top_prefix(tmp_path: Path) -> None:
    """Of the base class: `h.0.attn.c_attn.weight` where the model has `transformer.h.0.attn.c_attn`."""
    model = tiny("gpt2")
    model.transformer.save_pretrained(tmp_path / "base")
    stir(model)
    model.transformer.save_pretrained(tmp_path / "inner")
    model.save_pretrained(tmp_path / "whole")
    for tuned in ("inner", "whole"):
        quiet(tmp_path / "base", tmp_path / tuned, *moments("gpt2"), tmp_path / "out", strength=1.0, overwrite=True)
        after = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out")
        check_filtered(changes(model, "gpt2"), changes(after, "gpt2"), 1.0, family="gpt2")


def test_what_does_not_belong_together_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    model = tiny("llama")
    model.save_pretrained(tmp_path / "base")
    stir(model)
    model.save_pretrained(tmp_path / "tuned")
    tiny("llama", seed=1).save_pretrained(tmp_path / "other")
    tiny("qwen2").save_pretrained(tmp_path / "qwen2")
    (tmp_path / "empty").mkdir()
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../base/model.safetensors"}}))
    path = tmp_path / "nan" / "model.safetensors"
    model.save_pretrained(tmp_path / "nan")
    state = load_file(path)
    state["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(state, path, metadata={"format": "pt"})
    before = sorted(path.name for path in tmp_path.iterdir())
    for base, tuned, words in (
        ("other", "tuned", "is of another model: the weight of"),
        ("base", "qwen2", r"there are second moments for 'model\.layers\.2|is \(.*\) in"),
        ("base", "nan", r"holds NaN or Inf in 'model\.layers\.1\.mlp\.up_proj\.weight'"),
        ("base", "index", "no index of the files"),
        ("base", "empty", "neither model.safetensors nor"),
        ("base", "none", "neither a folder nor a model in the local cache"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            quiet(tmp_path / base, tmp_path / tuned, *moments("llama"), tmp_path / "out", strength=1.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("what", ["adapter", "checkpoint", "combined"])
def test_a_disk_that_is_full_leaves_nothing_and_an_earlier_output_as_it_was(what: str, tmp_path: Path) -> None:
    model = tiny("llama")
    model.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(tiny("llama"), LoraConfig(r=32, target_modules=["q_proj", "down_proj"]))
    stir(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    task, keep = moments("llama")
    common: dict[str, Any] = {"strength": 1.0, "progress": False, "overwrite": True}
    run = {
        "adapter": lambda: filter_adapter(tmp_path / "adapter", task, keep, tmp_path / "out", **common),
        "checkpoint": lambda: filter_checkpoint(tmp_path / "base", tmp_path / "base", task, keep, tmp_path / "out", **common),
        "combined": lambda: combine_adapters([tmp_path / "adapter"] * 2, [task, task], keep, tmp_path / "out", **common),
    }[what]
    for earlier in (False, True):
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        try:
            with pytest.raises(OSError, match=r"File too large|cannot write"):
                run()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        if not earlier:
            run()
