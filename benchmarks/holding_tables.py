"""The tables of `benchmarks.holding`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nullspace.reporting import study as fronts

Record = Mapping[str, Any]


def key(record: Record) -> str:
    """By which a scored variant is known."""
    return json.dumps([record["part"], record["run"], record["variant"]], sort_keys=True)


def listed(path: Path) -> list[str]:
    """A line a scored variant: its task loss, and KL to the base of each probe."""
    lines = []
    for record in fronts.read_records(path):
        if record["kind"] == "score":
            numbers = [f"{name} {each['loss' if name == 'task' else 'kl']:.4f}" for name, each in record["scores"].items()]
            lines.append("  ".join([record["part"], record["run"], str(record["variant"]), *numbers]))
    return lines
