"""`write_init`: the files of `inject_adapters` and `save_init`, from a model that is left alone or is not even in memory."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from calibrated import RANK, sources_for, spaces_for
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from models import FAMILIES, random_batches, tiny
from nullspace import NullSpaces, compute_null_spaces
from nullspace.artifacts import records, store
from nullspace.integrations import peft as integration
from nullspace.integrations.peft import inject_adapters, save_init, shell, write, write_init
from nullspace.integrations.transformers import load_model, offload_map

BATCH = random_batches(1, 2, 32, seed=7)[0]


def checkpoint(family: str, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    tiny(family).to(dtype).save_pretrained(folder, **options)
    return folder


def loaded(folder: Path, family: str) -> nn.Module:
    return type(tiny(family)).from_pretrained(folder).eval()


def offloaded(folder: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype | str = "auto") -> nn.Module:
    """Without a tokenizer, which tiny checkpoints do not have."""
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: None)
    return load_model(folder, device="cpu", dtype=dtype, offload=True)[0]


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**BATCH).logits


def contents(folder: Path, out: Path) -> dict[str, bytes]:
    """Every file below a folder, with the one path that must differ taken out."""
    found = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: data.replace(str(out).encode(), b"OUT") for name, data in found.items()}


def both_ways(
    tmp_path: Path, folder: Path, family: str, model: nn.Module, config: dict[str, Any], **options: Any
) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """What `inject_adapters` and `save_init` write of a checkpoint, and what `write_init` writes of a model."""
    options = {**options, **sources_for(options.get("method", "lora-null"), family)}
    base = loaded(folder, family)
    torch.manual_seed(1)
    adapted = inject_adapters(base, LoraConfig(**config), **options)
    one, other = tmp_path / "one", tmp_path / "two"
    save_init(one, adapted, options.get("spaces"), record={"note": "x"})
    torch.manual_seed(1)
    write_init(other, model, LoraConfig(**config), record={"note": "x"}, progress=False, **options)
    return contents(one, one), contents(other, other)


CASES = [
    ("llama", torch.float32, {"r": RANK}, {}),
    ("llama", torch.bfloat16, {"r": RANK, "lora_alpha": 16}, {}),
    ("llama", torch.float64, {"r": RANK, "task_type": "CAUSAL_LM"}, {}),
    ("llama", torch.float32, {"r": RANK, "lora_alpha": 3, "use_rslora": True}, {"sigma_scale": 2.0}),
    ("llama", torch.float32, {"r": RANK, "rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\.down_proj": 5}}, {}),
    ("llama", torch.float32, {"r": RANK, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"k_proj": 32}, "use_rslora": True}, {}),
    ("llama", torch.float32, {"r": RANK, "lora_alpha": 16}, {"rank_budget": 3}),
    ("llama", torch.bfloat16, {"r": 5, "target_modules": ["q_proj", "down_proj"]}, {}),
    ("llama", torch.bfloat16, {"r": RANK, "lora_alpha": 16}, {"split": 3.0, "freeze_a": True}),
    ("llama", torch.float32, {"r": RANK}, {"method": "b-zero"}),
    ("qwen2", torch.float32, {"r": RANK}, {}),  # tied embeddings
    ("qwen2", torch.bfloat16, {"r": RANK}, {"method": "b-zero"}),
    *(("llama", torch.bfloat16, {"r": RANK}, {"method": method}) for method in list(integration.METHODS)[2:]),
    ("llama", torch.bfloat16, {"r": RANK, "lora_alpha": 16}, {"method": "corda-exact", "window": 0.5, "freeze_b": True}),
    ("gpt2", torch.float32, {"r": RANK}, {"method": "corda-kpm"}),
    ("gpt2", torch.float32, {"r": RANK, "lora_alpha": 3}, {}),  # Conv1D, tied embeddings
    ("gpt2", torch.float16, {"r": RANK}, {}),
    ("gemma", torch.float32, {"r": RANK}, {}),
    ("opt", torch.float32, {"r": RANK}, {}),
    ("bert", torch.float32, {"r": RANK}, {}),
    ("albert", torch.float32, {"r": RANK}, {}),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
@pytest.mark.parametrize("where", ["whole", "offloaded"])
@pytest.mark.parametrize(("family", "dtype", "config", "options"), CASES)
def test_every_file_is_the_same(
    family: str,
    dtype: torch.dtype,
    config: dict[str, Any],
    options: dict[str, Any],
    where: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = checkpoint(family, tmp_path / "model", dtype)
    if where == "whole":
        model = loaded(folder, family)
    elif family == "albert":
        pytest.skip("ALBERT has no blocks that transformers knows of")
    else:
        model = offloaded(folder, monkeypatch)
        assert sum(p.device.type == "meta" for p in model.parameters()) > 10
    wanted, written = both_ways(tmp_path, folder, family, model, config, **options)
    assert written.keys() == wanted.keys()
    assert [name for name in wanted if written[name] != wanted[name]] == []
    method = integration.METHODS[options.get("method", "lora-null")]
    assert ("base/model.safetensors" in wanted) == (method.changes_base and not {"freeze_a", "freeze_b"} & set(options))


def test_the_model_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint("llama", tmp_path / "model")
    for model in (loaded(folder, "llama"), offloaded(folder, monkeypatch)):
        before, state = logits(model), torch.random.get_rng_state()
        parameters = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
        config = model.config.to_dict()
        write_init(tmp_path / "out", model, LoraConfig(r=RANK), spaces_for("llama"), overwrite=True)
        assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == parameters
        assert model.config.to_dict() == config
        assert torch.equal(logits(model), before)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert not hasattr(model, "peft_config")


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_what_is_written_of_an_offloaded_model_computes_what_the_model_did(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(family, tmp_path / "model")
    before = logits(loaded(folder, family))
    write_init(tmp_path / "out", offloaded(folder, monkeypatch), LoraConfig(r=RANK), spaces_for(family), max_shard_bytes=30_000)
    base = loaded(tmp_path / "out" / "base", family)
    assert (logits(base) - before).abs().max() > 1e-3 * before.abs().max()  # the residual is another model
    after = logits(PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").eval())
    assert (after - before).abs().max() <= 2e-6 * before.abs().max()


def test_shards_are_those_of_save_pretrained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint("llama", tmp_path / "model", max_shard_size="60KB")  # read from several files, too
    model = offloaded(folder, monkeypatch, torch.float64)  # another dtype, so that the files are not copied
    write_init(tmp_path / "out", model, LoraConfig(r=RANK), spaces_for("llama"), max_shard_bytes=90_000)
    base = tmp_path / "out" / "base"
    loaded(base, "llama").save_pretrained(tmp_path / "again", max_shard_size=90_000)
    assert len(list(base.glob("model-*-of-*.safetensors"))) > 3
    (base / "README.md").unlink()
    assert contents(base, base) == contents(tmp_path / "again", base)
    assert max(path.stat().st_size for path in base.glob("*.safetensors")) < 100_000


def test_a_checkpoint_that_is_not_safetensors_is_converted_in_a_folder_that_goes_with_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint("llama", tmp_path / "model")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    model = offloaded(folder, monkeypatch)
    assert len(list((tmp_path / "temporary").iterdir())) == 1
    wanted, written = both_ways(tmp_path, folder, "llama", model, {"r": RANK})
    assert written == wanted
    del model
    gc.collect()
    assert list((tmp_path / "temporary").iterdir()) == []


def test_dtype_of_the_caller_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint("llama", tmp_path / "model")
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: None)
    found = []
    for offload in (False, True):
        model, _ = load_model(folder, dtype=torch.bfloat16, device="cpu", offload=offload)
        out = tmp_path / f"out-{offload}"
        write_init(out, model, LoraConfig(r=RANK), spaces_for("llama"))
        found.append(contents(out, out))
    assert found[0] == found[1]
    assert {t.dtype for t in load_file(out / "base" / "model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "albert"])
def test_nothing_large_stays_in_memory(family: str) -> None:
    model = tiny(family)
    placed = offload_map(model, "cuda:1")
    assert set(placed.values()) == {"disk", "cuda:1"}
    on_disk = tuple(f"{name}." for name, where in placed.items() if where == "disk")
    resident = sum(p.numel() for name, p in model.named_parameters() if not name.startswith(on_disk))
    # BERT's decoder shares its bias with a module that is in the way, and so its embeddings stay.
    assert resident < (12_000 if family == "bert" else 200)
    for name, _ in (*model.named_parameters(), *model.named_buffers()):
        assert sum(f"{name}.".startswith(f"{k}.") for k in placed) == 1, name


def _mixtral() -> nn.Module:
    """The checkpoint keeps every expert's weights apart; the model has them in one tensor."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=211,
        hidden_size=48,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    return transformers.MixtralForCausalLM(config).eval()


