"""Rows about null spaces and covariances as cells of a table, and as aligned text."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]

# Of the rows of experts that share a parameter: the worst value is shown, or their sum.
_TOGETHER: dict[str, Callable[[Iterable[Any]], Any]] = {
    "leak": max,
    "gap": min,
    "outliers": sum,
    "excess_estimate": max,
    "trace": sum,
}


def experts_together(rows: Sequence[Row]) -> list[Row]:
    """The rows of sites, those of experts that share a parameter as one: their largest leak and rounding and their smallest gap,
    the sum of their outliers and traces, and tokens from the least to the largest number."""
    stacks: dict[str, list[Row]] = {}
    for row in rows:
        match = _EXPERT.fullmatch(row["site"]) if len(row["members"]) == 1 else None
        stacks.setdefault(match[1] if match else row["site"], []).append(row)
    return [own[0] if len(own) == 1 else _as_one(stack, own) for stack, own in stacks.items()]


_EXPERT = re.compile(r"(.+\.\w+)\[\d+\]")


def _as_one(stack: str, rows: Sequence[Row]) -> Row:
    worst = {name: merge(row[name] for row in rows) for name, merge in _TOGETHER.items() if name in rows[0]}
    ranks = [row["effective_rank"] for row in rows if row.get("effective_rank") is not None]
    counts = [row["tokens"] for row in rows]
    return {
        **rows[0],
        **worst,
        "site": f"{stack}[{len(rows)} experts]",
        "tokens": min(counts),
        "most_tokens": max(counts),
        "precision": "+".join(dict.fromkeys(row["precision"] for row in rows)),
        **({"effective_rank": sum(ranks) / len(ranks) if ranks else None} if "effective_rank" in rows[0] else {}),
    }


def cells(row: Row) -> dict[str, str]:
    """A row of `NullSpaces.rows` as text: column title → cell."""
    shown = {
        **_site(row),
        "rank": str(row["rank"]),
        "leak": f"{row['leak']:.2e}",
        "gap": f"{row['gap']:.1%}",
        **_sums(row),
        "rounding": f"{row['excess_estimate']:.0e}",
    }
    if row["effective_rank"] is not None:
        shown["effective rank"] = f"{row['effective_rank']:.1f}"
    return shown


def covariance_cells(row: Row) -> dict[str, str]:
    """A row of `Covariances.rows` as text: column title → cell."""
    return {**_site(row), "trace": f"{row['trace']:.3e}", **_sums(row)}


def _site(row: Row) -> dict[str, str]:
    others = len(row["members"]) - 1
    name = _printable(row["site"]) + (f" +{others}" if others > 0 else "")
    most = row.get("most_tokens", row["tokens"])
    tokens = f"{row['tokens']:,}" + (f" … {most:,}" if most != row["tokens"] else "")
    return {"site": name, "d_in": str(row["d_in"]), "tokens": tokens}


def _sums(row: Row) -> dict[str, str]:
    return {"outliers": f"{row['outliers']:,}", "sums": row["precision"]}


def summary(rows: Sequence[Row]) -> str:
    """One line on the rows of a long table: how many, their leak if they have one, and their tokens."""
    tokens = [row["tokens"] for row in rows]
    least, most = min(tokens), max([*tokens, *(row.get("most_tokens", 0) for row in rows)])
    count = f"{least:,} tokens" if least == most else f"{least:,} to {most:,} tokens"
    if "leak" not in rows[0]:
        return f"{len(rows)} sites, {count}"
    leaks = [row["leak"] for row in rows]
    return f"{len(rows)} sites, {count}; leak {statistics.median(leaks):.2e} (median), {max(leaks):.2e} (worst)"


def largest(rows: Sequence[Row], count: int, key: Callable[[Row], float]) -> list[Row]:
    """The rows with the largest values of `key`, in the order of `rows`."""
    chosen = sorted(range(len(rows)), key=lambda index: -key(rows[index]))[:count]
    return [rows[index] for index in sorted(chosen)]


def _printable(name: str) -> str:
    """A name whose control characters, which could move a terminal's cursor or change its colours, are written as escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def text_table(table_rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of `NullSpaces.rows` as aligned plain text: the first column to the left, the others to the right. Experts together."""
    shown = [cells(row) for row in experts_together([dict(row) for row in table_rows])]
    if not shown:
        return "(no sites)"
    titles = max(shown, key=len)
    widths = {title: max(len(title), *(len(row.get(title, "")) for row in shown)) for title in titles}

    def line(row: Mapping[str, str]) -> str:
        first, *others = widths
        return "  ".join([row[first].ljust(widths[first]), *(row.get(title, "").rjust(widths[title]) for title in others)])

    return "\n".join([line({title: title for title in widths}), *(line(row) for row in shown)])
