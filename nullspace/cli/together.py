"""Under `torchrun`: the group in which processes calibrate together, and the process that prints and writes."""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
from collections.abc import Iterator
from typing import Any

from nullspace.cli.interrupts import Terminated

LINGER, END = 18, 8  # seconds; torchrun kills after 30


def is_one_of_several() -> bool:
    """Whether `torchrun` has started this process, and others with it."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "MASTER_ADDR" in os.environ


def is_first() -> bool:
    """Whether this process prints, and writes what one process alone has to write."""
    return not is_one_of_several() or int(os.environ["RANK"]) == 0


@contextlib.contextmanager
def joined(minutes: float | None) -> Iterator[bool]:
    """Context manager: inside, this process is in the group that `torchrun` has started, if it has. Yields whether it takes part.

    Args:
        minutes: that one process waits for the others; None for a command that the first process does alone.
    """
    if minutes is None or not is_one_of_several():
        yield is_first()
        return
    import torch
    import torch.distributed as dist

    local = int(os.environ.get("LOCAL_RANK", "0"))
    own_gpu = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > local
    if own_gpu:
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if own_gpu else "gloo", timeout=datetime.timedelta(minutes=minutes))
    before = signal.signal(signal.SIGTERM, _linger)
    try:
        yield True
    finally:
        signal.signal(signal.SIGTERM, before)
        dist.destroy_process_group()


def _linger(*_: Any) -> None:
    """Handler of SIGTERM, which `torchrun` sends to all when one process is lost: stay until the error that names it is printed."""

    def end(*_: Any) -> None:
        signal.signal(signal.SIGALRM, die)  # if what this process waits for does not end
        signal.alarm(END)
        raise Terminated(signal.SIGTERM)

    def die(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, end)
    signal.alarm(LINGER)
