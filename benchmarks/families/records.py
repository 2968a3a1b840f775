"""The file of results: JSON Lines, the environment first, then a row an architecture with the commit that made it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Row = dict[str, Any]

STEPS = ("resident", "layerwise", "start", "train", "reload", "export")
# Largest relative difference: of sums, by the dtype of the model; of outputs.
SAME_SUMS = {"float64": 1e-9, "float32": 1e-5}
SAME_OUTPUTS = 3e-5


def read(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """The environment of the last run, and the rows in the file's order."""
    first, *rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return first["environment"], rows


def write(path: Path, environment: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> None:
    """Everything, whole or not at all."""
    part = path.with_suffix(".part")
    lines = [{"environment": environment}, *rows]
    part.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    part.replace(path)
