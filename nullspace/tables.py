"""What there is to say about null spaces, as rows for programs and as a table for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass

Row = dict[str, Any]


def _printable(name: str) -> str:
    """A name without characters that move a terminal's cursor or change its colours: they are written out."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def cells(row: Row) -> dict[str, str]:
    """A row as it is shown: column title → text."""
    shown = {
        "site": _printable(row["site"]) + (f" +{len(row['members']) - 1}" if len(row["members"]) > 1 else ""),
        "d_in": str(row["d_in"]),
        "tokens": f"{row['tokens']:,}",
        "rank": str(row["rank"]),
        "leak": f"{row['leak']:.2e}",
        "gap": f"{row['gap']:.1%}",
        "outliers": f"{row['outliers']:,}",
        "sums": row["precision"],
        "rounding": f"{row['excess_estimate']:.0e}",
    }
    if row["effective_rank"] is not None:
        shown["effective rank"] = f"{row['effective_rank']:.1f}"
    return shown


def covariance_cells(row: Row) -> dict[str, str]:
    """A row of second moments as it is shown."""
    return {
        "site": _printable(row["site"]) + (f" +{len(row['members']) - 1}" if len(row["members"]) > 1 else ""),
        "d_in": str(row["d_in"]),
        "tokens": f"{row['tokens']:,}",
        "trace": f"{row['trace']:.3e}",
        "outliers": f"{row['outliers']:,}",
        "sums": row["precision"],
    }


def text_table(table_rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as aligned plain text, the first column to the left, the others to the right."""
    shown = [cells(dict(row)) for row in table_rows]
    if not shown:
        return "(no sites)"
    titles = max(shown, key=len)
    widths = {title: max(len(title), *(len(row.get(title, "")) for row in shown)) for title in titles}

    def line(row: Mapping[str, str]) -> str:
        first, *others = widths
        return "  ".join([row[first].ljust(widths[first]), *(row.get(title, "").rjust(widths[title]) for title in others)])

    return "\n".join([line({title: title for title in widths}), *(line(row) for row in shown)])
