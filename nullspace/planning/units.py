"""Sizes and times as text, and sizes from text."""

from __future__ import annotations

import re

from nullspace.errors import InputError


def gigabytes(size: float) -> str:
    """`1.2 GB` (10⁹ bytes); smaller sizes in MB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


LARGEST_GB, SMALLEST_BYTES = 10_000, 10**7
"""Of bare numbers: up to the first they are GB, from the second on bytes, and between them nothing is assumed."""


def parse_size(text: str) -> int:
    """Bytes of `"24GB"` (10⁹), `"24GiB"` (2³⁰), `"800 MB"` or `"24"` (GB); a bare number from 10⁷ on is bytes.

    Raises:
        ValueError: if it is none of these.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?)b?|(b))?\s*", text, re.IGNORECASE)
    if match is None:
        raise InputError(f"{text!r} is no size: write 24GB, 24GiB or 24 (GB)")
    number, unit, binary, bare_bytes = match.groups()
    if unit is None and bare_bytes is None:
        if float(number) <= LARGEST_GB:
            unit = "g"
        elif float(number) < SMALLEST_BYTES:
            raise InputError(f"{text!r} may be of MB or of bytes: write {text.strip()}MB or {text.strip()}B")
    power = " kmgt".index(unit.lower()) if unit else 0
    return int(float(number) * (1024 if binary else 1000) ** power)


def duration(seconds: float) -> str:
    """`12 s`, `3.4 min` or `1.5 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
