"""The page of the documentation that shows the rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def page_of(rows: Iterable[dict[str, Any]]) -> str:
    """Markdown."""
    return "".join(str(row) for row in rows)
