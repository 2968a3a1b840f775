"""Directories that several processes write: each a part of one, or one of them for all."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch.distributed as dist

from nullspace.artifacts.locks import locked
from nullspace.artifacts.store import new_directory, resolved
from nullspace.distributed import Job
from nullspace.distributed.errors import described, rebuilt
from nullspace.distributed.job import default_store
from nullspace.errors import Busy

# Seconds in which a process that has acquired a lock says so to its group, and in which all machines see what one has written.
HANDOVER = 5.0
# Place → how often this process was asked to write it.
_saves: dict[Path, int] = {}


@contextlib.contextmanager
def new_shared_directory(out: str | os.PathLike[str], job: Job, *, overwrite: bool) -> Iterator[Path]:
    """`nullspace.artifacts.store.new_directory`, filled by all processes of a job, on a file system that all of them see."""
    if job.first:
        with new_directory(out, overwrite=overwrite) as part:
            job.exchange(part)
            yield part
            job.exchange(None)
    else:
        yield job.exchange(Path())[0]
        job.exchange(None)
    job.exchange(None)  # it has its name


def written_once(out: str | os.PathLike[str], write: Callable[[], object]) -> None:
    """Call what writes `out`, in one process of the default group if several call this.

    All of them may call it, or any one. None waits for others to call it: the first to come holds the lock of `out` and writes;
    those that come while it writes, or afterwards, return when it is done, or raise its error, with its rank. A process's n-th call
    for one `out` is the n-th of every other process too. If the writing process dies, the next one writes.

    Args:
        out: the place.
        write: writes it whole or not at all.

    Raises:
        FileExistsError: if a run outside of this group is writing there.
        OSError: if a process of another machine has written, and `out` is not there on this one.
    """
    shared = default_store() if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 else None
    if shared is None:
        write()
        return
    place = resolved(out)
    number = _saves[place] = _saves.get(place, 0) + 1
    at_work, done = f"nullspace/writing/{place}", f"nullspace/written/{place}/{number}"
    until = time.monotonic() + HANDOVER
    while not shared.check([done]):
        try:
            with locked(place):
                if not shared.check([done]):
                    shared.set(at_work, "yes")
                    shared.set(done, json.dumps(_outcome(write)))
                    shared.set(at_work, "no")
        except Busy:  # one of this group, if it says so; it may not have come to that yet
            if shared.check([at_work]) and shared.get(at_work) == b"yes":
                until = time.monotonic() + HANDOVER
            elif time.monotonic() > until:
                raise
            time.sleep(0.02)
    rank, host, kind, text = json.loads(shared.get(done))
    if kind is not None:
        raise rebuilt(kind, f"rank {rank}: {text}")
    until = time.monotonic() + HANDOVER  # network file systems show what is new after a while
    while host != socket.gethostname() and not place.exists():
        if time.monotonic() > until:
            raise OSError(f"{out} was written by rank {rank} on {host} and is not here: choose a place that all processes see")
        time.sleep(0.1)


def _outcome(write: Callable[[], object]) -> tuple[int, str, int | None, str]:
    """Rank, host, and the kind and text of the error, if there was one."""
    rank, host = dist.get_rank(), socket.gethostname()
    try:
        write()
    except Exception as error:
        return rank, host, *described(error)
    return rank, host, None, ""
