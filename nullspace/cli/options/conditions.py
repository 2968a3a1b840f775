"""Conditions of options: beside which other options they have an effect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nullspace.cli.options.declare import Condition, Values


def needed(words: str, holds: Callable[[Values], bool]) -> Condition:
    """The condition with these words."""
    return lambda values: None if holds(values) else words


def both(first: Condition, second: Condition) -> Condition:
    """The condition that holds where two do."""
    return lambda values: first(values) or second(values)


def data_of(values: Values) -> tuple[list[str], list[str]]:
    """The options of a command that name data, and what they name."""
    names = [name for name in ("data", "task_data", "keep_data") if name in values]
    given = [values[name] for name in names if values[name] is not None]
    named = [name for each in given for name in ([each] if isinstance(each, str) else each)]
    return [f"--{name.replace('_', '-')}" for name in names], named


def _has_data(values: Values) -> bool:
    names, given = data_of(values)
    return bool(given) or not names  # `plan` has no --data


def needs_data(what: str, holds: Callable[[Values], bool]) -> Condition:
    """The condition with these words, in which {} stands for the options that name data."""
    return lambda values: None if holds(values) else what.format(" or ".join(data_of(values)[0]) or "--data")


def method_of(values: Values) -> Any:
    """The entry of `--method`."""
    from nullspace.methods import METHODS

    return METHODS[values["method"]]


def _computes_spaces(values: Values) -> bool:
    return "method" not in values or ("spaces" in method_of(values).needs and values["spaces"] is None)


def of_methods(option: str) -> Condition:
    """The methods that have this option."""

    def missing(values: Values) -> str | None:
        from nullspace.methods import takers

        return None if option in method_of(values).options else " and ".join(map(repr, takers(option)))

    return missing


def keeps_covariances(values: Values) -> str | None:
    if values["covariances"] is not None or values.get("preserve") is not None:
        return None
    return "--covariances and --preserve" if "preserve" in values else "--covariances"


def prints_table(values: Values) -> str | None:
    """The condition of options for tables of sites."""
    if values["as_json"] or values.get("quiet"):
        return "tables, without --json and --quiet"
    is_table = "method" not in values or "spaces" in method_of(values).needs
    return None if is_table else "a table of null spaces: 'lora-null' and 'b-zero'"


RUN_ON_DATA = needs_data("a run on data ({})", _has_data)
BLOCKS = needed("a layerwise run on data (--strategy layerwise or auto)", lambda v: _has_data(v) and v["strategy"] != "resident")
WITH_MODEL = needed("a run with a model", lambda values: values.get("model", "") is not None)
NEW_SPACES = needed("null spaces that are being computed: 'lora-null' and 'b-zero', without --spaces", _computes_spaces)
WHOLE = needed("a run without --offload", lambda values: not values.get("offload"))
OTHER_BITS = needed("a run without --load-in-4bit", lambda values: not values["load_in_4bit"])
PLACED = needed("a run without --device-map", lambda values: values.get("device_map") is None)
