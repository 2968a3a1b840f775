"""Sites as they come from a stream, solved as many at once as is best, and forgotten on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

import torch

from nullspace.solvers.eigen import TOGETHER_BYTES, TURNS, one_thread_each, side_by_side


class Named(Protocol):
    """What a matrix is of: the layers that share it."""

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

    A small one goes through the pool even when it comes alone: with one thread its bits do not depend on who is beside it.

    Args:
        stream: what `stream_covariances` yields; nothing here holds a covariance longer than it takes to solve it.
        solve: does the linear algebra; runs in a thread of its own, with PyTorch's default modes.
    """
    for ready in _together(stream):
        yield from _solved(ready, solve)


def _together(stream: Iterator[tuple[S, C]]) -> Iterator[list[tuple[S, C]]]:
    """Sites that are to be solved together, drawn before that begins: the model may have to run for the next one.

    Several a thread, so that no thread waits for one that has a larger site; but no more than weigh little.
    """
    ready: list[tuple[S, C]] = []
    weight = 0
    for pair in stream:
        ready.append(pair)
        d = pair[1].d_in
        weight += 4 * d * d
        together = side_by_side(d, pair[1].device)
        del pair  # the consumer frees the sums, and no name here holds them back
        if together == 1 or len(ready) >= TURNS * together or weight >= TOGETHER_BYTES:
            yield ready
            ready, weight = [], 0
    if ready:
        yield ready


def _solved(ready: list[tuple[S, C]], solve: Callable[[S, C], T]) -> Iterator[T]:
    small = [pair for pair in ready if side_by_side(pair[1].d_in, pair[1].device) > 1]
    large = ready[len(small) :]  # at most one: it ends the drawing
    ready.clear()
    if small:
        # The largest first, and those with the most layers: what is left at the end is short.
        order = sorted(range(len(small)), key=lambda i: (-small[i][1].d_in, -len(small[i][0].members)))
        threads = min(len(small), min(side_by_side(c.d_in, c.device) for _, c in small))
        with one_thread_each(threads) as pool:
            solved = dict(zip(order, pool.map(lambda i: solve(*small[i]), order), strict=True))
        small.clear()
        yield from (solved.pop(i) for i in range(len(order)))
    while large:
        yield solve(*large.pop())
