"""Progress of long jobs: the callable that the engine reports to, and bars."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tqdm import tqdm

Progress = Callable[[str, int, int | None, int], None]
"""`(stage, done, total, tokens)`: the stage's name, steps done, steps in all where known, and tokens read so far."""


def reporter(progress: bool | Progress, *, bars: bool = True) -> Progress:
    """The callable for a public function's `progress` argument: bars for True, nothing for False, or the caller's own.

    Args:
        progress: the argument.
        bars: False in a process that leaves them to another one.
    """
    if callable(progress):
        return progress
    return Bars() if progress and bars else _ignored


def _ignored(stage: str, done: int, total: int | None, tokens: int) -> None:
    pass


class Bars:
    """A `Progress`: one tqdm bar a stage, closed with its last step. Stages that take turns share a line until one of them is done.

    Args:
        new: makes a bar from arguments of `tqdm.tqdm`.
    """

    def __init__(self, new: Callable[..., tqdm] = tqdm) -> None:
        self._new = new
        self._open: dict[str, tqdm] = {}
        self._drawn: tqdm | None = None

    def __call__(self, stage: str, done: int, total: int | None, tokens: int) -> None:
        if stage not in self._open:
            # The rate is that of the whole stage: steps differ, and in a layerwise run other stages come between. What an earlier
            # run has done counts for nothing. Each report may be drawn, so that the time left is known from the first step on.
            options: dict[str, Any] = {"initial": done, "smoothing": 0, "miniters": 0}
            self._open[stage] = self._new(total=total, desc=stage, position=0, **options)
        bar = self._open[stage]
        seconds = bar.format_dict["elapsed"]
        if tokens and seconds > 0:
            bar.set_postfix_str(f"{tokens / seconds:,.0f} tokens/s", refresh=False)
        bar.total = total
        bar.update(done - bar.n)
        if self._drawn is not None and self._drawn is not bar:
            self._drawn.clear()
            bar.refresh()
        self._drawn = bar
        if done == total:
            self._open.pop(stage).close()

    def close(self) -> None:
        """Draw the open bars for the last time. A stage that is reported later gets a new bar."""
        while self._open:
            self._open.pop(next(iter(self._open))).close()
