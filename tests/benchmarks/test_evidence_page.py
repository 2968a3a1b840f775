"""The numbers of the evidence page, from records whose numbers are known; and that the page that is kept is made by its records."""

from __future__ import annotations

import random
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("benchmarks.evidence.page", reason="needs the repository's root on the path: python -m pytest")
from benchmarks.evidence import figure, findings, fronts, names, page, tables
from benchmarks.evidence import statistics as measures
from benchmarks.evidence.settings import Sizes
from benchmarks.evidence.statistics import LORA, Cell, Comparison, Way, evidence
from nullspace.reporting.study import read_records

Record = dict[str, Any]
QUESTIONS = {"nq": 120, "webq": 90}
SEEDS = (0, 1, 2)
MAIN = Cell("gsm8k", 10, 16, "prompt", 256)
CONTRAST, FILTERED, CORDA = Way("contrast"), Way("lora", "filter"), Way("corda-kpm")
# Way → KL over LoRA's.
SIZES = {LORA: 1.0, FILTERED: 0.1, CORDA: 0.5, CONTRAST: 0.05, Way("confine"): 0.2, Way("lora", "intruder"): 0.9}
SIZES_OF_STUDY = asdict(Sizes())
BASE_LOSS, LORA_BEST = 1.6, 0.9


def rows(name: str, size: float, seed: int) -> Mapping[str, list[Any]]:
    """KL of each question in proportion to a size, another one with each seed, and as much less likely an answer."""
    generator = np.random.default_rng([len(name), 5])
    tokens = generator.integers(1, 9, QUESTIONS[name])
    kl = size * (1 + seed) * tokens * generator.exponential(0.05, QUESTIONS[name])
    return {"tokens": tokens.tolist(), "kl": kl.tolist(), "log_likelihood": (-10 - 2 * kl).tolist()}


def asked(name: str, size: float, seed: int) -> Record:
    each = rows(name, size, seed)
    tokens = sum(each["tokens"])
    return {"loss": 3.0, "log_likelihood": float(np.mean(each["log_likelihood"])), "kl": sum(each["kl"]) / tokens, "rows": each}


def run_and_post(way: Way, cell: Cell, seed: int, rate: float) -> Record:
    """With the calibration where it belongs: to the run, to the filter or to neither."""
    calibrated = {"form": cell.form, "samples": cell.samples}
    free = way.method == "lora"
    run = {"method": way.method, "seed": seed, "rate": rate, **cell._asdict(), **({"form": "", "samples": 0} if free else {})}
    filtered = way.how == "filter"
    return {"run": run, "post": {"how": way.how, "strength": float(filtered), **(calibrated if filtered else {})}}


def scored(way: Way, size: float, seed: int, cell: Cell = MAIN) -> Record:
    other = {"loss": 2.0 + 0.1 * size, "log_likelihood": -20.0, "kl": 0.01 * size**0.5, "tokens": 50}
    scores = {name: asked(name, size, seed) for name in QUESTIONS} | dict.fromkeys(("humaneval", "alpaca", "wikitext"), other)
    task = {"loss": 1.0 + 0.01 * seed, "log_likelihood": -40.0, "kl": 0.5}
    record = {"kind": "score", **run_and_post(way, cell, seed, 2e-3), "t": 0.9, "split": "test", "level": 0.9}
    return record | {"scores": {"task": task, **scores}, "drift": {"median": 0.01 * size, "largest": 0.1}, "seconds": 1.0}


def tried(way: Way, size: float, seed: int, t: float, rate: float = 2e-3) -> Record:
    """Task loss falls from the base's to LoRA's best at t = 1, and KL is size · t²."""
    scores = {"task": {"loss": LORA_BEST + (BASE_LOSS - LORA_BEST) * (1 - t) ** 2}, "nq": {"kl": size * t * t}}
    record = {"kind": "score", **run_and_post(way, MAIN, seed, rate), "t": t, "split": "validation", "level": None}
    return record | {"scores": scores, "drift": {}}


