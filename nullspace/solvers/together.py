"""`decompose`: the sites of a stream, solved in threads side by side where that is faster, in the stream's order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

import torch

from nullspace.solvers.cost import side_by_side
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


def decompose(stream: Iterator[tuple[S, C]], solve: Callable[[S, C], T]) -> Iterator[T]:
    """`solve` of every site, in the stream's order.

    A small site is solved in the pool even when it is the only one: with one thread its bits do not depend on the others.

    Args:
        stream: yields (site, covariance), as `stream_covariances` does; no covariance is held longer than it takes to solve it.
        solve: does the linear algebra; runs in a thread of its own, with PyTorch's default modes.
    """
    for group in _groups(stream):
        yield from _solved(group, solve)


def _groups(stream: Iterator[tuple[S, C]]) -> Iterator[list[tuple[S, C]]]:
    """The sites that are solved together, all drawn before the first is solved: the model may have to run for the next one."""
    group: list[tuple[S, C]] = []
    size = 0
    for pair in stream:
        group.append(pair)
        d = pair[1].d_in
        size += 4 * d * d
        together = side_by_side(d, pair[1].device)
        del pair  # the consumer frees the sums, which this name would keep
        if together == 1 or len(group) >= SITES_PER_THREAD * together or size >= TOGETHER_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _solved(group: list[tuple[S, C]], solve: Callable[[S, C], T]) -> Iterator[T]:
    small = [pair for pair in group if side_by_side(pair[1].d_in, pair[1].device) > 1]
    large = group[len(small) :]  # at most one: it ends the group
    group.clear()
    if small:
        # The largest first, and those with the most layers: the last ones to run are then short.
        order = sorted(range(len(small)), key=lambda i: (-small[i][1].d_in, -len(small[i][0].members)))
        threads = min(len(small), min(side_by_side(c.d_in, c.device) for _, c in small))
        with one_thread_each(threads) as pool:
            solved = dict(zip(order, pool.map(lambda i: solve(*small[i]), order), strict=True))
        small.clear()
        yield from (solved.pop(i) for i in range(len(order)))
    while large:
        yield solve(*large.pop())
