"""Which batches of a loader one of several processes reads: `Share`.

A plain loader, of which every process has an equal one, is split batch by batch: process k of n (from 0) reads batches k, k + n, …
A loader that is a share already is read as it is: a `DataLoader` whose sampler, batch sampler or data set says which part of how
many it is (PyTorch's `DistributedSampler`, loaders that accelerate prepares). Such samplers repeat samples to make the shares even.
Repeated samples would count twice: they are left out, where PyTorch's or accelerate's own classes repeat them.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from nullspace.errors import InputError

# What samplers and data sets call their part: PyTorch's names, and accelerate's.
_PART_OF_HOW_MANY = (("rank", "num_replicas"), ("process_index", "num_processes"))


class Share:
    """The batches that one process reads, each with its number in the whole.

    Args:
        loader: of all batches, or of this process's alone (`is_share`).
        number: of the process, from 0.
        count: of processes.
        split: False if the loader is this process's share, even if it does not say so.
        compare: called with the digest of the whole loader's first batch (None if there is none) as soon as it is known.

    Attributes:
        split: whether this is a part of what the loader yields.
        read: how many batches of this share were read.
        digest: of what must be equal on all processes: for a sequence its length, first and last batch; for any other loader all
            batches; complete when the share has been read to its end. None if the loader is not split.

    Raises:
        ValueError: if the loader divides its data between another number of processes.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        number: int = 0,
        count: int = 1,
        *,
        split: bool = True,
        compare: Callable[[str | None], None] | None = None,
    ) -> None:
        self._loader, self._number, self._count, self._compare = loader, number, count, compare
        shares = replicas(loader) if count > 1 and split else None
        if shares is not None and shares != count:
            raise InputError(
                f"the loader divides its data between {shares} processes, and this job has {count}: its sums would not be of all "
                "data. Make the sampler for the processes of the job"
            )
        self.split = count > 1 and split and shares is None
        self.read = 0
        self.digest: str | None = None

    @property
    def length(self) -> int | None:
        """How many batches this share has, if its loader has a length."""
        if self._count == 1:
            return length(self._loader)
        total = length(_without_repeats(self._loader))
        return total if total is None or not self.split else len(range(self._number, total, self._count))

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        """`(number, batch)`, numbers from 1.

        Raises:
            ValueError: at the end, if there were fewer batches than `length`.
        """
        # accelerate's batch sampler counts repeated batches in its length.
        total = None if self._count > 1 and _is_accelerates(self._loader) else self.length
        own = enumerate(self._loader, start=1) if self._count == 1 else self._split() if self.split else self._whole()
        for number, batch in own:
            self.read += 1
            yield number, batch
        if total is not None and 0 < self.read < total:
            raise InputError(f"the loader ended early: it announced {total} batches and gave {self.read}")

    def _whole(self) -> Iterator[tuple[int, Any]]:
        if self._compare is not None:
            self._compare(None)
        yield from enumerate(_without_repeats(self._loader), start=1)

    def _split(self) -> Iterator[tuple[int, Any]]:
        compare, loader = self._compare or (lambda _: None), self._loader
        if isinstance(loader, Sequence):
            total = len(loader)
            ends = [digest_of([loader[i]]) for i in ((0, total - 1) if total else ())]
            self.digest = f"{total} {ends}"
            compare(self.digest)
            for index in range(self._number, total, self._count):
                yield index + 1, loader[index]
            return
        whole = hashlib.sha256()
        for index, batch in enumerate(loader):
            add_to_digest(whole, batch)
            if index == 0:
                compare(whole.hexdigest())
            if index % self._count == self._number:
                yield index + 1, batch
            self.digest = ""
        if self.digest is None:
            compare(None)
        self.digest = whole.hexdigest()


class Part(Sequence[Any]):
    """Every n-th batch of a sequence, for jobs that run independently.

    Args:
        batches: all of them.
        number: which part, from 1.
        count: of how many.
    """

    def __init__(self, batches: Sequence[Any], number: int, count: int) -> None:
        self._batches, self._at = batches, range(number - 1, len(batches), count)

    def __len__(self) -> int:
        return len(self._at)

    def __getitem__(self, index: Any) -> Any:
        return self._batches[self._at[index]]


def part_of(loader: Iterable[Any], number: int, count: int) -> Iterable[Any]:
    """Every n-th batch of a loader that can be read more than once: batches number, number + count, … (from 1).

    Args:
        loader: a sequence, or another iterable that gives the same batches each time, such as a `DataLoader` that does not shuffle.
        number: which part, from 1.
        count: of how many.

    Raises:
        ValueError: if there is no such part, or the loader is a share already.
    """
    if not 1 <= number <= count:
        raise InputError(f"shard {number}/{count} does not exist: the shards of {count} are 1/{count} to {count}/{count}")
    if is_share(loader):
        raise InputError("the loader's sampler splits the data already: give a loader of all batches, and let shard split it")
    if isinstance(loader, Sequence):
        return Part(loader, number, count)
    return _EveryNth(loader, number, count)


class _EveryNth:
    def __init__(self, loader: Iterable[Any], number: int, count: int) -> None:
        self._loader, self._number, self._count = loader, number, count

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self._loader, self._number - 1, None, self._count)


def is_share(loader: Iterable[Any]) -> bool:
    """Whether a loader says that it yields one process's part of the data alone."""
    return replicas(loader) is not None