def base(task: str = "gsm8k") -> list[Record]:
    scores = {name: asked(name, 0.0, 0) for name in QUESTIONS}
    scores |= {name: {"loss": 2.0, "kl": 0.0} for name in ("humaneval", "alpaca", "wikitext")} | {"task": {"loss": BASE_LOSS}}
    return [{"kind": "base", "task": task, "split": split, "scores": scores} for split in ("validation", "test")]


def study(sizes: Mapping[Way, float] = SIZES) -> list[Record]:
    first = {"kind": "study", "settings": {"model": "a tiny model", "sizes": SIZES_OF_STUDY}, "environment": {}}
    points = [scored(way, size, seed) for way, size in sizes.items() for seed in SEEDS]
    curves = [tried(way, size, seed, t) for way, size in sizes.items() for seed in SEEDS for t in (0.5, 1.0, 1.2)]
    return [first, *base(), *curves, *points]


def compared(records: Iterable[Record], cell: Cell = MAIN) -> Comparison:
    return Comparison(evidence(list(records)), cell, 0.9)


@pytest.fixture(scope="module")
def whole() -> Comparison:
    return compared(study())


def test_kl_is_that_of_all_tokens_of_a_set_and_the_mean_of_sets_and_seeds(whole: Comparison) -> None:
    wanted = [np.mean([asked(name, 0.5, seed)["kl"] for name in QUESTIONS]) for seed in SEEDS]
    found = whole.kl(CORDA)
    assert found.seeds == pytest.approx(wanted)
    assert found.value == pytest.approx(np.mean(wanted))
    assert found.deviation == pytest.approx(np.std(wanted, ddof=1))
    assert found.questions[0] < found.value < found.questions[1]


def test_the_interval_is_that_of_the_delta_method(whole: Comparison) -> None:
    variances = []
    for name, questions in QUESTIONS.items():
        each = rows(name, 1.0, 1)
        kl, tokens = np.array(each["kl"]), np.array(each["tokens"])
        residual = kl - tokens * kl.sum() / tokens.sum()
        variances.append(residual.var() / questions / tokens.mean() ** 2)
    low, high = whole.kl(LORA).questions
    # The mean over seeds, which are as 1 : 2 : 3, is that of seed 1; the mean of two sets has half the root of both variances.
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(np.sum(variances)) / 2, rel=0.1)


def test_what_differs_by_a_factor_differs_by_it_in_every_resample(whole: Comparison) -> None:
    ratio = whole.ratio(CONTRAST)
    assert ratio is not None
    for value in (ratio.value, *ratio.questions, *ratio.both, *ratio.seeds):
        assert value == pytest.approx(0.05)
    assert whole.ratio(LORA, CONTRAST).value == pytest.approx(20)  # type: ignore[union-attr]
    assert whole.probe_ratio(FILTERED, "wikitext") == pytest.approx([0.1**0.5] * 3)
    assert whole.ranked()[:2] == [CONTRAST, FILTERED]


def test_seeds_widen_the_interval_and_the_resolution_is_its_width_over_the_difference(whole: Comparison) -> None:
    found = measures.resolution(whole)
    assert found is not None
    assert found.best == CONTRAST
    assert found.difference.value == pytest.approx(0.95 * whole.kl(LORA).value)
    low, high = found.difference.questions
    assert found.questions == pytest.approx((high - low) / found.difference.value)
    assert found.both > 2 * found.questions  # KL of the seeds is as 1 : 2 : 3


