"""How long tests wait for other processes: for as long as these are at work, however little of the machine they get.

A limit in seconds of the wall clock fails on a slow or busy machine. These limits count the CPU time that the processes have had.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterable
from typing import Any

import psutil

# Processes that used less than IDLE_CPU seconds of CPU time in IDLE_SECONDS wait for something that does not come.
IDLE_SECONDS = 60.0
IDLE_CPU = 3.0
# psutil reads the table of all processes to find the descendants, and would take a third of a core if it did so at every turn.
LOOK_SECONDS = 0.5
# More CPU time than this is an endless loop: the longest group takes about 60 s.
MOST_CPU = 900.0
# Of `reference_work` on a core of an AMD EPYC of 2021 with nothing else to do.
REFERENCE_SECONDS = 0.04


class Patience:
    """Tells work from a standstill.

    Args:
        processes: ids; their descendants count too.
    """

    def __init__(self, processes: Iterable[int]) -> None:
        self._processes = list(processes)
        self._used: dict[int, float] = {}
        self._since, self._at = time.monotonic(), self._cpu()

    def check(self) -> None:
        """Fail if the processes stand still, or work without end."""
        used = self._cpu()
        assert used < MOST_CPU, f"the processes have used {used:.0f} s of CPU time and are not done"
        now = time.monotonic()
        if used - self._at >= IDLE_CPU:
            self._since, self._at = now, used
        assert now - self._since < IDLE_SECONDS, f"the processes have done nothing for {now - self._since:.0f} s"

    def _cpu(self) -> float:
        """Seconds of CPU time so far; of a process that has ended, what it had when it was last looked at."""
        for process in self._processes:
            with contextlib.suppress(psutil.Error):
                for each in (psutil.Process(process), *psutil.Process(process).children(recursive=True)):
                    with contextlib.suppress(psutil.Error):
                        self._used[each.pid] = sum(each.cpu_times()[:2])
        return sum(self._used.values())


def wait_for(condition: Callable[[], Any], processes: Iterable[int]) -> None:
    """Return as soon as the condition holds; fail if the processes stand still before."""
    patience, looked = Patience(processes), time.monotonic()
    while not condition():
        if time.monotonic() - looked >= LOOK_SECONDS:
            patience.check()
            looked = time.monotonic()
        time.sleep(0.005)


def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` of text with both outputs kept, for as long as the command is at work."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options) as process:
        return finish(process)


def finish(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """Wait for a process that was started with pipes, for as long as it is at work; kill it if it stands still."""
    patience = Patience([process.pid])
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                out, err = process.communicate(timeout=1)
                return subprocess.CompletedProcess(process.args, process.returncode, out, err)
            patience.check()
    except BaseException:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
        raise


def reference_work() -> None:
    """Some tens of milliseconds of one core."""
    sum(i * i for i in range(600_000))


def slowness() -> float:
    """By how much this process, on this machine, with what else runs here, is slower than the reference; at least 1.

    For limits that the code under test counts by the wall clock, such as a process group's timeout.
    """
    began = time.perf_counter()
    reference_work()
    return max(1.0, (time.perf_counter() - began) / REFERENCE_SECONDS)
