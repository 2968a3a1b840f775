"""The options of the command line: one declaration each, with type, default, help, check and condition.

A command is a function of keyword parameters: options (`name: type = option(…)`), and groups of options (dataclasses of such
fields). `signature` is what typer reads of it, `check` refuses bad values and options without effect before anything is loaded, and
`gather` fills the groups. What a check or a condition needs of other packages is imported when a command runs: these import torch.
"""

from __future__ import annotations

import functools
import inspect
import re
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from nullspace.checks import check_device, check_integer, check_one_of, check_real
from nullspace.errors import InputError

if TYPE_CHECKING:
    from nullspace.integrations.transformers import ModelSource

Values = Mapping[str, Any]
"""A command's arguments: parameter name → value."""

Condition = Callable[[Values], str | None]
"""None if an option has an effect beside these values; otherwise the words that complete "--option belongs to …"."""

Command = Callable[..., dict[str, Any] | None]
"""A command's function. It returns the document that `--json` prints."""

REQUIRED: Any = inspect.Parameter.empty
WORDS = ("all-linear", "attention", "mlp", "experts")
DTYPES = ("auto", "float32", "bfloat16", "float16")


class Option(NamedTuple):
    """One option.

    Attributes:
        help: its help text.
        default: `REQUIRED` if it must be given.
        check: called with the option as it is typed and the value; raises for a bad value.
        needs: when it has an effect; None for always.
        typed: how it is typed, where that is not `--` and the parameter's name; `()` for a positional argument.
        least: the smallest value, which the help shows.
    """

    help: str
    default: Any = REQUIRED
    check: Callable[[str, Any], Any] | None = None
    needs: Condition | None = None
    typed: tuple[str, ...] | None = None
    least: float | None = None

    def flags(self, name: str) -> tuple[str, ...]:
        """How a parameter of this name is typed."""
        return (f"--{name.replace('_', '-')}",) if self.typed is None else self.typed


def option(*args: Any, **kwargs: Any) -> Any:
    """An `Option`, for type checkers a value of its parameter's type."""
    return Option(*args, **kwargs)


# ---- from functions to commands


@functools.cache
def declared(command: Command) -> Mapping[str, tuple[Any, Option]]:
    """The options of a command and of its groups: parameter name → type and declaration."""
    options: dict[str, tuple[Any, Option]] = {}
    kinds = typing.get_type_hints(command)
    for name, parameter in inspect.signature(command).parameters.items():
        if is_dataclass(kinds[name]):
            inner = typing.get_type_hints(kinds[name])
            options |= {field.name: (inner[field.name], typing.cast(Option, field.default)) for field in fields(kinds[name])}
        else:
            options[name] = kinds[name], parameter.default
    return options


def signature(command: Command, *more: inspect.Parameter) -> inspect.Signature:
    """What typer reads of a command: a keyword parameter for each option, and `more`."""
    parameters = []
    for name, (kind, option) in declared(command).items():
        flags, described = option.flags(name), typer.Argument(help=option.help)
        if flags:
            if kind == bool | None:  # typer makes no --no-… of names that are given
                flags = tuple(f"{flag}/--no-{flag.removeprefix('--')}" for flag in flags)
            described = typer.Option(*flags, help=option.help, min=option.least)
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


# ---- values


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


def one_of(*choices: str) -> Callable[[str, str], None]:
    """The check of an option with these values."""
    return lambda name, value: check_one_of(name, value, choices)


def parsed(parse: Callable[[Any], Any]) -> Callable[[str, Any], None]:
    """The check of an option that `parse` raises `ValueError` for."""

    def checked(name: str, value: Any) -> None:
        try:
            parse(value)
        except ValueError as error:
            raise InputError(str(error) if name in str(error) else f"{name}: {error}") from None

    return checked


def check_choice(name: str, value: str) -> None:
    """The check of options whose values are those of another package, which imports torch."""
    from nullspace.artifacts.residual import RESIDUALS
    from nullspace.calibration.hidden_states import PLACES
    from nullspace.calibration.run import STRATEGIES
    from nullspace.methods import METHODS
    from nullspace.moments.precision import PRECISIONS
    from nullspace.planning.plan import EXPERTS as WAYS

    choices = {
        "--experts": WAYS,
        "--hidden-states": PLACES,
        "--method": METHODS,
        "--precision": PRECISIONS,
        "--residual": RESIDUALS,
        "--strategy": STRATEGIES,
    }
    check_one_of(name, value, tuple(choices[name]))


def _compile(parse: Callable[[str], str | list[str] | None]) -> Callable[[str], None]:
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


# ---- conditions


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


def _kept(values: Values) -> str | None:
    if values["covariances"] is not None or values.get("preserve") is not None:
        return None
    return "--covariances and --preserve" if "preserve" in values else "--covariances"


RUN_ON_DATA = needs_data("a run on data ({})", _has_data)
_BLOCKS = needed("a layerwise run on data (--strategy layerwise or auto)", lambda v: _has_data(v) and v["strategy"] != "resident")
_MODEL = needed("a run with a model", lambda values: values.get("model", "") is not None)
_SPACES = needed("null spaces that are being computed: 'lora-null' and 'b-zero', without --spaces", _computes_spaces)
_WHOLE = needed("a run without --offload", lambda values: not values.get("offload"))
_OTHER_BITS = needed("a run without --load-in-4bit", lambda values: not values["load_in_4bit"])

# ---- options of several commands

