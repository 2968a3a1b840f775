"""`nullspace filter`, `combine` and `verify`, with their exit codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from typer.testing import CliRunner

from nullspace import Covariances, stream_covariances
from nullspace.artifacts.identity import weights_of
from nullspace.cli import app
from nullspace.model.sites import find_targets


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def moments(model: torch.nn.Module, first: int, last: int) -> Covariances:
    generator = torch.Generator().manual_seed(first)
    batches = [{"input_ids": torch.randint(first, last, (4, 64), generator=generator)} for _ in range(2)]
    return Covariances(stream_covariances(model, batches, progress=False), weights_of(find_targets(model)))


@pytest.fixture(scope="module")
def place(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `task`, `keep`, two adapters `a` and `b` that name their base, and a `tuned` checkpoint."""
    folder = tmp_path_factory.mktemp("after")
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    moments(base, 2, 90).save(folder / "task")
    moments(base, 60, 250).save(folder / "keep")
    for seed, (name, targets) in enumerate({"a": ["q_proj", "up_proj"], "b": ["q_proj", "down_proj"]}.items()):
        base = transformers.AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
        model = get_peft_model(base, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
        torch.manual_seed(seed)
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.data.add_(0.02 * torch.randn_like(parameter))
        model.save_pretrained(folder / name)
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    for parameter in base.parameters():
        parameter.data.add_(0.01 * torch.randn_like(parameter))
    base.save_pretrained(folder / "tuned")
    return folder


def test_without_a_strength_the_path_is_shown_and_nothing_written(place: Path) -> None:
    before = sorted(path.name for path in place.iterdir())
    shown = run("filter", place / "a", "--task", place / "task", "--keep", place / "keep")
    assert shown.exit_code == 0, shown.output
    assert "Nothing is written: choose with --strength, --drift or --retain, and --out." in shown.stdout
    document = json.loads(run("filter", place / "a", "--task", place / "task", "--keep", place / "keep", "--json", "-q").stdout)
    assert [step["strength"] for step in document["path"]] == sorted(step["strength"] for step in document["path"])
    drifts, responses = ([step[name] for step in document["path"]] for name in ("drift", "response"))
    assert drifts == sorted(drifts, reverse=True)
    assert responses == sorted(responses, reverse=True)
    assert len(document["layers"]) == 4
    refused = run("filter", place / "a", "--task", place / "task", "--keep", place / "keep", "--out", place / "o")
    assert refused.exit_code == 2
    assert "--out needs exactly one of --strength, --drift and --retain" in refused.stderr
    assert sorted(path.name for path in place.iterdir()) == before


def test_what_a_budget_was_asked_for_is_within_it(place: Path, tmp_path: Path) -> None:
    given = ("--task", place / "task", "--keep", place / "keep")
    broken = run("verify", place / "a", "--keep", place / "keep", "--drift", 0.01)
    assert broken.exit_code == 1, broken.output
    assert broken.stdout.startswith("beyond the budget: drift ")
    done = run("filter", place / "a", *given, "--drift", 0.01, "--out", tmp_path / "out", "--json", "-q")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    chosen = next(step for step in document["path"] if step["strength"] == document["strength"])
    assert chosen["drift"] == pytest.approx(0.01, rel=1e-6)
    checked = run("verify", tmp_path / "out", "--keep", place / "keep", "--drift", 0.01001, "--json", "-q")
    assert checked.exit_code == 0, checked.output
    seen = json.loads(checked.stdout)
    assert seen["within"] is True
    assert seen["median"] == pytest.approx(0.01, rel=1e-4)
    worst = run("verify", tmp_path / "out", "--keep", place / "keep", "--drift", 1, "--worst", seen["worst"] / 2, "--json", "-q")
    assert worst.exit_code == 1
    assert json.loads(worst.stdout)["within"] is False  # the document is complete


def test_wrong_input_is_exit_code_2_and_leaves_nothing(place: Path, tmp_path: Path) -> None:
    keep = ("--keep", place / "keep")
    shutil.copytree(place / "a", tmp_path / "damaged")
    (tmp_path / "damaged" / "adapter_model.safetensors").write_bytes(b"nothing")
    for arguments, words in (
        (("verify", tmp_path / "none", *keep, "--drift", 1), "is not a PEFT adapter"),
        (("verify", place / "a", "--keep", place / "a", "--drift", 1), "nullspace.json"),
        (("verify", tmp_path / "damaged", *keep, "--drift", 1), "adapter_model.safetensors"),
        (("filter", place / "a", *keep, "--out", tmp_path / "o", "--strength", 1), "give one of --task and --task-data"),
        (("filter", place / "a", place / "b", place / "b", "--task", place / "task", *keep), "not 3 directories"),
        (("filter", place / "a", "--task", place / "task", *keep, "--out", tmp_path / "o", "--retain", 2), "--retain must be"),
        (
            ("combine", place / "a", "--task", place / "task", *keep, "--out", tmp_path / "o", "--strength", 1),
            "at least two adapters",
        ),
    ):
        refused = run(*arguments)
        assert refused.exit_code == 2, (arguments, refused.output)
        assert words in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


def test_moments_of_data_are_computed_with_the_base_that_the_adapter_names(place: Path, tmp_path: Path, prose: list[str]) -> None:
    (tmp_path / "task.txt").write_text("\n\n".join(prose[:2]))
    (tmp_path / "keep.txt").write_text("\n\n".join(prose[2:4]))
    text = ("--samples", 8, "--length", 64, "--batch-size", 4, "--device", "cpu")
    data = ("--task-data", tmp_path / "task.txt", "--keep-data", tmp_path / "keep.txt", *text)
    done = run("filter", place / "a", *data, "--retain", 0.9, "--out", tmp_path / "out", "-q")
    assert done.exit_code == 0, done.output
    sums = run("covariances", json.loads((place / "a" / "adapter_config.json").read_text())["base_model_name_or_path"], "--data",
               tmp_path / "keep.txt", "--out", tmp_path / "kept", *text, "-q")  # fmt: skip
    assert sums.exit_code == 0, sums.output
    mixed = run(
        "filter", place / "a", *data[:2], *text, "--keep", tmp_path / "kept", "--retain", 0.9, "--out", tmp_path / "same", "-q"
    )
    assert mixed.exit_code == 0, mixed.output
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "same"))
    assert all(torch.allclose(t, other[key], rtol=1e-4, atol=1e-7) for key, t in one.items())


def test_two_checkpoints_and_two_adapters(place: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    given = ("--task", place / "task", "--keep", place / "keep")
    shown = run("filter", tiny_checkpoint, place / "tuned", *given)
    assert shown.exit_code == 0, shown.output
    done = run("filter", tiny_checkpoint, place / "tuned", *given, "--strength", 1, "--out", tmp_path / "model", "--json", "-q")
    assert done.exit_code == 0, done.output
    assert "model.embed_tokens.weight" in json.loads(done.stdout)["rest"]
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    both = run("combine", place / "a", place / "b", "--task", place / "task", "--task", place / "task", "--keep", place / "keep",
               "--strength", 0.5, "--rank", 6, "--out", tmp_path / "both", "--json", "-q")  # fmt: skip
    assert both.exit_code == 0, both.output
    document = json.loads(both.stdout)
    assert document["rank"] == 6
    assert "model.layers.0.mlp.up_proj" in document["partly"]
    assert run("inspect", tmp_path / "both", "--json").exit_code == 0