def replicas(loader: Iterable[Any]) -> int | None:
    """The number of processes between which a loader, its samplers or its data set divide the data; None if they do not say so."""
    for holder in _holders(loader):
        for number, count in _PART_OF_HOW_MANY:
            shares = getattr(holder, count, None)
            if isinstance(shares, int) and shares > 1 and isinstance(getattr(holder, number, None), int):
                return shares
        if any(c.__name__ == "DataLoaderDispatcher" for c in type(holder).__mro__):  # accelerate's: one process reads for all
            return int(holder.state.num_processes)
    return None


def digest_of(batches: Iterable[Any]) -> str:
    """SHA-256 of the contents of batches, as `add_to_digest` reads them."""
    digest = hashlib.sha256()
    for batch in batches:
        add_to_digest(digest, batch)
    return digest.hexdigest()


def add_to_digest(digest: Any, batch: Any) -> None:
    """Update a digest with a batch's structure, and its tensors' shapes, dtypes and bytes."""
    leaves, structure = pytree.tree_flatten(dict(batch) if isinstance(batch, Mapping) else batch)
    digest.update(str(structure).encode())
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            digest.update(f"{tuple(leaf.shape)} {leaf.dtype}".encode())
            digest.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(leaf).encode())


def _holders(loader: Iterable[Any]) -> list[Any]:
    """The loader, its data set and all of its samplers: each may say which part of the data it yields."""
    if not isinstance(loader, DataLoader):
        return [loader]
    holders: list[Any] = [loader, loader.dataset]
    pending = [loader.batch_sampler, loader.sampler]
    while pending:
        each = pending.pop()
        if each is not None and all(each is not known for known in holders):
            holders.append(each)
            pending += [getattr(each, "sampler", None), getattr(each, "batch_sampler", None)]
    return holders


class _Unrepeated:
    """A `DistributedSampler` without repeated samples: sample k of its share is sample rank + k · n of the padded whole."""

    def __init__(self, sampler: DistributedSampler[Any]) -> None:
        self._sampler = sampler

    def __len__(self) -> int:
        return len(range(self._sampler.rank, len(self._sampler.dataset), self._sampler.num_replicas))  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(iter(self._sampler), len(self))


class _UnrepeatedStream(IterableDataset[Any]):
    """accelerate's `IterableDatasetShard` without repeated samples: this process's batch of each round, complete or not."""

    def __init__(self, shard: Any) -> None:
        self._shard = shard

    def __iter__(self) -> Iterator[Any]:
        shard = self._shard
        own = shard.batch_size // shard.num_processes if shard.split_batches else shard.batch_size
        # All processes shuffle alike, each epoch in its own way.
        generator = getattr(shard.dataset, "generator", None)
        if isinstance(generator, torch.Generator) and not hasattr(shard.dataset, "set_epoch"):
            generator.manual_seed(shard.epoch)
        for index, sample in enumerate(shard.dataset):
            if index // own % shard.num_processes == shard.process_index:
                yield sample


def _pads(sampler: Any) -> bool:
    """Whether a sampler repeats samples as PyTorch's `DistributedSampler` does; a subclass may override that."""
    return (
        isinstance(sampler, DistributedSampler) and type(sampler).__iter__ is DistributedSampler.__iter__ and not sampler.drop_last
    )


def _is_accelerates(loader: Iterable[Any]) -> bool:
    """Whether accelerate's `BatchSamplerShard`, or a class with the same attributes, divides the batches."""
    batches: Any = loader.batch_sampler if isinstance(loader, DataLoader) else None
    return hasattr(batches, "even_batches") and hasattr(batches, "process_index")


def _is_accelerates_stream(data: Any) -> bool:
    """Whether accelerate's `IterableDatasetShard` divides the samples, and completes its last batches by repeating some."""
    return any(c.__name__ == "IterableDatasetShard" for c in type(data).__mro__) and not data.drop_last


def _without_repeats(loader: Iterable[Any]) -> Iterable[Any]:
    """The loader, or a copy of it whose samplers repeat no samples to make the shares even.

    The samplers are copied too: the loader, and all that belongs to it, stay as they are.
    """
    if not isinstance(loader, DataLoader):
        return loader
    batches: Any = loader.batch_sampler
    if batches is None and _pads(loader.sampler):
        return _copied(loader, sampler=_Unrepeated(loader.sampler))  # type: ignore[arg-type]
    if _pads(getattr(batches, "sampler", None)):
        return _copied(loader, batch_sampler=_changed(batches, sampler=_Unrepeated(batches.sampler)))
    if _is_accelerates(loader):
        return _copied(loader, batch_sampler=_changed(batches, even_batches=False))
    if _is_accelerates_stream(loader.dataset):
        return _copied(loader, dataset=_UnrepeatedStream(loader.dataset))
    return loader


def _copied(loader: Any, **changes: Any) -> Any:
    """A copy of a `DataLoader` with other attributes. Persistent workers would go on with the samplers of the original."""
    inner = getattr(loader, "base_dataloader", None)  # of the loader that accelerate wraps
    if inner is not None:
        return _changed(loader, base_dataloader=_copied(inner, **changes))
    return _changed(loader, persistent_workers=False, **changes)


def _changed(thing: Any, **changes: Any) -> Any:
    """A shallow copy with other attributes, some of which a `DataLoader` would refuse to assign."""
    other = object.__new__(type(thing))
    vars(other).update(vars(thing), **changes)
    return other


def length(loader: Iterable[Any]) -> int | None:
    """`len(loader)`, if it has one."""
    with contextlib.suppress(TypeError):  # a DataLoader has `__len__`, but its dataset may have none
        return len(loader) if isinstance(loader, Sized) else None
    return None


def example_of(loader: Iterable[Any]) -> Any:
    """A loader's first batch if it is a sequence, which costs nothing to look at; else None."""
    return loader[0] if isinstance(loader, Sequence) and len(loader) else None