def test_what_has_not_all_seeds_is_shown_and_does_not_lead() -> None:
    lucky = Way("mica")
    missed = {"kind": "missed", **run_and_post(lucky, MAIN, 2, 2e-3), "level": 0.9, "reached": 0.8}
    found = compared([*study(), scored(lucky, 0.01, 0), scored(lucky, 0.01, 1), missed])
    assert found.ranked()[0] == lucky
    assert lucky not in found.whole()
    assert measures.resolution(found).best == CONTRAST  # type: ignore[union-attr]
    said = findings.answer(found)
    assert "**contrast** moves the model least" in said
    assert "MiCA" not in said
    assert all("MiCA" not in cell for row in findings.whom(found) for cell in row)
    assert any(
        cell.endswith("; missed with seed 2") for row in tables.across(found, {MAIN._replace(steps=100): found}) for cell in row
    )


def test_as_many_rates_are_named_as_were_run() -> None:
    one = study()
    assert findings.rates(evidence(one), MAIN) == "one"
    three = [*one, *(tried(CONTRAST, 0.05, 0, 1.0, rate) for rate in (4e-3, 8e-3))]
    assert findings.rates(evidence(three), MAIN) == "one or three"
    assert "a third one is run after" in page.page(three, "records.jsonl")
    assert "none has been run yet" in page.page(one, "records.jsonl")


def test_forgetting_counts_from_the_base(whole: Comparison) -> None:
    lost = whole.forgotten(LORA, ("nq",))
    assert lost.value == pytest.approx(2 * np.mean([rows("nq", 1.0, seed)["kl"] for seed in SEEDS]))
    less = whole.forgotten_less(CONTRAST)
    assert less is not None
    assert less.value == pytest.approx(0.95 * whole.forgotten(LORA).value)


def test_models_that_were_asked_fewer_questions_are_compared_on_the_first_ones(whole: Comparison) -> None:
    fewer = [scored(CONTRAST, 0.05, seed) for seed in SEEDS]
    for record in fewer:
        kept = record["scores"]["nq"]["rows"]
        record["scores"]["nq"] = {"kl": 77.0, "rows": {name: kept[name][:50] for name in ("kl", "log_likelihood")}}
    found = compared([*study(), *fewer])
    assert found.questions == {"nq": 50, "webq": 90}
    for ratio in (found.ratio(CONTRAST), whole.ratio(CORDA, LORA, found)):
        assert ratio is not None
        assert ratio.seeds == pytest.approx([0.05 if ratio.value < 0.1 else 0.5] * 3)
    assert found.probe_ratio(CONTRAST, "nq") == pytest.approx([0.05] * 3)
    first = rows("nq", 1.0, 0)
    assert found.forgotten(LORA, ("nq",)).seeds[0] == pytest.approx(2 * np.mean(first["kl"][:50]))


def test_a_seed_that_misses_is_left_out_of_both_sides() -> None:
    gone = scored(CORDA, 0.5, 2)
    records = [record for record in study() if record != gone]
    records.append({"kind": "missed", "run": gone["run"], "post": "none", "level": 0.9, "reached": 0.84})
    found = compared(records)
    ratio = found.ratio(CORDA)
    assert ratio is not None
    assert ratio.seeds == pytest.approx([0.5, 0.5])
    assert found.missed == {CORDA: {2: 0.84}}
    assert "CorDA-KPM (2 of 3 seeds)" in tables.markdown(tables.main(found))
    assert tables.missing(found)[1] == ["CorDA-KPM", "2", "0.84"]
    assert compared([*records, gone]).missed == {}


def test_the_point_that_was_chosen_last_counts() -> None:
    found = compared([*study(), *(scored(CONTRAST, 0.3, seed) for seed in SEEDS)])
    assert found.ratio(CONTRAST).value == pytest.approx(0.3)  # type: ignore[union-attr]


