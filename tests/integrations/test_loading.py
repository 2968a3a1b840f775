"""What `from_pretrained` takes reaches every place that loads a model: revisions, code of a checkpoint, attention, placement."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import AutoPeftModelForCausalLM
from typer.testing import CliRunner

from multimodal import tiny_multimodal
from nullspace.cli import app
from nullspace.integrations.peft import adapter_drift
from nullspace.integrations.transformers import ModelSource, empty_model, load_model, read_config

NAME = "some/model"
COMMITS = {"main": "a" * 40, "second": "b" * 40}
SMALL = ["--samples", "6", "--length", "64", "--rank", "8", "-q"]
CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def run(*arguments: Any) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture
def data(tmp_path: Path, prose: list[str]) -> Path:
    path = tmp_path / "data.txt"
    path.write_text("\n\n".join(prose[:3]))
    return path


@pytest.fixture
def hub(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A cache of the hub with two revisions of a model: in the second, all weights of the first layer are doubled."""
    cache = tmp_path / "hub" / "models--some--model"
    (cache / "refs").mkdir(parents=True)
    for revision, commit in COMMITS.items():
        shutil.copytree(tiny_checkpoint, cache / "snapshots" / commit)
        (cache / "refs" / revision).write_text(commit)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    with torch.no_grad():
        for parameter in model.model.layers[0].parameters():
            parameter.mul_(2)
    model.save_pretrained(cache / "snapshots" / COMMITS["second"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache.parent))
    return NAME


@pytest.fixture
def with_code(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint whose classes are in a file beside it."""
    folder = tmp_path / "with-code"
    shutil.copytree(tiny_checkpoint, folder)
    own = {"AutoConfig": "code.OwnConfig", "AutoModelForCausalLM": "code.OwnForCausalLM"}
    changed = {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": own}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changed}))
    (folder / "code.py").write_text(CODE)
    return folder


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (tiny_multimodal("llava").config, "LlavaForConditionalGeneration"),
        (tiny_multimodal("qwen2_audio").config, "Qwen2AudioForConditionalGeneration"),
        (transformers.T5Config(d_model=8, d_ff=8, num_layers=1), "T5ForConditionalGeneration"),
        (transformers.WhisperConfig(d_model=48, encoder_layers=1, decoder_layers=1), "WhisperForConditionalGeneration"),
        (transformers.Wav2Vec2Config(num_hidden_layers=1), "Wav2Vec2Model"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_checkpoint_that_names_no_class_has_that_of_its_inputs(config: Any, expected: str, tmp_path: Path) -> None:
    config = copy.deepcopy(config)
    config.architectures = None
    config.save_pretrained(tmp_path)
    assert type(empty_model(tmp_path)).__name__ == expected


def first_weight(model: Any) -> torch.Tensor:
    weight: torch.Tensor = model.get_submodule("model.layers.0.self_attn.q_proj").weight
    return weight


def test_a_revision_reaches_weights_records_and_what_comes_after(hub: str, data: Path, tmp_path: Path) -> None:
    main, second = (load_model(hub, revision=revision)[0] for revision in (None, "second"))
    assert torch.equal(2 * first_weight(main), first_weight(second))
    out, kept = tmp_path / "out", tmp_path / "kept"
    run("covariances", hub, "--revision", "second", "--data", data, "--out", kept, *SMALL[:4], "-q")
    run("init", hub, "--revision", "second", "--covariances", kept, "--out", out, *SMALL[4:], "--method", "corda-kpm")
    assert json.loads((out / "nullspace.json").read_text())["revision"] == "second"
    run("export", out / "adapter", "--initial", out, "--out", tmp_path / "plain")  # compares the base with this revision
    ids = torch.arange(5, 25)[None]
    plain = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "plain")
    with torch.no_grad():
        assert (plain(ids).logits - second(ids.to(second.device)).logits.cpu()).abs().max() <= 1e-5
    drift = adapter_drift(tmp_path / "plain", kept, ModelSource(hub, "second"), progress=False)
    assert adapter_drift(tmp_path / "plain", kept, progress=False) == drift
    verify = ["verify", tmp_path / "plain", "--keep", kept, "--drift", "1", "--json"]
    for more in ([], ["--revision", "second"], ["--base", hub, "--revision", "second"]):
        assert json.loads(run(*verify, *more).stdout)["layers"] == drift.layers
    other = CliRunner().invoke(app, [*map(str, verify), "--revision", "main"])
    assert "other" in other.output


def test_code_of_a_checkpoint_runs_if_asked_for(with_code: Path, data: Path, tmp_path: Path) -> None:
    for load in (load_model, empty_model, read_config):
        with pytest.raises(ValueError, match=r"with-code.*--trust-remote-code"):
            load(with_code)
    source = ModelSource(str(with_code), trust_remote_code=True)
    models = [load_model(source, **how)[0] for how in ({"device": "cpu"}, {"device": "cpu", "offload": True})]
    assert {type(each).__name__ for each in (*models, empty_model(source))} == {"OwnForCausalLM"}
    run("init", with_code, "--trust-remote-code", "--data", data, "--out", tmp_path / "out", *SMALL)
    restored = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out/adapter", trust_remote_code=True)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert (restored(ids).logits - models[0](ids).logits).abs().max() <= 1e-5
    assert run("plan", with_code, "--trust-remote-code", "--rank", 8, "--length", 64).stdout


def test_attention_and_placement(tiny_checkpoint: Path) -> None:
    places = dict.fromkeys(("model.embed_tokens", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    model, _ = load_model(tiny_checkpoint, attn_implementation="eager", device_map={**places, "model.layers.0": "disk"})
    assert model.config._attn_implementation == "eager"
    assert (first_weight(model).device.type, model.lm_head.weight.device.type) == ("meta", "cpu")


def test_options_of_loading_reach_a_calibration(
    tiny_checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    load = transformers.LlamaForCausalLM.from_pretrained
    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", lambda *a, **how: seen.append(how) or load(*a, **how))
    placed = ["--device-map", "auto", "--attn", "eager"]
    run("covariances", tiny_checkpoint, "--data", data, "--out", tmp_path / "kept", *SMALL[:4], *placed, "-q")
    assert {name: seen[0][name] for name in ("device_map", "attn_implementation")} == {
        "device_map": "auto",
        "attn_implementation": "eager",
    }


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"revision": "main"}, "on this machine, and only models of the hub have revisions"),
        ({"device_map": "auto", "device": "cpu"}, "device_map places the weights of .*: leave out device"),
        ({"device_map": "auto", "offload": True}, "device_map places the weights of .*: leave out offload"),
        ({"device_map": "banana"}, "cannot be loaded: .*banana"),
        ({"attn_implementation": "banana"}, "cannot be loaded: .*banana"),
    ],
)
def test_what_cannot_be_is_refused(how: dict[str, Any], words: str, tiny_checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=words):
        load_model(tiny_checkpoint, **how)
