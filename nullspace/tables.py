"""Rows about null spaces and covariances as cells of a table, and as aligned text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = dict[str, Any]


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
    return {"site": name, "d_in": str(row["d_in"]), "tokens": f"{row['tokens']:,}"}


def _sums(row: Row) -> dict[str, str]:
    return {"outliers": f"{row['outliers']:,}", "sums": row["precision"]}


def _printable(name: str) -> str:
    """A name whose control characters, which could move a terminal's cursor or change its colours, are written as escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def text_table(table_rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of `NullSpaces.rows` as aligned plain text: the first column to the left, the others to the right."""
    shown = [cells(dict(row)) for row in table_rows]
    if not shown:
        return "(no sites)"
    titles = max(shown, key=len)
    widths = {title: max(len(title), *(len(row.get(title, "")) for row in shown)) for title in titles}

    def line(row: Mapping[str, str]) -> str:
        first, *others = widths
        return "  ".join([row[first].ljust(widths[first]), *(row.get(title, "").rjust(widths[title]) for title in others)])

    return "\n".join([line({title: title for title in widths}), *(line(row) for row in shown)])
