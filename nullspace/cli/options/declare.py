"""The declaration of an option, and commands made of them: `signature` for typer, `check` before anything is loaded, `gather`."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, NamedTuple

import typer

from nullspace.cli.options.values import Choices
from nullspace.errors import InputError

Values = Mapping[str, Any]
"""A command's arguments: parameter name → value."""

Condition = Callable[[Values], str | None]
"""None if an option has an effect beside these values; otherwise the words that complete "--option belongs to …"."""

Command = Callable[..., dict[str, Any] | None]
"""A command's function. It returns the document that `--json` prints."""

REQUIRED: Any = inspect.Parameter.empty


class Option(NamedTuple):
    """One option.

    Attributes:
        help: its help text.
        default: `REQUIRED` if it must be given.
        check: called with the option as it is typed and the value; raises for a bad value.
        needs: when it has an effect; None for always.
        typed: how it is typed, where that is not `--` and the parameter's name; `()` for a positional argument.
        least: the smallest value, which the help shows.
        panel: title under which the help shows it; that of its group by default.
    """

    help: str
    default: Any = REQUIRED
    check: Callable[[str, Any], Any] | None = None
    needs: Condition | None = None
    typed: tuple[str, ...] | None = None
    least: float | None = None
    panel: str | None = None

    def flags(self, name: str) -> tuple[str, ...]:
        """How a parameter of this name is typed."""
        return (f"--{name.replace('_', '-')}",) if self.typed is None else self.typed

    @property
    def text(self) -> str:
        """Its help text, with its choices."""
        choices = self.check if isinstance(self.check, Choices) else ()
        return f"{self.help} One of: {', '.join(choices)}." if choices else self.help


def option(*args: Any, **kwargs: Any) -> Any:
    """An `Option`, for type checkers a value of its parameter's type."""
    return Option(*args, **kwargs)


@functools.cache
def declared(command: Command) -> Mapping[str, tuple[Any, Option]]:
    """The options of a command and of its groups: parameter name → type and declaration."""
    options: dict[str, tuple[Any, Option]] = {}
    kinds = typing.get_type_hints(command)
    for name, parameter in inspect.signature(command).parameters.items():
        if is_dataclass(kinds[name]):
            inner = typing.get_type_hints(kinds[name])
            panel = getattr(kinds[name], "PANEL", None)
            for field in fields(kinds[name]):
                own = typing.cast(Option, field.default)
                options[field.name] = inner[field.name], own._replace(panel=own.panel or panel)
        else:
            options[name] = kinds[name], parameter.default
    return options


def signature(command: Command, *more: inspect.Parameter) -> inspect.Signature:
    """What typer reads of a command: a keyword parameter for each option, and `more`."""
    parameters = []
    for name, (kind, option) in declared(command).items():
        flags, described = option.flags(name), typer.Argument(help=option.help, rich_help_panel=option.panel)
        if flags:
            if kind == bool | None:  # typer makes no --no-… of names that are given
                flags = tuple(f"{flag}/--no-{flag.removeprefix('--')}" for flag in flags)
            described = typer.Option(*flags, help=option.text, min=option.least, rich_help_panel=option.panel)
        annotation: Any = Annotated[kind, described]
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=option.default))
    return inspect.Signature([*parameters, *more])


def gather(command: Command, values: Values) -> dict[str, Any]:
    """The command's own arguments, its groups included, from the values of all options."""
    arguments = {}
    for name, kind in typing.get_type_hints(command).items():
        if isinstance(kind, type) and is_dataclass(kind):
            arguments[name] = kind(**{field.name: values[field.name] for field in fields(kind)})
        elif name != "return":
            arguments[name] = values[name]
    return arguments


def defaults(group: Any) -> dict[str, Any]:
    """The defaults of a group's options."""
    return {field.name: typing.cast(Option, field.default).default for field in fields(group)}


def check(command: Command, values: Values, given: Collection[str]) -> None:
    """Raise for an option that has a bad value, or that was given and has no effect.

    Args:
        command: the function.
        values: of all its options, defaults too.
        given: the options that the user gave.

    Raises:
        TypeError, ValueError: naming the option.
    """
    options = {name: option for name, (_, option) in declared(command).items()}
    for name, option in options.items():
        if option.check is not None and values[name] is not None:
            option.check(option.flags(name)[0], values[name])
    for name, option in options.items():
        missing = option.needs(values) if name in given and option.needs is not None else None
        if missing is not None:
            raise InputError(f"{option.flags(name)[0]} belongs to {missing}, and has no effect here: leave it out")
