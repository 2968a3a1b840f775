"""The command line's options as a table: which values each takes, and what has to be given for it to have an effect.

`check` is asked before anything is loaded. An option that was given and has no effect is an error, not a silent nothing. Every
option of every command has an entry here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from nullspace.artifacts.shard_account import parse_shard
from nullspace.calibration.hidden_states import PLACES
from nullspace.calibration.stream import STRATEGIES
from nullspace.checks import FRACTION, NOT_NEGATIVE, POSITIVE, check_device, check_integer, check_real
from nullspace.methods import METHODS, takers
from nullspace.moments.covariance import PRECISIONS
from nullspace.planning.plan import PLACES as WEIGHT_PLACES
from nullspace.planning.units import parse_size

Values = Mapping[str, Any]
"""A command's arguments: parameter name → value."""

TEXT_ENDINGS = (".txt", ".md")
FILE_ENDINGS = (*TEXT_ENDINGS, ".jsonl", ".json", ".parquet", ".csv")


class Condition(NamedTuple):
    """What must be given for an option to have an effect; `words` complete "--option belongs to …"."""

    words: str
    holds: Callable[[Values], bool]


class Option(NamedTuple):
    """What an option takes: `check` raises for a bad value; without `needs` it always has an effect."""

    check: Callable[[str, Any], Any] | None = None
    needs: Condition | None = None


def check(command: str, values: Values, given: Collection[str]) -> None:
    """Raise for an option that has a bad value, or that was given and has no effect.

    Args:
        command: its name.
        values: of all its parameters, defaults too.
        given: the parameters that the user gave.

    Raises:
        TypeError, ValueError: naming the option.
    """
    table = COMMANDS[command]
    for name, value in values.items():
        checked = table[name].check
        if checked is not None and value is not None:
            checked(flag(name), value)
    for name in values:
        needed = table[name].needs
        if name in given and needed is not None and not needed.holds(values):
            raise ValueError(f"{flag(name)} belongs to {needed.words}, and has no effect here: leave it out")


def flag(name: str) -> str:
    """A parameter's name as it is typed: `batch_size` → `--batch-size`."""
    return f"--{_FLAGS.get(name, name).replace('_', '-')}"


_FLAGS = {"as_json": "json"}


def parse_targets(text: str) -> str | list[str]:
    """The `--targets` option as `find_targets` takes it."""
    if text == "all-linear":
        return text
    if text.startswith("re:"):
        return text.removeprefix("re:")
    return [name.strip() for name in text.split(",") if name.strip()]


def parse_exclude(text: str | None) -> str | list[str] | None:
    """The `--exclude` option as `find_targets` takes it."""
    if text is None:
        return None
    if (Path(text) / "adapter_config.json").is_file():
        raise ValueError(f"--exclude names layers, and {text} is an adapter: to keep out of the rows of its A, use --avoid {text}")
    return parse_targets(text)


