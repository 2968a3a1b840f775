"""Which shards of a data set a sum is of: jobs that know nothing of each other compute one each, and merging keeps the account.

Shard i of n (from 1) is every n-th batch, beginning with the i-th. Sums of all n are the sums of the data, in whatever order and
grouping they are merged; a sum in which one is missing, or counted twice, looks like any other, and only the account tells.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nullspace.checks import check_fields, list_of, shown, text, whole

# What a manifest says of some shards.
FIELDS = {"content": text(), "batches": whole(1), "of": whole(1), "numbers": list_of(whole(1), least=1, distinct=True)}


@dataclass(frozen=True)
class Shards:
    """Some shards of one data set.

    Attributes:
        data: its digest, and the number of batches (`nullspace.checkpoint.hash_data`).
        count: into how many it was split.
        numbers: those that are here, from 1, ascending.
    """

    data: tuple[str, int]
    count: int
    numbers: tuple[int, ...]

    @property
    def missing(self) -> int:
        """How many are not here."""
        return self.count - len(self.numbers)

    def first_missing(self, most: int) -> list[int]:
        """The first ones that are not here, at most so many."""
        here = set(self.numbers)
        return list(itertools.islice((n for n in range(1, self.count + 1) if n not in here), most))

    def as_json(self) -> dict[str, Any]:
        """For a manifest; the inverse is `from_json`."""
        return {"content": self.data[0], "batches": self.data[1], "of": self.count, "numbers": list(self.numbers)}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Shards:
        """What `as_json` gave.

        Raises:
            ValueError: naming the field, for anything else.
        """
        check_fields(entry, FIELDS, "the account of shards")
        numbers = entry["numbers"]
        if numbers != sorted(numbers) or numbers[-1] > entry["of"]:
            raise ValueError(f"the account of shards: {shown(numbers)} are not shards from 1 to {entry['of']}, ascending")
        return cls((entry["content"], entry["batches"]), entry["of"], tuple(entry["numbers"]))


def joined(runs: Sequence[Iterable[Shards]]) -> tuple[Shards, ...]:
    """What the sum of some runs is of.

    Raises:
        ValueError: naming the shard and the runs (from 1), if one would count twice, or the same data were split in two ways.
    """
    known: dict[tuple[str, int], dict[int, int]] = {}
    counts: dict[tuple[str, int], tuple[int, int]] = {}
    for run, parts in enumerate(runs, start=1):
        for part in parts:
            data, count, numbers = part.data, part.count, part.numbers
            other, before = counts.setdefault(data, (count, run))
            if other != count:
                raise ValueError(f"runs {before} and {run} are of the same data, split into {other} shards and into {count}")
            whose = known.setdefault(data, {})
            twice = next((n for n in numbers if n in whose), None)
            if twice is not None:
                raise ValueError(f"shard {twice}/{count} is in runs {whose[twice]} and {run}: it would count twice. Leave out one")
            whose.update(dict.fromkeys(numbers, run))
    return tuple(Shards(data, counts[data][0], tuple(sorted(whose))) for data, whose in known.items())


def what_is_missing(parts: Iterable[Shards]) -> str | None:
    """The shards that are missing, to be read by people; None if there are none."""
    lacking = [part for part in parts if part.missing]
    return (
        "; ".join(
            f"{'shards' if part.missing > 1 else 'shard'} {_few(part)} of {part.count}"
            + (f" (data {part.data[0]})" if len(lacking) > 1 else "")
            for part in lacking
        )
        or None
    )


def parse_shard(text: str) -> tuple[int, int]:
    """`"2/8"` as (2, 8).

    Raises:
        ValueError: for anything else, and for a shard that does not exist.
    """
    number, slash, count = text.partition("/")
    if not (slash and number.strip().isdigit() and count.strip().isdigit() and 1 <= int(number) <= int(count)):
        raise ValueError(f"a shard is written i/n, from 1/n to n/n: not {text!r}")
    return int(number), int(count)


def _few(part: Shards) -> str:
    first = part.first_missing(8)
    listed = ", ".join(map(str, first))
    return f"{listed} and {part.missing - len(first)} more" if part.missing > len(first) else listed
