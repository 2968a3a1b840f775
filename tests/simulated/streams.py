"""What happens before what on simulated devices: streams, events, and a ledger of who wrote and read which memory.

Every operation on a device is put on a stream and gets the next tick of that stream. A clock says, for each stream, up to which
tick everything has certainly ended: an operation knows what its stream has done, what the host has waited for, and the events for
which its stream waits. An operation that reads what another stream has written must know that write; one that writes must know all
reads and the write before it. The host, when it reads or writes memory that a copy without a wait has used, must have waited for
the copy.
"""

from __future__ import annotations

import functools
import itertools
import sys
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent

Clock = dict[int, int]


class RaceError(RuntimeError):
    """Two accesses to the same memory, of which one writes, have no order."""


def where() -> str:
    """The innermost line of the library (else of the tests) that is being run."""
    return _innermost()[0]


def is_of_model() -> bool:
    """Whether code of transformers runs, which the library has called."""
    return _innermost()[1]


def _innermost() -> tuple[str, bool]:
    frame: Any = sys._getframe(2)
    of_test, of_model = None, False
    while frame is not None:
        filename = frame.f_code.co_filename
        of_model = of_model or "/transformers/models/" in filename
        place = _place(filename)
        if place is not None:
            line = f"{place}:{frame.f_lineno} {frame.f_code.co_name}"
            if not place.startswith("tests/"):
                return line, of_model
            of_test = of_test or line
        frame = frame.f_back
    return of_test or "?", of_model


@functools.cache
def _place(filename: str) -> str | None:
    """A file's path in the repository; None if it is elsewhere, or simulates."""
    path = Path(filename).resolve()
    if ROOT not in path.parents or (path.parent == HERE and not path.name.startswith("test_")):
        return None
    inside = path.relative_to(ROOT)
    return None if inside.parts[0].startswith(".venv") else str(inside)


def join(clock: Clock, other: Clock) -> None:
    for stream, tick in other.items():
        clock[stream] = max(tick, clock.get(stream, 0))


class Stream:
    """A stream: stands for `torch.cuda.Stream`."""

    _numbers = itertools.count(1)

    def __init__(self, device: torch.device | str | int | None = None, priority: int = 0, **_: Any) -> None:
        if device is None:
            device = torch.cuda.current_device()
        self.device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        if self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.number = self.cuda_stream = self.stream_id = next(Stream._numbers)
        self.device_index = self.device.index
        self.tick = 0
        self.clock: Clock = {}

    def advance(self, host: Clock) -> Clock:
        """The clock of a new operation."""
        self.tick += 1
        join(self.clock, host)
        self.clock[self.number] = self.tick
        return self.clock

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.clock = dict(self.clock)
        return event

    def wait_event(self, event: Event) -> None:
        join(self.clock, event.clock)

    def wait_stream(self, stream: Stream) -> None:
        join(self.clock, stream.clock)

    def synchronize(self) -> None:
        torch.cuda.simulation.wait(f"Stream.synchronize of {self.device}", self.clock)  # type: ignore[attr-defined]

    def query(self) -> bool:
        return True

    def __enter__(self) -> Stream:
        self._before = torch.cuda.simulation.enter_stream(self)  # type: ignore[attr-defined]
        return self

    def __exit__(self, *_: object) -> None:
        torch.cuda.simulation.leave_stream(self._before)  # type: ignore[attr-defined]


class Event:
    """An event: stands for `torch.cuda.Event`."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.clock: Clock = {}

    def record(self, stream: Stream | None = None) -> None:
        (stream or torch.cuda.current_stream()).record_event(self)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or torch.cuda.current_stream()).wait_event(self)

    def synchronize(self) -> None:
        torch.cuda.simulation.wait("Event.synchronize", self.clock)  # type: ignore[attr-defined]

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        return 1.0


class _Used:
    """The last write to some memory, and the reads since."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.alive = StorageWeakRef(storage)
        self.write: tuple[int, int, str] | None = None  # stream, tick, line
        self.reads: dict[int, tuple[int, str]] = {}


class Ledger:
    """Which operation wrote and read which memory last.

    Attributes:
        races: what was found, as text.
    """

    def __init__(self) -> None:
        self.races: list[str] = []
        self._used: dict[tuple[int, int], _Used] = {}

    def on_stream(self, stream: Stream, clock: Clock, tensor: torch.Tensor, *, writes: bool) -> None:
        """An operation of a stream uses a tensor's memory."""
        used, line = self._of(tensor, make=True), where()
        assert used is not None
        self._check(used, clock, f"an operation on {stream.device}, stream {stream.number}", line, writes)
        if writes:
            used.write, used.reads = (stream.number, clock[stream.number], line), {}
        else:
            used.reads[stream.number] = (clock[stream.number], line)

    def on_host(self, clock: Clock, tensor: torch.Tensor, *, writes: bool) -> None:
        """The host uses a tensor's memory, after it has waited for what `clock` says."""
        used = self._of(tensor, make=False)
        if used is not None:
            self._check(used, clock, "the host", where(), writes)

    def forget_dead(self) -> None:
        self._used = {key: used for key, used in self._used.items() if not used.alive.expired()}

    def _of(self, tensor: torch.Tensor, *, make: bool) -> _Used | None:
        if not make and not self._used:
            return None
        storage = tensor.untyped_storage()
        # Pinned memory is carved up: its pieces, which begin at different places, are used independently.
        pinned = torch.cuda.simulation.is_pinned(tensor)  # type: ignore[attr-defined]
        key = storage._cdata, tensor.storage_offset() * tensor.element_size() if pinned else 0
        used = self._used.get(key)
        if used is None or used.alive.expired():
            if not make:
                return None
            used = self._used[key] = _Used(storage)
            if len(self._used) % 4096 == 0:
                self.forget_dead()
        return used

    def _check(self, used: _Used, clock: Clock, who: str, line: str, writes: bool) -> None:
        if used.write is not None and clock.get(used.write[0], 0) < used.write[1]:
            self._race(
                f"{who} ({line}) {'writes' if writes else 'reads'} memory that stream {used.write[0]} may still be writing "
                f"({used.write[2]})"
            )
        for stream, (tick, by) in used.reads.items() if writes else ():
            if clock.get(stream, 0) < tick:
                self._race(f"{who} ({line}) writes memory that stream {stream} may still be reading ({by})")

    def _race(self, text: str) -> None:
        self.races.append(text)
        raise RaceError(text)
