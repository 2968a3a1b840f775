"""The shards of a data set that are in a sum. Independent jobs sum one shard each; merging adds the sums and joins the accounts.

Shard i of n (from 1) is every n-th batch, beginning with the i-th. The sum of all n shards is the sum of the data, in any order and
grouping. The numbers in a sum do not show whether a shard is missing or counted twice; the account does.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nullspace.checks import check_fields, list_of, shown, text, whole
from nullspace.errors import DamagedFileError, InputError

# Fields of an account in a manifest.
FIELDS = {"content": text(), "batches": whole(1), "of": whole(1), "numbers": list_of(whole(1), least=1, distinct=True)}


@dataclass(frozen=True)
class Shards:
    """Some shards of one data set.

    Attributes:
        data: digest and number of batches of the data set (`nullspace.artifacts.identity.hash_data`).
        count: number of shards that it was split into.
        numbers: those in the sum, from 1, ascending.
    """

    data: tuple[str, int]
    count: int
    numbers: tuple[int, ...]

    @property
    def missing(self) -> int:
        """Number of shards that are missing."""
        return self.count - len(self.numbers)

    def first_missing(self, most: int) -> list[int]:
        """The first shards that are missing, `most` at most."""
        here = set(self.numbers)
        return list(itertools.islice((n for n in range(1, self.count + 1) if n not in here), most))

    def as_json(self) -> dict[str, Any]:
        """The account for a manifest; the inverse is `from_json`."""
        return {"content": self.data[0], "batches": self.data[1], "of": self.count, "numbers": list(self.numbers)}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Shards:
        """The inverse of `as_json`.

        Raises:
            ValueError: naming the field, if its value is wrong.
        """
        check_fields(entry, FIELDS, "the account of shards")
        numbers = entry["numbers"]
        if numbers != sorted(numbers) or numbers[-1] > entry["of"]:
            raise DamagedFileError(f"the account of shards: {shown(numbers)} are not shards from 1 to {entry['of']}, ascending")
        return cls((entry["content"], entry["batches"]), entry["of"], tuple(entry["numbers"]))


def joined(runs: Sequence[Iterable[Shards]]) -> tuple[Shards, ...]:
    """The account of the sum of some runs.

    Raises:
        ValueError: naming the shard and the runs (from 1), if a shard would count twice, or runs split the same data differently.
    """
    known: dict[tuple[str, int], dict[int, int]] = {}
    counts: dict[tuple[str, int], tuple[int, int]] = {}
    for run, parts in enumerate(runs, start=1):
        for part in parts:
            data, count, numbers = part.data, part.count, part.numbers
            other, before = counts.setdefault(data, (count, run))
            if other != count:
                raise InputError(f"runs {before} and {run} are of the same data, split into {other} shards and into {count}")
            whose = known.setdefault(data, {})
            twice = next((n for n in numbers if n in whose), None)
            if twice is not None:
                raise InputError(f"shard {twice}/{count} is in runs {whose[twice]} and {run}: it would count twice. Leave out one")
            whose.update(dict.fromkeys(numbers, run))
    return tuple(Shards(data, counts[data][0], tuple(sorted(whose))) for data, whose in known.items())


def what_is_missing(parts: Iterable[Shards]) -> str | None:
    """Text that names the missing shards; None if there are none."""
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
        ValueError: for text of another form, and for a shard that does not exist.
    """
    number, slash, count = text.partition("/")
    if not (slash and number.strip().isdigit() and count.strip().isdigit() and 1 <= int(number) <= int(count)):
        raise InputError(f"a shard is written i/n, from 1/n to n/n: not {text!r}")
    return int(number), int(count)


def _few(part: Shards) -> str:
    first = part.first_missing(8)
    listed = ", ".join(map(str, first))
    return f"{listed} and {part.missing - len(first)} more" if part.missing > len(first) else listed
