"""Seconds and milliseconds on a device, with what happens only once set apart."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, TypeVar

import torch

T = TypeVar("T")


class Times(NamedTuple):
    """Of some variants that took turns.

    Attributes:
        first_s: seconds of the first call of each on the host's clock, compiling included.
        ms: milliseconds of each round.
    """

    first_s: dict[str, float]
    ms: dict[str, list[float]]

    def median(self, name: str) -> float:
        """Milliseconds."""
        return statistics.median(self.ms[name])


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """Seconds of a call on the host's clock, with all that it began on the device, and its result."""
    synchronize(device)
    began = time.perf_counter()
    result = run()
    synchronize(device)
    return time.perf_counter() - began, result


def interleaved(
    variants: Mapping[str, Callable[[], Any]],
    device: torch.device,
    *,
    rounds: int = 20,
    slow: Collection[str] = (),
    slow_rounds: int = 3,
    warm_up: int = 3,
) -> Times:
    """Every variant once a round, so that a slow period of the machine affects all.

    On a GPU a round is measured by events; a sleep of the device before it gives the host time to queue the launch.

    Args:
        variants: name → what is timed.
        device: where it runs.
        rounds, warm_up: timed, and before them not timed.
        slow: variants that get `slow_rounds` rounds and one call to warm up.
        slow_rounds: see `slow`.
    """
    first = {name: timed(run, device)[0] for name, run in variants.items()}
    for name, run in variants.items():
        for _ in range(0 if name in slow else warm_up - 1):
            run()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds):
        for name, run in variants.items():
            if name not in slow or number < slow_rounds:
                times[name].append(_milliseconds(run, device))
    return Times(first, times)


def _milliseconds(run: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        return 1e3 * timed(run, device)[0]
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(2_000_000)  # about a millisecond
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
