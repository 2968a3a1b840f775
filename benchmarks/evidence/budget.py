"""The table of the experiment `budget` in docs/methods.md, from its records: `python -m benchmarks.evidence.budget`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.evidence import choice
from benchmarks.evidence.choice import Chosen, Curve
from benchmarks.evidence.statistics import Evidence, Way, evidence
from benchmarks.evidence.tables import markdown, significant
from nullspace.reporting.study import read_records

ROOT = Path(__file__).resolve().parents[2]
RECORDS, PAGE = ROOT / "benchmarks/results/rank-budget-cpu.jsonl", ROOT / "docs/methods.md"
LEVELS = (0.5, 0.8, 0.9)
"""shares of what plain LoRA learns at best"""
HEAD = ["start", "ranks", "trained parameters", *(f"KL ÷ LoRA's at {level:.0%}" for level in LEVELS)]
LABELS = {
    "lora": "LoRA",
    "contrast": "contrast",
    "contrast budget": "contrast, budget",
    "lora-null v2": "LoRA-Null v2",
    "lora-null v2 budget": "LoRA-Null v2, budget",
    "eva": "EVA",
    "eva budget": "EVA, budget",
    "eva rho 2": "EVA, its own redistribution (ρ = 2)",
    "adalora": "AdaLoRA",
}


def table(records: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A row a method whose change was scored: its KL on the validation split where it has learned as much as each level asks."""
    found = evidence(records)
    ranks = {record["run"]["method"]: record for record in records if record["kind"] == "ranks"}
    plain = list(_curves(found, "lora").values())
    rows = [HEAD]
    for method, label in LABELS.items():
        curves = _curves(found, method)
        if not curves:
            continue
        spread = ranks[method]["ranks"]
        between = str(spread["most"]) if spread["least"] == spread["most"] else f"{spread['least']} to {spread['most']}"
        cells = []
        for level in LEVELS:
            of_lora, own = chosen_of(found, "lora", level), chosen_of(found, method, level)
            assert of_lora is not None
            reached = choice.share(_base_loss(found), plain, curves.values())
            cells.append(significant(own.kl / of_lora.kl, 2) if own else f"reaches {reached:.1%}")
        rows.append([label, between, f"{ranks[method]['parameters']:,}", *cells])
    return rows


def chosen_of(found: Evidence, method: str, level: float) -> Chosen | None:
    """The point of a method, of all rates and scales on the validation split, that reaches the target with the least KL."""
    plain = list(_curves(found, "lora").values())
    return choice.chosen(_curves(found, method), choice.target(_base_loss(found), plain, level))


def _base_loss(found: Evidence) -> float:
    return float(found.bases["gsm8k", "validation"]["task"]["loss"])


def _curves(found: Evidence, method: str) -> dict[float, Curve]:
    """Rate → curve over the scales. A rate of which fewer scales were scored is left out."""
    scored: dict[float, list[choice.Point]] = {}
    for each in found.points:
        if each.way == Way(method) and each.split == "validation":
            point = choice.Point(each.t, each.scores["task"]["loss"], each.scores["nq"]["kl"])
            scored.setdefault(each.rate, []).append(point)
    return {rate: choice.curve(_base_loss(found), points) for rate, points in scored.items() if len(points) >= LEAST}


LEAST = 2
"""Scales of a curve, beside the base."""


def with_table(page: str, records: Sequence[Mapping[str, Any]]) -> str:
    """The page with this table in the place of its last version."""
    made = markdown(table(records))
    return re.sub(rf"^\| {HEAD[0]} \| {HEAD[1]} \|.*?(?=\n\n)", lambda _: made, page, flags=re.MULTILINE | re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), read_records(RECORDS)), encoding="utf-8")