def test_a_form_makes_a_factor_and_what_is_not_calibrated_belongs_to_every_form() -> None:
    text = MAIN._replace(form="text")
    more = [scored(way, size, seed, text) for way, size in ((FILTERED, 0.25), (CONTRAST, 0.15)) for seed in SEEDS]
    found = page.Compared(evidence([*study(), *more]))
    assert found.main.cell == MAIN
    others = found.beside("form")
    assert others[text].ratio(FILTERED).value == pytest.approx(0.25)  # type: ignore[union-attr]
    table = tables.factors(found.main, others)
    factors = {row[0]: row[-1] for row in table[1:]}
    assert factors == {"contrast": "3.0 (3.0, 3.0, 3.0)", "LoRA, filtered": "2.5 (2.5, 2.5, 2.5)"}
    assert findings.wider(found.main, others) == ""  # KL is larger there
    across = tables.across(found.main, others)
    assert across[0][1:] == ["text and few-shot questions", "text"]
    assert next(row for row in across if row[0] == "contrast")[2].endswith("; 0.15 (0.15, 0.15, 0.15)")
    kept = tables.kept_forms(found.main, others)
    assert next(row[:4] for row in kept if row[1] == "text") == [
        "contrast",
        "text",
        "0.15 (0.15 to 0.15)",
        "0.15 (0.15 to 0.15)",
    ]


def test_a_form_that_holds_more_of_what_was_not_calibrated_is_named() -> None:
    mixed = MAIN._replace(form="mixed")
    more = [scored(CONTRAST, 0.06, seed, mixed) for seed in SEEDS]
    for record in more:
        record["scores"]["alpaca"] = {"loss": 2.0, "kl": 1e-3}
        record["scores"]["humaneval"] = record["scores"]["wikitext"] = {"loss": 2.0, "kl": 5e-4}
    found = page.Compared(evidence([*study(), *more]))
    assert findings.wider(found.main, found.beside("form")) == (
        "Calibrated on text, questions in all three forms and WikiText, it leaves 1/20 on HumanEval, 1/20 on WikiText "
        "and 1/10 on Alpaca, 1/17 on the questions above."
    )


def test_fronts_take_the_least_kl_over_rates_at_equal_learning() -> None:
    slow = [tried(CONTRAST, 0.01, seed, t, rate=1e-3) for seed in SEEDS for t in (0.5, 1.0, 1.2)]
    for record in slow:
        record["scores"]["task"]["loss"] += 0.3 * record["t"]  # less KL, but it learns half as much
    lines = fronts.fronts(evidence([*study(), *slow]), MAIN, [0.3, 0.9, 1.05])
    # A share s is learned at t = 1 − √(1 − s).
    assert lines[LORA][:2] == pytest.approx([(1 - 0.7**0.5) ** 2, (1 - 0.1**0.5) ** 2], rel=0.1)
    assert lines[CONTRAST][0] < 0.05 * lines[LORA][0]
    assert lines[CONTRAST][1] == pytest.approx(0.05 * lines[LORA][1])
    assert np.isnan(lines[LORA][2])
    shares = fronts.most_learned(evidence([*study(), *slow]), MAIN)
    assert shares[LORA] == pytest.approx([1.0] * 3)


def test_the_page_says_what_the_numbers_say_and_not_in_which_order_they_came() -> None:
    records = study()
    text = page.page(records, "records.jsonl")
    assert "**contrast** moves the model least" in text
    assert "1/20 of plain LoRA's" in text
    assert "1/10 of CorDA-KPM's" in text
    assert "less than confine and CorDA-KPM, more than contrast" in text
    assert "on WikiText" in text
    assert "Only the main table has been measured so far" in text
    shuffled = [records[0], *random.Random(0).sample(records[1:], len(records) - 1)]
    assert page.page(shuffled, "records.jsonl") == text
    assert "None of 2 methods" in page.page(study({LORA: 1.0, CORDA: 2.0}), "records.jsonl")
    assert "cannot be told apart" in findings.answer(compared(close()))


def close() -> list[Record]:
    """Confine has less KL than contrast with one seed, and more with the others."""
    records = [record for record in study() if record["kind"] != "score" or record["run"]["method"] != "confine"]
    return [*records, *(scored(Way("confine"), size, seed) for seed, size in zip(SEEDS, (0.04, 0.055, 0.06), strict=True))]