MODEL = option("Hub name, folder, or .gguf file.", typed=())
COVARIANCES = option("Use what `nullspace covariances` or `merge` wrote instead of --data.", None)
PARTIAL = option("Take covariances though shards of their data are missing.", False, needs=_kept)
RANK = option("Directions a layer: the adapter's rank.", 128, check_integer)
AVOID = option("Directory of an earlier adapter whose A the new ones are not to read; may be repeated.", None, needs=_SPACES)
TARGETS = option(
    "'all-linear', 'attention', 'mlp', 'experts', name endings ('q_proj,v_proj'), or a regular expression ('re:.*_proj').",
    "all-linear",
    parsed(_compile(parse_targets)),
    _MODEL,
)
EXCLUDE = option("Layers to take away from --targets, in the same form.", None, parsed(_compile(parse_exclude)), _MODEL)
PRECISION = option(
    "'auto', 'mixed' for float32 chains throughout, 'fp64' for float64 products, 'qr' for no products (slow).",
    "auto",
    check_choice,
    RUN_ON_DATA,
)
EXPERTS = option(
    "Routed experts: a sum for 'each', one for all of a layer ('pooled'), or 'auto', by tokens, memory and time.",
    "auto",
    check_choice,
    RUN_ON_DATA,
)
DTYPE = option("Of the model's weights: " + ", ".join(DTYPES) + ".", "auto", one_of(*DTYPES), _MODEL)
PLACED = needed("a run without --device-map", lambda values: values.get("device_map") is None)
OFFLOAD = option("Leave the weights on the disk and read them block by block.", False, needs=both(_MODEL, PLACED))
LOAD_IN_4BIT = option("Quantise the model while it is loaded: bitsandbytes' NF4.", False, needs=both(_MODEL, _WHOLE))
LOAD_IN_8BIT = option("The same in 8 bits (LLM.int8).", False, needs=both(_MODEL, both(_WHOLE, _OTHER_BITS)))
DEVICE_MAP = option("Let accelerate place the weights: 'auto', 'balanced', 'sequential', ….", None, needs=_MODEL)
REVISION = option("Branch, tag or commit of a hub model.", None, needs=_MODEL)
TRUST_REMOTE_CODE = option("Run the Python code that comes with the checkpoint.", False, needs=_MODEL)
ATTN = option("Attention: 'eager', 'sdpa', 'flash_attention_2', …; transformers' choice by default.", None, needs=_MODEL)
KEEP = option("float64, or float32 for half the space and 7 digits.", "float64", one_of("float64", "float32"))
OVERWRITE = option("Replace an earlier result of ours.", False)
JSON = option("One JSON document on standard output instead of tables.", False, typed=("--json",))
QUIET = option("No progress bars and no tables.", False, typed=("--quiet", "-q"))


@dataclass(frozen=True)
class Loading:
    """Which files a model is loaded from. Gated models need a token in the environment (HF_TOKEN)."""

    revision: str | None = REVISION
    trust_remote_code: bool = TRUST_REMOTE_CODE

    def of(self, name: str) -> ModelSource:
        """A model of this name."""
        from nullspace.integrations.transformers import ModelSource

        return ModelSource(name, self.revision, self.trust_remote_code)

    def over(self, source: ModelSource) -> ModelSource:
        """The model that a record names, unless other options are given."""
        return replace(source, revision=self.revision or source.revision, trust_remote_code=self.trust_remote_code)


@dataclass(frozen=True)
class Layers:
    """Which layers' inputs are summed, and how exactly."""

    targets: str = TARGETS
    exclude: str | None = EXCLUDE
    precision: str = PRECISION
    experts: str = EXPERTS


@dataclass(frozen=True)
class Running:
    """How the model is loaded and run."""

    dtype: str = DTYPE
    device: str | None = option(
        "cuda, cuda:1, cpu, …; CUDA if there is one by default.", None, parsed(check_device), both(_MODEL, PLACED)
    )
    device_map: str | None = DEVICE_MAP
    attn: str | None = ATTN
    offload: bool = OFFLOAD
    load_in_4bit: bool = LOAD_IN_4BIT
    load_in_8bit: bool = LOAD_IN_8BIT
    strategy: str = option(
        "'resident': all layers' sums at once; 'layerwise': block by block; 'auto': what the memory asks for.",
        "auto",
        check_choice,
        RUN_ON_DATA,
    )
    hidden_states: str = option(
        "Where a layerwise run keeps what lies between two blocks: device, host, disk, or auto.", "auto", check_choice, _BLOCKS
    )
    fresh: bool = option("Begin anew, whatever an interrupted run left in OUT.checkpoint.", False, needs=RUN_ON_DATA)
    timeout: float = option(
        "Under torchrun: minutes that one process waits for the others.", 30.0, check_real, RUN_ON_DATA, least=0.05
    )

    def of_model(self) -> dict[str, Any]:
        """Keyword arguments of `load_model`."""
        own = {name: getattr(self, name) for name in ("dtype", "device", "offload", "device_map", "load_in_4bit", "load_in_8bit")}
        return {**own, "attn_implementation": self.attn}


@dataclass(frozen=True)
class RunningForSpaces(Running):
    """The same, for null spaces."""

    spectrum: bool = option("Report effective ranks too.", False, needs=_SPACES)


@dataclass(frozen=True)
class Shown:
    """What happens to an earlier result, and what is printed."""

    overwrite: bool = OVERWRITE
    as_json: bool = JSON
    quiet: bool = QUIET
