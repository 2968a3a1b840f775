"""Signals that ask the command line to end: it ends as by Ctrl-C, so that locks and temporary folders do not stay."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


class Ended(BaseException):
    """A signal has asked this process to end.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.name, self.exit_code = signal.Signals(number).name, 128 + number


@contextlib.contextmanager
def signals_as_exceptions() -> Iterator[None]:
    """Context manager: SIGTERM and SIGHUP raise `Ended` in the main thread, unless somebody else handles or ignores them."""

    def end(number: int, _: Any) -> None:
        raise Ended(number)

    here = threading.current_thread() is threading.main_thread()  # no other thread may set handlers
    signals = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name) and here]
    changed = [number for number in signals if signal.getsignal(number) is signal.SIG_DFL]
    for number in changed:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, signal.SIG_DFL)
