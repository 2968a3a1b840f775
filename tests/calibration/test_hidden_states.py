"""Hidden states between two blocks: copies beside computation, in the order that two GPUs need, in memory that is not wasted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nullspace.calibration import hidden_states
from nullspace.calibration.hidden_states import Arguments, Shelf
from nullspace.planning.memory import pinned_bytes, power_of_two

SHAPE = (2, 3)


class FakeStreams:
    """Streams of fake GPUs, which write down what they wait for. An event's name is its stream's and its number there."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self._counts: dict[str, int] = {}

    def stream(self, device: torch.device, use: str = "computes", number: int = 0) -> FakeStream:
        return FakeStream(self, f"{device.index} {use.removeprefix('hidden states, ')}")

    def event(self, stream: str) -> FakeEvent:
        self._counts[stream] = self._counts.get(stream, 0) + 1
        return FakeEvent(self, f"{stream} {self._counts[stream]}")

    def taken(self) -> list[str]:
        """What was written since the last call."""
        log, self.log = self.log, []
        return log


class FakeEvent:
    def __init__(self, streams: FakeStreams, name: str) -> None:
        self._streams, self.name = streams, name

    def synchronize(self) -> None:
        self._streams.log.append(f"host < {self.name}")


class FakeStream:
    def __init__(self, streams: FakeStreams, name: str) -> None:
        self._streams, self.name = streams, name

    def record_event(self) -> FakeEvent:
        return self._streams.event(self.name)

    def wait_event(self, event: FakeEvent) -> None:
        self._streams.log.append(f"{self.name} < {event.name}")


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeStreams]:
    made = FakeStreams()
    monkeypatch.setattr(hidden_states, "side_stream", made.stream)
    monkeypatch.setattr(torch.cuda, "current_stream", made.stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.Tensor, "copy_", lambda tensor, other, non_blocking=False: tensor)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: made.log.append(f"memory until {stream.name}"))
    with FakeTensorMode():
        yield made


def on(index: int) -> torch.Tensor:
    return torch.empty(SHAPE, device=f"cuda:{index}")


def test_copies_between_two_gpus_are_ordered(streams: FakeStreams) -> None:
    """A block on one GPU puts what a block on another one gets and overwrites, and a block on the host reads."""
    shelf = Shelf("host")
    shelf.put(1, 0, on(0))
    assert streams.taken() == ["0 to the host < 0 computes 1", "memory until 0 to the host"]
    found = shelf.get(1, 0, torch.device("cuda", 1))
    assert (found.device, found.shape) == (torch.device("cuda", 1), torch.Size(SHAPE))
    assert streams.taken() == [
        "1 to the device < 1 computes 1",  # whose memory it is
        "1 to the device < 0 to the host 1",
        "1 computes < 1 to the device 1",
    ]
    shelf.put(1, 0, on(1))
    assert streams.taken() == [
        "1 to the host < 1 computes 2",
        "1 to the host < 0 to the host 1",
        "1 to the host < 1 to the device 1",
        "memory until 1 to the host",
    ]
    assert shelf.get(1, 0, torch.device("cpu")).device.type == "cpu"
    assert streams.taken() == ["host < 1 to the host 1"]


def test_what_was_fetched_ahead_is_copied_once(streams: FakeStreams) -> None:
    shelf, device = Shelf("host"), torch.device("cuda", 0)
    shelf.put(1, 0, on(0))
    streams.taken()
    shelf.fetch(1, 0, device)
    shelf.fetch(1, 0, device)
    assert streams.taken() == ["0 to the device < 0 computes 2", "0 to the device < 0 to the host 1"]
    shelf.get(1, 0, device)
    assert streams.taken() == ["0 computes < 0 to the device 1"]
    shelf.fetch(1, 0, device)
    streams.taken()
    shelf.close()  # before its memory is used for something else
    assert streams.taken() == ["0 computes < 0 to the device 2"]


def test_a_block_gets_its_hidden_states_once(streams: FakeStreams) -> None:
    """Also if they are among its arguments twice; the next batch's are on their way meanwhile."""
    arguments, device = Arguments(Shelf("host")), torch.device("cuda", 0)
    for batch in (1, 2):
        hidden, mask = on(0), on(0)
        (leaves, spec) = torch.utils._pytree.tree_flatten(((hidden,), {"again": hidden, "mask": mask, "flag": True}))
        arguments.keep(batch, [(leaves, spec)], [0])
    streams.taken()
    args, _kwargs, found = arguments.take(1, 0, device)
    assert found is args[0]
    assert sum(line.startswith("0 computes <") for line in streams.taken()) == 3  # hidden states, and what else it is given
    arguments.fetch(2, 0, device)
    streams.taken()
    arguments.take(2, 0, device)
    assert all(line.startswith("0 computes <") for line in streams.taken())


def test_files_are_written_when_their_copy_has_arrived() -> None:
    """A tensor of the host, which may be overwritten, at once."""
    shelf = Shelf("disk")
    first, second = torch.arange(6.0), torch.arange(6.0) + 1
    shelf.put(1, 0, first)
    first.zero_()
    shelf.put(2, 0, second)
    assert shelf.get(1, 0, torch.device("cpu")).tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert torch.equal(shelf.get(2, 0, torch.device("cpu")), second)
    shelf.close()


@pytest.mark.parametrize(("size", "count"), [(1, 1), (1000, 3), (3 * 2**20, 64), (2**25, 64), (5 * 2**20 + 512, 1000)])
def test_pinned_memory_is_carved_up(size: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of a power of two are what PyTorch allocates: a single tensor each would take up to twice its size."""
    taken: list[int] = []
    empty = torch.empty

    def pinned(shape: int, *, dtype: torch.dtype, pin_memory: bool = False) -> torch.Tensor:
        if pin_memory:
            taken.append(power_of_two(shape))
        return empty(shape, dtype=dtype, device="meta")

    monkeypatch.setattr(torch, "empty", pinned)
    memory = hidden_states._PinnedMemory(size * count)
    for _ in range(count):
        assert memory.take(torch.Size([size]), torch.uint8).shape == (size,)
    assert sum(taken) <= 1.01 * pinned_bytes(size, count) + 2**10 * size.bit_length()
    assert pinned_bytes(size, count) <= (1 + 1 / 8) * size * count + 8 * size
