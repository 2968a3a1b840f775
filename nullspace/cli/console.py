"""The terminal: results on standard output, bars, warnings and errors on standard error, and none of them over another.

Bars are redrawn in place, so a line that is printed beside them and not through them leaves copies of them on the screen. Inside
`captured` everything that other libraries write to standard error goes through the console that draws the bars; what goes to
standard output, which may be the same terminal, waits until they have been closed (`Bars.say`).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.file_proxy import FileProxy
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tqdm.std import tqdm

stdout, stderr = Console(), Console(stderr=True)
BAR_WIDTH = 20
# transformers imports them where they are installed, needed or not, and they warn of the hardware that they find.
TALKATIVE = ("DeepSpeed", "bitsandbytes")
_adopted: list[tuple[logging.Logger, logging.Handler, logging.Handler]] = []


class Bars:
    """A context manager and a `nullspace.progress.Progress`: one bar a stage on standard error; with `quiet`, none."""

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._live: Progress | None = None
        self._tasks: dict[str, tuple[TaskID, float]] = {}

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, stage: str, done: int, total: int | None, tokens: int) -> None:
        if stage not in self._tasks:
            _adopt_handlers()  # of libraries that were imported since
        if self._quiet:
            self._tasks.setdefault(stage, (TaskID(0), 0.0))
            return
        now = time.perf_counter()
        if self._live is None:
            self._live = Progress(*_columns(), console=stderr)
            self._live.start()
        if stage not in self._tasks:
            self._tasks[stage] = (self._live.add_task(stage, total=total, rate=""), now)
        task, since = self._tasks[stage]
        rate = f"{tokens / (now - since):,.0f} tokens/s" if tokens and now > since else ""
        self._live.update(task, completed=done, total=total, rate=rate)

    def close(self) -> None:
        """Draw the bars for the last time. A stage that is reported later gets a new bar."""
        if self._live is not None:
            self._live.stop()
        self._live, self._tasks = None, {}

    def say(self, text: str) -> None:
        """Print a line on standard output, below the bars."""
        self.close()
        stdout.print(text, soft_wrap=True, markup=False)


def _columns() -> tuple[Any, ...]:
    return (
        TextColumn("{task.description:12}"),
        BarColumn(BAR_WIDTH),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[rate]}"),
    )


def say(what: str, text: str, style: str = "yellow") -> None:
    """A line on standard error: "warning: …"."""
    stderr.print(f"[{style}]{what}:[/] {escape(text)}", soft_wrap=True)


@contextlib.contextmanager
def captured() -> Iterator[None]:
    """Inside, warnings and log records are lines on standard error, as is what libraries print there, and they draw no bars."""
    redirected = contextlib.redirect_stderr(FileProxy(stderr, sys.stderr)) if stderr.is_terminal else contextlib.nullcontext()
    with redirected, _without_bars(), _records(), warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        for category in (FutureWarning, DeprecationWarning):  # messages for the developers of other libraries
            warnings.simplefilter("ignore", category)
        warnings.showwarning = lambda message, *_, **__: say("warning", str(message))
        yield


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Inside, tqdm draws nothing. The GGUF reader and others have no switch of their own for it."""
    original = tqdm.__init__

    @functools.wraps(original)
    def silent(self: tqdm, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **{**kwargs, "disable": True})

    tqdm.__init__ = silent
    try:
        yield
    finally:
        tqdm.__init__ = original


class _Lines(logging.Handler):
    """Log records as lines of `say`."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.addFilter(_is_wanted)

    def emit(self, record: logging.LogRecord) -> None:
        say(record.levelname.lower(), self.format(record))


@contextlib.contextmanager
def _records() -> Iterator[None]:
    """Inside, what is logged comes through `say`."""
    for name in TALKATIVE:
        logging.getLogger(name).addFilter(_is_wanted)
    lines = _Lines(logging.WARNING)
    logging.root.addHandler(lines)
    _adopt_handlers()
    try:
        yield
    finally:
        logging.root.removeHandler(lines)
        while _adopted:
            logger, before, ours = _adopted.pop()
            logger.removeHandler(ours)
            logger.addHandler(before)


def _adopt_handlers() -> None:
    """Put `_Lines` in the place of handlers that libraries have set up for standard error."""
    for logger in [each for each in logging.root.manager.loggerDict.values() if isinstance(each, logging.Logger)]:
        for handler in [each for each in logger.handlers if type(each) is logging.StreamHandler]:
            ours = _Lines(handler.level)
            ours.setFormatter(handler.formatter)
            logger.removeHandler(handler)
            logger.addHandler(ours)
            _adopted.append((logger, handler, ours))


def _is_wanted(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR or record.name.partition(".")[0] not in TALKATIVE
