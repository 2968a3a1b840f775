"""The sites of a stream: solved side by side beside the stream, in its order, as far as the memory allows."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch

from nullspace.solvers import cost, decompose, together
from nullspace.solvers.lanes import LANES, Lanes

SECONDS = 10.0


class Site(NamedTuple):
    members: tuple[str, ...]


class Matrix:
    """What is solved; `device` chooses the way."""

    device = torch.device("cpu")

    def __init__(self, d_in: int = 8) -> None:
        self.d_in = d_in


class HostLanes(Lanes):
    """Lanes without streams, with as much memory as a test says."""

    def __init__(self, free: int = 2**40) -> None:
        super().__init__()
        self.room, self.marks = free, 0

    def free(self) -> int:
        return self.room

    def mark(self) -> Any:
        self.marks += 1
        return self.marks

    def run(self, mark: Any, work: Callable[[], Any]) -> Any:
        return work()


class Solves:
    """A `solve` that returns when a test lets it, and knows how many were at work at once."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.at_work = self.most = 0
        self._gates: dict[str, threading.Event] = {}
        self._changed = threading.Condition()

    def gate(self, name: str) -> threading.Event:
        return self._gates.setdefault(name, threading.Event())

    def __call__(self, site: Site, matrix: Matrix) -> str:
        name = site.members[0]
        with self._changed:
            self.begun.append(name)
            self.at_work += 1
            self.most = max(self.most, self.at_work)
            self._changed.notify_all()
        try:
            assert self.gate(name).wait(SECONDS)
        finally:
            with self._changed:
                self.at_work -= 1
        if "bad" in name:
            raise ValueError(name)
        return name

    def open(self, *names: str) -> None:
        for name in names:
            self.gate(name).set()

    def wait_for(self, *names: str) -> None:
        """Wait until these solves have begun."""
        with self._changed:
            assert self._changed.wait_for(lambda: set(names) <= set(self.begun), SECONDS), self.begun


@pytest.fixture
def lanes(monkeypatch: pytest.MonkeyPatch) -> HostLanes:
    found = HostLanes()
    monkeypatch.setattr(together, "lanes_of", lambda device: found)
    return found


def pairs(*names: str, before: Callable[[str], None] = lambda name: None) -> Iterator[tuple[Site, Matrix]]:
    for name in names:
        before(name)
        yield Site((name,)), Matrix()


def test_sites_are_solved_while_the_stream_goes_on_and_come_in_its_order(lanes: HostLanes) -> None:
    solves = Solves()

    def before(name: str) -> None:
        if name == "c":  # both are at work while the model runs for the third
            solves.wait_for("a", "b")
            solves.open("b")
        if name == "d":
            solves.open("a", "c", "d")

    assert list(decompose(pairs("a", "b", "c", "d", before=before), solves)) == ["a", "b", "c", "d"]
    assert lanes.marks == 4
    assert solves.most >= 2


def test_no_more_are_at_work_than_there_are_lanes(lanes: HostLanes) -> None:
    solves, names = Solves(), [f"{i}" for i in range(3 * LANES)]
    solves.open(*names)
    assert list(decompose(pairs(*names), solves)) == names
    assert solves.most <= LANES
    blocked = Solves()
    stream = decompose(pairs(*names, before=lambda name: blocked.open(*names) if name == str(LANES) else None), blocked)
    assert list(stream) == names


@pytest.mark.parametrize(("room", "most"), [(0, 1), (2, 2), (3, 3), (100, LANES)])
def test_no_more_are_at_work_than_fit_into_the_memory(lanes: HostLanes, room: float, most: int) -> None:
    """Free memory that does not shrink: each solve at work is subtracted from it."""
    lanes.room = int(room * cost.decomposition_cost(8, 2, "cpu")[0])
    solves, names = Solves(), [f"{i}" for i in range(8)]
    solves.open(*names)
    assert list(decompose(pairs(*names), solves, rank=2)) == names
    assert solves.most <= most


def test_room_is_made_for_what_the_model_needs_next(lanes: HostLanes) -> None:
    device, size = torch.device("cpu"), cost.decomposition_cost(8, 8, "cpu")[0]
    solves, waited = Solves(), []
    lanes.room = 3 * size

    def before(name: str) -> None:
        if name == "c":
            together.make_room(device, size)  # beside two
            assert not solves.gate("a").is_set()
            opener = threading.Timer(0.05, solves.open, ("a", "b"))
            opener.start()
            together.make_room(device, 2 * size)  # beside one
            waited.append(solves.at_work)
            together.make_room(device, 100 * size)  # as soon as nothing is at work
            waited.append(solves.at_work)
            solves.open("c")

    assert list(decompose(pairs("a", "b", "c", before=before), solves)) == ["a", "b", "c"]
    assert waited[0] <= 1
    assert waited[1] == 0


