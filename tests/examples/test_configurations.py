"""YAML of other trainers, and calls of Unsloth, against the installed package; without it, against what it was read to take.

None of these packages can be installed beside the versions that are tested here: they pin transformers and PEFT.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from material import EXAMPLES, Material
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from typer.testing import CliRunner

from models import tiny
from nullspace.cli import app

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"

# Of llamafactory 0.9.5: the fields of its dataclasses that the example uses, and their types. It also takes all of transformers'
# TrainingArguments.
LLAMA_FACTORY: dict[str, Any] = {
    **dict.fromkeys(("model_name_or_path", "adapter_name_or_path", "dataset", "template"), str),
    "stage": ("pt", "sft", "rm", "ppo", "dpo", "kto"),
    "finetuning_type": ("lora", "oft", "freeze", "full"),
    "cutoff_len": int,
    "loraplus_lr_ratio": float,
}
# Of axolotl 0.19.0: fields of AxolotlInputConfig, and of SFTDataset.
AXOLOTL: dict[str, Any] = {
    **dict.fromkeys(("base_model", "adapter", "lora_model_dir", "output_dir", "optimizer", "lr_scheduler"), str),
    **dict.fromkeys(("lora_r", "lora_alpha", "sequence_len", "micro_batch_size", "gradient_accumulation_steps"), int),
    **dict.fromkeys(("num_epochs", "logging_steps", "saves_per_epoch"), int),
    **dict.fromkeys(("lora_dropout", "learning_rate", "warmup_ratio", "weight_decay"), float),
    **dict.fromkeys(("lora_target_linear", "bf16", "gradient_checkpointing"), bool),
    **dict.fromkeys(("unfrozen_parameters", "datasets"), list),
    "gradient_checkpointing_kwargs": dict,
}
AXOLOTL_DATASET = {"path", "type", "field_messages", "split"}
# Of unsloth 2026.10.9: FastLanguageModel.from_pretrained.
UNSLOTH = {"model_name", "max_seq_length", "load_in_4bit"}


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((EXAMPLES / name).read_text(encoding="utf-8"))


def unfit(given: dict[str, Any], known: dict[str, Any]) -> list[str]:
    """Keys that are not known, or hold a value of another type."""
    wrong = []
    for name, value in given.items():
        fits = known.get(name, ())
        if not (value in fits if isinstance(fits, tuple) else isinstance(value, fits)):
            wrong.append(f"{name}: {value!r}")
    return wrong


def variants() -> list[dict[str, Any]]:
    """LLaMA-Factory's configuration: as it stands, and with the lines of its comment, for a frozen A."""
    text = (EXAMPLES / "llama_factory.yaml").read_text(encoding="utf-8")
    lines = [line.removeprefix("#   ") for line in text.splitlines() if line.startswith("#   ") and ": " in line.split("#")[1]]
    frozen = yaml.safe_load("\n".join(lines))
    assert set(frozen) == {"model_name_or_path", "learning_rate", "loraplus_lr_ratio"}
    return [read("llama_factory.yaml"), {**read("llama_factory.yaml"), **frozen}]


def first_commands(name: str) -> list[list[str]]:
    """The arguments of the `nullspace` commands in the head of a file."""
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    return [shlex.split(line, comments=True) for line in re.findall(r"^(?:#   |    )nullspace (.+)$", text, flags=re.MULTILINE)]


