"""What the evidence study reads: examples of tasks, probes, and sequences that calibrate, from files or hub data sets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import evaluation, preservation
from benchmarks.evaluation import IGNORED, Question
from benchmarks.evidence import settings as declared
from benchmarks.evidence.settings import Part, Sizes
from benchmarks.holding_parts import Probe, bare, in_template
from nullspace.integrations.transformers import PackedBatches, load_rows, load_texts, prompt_and_response

Row = dict[str, list[int]]
SOURCES = preservation.KNOWN | {
    "wikitext-train": ("wikitext2_train.txt", "Salesforce/wikitext:wikitext-2-raw-v1@train"),
    # The splits in the order of the tasks' numbers.
    "mbpp": ("mbpp.jsonl", "google-research-datasets/mbpp:full@prompt+test+validation+train"),
    "humaneval": ("humaneval.jsonl", "openai/openai_humaneval@test"),
    "alpaca": ("alpaca.jsonl", "tatsu-lab/alpaca@train"),
    "codealpaca": ("codealpaca.jsonl", "sahil2801/CodeAlpaca-20k@train"),
}


class Data:
    """The sources of a study, each a file of `folder`, or the hub's data set where `folder` has none.

    `triviaqa`: a file or hub name, to ask TriviaQA too.
    """

    def __init__(self, tokenizer: Any, sizes: Sizes, folder: Path | None, triviaqa: str | None = None) -> None:
        self.tokenizer, self.sizes, self._folder = tokenizer, sizes, folder
        self._given = {"triviaqa": triviaqa} if triviaqa else {}
        self.sets = {**declared.QUESTIONS, **{name: name for name in self._given}}
        self._shots = self.asked(declared.SHOTS)

    def source(self, name: str) -> str:
        if name in self._given:
            return self._given[name]
        file, hub = SOURCES[name]
        return str(self._folder / file) if self._folder is not None and (self._folder / file).is_file() else hub

    def _rows(self, part: Part) -> list[Mapping[str, Any]]:
        name, split = preservation.parted(self.source(part.source))
        return load_rows(name, split=split, limit=part.rows.stop)[part.rows.start :]

    def asked(self, part: Part) -> list[Question]:
        """The questions of a part."""
        return evaluation.questions(self._rows(part))

    def examples(self, parts: Sequence[Part], limit: int | None = None) -> list[Row]:
        """Examples of a task in its template, of at most `max_length` tokens; of several parts in turn."""
        columns = [list(self._fitting(part)) for part in parts]
        turns = max(map(len, columns))
        rows = [column[number] for number in range(turns) for column in columns if number < len(column)]
        if not rows:
            raise SystemExit(f"{parts[0].source} has no example of at most {self.sizes.max_length} tokens (--max-length)")
        return rows[:limit]

    def _fitting(self, part: Part) -> Iterator[Row]:
        for row in self._rows(part):
            prompt, response = prompt_and_response(row)
            text = response.replace("\r\n", "\n") + self.tokenizer.eos_token
            ids = evaluation.tokenized(self.tokenizer, preservation.PROMPT.format(prompt), text)
            if len(ids["input_ids"]) <= self.sizes.max_length:
                yield ids

    def validation(self, task: str) -> dict[str, Probe]:
        """What rates, strengths and scales are chosen on."""
        asked = self.asked(declared.CHOICE)[: self.sizes.validation_questions]
        return {
            "task": Probe(self.examples(declared.TASKS[task].validation, self.sizes.validation_examples), []),
            "nq": self.in_shots(asked),
        }

    def test(self, task: str) -> dict[str, Probe]:
        """What is reported."""
        sizes = self.sizes
        probes = {"task": Probe(self.examples(declared.TASKS[task].test, sizes.examples), [])}
        for name, source in self.sets.items():
            count = sizes.questions if name == "nq" else sizes.other_questions
            asked = self.asked(Part(source, range(count)))
            probes[name] = self.in_shots(asked)
            if name == "nq":
                few = asked[: sizes.forms_of_asking]
                probes["nq, chat"] = after_common_tokens([self._in_chat(bare(each), each.answers[0]) for each in few])
                probes["nq, template"] = after_common_tokens([in_template(self.tokenizer, each) for each in few])
        solved = [
            evaluation.tokenized(self.tokenizer, *prompt_and_response(row)) for row in self._rows(Part("humaneval", range(164)))
        ]
        probes["humaneval"] = Probe(self._short(solved), [])
        told = (prompt_and_response(row) for row in self._rows(declared.TASKS["instructions"].test[0]))
        probes["alpaca"] = after_common_tokens(self._short(self._in_chat(*each) for each in told))
        name, split = preservation.parted(self.source("wikitext"))
        windows = PackedBatches(load_texts(name, split=split), self.tokenizer, samples=sizes.windows, length=sizes.window)
        probes["wikitext"] = Probe(evaluation.running_text(windows), [], 4)
        return probes

    def _short(self, rows: Any) -> list[Row]:
        fitting = (row for row in rows if len(row["input_ids"]) <= self.sizes.max_length)
        return [row for row, _ in zip(fitting, range(self.sizes.abilities), strict=False)]

    def in_shots(self, asked: Sequence[Question]) -> Probe:
        """Questions behind the solved ones."""
        return Probe(*evaluation.asked_after(self.tokenizer, asked, self._shots), 32)

    def _in_chat(self, prompt: str, answer: str) -> Row:
        """In the model's chat template."""
        start = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        rest = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        return {"input_ids": [*start, *rest], "labels": [IGNORED] * len(start) + rest}

    def exact_match(self, model: Any, name: str) -> float:
        """The share of a set's first questions that greedy decoding answers with one of the gold answers."""
        asked = self.asked(Part(self.sets[name], range(self.sizes.answered)))
        return evaluation.knowledge(model, self.tokenizer, asked, shots=self._shots)["exact_match"]

    def component(self, name: str, samples: int) -> Any:
        """Batches that calibrate: `samples` sequences of a component of `settings.FORMS`."""
        if name == "wikitext":
            source, split = preservation.parted(self.source("wikitext-train"))
            return self._windows(load_texts(source, split=split), samples)
        asked = self.asked(declared.CALIBRATION)
        if name == "text":
            return self._windows([f"{bare(each)}\n{each.answers[0]}" for each in asked], samples)
        if name == "shots":
            rows, context = evaluation.asked_after(self.tokenizer, asked[:samples], self._shots)
            sequences = [[*context, *row["input_ids"]] for row in rows]
        elif name == "chat":
            sequences = [self._in_chat(bare(each), each.answers[0])["input_ids"] for each in asked[:samples]]
        else:
            sequences = [in_template(self.tokenizer, each)["input_ids"] for each in asked[:samples]]
        return [{"input_ids": torch.tensor([sequence])} for sequence in sequences]

    def _windows(self, texts: Sequence[Any], samples: int) -> PackedBatches:
        return PackedBatches(texts, self.tokenizer, samples=samples, length=self.sizes.length)

    def of_task(self, task: str) -> list[dict[str, torch.Tensor]]:
        """Batches of training examples, for the second moments of the task."""
        return self.batches(declared.TASKS[task].train)

    def batches(self, parts: Sequence[Part]) -> list[dict[str, torch.Tensor]]:
        """The first `of_task` examples of some parts, a batch each."""
        rows = self.examples(parts, self.sizes.of_task)
        return [{"input_ids": torch.tensor([row["input_ids"]])} for row in rows]


def after_common_tokens(rows: Sequence[Row]) -> Probe:
    """Rows as a probe whose context is what all of them begin with, which is then computed once.

    Of each row at least one unlabelled token stays, from which its first labelled one is predicted.
    """
    least = min(sum(label == IGNORED for label in row["labels"]) for row in rows) - 1
    first = rows[0]["input_ids"]
    shared = 0
    while shared < least and all(row["input_ids"][shared] == first[shared] for row in rows):
        shared += 1
    return Probe([{key: row[key][shared:] for key in ("input_ids", "labels")} for row in rows], first[:shared], 32)
