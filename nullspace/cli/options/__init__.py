"""The options of the command line: one declaration each, with type, default, help, check and condition.

A command is a function of keyword parameters: options (`name: type = option(…)`), and groups of options (dataclasses of such
fields, whose `PANEL` is their title in the help). `signature` is what typer reads of it, `check` refuses bad values and options
without effect before anything is loaded, and `gather` fills the groups. Values that are those of another package are written here
again, and a condition imports when a command runs: these packages import torch, which the help is not to wait for.
"""

from nullspace.cli.options.common import (
    ALL_ROWS,
    ATTN,
    AVOID,
    COVARIANCES,
    DEVICE_MAP,
    DTYPE,
    EXCLUDE,
    EXPERTS,
    JSON,
    KEEP,
    LOAD_IN_4BIT,
    LOAD_IN_8BIT,
    MODEL,
    OFFLOAD,
    OVERWRITE,
    PARTIAL,
    PRECISION,
    QUIET,
    RANK,
    REVISION,
    TARGETS,
    TRUST_REMOTE_CODE,
    Layers,
    Loading,
    Running,
    RunningForSpaces,
    Shown,
    ShownTable,
)
from nullspace.cli.options.conditions import PLACED, RUN_ON_DATA, both, data_of, method_of, needed, needs_data, of_methods
from nullspace.cli.options.declare import (
    REQUIRED,
    Command,
    Condition,
    Values,
    check,
    declared,
    defaults,
    gather,
    option,
    signature,
)
from nullspace.cli.options.values import one_of, parse_exclude, parse_targets, parse_weights, parsed

__all__ = [
    "ALL_ROWS", "ATTN", "AVOID", "COVARIANCES", "DEVICE_MAP", "DTYPE", "EXCLUDE", "EXPERTS", "JSON", "KEEP", "LOAD_IN_4BIT",
    "LOAD_IN_8BIT", "MODEL", "OFFLOAD", "OVERWRITE", "PARTIAL", "PLACED", "PRECISION", "QUIET", "RANK", "REQUIRED", "REVISION",
    "RUN_ON_DATA", "TARGETS", "TRUST_REMOTE_CODE", "Command", "Condition", "Layers", "Loading", "Running", "RunningForSpaces",
    "Shown", "ShownTable", "Values", "both", "check", "data_of", "declared", "defaults", "gather", "method_of", "needed",
    "needs_data", "of_methods", "one_of", "option", "parse_exclude", "parse_targets", "parse_weights", "parsed", "signature",
]  # fmt: skip
