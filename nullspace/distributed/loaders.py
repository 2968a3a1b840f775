"""Which batches of a loader one of several processes reads: `Share`.

A plain loader, which all of them hold alike, is split batch by batch: of n processes the k-th (from 0) takes batches k, k + n, …
A loader that is a share already is read as it is: a `DataLoader` whose sampler, batch sampler or data set says which part of how
many it is (PyTorch's `DistributedSampler`, what accelerate prepares). Samples that such a sampler repeats, to make the shares even,
would count twice; they are left out where it can be seen which ones they are.
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

# What samplers and data sets call their part: PyTorch's names, and accelerate's.
_PART_OF_HOW_MANY = (("rank", "num_replicas"), ("process_index", "num_processes"))


class Share:
    """The batches that one process reads, each with its number in the whole.

    Args:
        loader: of all batches, or of this process's alone (`is_share`).
        number: of the process, from 0.
        count: of processes.
        split: False if the loader is this process's share, whatever it looks like.
        compare: is handed the digest of the whole loader's first batch (None if there is none) as soon as it is known.

    Attributes:
        split: whether this is a part of what the loader yields.
        read: batches of this share that were read.
        digest: of what must be the same for all processes: for a sequence its length and both its ends, for anything else all
            batches; complete when the share has been read to its end. None if the loader is not split.

    Raises:
        ValueError: if the loader deals its data out to another number of processes.
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
        dealt = replicas(loader) if count > 1 and split else None
        if dealt is not None and dealt != count:
            raise ValueError(
                f"the loader deals its data out to {dealt} processes, and {count} are here: their sums would not be of all data"
            )
        self.split = count > 1 and split and dealt is None
        self.read = 0
        self.digest: str | None = None

    @property
    def length(self) -> int | None:
        """How many batches this share announces, if its loader does."""
        if self._count == 1:
            return length(self._loader)
        with _without_repeats(self._loader):
            own = _samples(self._loader)
            total = length(self._loader) if own is None else own
        return total if total is None or not self.split else len(range(self._number, total, self._count))

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        """`(number, batch)`, numbers from 1.

        Raises:
            ValueError: at the end, if there were fewer than were announced.
        """
        total = None if self._count > 1 and _is_accelerates(self._loader) else self.length  # which announces what it would repeat
        own = enumerate(self._loader, start=1) if self._count == 1 else self._split() if self.split else self._whole()
        for number, batch in own:
            self.read += 1
            yield number, batch
        if total is not None and 0 < self.read < total:
            raise ValueError(f"the loader ended early: it announced {total} batches and gave {self.read}")

    def _whole(self) -> Iterator[tuple[int, Any]]:
        if self._compare is not None:
            self._compare(None)
        with _without_repeats(self._loader):
            yield from enumerate(itertools.islice(self._loader, _samples(self._loader)), start=1)

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
    """Every n-th batch of a sequence, for jobs that know nothing of each other.

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
        loader: a sequence, or what gives the same batches whenever it is read, such as a `DataLoader` that does not shuffle.
        number: which part, from 1.
        count: of how many.

    Raises:
        ValueError: if there is no such part, or the loader is a share already.
    """
    if not 1 <= number <= count:
        raise ValueError(f"shard {number}/{count} does not exist: the shards of {count} are 1/{count} to {count}/{count}")
    if is_share(loader):
        raise ValueError("the loader's sampler splits the data already: give a loader of all batches, and let shard split it")
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
    """Among how many processes a loader says that it deals the data out; None if it says nothing of the kind."""
    for holder in _holders(loader):
        for number, count in _PART_OF_HOW_MANY:
            found = getattr(holder, count, None)
            if isinstance(found, int) and found > 1 and isinstance(getattr(holder, number, None), int):
                return found
        if any(c.__name__ == "DataLoaderDispatcher" for c in type(holder).__mro__):  # accelerate's: one process reads for all
            return int(holder.state.num_processes)
    return None


def digest_of(batches: Iterable[Any]) -> str:
    """SHA-256 of all that some batches hold."""
    digest = hashlib.sha256()
    for batch in batches:
        add_to_digest(digest, batch)
    return digest.hexdigest()


