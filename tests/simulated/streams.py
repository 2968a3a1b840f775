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
from typing import Any, NamedTuple

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
    if inside == Path("nullspace/devices.py"):  # its caller says more
        return None
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


class _Access(NamedTuple):
    """Bytes of a storage that an operation has used, and the operation's stream, tick and line."""

    begin: int
    end: int
    stream: int
    tick: int
    line: str

    def overlaps(self, begin: int, end: int) -> bool:
        return self.begin < end and begin < self.end

    def is_known(self, clock: Clock) -> bool:
        return clock.get(self.stream, 0) >= self.tick


class _Used:
    """How a storage is used.

    Attributes:
        home: the stream on which it was allocated, and to which the allocator gives its memory back; None for the host's.
        recorded: other streams, of `record_stream`.
    """

    def __init__(self, storage: torch.UntypedStorage, home: Stream | None) -> None:
        self.alive, self.home = StorageWeakRef(storage), home
        self.recorded: set[int] = set()
        self.writes: list[_Access] = []
        self.reads: list[_Access] = []
        self.tensors = 0


class Ledger:
    """Which operation used which memory last.

    Attributes:
        races: what was found, as text.
    """

    def __init__(self) -> None:
        self.races: list[str] = []
        self._used: dict[int, _Used] = {}

    def on_stream(
        self, stream: Stream, clock: Clock, tensor: torch.Tensor, *, writes: bool, home: Stream | None = None, host: Clock
    ) -> None:
        """An operation of a stream uses a tensor's memory.

        Args:
            stream: of the operation.
            clock: of the operation.
            tensor: that it uses.
            writes: whether it writes.
            home: where the memory was allocated, if it is new.
            host: what the host has waited for, and with it every later operation.
        """
        used = self._of(tensor, home)
        begin, end = _extent(tensor)
        self._check(used, clock, begin, end, f"an operation on {stream.device}, stream {stream.number}", writes)
        access = _Access(begin, end, stream.number, clock[stream.number], where())
        if writes:
            used.writes = [each for each in used.writes if not (begin <= each.begin and each.end <= end)]
            used.reads = [each for each in used.reads if not (begin <= each.begin and each.end <= end)]
            used.writes.append(access)
        else:
            used.reads = [each for each in used.reads if (each.begin, each.end, each.stream) != access[:3]]
            used.reads.append(access)
        if len(used.reads) + len(used.writes) > 64:
            used.reads, used.writes = ([a for a in each if not a.is_known(host)] for each in (used.reads, used.writes))

    def on_host(self, clock: Clock, tensor: torch.Tensor, *, writes: bool) -> None:
        """The host uses a tensor's memory, after it has waited for what `clock` says."""
        used = self._used.get(tensor.untyped_storage()._cdata) if self._used else None
        if used is not None and not used.alive.expired():
            self._check(used, clock, *_extent(tensor), "the host", writes)

    def record(self, tensor: torch.Tensor, stream: Stream) -> None:
        """`record_stream`: the allocator waits for what this stream does with the memory until it is freed."""
        self._of(tensor, None).recorded.add(stream.number)

    def hold(self, tensor: torch.Tensor, host: Clock) -> Hold:
        """What a holder of a tensor's memory keeps, so that the ledger sees when the last of them is gone."""
        return Hold(self, self._of(tensor, None), host)

    def release(self, used: _Used, host: Clock) -> None:
        """A holder of the memory is gone. If it was the last one, the allocator gives the memory to its home's next operation."""
        used.tensors -= 1
        if used.tensors or used.home is None:
            return
        for access in (*used.writes, *used.reads):
            if access.stream == used.home.number or access.stream in used.recorded:
                continue
            if not access.is_known(used.home.clock) and not access.is_known(host):
                self.races.append(
                    f"memory of stream {used.home.number} is freed ({where()}) while stream {access.stream} may still use it "
                    f"({access.line}), without record_stream"
                )

    def _of(self, tensor: torch.Tensor, home: Stream | None) -> _Used:
        storage = tensor.untyped_storage()
        used = self._used.get(storage._cdata)
        if used is None or used.alive.expired():
            if len(self._used) % 4096 == 4095:
                self._used = {key: each for key, each in self._used.items() if not each.alive.expired()}
            used = self._used[storage._cdata] = _Used(storage, home)
        return used

    def _check(self, used: _Used, clock: Clock, begin: int, end: int, who: str, writes: bool) -> None:
        for others, what in ((used.writes, "writing"), (used.reads if writes else (), "reading")):
            for each in others:
                if each.overlaps(begin, end) and not each.is_known(clock):
                    text = f"{who} ({where()}) {'writes' if writes else 'reads'} memory that stream {each.stream} may still be "
                    self.races.append(f"{text}{what} ({each.line})")
                    raise RaceError(self.races[-1])


class Hold:
    """Held by a tensor for as long as it exists."""

    def __init__(self, ledger: Ledger, used: _Used, host: Clock) -> None:
        self._ledger, self._used, self._host = ledger, used, host
        used.tensors += 1

    def __del__(self) -> None:
        self._ledger.release(self._used, self._host)


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First and last byte of a tensor in its storage."""
    if tensor.numel() == 0:
        return 0, 0
    size, begin = tensor.element_size(), tensor.storage_offset()
    last = begin + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return size * begin, size * (last + 1)
