"""A pseudo-terminal whose screen can be read: what somebody sees, and not what was written."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import struct
import sys
import termios
import threading
from collections.abc import Iterator

import pytest

COLUMNS, LINES = 80, 50
# Text, or one control sequence.
_TOKEN = re.compile(r"\x1b\[(?P<arguments>[0-9;?]*)(?P<final>[A-Za-z])|(?P<text>[^\x1b])")


class Terminal:
    """What an ECMA-48 terminal shows, with the lines that have left it at the top.

    Attributes:
        columns: its width.
        written: everything that was written to it.
    """

    def __init__(self, columns: int = COLUMNS) -> None:
        self.columns, self.written = columns, ""

    @property
    def lines(self) -> list[str]:
        """The screen in the end, without empty lines at its foot.

        Raises:
            AssertionError: for a control sequence that is not understood here.
        """
        rows, row, column = [[" "] * self.columns], 0, 0
        for token in _TOKEN.finditer(self.written):
            text, final = token["text"], token["final"]
            count = int(token["arguments"] or 1) if final in ("A", "K") else 0
            if text == "\r":
                column = 0
            elif text == "\n" or (text and column == self.columns):
                row, column = row + 1, 0 if text != "\n" else column
                rows += [[" "] * self.columns for _ in range(row + 1 - len(rows))]
            if text and text not in "\r\n\x07":
                rows[row][column] = text
                column += 1
            elif final == "A":  # no further than the top of what is visible
                row = max(row - count, len(rows) - LINES, 0)
            elif final == "K":
                assert count == 2, token
                rows[row] = [" "] * self.columns
            else:
                assert text or final in ("m", "h", "l"), token  # colours, and whether the cursor is visible
        assert "\x1b" not in _TOKEN.sub("", self.written)
        return "\n".join("".join(each).rstrip() for each in rows).rstrip().split("\n")


@contextlib.contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch, columns: int = COLUMNS) -> Iterator[Terminal]:
    """Inside, standard output and standard error are one terminal. Read it afterwards."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, columns, 0, 0))
    found, parts = Terminal(columns), []

    def read() -> None:
        with contextlib.suppress(OSError):  # what Linux raises at the end
            while part := os.read(ours, 65536):
                parts.append(part)

    reader = threading.Thread(target=read)
    reader.start()
    with monkeypatch.context() as patch, os.fdopen(theirs, "w", encoding="utf-8") as screen:
        patch.setattr(sys, "stdout", screen)
        patch.setattr(sys, "stderr", screen)
        for name, value in (("COLUMNS", str(columns)), ("LINES", str(LINES)), ("TERM", "xterm-256color")):
            patch.setenv(name, value)
        yield found
    reader.join()
    os.close(ours)
    found.written = b"".join(parts).decode()
