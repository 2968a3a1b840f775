"""Sizes and times as text, and sizes from text."""

from __future__ import annotations

import re

from nullspace.errors import InputError


def gigabytes(size: float) -> str:
    """`1.2 GB` (10⁹ bytes); smaller sizes in MB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def parse_size(text: str) -> int:
    """Bytes of `"24GB"` (10⁹), `"24GiB"` (2³⁰), `"800 MB"` or a bare number.

    Raises:
        ValueError: if it is none of these.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?)b?|b)?\s*", text, re.IGNORECASE)
    if match is None:
        raise InputError(f"{text!r} is no size: write 24GB, 24GiB or a number of bytes")
    number, unit, binary = match.groups()
    power = " kmgt".index(unit.lower()) if unit else 0
    return int(float(number) * (1024 if binary else 1000) ** power)


def duration(seconds: float) -> str:
    """`12 s`, `3.4 min` or `1.5 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