def test_every_table_of_the_page_has_its_rows_and_links_lead_to_it() -> None:
    text = page.page(study(), "records.jsonl")
    widths: list[int] = []
    for line in text.splitlines():
        if line.startswith("|"):
            widths.append(line.count("|"))
            assert widths[-1] == widths[0], line
        else:
            widths = []
    assert "nan" not in text.lower().replace("unanswered", "")
    assert text.count("LoRA, intruders reduced") >= 3


def test_the_picture_is_the_same_twice(tmp_path: Path) -> None:
    found = evidence(study())
    for name in ("a.svg", "b.svg"):
        figure.write(found, MAIN, 0.9, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_records_that_are_no_study_or_have_nothing_to_compare_with_are_refused() -> None:
    with pytest.raises(ValueError, match="do not begin with those of a study"):
        evidence(study()[1:])
    with pytest.raises(ValueError, match="no point of the test split"):
        page.page(study({}), "records.jsonl")
    with pytest.raises(ValueError, match="no plain LoRA"):
        page.page(study({CONTRAST: 0.1}), "records.jsonl")


def test_numbers_are_shown_to_their_digits() -> None:
    assert [tables.significant(value, 2) for value in (0.0123, 9.96, 123.0, -0.0005)] == ["0.012", "10", "120", "−0.00050"]
    assert [tables.signed(value, 2) for value in (0.123, -0.1, -0.001)] == ["+0.12", "−0.10", "0.00"]
    assert [tables.part(value) for value in (0.04, 0.84, 2.13)] == ["1/25", "0.84", "2.1 times"]


def test_the_page_knows_the_methods_of_the_study() -> None:
    methods = pytest.importorskip("benchmarks.evidence.methods").METHODS
    words = {"keep": names.KEEP, "task": names.TASK}
    assert {name: set(names.METHODS[name].needs) for name in methods} == {
        name: {words[need] for need in method.needs} for name, method in methods.items()
    }


def test_the_commands_of_the_page_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    parse = pytest.importorskip("benchmarks.evidence.__main__").parse
    shown = set(re.findall(r"(?<=python -m benchmarks\.evidence )[^`\n#]+", page.page(study(), "records.jsonl")))
    assert len(shown) > 5
    for command in shown:
        monkeypatch.setattr("sys.argv", ["evidence", *shlex.split(command)])
        assert parse().out


@pytest.mark.skipif(not page.RECORDS.exists(), reason="the study has not been recorded yet")
def test_the_pages_that_are_kept_are_made_by_the_records_that_are_kept() -> None:
    records = read_records(page.RECORDS)
    assert page.page(records, page.RECORDS.name) == page.PAGE.read_text(encoding="utf-8"), "python -m benchmarks.evidence.page"
    methods, compared = page.METHODS.read_text(encoding="utf-8"), page.Compared(evidence(records))
    assert page.with_choices(methods, compared) == methods, "python -m benchmarks.evidence.page"
    ways = {way for row in findings.whom(compared.main)[1:] for way in row[1::2]} - {"", "LoRA"}
    assert {way for way in ways if f"\n| {way} | " not in methods} == set()


def test_the_page_of_methods_has_a_table_of_choices() -> None:
    head = "| what there is | least KL | KL ÷ LoRA's | next | KL ÷ LoRA's |"
    compared = page.Compared(evidence(study()))
    made = page.with_choices(f"before\n\n{head}\n|---|\n| old |\n\nafter\n", compared)
    assert made.startswith(f"before\n\n{head}\n|---|---|---|---|---|\n")
    assert "| an adapter is trained already | LoRA, filtered |" in made
    assert made.endswith("|\n\nafter\n")
    assert "old" not in made
    with pytest.raises(ValueError, match="no table"):
        page.with_choices("before", compared)
