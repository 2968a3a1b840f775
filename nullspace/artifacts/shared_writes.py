"""Writing by several processes: each a part of one directory, or one process for all."""

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
from nullspace.errors import Busy, OutputError

# Seconds to wait for the holder of a lock to announce itself to its group, and for written files to appear on all machines.
HANDOVER = 5.0
# Path → how often this process has called `written_once` for it.
_saves: dict[Path, int] = {}


@contextlib.contextmanager
def new_shared_directory(out: str | os.PathLike[str], job: Job, *, overwrite: bool) -> Iterator[Path]:
    """Context manager: `nullspace.artifacts.store.new_directory`, filled by all processes of a job, on a shared file system."""
    if job.first:
        with new_directory(out, overwrite=overwrite) as part:
            job.exchange(part)
            yield part
            job.exchange(None)
    else:
        yield job.exchange(Path())[0]
        job.exchange(None)
    job.exchange(None)  # after the rename


def written_once(out: str | os.PathLike[str], write: Callable[[], object]) -> None:
    """Write `out` once per default process group. One process may call this, or all of them; no process waits for others to call.

    The first caller locks `out` and writes. Callers that come during the write or after it return when it is done, or raise its
    error with the writer's rank. The n-th calls of all processes for one `out` belong together. If the writer dies, the next
    caller writes.

    Args:
        out: path of the output.
        write: writes it completely or not at all.

    Raises:
        FileExistsError: if a run outside of this group is writing to `out`.
        OSError: if a process on another machine has written `out`, and it does not appear on this one.
    """
    shared = default_store() if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 else None
    if shared is None:
        write()
        return
    output = resolved(out)
    number = _saves[output] = _saves.get(output, 0) + 1
    at_work, done = f"nullspace/writing/{output}", f"nullspace/written/{output}/{number}"
    until = time.monotonic() + HANDOVER
    while not shared.check([done]):
        try:
            with locked(output):
                if not shared.check([done]):
                    shared.set(at_work, "yes")
                    shared.set(done, json.dumps(_outcome(write)))
                    shared.set(at_work, "no")
        except Busy:  # held by a process of this group if `at_work` says so, which it sets after it has acquired the lock
            if shared.check([at_work]) and shared.get(at_work) == b"yes":
                until = time.monotonic() + HANDOVER
            elif time.monotonic() > until:
                raise
            time.sleep(0.02)
    rank, host, kind, text = json.loads(shared.get(done))
    if kind is not None:
        raise rebuilt(kind, f"rank {rank}: {text}")
    until = time.monotonic() + HANDOVER  # network file systems show new files with a delay
    while host != socket.gethostname() and not output.exists():
        if time.monotonic() > until:
            raise OutputError(f"{out} was written by rank {rank} on {host} and is not here: choose a place that all processes see")
        time.sleep(0.1)


def _outcome(write: Callable[[], object]) -> tuple[int, str, int | None, str]:
    """Call `write`; returns rank, host, and the kind and text of its error, if any."""
    rank, host = dist.get_rank(), socket.gethostname()
    try:
        write()
    except Exception as error:
        return rank, host, *described(error)
    return rank, host, None, ""
