"""The preservation study on a tiny model: what it writes, that it repeats itself, and that it goes on where it was cut off."""

from __future__ import annotations

import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("benchmarks.preservation", reason="needs the repository's root on the path: python -m pytest")
from benchmarks import preservation
from benchmarks.preservation import DEFAULT_METHODS, Settings, Variant
from nullspace.reporting import study as fronts

pytestmark = pytest.mark.slow

RATES = [1e-3, 1e-2]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    asked = [{"question": f"how many are {n} and {n}", "answer": [str(2 * n)]} for n in range(40)]
    taught = [{"question": f"{n} plus one?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(40)]
    for name, rows in (("nq_open_train", asked), ("nq_open_dev", asked[:6]), ("webq_test", asked[6:9])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, rows in (("gsm8k_train", taught), ("gsm8k_test", taught[:5])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "wikitext2_test.txt").write_text("Once upon a time there was a text.\n\n" * 20)
    return folder


@pytest.fixture(scope="module")
def settings(tiny_checkpoint: Path, data: Path) -> Settings:
    return Settings(
        model=str(tiny_checkpoint),
        calibrate=str(data / "nq_open_train.jsonl"),
        knowledge=(("nq", str(data / "nq_open_dev.jsonl")), ("webq", str(data / "webq_test.jsonl"))),
        text=(("wikitext", str(data / "wikitext2_test.txt")),),
        train=str(data / "gsm8k_train.jsonl"),
        test=str(data / "gsm8k_test.jsonl"),
        dtype="float32",
        device="cpu",
        rank=4,
        samples=8,
        length=64,
        steps=3,
        batch_size=4,
        accumulation=1,
        max_length=64,  # and so many tokens are written for each of `solved`
        shots=1,
        new_tokens=2,
        windows=2,
        window=64,
        examples=4,
        solved=2,
    )


def study(
    settings: Settings, out: Path, methods: list[str], rates: list[float] = RATES, seeds: tuple[int, ...] = (0,)
) -> fronts.Study:
    preservation.begin(settings, out)
    preservation.prepare(settings, out, methods)
    for seed in seeds:
        for method in methods:
            preservation.run_unit(settings, out, Variant(method, 1.0), seed, rates, first=seed == seeds[0])
    return fronts.read_study(out / fronts.RESULTS)


@pytest.fixture(scope="module")
def finished(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("study")
    study(settings, out, DEFAULT_METHODS)
    return out


def numbers(out: Path) -> list[fronts.Record]:
    return fronts.read_records(out / fronts.RESULTS)


def test_every_method_starts_where_the_base_model_is(finished: Path) -> None:
    found = fronts.read_study(finished / fronts.RESULTS)
    assert found.base is not None
    assert set(found.start) == set(DEFAULT_METHODS)
    for scores in found.start.values():
        assert scores["task"]["loss"] == pytest.approx(found.base["task"]["loss"], abs=1e-4)


def test_a_run_has_scores_layers_and_adapters(finished: Path) -> None:
    found = fronts.read_study(finished / fronts.RESULTS)
    assert [(run["variant"], run["learning_rate"]) for run in found.runs] == [(m, rate) for m in DEFAULT_METHODS for rate in RATES]
    for run in found.runs:
        assert set(run["scores"]["knowledge"]) == {"nq", "webq"}
        assert {"loss", "token_accuracy", "exact_match"} == set(run["scores"]["task"])
        assert len(run["train_losses"]) == 3
        assert run["layers"]["drift"] > 0
        assert (finished / "runs" / run["variant"] / f"lr{run['learning_rate']:g}-seed0" / "adapter_model.safetensors").is_file()
    # What is left without BA is not the base model, for the methods that take BA out of it.
    assert set(found.dropped) == {"pissa", "milora", "corda-kpm", "lora-null-v1"}
    assert found.base is not None
    assert abs(found.dropped["pissa"]["task"]["loss"] - found.base["task"]["loss"]) > 1e-3


def test_frozen_a_neither_moves_nor_leaks_more(finished: Path) -> None:
    found = fronts.read_study(finished / fronts.RESULTS)
    layers = {(run["variant"], run["learning_rate"]): run["layers"] for run in found.runs}
    for rate in RATES:
        frozen, free = layers["lora-null-v2", rate], layers["lora-null-v1", rate]
        assert frozen["change_of_a"] == 0.0
        assert frozen["leak_after"] == pytest.approx(frozen["leak_before"], rel=1e-9)
        assert free["change_of_a"] > 0
        assert free["leak_after"] > free["leak_before"]
        assert frozen["drift"] < free["drift"]


def test_a_larger_learning_rate_moves_the_weights_more(finished: Path) -> None:
    found = fronts.read_study(finished / fronts.RESULTS)
    updates = {(run["variant"], run["learning_rate"]): run["layers"]["update"] for run in found.runs}
    assert all(updates[method, RATES[1]] > updates[method, RATES[0]] for method in DEFAULT_METHODS)


def test_a_study_repeated_has_identical_numbers(settings: Settings, finished: Path, tmp_path: Path) -> None:
    # Other order, one rate only: what a run finds depends on its own method, rate and seed.
    study(settings, tmp_path, ["corda-kpm", "lora-null-v1", "lora"], rates=RATES[1:])
    shared, differs = preservation.difference(numbers(tmp_path), numbers(finished))
    assert (shared, differs) == (1 + 3 + 2 + 3, None)


def test_seeds_differ_and_rates_differ(settings: Settings, finished: Path, tmp_path: Path) -> None:
    found = study(settings, tmp_path, ["lora-null-v2"], seeds=(1,))
    first = fronts.read_study(finished / fronts.RESULTS)
    losses = [run["scores"]["task"]["loss"] for run in [*found.runs, *first.runs] if run["variant"] == "lora-null-v2"]
    assert len(set(losses)) == 4


def test_a_study_goes_on_where_it_was_cut_off(settings: Settings, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "study"
    shutil.copytree(finished, out)
    path = out / fronts.RESULTS
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if b'"variant": "b-zero"' not in line and b'"variant": "lora-null-v2"' not in line]
    v2 = [line for line in lines if b'"variant": "lora-null-v2"' in line]
    path.write_bytes(b"".join([*kept, *v2[:-1], v2[-1][: len(v2[-1]) // 2]]))
    preservation.begin(settings, out)
    assert preservation.run_unit(settings, out, Variant("pissa", 1.0), 0, RATES, True) == 0
    assert preservation.run_unit(settings, out, Variant("lora-null-v2", 1.0), 0, RATES, True) == 1
    assert preservation.run_unit(settings, out, Variant("b-zero", 1.0), 0, RATES, True) == 2
    assert preservation.difference(numbers(out), numbers(finished)) == (len(lines) - 1, None)
    assert len(path.read_bytes().splitlines()) == len(lines)


def test_other_settings_are_refused(settings: Settings, finished: Path) -> None:
    with pytest.raises(SystemExit, match=r"other settings: rank 4, now 8; steps 3, now 5\. Choose another"):
        preservation.begin(replace(settings, rank=8, steps=5), finished)


def test_a_difference_is_named_and_times_are_not_one(finished: Path) -> None:
    ours = numbers(finished)
    theirs = json.loads(json.dumps(ours))
    for record in theirs:
        record["seconds"] = {"train": 0.0}
    assert preservation.difference(ours, theirs) == (len(ours) - 1, None)
    theirs[-1]["scores"]["task"]["loss"] = math.nextafter(theirs[-1]["scores"]["task"]["loss"], 9.0)
    assert preservation.difference(ours, theirs)[1] == "run b-zero 0 0.01"


def test_data_without_a_short_example_are_refused(settings: Settings) -> None:
    _, tokenizer = preservation.load_model(settings)
    with pytest.raises(SystemExit, match=r"--train has no example of at most 8 tokens"):
        preservation.load_data(replace(settings, max_length=8), tokenizer)


@pytest.mark.parametrize(
    ("source", "wanted"),
    [("squad", ("squad", "train")), ("trivia_qa:rc@validation", ("trivia_qa:rc", "validation")), ("a.jsonl", ("a.jsonl", "train"))],
)
def test_sources(source: str, wanted: tuple[str, str]) -> None:
    assert preservation.parted(source) == wanted


def test_the_command(
    tiny_checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = "--rank 4 --samples 8 --length 64 --steps 2 --windows 2 --window 64 --examples 4 --questions 3 --answered 2"
    command = f"preservation --reduced --model {tiny_checkpoint} --data {data} --out {tmp_path} --workers 2 {sizes}"
    command += " --max-length 64 --methods lora lora-null-v2 --sigma-scales 1 4 --learning-rates 1e-2 --seeds 5 --report"
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    monkeypatch.setattr(sys, "argv", command.split())
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings, run_child = preservation.settings_of(preservation.parse()), preservation.run_child

    def run_child_but_for_lora(module: str, arguments: list[str]) -> dict[str, Any]:
        """Two children at once are enough, and each imports everything anew."""
        method, sigma, seed = arguments[-3:]
        if method != "lora":
            return run_child(module, arguments)
        runs = preservation.run_unit(settings, tmp_path, Variant(method, float(sigma)), int(seed), [1e-2], first=True)
        return {"runs": runs, "wall": 0.0}

    monkeypatch.setattr(preservation, "run_child", run_child_but_for_lora)
    preservation.main()
    said = capsys.readouterr().out
    assert "start of lora-null-v2 x4: " in said
    assert "knowledge lost at a task loss of" in said
    found = fronts.read_study(tmp_path / fronts.RESULTS)
    assert {(run["variant"], run["seed"]) for run in found.runs} == {("lora", 5), ("lora-null-v2", 5), ("lora-null-v2 x4", 5)}
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(title in page for title in ("What was forgotten", "Leak and gap", "lora-null-v2 x4", "learning rate 0.01"))
    assert "Left out here" not in page
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {row["variant"] for row in summary["equal_loss"]["knowledge"]} == {"lora", "lora-null-v2", "lora-null-v2 x4"}
    monkeypatch.setattr(sys, "argv", ["preservation", "--out", str(tmp_path), "--compare", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        preservation.main()
    assert end.value.code == 0
    assert "7 records are in both: the same numbers" in capsys.readouterr().out


def test_units_of_failed_children_are_counted(
    settings: Settings, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def prepare(*_: Any) -> None:
        """Nothing."""

    monkeypatch.setattr(preservation, "prepare", prepare)
    monkeypatch.setattr(preservation, "run_child", lambda *_: {"failed": "OSError: disk full", "wall": 1.0})
    monkeypatch.setattr(sys, "argv", f"preservation --model {settings.model} --data {data} --out {tmp_path} --methods lora".split())
    with pytest.raises(SystemExit, match="1 of 1 units failed"):
        preservation.main()
    assert "lora seed 0: OSError: disk full" in capsys.readouterr().out
