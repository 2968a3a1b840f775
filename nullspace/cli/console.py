"""The terminal: results on standard output, bars, warnings and errors on standard error, and none of them over another.

Bars are redrawn in place, so a line that is printed beside them leaves copies of them on the screen. Inside `captured`, what is
written to standard error clears the bars first, and they are drawn anew below it. What goes to standard output, which may be the
same terminal, waits until the bars are closed (`Bars.say`).
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from nullspace import progress

if TYPE_CHECKING:
    from nullspace.artifacts.covariances import Covariances
    from nullspace.artifacts.spaces import NullSpaces

stdout, stderr = Console(), Console(stderr=True)
BAR_FORMAT = "{desc:12} {bar:16} {n_fmt}/{total_fmt} {elapsed} left {remaining}{postfix}"
NARROW_FORMAT = "{desc:12} {n_fmt}/{total_fmt} left {remaining}"
NARROW = 78  # columns that `BAR_FORMAT` may take
LINE_SECONDS = 60.0  # between two lines of a bar without a terminal
WORST = 10  # rows of a long table
# transformers imports them where they are installed, needed or not, and they warn of the hardware that they find.
TALKATIVE = ("DeepSpeed", "bitsandbytes")
_adopted: list[tuple[logging.Logger, logging.Handler, logging.Handler]] = []


class Bars(progress.Bars):
    """Context manager and `Progress`: one bar a stage on standard error; with `quiet`, none."""

    def __init__(self, quiet: bool = False) -> None:
        super().__init__(functools.partial(_Bar, quiet or stderr.quiet))

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def say(self, text: str) -> None:
        """Print a text on standard output, below the bars, in lines that end between words."""
        self.close()
        stdout.print(text, highlight=False, markup=False)


class _Bar(tqdm):
    """A bar on standard error. Without a terminal, it is a line now and then (`LINE_SECONDS`), and one when it is closed."""

    def __init__(self, quiet: bool, **kwargs: Any) -> None:
        _adopt_handlers()  # of libraries that were imported since
        screen = sys.stderr.screen if isinstance(sys.stderr, _AboveBars) else None
        bar = True if stderr.options.ascii_only else " ━"
        form = NARROW_FORMAT if screen and stderr.width < NARROW else BAR_FORMAT
        self._is_drawn, self._printed = screen is not None, time.monotonic()
        super().__init__(file=screen or io.StringIO(), bar_format=form, ascii=bar, dynamic_ncols=True, disable=quiet, **kwargs)

    def update(self, n: float | None = 1) -> bool | None:
        drawn = super().update(n)
        if not (self.disable or self._is_drawn) and time.monotonic() - self._printed >= LINE_SECONDS:
            print(self, file=sys.stderr)
            self._printed = time.monotonic()
        return drawn

    def close(self) -> None:
        if self.n and not (self.disable or self._is_drawn):
            print(self, file=sys.stderr)
        super().close()


class _AboveBars:
    """Standard error beside bars: lines are printed whole, above the bars."""

    def __init__(self, screen: TextIO) -> None:
        self.screen, self._rest = screen, ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.screen, name)

    def write(self, text: str) -> int:
        lines, newline, self._rest = (self._rest + text).rpartition("\n")
        if newline:
            _Bar.write(lines, file=self.screen)
        return len(text)

    def flush(self) -> None:
        if self._rest:
            self.write("\n")
        self.screen.flush()


class _LastState(io.StringIO):
    """The file of a bar, whose last state is printed when the bar is closed."""

    _state = ""

    def write(self, text: str) -> int:
        if text == "\n" and self._state:
            print(self._state, file=sys.stderr)
        self._state = text.strip()
        return len(text)


def print_message(word: str, text: str, style: str = "yellow") -> None:
    """A line on standard error: "warning: …"."""
    stderr.print(f"[{style}]{word}:[/] {escape(text)}", soft_wrap=True)


def print_line(text: str) -> None:
    """A line on standard output, as it is."""
    stdout.print(text, soft_wrap=True, highlight=False, markup=False)


def print_table(rows: list[dict[str, str]]) -> None:
    """Rows, column title → text, on standard output: the first column to the left, the others to the right."""
    table = Table(box=None, pad_edge=False)
    for index, title in enumerate(rows[0]):
        table.add_column(title, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row.values()))  # not as markup: names come from files
    # Numbers are never cut: in a window that is too narrow, the lines wrap.
    needed = stdout.measure(table, options=stdout.options.update(width=1000)).maximum
    Console(width=max(needed, stdout.width)).print(table)


def show_spaces(
    spaces: NullSpaces, facts: Mapping[str, Any], *, as_json: bool, quiet: bool = False, all_rows: bool = False
) -> dict[str, Any] | None:
    """Print a table of null spaces, or return the document that `--json` prints: `facts` and the table's rows.

    Of a long table the sites with the largest leak are shown, in their order, below a line on all of them.
    """
    from nullspace import tables

    rows = spaces.rows()
    if not (as_json or quiet):
        shown = tables.experts_together(rows)
        if len(shown) > WORST and not all_rows:
            print_line(f"{tables.summary(shown)}\nThe {WORST} with the largest leak (--all shows all):\n")
            shown = tables.largest(shown, WORST, lambda row: row["leak"])
        print_table([tables.cells(row) for row in shown])
        for line in spaces.notes():
            print_line(f"\n{line}")
    return {"covered_share": spaces.covered_share, **facts, "sites": rows} if as_json else None


def show_covariances(
    covariances: Covariances, facts: Mapping[str, Any], *, as_json: bool, quiet: bool = False, all_rows: bool = False
) -> dict[str, Any] | None:
    """The same for covariances (those with the fewest tokens for their width), and which shards of their data are missing."""
    from nullspace import tables
    from nullspace.artifacts.shard_account import what_is_missing

    rows = covariances.rows()
    if as_json:
        facts = {**facts, "covered_share": covariances.covered_share}
        return {**facts, "shards": [part.as_json() for part in covariances.shards], "sites": rows}
    if not quiet:
        shown = tables.experts_together(rows)
        if len(shown) > WORST and not all_rows:
            print_line(f"{tables.summary(shown)}\nThe {WORST} with the fewest tokens for their width (--all shows all):\n")
            shown = tables.largest(shown, WORST, lambda row: -row["tokens"] / row["d_in"])
        print_table([tables.covariance_cells(row) for row in shown])
        for line in covariances.notes():
            print_line(f"\n{line}")
        missing = what_is_missing(covariances.shards)
        if missing:
            print_line(f"\nThe sums of a part of the data: {missing} missing.")
    return None


@contextlib.contextmanager
def captured(verbose: bool = False) -> Iterator[None]:
    """Inside, warnings and log records are lines on standard error, as is what libraries print there, and they draw no bars.

    Args:
        verbose: print what nullspace logs of its steps too, and the last state of other libraries' bars.
    """
    redirected: Any = contextlib.redirect_stderr(_AboveBars(sys.stderr)) if stderr.is_terminal else contextlib.nullcontext()
    with redirected, _others_bars(verbose), _records(verbose), warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        for category in (FutureWarning, DeprecationWarning):  # messages for the developers of other libraries
            warnings.simplefilter("ignore", category)
        warnings.showwarning = lambda message, *_, **__: print_message("warning", str(message))
        yield


@contextlib.contextmanager
def _others_bars(verbose: bool) -> Iterator[None]:
    """Inside, tqdm draws no bars but ours. The GGUF reader and others have no switch of their own for it.

    With `verbose`, the last state of another bar is a line on standard error.
    """
    original = tqdm.__init__

    @functools.wraps(original)
    def changed(self: tqdm, *args: Any, **kwargs: Any) -> None:
        if not isinstance(self, _Bar):
            kwargs |= {"file": _LastState()} if verbose else {"disable": True}
        original(self, *args, **kwargs)

    tqdm.__init__ = changed
    try:
        yield
    finally:
        tqdm.__init__ = original


class _Lines(logging.Handler):
    """Log records as lines of `print_message`."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.addFilter(_is_wanted)

    def emit(self, record: logging.LogRecord) -> None:
        print_message(record.levelname.lower(), self.format(record))