# From null spaces, with a base that changes; from two second moments, one that does not, and one that does; from the weight, which
# is read and does not change; and drawn.
@pytest.mark.parametrize("method", ["lora-null", "contrast", "sc-lora", "mica-data", "orthogonal"])
def test_fused_experts_are_saved_from_memory_and_copied_from_the_disk(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    monkeypatch.setitem(FAMILIES, "mixtral", _mixtral)
    tiny("mixtral").save_pretrained(folder)
    wanted, written = both_ways(tmp_path, folder, "mixtral", loaded(folder, "mixtral"), {"r": RANK}, method=method)
    assert written == wanted
    if method == "lora-null":
        assert any("experts.0.w2" in name for name in load_file(tmp_path / "two" / "base" / "model.safetensors"))
    model, sources = offloaded(folder, monkeypatch), sources_for(method, "mixtral")
    torch.manual_seed(1)
    write_init(tmp_path / "three", model, LoraConfig(r=RANK), method=method, record={"note": "x"}, **sources)
    assert contents(tmp_path / "three", tmp_path / "three") == wanted
    if method != "lora-null":
        return
    model = offloaded(folder, monkeypatch, torch.float64)  # not the checkpoint's dtype: its files cannot be copied
    write_init(tmp_path / "double", model, LoraConfig(r=RANK), method=method, **sources)
    double, single = (load_file(tmp_path / name / "base" / "model.safetensors") for name in ("double", "three"))
    assert double.keys() == single.keys()
    assert {name: double[name].dtype for name in double} == dict.fromkeys(double, torch.float64)
    assert all(torch.allclose(double[name].float(), single[name], atol=1e-6) for name in double)
    layers = {name: m for name, m in model.named_modules() if name in spaces_for("mixtral")}

    def fails(*_: Any) -> Any:
        raise ValueError("two into one")

    monkeypatch.setattr(shell, "revert_weight_conversion", fails)  # of a checkpoint that joins weights
    for refused in (
        lambda: integration.check_servable(model, layers, method, offloaded=True),  # the command line asks before the work
        lambda: write_init(tmp_path / "four", model, LoraConfig(r=RANK), method=method, **sources),
    ):
        with pytest.raises(ValueError, match=r"MixtralForCausalLM.*saved one by one.*load the model whole"):
            refused()
    assert not (tmp_path / "four").exists()


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "60KB"}], ids=["one file", "shards"])
def test_a_copied_checkpoint_differs_in_the_targets_alone(
    shards: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, base = checkpoint("llama", tmp_path / "model", torch.bfloat16, **shards), tmp_path / "out" / "base"
    file = max(folder.glob("*.safetensors"))
    unknown = {"model.layers.9.extra": torch.arange(7), "model.layers.9.scales": torch.randn(3, 3)}  # as of a second head
    save_file({**load_file(file), **unknown}, file, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        known = json.loads(index.read_text())
        index.write_text(json.dumps({**known, "weight_map": {**known["weight_map"], **dict.fromkeys(unknown, file.name)}}))
    for name in ("modeling_own.py", "merges.txt", "pytorch_model.bin", "other.safetensors"):
        (folder / name).write_bytes(b"x")
    model, memory = offloaded(folder, monkeypatch), []
    replace = records.replace_tensor
    monkeypatch.setattr(records, "replace_tensor", lambda path, name, t: (memory.append(t.nbytes), replace(path, name, t)))
    write_init(tmp_path / "out", model, LoraConfig(r=RANK), spaces_for("llama"), max_shard_bytes=1000)
    assert [(base / name).exists() for name in ("modeling_own.py", "merges.txt", "pytorch_model.bin")] == [True, True, False]
    assert {p.name for p in base.glob("*.safetensors")} == {p.name for p in folder.glob("model*.safetensors")}
    targets = {f"{name}.weight" for name in spaces_for("llama")}
    for path in folder.glob("model*.safetensors"):
        before, after = load_file(path), load_file(base / path.name)
        assert before.keys() == after.keys()
        assert {name for name in before if not torch.equal(before[name], after[name])} == targets & before.keys()
        assert all(before[name].dtype == after[name].dtype for name in before)
    assert len(memory) == len(targets) + 1  # and the last norm, which is in memory
    state = logits(PeftModel.from_pretrained(loaded(base, "llama"), tmp_path / "out" / "adapter").eval())
    assert (state - logits(loaded(folder, "llama"))).abs().max() < 0.05


@pytest.mark.parametrize("other", [{"weight_map": {"extra": "../outside.safetensors"}}, {"weight_map": 3}, {}, []])
def test_an_index_that_leads_elsewhere_or_is_none_copies_nothing_from_there(
    other: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint("llama", tmp_path / "model", max_shard_size="60KB")
    model, index = offloaded(folder, monkeypatch), folder / "model.safetensors.index.json"
    save_file({"extra": torch.arange(7)}, tmp_path / "outside.safetensors")
    known = json.loads(index.read_text())
    if other and other["weight_map"] != 3:  # an index of these files that names one outside of their folder
        index.write_text(json.dumps({**known, "weight_map": {**known["weight_map"], **other["weight_map"]}}))
    else:  # beside the right one
        (folder / "a.safetensors.index.json").write_text(json.dumps(other))
    write_init(tmp_path / "out", model, LoraConfig(r=RANK), spaces_for("llama"))
    assert not [path for path in tmp_path.rglob("outside*") if path.parent != tmp_path]
    state = logits(PeftModel.from_pretrained(loaded(tmp_path / "out" / "base", "llama"), tmp_path / "out" / "adapter").eval())
    index.write_text(json.dumps(known))
    assert (state - logits(loaded(folder, "llama"))).abs().max() < 1e-4


def test_a_tensor_in_memory_that_was_changed_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = offloaded(checkpoint("llama", tmp_path / "model"), monkeypatch)
    with torch.no_grad():
        model.get_parameter("model.norm.weight").mul_(2)
    write_init(tmp_path / "out", model, LoraConfig(r=RANK), spaces_for("llama"))
    written = load_file(tmp_path / "out" / "base" / "model.safetensors")
    assert torch.equal(written["model.norm.weight"], model.get_parameter("model.norm.weight"))


def test_a_checkpoint_under_other_names_is_written_tensor_by_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names without the prefix of the base model, as in GPT-2's checkpoint: of tensors in memory none is known in the file."""
    folder = checkpoint("gpt2", tmp_path / "model")
    file = folder / "model.safetensors"
    save_file({name.removeprefix("transformer."): t for name, t in load_file(file).items()}, file, metadata={"format": "pt"})
    wanted, written = both_ways(tmp_path, folder, "gpt2", offloaded(folder, monkeypatch), {"r": RANK})
    assert written == wanted


class _Turned(transformers.LlamaForCausalLM):
    """A stand-in for a checkpoint that holds a weight the other way round."""

    def save_pretrained(self, folder: Any, *, state_dict: dict[str, torch.Tensor], **options: Any) -> None:
        turned = state_dict["model.layers.1.mlp.up_proj.weight"].T.contiguous()
        super().save_pretrained(folder, state_dict={**state_dict, "model.layers.1.mlp.up_proj.weight": turned}, **options)


def test_a_weight_that_is_turned_when_it_is_saved_does_not_go_unseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = offloaded(checkpoint("llama", tmp_path / "model", torch.bfloat16), monkeypatch, torch.float32)
    model.__class__ = _Turned
    with pytest.raises(ValueError, match=r"up_proj.*load the model whole"):
        write_init(tmp_path / "out", model, LoraConfig(r=RANK), spaces_for("llama"))
    assert not (tmp_path / "out").exists()


class _Packed(nn.Linear):
    """A stand-in for a quantised layer."""

    def __init__(self, like: nn.Linear) -> None:
        super().__init__(like.in_features, like.out_features, bias=False)
        self.weight = nn.Parameter(torch.zeros(like.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)


def test_b_zero_serves_a_quantised_base(tmp_path: Path) -> None:
    found = []
    for name in ("one", "two"):
        model = tiny("llama")
        model.model.layers[1].mlp.up_proj = _Packed(model.model.layers[1].mlp.up_proj)
        config, spaces = LoraConfig(r=RANK), NullSpaces([spaces_for("llama")[site.name] for site in spaces_for("llama").sites])
        if name == "one":
            save_init(tmp_path / name, inject_adapters(model, config, spaces, method="b-zero"), spaces)
        else:
            write_init(tmp_path / name, model, config, spaces, method="b-zero", progress=False)
            with pytest.raises(ValueError, match=r"up_proj.*quantised.*b-zero"):
                write_init(tmp_path / "three", model, config, spaces)
        found.append(contents(tmp_path / name, tmp_path / name))
    assert found[0] == found[1]


def _without_values() -> nn.Module:
    return tiny("llama").to("meta")


@pytest.mark.parametrize(
    ("model", "config", "words"),
    [
        (lambda: tiny("llama"), {"use_dora": True}, "lora_magnitude_vector.*use inject_adapters"),
        (lambda: tiny("llama"), {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "lm_head.*use inject_adapters"),
        (lambda: tiny("llama"), {"r": RANK + 1}, r"'model\.layers\.0\.self_attn\.q_proj' has rank 9, but its null space has 8"),
        (lambda: tiny("llama", seed=3), {}, r"another model: the weight of 'model\.layers\.0\.self_attn\.q_proj' begins with"),
        (lambda: tiny("llama"), {"target_modules": ["q_proj", "lm_head"]}, "no null space for 'lm_head'"),
        (_without_values, {}, "embed_tokens.*never loaded"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_is_written(
    model: Any, config: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "new_directory", None)
    with pytest.raises(ValueError, match=words):
        write_init(tmp_path / "out", model(), LoraConfig(**{"r": RANK, **config}), spaces_for("llama"))
    assert list(tmp_path.iterdir()) == []


def test_an_offloaded_model_of_other_weights_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny("llama", seed=3).save_pretrained(tmp_path / "model")
    model = offloaded(tmp_path / "model", monkeypatch)
    with pytest.raises(ValueError, match="another model"):
        write_init(tmp_path / "out", model, LoraConfig(r=RANK), spaces_for("llama"))
    with pytest.raises(ValueError, match="another model"):  # and what injects says so, too
        inject_adapters(model, LoraConfig(r=RANK), spaces_for("llama"))


def test_inject_adapters_still_refuses_offloaded_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = offloaded(checkpoint("llama", tmp_path / "model"), monkeypatch)
    with pytest.raises(ValueError, match="offloaded"):
        inject_adapters(model, LoraConfig(r=RANK), spaces_for("llama"))


def test_a_failure_midway_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start_of, calls = write.start_of, []

    def fails(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return start_of(*arguments)

    monkeypatch.setattr(write, "start_of", fails)
    with pytest.raises(KeyboardInterrupt):
        write_init(tmp_path / "out", tiny("llama"), LoraConfig(r=RANK), spaces_for("llama"))
    assert list(tmp_path.iterdir()) == []


def test_the_tokenizer_and_the_record_are_written(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(tiny_checkpoint, device="cpu", offload=True)
    spaces = compute_null_spaces(load_model(tiny_checkpoint, device="cpu")[0], random_batches(), rank=4, progress=False)
    write_init(tmp_path / "out", model, LoraConfig(r=4), spaces, tokenizer=tokenizer, record={"model": "mine", "x": 1})
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out" / "base").eos_token == "<eos>"
    manifest = records.read_manifest(tmp_path / "out", "init")
    assert (manifest["model"], manifest["x"]) == ("mine", 1)
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "out" / "base")


@pytest.mark.processes
def test_two_processes_write_the_same_bytes(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This one and a fresh one, in which sets have another order."""
    spaces = tmp_path / "spaces"
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    compute_null_spaces(model, random_batches(), rank=4, progress=False).save(spaces)
    code = f"""
from peft import LoraConfig
from nullspace import NullSpaces
from nullspace.integrations.peft import write_init
from nullspace.integrations.transformers import load_model

model, _ = load_model({str(tiny_checkpoint)!r}, device="cpu")
config = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
write_init("out", model, config, NullSpaces.load({str(spaces)!r}), progress=False)
"""
    here, there = (tmp_path / name for name in ("here", "there"))
    here.mkdir()
    there.mkdir()
    monkeypatch.chdir(here)
    exec(code, {})
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    environment = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=there, env=environment, check=True)
    assert contents(here / "out", here / "out") == contents(there / "out", there / "out")
