"""Every script of `examples/`, run with a tiny model; what it writes is loaded by plain PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from material import Material
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

from nullspace.artifacts.checkpoint import Checkpoint
from nullspace.cli import app
from nullspace.integrations.peft import lora_layers

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:the texts fill", "ignore::nullspace.errors.DataWarning")]
SIZES = ("--samples", 1, "--rank", 4, "--steps", 2)
IDS = torch.arange(60, 100).view(2, 20)


def base_of(folder: str) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def adapted(base: str, adapter: Path | str) -> torch.Tensor:
    """Logits of the original model with an adapter, as plain PEFT loads it."""
    return logits(PeftModel.from_pretrained(base_of(base), adapter).eval())


def check_trained(base: str, adapter: Path | str) -> dict[str, torch.Tensor]:
    """The adapter's tensors: a plain LoRA for the original model, which it changes."""
    tensors = load_file(Path(adapter) / "adapter_model.safetensors")
    assert all(tensor.any() and tensor.isfinite().all() for tensor in tensors.values())
    assert not torch.equal(adapted(base, adapter), logits(base_of(base)))
    return tensors


def test_sft(run: Callable[..., None], material: Material) -> None:
    run("sft.py", "--model", material.model, "--task", material.chats, "--keep", material.keep, *SIZES)
    assert len(check_trained(material.model, "sft")) == 28
    assert len(torch.load("sft/checkpoint-2/optimizer.pt", weights_only=True)["state"]) == 14  # B of 14 layers; A is frozen


def test_dpo(run: Callable[..., None], material: Material) -> None:
    run("dpo.py", "--model", material.model, "--pairs", material.pairs, "--keep", material.keep, *SIZES)
    check_trained(material.model, "dpo")


def test_qlora(run: Callable[..., None], material: Material, one_layout_of_four_bits: None) -> None:
    pytest.importorskip("bitsandbytes")
    run("qlora.py", "--model", material.model, "--task", material.chats, "--keep", material.keep, *SIZES)
    check_trained(material.model, "qlora")


def test_moe(run: Callable[..., None], material: Material) -> None:
    arguments = ("--task", material.chats, "--keep", material.keep, "--samples", 2, "--rank", 4, "--steps", 2)
    run("moe.py", "--model", material.mixture, *arguments)
    tensors = check_trained(material.mixture, "moe")
    shapes = {name.split(".mlp.")[-1]: tuple(tensor.shape) for name, tensor in tensors.items() if "experts" in name}
    assert sorted(shapes.values()) == [(16, 24), (16, 32), (32, 16), (48, 16)]  # four experts of rank 4


def test_resume_goes_on_where_a_calibration_and_a_training_were_cut_off(
    run: Callable[..., None], material: Material, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("resume.py", "--model", material.model, "--task", material.chats, "--keep", material.keep)
    command += ("--samples", "2", "--rank", "4", "--steps", "4", "--save-steps", "2", "--out")
    run(*command, "straight")

    def cut_off(owner: Any, name: str, after: int) -> None:
        """Interrupts the run at a later call of a method."""
        real, calls = getattr(owner, name), []

        def method(*arguments: Any, **options: Any) -> Any:
            calls.append(None)
            if len(calls) > after:
                raise KeyboardInterrupt
            return real(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, method)
            with pytest.raises(KeyboardInterrupt):
                run(*command, "cut-off")

    cut_off(Checkpoint, "keep", 3)
    assert len(list(Path("cut-off/calibration").glob("*.safetensors"))) == 3
    assert not Path("cut-off/start").exists()
    cut_off(transformers.Trainer, "training_step", 3)
    assert Path("cut-off/training/checkpoint-2").exists()
    assert not Path("cut-off/adapter").exists()
    run(*command, "cut-off")
    straight, resumed = (check_trained(material.model, f"{name}/adapter") for name in ("straight", "cut-off"))
    assert all(torch.allclose(straight[name], tensor, rtol=1e-5, atol=1e-7) for name, tensor in resumed.items())


@pytest.fixture
def forgetful(material: Material, tmp_path: Path) -> Path:
    """A plain LoRA of some layers, as somebody may have trained it."""
    model = get_peft_model(base_of(material.model), LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    for layer in lora_layers(model, "default").values():
        nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    model.save_pretrained(tmp_path / "forgetful")
    return tmp_path / "forgetful"


def test_filter_adapter_does_what_the_command_line_does(
    run: Callable[..., None], material: Material, forgetful: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ("--samples", "2", "--length", "256")
    run("filter_adapter.py", forgetful, "--task", material.chats, "--keep", material.keep, *data, "--retain", 0.9)
    *path, last = capsys.readouterr().out.splitlines()[-11:]
    drifts = [float(line.split()[1]) for line in path]
    assert drifts[0] > drifts[-1] > 0
    assert float(last.split(", ")[-1].split("%")[0]) >= 90
    command = ["filter", str(forgetful), "--task-data", material.chats, "--keep-data", material.keep, *data, "--retain", "0.9"]
    result = CliRunner().invoke(app, [*command, "--out", "by-command"])
    assert result.exit_code == 0, result.output
    ours, theirs = (load_file(f"{name}/adapter_model.safetensors") for name in ("repaired", "by-command"))
    assert all(torch.allclose(ours[name], tensor, rtol=1e-4, atol=1e-6) for name, tensor in theirs.items())


def test_continual_ends_with_one_adapter_that_answers_each_task_as_its_own(run: Callable[..., None], material: Material) -> None:
    tasks = ("--tasks", material.chats, material.more)
    run("continual.py", "--model", material.model, *tasks, "--keep", material.keep, "--samples", 2, "--rank", 4, "--steps", 2)
    for name in ("task-1", "task-2"):
        check_trained(material.model, f"continual/{name}")
    tensors = check_trained(material.model, "continual/combined")
    assert {len(tensor) for name, tensor in tensors.items() if "lora_A" in name} == {8}
    before = logits(base_of(material.model))
    both = sum(adapted(material.model, f"continual/{name}") - before for name in ("task-1", "task-2"))
    assert (adapted(material.model, "continual/combined") - before - both).norm() < both.norm()
