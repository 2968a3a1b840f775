"""Shares of a loader: together they are all batches once, and the user's loader and samplers are left as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from nullspace.distributed.loaders import Share


class Numbers(Dataset[int]):
    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> int:
        return int(index)


class Stream(IterableDataset[int]):
    def __init__(self, count: int) -> None:
        self._count = count

    def __iter__(self) -> Iterator[int]:
        return iter(range(self._count))


def sampled(samples: int, rank: int, count: int, **options: Any) -> DataLoader[int]:
    data = Numbers(samples)
    return DataLoader(data, sampler=DistributedSampler(data, count, rank, shuffle=True, seed=3), **options)


def prepared(data: Any, rank: int, count: int, split: bool) -> Any:
    inner = DataLoader(data, batch_size=2 * count if split else 2)
    return prepare_data_loader(inner, num_processes=count, process_index=rank, split_batches=split, dispatch_batches=False)


LOADERS: dict[str, Callable[[int, int, int], Any]] = {
    "sampler": lambda samples, rank, count: sampled(samples, rank, count, batch_size=2),
    "sampler, no batches": lambda samples, rank, count: sampled(samples, rank, count, batch_size=None),
    "accelerate": lambda samples, rank, count: prepared(Numbers(samples), rank, count, False),
    "accelerate, split batches": lambda samples, rank, count: prepared(Numbers(samples), rank, count, True),
    "accelerate, stream": lambda samples, rank, count: prepared(Stream(samples), rank, count, False),
    "accelerate, stream, split batches": lambda samples, rank, count: prepared(Stream(samples), rank, count, True),
}


def state_of(loader: Any) -> list[tuple[Any, dict[str, Any]]]:
    """What belongs to a loader, and its attributes."""
    names = ("base_dataloader", "dataset", "sampler", "batch_sampler")
    parts, pending = [], [loader]
    while pending:
        each = pending.pop()
        if each is not None and all(each is not part for part, _ in parts):
            parts.append((each, dict(vars(each))))
            pending += [each.__dict__.get(name) for name in names]
    return parts


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("samples", [1, 4, 7, 12])
@pytest.mark.parametrize("kind", LOADERS)
def test_shares_have_every_sample_once_and_change_no_sampler(kind: str, samples: int, count: int) -> None:
    every: list[int] = []
    for rank in range(count):
        loader = LOADERS[kind](samples, rank, count)
        before = state_of(loader)
        share = Share(loader, rank, count)
        assert not share.split
        for _, batch in share:
            assert state_of(loader) == before  # while it is read
            every += torch.as_tensor(batch).reshape(-1).tolist()
        assert state_of(loader) == before
    assert sorted(every) == list(range(samples))


@pytest.mark.processes
def test_persistent_workers_of_the_user_are_not_given_other_samplers() -> None:
    loader = sampled(5, 1, 2, batch_size=2, num_workers=1, persistent_workers=True)
    own = [batch.tolist() for batch in loader]  # with a repeated sample
    share = [batch.tolist() for _, batch in Share(loader, 1, 2)]
    assert [len(batch) for batch in own] == [2, 1]
    assert share == [own[0]]
    assert [batch.tolist() for batch in loader] == own


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("batches", [0, 1, 2, 7])
@pytest.mark.parametrize("kind", [list, iter])
def test_shares_are_all_batches_each_once(kind: Callable[..., Any], batches: int, count: int) -> None:
    whole = [{"input_ids": torch.full((1, 2), i)} for i in range(batches)]
    shares = [list(Share(kind(whole), number, count)) for number in range(count)]
    assert sorted(number for own in shares for number, _ in own) == list(range(1, batches + 1))
    assert all(int(batch["input_ids"][0, 0]) == number - 1 for own in shares for number, batch in own)
    assert [Share(whole, number, count).length for number in range(count)] == [len(own) for own in shares]
