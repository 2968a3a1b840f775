"""Lanes: streams of a CUDA device on which sites are solved side by side, as far as the device's memory allows.

The work on a site starts behind what the caller's stream had been given when the site was handed over. The lane's thread waits
for the end of it before it drops the site's sums: the allocator gives their memory back to the caller's stream, and must not do so
while the lane reads it. What a lane returns was allocated on the lane's stream, and is marked as used by the caller's.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch.utils import _pytree as pytree

from nullspace.devices import free_on_device, side_stream

# A decoder's block has about four sites: while these are solved, the next block runs.
LANES = 4

T = TypeVar("T")


class Lanes(abc.ABC):
    """The solves at work on one device: at most `LANES`, and no more than its memory has room for, but always one."""

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._ended = threading.Condition()

    def begin(self, size: int) -> None:
        """Wait until one more solve of `size` bytes has its place, and count it as at work."""
        with self._ended:
            self._ended.wait_for(lambda: len(self._sizes) < LANES and self._has_room(size))
            self._sizes.append(size)

    def end(self, size: int) -> None:
        """Count a solve as done."""
        with self._ended:
            self._sizes.remove(size)
            self._ended.notify_all()

    def make_room(self, size: int) -> None:
        """Wait until `size` bytes are free beside those of the solves at work, or none is at work."""
        with self._ended:
            self._ended.wait_for(lambda: self._has_room(size))

    def _has_room(self, size: int) -> bool:
        # What the solves at work have allocated already is counted twice: how much that is, is not known.
        return not self._sizes or size <= self.free() - sum(self._sizes)

    @abc.abstractmethod
    def free(self) -> int:
        """Bytes that can still be allocated."""

    @abc.abstractmethod
    def mark(self) -> Any:
        """What `run` must start behind, and where its result is used: the state of the calling thread's stream."""

    @abc.abstractmethod
    def run(self, mark: Any, work: Callable[[], T]) -> T:
        """The result of some work, in the calling thread, on a stream of its own, when all of it is done."""


class CudaLanes(Lanes):
    """The lanes of a CUDA device.

    Args:
        device: with its index.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._idle: queue.SimpleQueue[torch.cuda.Stream] = queue.SimpleQueue()
        for number in range(LANES):
            self._idle.put(side_stream(device, "solves", number))
        # PyTorch loads its library for linear algebra at the first call, which must not come from two threads at once
        # (https://github.com/pytorch/pytorch/issues/90613).
        torch.linalg.cholesky_ex(torch.ones(1, 1, device=device))

    def free(self) -> int:
        return free_on_device(self._device)

    def mark(self) -> tuple[torch.cuda.Stream, torch.cuda.Event]:
        current = torch.cuda.current_stream(self._device)
        return current, current.record_event()

    def run(self, mark: tuple[torch.cuda.Stream, torch.cuda.Event], work: Callable[[], T]) -> T:
        caller, event = mark
        stream = self._idle.get()
        try:
            with torch.cuda.stream(stream):
                stream.wait_event(event)
                try:
                    result = work()
                finally:
                    stream.synchronize()
        finally:
            self._idle.put(stream)
        for tensor in _tensors(result):
            if tensor.device == self._device:
                tensor.record_stream(caller)
        return result


def lanes_of(device: torch.device) -> Lanes | None:
    """The lanes of a device; None for one without streams."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return _lanes(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _lanes(index: int) -> Lanes:
    return CudaLanes(torch.device("cuda", index))


def _tensors(result: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested containers and dataclasses."""
    for leaf in pytree.tree_leaves(result):
        if isinstance(leaf, torch.Tensor):
            yield leaf
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            yield from _tensors(list(vars(leaf).values()))
