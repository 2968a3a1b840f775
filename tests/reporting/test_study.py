"""The records of a preservation study: reading them, the paper's columns, and methods compared where they learned the same."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from nullspace.reporting import study as fronts


def scores(loss: float, nq: float = -10.0, perplexity: float = 20.0, match: float | None = 0.2) -> dict[str, Any]:
    answered = {} if match is None else {"exact_match": match}
    return {
        "knowledge": {"nq": {"log_likelihood": nq, **answered}, "webq": {"log_likelihood": -8.0, **answered}},
        "text": {"wikitext": {"perplexity": perplexity}},
        "task": {"loss": loss, "token_accuracy": 0.5},
    }


def run(variant: str, rate: float, seed: int, loss: float, nq: float, **others: Any) -> dict[str, Any]:
    return {"kind": "run", "variant": variant, "learning_rate": rate, "seed": seed, "scores": scores(loss, nq), **others}


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


SETTINGS = {"kind": "study", "settings": {"rank": 4}}
BASE = {"kind": "base", "scores": scores(2.0)}


def study(*runs: dict[str, Any]) -> fronts.Study:
    return fronts.Study({}, scores(2.0), {}, {}, list(runs))


def test_reading(tmp_path: Path) -> None:
    start = {"kind": "start", "variant": "b", "scores": scores(2.0)}
    dropped = {"kind": "dropped", "variant": "b", "scores": scores(2.5)}
    runs = [run("b", 1e-3, 0, 1.0, -11.0), run("a", 1e-3, 0, 1.0, -11.0)]
    found = fronts.read_study(write(tmp_path / "results.jsonl", [SETTINGS, BASE, start, dropped, *runs]))
    assert found.settings == {"rank": 4}
    assert found.base == scores(2.0)
    assert (found.start, found.dropped) == ({"b": scores(2.0)}, {"b": scores(2.5)})
    assert found.runs == runs
    assert found.variants == ["b", "a"]


def test_a_line_that_was_cut_off_while_it_was_written_is_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "results.jsonl", [SETTINGS, BASE])
    with open(path, "a") as file:
        file.write('{"kind": "run", "variant"')
    assert [record["kind"] for record in fronts.read_records(path)] == ["study", "base"]


@pytest.mark.parametrize(
    ("text", "message"),
    [("{\n", "line 1: not JSON"), ("[1]\n", "line 1: not a record"), ("{}\n", "line 1: not a record"), ("", "does not begin with")],
)
def test_a_foreign_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"results.jsonl.*{message}"):
        fronts.read_study(path)


def test_what_was_lost() -> None:
    # One of two sets lost 1 nat an answer; text is a factor e^0.1 more surprising.
    after = scores(1.0, nq=-11.0, perplexity=20.0 * math.exp(0.1))
    assert fronts.knowledge_lost(after, scores(2.0)) == pytest.approx(0.5)
    assert fronts.text_lost(after, scores(2.0)) == pytest.approx(0.1)


def test_the_papers_columns() -> None:
    after = scores(1.0, match=0.1)
    after["knowledge"]["webq"]["exact_match"] = 0.2
    found = fronts.paper_columns(after, scores(2.0, match=0.2))
    assert found == pytest.approx({"Avg1": 15.0, "Avg1(Per)": 75.0, "Avg2": 50.0, "GM": math.sqrt(15 * 50)})
    after["task"]["exact_match"] = 0.3
    assert fronts.paper_columns(after, scores(2.0))["Avg2"] == pytest.approx(30.0)
    # A model that knew nothing has no share of it left, and answers that were not written are no answers.
    assert fronts.paper_columns(after, scores(2.0, match=0.0))["Avg1(Per)"] is None
    unanswered = fronts.paper_columns(scores(1.0, match=None), scores(2.0, match=None))
    assert unanswered == {"Avg1": None, "Avg1(Per)": None, "Avg2": 50.0, "GM": None}


def test_forgetting_is_read_off_between_learning_rates_whatever_their_order_in_the_file() -> None:
    runs = [run("a", 1e-2, 0, 1.0, -14.0), run("a", 1e-3, 0, 1.5, -11.0)]
    points = fronts.path(runs, scores(2.0), "knowledge")
    assert points == [(2.0, 0.0), (1.5, 0.5), (1.0, 2.0)]
    assert fronts.at_task_loss(points, 1.75) == pytest.approx(0.25)
    assert fronts.at_task_loss(points, 1.25) == pytest.approx(1.25)
    assert fronts.at_task_loss(points, 1.0) == 2.0
    assert fronts.at_task_loss(points, 2.0) == 0.0
    assert fronts.at_task_loss(points, 0.9) is None


def test_a_rate_that_diverges_does_not_hide_what_lower_ones_reached() -> None:
    runs = [run("a", 1e-3, 0, 1.0, -11.0), run("a", 1e-1, 0, 9.0, -90.0)]
    assert fronts.at_task_loss(fronts.path(runs, scores(2.0), "knowledge"), 1.0) == pytest.approx(0.5)


def test_methods_are_compared_at_losses_that_all_of_them_reach_with_every_seed() -> None:
    found = study(
        *(run("quick", 1e-3, seed, 0.5, -12.0 - seed) for seed in (0, 1)),
        *(run("slow", 1e-3, seed, 1.5 - seed / 10, -10.1) for seed in (0, 1)),
    )
    assert fronts.common_losses(found, (0.5, 1.0)) == pytest.approx([1.75, 1.5])
    rows = fronts.at_equal_loss(found, "knowledge", [1.5])
    by_name = {row["variant"]: row["forgetting"] for row in rows}
    # A third of the way to (0.5, 1.0) and to (0.5, 1.5).
    assert by_name["quick"].mean == pytest.approx((1 / 3 + 1.5 / 3) / 2)
    assert by_name["quick"].deviation == pytest.approx(0.5 / 3 / math.sqrt(2))
    assert by_name["slow"].mean == pytest.approx((0.05 + 0.05 * 5 / 6) / 2)
    assert all(row["reached"] == row["seeds"] == 2 for row in rows)
    # Where a seed does not get there, the row says so.
    missed = {row["variant"]: row for row in fronts.at_equal_loss(found, "knowledge", [1.45])}
    assert (missed["slow"]["reached"], missed["slow"]["seeds"]) == (1, 2)
    assert fronts.at_equal_loss(found, "knowledge", [1.0])[1]["forgetting"] is None


def test_one_row_a_variant_and_rate_with_its_spread() -> None:
    layers = [{"leak_after": 0.1}, {"leak_after": 0.3}]
    runs = [run("a", 1e-3, seed, 1.0 + seed, -11.0, layers=layers[seed]) for seed in (0, 1)]
    rows = fronts.over_seeds(study(run("a", 1e-4, 0, 1.9, -10.0), *runs))
    assert [(row["variant"], row["learning_rate"]) for row in rows] == [("a", 1e-4), ("a", 1e-3)]
    assert rows[1]["task_loss"] == fronts.Spread(1.5, pytest.approx(math.sqrt(0.5)), 2)
    assert rows[1]["leak_after"].mean == pytest.approx(0.2)
    assert rows[0]["task_loss"].seeds == 1
    assert math.isnan(rows[0]["task_loss"].deviation)


def test_nothing_to_compare() -> None:
    with pytest.raises(ValueError, match="no run to compare"):
        fronts.at_equal_loss(study())
    with pytest.raises(ValueError, match="measure must be one of 'knowledge', 'text'"):
        fronts.at_equal_loss(study(run("a", 1e-3, 0, 1.0, -11.0)), "wisdom")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r[2].pop("seed"), "record 3 .*'seed' is missing"),
        (lambda r: r[2].update(learning_rate="fast"), "record 3 .*'learning_rate' should be a finite number"),
        (lambda r: r[1]["scores"]["task"].update(loss=math.nan), "record 2 .*'loss' should be a finite number"),
        (lambda r: r[2]["scores"]["text"]["wikitext"].update(perplexity=0), "'perplexity' should be a finite number"),
        (lambda r: r[2]["scores"]["knowledge"].pop("nq"), "record 3 .*: its scores are of"),
        (lambda r: r[2].update(scores=[]), "record 3 .*'scores' should be an object"),
        (lambda r: r[0].update(settings=None), "record 1 .*'settings' should be an object"),
        (lambda r: r[3].update(layers={"other": 1.0}), r"record 4 .*: its 'layers' have \['other'\]"),
    ],
)
def test_records_that_cannot_be_are_named(change: Any, words: str, tmp_path: Path) -> None:
    records = [SETTINGS, BASE, *(run("a", rate, 0, 1.5, -9.0, layers={"drift": 0.1}) for rate in (1e-4, 1e-3))]
    records = json.loads(json.dumps(records))
    assert len(fronts.read_study(write(tmp_path / "results.jsonl", records)).runs) == 2
    change(records)
    with pytest.raises(ValueError, match=rf"results\.jsonl, {words}" if words.startswith("record") else words):
        fronts.read_study(write(tmp_path / "results.jsonl", records))
