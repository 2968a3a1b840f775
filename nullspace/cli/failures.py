"""What an exception means to somebody at the command line: a word, an exit code and a line."""

from __future__ import annotations

import dis
import os
from types import TracebackType
from typing import NamedTuple

# Their own `raise` statements are about what they were given: arguments, files, models.
LIBRARIES = ("nullspace", "transformers", "peft", "datasets", "huggingface_hub", "accelerate")
INPUT = (ValueError, TypeError, ImportError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError)
DEBUG = "NULLSPACE_DEBUG"
FAULT = f"a fault of nullspace, by the look of it: --debug, or {DEBUG}=1, shows where"


class Verdict(NamedTuple):
    """The first word of the line, the exit code, and the rest of the line."""

    word: str
    exit_code: int
    text: str


def judge(error: Exception) -> Verdict:
    """2 for input that was refused, 1 for a machine that failed, and 1 for an error that nobody raised on purpose."""
    text = str(error) or type(error).__name__
    if isinstance(error, INPUT) and (isinstance(error, (OSError, ImportError)) or _was_raised_on_purpose(error.__traceback__)):
        return Verdict("error", 2, text)
    if isinstance(error, (OSError, MemoryError)) or "out of memory" in text or _was_raised_on_purpose(error.__traceback__):
        return Verdict("failed", 1, text)
    return Verdict("failed", 1, f"{type(error).__name__}: {text} ({FAULT})")


def debugging(asked: bool) -> bool:
    """Whether tracebacks are to be shown."""
    return asked or os.environ.get(DEBUG, "0") not in ("", "0")


def _was_raised_on_purpose(trace: TracebackType | None) -> bool:
    """Whether a `raise` statement of one of the libraries was the origin, and not the interpreter, or code below them."""
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    package = str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
    return package in LIBRARIES and trace.tb_frame.f_code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]
