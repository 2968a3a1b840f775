"""From an exception to one line on standard error and an exit code."""

from __future__ import annotations

import contextlib
import dis
import os
import sys
import time
import traceback
from collections.abc import Iterator
from types import TracebackType
from typing import Any, NamedTuple

import typer

from nullspace.cli import console, together
from nullspace.cli.interrupts import Terminated

# Their own `raise` statements are about what they were given: arguments, files, models.
LIBRARIES = ("nullspace", "transformers", "peft", "datasets", "huggingface_hub", "accelerate")
INPUT = (ValueError, TypeError, ImportError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError)
DEBUG = "NULLSPACE_DEBUG"
FAULT = f"a fault of nullspace, by the look of it: --debug, or {DEBUG}=1, shows where"


class Unmet(typer.Exit):
    """A check that was made, and whose answer is no: exit code 1, after the document of `--json` is printed.

    Args:
        document: of the command.
    """

    def __init__(self, document: dict[str, Any] | None) -> None:
        super().__init__(1)
        self.document = document


class Failure(NamedTuple):
    """The first word of the line, the exit code, and the rest of the line."""

    word: str
    exit_code: int
    text: str


@contextlib.contextmanager
def reported(debug: bool) -> Iterator[None]:
    """Context manager: print what is raised inside as one line, and raise `typer.Exit` with its code.

    The arguments of `KeyboardInterrupt` and `Terminated` are printed too. With `debug`, or `NULLSPACE_DEBUG` set, the traceback of
    an error comes first.
    """
    try:
        yield
    except (KeyboardInterrupt, Terminated) as end:
        how, code = (f"ended by {end.name}", end.exit_code) if isinstance(end, Terminated) else ("interrupted", 130)
        console.stderr.print("; ".join([how, *map(str, end.args)]), soft_wrap=True)
        raise typer.Exit(code) from None
    except typer.Exit:
        raise
    except Exception as error:
        if debug or os.environ.get(DEBUG, "0") not in ("", "0"):
            traceback.print_exception(error, file=sys.stderr)
        failure = classify(error)
        _print(error, failure)
        raise typer.Exit(failure.exit_code) from None


def classify(error: Exception) -> Failure:
    """2 for input that was refused, 1 for a machine that failed, and 1 for an error that no library raised on purpose."""
    text = str(error) or type(error).__name__
    if isinstance(error, INPUT) and (isinstance(error, (OSError, ImportError)) or _was_raised_on_purpose(error.__traceback__)):
        return Failure("error", 2, text)
    if isinstance(error, (OSError, MemoryError)) or "out of memory" in text or _was_raised_on_purpose(error.__traceback__):
        return Failure("failed", 1, text)
    return Failure("failed", 1, f"{type(error).__name__}: {text} ({FAULT})")


def _was_raised_on_purpose(trace: TracebackType | None) -> bool:
    """Whether a `raise` statement of one of the libraries was the origin, and not the interpreter, or code below them."""
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    package = str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
    return package in LIBRARIES and trace.tb_frame.f_code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _print(error: BaseException, failure: Failure) -> None:
    """Print an error; of several processes that have it, the first one does."""
    if not together.is_first():
        # By then the first one has printed its own error, if it has one: the process that exits first ends the others.
        time.sleep(2)
        if _is_shared(error) and not getattr(error, "reports", False):
            return
        console.stderr.quiet = False
    console.print_message(failure.word, failure.text, "bold red")


def _is_shared(error: BaseException) -> bool:
    """Whether all processes have this error."""
    if "torch" not in sys.modules:
        return False
    from nullspace.distributed.errors import was_shared

    return was_shared(error)
