"""Bars, sentences, warnings and other libraries' output on one terminal, and without one."""

from __future__ import annotations

import io
import logging
import re
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from terminal import COLUMNS, terminal
from tqdm import tqdm
from typer.testing import CliRunner

from models import random_batches, tiny
from nullspace import compute_null_spaces
from nullspace.cli import app, console, demo
from nullspace.integrations import transformers as loading

SMALL = ["--samples", "6", "--length", "64", "--batch-size", "2", "--rank", "8"]


@pytest.fixture
def chatty(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`load_model` as other libraries make it: bars, warnings, log records and prints. Returns what must be seen of it."""
    original = loading.load_model
    library, other = logging.getLogger("a_library"), logging.getLogger("another_library")
    monkeypatch.setattr(library, "handlers", [logging.StreamHandler(sys.stderr)])
    monkeypatch.setattr(library, "propagate", False)

    def load(*args: Any, **kwargs: Any) -> Any:
        for _ in tqdm(range(40), desc="unpacking tensors", mininterval=0):
            time.sleep(0.002)
        for _ in tqdm(range(3), desc="downloading", disable=False):
            pass
        library.warning("some weights were newly initialised")
        other.warning("this file is of an older version")
        warnings.warn("a tokenizer without an end", stacklevel=2)
        return original(*args, **kwargs)

    monkeypatch.setattr(loading, "load_model", load)
    return [
        f"warning: {text}"
        for text in ("some weights were newly initialised", "this file is of an older version", "a tokenizer without an end")
    ]


def in_terminal(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> list[str]:
    """The lines of the screen after a command that ends well; empty ones are left out."""
    with terminal(monkeypatch) as screen:
        assert app([str(argument) for argument in arguments], standalone_mode=False) in (None, 0)
    return [line for line in screen.lines if line]


def test_every_bar_and_every_sentence_is_on_the_screen_once(
    tiny_checkpoint: Path, prose: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chatty: list[str]
) -> None:
    (tmp_path / "data.txt").write_text("\n\n".join(prose[:3]))
    monkeypatch.chdir(tmp_path)
    lines = in_terminal(monkeypatch, "init", tiny_checkpoint, "--data", "data.txt", "--out", "out", *SMALL)
    bars = {line.split("  ")[0]: line for line in lines if "━" in line}
    assert list(bars) == ["model", "data", "forward", "null spaces", "adapters"]
    assert sum("━" in line for line in lines) == len(bars)
    for line, count in zip(bars.values(), ("1/1", "1/1", "3/3", "14/14", "14/14"), strict=True):
        assert f" {count} " in line
    assert "tokens/s" in bars["forward"]
    for warning in chatty:
        assert lines.count(warning) == 1
    assert "unpacking" not in "\n".join(lines)
    assert "downloading" not in "\n".join(lines)
    behind = lines[lines.index(bars["adapters"]) + 1 :]
    assert behind[0].split()[:3] == ["site", "d_in", "tokens"]
    assert "Wrote out. To train it:" in behind
    assert all(warning not in behind for warning in chatty)


def test_bars_that_take_turns_and_lines_between_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a layerwise run: each bar and each line is on the screen once, and nothing of a bar that another one has replaced."""
    with terminal(monkeypatch) as screen, console.captured(), console.Bars() as bars:
        for block in range(3):
            for step in range(4):
                bars("forward", 4 * block + step + 1, 12, 10**6 * (block + 1))
                time.sleep(0.03)
            warnings.warn(f"of block {block}", stacklevel=1)
            bars("null spaces", block + 1, 3, 0)
            print("of a library", file=sys.stderr)
        bars("adapters", 1, 2, 0)
    lines = [line for line in screen.lines if line]
    drawn = [line for line in lines if "━" in line]
    assert [line.split("  ")[0] for line in drawn] == ["forward", "null spaces", "adapters"]
    assert [line.endswith(" tokens/s") for line in drawn] == [True, False, False]
    for text, count in (("warning: of block 0", 1), ("warning: of block 2", 1), ("of a library", 3)):
        assert lines.count(text) == count
    assert len(lines) == 3 + 3 + 3


def test_without_a_terminal_warnings_of_loading_are_lines_and_bars_are_not_drawn(
    tiny_checkpoint: Path, prose: list[str], tmp_path: Path, chatty: list[str]
) -> None:
    (tmp_path / "data.txt").write_text("\n\n".join(prose[:3]))
    command = ["init", tiny_checkpoint, "--data", tmp_path / "data.txt", "--out", tmp_path / "out", *SMALL, "--json"]
    result = CliRunner().invoke(app, [str(part) for part in command])
    assert result.exit_code == 0, result.output
    lines = result.stderr.splitlines()
    for warning in chatty:
        assert lines.count(warning) == 1
        assert warning not in result.stdout
    assert "unpacking" not in result.stderr
    assert "downloading" not in result.stderr
    # What was changed for the command is as it was.
    assert logging.StreamHandler in map(type, logging.getLogger("a_library").handlers)
    assert not tqdm(range(1), file=io.StringIO()).disable


def test_what_the_demo_says_stands_between_its_bars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentences go to standard output and the bars to standard error, and both are one terminal."""
    answer = "The capital of France is Paris, and this sentence is longer than eighty columns, so that it goes on in a next line."

    def run(out: Path, *, say: Callable[[str], None], progress: Callable[..., None], **_: Any) -> None:
        for stage, steps in (("model", 1), ("forward", 16), ("null spaces", 30)):
            for done in range(steps + 1):
                progress(stage, done, steps, 1000 * done)
                time.sleep(0.005)
        say("30 layers have 16 inputs.")
        progress("saving", 0, 2, 0)
        time.sleep(0.15)  # longer than until the bar is drawn anew
        say("The adapter trains little.")
        say(answer)

    monkeypatch.setattr(demo, "run", run)
    lines = in_terminal(monkeypatch, "demo", "--out", tmp_path / "out")
    assert [line.split("  ")[0] for line in lines[:3]] == ["model", "forward", "null spaces"]
    assert lines[3] == "30 layers have 16 inputs."
    assert lines[4].startswith("saving ")
    assert lines[5:] == ["The adapter trains little.", answer[:COLUMNS], answer[COLUMNS:]]


@pytest.mark.parametrize("strategy", ["resident", "layerwise"])
def test_the_bars_of_python_are_one_a_stage(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch) as screen:
        compute_null_spaces(tiny("llama"), random_batches(), rank=4, strategy=strategy)
        print("done")
    assert [re.sub(r": 100%.*", "", line) for line in screen.lines if line] == ["forward", "null spaces", "done"]


def test_an_error_stands_below_the_bars(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data.txt").write_text("word " * 100)
    monkeypatch.chdir(tmp_path)
    command = ["init", str(tiny_checkpoint), "--data", "data.txt", "--out", "o", "--targets", "nothing"]
    with terminal(monkeypatch) as screen:
        assert app(command, standalone_mode=False) == 2
    assert [line.split()[0] for line in screen.lines if line][:2] == ["model", "error:"]
    assert sum("━" in line for line in screen.lines) == 1
