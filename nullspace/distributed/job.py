"""`Job`: the processes of a `torch.distributed` group and what they exchange; one process alone where no group is initialised.

Errors name a process by its torch rank. All processes make these calls in the same order:

- *exchange*: small Python objects, from each to all. A process that has failed takes part in the next exchange with its error,
  and all raise it, with the rank of that process. So no process waits for one that has failed.
- *reduce*: a sum of vectors at one process, which is computed in the background (`Reduction`).
- *send*, *receive*, *broadcast*: vectors from one process to another, or to all.

A process that dies or hangs raises no error. Each process writes its current step into the group's store (`Job.enters`). If a
collective fails, every process that still runs answers there. The error (`RankLost`) names those that did not, and their last
steps. torchrun cannot do that for a process that hangs: it reports the one whose collective has timed out.
"""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from nullspace.distributed.errors import as_shared, described, rebuilt, was_shared
from nullspace.distributed.loaders import Share
from nullspace.errors import InputError, RankLost

T = TypeVar("T")
# How long a process waits for the answers of the others when a collective has failed.
ANSWER_TIME = datetime.timedelta(seconds=5)
# Keys of the group's store, by rank: the step that a process is in; whether it has answered.
_STEP, _ANSWER = "nullspace/at/{}", "nullspace/here/{}"


