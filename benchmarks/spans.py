"""What some functions take inside of a program, on the stream that they are called on."""

from __future__ import annotations

import functools
import threading
import time
from types import TracebackType
from typing import Any

import torch


class Spans:
    """A context manager that replaces functions by ones that note when they begin and end.

    On a GPU an event goes before and behind each call on the stream that is current in the calling thread, so that nothing waits;
    the time between them is that stream's, with whatever else it did meanwhile. Without one, it is the host's clock.

    Args:
        functions: name of a part → its owner and attribute. Callers that have bound the function to a name of their own are missed.
    """

    def __init__(self, **functions: tuple[Any, str]) -> None:
        self._functions = functions
        self._spans: dict[str, list[tuple[Any, Any]]] = {name: [] for name in functions}
        self._cuda = torch.cuda.is_available()
        self._lock = threading.Lock()

    def __enter__(self) -> Spans:
        self._originals = {name: getattr(owner, attribute) for name, (owner, attribute) in self._functions.items()}
        for name, (owner, attribute) in self._functions.items():
            setattr(owner, attribute, self._watched(name, self._originals[name]))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for name, (owner, attribute) in self._functions.items():
            setattr(owner, attribute, self._originals[name])

    def seconds(self) -> dict[str, float]:
        """Of each part, all its calls together: side by side on several streams or threads, they add up to more than the run."""
        if self._cuda:
            torch.cuda.synchronize()
            return {name: sum(a.elapsed_time(b) for a, b in spans) / 1e3 for name, spans in self._spans.items()}
        return {name: sum(b - a for a, b in spans) for name, spans in self._spans.items()}

    def calls(self) -> dict[str, int]:
        """How often each part was called."""
        return {name: len(spans) for name, spans in self._spans.items()}

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _watched(self, name: str, function: Any) -> Any:
        @functools.wraps(function)
        def watched(*args: Any, **options: Any) -> Any:
            began = self._now()
            result = function(*args, **options)
            ended = self._now()
            with self._lock:
                self._spans[name].append((began, ended))
            return result

        return watched
