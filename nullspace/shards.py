"""Which shards of a data set a sum is of: jobs that know nothing of each other compute one each, and merging keeps the account.

Shard i of n (from 1) is every n-th batch, beginning with the i-th. Sums of all n are the sums of the data, in whatever order and
grouping they are merged; a sum in which one is missing, or counted twice, looks like any other, and only the account tells.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


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
    def missing(self) -> tuple[int, ...]:
        """Those that are not here."""
        return tuple(sorted(set(range(1, self.count + 1)) - set(self.numbers)))

    def as_json(self) -> dict[str, Any]:
        """For a manifest; the inverse is `from_json`."""
        return {"content": self.data[0], "batches": self.data[1], "of": self.count, "numbers": list(self.numbers)}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Shards:
        """What `as_json` gave."""
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
    found = [(part, part.missing) for part in parts if part.missing]
    several = len(found) > 1
    return (
        "; ".join(
            f"{'shards' if len(missing) > 1 else 'shard'} {_few(missing)} of {part.count}"
            + (f" (data {part.data[0]})" if several else "")
            for part, missing in found
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


def _few(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return f"{shown} and {len(numbers) - 8} more" if len(numbers) > 8 else shown
