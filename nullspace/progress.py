"""How far a long job is: what the engine reports, and a bar for those who want no more than that."""

from __future__ import annotations

from collections.abc import Callable

from tqdm import tqdm

Progress = Callable[[str, int, int | None, int], None]
"""`(stage, done, total, tokens)`: the stage's name, steps done, steps in all where known, and tokens read so far."""


def reporter(progress: bool | Progress, *, bars: bool = True) -> Progress:
    """The callable for a public function's `progress` argument: bars for True, silence for False, or the caller's own.

    Args:
        progress: the argument.
        bars: False in a process that leaves them to another one.
    """
    if callable(progress):
        return progress
    return _Bars() if progress and bars else _silent


def _silent(stage: str, done: int, total: int | None, tokens: int) -> None:
    pass


class _Bars:
    """One tqdm bar a stage, closed with its last step. Stages that take turns share a line until one of them is done."""

    def __init__(self) -> None:
        self._open: dict[str, tqdm] = {}

    def __call__(self, stage: str, done: int, total: int | None, tokens: int) -> None:
        if stage not in self._open:
            self._open[stage] = tqdm(total=total, desc=stage, position=0)
        bar = self._open[stage]
        bar.update(done - bar.n)
        seconds = bar.format_dict["elapsed"]
        if tokens and seconds > 0:
            bar.set_postfix_str(f"{tokens / seconds:,.0f} tokens/s")
        if done == total:
            self._open.pop(stage).close()
