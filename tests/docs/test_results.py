"""The figures in README and in the page of results are those of the records in `benchmarks/results`."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from nullspace.reporting.study import Spread, at_equal_loss, knowledge_lost, read_records, read_study

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
LABELS = {
    "LoRA-Null v2": "lora-null-v2", "CorDA-KPM": "corda-kpm", "`b-zero`": "b-zero", "LoRA-Null v1": "lora-null-v1",
    "PiSSA": "pissa", "LoRA": "lora", "MiLoRA": "milora",
}  # fmt: skip


def rows(page: str) -> list[list[str]]:
    """Cells of all rows of all tables of a page."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


def is_rounded(text: str, value: float) -> bool:
    """Whether a number is a value, to the digits that it shows."""
    digits = len(text.partition(".")[2])
    return float(text.replace("−", "-")) == round(value, digits) or float(text) == float(f"{value:.2g}")


def summary(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))["summary"]


def test_what_methods_forget() -> None:
    study = read_study(RESULTS / "preservation-cpu.jsonl")
    assert study.base is not None
    found: dict[str, list[Spread]] = {}
    for row in at_equal_loss(study):
        found.setdefault(row["variant"], []).append(row["forgetting"])
    table = {row[0]: row[1:] for row in rows("docs/results.md") if row[0] in LABELS}
    assert table.keys() == LABELS.keys()
    for label, (early, late, dropped) in table.items():
        variant = LABELS[label]
        for cell, spread in zip((early, late), found[variant][-2:], strict=True):
            mean, deviation = cell.split(" ± ")
            assert is_rounded(mean, spread.mean), (label, cell, spread)
            assert is_rounded(deviation, spread.deviation), (label, cell, spread)
        if variant in study.dropped:
            assert is_rounded(dropped, knowledge_lost(study.dropped[variant], study.base)), label
        else:
            assert dropped == ""


def test_what_holds_through_training() -> None:
    tables = pytest.importorskip("benchmarks.holding_tables", reason="needs the repository's root on the path: python -m pytest")
    held = tables.read(RESULTS / "holding-cpu.jsonl")
    lines = (ROOT / "docs/results.md").read_text(encoding="utf-8").splitlines()
    for table in filter(lambda table: len(table) > 1, (make(held) for make in tables.TABLES.values())):
        first = lines.index(tables.markdown(table[:1]).splitlines()[0])
        shown = itertools.takewhile(lambda line: line.startswith("|"), lines[first:])
        assert list(shown) == tables.markdown(table).splitlines()


def test_what_a_budget_of_ranks_does() -> None:
    budget = pytest.importorskip("benchmarks.evidence.budget", reason="needs the repository's root on the path: python -m pytest")
    page = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
    assert budget.with_table(page, read_records(budget.RECORDS)) == page
    assert budget.HEAD[0] in page


def test_three_tasks_in_a_row() -> None:
    tables = pytest.importorskip(
        "benchmarks.three_tasks_tables", reason="needs the repository's root on the path: python -m pytest"
    )
    read = tables.read(RESULTS / "three-tasks-cpu.jsonl")
    page = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    assert all(tables.markdown(make(read)) in page for make in tables.TABLES.values())


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_what_a_calibration_costs(page: str) -> None:
    measured = [*(summary("layerwise-cpu.json")[name] for name in ("resident", "layerwise")), summary("peers-cpu.json")["corda"]]
    shown = [row for row in rows(page) if len(row) == 3 and re.fullmatch(r"[\d.]+ ×", row[1])]
    assert len(shown) == len(measured)
    for (_, time, memory), known in zip(shown, measured, strict=True):
        assert is_rounded(time.removesuffix(" ×"), known["time_over_forward"])
        assert is_rounded(memory.partition(" GB")[0].replace("−", "-"), known["gb_above_forward"])


def test_what_the_readme_claims_is_on_the_page_of_evidence() -> None:
    readme, page = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/evidence.md"))
    claim = re.search(r"^\*SmolLM2-135M fine-tuned on GSM8K\..+?\*$", readme, flags=re.MULTILINE | re.DOTALL)
    assert claim is not None
    parts = dict(re.findall(r"(`contrast`|LoRA-Null v2|CorDA-KPM|filtered)\D*?(1/[\d.]+)", claim[0]))
    alone = page[page.index("## What a start alone does") : page.index("## Where calibration is not ahead")]
    on_page = {"`contrast`": "contrast", "LoRA-Null v2": "LoRA-Null v2", "CorDA-KPM": "CorDA-KPM", "filtered": "without it: LoRA"}
    assert parts.keys() == on_page.keys()
    assert all(re.search(rf"{on_page[name]} {re.escape(part)}(?![\d.]*\d)", alone) for name, part in parts.items())
    form = page[page.index("### Calibration: the form") :]
    assert re.search(r"^\| contrast \| [^|]+\| 10 \(", form, flags=re.MULTILINE)  # "ten times as much"


def test_what_a_mixture_costs() -> None:
    measured = summary("experts-cpu.json")
    shown = {row[0]: row[1:] for row in rows("docs/results.md") if row[0] in measured and row[0] != "forward"}
    assert shown.keys() == measured.keys() - {"forward"}
    for variant, (memory, processor) in shown.items():
        known = measured[variant]
        assert is_rounded(processor.removesuffix(" ×"), known["processor_over_forward"]), variant
        assert known["processor_over_forward"] <= 2.5 or variant == "spaces-each"
        if memory:
            assert is_rounded(memory, known["forecast_over_measured"]), variant
            assert abs(known["forecast_over_measured"] - 1) <= 0.15, variant


def test_what_a_cut_to_a_smaller_rank_loses() -> None:
    truncation = pytest.importorskip("benchmarks.truncation", reason="needs the repository's root on the path: python -m pytest")
    record = json.loads((RESULTS / "truncation-cpu.json").read_text(encoding="utf-8"))
    assert len(record["layers"]) == 210
    assert record["summary"] == truncation.summarise(record["layers"])
    page = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    assert "\n".join(truncation.table(record["summary"], 210)) in page
    # On the inputs that the cut is by it is the optimum: in every layer.
    for row in record["layers"]:
        for errors in row["errors"].values():
            by_c, frobenius = errors["calibration"]
            assert by_c <= frobenius, row["layer"]


def test_plans_of_published_models() -> None:
    plans = pytest.importorskip("benchmarks.plans", reason="needs the repository's root on the path: python -m pytest")
    page = (ROOT / "docs/large-models.md").read_text(encoding="utf-8")
    assert all(table in page for table in plans.tables(plans.read()))
    assert len(plans.read()) == len(plans.MODELS) * len(plans.ON) == 42
