"""The command line: `nullspace init | compute | covariances | merge | inspect | report | filter | combine | verify | export | …`.

What a person reads goes to standard output as tables, or with `--json` as one JSON document; progress and warnings go to standard
error. Exit codes: 0 done, 1 the machine failed (disk, memory) or nullspace did, or `verify` found a budget broken, 2 the input was
wrong, 130 interrupted, 143 ended by SIGTERM. An error is one line; `--debug`, of every command, shows its traceback too, and
`--verbose` what the logger `nullspace` says of the steps.

Under `torchrun`, `init`, `compute` and `covariances` calibrate together; the first process prints and writes what is one thing.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import sys
from collections.abc import Callable
from typing import Annotated, Any

import nullspace
from nullspace.checks import missing_package

try:
    import typer

    from nullspace.cli import after, calibrate, console, demo, failures, init, interrupts, keep, options, plan, report, together
except ImportError as error:
    raise missing_package("the command line", "cli", error) from error

__all__ = ["COMMANDS", "app", "main"]

COMMANDS: tuple[options.Command, ...] = (
    init.init,
    calibrate.compute,
    calibrate.covariances,
    keep.merge,
    keep.inspect,
    report.report,
    after.filter,
    after.combine,
    after.verify,
    keep.export,
    plan.plan,
    demo.demo,
)
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show what happens, step by step, and other libraries' bars.")]
Debug = Annotated[bool, typer.Option("--debug", help=f"Show the traceback of an error; {failures.DEBUG}=1 does the same.")]

app = typer.Typer(
    name="nullspace",
    help="LoRA adapters in the null space of a model's activations: fine-tuning that forgets less.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the `nullspace` command."""
    app()


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"nullspace {nullspace.__version__}")
        raise typer.Exit


@app.callback()
def _common(
    context: typer.Context,
    debug: Debug = False,
    verbose: Verbose = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version),
    ] = False,
) -> None:
    context.obj = {"debug": debug, "verbose": verbose}


def _as_typer_command(command: options.Command) -> Callable[..., None]:
    """`command` with `--debug` and `--verbose`: checks the options, runs it, and turns errors into one line and an exit code.

    Under `torchrun`, the process joins the others first, and only the first one prints.
    """

    @functools.wraps(command)
    def run(context: typer.Context, debug: bool, verbose: bool, **values: Any) -> None:
        console.stdout.quiet = console.stderr.quiet = not together.is_first()
        common = context.obj or {}
        reported = functools.partial(failures.reported, debug or common.get("debug", False))
        with console.captured(verbose or common.get("verbose", False)), interrupts.signals_as_exceptions():
            with reported():
                options.check(command, values, [name for name in values if _was_given(context, name)])
            with together.joined(values.get("timeout")) as takes_part, reported():
                if not takes_part:
                    return
                # What other libraries print (DeepSpeed's log, on import) is no part of the document.
                with contextlib.redirect_stdout(sys.stderr) if values.get("as_json") else contextlib.nullcontext():
                    document, unmet = _run(command, values)
                if document is not None:
                    typer.echo(json.dumps(document, indent=1, ensure_ascii=False))
                if unmet is not None:
                    raise unmet

    keyword = inspect.Parameter.KEYWORD_ONLY
    signature = options.signature(
        command,
        inspect.Parameter("context", keyword, annotation=typer.Context),
        inspect.Parameter("debug", keyword, annotation=Debug, default=False),
        inspect.Parameter("verbose", keyword, annotation=Verbose, default=False),
    )
    run.__signature__ = signature  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in signature.parameters.values()}
    return run


def _run(command: options.Command, values: dict[str, Any]) -> tuple[dict[str, Any] | None, failures.Unmet | None]:
    """The command's document, and what it raised if a check was not met."""
    try:
        return command(**options.gather(command, values)), None
    except failures.Unmet as unmet:
        return unmet.document, unmet


def _was_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and not source.name.startswith("DEFAULT")


for each in COMMANDS:
    app.command()(_as_typer_command(each))