@pytest.fixture
def folder(material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with what the commands name."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(material.model, HUB_NAME)
    shutil.copy(material.keep, "facts.jsonl")
    shutil.copy(material.chats, "task.jsonl")
    return tmp_path


def run(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, (arguments, result.output)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::nullspace.errors.DataWarning")
def test_llama_factory_finds_what_init_has_written(folder: Path) -> None:
    start, export = first_commands("llama_factory.yaml")
    run(start)
    given = read("llama_factory.yaml")
    base = transformers.AutoModelForCausalLM.from_pretrained(given["model_name_or_path"])
    model = PeftModel.from_pretrained(base, given["adapter_name_or_path"], is_trainable=True)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.01 * torch.randn_like(p))
    ids = torch.arange(60, 90)[None]
    trained = model.eval()(ids).logits
    model.save_pretrained(given["output_dir"])
    run(export)
    original = transformers.AutoModelForCausalLM.from_pretrained(HUB_NAME)
    assert torch.allclose(PeftModel.from_pretrained(original, "exported").eval()(ids).logits, trained, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::nullspace.errors.DataWarning")
def test_axolotl_and_unsloth_find_what_init_has_written(folder: Path) -> None:
    commands, given = first_commands("axolotl.yaml"), read("axolotl.yaml")
    assert commands == first_commands("with_unsloth.py")
    for each in commands:
        run(each)
    assert not Path("out/base").exists()
    config = PeftConfig.from_pretrained(given["lora_model_dir"])
    assert (config.r, config.lora_alpha, config.lora_dropout) == (given["lora_r"], given["lora_alpha"], given["lora_dropout"])
    assert config.base_model_name_or_path == str(folder / given["base_model"])  # here a folder has that name


def test_llama_factory_takes_its_configuration() -> None:
    training = dict.fromkeys(inspect.signature(transformers.TrainingArguments).parameters, object)
    for given in variants():
        assert unfit(given, {**training, **LLAMA_FACTORY}) == []
        own = {name: value for name, value in given.items() if name in training and name != "bf16"}
        transformers.TrainingArguments(**own, use_cpu=True)
    if importlib.util.find_spec("llamafactory") is None:
        pytest.skip("llamafactory is not installed: its keys were compared with those that version 0.9.5 was read to have")
    from llamafactory.hparams.parser import _TRAIN_ARGS

    for given in variants():
        transformers.HfArgumentParser(_TRAIN_ARGS).parse_dict({**given, "bf16": False, "use_cpu": True})


def test_the_rates_that_stand_for_a_frozen_a_leave_it_as_it_is() -> None:
    """LoRA+ makes two rates of these numbers. The steps of A are below the rounding of float32, those of B are ordinary ones."""
    _, frozen = variants()
    rate = frozen["learning_rate"]
    assert rate * frozen["loraplus_lr_ratio"] == pytest.approx(5e-4)
    a, b = torch.full((8, 64), 64**-0.5), torch.zeros(64, 8)
    first = a.clone()
    groups = [{"params": [a], "lr": rate}, {"params": [b], "lr": rate * frozen["loraplus_lr_ratio"]}]
    optimizer = torch.optim.AdamW(groups, weight_decay=frozen["weight_decay"])
    for _ in range(20):
        a.grad, b.grad = torch.randn(8, 64), torch.randn(64, 8)
        optimizer.step()
    assert torch.equal(a, first)
    assert b.abs().mean() > 1e-4


def test_axolotl_takes_its_configuration() -> None:
    given = read("axolotl.yaml")
    assert unfit(given, AXOLOTL) == []
    assert {name for each in given["datasets"] for name in each} <= AXOLOTL_DATASET
    if importlib.util.find_spec("axolotl") is None:
        pytest.skip("axolotl is not installed: its keys were compared with those that version 0.19.0 was read to have")
    from axolotl.utils.freeze import freeze_layers_except
    from axolotl.utils.schemas.config import AxolotlInputConfig

    AxolotlInputConfig(**given)
    assert set(given) <= set(AxolotlInputConfig.model_fields)
    model = get_peft_model(tiny("llama"), LoraConfig(target_modules="all-linear"))
    freeze_layers_except(model, given["unfrozen_parameters"])
    assert {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad} == {"lora_B"}


def test_unsloth_has_the_names_that_the_example_calls() -> None:
    """It cannot be imported without a GPU. The example is compiled; its name must not hide the package."""
    tree = ast.parse((EXAMPLES / "with_unsloth.py").read_text(encoding="utf-8"))
    compile(tree, "with_unsloth.py", "exec")
    assert not (EXAMPLES / "unsloth.py").exists()
    imported = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert imported.index("unsloth") < imported.index("trl")
    call = next(n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "FastLanguageModel.from_pretrained")
    assert len(call.args) == 1
    assert {keyword.arg for keyword in call.keywords} <= UNSLOTH
    spec = importlib.util.find_spec("unsloth")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("unsloth is not installed: the call was compared with what version 2026.10.9 was read to take")
    loader = ast.parse(Path(spec.submodule_search_locations[0], "models", "loader.py").read_text(encoding="utf-8"))
    owner = next(node for node in loader.body if isinstance(node, ast.ClassDef) and node.name == "FastLanguageModel")
    method = next(node for node in owner.body if isinstance(node, ast.FunctionDef) and node.name == "from_pretrained")
    assert method.args.args[0].arg == "model_name"
    assert {keyword.arg for keyword in call.keywords} <= {each.arg for each in method.args.args}
