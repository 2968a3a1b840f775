"""Adapters of experts in folders: written, trained, read by plain PEFT, exported, described, measured and filtered."""

from __future__ import annotations

import functools
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from mixtures import MIXTURES, mixture, moments
from peft import LoraConfig, PeftModel
from peft.tuners.lora import ParamWrapper
from plain_peft import PlainPeft
from safetensors.torch import load_file
from servers import changes_in_vllm, left_out_by_sglang
from torch import nn

from models import random_batches
from nullspace import Covariance, Covariances, NullSpaces, analysis
from nullspace.integrations.peft import (
    Gauge,
    attach_subtracted,
    clora,
    combine_adapters,
    confine,
    decay_to_start,
    describe,
    export_lora,
    filter_adapter,
    inject_adapters,
    oplora,
    penalty,
    read_course,
    read_factors,
    row_spaces,
    save_init,
    write,
    write_init,
)
from nullspace.integrations.peft.filtering.drift import adapter_drift
from nullspace.integrations.transformers import load_model
from nullspace.model.experts import expert_of
from nullspace.model.sites import find_targets

RANK = 4
BATCH = random_batches(1, 2, 24)[0]
GATE_UP, DOWN = (f"model.layers.1.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj"))
CONFIG = {"r": RANK, "lora_alpha": 6}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model(**BATCH).logits


@functools.cache
def covariances_for(family: str, seed: int = 1) -> Covariances:
    return moments(mixture(family), seed=seed)


@functools.cache
def spaces_for(family: str) -> NullSpaces:
    return NullSpaces.from_covariances(covariances_for(family), rank=RANK, progress=False)


def train(model: nn.Module, steps: int = 2) -> None:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**BATCH, labels=BATCH["input_ids"]).loss.backward()
        optimizer.step()
    model.eval()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, with its own path taken out."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes().replace(str(folder).encode(), b"OUT") for path in files}


