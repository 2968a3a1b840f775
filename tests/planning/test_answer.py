"""What `nullspace plan` answers: cards by name, verdicts, and commands that the command line takes."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import typer
from typer.testing import CliRunner

from nullspace.cli import COMMANDS, app, options
from nullspace.planning.cards import CARDS, card
from nullspace.planning.plan import MARGIN, Rates

INSTALLED: Any = typer.main.get_command(app)
BY_NAME = {command.__name__: command for command in COMMANDS}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration in which the eigenproblem of `down_proj` takes most of the memory."""
    folder = tmp_path_factory.mktemp("configurations") / "a model"
    transformers.LlamaConfig(
        vocab_size=211,
        hidden_size=256,
        intermediate_size=4096,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        dtype="bfloat16",
    ).save_pretrained(folder)
    return folder


def asked(*arguments: Any) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["plan", *map(str, arguments), "--samples", "8", "--length", "64", "--json"])
    assert result.exit_code == 0, result.output
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def check_commands(lines: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The values of the options of printed commands; an option that the command line refuses is an error."""
    monkeypatch.chdir(folder)
    Path("data.jsonl").touch()
    read = []
    for line in lines:
        program, command, *arguments = shlex.split(line)
        assert program == "nullspace"
        context = INSTALLED.commands[command].make_context(command, arguments)
        values = {name: value for name, value in context.params.items() if name not in ("debug", "context")}
        given = [name for name in values if not context.get_parameter_source(name).name.startswith("DEFAULT")]
        options.check(BY_NAME[command], values, given)
        read.append(values)
    return read


def test_cards_by_name() -> None:
    for name in CARDS:
        assert card(name.lower().replace("-", " ")) == (name, CARDS[name])
    assert card("NVIDIA GeForce RTX 4090")[0] == card("4090")[0] == card("rtx4090")[0] == "RTX 4090"
    with pytest.raises(ValueError, match="A100-40GB or A100-80GB"):
        card("A100")
    for wrong in ("A1000", "", "GPU"):
        with pytest.raises(ValueError, match=r"--device-memory|may be"):
            card(wrong)
    memories = [figures.memory for figures in CARDS.values()]
    assert memories == sorted(memories)


def test_rates_of_cards_are_in_proportion_to_their_data_sheets() -> None:
    reference = Rates.of("cuda", torch.bfloat16)
    assert Rates.of("cuda", torch.bfloat16, card=CARDS["H100"]) == reference
    for name, figures in CARDS.items():
        half, single = (Rates.of("cuda", dtype, card=figures) for dtype in (torch.bfloat16, torch.float32))
        assert half.forward / reference.forward == pytest.approx(figures.half / CARDS["H100"].half), name
        assert single.forward < min(half.forward, figures.single), name
        assert half.decomposition <= figures.double / 2
        assert half.estimated
    assert Rates.of("cuda", torch.bfloat16, card=CARDS["H200"]).decomposition > reference.decomposition


def test_what_fits_comes_with_its_command(wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--rank", 16, "--gpu", "l4", "--exclude", "q_proj", "--dtype", "bfloat16", "--freeze-a"]
    says = asked(wide, *words)
    assert says["fits"]
    assert (says["gpu"], says["device_memory"]) == ("L4", 24e9)
    assert says["choice"]["weights"] != "host"
    assert (says["offers"], says["missing"]) == ([], None)
    [line] = says["commands"]
    [values] = check_commands([line], tmp_path, monkeypatch)
    assert Path(values["model"]) == wide
    expected = {"rank": 16, "samples": 8, "length": 64, "exclude": "q_proj", "dtype": "bfloat16", "freeze_a": True}
    assert {name: values[name] for name in expected} == expected
    assert (values["strategy"], values["offload"]) == (says["choice"]["strategy"], says["choice"]["weights"] == "disk")
    forms = [(each["weights"], each["checkpointing"]) for each in says["training"]]
    assert forms == [("bfloat16", False), ("bfloat16", True), ("4-bit", False), ("4-bit", True)]
    assert all(each["fits"] and each["counted"] for each in says["training"])
    text = CliRunner().invoke(app, ["plan", str(wide), *map(str, words), "--samples", "8", "--length", "64"]).stdout
    assert text.startswith("Fits on the L4 with 24.0 GB: ")
    assert text.splitlines()[2].strip() == line
    assert text.index("Training the adapter afterwards fits there with bfloat16") < text.index("Every way to run it")


def test_where_only_the_solves_do_not_fit(wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everywhere = asked(wide, "--rank", 128, "--gpu", "T4")["plans"]
    smallest = min((p for p in everywhere if p["weights"] != "host"), key=lambda p: p["device_bytes"])
    solve = smallest["device_parts"]["decomposition"]
    memory = int((smallest["device_bytes"] - solve / 4) / MARGIN)
    says = asked(wide, "--device-memory", f"{memory}b")
    assert not says["fits"]
    assert "too much" in says["missing"]
    on_host, fewer = says["offers"]
    assert on_host["solved_on_host"]
    assert on_host["exclude"] == []
    assert on_host["device_bytes"] <= MARGIN * memory
    assert on_host["host_parts"]["decomposition"] >= 8 * 4096**2
    assert fewer["exclude"] == ["down_proj"]
    assert fewer["device_bytes"] <= MARGIN * memory
    assert says["cards"] == list(CARDS)
    keep, start = check_commands(on_host["commands"], tmp_path, monkeypatch)
    assert keep["out"] == start["covariances"]
    assert start["device"] == "cpu"
    [values] = check_commands(fewer["commands"], tmp_path, monkeypatch)
    assert values["exclude"] == "down_proj"
    text = CliRunner().invoke(app, ["plan", str(wide), "--device-memory", f"{memory}b", "--samples", "8", "--length", "64"]).stdout
    assert text.startswith("Does not fit on a GPU with ")
    assert "\nWithout down_proj it fits: " in text
    assert "Cards on which it fits: T4, L4" in text


def test_layers_left_out_before_stay_out(wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for own, expected in (("k_proj", "k_proj,down_proj"), ("re:.*k_proj", "re:.*k_proj|.*\\.(?:down_proj)")):
        says = asked(wide, "--exclude", own, "--device-memory", "300MB")
        lines = next(offer["commands"] for offer in says["offers"] if offer["exclude"])
        [values] = check_commands(lines, tmp_path, monkeypatch)
        assert values["exclude"] == expected


def test_a_quantised_model_is_not_left_on_the_disk(wide: Path) -> None:
    says = asked(wide, "--load-in-4bit", "--gpu", "T4")
    assert says["choice"]["weights"] == "device"
    assert [each["weights"] for each in says["training"]] == ["quantised", "quantised"]


def test_a_gpu_is_refused_for_a_cpu(wide: Path) -> None:
    result = CliRunner().invoke(app, ["plan", str(wide), "--gpu", "T4", "--device", "cpu"])
    assert result.exit_code == 2
    assert "--gpu belongs to a plan for a GPU" in result.output
