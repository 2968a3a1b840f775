"""The file of results: JSON Lines, a row an architecture, with the environment that made it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Row = dict[str, Any]

STEPS = ("resident", "layerwise", "start", "train", "reload", "export")
# Largest relative difference: of sums of products in float64; of outputs, in float32.
SAME_SUMS = 1e-9
SAME_OUTPUTS = 3e-5


def read(path: Path) -> list[Row]:
    """The rows, in the file's order."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """All rows, whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    part.replace(path)