def add_to_digest(digest: Any, batch: Any) -> None:
    """Take in the structure of a batch, and the shapes, dtypes and bytes of its tensors."""
    leaves, structure = pytree.tree_flatten(dict(batch) if isinstance(batch, Mapping) else batch)
    digest.update(str(structure).encode())
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            digest.update(f"{tuple(leaf.shape)} {leaf.dtype}".encode())
            digest.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(leaf).encode())


def _holders(loader: Iterable[Any]) -> list[Any]:
    """All that may say which part of the data a loader yields."""
    if not isinstance(loader, DataLoader):
        return [loader]
    found: list[Any] = [loader, loader.dataset]
    pending = [loader.batch_sampler, loader.sampler]
    while pending:
        each = pending.pop()
        if each is not None and all(each is not known for known in found):
            found.append(each)
            pending += [getattr(each, "sampler", None), getattr(each, "batch_sampler", None)]
    return found


class _Unrepeated:
    """A `DistributedSampler` without what it repeats: sample k of its share is sample rank + k · n of the padded whole."""

    def __init__(self, sampler: DistributedSampler[Any]) -> None:
        self._sampler = sampler

    def __len__(self) -> int:
        return len(range(self._sampler.rank, len(self._sampler.dataset), self._sampler.num_replicas))  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(iter(self._sampler), len(self))


class _UnrepeatedStream(IterableDataset[Any]):
    """accelerate's `IterableDatasetShard` without what it repeats: of each round of batches this process's one, whole or not."""

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
    """Whether this is PyTorch's own way to make shares even; a subclass may have another."""
    return (
        isinstance(sampler, DistributedSampler) and type(sampler).__iter__ is DistributedSampler.__iter__ and not sampler.drop_last
    )


def _is_accelerates(loader: Iterable[Any]) -> bool:
    """Whether the batches are dealt out by accelerate's `BatchSamplerShard`, or what works like it."""
    batches: Any = loader.batch_sampler if isinstance(loader, DataLoader) else None
    return hasattr(batches, "even_batches") and hasattr(batches, "process_index")


def _is_accelerates_stream(data: Any) -> bool:
    """Whether samples are dealt out by accelerate's `IterableDatasetShard`, which makes its last batches whole by repeating."""
    return any(c.__name__ == "IterableDatasetShard" for c in type(data).__mro__) and not data.drop_last


@contextlib.contextmanager
def _without_repeats(loader: Iterable[Any]) -> Iterator[None]:
    """Inside, the loader's batch sampler does not repeat samples to make the shares even."""
    batches: Any = loader.batch_sampler if isinstance(loader, DataLoader) else None
    holder: dict[str, Any]
    other: Any
    if _pads(getattr(batches, "sampler", None)):
        holder, name, other = vars(batches), "sampler", _Unrepeated(batches.sampler)
    elif _is_accelerates(loader):
        holder, name, other = vars(batches), "even_batches", False
    elif isinstance(loader, DataLoader) and _is_accelerates_stream(loader.dataset):
        # Of the loader that accelerate wraps; a `DataLoader` lets nobody else exchange its data set.
        holder, name, other = vars(getattr(loader, "base_dataloader", loader)), "dataset", _UnrepeatedStream(loader.dataset)
    else:
        yield
        return
    before = holder[name]
    holder[name] = other
    try:
        yield
    finally:
        holder[name] = before


def _samples(loader: Iterable[Any]) -> int | None:
    """How many a loader that does not batch should give; None for all."""
    if isinstance(loader, DataLoader) and loader.batch_sampler is None and _pads(loader.sampler):
        return len(_Unrepeated(loader.sampler))  # type: ignore[arg-type]
    return None


def length(loader: Iterable[Any]) -> int | None:
    """How many batches a loader announces, if it does."""
    with contextlib.suppress(TypeError):  # a DataLoader has `__len__`, but its dataset may have none
        return len(loader) if isinstance(loader, Sized) else None
    return None


def example_of(loader: Iterable[Any]) -> Any:
    """A loader's first batch where a look at it costs nothing; else None."""
    return loader[0] if isinstance(loader, Sequence) and len(loader) else None
