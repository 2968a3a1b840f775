"""SIGTERM and SIGHUP end the command line as Ctrl-C does: by an exception, so that locks and temporary folders are removed."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


class Terminated(BaseException):
    """A signal has asked this process to end.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.name, self.exit_code = signal.Signals(number).name, 128 + number


class _Terminate:
    """Handler of a signal: raises `Terminated`. `raises` lets a calibration keep its sums first (`calibration.interruption`)."""

    raises = True

    def __call__(self, number: int, _: Any) -> None:
        raise Terminated(number)


@contextlib.contextmanager
def signals_as_exceptions() -> Iterator[None]:
    """Context manager: SIGTERM and SIGHUP raise `Terminated` in the main thread, unless they are handled or ignored already."""

    in_main = threading.current_thread() is threading.main_thread()  # no other thread may set handlers
    signals = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name) and in_main]
    changed = [number for number in signals if signal.getsignal(number) is signal.SIG_DFL]
    for number in changed:
        signal.signal(number, _Terminate())
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, signal.SIG_DFL)
