"""The values of options: how they are read, and the checks of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nullspace.checks import check_one_of, check_real
from nullspace.errors import InputError

WORDS = ("all-linear", "attention", "mlp", "experts")


def parse_targets(text: str) -> str | list[str]:
    """The `--targets` option as `find_targets` takes it."""
    if text in WORDS:
        return text
    if text.startswith("re:"):
        return text.removeprefix("re:")
    return [name.strip() for name in text.split(",") if name.strip()]


def parse_exclude(text: str | None) -> str | list[str] | None:
    """The `--exclude` option as `find_targets` takes it."""
    if text is None:
        return None
    if (Path(text) / "adapter_config.json").is_file():
        raise InputError(f"--exclude names layers, and {text} is an adapter: to keep out of the rows of its A, use --avoid {text}")
    return parse_targets(text)


class Choices(tuple[str, ...]):
    """The check of an option with these values, which its help shows."""

    def __call__(self, name: str, value: str) -> None:
        check_one_of(name, value, self)


def one_of(*choices: str) -> Choices:
    """The check of an option with these values."""
    return Choices(choices)


def parsed(parse: Callable[[Any], Any]) -> Callable[[str, Any], None]:
    """The check of an option that `parse` raises `ValueError` for."""

    def checked(name: str, value: Any) -> None:
        try:
            parse(value)
        except ValueError as error:
            raise InputError(str(error) if name in str(error) else f"{name}: {error}") from None

    return checked


def compiles(parse: Callable[[str], str | list[str] | None]) -> Callable[[str], None]:
    """The check of what `parse` makes names of layers or a regular expression of."""

    def compiled(text: str) -> None:
        layers = parse(text)
        if not layers:
            raise InputError(f"no layer is named in {text!r}")
        if isinstance(layers, str):
            try:
                re.compile(layers)
            except re.error as error:
                raise InputError(f"{layers!r} is not a regular expression: {error}") from None

    return compiled


def parse_weights(text: str) -> list[float]:
    """The `--weights` options: "2,1" → [2.0, 1.0]."""
    try:
        factors = [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--weights must be numbers with commas between them, not {text!r}") from None
    return [check_real("--weights", factor) for factor in factors]
