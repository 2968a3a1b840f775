"""The page of the examples: it lists all of them, and its commands are ones that they take."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES, PAGE = ROOT / "examples", ROOT / "docs" / "examples.md"
FILES = sorted(path for path in EXAMPLES.iterdir() if path.is_file())
SCRIPTS = [path for path in FILES if path.suffix == ".py"]


def options(script: Path) -> dict[str, bool]:
    """The arguments of a script's command line → whether they are required; without running it."""
    calls = [node for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    added = [call for call in calls if ast.unparse(call.func) == "parser.add_argument"]
    required = [any(k.arg == "required" and ast.unparse(k.value) == "True" for k in call.keywords) for call in added]
    return {ast.literal_eval(call.args[0]): needed for call, needed in zip(added, required, strict=True)}


def commands(text: str) -> list[list[str]]:
    """The command lines of examples in a text, each on one line."""
    return [shlex.split(line) for line in re.findall(r"(?:^ {4}|`)(python examples/[^`\n]+)", text, flags=re.MULTILINE)]


def test_every_file_is_listed_and_every_listed_file_exists() -> None:
    named = set(re.findall(r"examples/([\w.]+\w)", PAGE.read_text(encoding="utf-8")))
    assert named == {path.name for path in FILES}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_commands_give_what_a_script_asks_for(script: Path) -> None:
    known = options(script)
    texts = PAGE.read_text(encoding="utf-8"), ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    own = [line[2:] for text in texts for line in commands(text) if line[1] == f"examples/{script.name}"]
    assert len(own) >= 2, "the page and the script itself show a command"
    for given in own:
        names = {each for each in given if each.startswith("--")}
        assert names <= known.keys()
        assert {name for name, needed in known.items() if needed} <= names


def test_examples_are_short() -> None:
    assert {path.name: len(path.read_text().splitlines()) for path in SCRIPTS if len(path.read_text().splitlines()) > 60} == {}
