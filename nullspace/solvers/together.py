"""`decompose`: the sites of a stream, solved side by side where that is faster, in the stream's order.

Sites on the host are drawn in groups, and solved in threads before the next one is drawn. A site on a CUDA device is handed to a
thread with a stream of its own (`nullspace.solvers.lanes`), and the next one is drawn meanwhile: the model may have to run for it.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, Protocol, TypeVar

import torch

from nullspace.solvers.cost import decomposition_cost, side_by_side
from nullspace.solvers.lanes import LANES, Lanes, lanes_of
from nullspace.solvers.threads import one_thread_each

# Sites that are solved together are drawn from the stream first: at most so many a thread, so that no thread idles while another
# one solves a larger site, and of triangles that take at most so many bytes.
SITES_PER_THREAD = 4
TOGETHER_BYTES = 2**25


class Named(Protocol):
    """What a matrix belongs to: the layers that share it."""

    @property
    def members(self) -> Sequence[str]: ...


class Sized(Protocol):
    """What is solved: a matrix of order `d_in`, on a device."""

    @property
    def d_in(self) -> int: ...
    @property
    def device(self) -> torch.device: ...


S = TypeVar("S", bound=Named)
C = TypeVar("C", bound=Sized)
T = TypeVar("T")


def decompose(stream: Iterator[tuple[S, C]], solve: Callable[[S, C], T], *, rank: int | None = None) -> Iterator[T]:
    """`solve` of every site, in the stream's order.

    A small site on the host is solved in the pool even when it is the only one: with one thread its bits do not depend on the
    others. An error of `solve` is raised in its site's place, and one of the stream behind the results of a GPU's sites that were
    drawn before.

    Args:
        stream: yields (site, covariance), as `stream_covariances` does; no covariance is held longer than it takes to solve it.
        solve: does the linear algebra; runs in a thread of its own, with PyTorch's default modes.
        rank: how many eigenvectors `solve` computes, by which its memory on a GPU is counted; None: all.
    """
    group, queue = _Group(solve), _Queue(solve, rank)
    failure: Exception | None = None
    with contextlib.closing(queue):
        while True:
            try:
                pair = next(stream, None)
            except Exception as error:
                failure = error
                break
            if pair is None:
                break
            lanes, drawn = lanes_of(pair[1].device), [pair]
            del pair  # the consumer frees the sums, which this name would keep
            yield from group.rest() if lanes is not None else queue.rest()
            if lanes is not None:
                queue.add(drawn, lanes)
                yield from queue.done()
            elif group.add(drawn):
                yield from group.rest()
        yield from queue.rest()
        if failure is None:
            yield from group.rest()
    if failure is not None:
        try:
            raise failure
        finally:
            del failure  # its traceback holds this frame


def make_room(device: torch.device, size: int) -> None:
    """Wait until `size` bytes are free on a device beside what its solves may take, or none of them is left at work."""
    lanes = lanes_of(device)
    if lanes is not None:
        lanes.make_room(size)


class _Group(Generic[S, C, T]):
    """The sites on the host that are solved together, all drawn before the first is solved."""

    def __init__(self, solve: Callable[[S, C], T]) -> None:
        self._solve = solve
        self._pairs: list[tuple[S, C]] = []
        self._size = 0

    def add(self, drawn: list[tuple[S, C]]) -> bool:
        """Take the one pair in a list; returns whether the group is full."""
        self._pairs.append(drawn.pop())
        covariance = self._pairs[-1][1]
        self._size += 4 * covariance.d_in**2
        together = side_by_side(covariance.d_in, covariance.device)
        return together == 1 or len(self._pairs) >= SITES_PER_THREAD * together or self._size >= TOGETHER_BYTES

    def rest(self) -> Iterator[T]:
        """Solve the group, and begin another one."""
        group, self._pairs, self._size = self._pairs, [], 0
        small = [pair for pair in group if side_by_side(pair[1].d_in, pair[1].device) > 1]
        large = group[len(small) :]  # at most one: it ends the group
        group.clear()
        if small:
            # The largest first, and those with the most layers: the last ones to run are then short.
            order = sorted(range(len(small)), key=lambda i: (-small[i][1].d_in, -len(small[i][0].members)))
            threads = min(len(small), min(side_by_side(c.d_in, c.device) for _, c in small))
            with one_thread_each(threads) as pool:
                solved = dict(zip(order, pool.map(lambda i: self._solve(*small[i]), order), strict=True))
            small.clear()
            yield from (solved.pop(i) for i in range(len(order)))
        while large:
            yield self._solve(*large.pop())


def _solved_on(lanes: Lanes, mark: Any, drawn: list[tuple[S, C]], solve: Callable[[S, C], T]) -> T:
    """`solve` of the one pair in a list. The list holds the sums until the lane has done with them, and not longer."""
    try:
        return lanes.run(mark, lambda: solve(*drawn[0]))
    finally:
        drawn.clear()


class _Queue(Generic[S, C, T]):
    """The sites on GPUs that are being solved, in their order."""

    def __init__(self, solve: Callable[[S, C], T], rank: int | None) -> None:
        self._solve, self._rank = solve, rank
        self._futures: collections.deque[Future[T]] = collections.deque()
        self._pools: dict[Lanes, ThreadPoolExecutor] = {}

    def add(self, drawn: list[tuple[S, C]], lanes: Lanes) -> None:
        """Take the one pair in a list, and begin to solve it when there is room."""
        d, kind = drawn[0][1].d_in, drawn[0][1].device.type
        size, *_ = decomposition_cost(d, self._rank or d, kind)
        mark = lanes.mark()
        if lanes not in self._pools:
            self._pools[lanes] = ThreadPoolExecutor(LANES, "decomposition")
        lanes.begin(size)
        future = self._pools[lanes].submit(_solved_on, lanes, mark, drawn, self._solve)
        future.add_done_callback(lambda _: lanes.end(size))
        self._futures.append(future)

    def done(self) -> Iterator[T]:
        """The results at the head of the queue that are there."""
        while self._futures and self._futures[0].done():
            yield self._futures.popleft().result()

    def rest(self) -> Iterator[T]:
        """All results, when they are there."""
        while self._futures:
            yield self._futures.popleft().result()

    def close(self) -> None:
        """Wait for the solves at work, and drop their results."""
        for pool in self._pools.values():
            pool.shutdown(wait=True, cancel_futures=True)
