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
    """One tqdm bar a stage; a stage ends when the next one begins or its last step is done."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._stage = ""

    def __call__(self, stage: str, done: int, total: int | None, tokens: int) -> None:
        if stage != self._stage or self._bar is None:
            if self._bar is not None:
                self._bar.close()
            self._stage, self._bar = stage, tqdm(total=total, desc=stage)
        self._bar.update(done - self._bar.n)
        seconds = self._bar.format_dict["elapsed"]
        if tokens and seconds > 0:
            self._bar.set_postfix_str(f"{tokens / seconds:,.0f} tokens/s")
        if done == total:
            self._bar.close()
            self._bar, self._stage = None, ""