def test_an_error_of_a_solve_is_raised_in_its_place(lanes: HostLanes) -> None:
    solves = Solves()
    solves.open("a", "bad", "c")
    results = decompose(pairs("a", "bad", "c"), solves)
    assert next(results) == "a"
    with pytest.raises(ValueError, match="bad"):
        next(results)
    assert lanes._sizes == []
    assert solves.at_work == 0


def test_what_was_drawn_before_the_stream_fails_is_yielded_first(lanes: HostLanes) -> None:
    def failing() -> Iterator[tuple[Site, Matrix]]:
        yield from pairs("a", "b")
        raise ValueError("batch 7")

    solves = Solves()
    solves.open("a", "b")
    results = decompose(failing(), solves)
    assert [next(results), next(results)] == ["a", "b"]
    with pytest.raises(ValueError, match="batch 7"):
        next(results)


@pytest.mark.parametrize("how", ["close", "interrupt"])
def test_an_early_end_waits_for_the_solves_and_begins_no_other(lanes: HostLanes, how: str) -> None:
    solves = Solves()

    def before(name: str) -> None:
        if name == "d" and how == "interrupt":
            solves.open("b", "c")
            raise KeyboardInterrupt

    solves.open("a")
    results = decompose(pairs("a", "b", "c", "d", before=before), solves)
    if how == "close":
        solves.open("b", "c", "d")
        assert next(results) == "a"
        results.close()  # type: ignore[attr-defined]
    else:
        with pytest.raises(KeyboardInterrupt):
            list(results)
        assert "d" not in solves.begun
    assert lanes._sizes == []
    assert solves.at_work == 0


def test_sums_are_freed_when_their_lane_has_done_with_them(lanes: HostLanes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not when `solve` returns, while the lane's stream may still read them; and not later."""
    alive: list[weakref.ref[Matrix]] = []
    left: list[int] = []

    def run(mark: Any, work: Callable[[], str]) -> str:
        result = work()
        assert alive[int(result)]() is not None
        return result

    monkeypatch.setattr(lanes, "run", run)

    def stream() -> Iterator[tuple[Site, Matrix]]:
        for number in range(6):
            matrix = Matrix()
            alive.append(weakref.ref(matrix))
            yield Site((f"{number}",)), matrix
            del matrix
            together.make_room(torch.device("cpu"), 2**60)  # until all are done
            left.append(sum(ref() is not None for ref in alive))

    assert list(decompose(stream(), lambda site, matrix: site.members[0])) == [f"{i}" for i in range(6)]
    assert left == [0] * 6


def test_sites_of_two_devices_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups on the host and lanes in turn."""
    lanes = [None, HostLanes(), HostLanes()]
    monkeypatch.setattr(together, "lanes_of", lambda device: lanes[device.index or 0])
    order = [0, 0, 1, 2, 1, 0, 2, 2, 0]

    def stream() -> Iterator[tuple[Site, Matrix]]:
        for number, index in enumerate(order):
            matrix = Matrix()
            matrix.device = torch.device("cpu", index)
            yield Site((f"{number}",)), matrix

    assert list(decompose(stream(), lambda site, matrix: site.members[0])) == [f"{i}" for i in range(len(order))]


class FakeStream:
    """A stream that writes down what is done with it."""

    def __init__(self, log: list[str], name: str) -> None:
        self._log, self._name = log, name

    def record_event(self) -> str:
        self._log.append(f"{self._name} records")
        return f"event of {self._name}"

    def wait_event(self, event: str) -> None:
        self._log.append(f"{self._name} waits for the {event}")

    def synchronize(self) -> None:
        self._log.append(f"the host waits for {self._name}")


def test_a_lane_waits_for_the_sums_and_its_thread_for_the_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    from nullspace.solvers import lanes

    log: list[str] = []
    device = torch.device("cuda", 0)
    monkeypatch.setattr(lanes, "side_stream", lambda device, use, number: FakeStream(log, f"lane {number}"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: FakeStream(log, "the model's"))
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda matrix: log.append("linear algebra is loaded"))
    monkeypatch.setattr(torch, "ones", lambda *shape, device: None)
    made = lanes.CudaLanes(device)

    def fail() -> None:
        raise ValueError("bad")

    mark = made.mark()
    assert made.run(mark, lambda: log.append("solves") or 1) == 1
    with pytest.raises(ValueError, match="bad"):
        made.run(mark, fail)
    assert log == [
        "linear algebra is loaded",
        "the model's records",
        "lane 0 waits for the event of the model's",
        "solves",
        "the host waits for lane 0",
        "lane 1 waits for the event of the model's",
        "the host waits for lane 1",
    ]
    assert [made._idle.get() is not None for _ in range(LANES)] == [True] * LANES