def parse_weights(text: str) -> list[float]:
    """The `--weights` option of `merge`: "2,1" → [2.0, 1.0]."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--weights must be numbers with commas between them, not {text!r}") from None
    for number in found:
        check_real("--weights", number)
    return found


def parse_adapters(options: list[str]) -> dict[str, list[Path]]:
    """The `--adapter` options of `report`: name → directories, the initial one first."""
    found: dict[str, list[Path]] = {}
    for option in options:
        name, _, places = option.partition("=")
        directories = [part.strip() for part in places.split(",")]
        if not name.strip() or not all(directories):
            raise ValueError(f"--adapter must be NAME=INITIAL or NAME=INITIAL,TRAINED, not {option!r}")
        if name.strip() in found:
            raise ValueError(f"--adapter: there are two of the name {name.strip()!r}")
        found[name.strip()] = [Path(directory) for directory in directories]
    return found


def _one_of(*choices: str) -> Callable[[str, str], None]:
    def checked(name: str, value: str) -> None:
        if value not in choices:
            raise ValueError(f"{name} must be {', '.join(choices[:-1])} or {choices[-1]}, not {value!r}")

    return checked


def _real(allowed: Any) -> Callable[[str, float], Any]:
    return lambda name, value: check_real(name, value, allowed)


def _parsed(parse: Callable[[Any], Any]) -> Callable[[str, Any], None]:
    """The check of an option that `parse` raises for."""

    def checked(name: str, value: Any) -> None:
        try:
            parse(value)
        except ValueError as error:
            raise ValueError(str(error) if name in str(error) else f"{name}: {error}") from None

    return checked


def _compile_targets(text: str) -> None:
    _compile_names(text, parse_targets(text))


def _compile_exclude(text: str) -> None:
    _compile_names(text, parse_exclude(text))


def _compile_names(text: str, targets: str | list[str] | None) -> None:
    if not targets:
        raise ValueError(f"no layer is named in {text!r}")
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as error:
            raise ValueError(f"{targets!r} is not a regular expression: {error}") from None


def _ending(values: Values) -> str:
    return Path(values.get("data") or "").suffix.lower()


def _check_file(name: str, data: str) -> None:
    path = Path(data)
    if path.suffix.lower() in FILE_ENDINGS and not path.is_file():
        raise FileNotFoundError(f"{name}: {data} is not a file")


def _computes_spaces(values: Values) -> bool:
    """Whether `init` computes null spaces."""
    return "spaces" in METHODS[values["method"]].needs and values["spaces"] is None


def _takes(option: str) -> Condition:
    return Condition(" and ".join(map(repr, takers(option))), lambda values: option in METHODS[values["method"]].options)


DATA = Condition("a run on data (--data)", lambda values: values.get("data") is not None)
ROWS = Condition(
    "--data with fields (JSON, CSV, Parquet, a hub data set)", lambda v: DATA.holds(v) and _ending(v) not in TEXT_ENDINGS
)
HUB = Condition("--data that is a hub data set, not a file", lambda v: DATA.holds(v) and _ending(v) not in FILE_ENDINGS)
BY_BLOCK = Condition(
    "a layerwise run on data (--strategy layerwise or auto)", lambda v: DATA.holds(v) and v["strategy"] != "resident"
)
MODEL = Condition("a run with a model", lambda values: values["model"] is not None)
SPACES = Condition("null spaces that are being computed: 'lora-null' and 'b-zero', without --spaces", _computes_spaces)
KEPT = Condition("--covariances", lambda v: v["covariances"] is not None or v.get("preserve") is not None)
PRESERVE = Condition("'sc-lora'", lambda values: "preserve" in METHODS[values["method"]].needs)
LAYERS = Condition("--covariances, --spaces or --adapter", lambda v: any(v[name] for name in ("covariances", "spaces", "adapter")))
GPU = Condition("a plan for a GPU", lambda values: values["device"] != "cpu")

ALWAYS = Option()
COUNT = Option(check_integer)
DTYPES = ("auto", "float32", "bfloat16", "float16")
KEEP = Option(_one_of("float64", "float32"))
RESULT = {"out": ALWAYS, "overwrite": ALWAYS}
SHOWN = {"as_json": ALWAYS, "quiet": ALWAYS}
# How a model is loaded, and how it is run on data.
LOADING = {
    "targets": Option(_parsed(_compile_targets)),
    "exclude": Option(_parsed(_compile_exclude)),
    "dtype": Option(_one_of(*DTYPES)),
    "device": Option(_parsed(check_device)),
    "offload": ALWAYS,
}
RUN = {
    "data": Option(_check_file),
    "field": Option(needs=ROWS),
    "split": Option(needs=HUB),
    "samples": Option(check_integer, DATA),
    "length": Option(check_integer, DATA),
    "batch_size": Option(check_integer, DATA),
    "precision": Option(_one_of(*PRECISIONS), DATA),
    "strategy": Option(_one_of(*STRATEGIES), DATA),
    "hidden_states": Option(_one_of(*PLACES), BY_BLOCK),
    "fresh": Option(needs=DATA),
    "timeout": Option(_real(POSITIVE), DATA),
}

COMMANDS: Mapping[str, Mapping[str, Option]] = {
    "init": {
        "model": ALWAYS,
        **RESULT,
        **RUN,
        **LOADING,
        "spaces": ALWAYS,
        "covariances": ALWAYS,
        "partial": Option(needs=KEPT._replace(words="--covariances and --preserve")),
        "rank": COUNT,
        "alpha": Option(_real(POSITIVE)),
        "use_rslora": ALWAYS,
        "method": Option(_one_of(*METHODS)),
        "sigma_scale": Option(_real(POSITIVE), _takes("sigma_scale")),
        "beta": Option(_real(FRACTION), _takes("beta")),
        "damping": Option(_real(NOT_NEGATIVE), _takes("damping")),
        "preserve": Option(needs=PRESERVE),
        "avoid": Option(needs=SPACES),
        "spectrum": Option(needs=SPACES),
        **SHOWN,
    },
    "compute": {
        "model": ALWAYS,
        **RESULT,
        **RUN,
        **{name: option._replace(needs=MODEL) for name, option in LOADING.items()},
        "covariances": ALWAYS,
        "partial": Option(needs=KEPT),
        "rank": COUNT,
        "avoid": ALWAYS,
        "spectrum": ALWAYS,
        **SHOWN,
    },
    "covariances": {"model": ALWAYS, **RESULT, **RUN, **LOADING, "keep": KEEP, "shard": Option(_parsed(parse_shard)), **SHOWN},
    "merge": {
        "runs": ALWAYS,
        **RESULT,
        "weights": Option(_parsed(parse_weights)),
        "normalise": ALWAYS,
        "partial": ALWAYS,
        "keep": KEEP,
        **SHOWN,
    },
    "inspect": {"directory": ALWAYS, "base": ALWAYS, "as_json": ALWAYS},
    "report": {
        **RESULT,
        "covariances": ALWAYS,
        "spaces": ALWAYS,
        "model": Option(needs=LAYERS),
        "adapter": Option(_parsed(parse_adapters)),
        "study": ALWAYS,
        "offload": Option(needs=Condition("--model", lambda values: values["model"] is not None)),
        **SHOWN,
    },
    "export": {"trained": ALWAYS, "initial": ALWAYS, "base": ALWAYS, **RESULT, **SHOWN},
    "plan": {
        "model": ALWAYS,
        "samples": COUNT,
        "length": COUNT,
        "batch_size": COUNT,
        "rank": COUNT,
        "targets": LOADING["targets"],
        "exclude": LOADING["exclude"],
        "dtype": LOADING["dtype"],
        "device": Option(_one_of("cuda", "cpu")),
        "weights": Option(_one_of(*WEIGHT_PLACES)),
        "device_memory": Option(_parsed(parse_size), GPU),
        "host_memory": Option(_parsed(parse_size)),
        "as_json": ALWAYS,
    },
    "demo": {**RESULT, "rank": COUNT},
}
