"""`Job`: the processes that calibrate together, each with its share of the data, and then with its share of the sites.

Second moments add up, so this approximates nothing. Every process sums what its own batches show; every site is added up once,
over all of them, at the process that is going to solve it (its *owner*), and nobody else keeps it. The engine is
`torch.distributed`: whoever has initialised a process group (`torchrun`, `accelerate launch`) has a job, anybody else is alone,
for whom nothing here costs anything. A process is called by its torch rank; a basis has a rank too, which is another thing.

What goes from process to process, in an order that is the same for all:

- *exchanges*: small Python objects, from each to all. Who has failed takes part in the next exchange with its error, and everybody
  raises it, with the number of the process. Nobody waits for somebody who will not come.
- *reductions*: one a site, to its owner: the lower triangle of Σ x xᵀ, Σ x and a few counts as one float64 vector, d (d + 1) / 2 +
  O(d) numbers. Roots (`precision="qr"`) cannot be added: they meet pairwise, each as large as a triangle, in ⌈log₂ n⌉ rounds of a
  QR decomposition (Demmel et al. 2012, arXiv 0808.2664).

All sites that are known at one time are reduced before the first of them is solved: the owners then solve at the same time. Block
by block, the reductions of one are under way while the next block's forward pass runs, and every process puts its own sites aside
until all have enough to do (`Totals`).

A process that is lost cannot be told anything. Each leaves word in the group's store of what it is about; whoever finds the others
gone calls the roll there, and its error names who has not answered, and where that was last.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from nullspace import store
from nullspace.covariance import Covariance
from nullspace.listening import Listener
from nullspace.locks import Busy, locked
from nullspace.shares import Share
from nullspace.sites import Site

T = TypeVar("T")
# What an error of another process is raised as: the first that it is an instance of.
KINDS: tuple[type[Exception], ...] = (
    ValueError,
    TypeError,
    FileNotFoundError,
    FileExistsError,
    OSError,
    torch.cuda.OutOfMemoryError,
    MemoryError,
    RuntimeError,
)
EMPTY = "the loader is empty: there is nothing to calibrate on"
# Seconds in which a process that has acquired a lock says so to its group, and in which all machines see what one has written.
HANDOVER = 5.0
# How long whoever has lost the others waits for them to answer the roll.
ROLL_CALL = datetime.timedelta(seconds=5)


class RankLost(RuntimeError):
    """A process has died, or does not answer in the time that the group gives it.

    Args:
        text: naming it, and where it was last heard of.
        speaks: whether this process is the first of those that are left, which speaks for them.
    """

    def __init__(self, text: str, *, speaks: bool = True) -> None:
        super().__init__(text)
        self.speaks = speaks


class Job:
    """The processes of a `torch.distributed` group, as one of them sees them; this one alone, if no group is initialised.

    Every process of the group has to call what is called with a job, with the same arguments, but for its share of the data.

    Args:
        group: the default group, by default.
        split: False if every loader is its process's share, though nothing about it says so (`nullspace.shares`): nothing is split.

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
        self._loads = [0.0] * self.count
        self._store = _default_store() if self.count > 1 else None
        if self.number < 0:
            raise ValueError("this process is not in the group")
        self.at("its preparations")

    @classmethod
    def alone(cls) -> Job:
        """This process without others, whatever group it is in: for what one of them does for itself."""
        job = cls()
        job.number, job.count, job._loads, job._store = 0, 1, [0.0], None
        return job

    @property
    def first(self) -> bool:
        """Whether this is the process that speaks for all."""
        return self.number == 0

    # ---- exchanges

    def exchange(self, value: T) -> list[T]:
        """What each process gives here, in the order of their numbers.

        Raises:
            ValueError, RuntimeError, …: on all of them, if one had an error to tell instead: of its kind, naming the process.
        """
        return [value] if self.count == 1 else self._exchange(value, None)

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """Whatever exception ends the block is told to the others, at their next exchange, and raised on all."""
        try:
            yield
        except Exception as error:
            if self.count > 1 and not was_told(error):
                self._exchange(None, error)
            raise

    def check_same(self, **facts: Any) -> None:
        """Raise `ValueError`, naming the fact and the process, unless all processes have the same."""
        first, *others = self.exchange(facts)
        for number, theirs in enumerate(others, start=1):
            different = next((name for name in facts if first.get(name) != theirs.get(name)), None)
            if different is not None:
                raise ValueError(
                    f"{different} is not the same on all ranks: {_short(first.get(different))} on rank 0, "
                    f"{_short(theirs.get(different))} on rank {number}"
                )

    def _exchange(self, value: Any, error: Exception | None) -> list[Any]:
        told = None if error is None else (_kind_of(error), str(error) or type(error).__name__)
        found: list[Any] = [None] * self.count
        with self._in_touch("an exchange"):
            dist.all_gather_object(found, (told, value), group=self._group)
        failed = [(number, *said) for number, (said, _) in enumerate(found) if said is not None]
        if not failed:
            return [value for _, value in found]
        number, kind, text = failed[0]
        if len(failed) == self.count and all(other == text for *_, other in failed):
            assert error is not None
            raise _marked(error)  # all have found out the same by themselves
        more = f" (and {len(failed) - 1} more ranks failed)" if len(failed) > 1 else ""
        raise _marked(KINDS[kind](f"rank {number}: {text}{more}")) from error

    # ---- those that are lost

    def at(self, what: str) -> None:
        """Leave word of what this process is about, in case that it is lost there."""
        if self._store is not None:
            with contextlib.suppress(RuntimeError):  # the next exchange will tell
                self._store.set(_AT.format(self._global(self.number)), what)

    @contextlib.contextmanager
    def _in_touch(self, what: str) -> Iterator[None]:
        """Around what the others take part in: an error there is nobody's but the network's, and is raised with their names."""
        try:
            yield
        except RuntimeError as error:  # a process that is gone cannot be told anything: nobody is to try
            missing, who = self._missing()
            text = f"rank {self.number} of {self.count} has lost {who} in {what}: {error}"
            left = min((k for k in range(self.count) if k not in missing), default=self.number)
            raise _marked(RankLost(text, speaks=self.number == left)) from error

    def _missing(self) -> tuple[list[int], str]:
        """Who does not answer the roll, and the same in words."""
        if self._store is None:
            return [], "the others"
        until = time.monotonic() + ROLL_CALL.total_seconds()
        try:
            self._store.set(_HERE.format(self._global(self.number)), "")
            missing = [k for k in range(self.count) if k != self.number and not self._answers(k, until)]
            words = [f"rank {k} ({self._last_word(k)})" for k in missing]
        except RuntimeError:
            return [], "the others, and the store of their group with them (rank 0 keeps it, if torchrun does not)"
        if not missing:
            return [], "the others, all of which have said so too"
        return missing, " and ".join(words[:4]) + (f" and {len(words) - 4} more" if len(words) > 4 else "")

    def _answers(self, number: int, until: float) -> bool:
        assert self._store is not None
        left = datetime.timedelta(seconds=max(until - time.monotonic(), 0.05))
        try:
            self._store.wait([_HERE.format(self._global(number))], left)
        except RuntimeError:
            self._store.num_keys()  # raises if it is the store that is gone
            return False
        return True

    def _last_word(self, number: int) -> str:
        assert self._store is not None
        key = _AT.format(self._global(number))
        return f"last heard of in {self._store.get(key).decode()}" if self._store.check([key]) else "never heard of"

    @contextlib.contextmanager
    def untold(self, what: str) -> Iterator[None]:
        """Around what this process does between two reductions, when the others would take a word for a number.

        They wait for it, in vain, until it ends or their time runs out.
        """
        try:
            yield
        except Exception as error:
            if was_told(error):
                raise
            raise _marked(
                KINDS[_kind_of(error)](f"rank {self.number}: {error} (in {what}; the other ranks wait for it, and are to be ended)")
            ) from error

    # ---- the data

    def share(self, loader: Iterable[Any]) -> Share:
        """The batches of a loader that this process reads."""
        compare = self._compare if self.count > 1 else None
        return Share(loader, self.number, self.count, split=self.split, compare=compare)

    def check_share(self, share: Share) -> None:
        """Whether the shares that were read are of one loader, and not all empty: `ValueError` on all processes if not."""
        self._compare(share.digest, again=True)
        if sum(self.exchange(share.read)) == 0:
            raise ValueError(EMPTY)

    def _compare(self, digest: str | None, *, again: bool = False) -> None:
        first, *others = self.exchange(digest)
        other = next((number for number, theirs in enumerate(others, start=1) if theirs != first), None)
        if other is not None:
            where = " behind the first one" if again else ""
            raise ValueError(
                f"ranks 0 and {other} were given different batches{where}, and a loader is split between the ranks: give all of "
                "them the same batches in the same order (shuffled by the same seed), or each its own share: a DataLoader with a "
                "DistributedSampler, or job=Job(split=False)"
            )

    # ---- the sites

    def silent(self, sums: Listener) -> dict[str, nn.Module]:
        """The targets that have not been called in any process, once all have left out what any of them has."""
        everyones = self.exchange((list(sums.silent), sums.left_out))
        for _, left_out in everyones:
            for name, why in left_out.items():
                sums.leave_out(name, why)
        everywhere = set.intersection(*(set(silent) for silent, _ in everyones))
        return {name: module for name, module in sums.silent.items() if name in everywhere}

    def deal(self, widths: Sequence[int]) -> list[int]:
        """The owners of some sites, whose widths are the same for all processes: whoever has been dealt least so far."""
        owners = deal(widths, self.count, self._loads)
        for d, owner in zip(widths, owners, strict=True):
            self._loads[owner] += float(d) ** 3
        return owners

    def send(self, covariance: Covariance, site: Site, owner: int) -> Arriving:
        """Begin to add up a site's sums at its owner. What this process has of them is given out of hand."""
        what = f"the reduction of {site.name!r}"
        self.at(what)
        with self.untold(what):
            if covariance.precision == "qr":
                return Arriving(site, self._fold(covariance, owner, what))
            vector = covariance.compress()
            there = vector.to(self._device)
            with self._in_touch(what):
                work = dist.reduce(there, self._global(owner), op=dist.ReduceOp.SUM, group=self._group, async_op=True)
        return Arriving(site, covariance if owner == self.number else None, work, vector, there)

    def wait(self, arriving: Arriving) -> None:
        """Until a reduction is done."""
        with self._in_touch(f"the reduction of {arriving.site.name!r}"):
            arriving.wait()

    def _fold(self, covariance: Covariance, owner: int, what: str) -> Covariance | None:
        place, step = (self.number - owner) % self.count, 1
        while step < self.count:
            if place % (2 * step):
                facts, tensors = covariance.state()
                del covariance
                with self._in_touch(what):
                    dist.send(_packed(facts, tensors).to(self._device), self._at(owner + place - step), group=self._group)
                return None
            if place + step < self.count:
                facts, tensors = covariance.state()
                vector = _packed(facts, tensors).to(self._device)
                del tensors
                with self._in_touch(what):
                    dist.recv(vector, self._at(owner + place + step), group=self._group)
                covariance.merge(Covariance.from_state(*_unpacked(vector, facts), device=covariance.device))
                del vector
            step *= 2
        return covariance

    def broadcast(self, tensor: torch.Tensor, owner: int) -> torch.Tensor:
        """A tensor of the owner's, on the CPU of every process; elsewhere only its shape and dtype count, and "meta" will do."""
        own = owner == self.number
        there = tensor.to(self._device) if own else torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
        with self._in_touch("a broadcast"):
            dist.broadcast(there, self._global(owner), group=self._group)
        return tensor if own else there.cpu()

    # ---- the store

    @contextlib.contextmanager
    def new_directory(self, out: str | os.PathLike[str], *, overwrite: bool) -> Iterator[Path]:
        """`nullspace.store.new_directory`, of which every process writes a part, on a file system that all of them see."""
        if self.first:
            with store.new_directory(out, overwrite=overwrite) as part:
                self.exchange(part)
                yield part
                self.exchange(None)
        else:
            yield self.exchange(Path())[0]
            self.exchange(None)
        self.exchange(None)  # it has its name

    def locked(self, place: str | os.PathLike[str]) -> contextlib.AbstractContextManager[None]:
        """`nullspace.locks.locked`, by the first process for all."""
        return locked(place) if self.first else contextlib.nullcontext()

    # ---- places

    @property
    def ranks(self) -> tuple[int, ...]:
        """Its processes, by their numbers in the default group."""
        if not (dist.is_available() and dist.is_initialized()):
            return (0,)
        return (dist.get_rank(),) if self.count == 1 else tuple(self._global(number) for number in range(self.count))

    @property
    def _device(self) -> torch.device:
        """Where tensors must be to be sent: the same for all processes, whether they have computed anything or not."""
        over_nccl = "nccl" in dist.get_backend_config(self._group) and torch.cuda.is_available()
        return torch.device("cuda", torch.cuda.current_device()) if over_nccl else torch.device("cpu")

    def _global(self, number: int) -> int:
        return number if self._group is None else dist.get_global_rank(self._group, number)

    def _at(self, number: int) -> int:
        return self._global(number % self.count)


