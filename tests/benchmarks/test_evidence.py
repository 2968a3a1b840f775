"""The evidence study: disjoint splits, the choice of what is reported, and a whole study of a tiny model that resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

pytest.importorskip("benchmarks.evidence", reason="needs the repository's root on the path: python -m pytest")
from benchmarks import evaluation, preservation
from benchmarks.evidence import choice, runs
from benchmarks.evidence import settings as declared
from benchmarks.evidence.base import prepare
from benchmarks.evidence.choice import Point
from benchmarks.evidence.data import Data, after_common_tokens
from benchmarks.evidence.runs import Worker
from benchmarks.evidence.settings import EXPERIMENTS, Sizes
from benchmarks.evidence.units import Settings, Unit, preservation_settings, units_of
from nullspace.reporting import study as records

# A template that answers behind a marker, as instruction-tuned models have.
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
SIZES = Sizes(
    samples=6, length=48, of_task=4, max_length=200, validation_examples=2, validation_questions=2, examples=2, questions=4,
    other_questions=2, forms_of_asking=2, abilities=2, windows=1, window=32, fewer_questions=2,
)  # fmt: skip


def test_no_row_has_two_uses() -> None:
    used: dict[str, list[int]] = {}
    parts = [declared.SHOTS, declared.CALIBRATION, declared.CHOICE]
    for task in declared.TASKS.values():
        parts += [*task.train, *task.validation, *task.test]
    for part in parts:
        used.setdefault(part.source, []).extend(part.rows)
    assert all(len(rows) == len(set(rows)) for rows in used.values())
    assert not {"nq", "webq"} & set(used)  # what is reported is of other sources than what calibrates and what is chosen on


def test_the_least_kl_among_what_reaches_the_target_is_chosen() -> None:
    # Loss 2 - 2t + t², KL a t²: the same learning at every rate, and a rate that costs a third.
    def points(cost: float, t: tuple[float, ...]) -> list[Point]:
        return [Point(each, 2 - 2 * each + each**2, cost * each**2) for each in t]

    curves: dict[Any, choice.Curve] = {"dear": choice.curve(2.0, points(0.3, (0.5, 1.0, 1.2)))}
    curves["cheap"] = choice.curve(2.0, points(0.1, (0.5, 1.0, 1.2)))
    loss = choice.target(2.0, list(curves.values()), 0.75)
    assert loss == pytest.approx(1.25)
    chosen = choice.chosen(curves, loss)
    assert chosen is not None
    assert chosen.key == "cheap"
    assert chosen.t == 0.5  # a scored point: 2 - 1 + 1/4
    assert chosen.kl == pytest.approx(0.1 / 4)
    far = choice.chosen(curves, choice.target(2.0, list(curves.values()), 0.9))
    assert far is not None
    assert far.t == pytest.approx(1 - 0.1**0.5, abs=0.03)
    assert choice.chosen(curves, 0.99) is None
    assert choice.share(2.0, list(curves.values()), [choice.curve(2.0, points(1.0, (0.5,)))]) == pytest.approx(0.75)


def test_a_curve_that_turns_back_is_not_extrapolated() -> None:
    curve = choice.curve(1.0, [Point(1.2, 3.0, 2.0), Point(0.5, 0.6, 0.1), Point(1.0, 1.5, 0.9)])
    assert curve.t[-1] == pytest.approx(1.2)
    assert curve.loss.min() == pytest.approx(0.6)
    assert np.all(np.diff(curve.kl) >= 0)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "asked"
    transformers.AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32).save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_checkpoint)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files as large as the declared splits need, each row another one."""
    out = tmp_path_factory.mktemp("data")
    asked = [{"question": f"how much is {n} and {n}", "answer": [str(2 * n)]} for n in range(1640)]
    taught = [{"question": f"What is {n} plus one?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(1540)]
    told = [{"instruction": f"Count to {n}.", "input": "", "output": f"One to {n}"} for n in range(1760)]
    solved = [{"task_id": str(n), "prompt": f"def f{n}():\n", "canonical_solution": f"    return {n}\n"} for n in range(4)]
    files = {
        "nq_open_train": asked, "nq_open_dev": asked[:9], "webq_test": asked[9:14], "gsm8k_train": taught,
        "gsm8k_test": taught[:110], "alpaca": told, "humaneval": solved,
    }  # fmt: skip
    for name, rows in files.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("wikitext2_test", "wikitext2_train"):
        (out / f"{name}.txt").write_text("Once upon a time there was a text.\n\n" * 20)
    return out


def test_what_all_rows_begin_with_is_computed_once_and_changes_nothing(model: Path, folder: Path) -> None:
    base, tokenizer = preservation.load_model(
        preservation_settings(Settings(str(model), folder), Unit("lora", "", 1, 1, "", 0, ()))
    )
    data = Data(tokenizer, SIZES, folder)
    rows = [data._in_chat(text, answer) for text, answer in (("who is it", "me"), ("who was it then", "you, or they"))]
    probe = after_common_tokens(rows)
    assert tokenizer.decode(probe.context) == "<user>who "
    whole = evaluation.score(base, rows)
    split = evaluation.score(base, probe.rows, context=probe.context)
    assert split.log_likelihood == pytest.approx(whole.log_likelihood, rel=1e-5)
    same = after_common_tokens(rows[:1])
    assert [label != evaluation.IGNORED for label in same.rows[0]["labels"]][:2] == [False, True]


def test_questions_that_calibrate_are_not_those_that_choose(model: Path, folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    data = Data(tokenizer, SIZES, folder)
    shown = "".join(tokenizer.decode(batch["input_ids"][0]) for batch in data.component("shots", 6))
    assert all(f"how much is {n} and {n}?" in shown for n in range(9))  # three solved ones, and six
    assert data.source("humaneval") == str(folder / "humaneval.jsonl")
    assert data.source("triviaqa").startswith("mandarjoshi/")  # no file: the hub's
    chosen_on = tokenizer.decode(data.validation("gsm8k")["nq"].rows[0]["input_ids"])
    assert "1600 and 1600" in chosen_on


def test_experiments_begin_with_plain_lora_and_end_with_what_is_done_afterwards() -> None:
    units = units_of("main", EXPERIMENTS["main"], SIZES, (0, 1), ["contrast", "lora"])
    assert [(unit.method, unit.post, unit.form) for unit in units] == [
        ("lora", "none", ""), ("contrast", "none", "prompt"), ("lora", "filter", ""), ("lora", "intruder", ""),
        ("contrast", "filter", "prompt"),
    ]  # fmt: skip
    assert all(unit.whole and unit.seeds == (0, 1) for unit in units)
    forms = units_of("forms", EXPERIMENTS["forms"], SIZES, (0,), ["lora", "corda-kpm"])
    assert {unit.form for unit in forms if unit.method == "corda-kpm"} == {"text", "chat", "wikitext", "mixed"}
    assert {unit.kept[0] for unit in forms if unit.post == "filter"} == {"text", "chat", "wikitext", "mixed"}
    assert sum(unit.method == "lora" and unit.post == "none" for unit in forms) == 1


@pytest.fixture(scope="module")
def finished(model: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, Path, list[Unit]]:
    """A study of plain LoRA, its filtered and its reduced change, and contrast."""
    out = tmp_path_factory.mktemp("study")
    settings = Settings(str(model), folder, sizes=SIZES)
    plain = Unit("lora", "gsm8k", 2, 2, "", 0, (0,), rate_factor=5.0)
    units = [
        plain, plain._replace(method="contrast", form="prompt", samples=6), plain._replace(post="filter", kept=("prompt", 6)),
        plain._replace(post="intruder", whole=False),
    ]  # fmt: skip
    (out / records.RESULTS).write_text(json.dumps({"kind": "study", "settings": {}}) + "\n")
    prepare(settings, out, units)
    worker = Worker(settings, out)
    for unit in units:
        worker.work(unit)
    return settings, out, units


def test_every_unit_is_reported_once_or_said_to_miss(finished: tuple[Settings, Path, list[Unit]]) -> None:
    _, out, units = finished
    lines = records.read_records(out / records.RESULTS)
    for unit in units:
        own = [
            each for each in lines
            if each["kind"] in ("score", "missed") and each.get("level") and each["run"]["method"] == unit.method
            and each["post"]["how"] == unit.post
        ]  # fmt: skip
        assert len(own) == 1, unit
        if own[0]["kind"] == "score":
            assert set(own[0]["scores"]) == {"task", "nq", "webq", "nq, chat", "nq, template", "humaneval", "alpaca", "wikitext"}
            asked = SIZES.questions if unit.whole else SIZES.fewer_questions
            assert len(own[0]["scores"]["nq"]["rows"]["kl"]) == asked
            assert len(own[0]["scores"]["webq"]["rows"]["log_likelihood"]) == SIZES.other_questions
    (base,) = (each for each in lines if each["kind"] == "base" and each["split"] == "test")
    assert base["scores"]["nq"]["rows"]["tokens"] == [len(str(2 * n)) + 1 for n in range(4)]  # bytes, and the space before


def test_a_scored_point_is_what_the_adapted_model_scores(finished: tuple[Settings, Path, list[Unit]]) -> None:
    """t = 1 of plain LoRA: PEFT's own forward with the trained factors, against the base."""
    settings, out, units = finished
    worker = Worker(settings, out)
    run = units[0].run(units[0].rates[0], 0)
    lines = records.read_records(out / records.RESULTS)
    (scored,) = (each for each in lines if each["kind"] == "score" and each["run"] == run and each["t"] == 1.0)
    change = worker._change(run)
    probe = worker.data.validation("gsm8k")["nq"]
    base, _ = preservation.load_model(preservation_settings(settings, units[0]))
    reference = evaluation.log_probabilities(base, probe.rows, context=probe.context)
    with torch.no_grad():
        for name, delta in change.items():
            base.get_submodule(name).weight.add_(delta.B @ delta.A)  # type: ignore[union-attr]
    wanted = evaluation.score(base, probe.rows, context=probe.context, reference=reference)
    assert scored["scores"]["nq"]["kl"] == pytest.approx(sum(wanted.divergence) / sum(wanted.tokens), rel=1e-3)
    assert scored["scores"]["nq"]["kl"] > 0


def test_a_finished_study_does_nothing_more(finished: tuple[Settings, Path, list[Unit]]) -> None:
    settings, out, units = finished
    before = (out / records.RESULTS).read_bytes()
    prepare(settings, out, units)
    assert [runs_of(settings, out, unit) for unit in units] == [None] * len(units)
    assert (out / records.RESULTS).read_bytes() == before


def runs_of(settings: Settings, out: Path, unit: Unit) -> str | None:
    runs.start_worker(settings, out, torch.get_num_threads())
    return runs.work(unit)


def test_what_fails_is_named(finished: tuple[Settings, Path, list[Unit]]) -> None:
    settings, out, units = finished
    failure = runs_of(settings, out, units[1]._replace(samples=7))
    assert failure is not None
    assert "contrast" in failure
    assert "text-7" in failure