def close(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    return bool((one - other).abs().max() <= tolerance * other.abs().max())


@pytest.mark.processes
@pytest.mark.parametrize("family", MIXTURES)
def test_from_start_to_a_plain_lora_for_the_untouched_base(family: str, tmp_path: Path, plain_peft: PlainPeft) -> None:
    mixture(family).save_pretrained(tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    before, spaces = logits(model), spaces_for(family)
    write_init(tmp_path / "two", model, LoraConfig(**CONFIG), spaces, max_shard_bytes=60_000, progress=False)
    peft_model = inject_adapters(model, LoraConfig(**CONFIG), spaces)
    assert close(logits(peft_model), before, 3e-6)
    save_init(tmp_path / "one", peft_model, spaces)
    one, two = ({k: load(tmp_path / name / "base", k) for k in keys(tmp_path / name / "base")} for name in ("one", "two"))
    assert one.keys() == two.keys() == keys(tmp_path / "model")
    assert all(torch.equal(one[key], two[key]) for key in one)
    for name in ("adapter/adapter_model.safetensors", "base/config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert close(plain_peft.logits(tmp_path / "two" / "adapter", BATCH), before, 3e-6)
    start = logits(peft_model)
    train(peft_model)
    wanted = logits(peft_model)
    assert not close(wanted, start, 1e-2)
    peft_model.save_pretrained(tmp_path / "trained")
    assert close(plain_peft.logits(tmp_path / "trained", BATCH), wanted, 3e-6)
    export_lora(tmp_path / "trained", tmp_path / "one", tmp_path / "plain")
    assert close(plain_peft.logits(tmp_path / "plain", BATCH), wanted, 3e-5)
    config = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (2 * RANK, 2 * RANK, str(tmp_path / "model"))
    tensors = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    check_servers(tmp_path / "plain", family)
    inner, outer = (f"base_model.model.model.layers.1.mlp.experts.{part}lora_A.weight" for part in ("base_layer.", ""))
    assert (tensors[inner].shape, tensors[outer].shape) == ((4 * 2 * RANK, 32), (4 * 2 * RANK, 24))


def check_servers(adapter: Path, family: str) -> None:
    """What docs/peft-and-trl.md says of servers, key by key."""
    expert = {key for key in load_file(adapter / "adapter_model.safetensors") if "mlp.experts." in key}
    assert len(expert) == (4 if family == "deepseek_v3" else 8)
    assert left_out_by_sglang(adapter) & expert == expert
    factors = read_factors(adapter)
    wanted = {part: torch.stack([b @ a for a, b in (factors[f"{name}[{e}]"] for e in range(4))]) for part, name in PARTS.items()}
    if family == "mixtral":  # whose modules have other names there
        assert changes_in_vllm(adapter, family, mixed=False) == changes_in_vllm(adapter, family, mixed=True) == {}
        return
    if family != "gpt_oss":
        with pytest.raises(ValueError, match="one tensor for each expert"):
            changes_in_vllm(adapter, family, mixed=False)
    for mixed in (True, False) if family == "gpt_oss" else (True,):
        made = changes_in_vllm(adapter, family, mixed=mixed)
        torch.testing.assert_close(made["down"], wanted["down"], rtol=0, atol=1e-9)
        rows = [made["gate"], made["up"]]
        both = torch.stack(rows, dim=2).flatten(1, 2) if family == "gpt_oss" else torch.cat(rows, dim=1)
        torch.testing.assert_close(both, wanted["gate_up"], rtol=0, atol=1e-9)


PARTS = {"gate_up": GATE_UP, "down": DOWN}


def keys(folder: Path) -> set[str]:
    return {key for path in folder.glob("*.safetensors") for key in load_file(path)}


def load(folder: Path, key: str) -> torch.Tensor:
    return next(tensors[key] for path in folder.glob("*.safetensors") if key in (tensors := load_file(path)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A start of Mixtral on a residual base with frozen A beside its trained adapter, and the model."""
    folder = tmp_path_factory.mktemp("mixtral")
    mixture("mixtral").save_pretrained(folder / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    peft_model = inject_adapters(model, LoraConfig(**CONFIG), spaces_for("mixtral"), freeze_a=True, residual="base")
    save_init(folder / "init", peft_model, spaces_for("mixtral"))
    train(peft_model)
    peft_model.save_pretrained(folder / "trained")
    export_lora(folder / "trained", folder / "init", folder / "plain")
    return folder, peft_model


def changes_in(peft_model: Any) -> dict[str, torch.Tensor]:
    """Parameter of experts → what an adapter adds to it, by PEFT."""
    named = peft_model.get_base_model().named_modules()
    return {
        f"{name.replace('.base_layer', '')}.{module.parameter_name}": module.get_delta_weight("default").detach().double()
        for name, module in named
        if isinstance(module, ParamWrapper)
    }


def test_factors_of_a_folder_are_those_of_every_expert(trained: tuple[Path, Any]) -> None:
    folder, peft_model = trained
    factors, wanted = read_factors(folder / "trained"), changes_in(peft_model)
    assert set(factors) == set(find_targets(mixture("mixtral")))
    for name, (a, b) in factors.items():
        expert = expert_of(name)
        if expert is not None:
            torch.testing.assert_close(b @ a, wanted[expert.stack][expert.number], rtol=0, atol=1e-6)
    rows = row_spaces(folder / "trained")
    assert rows.keys() == factors.keys()
    live = row_spaces(peft_model)
    assert all(torch.equal(rows[name], live[name]) for name in rows)
    assert torch.equal(rows[f"{DOWN}[3]"].double(), factors[f"{DOWN}[3]"].A)
    away = NullSpaces.from_covariances(covariances_for("mixtral"), rank=RANK, avoid=rows, progress=False)
    assert (away[f"{DOWN}[3]"].basis.T @ rows[f"{DOWN}[3]"].double().T).abs().max() < 1e-6
    course = read_course("mixtral", folder / "init", folder / "trained")
    assert course.initial.keys() == factors.keys()
    # With A frozen, the export has the same rank and the same rows.
    plain = read_factors(folder / "plain")
    initial = read_factors(folder / "init" / "adapter")
    for name in (f"{GATE_UP}[0]", f"{DOWN}[2]", "model.layers.0.self_attn.q_proj"):
        assert torch.equal(plain[name].A, factors[name].A)
        torch.testing.assert_close(plain[name].B, factors[name].B - initial[name].B, rtol=0, atol=1e-7)


def test_folders_say_what_they_hold(trained: tuple[Path, Any]) -> None:
    folder, _ = trained
    for name, rank in (("init", RANK), ("trained", RANK), ("plain", RANK)):
        facts = describe(folder / name)
        assert (facts["layers"], facts["rank"], facts["experts"]) == (24, rank, 16)
        assert any("experts" in note and "SGLang" in note for note in facts["notes"]) == (name == "plain")
    assert "experts" in (folder / "plain" / "README.md").read_text()
    saved = json.loads((folder / "plain" / "adapter_config.json").read_text())
    assert saved["peft_version"] == json.loads((folder / "trained" / "adapter_config.json").read_text())["peft_version"]


def test_damaged_files_of_experts_are_named(trained: tuple[Path, Any], tmp_path: Path) -> None:
    config = json.loads((trained[0] / "plain" / "adapter_config.json").read_text())
    weights = (trained[0] / "plain" / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(weights)
    for change, message in (
        ({"r": 3, "lora_alpha": 3}, r"the A of '.*experts\.gate_up_proj' has 16 rows, no multiple of its rank 3"),
        ({"peft_version": "0.18.1"}, r"was saved by PEFT 0\.18\.1, which laid out the factors of experts in another way"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, r"'.*mlp\.experts' has 2 pairs of A and B, .* gate_up_proj$"),
        ({"target_parameters": ["experts.one", "experts.two"]}, r"has 2 pairs of A and B, .* one, two$"),
        ({"target_parameters": [3]}, r"adapter_config\.json"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **change}))
        for read in (read_factors, describe, row_spaces):
            with pytest.raises(ValueError, match=message):
                read(tmp_path)


def test_another_model_than_the_untouched_base_is_refused(trained: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = trained
    model: Any = mixture("mixtral")
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"is not the model that .* was made of: 'model\.norm\.weight' is another one"):
        export_lora(folder / "trained", folder / "init", tmp_path / "out", base=str(tmp_path / "other"))


def test_offloaded_experts_become_residuals_a_tensor_at_a_time(trained: tuple[Path, Any], tmp_path: Path, monkeypatch: Any) -> None:
    folder, _ = trained
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: None)
    model = load_model(folder / "model", device="cpu", offload=True)[0]
    assert model.model.layers[0].mlp.experts.gate_up_proj.device.type == "meta"
    fetched, fetch = [], write._fetch
    monkeypatch.setattr(write, "_fetch", lambda name, *args: (fetched.append(name), fetch(name, *args))[1])
    options = {"freeze_a": True, "residual": "base", "progress": False}
    write_init(tmp_path / "out", model, LoraConfig(**CONFIG), spaces_for("mixtral"), **options)
    assert len(fetched) == len(set(fetched)) == len(list(model.parameters()))  # each once, though the parts of two alternate
    for key in keys(folder / "model"):
        assert torch.equal(load(tmp_path / "out" / "base", key), load(folder / "init" / "base", key)), key
    for name in ("adapter_model.safetensors", "README.md"):
        assert (tmp_path / "out" / "adapter" / name).read_bytes() == (folder / "init" / "adapter" / name).read_bytes()


def test_two_adapters_are_saved_loaded_and_made_one(tmp_path: Path) -> None:
    mixture("gpt_oss").save_pretrained(tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    before = logits(model)
    with pytest.warns(UserWarning, match="two adapters are active on experts"):
        write_init(tmp_path / "written", model, LoraConfig(**CONFIG), spaces_for("gpt_oss"), residual="adapter", progress=False)
    again = PeftModel.from_pretrained(model, tmp_path / "written" / "adapter", is_trainable=True)
    attach_subtracted(again, tmp_path / "written" / "subtracted")
    assert close(logits(again), before, 3e-6)
    train(again, 1)
    again.save_pretrained(tmp_path / "trained", selected_adapters=["default"])
    wanted = logits(again)
    export_lora(tmp_path / "trained", tmp_path / "written", tmp_path / "plain")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert close(logits(PeftModel.from_pretrained(base, tmp_path / "plain")), wanted, 3e-5)


def test_experts_are_measured_and_filtered_and_not_confined(trained: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = trained
    keep, task = covariances_for("mixtral"), covariances_for("mixtral", seed=2)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    by_folder = adapter_drift(folder / "plain", keep, progress=False)
    model = PeftModel.from_pretrained(base, folder / "plain", is_trainable=True)
    reading = Gauge(model, keep)()
    for name in (f"{GATE_UP}[1]", f"{DOWN}[3]"):
        matrix = mixture("mixtral").get_submodule(name.partition(".gate_up")[0].partition(".down")[0])
        weight = getattr(matrix, name.rpartition(".")[2][:-3])[int(name[-2])].detach().double()
        a, b = read_factors(folder / "plain")[name]
        c = keep[name].matrix()
        wanted = float(torch.sqrt(torch.trace((b @ a) @ c @ (b @ a).T) / torch.trace(weight @ c @ weight.T)))
        assert reading.layers[name] == pytest.approx(wanted, rel=1e-4)
        assert by_folder.layers[name] == pytest.approx(wanted, rel=1e-6)
    for hold in (penalty(model, keep), clora(model, 4, keep)):
        model.zero_grad()
        hold().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_B" in name and "experts" in name)
    filtered = filter_adapter(folder / "plain", task, keep, tmp_path / "filtered", strength=1.0, progress=False)
    assert filtered.after.drift is None or filtered.after.drift < reading.median
    filter_adapter(model, task, keep, strength=1.0, progress=False)
    weaker = read_factors(tmp_path / "filtered")
    live = row_spaces(model)
    assert all(torch.allclose(weaker[name].A.float(), live[name], atol=1e-6) for name in weaker)
    assert not torch.allclose(weaker[f"{DOWN}[3]"].A, read_factors(folder / "plain")[f"{DOWN}[3]"].A, rtol=1e-2)
    combined = combine_adapters(
        [folder / "plain", tmp_path / "filtered"], [task, task], keep, tmp_path / "both", strength=1e-6, progress=False
    )
    again = transformers.AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    assert PeftModel.from_pretrained(again, combined.out).peft_config["default"].r == 2 * RANK
    for hold in (lambda: confine(model, keep), lambda: oplora(model, 4, keep), lambda: decay_to_start(model, 0.1)):
        with pytest.raises(ValueError, match=r"'.*experts\.\w+\[0\]', one of several experts in one parameter"):
            hold()


def test_an_expert_without_tokens_is_measured_and_filtered_as_all_of_its_layer(trained: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = trained
    empty = {f"{GATE_UP}[1]", f"{DOWN}[1]"}
    keep, task = (without_tokens(covariances_for("mixtral", seed=seed), empty) for seed in (1, 2))
    merged = Covariances.merge([keep, covariances_for("mixtral")], normalise=True)
    assert merged[f"{GATE_UP}[1]"].tokens == covariances_for("mixtral")[f"{GATE_UP}[1]"].tokens
    measured = adapter_drift(folder / "plain", keep, progress=False)
    a, b = read_factors(folder / "plain")[f"{GATE_UP}[1]"]
    weight = mixture("mixtral").get_submodule(GATE_UP.rpartition(".")[0]).gate_up_proj[1].detach().double()  # type: ignore[index]
    c = sum(keep[f"{GATE_UP}[{number}]"].matrix() for number in (0, 2, 3))
    wanted = float(torch.sqrt(torch.trace((b @ a) @ c @ (b @ a).T) / torch.trace(weight @ c @ weight.T)))
    assert measured.layers[f"{GATE_UP}[1]"] == pytest.approx(wanted, rel=1e-6)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    model = PeftModel.from_pretrained(base, folder / "plain", is_trainable=True)
    assert Gauge(model, keep)().layers[f"{GATE_UP}[1]"] == pytest.approx(wanted, rel=1e-4)
    filter_adapter(folder / "plain", task, keep, tmp_path / "filtered", strength=1.0, progress=False)
    combine_adapters([folder / "plain"] * 2, [task, task], keep, tmp_path / "both", strength=1e-6, progress=False)
    assert analysis.analyse(covariances=keep, progress=False).inputs


def without_tokens(covariances: Covariances, empty: set[str]) -> Covariances:
    pairs = [(site, Covariance(site.d_in) if site.name in empty else covariances[site.name]) for site in covariances.sites]
    return Covariances(pairs, {name: weight for name in covariances if (weight := covariances.weight(name)) is not None})
