"""What a study measures: against one row at a time without padding or cache, and against lm-evaluation-harness."""

from __future__ import annotations

import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

pytest.importorskip("benchmarks.evaluation", reason="needs the repository's root on the path: python -m pytest")
from benchmarks import evaluation
from benchmarks.evaluation import IGNORED, Question
from nullspace.integrations.transformers import PackedBatches

pytestmark = pytest.mark.slow

ASKED = [
    Question("Question: who wrote it?\nAnswer:", ("Ada", "Lovelace")),
    Question("Question: what is the longest river of the continent?\nAnswer:", ("the Nile",)),
    Question("Question: when?\nAnswer:", ("1969", "in 1969", "the sixties")),
]
SHOTS = [Question("Question: which?\nAnswer:", ("this one",)), Question("Question: why?\nAnswer:", ("because",))]


@pytest.fixture(scope="module")
def model_and_tokenizer(tiny_checkpoint: Path) -> tuple[Any, Any]:
    model = transformers.LlamaForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(tiny_checkpoint)


def one_at_a_time(model: Any, ids: list[int], first: int) -> float:
    """log p of the tokens from `first` on."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()
    likely = logits.log_softmax(-1)
    return float(sum(likely[place - 1, ids[place]] for place in range(first, len(ids))))


@pytest.mark.parametrize("shots", [[], SHOTS])
def test_log_likelihoods_are_those_of_each_answer_alone(model_and_tokenizer: tuple[Any, Any], shots: list[Question]) -> None:
    model, tokenizer = model_and_tokenizer
    before = "".join(f"{shot.prompt} {shot.answers[0]}\n\n" for shot in shots)
    wanted = []
    for question in ASKED:
        start = tokenizer(before + question.prompt)["input_ids"]
        wanted.append(one_at_a_time(model, start + tokenizer(" " + question.answers[0])["input_ids"], len(start)))
    found = evaluation.knowledge(model, tokenizer, ASKED, shots=shots, batch_size=2, new_tokens=0)
    assert found == {"log_likelihood": pytest.approx(sum(wanted) / 3, abs=1e-5)}


@pytest.mark.parametrize("context", ["", "Question: why?\nAnswer: because\n\n"])
def test_greedy_answers_are_those_of_generate(model_and_tokenizer: tuple[Any, Any], context: str) -> None:
    model, tokenizer = model_and_tokenizer
    prompts = [question.prompt for question in ASKED]
    said = evaluation.greedy(
        model, tokenizer, prompts, new_tokens=9, batch_size=3, context=tokenizer(context)["input_ids"] if context else ()
    )
    for prompt, text in zip(prompts, said, strict=True):
        ids = tokenizer(context + prompt, return_tensors="pt")["input_ids"]
        wanted = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False)[0, ids.shape[1] :]
        assert text == tokenizer.decode(wanted, skip_special_tokens=True)


def test_an_exact_match_is_one_of_the_answers_on_the_first_line(
    model_and_tokenizer: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = model_and_tokenizer
    monkeypatch.setattr(
        evaluation, "greedy", lambda *_, **__: [" lovelace.\nQuestion: and who", "the Nile river", " The 'sixties'"]
    )
    assert evaluation.knowledge(model, tokenizer, ASKED)["exact_match"] == pytest.approx(2 / 3)
    monkeypatch.setattr(evaluation, "greedy", lambda model, tokenizer, prompts, **_: ["Ada"] * len(prompts))
    assert evaluation.knowledge(model, tokenizer, ASKED, answered=1)["exact_match"] == 1.0


def test_perplexity_leaves_padding_out(model_and_tokenizer: tuple[Any, Any]) -> None:
    model, tokenizer = model_and_tokenizer
    text = "Es war einmal ein Koenig, der hatte eine Tochter."
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    with pytest.warns(UserWarning, match="the texts fill 2 of 3"):
        batches = PackedBatches([text], tokenizer, samples=3, length=32, batch_size=2)
    parts = [ids[:32], ids[32:]]
    wanted = math.exp(-sum(one_at_a_time(model, part, 1) for part in parts) / (len(ids) - 2))
    assert evaluation.perplexity(model, batches) == pytest.approx(wanted, rel=1e-5)


def test_task_loss_is_the_models_own_on_responses(model_and_tokenizer: tuple[Any, Any]) -> None:
    model, tokenizer = model_and_tokenizer
    rows = [evaluation.tokenized(tokenizer, f"{n} plus one is", f" {n + 1}" * (n + 1)) for n in range(5)]
    losses, counts = [], []
    for row in rows:
        with torch.no_grad():
            output = model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]]))
        losses.append(float(output.loss))
        counts.append(sum(label != IGNORED for label in row["labels"]))
    wanted = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    assert evaluation.task(model, rows, batch_size=2)["loss"] == pytest.approx(wanted, rel=1e-5)


def test_token_accuracy_of_what_the_model_writes_itself_is_one(model_and_tokenizer: tuple[Any, Any]) -> None:
    model, tokenizer = model_and_tokenizer
    ids = tokenizer("Once", return_tensors="pt")["input_ids"]
    written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, eos_token_id=None)[
        0
    ].tolist()
    row = {"input_ids": written, "labels": [IGNORED] * ids.shape[1] + written[ids.shape[1] :]}
    other = {**row, "input_ids": [*written[:-1], (written[-1] + 1) % 256], "labels": [*row["labels"][:-1], (written[-1] + 1) % 256]}
    assert evaluation.task(model, [row])["token_accuracy"] == 1.0
    assert evaluation.task(model, [row, other])["token_accuracy"] == pytest.approx(15 / 16)


@pytest.mark.parametrize(
    ("row", "answers"),
    [
        ({"question": "who?", "answer": ["A", "B"]}, ("A", "B")),
        ({"question": "who", "answers": ["A", "A"]}, ("A",)),
        ({"question": "who", "answer": "A"}, ("A",)),
        ({"question": "who", "answer": {"value": "A", "aliases": ["B", "A"]}}, ("A", "B")),
    ],
)
def test_questions_as_the_data_sets_have_them(row: dict[str, Any], answers: tuple[str, ...]) -> None:
    assert evaluation.questions([row]) == [Question("Question: who?\nAnswer:", answers)]


def test_rows_without_an_answer_and_empty_responses_are_named(model_and_tokenizer: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="row 2 has no question and answer; its fields are question, text"):
        evaluation.questions([{"question": "who", "answer": "A"}, {"question": "who", "text": "A"}])
    with pytest.raises(ValueError, match="nothing to score"):
        evaluation.tokenized(model_and_tokenizer[1], "who", "")


@pytest.mark.parametrize(
    ("said", "gold", "same"),
    [
        ("so 1,000.50 in all\n#### 1,000.50", "#### 1000.5", True),
        ("The answer is 8", "He has 8.\n#### 8", True),
        ("#### 8 apples, 9 pears", "#### 8", True),
        ("#### 80", "#### 8", False),
        ("no idea", "#### 8", False),
        ("The Nile.", "nile", True),
        ("Nile river", "nile", False),
    ],
)
def test_results(said: str, gold: str, same: bool) -> None:
    assert evaluation.same_result(said, gold) is same


def test_lm_evaluation_harness_agrees(smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tasks in benchmarks/tasks, run by the harness's own command on a plain checkpoint, against our numbers."""
    harness = pytest.importorskip("lm_eval.__main__")
    rows = [{"question": question.prompt[10:].split("?")[0], "answer": list(question.answers)} for question in ASKED]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = Path(__file__).resolve().parents[2] / "benchmarks" / "tasks"
    command = ["lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={smollm2},dtype=float32"]
    command += ["--tasks", "questions_greedy,questions_likelihood", "--include_path", str(tasks), "--device", "cpu"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # which the harness sets, and does not set back
    monkeypatch.setattr(sys, "argv", [*command, "--output_path", "out"])
    # Not the index of the harness's own tasks, which are ten thousand files.
    tasks_of = partial(pytest.importorskip("lm_eval.tasks").TaskManager, include_defaults=False)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", tasks_of)
    harness.cli_evaluate()
    results = json.loads(next((tmp_path / "out").rglob("results*.json")).read_text())["results"]
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    found = evaluation.knowledge(model, transformers.AutoTokenizer.from_pretrained(smollm2), ASKED)
    assert results["questions_greedy"]["exact_match,none"] == found["exact_match"]
    assert math.log(results["questions_likelihood"]["perplexity,none"]) == pytest.approx(-found["log_likelihood"], rel=1e-4)