class Arriving:
    """A site whose sums are being added up. At its owner the total comes of it, elsewhere nothing.

    Args:
        site: which.
        own: at its owner, this process's part of them, which becomes the total; None elsewhere.
        work: of `torch.distributed`; None if nothing is under way.
        vector: what `own` has been compressed to.
        there: the same where it can be sent from, if that is another place.
    """

    def __init__(
        self,
        site: Site,
        own: Covariance | None,
        work: Any = None,
        vector: torch.Tensor | None = None,
        there: torch.Tensor | None = None,
    ) -> None:
        self.site, self.own = site, own
        self._work, self._vector, self._there = work, vector, there

    def wait(self) -> None:
        """Until the reduction is done; what other processes have come by is let go."""
        if self._work is not None:
            self._work.wait()
        if self._vector is not None and self._there is not None and self._there is not self._vector and self.own is not None:
            self._vector.copy_(self._there)
        self._work = self._there = None
        if self.own is None:
            self._vector = None

    def take(self) -> Covariance:
        """The total, given out of hand."""
        own, self.own = self.own, None
        assert own is not None
        if self._vector is not None:
            own.expand()
            self._vector = None
        return own


class Totals:
    """What all processes have summed in one pass: being added up, or added up and waiting to be worked on.

    What only one process works on keeps the others waiting, as nothing can be added up without its share. So nobody begins before
    there is enough for all: on average as much a process as all sites of one block, by memory. They come to that at the same time,
    as all know of all sites; and wait for the block that made it enough, rather than hold it beside what they work on.

    Args:
        job: of the processes.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._under_way: list[Arriving] = []
        self._here: list[Arriving] = []
        self._waiting = self._enough = 0  # entries of all processes' sites; of a block's sites

    def add(self, sums: Listener) -> Iterator[tuple[Site, Covariance]]:
        """Begin to add up some sites, and give them out of hand.

        Reductions run on by themselves until more is added. Everything else that the processes do together in the meantime, they
        have to do in the same order.

        Yields:
            This process's own sites, with the sums of all, that are to be worked on now.

        Raises:
            ValueError: naming the layer and the processes, if an input is shared in one and not in the other; or if there is no
                token at a site in any of them.
        """
        job = self._job
        if job.count == 1:
            yield from sums.release()
            return
        self._arrive()
        sums.flush()  # what it raises must be raised before the first reduction
        heard = _all_sites(job.exchange([(site, c.tokens, c.device.type) for site, c in sums.peek()]))
        deaf = next((site for site, (tokens, _) in heard.items() if tokens == 0), None)
        if deaf is not None:
            raise ValueError(f"no tokens at {deaf.name!r}: {sums.MASKED}")
        owners = job.deal([site.d_in for site in heard])
        for (site, (_, kind)), owner in zip(heard.items(), owners, strict=True):
            self._under_way.append(job.send(sums.take(site, torch.device(kind)), site, owner))
        added = sum(site.d_in**2 for site in heard)
        self._waiting += added
        self._enough = max(self._enough, added)
        if self._waiting >= job.count * self._enough:
            yield from self.rest()

    def rest(self) -> Iterator[tuple[Site, Covariance]]:
        """All that has been added and was not yielded."""
        self._arrive()  # all of it, before the first is solved
        self._here.sort(key=lambda each: each.site.d_in)  # by the time of the largest, nothing else is in memory
        self._waiting = 0
        while self._here:
            each = self._here.pop(0)
            self._job.at(f"the work on {each.site.name!r}")
            yield each.site, each.take()

    def _arrive(self) -> None:
        while self._under_way:
            each = self._under_way.pop(0)
            self._job.wait(each)
            if each.own is not None:
                self._here.append(each)


_saves: dict[Path, int] = {}  # place → how often this process was asked to write it


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
    shared = _default_store() if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 else None
    if shared is None:
        write()
        return
    place = store.resolved(out)
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
        raise _marked(KINDS[kind](f"rank {rank}: {text}"))
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
        return rank, host, _kind_of(error), str(error) or type(error).__name__
    return rank, host, None, ""


def deal(widths: Sequence[int], count: int, loads: Sequence[float] = ()) -> list[int]:
    """Which of `count` processes solves which site: the largest first, each to whoever has least to do.

    No process then has more than 4/3 of what the best way to deal them would give it (Graham 1969), if they begin alike.

    Args:
        widths: d_in of the sites; an eigenproblem costs d_in³.
        count: of processes.
        loads: what they have been dealt before; nothing by default.

    Returns:
        For every site, its owner.

    Example:
        >>> deal([48, 48, 48, 112], 2)
        [1, 1, 1, 0]
    """
    work = list(loads) or [0.0] * count
    owners = [0] * len(widths)
    for index in sorted(range(len(widths)), key=lambda i: -widths[i]):
        owners[index] = min(range(count), key=work.__getitem__)
        work[owners[index]] += float(widths[index]) ** 3
    return owners


_AT, _HERE = "nullspace/at/{}", "nullspace/here/{}"


def _default_store() -> dist.Store | None:
    """Of the default process group."""
    get = getattr(dist.distributed_c10d, "_get_default_store", None)
    return None if get is None else get()


def was_told(error: BaseException | None) -> bool:
    """Whether an exception, or what it comes of, has been raised on all processes."""
    while error is not None:
        if getattr(error, "_nullspace_was_told", False):
            return True
        error = error.__cause__ or error.__context__
    return False


def _marked(error: Exception) -> Exception:
    error._nullspace_was_told = True  # type: ignore[attr-defined]
    return error


def _kind_of(error: Exception) -> int:
    return next((i for i, kind in enumerate(KINDS) if isinstance(error, kind)), len(KINDS) - 1)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _all_sites(heard: Sequence[Sequence[tuple[Site, int, str]]]) -> dict[Site, tuple[int, str]]:
    """Site → tokens in all processes, and the kind of device that sums it; `ValueError` unless all agree on who shares an input."""
    found: dict[Site, tuple[int, str]] = {}
    whose: dict[str, tuple[Site, int]] = {}
    for number, sites in enumerate(heard):
        for site, tokens, kind in sites:
            for member in site.members:
                other, before = whose.setdefault(member, (site, number))
                if other != site:
                    raise ValueError(
                        f"{member!r} shares its input with {_others(member, other)} on rank {before}, and with "
                        f"{_others(member, site)} on rank {number}: one sum cannot serve both. Calibrate them in separate runs "
                        f"(targets=[{member!r}], …)."
                    )
            found[site] = (found.get(site, (0, ""))[0] + tokens, found.get(site, (0, kind))[1])
    return found


def _others(member: str, site: Site) -> str:
    return " and ".join(repr(name) for name in site.members if name != member) or "no other layer"


def _packed(facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The state of a root as one vector."""
    numbers = [facts["tokens"], facts["mass"], facts["outliers"], *facts["sums"].values()]
    return torch.cat([tensors["root"], tensors["total"], tensors["root"].new_tensor(numbers)])


def _unpacked(vector: torch.Tensor, like: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    d = like["d_in"]
    entries, total, numbers = vector.split([d * (d + 1) // 2, d, 3 + len(like["sums"])])
    tokens, mass, outliers, *sums = numbers.tolist()
    facts = {"d_in": d, "tokens": int(tokens), "mass": mass, "outliers": int(outliers)}
    return {**facts, "sums": dict(zip(like["sums"], sums, strict=True))}, {"root": entries, "total": total}
