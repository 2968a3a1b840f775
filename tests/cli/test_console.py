"""Bars, sentences, warnings and other libraries' output on one terminal, and without one."""

from __future__ import annotations

import io
import logging
import re
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from terminal import COLUMNS, terminal
from tqdm import tqdm
from typer.testing import CliRunner

from models import random_batches, tiny
from nullspace import compute_null_spaces
from nullspace.cli import app, console
from nullspace.integrations.transformers import load as loading

SMALL = ["--samples", "6", "--length", "64", "--batch-size", "2", "--rank", "8"]


@pytest.fixture
def chatty(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`load_weights` as other libraries make it: bars, warnings, log records and prints. Returns what must be seen of it."""
    original = loading.load_weights
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

    monkeypatch.setattr(loading, "load_weights", load)
    return [
        f"warning: {text}"
        for text in ("some weights were newly initialised", "this file is of an older version", "a tokenizer without an end")
    ]


def in_terminal(monkeypatch: pytest.MonkeyPatch, *arguments: Any, columns: int = COLUMNS) -> list[str]:
    """The lines of the screen after a command that ends well; empty ones are left out."""
    with terminal(monkeypatch, columns) as screen:
        assert app([str(argument) for argument in arguments], standalone_mode=False) in (None, 0)
    return [line for line in screen.lines if line]


def test_every_bar_and_every_sentence_is_on_the_screen_once(
    tiny_checkpoint: Path, prose: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chatty: list[str]
) -> None:
    (tmp_path / "data.txt").write_text("\n\n".join(prose[:3]))
    monkeypatch.chdir(tmp_path)
    lines = in_terminal(monkeypatch, "init", tiny_checkpoint, "--data", "data.txt", "--out", "out", *SMALL)
    bars = {line.split("  ")[0]: line for line in lines if "━" in line}
    assert list(bars) == ["data", "model", "forward", "null spaces", "adapters"]
    assert sum("━" in line for line in lines) == len(bars)
    for line, count in zip(bars.values(), ("1/1", "1/1", "3/3", "14/14", "14/14"), strict=True):
        assert f" {count} " in line
    assert "tokens/s" in bars["forward"]
    for warning in chatty:
        assert lines.count(warning) == 1
    for other in ("unpacking", "downloading", "Loading weights", "Writing model shards", "it/s"):
        assert other not in "\n".join(lines)
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


def test_what_is_said_stands_between_the_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentences go to standard output and the bars to standard error, and both are one terminal. Lines end between words."""
    answer = "The capital of France is Paris, and this sentence is longer than eighty columns, so that it goes on in a next line."
    with terminal(monkeypatch) as screen, console.captured(), console.Bars() as bars:
        for stage, steps in (("model", 1), ("forward", 16), ("null spaces", 30)):
            for done in range(steps + 1):
                bars(stage, done, steps, 1000 * done)
                time.sleep(0.005)
        bars.say("30 layers have 16 inputs.")
        bars("saving", 0, 2, 0)
        time.sleep(0.15)  # longer than until the bar is drawn anew
        bars.say("The adapter trains little.")
        bars.say(answer)
    lines = [line for line in screen.lines if line]
    assert [line.split("  ")[0] for line in lines[:3]] == ["model", "forward", "null spaces"]
    assert lines[3] == "30 layers have 16 inputs."
    assert lines[4].startswith("saving ")
    assert lines[5] == "The adapter trains little."
    assert " ".join(lines[6:]) == answer
    assert len(lines[6]) <= COLUMNS


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
    assert [line.split()[0] for line in screen.lines if line][:4] == ["warning:", "data", "model", "error:"]
    assert sum("━" in line for line in screen.lines) == 2


def test_in_forty_columns_each_bar_is_a_line_with_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch, 40) as screen, console.captured(), console.Bars() as bars:
        for step in range(3):
            bars("forward", step, 100_000, 10**6 * step)
            time.sleep(0.12)
        warnings.warn("a sentence that is longer than the forty columns", stacklevel=1)
        bars("null spaces", 1, 100, 0)
    lines = [line for line in screen.lines if line]
    assert re.fullmatch(r"forward +2/100000 left [\d:]+", lines[-2])
    assert re.fullmatch(r"null spaces +1/100 left (\?|[\d:]+)", lines[-1])
    assert " ".join(lines[:-2]) == "warning: a sentence that is longer than the forty columns"
    assert max(map(len, lines)) <= 40


def test_the_time_left_is_known_from_the_first_batch_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a pass that goes on behind another run's batches, by the time of its own."""
    with terminal(monkeypatch) as screen, console.captured(), console.Bars() as bars:
        bars("forward", 50, 100, 0)
        time.sleep(0.5)
        bars("forward", 51, 100, 0)
    left = re.search(r"51/100 [\d:]+ left (\d+):(\d\d)", "\n".join(screen.lines))
    assert left is not None
    assert 60 * int(left[1]) + int(left[2]) >= 24  # 49 batches of half a second and more


def test_without_a_terminal_a_bar_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with console.captured(), console.Bars() as bars:
        for step in range(101):
            now[0] += 1.5
            bars("forward", step, 100, 0)
    printed = capsys.readouterr().err.splitlines()
    assert [re.search(r"(\d+)/100", line)[1] for line in printed] == ["40", "80", "100"]  # type: ignore[index]
    assert all(" left " in line for line in printed)


def test_without_colours_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(console, "stderr", Console(stderr=True))
    monkeypatch.setattr(console, "stdout", Console())
    with terminal(monkeypatch) as screen, console.captured(), console.Bars() as bars:
        bars("forward", 1, 1, 0)
        console.print_message("error", "a file is missing", "bold red")
        bars.say("12,345 tokens of 'text'")
        console.print_table([{"site": "a", "leak": "1e-3"}])
    assert not re.search(r"\x1b\[[0-9;]*(3|9)[0-7]m", screen.written)
    assert [line.split()[0] for line in screen.lines] == ["forward", "error:", "12,345", "site", "a"]


def test_other_libraries_bars_are_shown_with_verbose(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch) as screen, console.captured(verbose=True), console.Bars() as bars:
        bars("model", 0, 2, 0)
        for _ in tqdm(range(40), desc="unpacking tensors", mininterval=0):
            time.sleep(0.002)
        bars("model", 2, 2, 0)
    lines = [line for line in screen.lines if line]
    assert [line.split()[0] for line in lines] == ["unpacking", "model"]
    assert "40/40" in lines[0]


@pytest.mark.parametrize("arguments", [(), ("--all",)], ids=str)
def test_of_a_long_table_the_worst_rows_are_shown(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spaces = compute_null_spaces(tiny("llama"), random_batches(), rank=4, progress=False)
    spaces.save(tmp_path / "spaces")
    lines = in_terminal(monkeypatch, "inspect", tmp_path / "spaces", *arguments, columns=120)
    shown = [line.split()[0] for line in lines if line.startswith("model.")]
    names = [site.name for site in spaces.sites]
    assert len(names) == 12
    if arguments:
        assert shown == names
        assert lines[0].split()[0] == "site"
        return
    leaks = {name: spaces[name].leak for name in names}
    assert shown == [name for name in names if leaks[name] in sorted(leaks.values())[2:]]
    assert lines[0].startswith("12 sites, ")
    assert lines[0].endswith(f"{max(leaks.values()):.2e} (worst)")
    assert lines[1] == "The 10 with the largest leak (--all shows all):"
