"""The README's examples, run as they stand, on a small model of the same architecture under the same name."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nullspace.cli import app

README = Path(__file__).resolve().parents[1] / "README.md"
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```", README.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert found
    return found


@pytest.fixture
def folder(tiny_checkpoint: Path, prose: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_checkpoint, HUB_NAME)
    for name, texts in (("facts.jsonl", prose[:4]), ("more.jsonl", prose[4:8])):
        Path(name).write_text("\n".join(json.dumps({"question": "What is this?", "answer": [text]}) for text in texts))
    return tmp_path


@pytest.mark.filterwarnings("ignore:the texts fill")
def test_python_examples_run_in_order(folder: Path) -> None:
    names: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, str(README), "exec"), names)
    assert json.loads(Path("exported-python/adapter_config.json").read_text())["r"] == 32


@pytest.mark.filterwarnings("ignore:the texts fill")
def test_command_lines_run_in_order(folder: Path) -> None:
    commands = [line.removeprefix("$ nullspace ").split() for block in blocks("console") for line in block.splitlines()]
    assert {command[0] for command in commands} == {
        "init",
        "inspect",
        "compute",
        "covariances",
        "merge",
        "export",
        "report",
        "plan",
    }
    for command in commands:
        if command[0] == "export":  # what training would have left
            shutil.copytree("out/adapter", "trained")
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, (command, result.output)