class Job:
    """The processes of a `torch.distributed` group, seen from one of them; this process alone if no group is initialised.

    All processes of the group make the same calls with the same arguments, except for their shares of the data.

    Args:
        group: the default group, by default.
        split: False if every loader is one process's share already, though its samplers do not say so.

    Attributes:
        number: of this process in the group, from 0 (torch's rank).
        count: of processes.
        split: as given.

    Raises:
        ValueError: if this process is not in the group.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, *, split: bool = True) -> None:
        joined = dist.is_available() and dist.is_initialized()
        self._group = group
        self.number = dist.get_rank(group) if joined else 0
        self.count = dist.get_world_size(group) if joined else 1
        self.split = split
        self._store = default_store() if self.count > 1 else None
        if self.number < 0:
            raise InputError("this process is not in the group")
        self.enters("its preparations")

    @classmethod
    def alone(cls) -> Job:
        """A job of this process alone, even if a group is initialised."""
        job = cls()
        job.number, job.count, job._store = 0, 1, None
        return job

    @property
    def first(self) -> bool:
        """Whether this is process 0, which prints and writes for all."""
        return self.number == 0

    # ---- exchanges

    def exchange(self, value: T) -> list[T]:
        """Collective: the values of all processes, in the order of their numbers.

        Raises:
            ValueError, RuntimeError, …: on all processes if one of them has failed (`sharing_errors`): of the same kind, naming it.
            RankLost: if a process has died.
        """
        return [value] if self.count == 1 else self._exchange(value, None)

    @contextlib.contextmanager
    def sharing_errors(self) -> Iterator[None]:
        """Context manager: an exception inside is raised on all processes, by their next exchange."""
        try:
            yield
        except Exception as error:
            if self.count > 1 and not was_shared(error):
                self._exchange(None, error)
            raise

    def check_same(self, **facts: Any) -> None:
        """Collective: raise `ValueError`, naming the fact and the process, unless all processes give the same facts."""
        first, *others = self.exchange(facts)
        for number, theirs in enumerate(others, start=1):
            different = next((name for name in facts if first.get(name) != theirs.get(name)), None)
            if different is not None:
                raise InputError(
                    f"{different} is not the same on all ranks: {_short(first.get(different))} on rank 0, "
                    f"{_short(theirs.get(different))} on rank {number}"
                )

    def _exchange(self, value: Any, error: Exception | None) -> list[Any]:
        failure = None if error is None else described(error)
        gathered: list[Any] = [None] * self.count
        with self._in_touch("an exchange"):
            dist.all_gather_object(gathered, (failure, value), group=self._group)
        failed = [(number, *theirs) for number, (theirs, _) in enumerate(gathered) if theirs is not None]
        if not failed:
            return [value for _, value in gathered]
        number, kind, text = failed[0]
        if len(failed) == self.count and all(other == text for *_, other in failed):
            assert error is not None
            raise as_shared(error)  # all have raised the same by themselves
        more = f" (and {len(failed) - 1} more ranks failed)" if len(failed) > 1 else ""
        raise rebuilt(kind, f"rank {number}: {text}{more}") from error

    # ---- lost processes

    def enters(self, what: str) -> None:
        """Write the current step into the group's store, for the error of the others if this process is lost in it."""
        if self._store is not None:
            with contextlib.suppress(RuntimeError):  # the next exchange raises it
                self._store.set(_STEP.format(self._global(self.number)), what)

    @contextlib.contextmanager
    def _in_touch(self, what: str) -> Iterator[None]:
        """Context manager for a collective: an error inside is raised as `RankLost`, which names the processes that are lost."""
        try:
            yield
        except RuntimeError as error:  # marked as shared: no exchange is possible without the process that is lost
            missing, who = self._missing()
            text = f"rank {self.number} of {self.count} has lost {who} in {what}: {error}"
            left = min((k for k in range(self.count) if k not in missing), default=self.number)
            raise as_shared(RankLost(text, reports=self.number == left)) from error

    def _missing(self) -> tuple[list[int], str]:
        """The processes that do not answer, and a text that names them."""
        if self._store is None:
            return [], "the others"
        until = time.monotonic() + ANSWER_TIME.total_seconds()
        try:
            self._store.set(_ANSWER.format(self._global(self.number)), "")
            missing = [k for k in range(self.count) if k != self.number and not self._answers(k, until)]
            words = [f"rank {k} ({self._last_step(k)})" for k in missing]
        except RuntimeError:
            return [], "the others and the group's store (which rank 0 holds, if torchrun does not)"
        if not missing:
            return [], "the connection to the others (all of them still run)"
        return missing, " and ".join(words[:4]) + (f" and {len(words) - 4} more" if len(words) > 4 else "")

    def _answers(self, number: int, until: float) -> bool:
        assert self._store is not None
        left = datetime.timedelta(seconds=max(until - time.monotonic(), 0.05))
        try:
            self._store.wait([_ANSWER.format(self._global(number))], left)
        except RuntimeError:
            self._store.num_keys()  # raises if the store is lost
            return False
        return True

    def _last_step(self, number: int) -> str:
        assert self._store is not None
        key = _STEP.format(self._global(number))
        return f"last seen in {self._store.get(key).decode()}" if self._store.check([key]) else "which never began"

    @contextlib.contextmanager
    def naming_rank(self, what: str) -> Iterator[None]:
        """Context manager for work where no exchange is possible: an error inside is raised here alone, and names this process.

        The others wait until it exits or the group's timeout ends.
        """
        try:
            yield
        except Exception as error:
            if was_shared(error):
                raise
            kind, text = described(error)
            raise rebuilt(kind, f"rank {self.number}: {text} (in {what}; the other ranks wait for it: end them)") from error

    # ---- the data

    def share(self, loader: Iterable[Any]) -> Share:
        """The batches of a loader that this process reads. Iterating over them is collective."""
        compare = self._compare if self.count > 1 else None
        return Share(loader, self.number, self.count, split=self.split, compare=compare)

    def check_share(self, share: Share) -> None:
        """Collective: raise `ValueError` on all processes unless the shares that were read are of one loader and not all empty."""
        self._compare(share.digest, again=True)
        if sum(self.exchange(share.read)) == 0:
            raise InputError("the loader is empty: there is nothing to calibrate on")

    def _compare(self, digest: str | None, *, again: bool = False) -> None:
        first, *others = self.exchange(digest)
        other = next((number for number, theirs in enumerate(others, start=1) if theirs != first), None)
        if other is not None:
            where = " after the first one" if again else ""
            raise InputError(
                f"ranks 0 and {other} were given different batches{where}, and a loader is split between the ranks: give all of "
                "them the same batches in the same order (shuffled by the same seed), or each its own share: a DataLoader with a "
                "DistributedSampler, or job=Job(split=False)"
            )

    # ---- tensors

    def reduce(self, vector: torch.Tensor, owner: int, what: str) -> Reduction:
        """Start to sum a vector over the processes, in place at its owner.

        Args:
            vector: this process's summand, on any device; not to be used before `Reduction.wait`.
            owner: number of the process that gets the sum.
            what: names the reduction in an error.
        """
        sent = vector.to(self._device)
        with self._in_touch(what):
            work = dist.reduce(sent, self._global(owner), op=dist.ReduceOp.SUM, group=self._group, async_op=True)
        return Reduction(self, work, vector, sent, what, is_owner=owner == self.number)

    def send(self, vector: torch.Tensor, receiver: int, what: str) -> None:
        """Send a vector to another process, which calls `receive`."""
        with self._in_touch(what):
            dist.send(vector.to(self._device), self._global(receiver % self.count), group=self._group)

    def receive(self, like: torch.Tensor, sender: int, what: str) -> torch.Tensor:
        """The vector that another process sends: of the shape and dtype of `like`, on the device of the group's backend."""
        vector = torch.empty_like(like, device=self._device)
        with self._in_touch(what):
            dist.recv(vector, self._global(sender % self.count), group=self._group)
        return vector

    def broadcast(self, tensor: torch.Tensor, owner: int) -> torch.Tensor:
        """Collective: the owner's tensor, on the CPU of every process. The others give its shape and dtype, also on "meta"."""
        own = owner == self.number
        there = tensor.to(self._device) if own else torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
        with self._in_touch("a broadcast"):
            dist.broadcast(there, self._global(owner), group=self._group)
        return tensor if own else there.cpu()

    # ---- ranks and devices

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks of the processes in the default group."""
        if not (dist.is_available() and dist.is_initialized()):
            return (0,)
        return (dist.get_rank(),) if self.count == 1 else tuple(self._global(number) for number in range(self.count))

    @property
    def _device(self) -> torch.device:
        """The device of tensors that are sent: the same kind on all processes."""
        over_nccl = "nccl" in dist.get_backend_config(self._group) and torch.cuda.is_available()
        return torch.device("cuda", torch.cuda.current_device()) if over_nccl else torch.device("cpu")

    def _global(self, number: int) -> int:
        return number if self._group is None else dist.get_global_rank(self._group, number)


class Reduction:
    """A sum over the processes of a job that is being computed."""

    def __init__(self, job: Job, work: dist.Work, vector: torch.Tensor, sent: torch.Tensor, what: str, *, is_owner: bool) -> None:
        self._job, self._work, self._vector, self._sent, self._what, self._is_owner = job, work, vector, sent, what, is_owner

    def wait(self) -> None:
        """Block until it is done. The owner's vector then holds the sum; the others' values are undefined."""
        with self._job._in_touch(self._what):
            self._work.wait()
        if self._is_owner and self._sent is not self._vector:
            self._vector.copy_(self._sent)


def default_store() -> dist.Store:
    """The store of the default process group."""
    return dist.distributed_c10d._get_default_store()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
