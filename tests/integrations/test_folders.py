"""The folders that are written, looked at, moved and loaded from elsewhere: which base an adapter needs, and who says so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel
from typer.testing import CliRunner

from models import random_batches, tiny
from nullspace import NullSpaces, cli, compute_null_spaces
from nullspace.integrations.peft import describe, export_lora, inject_adapters, save_init, set_base, write_init

BATCH = random_batches(1, 2, 16, seed=7)[0]
FOLDERS = ("out", "out/adapter", "out/base", "trained", "exported")


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**BATCH).logits


def inspect(*arguments: Any) -> Any:
    return CliRunner().invoke(cli.app, ["inspect", *map(str, arguments)])


@pytest.fixture(scope="module")
def spaces() -> NullSpaces:
    return compute_null_spaces(tiny("llama"), random_batches(), rank=4, progress=False)


def build(folder: Path, spaces: NullSpaces, method: str = "lora-null") -> None:
    """Below the folder, which is the working directory: model, out, trained, exported, by relative names."""
    tiny("llama").save_pretrained("model")
    model = transformers.AutoModelForCausalLM.from_pretrained("model")
    adapted = inject_adapters(model, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM"), spaces, method=method)
    save_init("out", adapted, spaces, record={"data": "a|b`c\n# d"})
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    adapted.save_pretrained("trained")
    export_lora("trained", "out", "exported")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, spaces: NullSpaces) -> Path:
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        build(folder, spaces)
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """A copy that has lost sight of the first one, as on another machine."""
    for name in (*FOLDERS[:1], *FOLDERS[3:], "model"):
        shutil.copytree(made / name, tmp_path / name)
    for name in ("out/adapter", "trained"):
        for file in ("adapter_config.json", "README.md"):
            path = tmp_path / name / file
            path.write_text(path.read_text(encoding="utf-8").replace(str(made), "/another/machine"), encoding="utf-8")
    return tmp_path


def test_adapters_load_by_their_own_configuration_from_any_working_directory(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = logits(transformers.AutoModelForCausalLM.from_pretrained(made / "model"))
    trained = logits(AutoPeftModelForCausalLM.from_pretrained(made / "trained"))
    assert torch.allclose(logits(AutoPeftModelForCausalLM.from_pretrained(made / "out" / "adapter")), before, atol=1e-5)
    assert (trained - before).abs().max() > 0.01
    assert torch.allclose(logits(AutoPeftModelForCausalLM.from_pretrained(made / "exported")), trained, atol=1e-5)


@pytest.mark.parametrize("folder", FOLDERS)
def test_inspect_says_which_base_each_folder_needs(folder: str, made: Path) -> None:
    shown = inspect(made / folder)
    assert shown.exit_code == 0, shown.output
    result = inspect(made / folder, "--json")
    told = json.loads(result.stdout)
    model, base = str(made / "model"), str(made / "out" / "base")
    kind = {"out": "init", "out/base": "residual base", "exported": "export"}.get(folder, "adapter")
    assert told["kind"] == kind
    assert told["rank"] == (8 if folder == "exported" else 4)
    if folder == "exported":
        assert (told["base"], told["base_kind"], told["scaling"]) == (model, "untouched", 1)
        assert "--max-lora-rank 8" in shown.stdout
    else:
        assert (told["method"], told["model"], told["alpha"]) == ("lora-null", model, 8)
        assert model in shown.stdout
        assert base in shown.stdout
    if folder in ("out", "out/adapter", "trained"):
        assert (told["base"], told["base_found"], told["base_kind"], told["scaling"]) == (base, base, "residual", 2)
        assert "silently wrong" in shown.stdout
    assert ("sites" in told) == (folder == "out")


@pytest.mark.parametrize("folder", FOLDERS[1:])
def test_every_card_names_the_base_and_its_example_runs(folder: str, made: Path, monkeypatch: Any) -> None:
    card = ModelCard.load(made / folder / "README.md")
    names_base = {"out/adapter": "../base", "trained": str(made / "out" / "base")}
    assert f"`{names_base.get(folder, made / 'model')}`" in card.text
    assert card.data.base_model is None  # the hub refuses a path there
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.library_name == ("transformers" if folder == "out/base" else "peft")
    assert "lora-null" in card.data.tags
    assert "`a¦b'c # d`" in card.text
    assert ("disable_adapter" in card.text) == (folder in ("out/adapter", "trained"))
    monkeypatch.chdir(made / folder)
    names: dict[str, Any] = {}
    exec(card.text.partition("```python\n")[2].partition("```")[0], names)
    state = "trained" if folder in ("trained", "exported") else "out/adapter"
    assert torch.allclose(logits(names["model"]), logits(AutoPeftModelForCausalLM.from_pretrained(made / state)), atol=1e-5)


def test_what_was_moved_as_a_whole_finds_its_base_and_is_mended(copy: Path) -> None:
    adapter, base = copy / "out" / "adapter", copy / "out" / "base"
    card = (adapter / "README.md").read_text(encoding="utf-8")
    assert "/another/machine/out" not in card  # it names its base from where it lies
    told = describe(adapter)
    assert (told["base"], told["base_found"]) == ("/another/machine/out/base", str(base))
    assert any(f"--base {base}" in note for note in told["notes"])
    with pytest.raises((OSError, ValueError), match="/another/machine/out/base"):
        AutoPeftModelForCausalLM.from_pretrained(adapter)
    assert json.loads(inspect(copy / "out", "--base", base, "--json").stdout)["base"] == str(base)
    wanted = logits(transformers.AutoModelForCausalLM.from_pretrained(copy / "model"))
    assert torch.allclose(logits(AutoPeftModelForCausalLM.from_pretrained(adapter)), wanted, atol=1e-5)
    assert f"| base | `{base}` |" in (adapter / "README.md").read_text(encoding="utf-8")
    assert "../base" not in (adapter / "README.md").read_text(encoding="utf-8")
    assert not any("--base" in note for note in describe(adapter)["notes"])
    export_lora(copy / "trained", copy / "out", copy / "again", base="the/base")


def test_an_adapter_that_has_lost_its_base_says_so(copy: Path) -> None:
    told = describe(copy / "trained")
    assert (told["base_kind"], told["base_found"]) == ("residual", None)  # as its card says
    assert "missing: /another/machine/out/base" in told["notes"][0]
    (copy / "trained" / "README.md").unlink()
    assert describe(copy / "trained")["base_kind"] == "residual"  # as its configuration says
    path = copy / "trained" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_mapping": None}))  # of an earlier version
    assert describe(copy / "trained")["base_kind"] == "unknown"
    assert "not a folder on this machine" in inspect(copy / "trained").stdout
    with pytest.raises(ValueError, match=r"needs the residual base .*/another/machine/out/base"):
        set_base(copy / "trained", str(copy / "model"))
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        set_base(copy / "trained", str(copy))
    set_base(copy / "trained", str(copy / "out" / "base"))
    assert describe(copy / "trained")["base_kind"] == "residual"
    assert "silently" not in (card := (copy / "trained" / "README.md").read_text(encoding="utf-8"))
    assert "## Its base is a residual model" in card
    set_base(copy / "trained", "me/residual-base")  # uploaded
    assert ModelCard.load(copy / "trained" / "README.md").data.base_model == "me/residual-base"
    assert describe(copy / "trained")["base_kind"] == "residual"


def test_peft_and_people_may_write_the_card_and_it_keeps_their_text(made: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """A process that trains without nullspace lets PEFT write the card."""
    monkeypatch.chdir(made)
    base = transformers.AutoModelForCausalLM.from_pretrained("out/base")
    PeftModel.from_pretrained(base, "out/adapter").save_pretrained(tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(made / "out" / "base")
    path = tmp_path / "plain" / "README.md"
    path.write_text(path.read_text(encoding="utf-8") + "\nWritten by me.\n", encoding="utf-8")
    for _ in range(2):
        assert inspect(tmp_path / "plain", "--base", made / "out" / "base").exit_code == 0
        text = path.read_text(encoding="utf-8")
        assert "Written by me." in text
        assert text.count("## Its base is a residual model") == 1
        card = ModelCard.load(path)
        assert (card.data.base_model, [tag for tag in card.data.tags if "base_model" in tag]) == (None, [])
    path.write_text("---\na: [\n---\n", encoding="utf-8")
    assert inspect(tmp_path / "plain", "--base", made / "out" / "base").exit_code == 2


def test_before_it_is_saved_a_residual_base_goes_by_no_models_name(spaces: NullSpaces, tmp_path: Path) -> None:
    base = tiny("llama")
    base.name_or_path = base.config._name_or_path = "somebody/model"
    adapted = inject_adapters(base, LoraConfig(r=4), spaces)
    adapted.save_pretrained(tmp_path / "early")
    name = json.loads((tmp_path / "early" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert "save_init" in name
    assert f"| base | `{name}` |" in (tmp_path / "early" / "README.md").read_text(encoding="utf-8")
    with pytest.raises((OSError, ValueError), match="save_init"):
        transformers.AutoConfig.from_pretrained(name)
    save_init(tmp_path / "out", adapted, spaces)
    assert describe(tmp_path / "out")["model"] == "somebody/model"
    assert describe(tmp_path / "out")["base"] == str(tmp_path / "out" / "base")


@pytest.mark.parametrize("write", ["save_init", "write_init"])
def test_where_the_base_is_left_alone_the_untouched_models_absolute_path_is_named(
    write: str, spaces: NullSpaces, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny("llama").save_pretrained("model")
    base = transformers.AutoModelForCausalLM.from_pretrained("model")
    config = LoraConfig(r=4, task_type="CAUSAL_LM")
    if write == "save_init":
        save_init("out", inject_adapters(base, config, spaces, method="b-zero"), spaces)
    else:
        write_init("out", base, config, spaces, method="b-zero", progress=False)
    told = describe("out")
    assert (told["base"], told["base_kind"], told["method"]) == (str(tmp_path / "model"), "untouched", "b-zero")
    monkeypatch.chdir("/")
    found = logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out" / "adapter"))
    assert torch.equal(found, logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")))


def test_two_adapters_on_an_untouched_base_are_said_to_belong_together(spaces: NullSpaces, tmp_path: Path) -> None:
    model = inject_adapters(tiny("llama"), LoraConfig(r=4), spaces, residual="adapter")
    save_init(tmp_path / "out", model, spaces)
    model.save_pretrained(tmp_path / "trained", selected_adapters=["default"])
    assert any("'subtracted' must be active" in note for note in describe(tmp_path / "out" / "adapter")["notes"])
    for folder in ("out/adapter", "out/subtracted", "trained"):
        assert "attach_subtracted" in (tmp_path / folder / "README.md").read_text(encoding="utf-8")


def test_other_folders_are_described_or_refused_by_name(made: Path, tmp_path: Path) -> None:
    assert describe(made / "model")["kind"] == "model"
    assert inspect(made / "model").exit_code == 0
    (tmp_path / "empty").mkdir()
    result = inspect(tmp_path / "empty")
    assert result.exit_code == 2
    assert str(tmp_path / "empty") in result.stderr.replace("\n", "")
    shutil.copytree(made / "trained", tmp_path / "bad")
    for damage in (b"{", b"[]", b'{"peft_type": "LORA"}', b'{"peft_type": "LORA", "r": 4, "lora_alpha": "x"}'):
        (tmp_path / "bad" / "adapter_config.json").write_bytes(damage)
        result = inspect(tmp_path / "bad")
        assert result.exit_code == 2, (damage, result.output)
        assert "adapter_config.json" in result.stderr.replace("\n", "")


def test_a_base_alone_is_known_by_its_mark_until_the_adapter_is_merged(made: Path, tmp_path: Path) -> None:
    base = tmp_path / "uploaded"
    shutil.copytree(made / "out" / "base", base)
    told = describe(base)
    assert (told["kind"], told["model"], told["method"]) == ("residual base", str(made / "model"), "lora-null")
    with pytest.raises(ValueError, match=r"uploaded is a residual base"):
        export_lora(made / "trained", made / "out", tmp_path / "no", base=str(base))
    shutil.copytree(made / "out" / "adapter", tmp_path / "start")  # without its init
    set_base(tmp_path / "start", str(base))
    export_lora(made / "trained", tmp_path / "start", tmp_path / "exported")
    assert describe(tmp_path / "exported")["base"] == str(made / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    PeftModel.from_pretrained(model, made / "out" / "adapter").merge_and_unload().save_pretrained(tmp_path / "merged")
    assert describe(tmp_path / "merged")["kind"] == "model"
    config = json.loads((base / "config.json").read_text())
    mark = config["nullspace"]["residual"]
    for damaged in ({**mark, "at": [10**9, 1]}, {**mark, "values": "x"}, {"layer": mark["layer"]}):
        (base / "config.json").write_text(json.dumps({**config, "nullspace": {"residual": damaged}}))
        assert describe(base)["kind"] == "model"


def test_a_checkpoint_is_named_as_one(tmp_path: Path) -> None:
    compute_null_spaces(tiny("llama"), random_batches(2), rank=4, progress=False, checkpoint=tmp_path / "kept", targets=["q_proj"])
    told = json.loads(inspect(tmp_path / "kept", "--json").stdout)
    assert (told["kind"], told["sites_finished"]) == ("checkpoint", 3)
    assert told["run"]["model"]["class"] == "LlamaForCausalLM"