@contextlib.contextmanager
def _records(verbose: bool) -> Iterator[None]:
    """Inside, log records are printed by `print_message`: warnings, and with `verbose` our own of level INFO."""
    for name in TALKATIVE:
        logging.getLogger(name).addFilter(_is_wanted)
    lines, own = _Lines(logging.WARNING), logging.getLogger("nullspace")
    logging.root.addHandler(lines)
    steps, level, propagates = _Lines(logging.INFO), own.level, own.propagate
    if verbose:
        own.addHandler(steps)
        own.setLevel(logging.INFO)
        own.propagate = False
    _adopt_handlers()
    try:
        yield
    finally:
        own.removeHandler(steps)
        own.setLevel(level)
        own.propagate = propagates
        logging.root.removeHandler(lines)
        while _adopted:
            logger, before, ours = _adopted.pop()
            logger.removeHandler(ours)
            logger.addHandler(before)


def _adopt_handlers() -> None:
    """Replace the handlers that libraries have set up for standard error by `_Lines`."""
    for logger in [each for each in logging.root.manager.loggerDict.values() if isinstance(each, logging.Logger)]:
        for handler in [each for each in logger.handlers if type(each) is logging.StreamHandler]:
            ours = _Lines(handler.level)
            ours.setFormatter(handler.formatter)
            logger.removeHandler(handler)
            logger.addHandler(ours)
            _adopted.append((logger, handler, ours))


def _is_wanted(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR or record.name.partition(".")[0] not in TALKATIVE
