"""Their code and ours on a CPU: a small model, three steps, local data in the place of the hub's. It shows that the code runs."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.method_comparison.checkout import Checkout, name_of, use_peft_of
from benchmarks.method_comparison.experiments import TRAINING, Start
from benchmarks.method_comparison.start import MEASURED
from nullspace.integrations.transformers import load_rows

FILES = {"train": "gsm8k_train.jsonl", "test": "gsm8k_test.jsonl", "text": "humaneval.jsonl"}
"""In the data folder: questions with answers that end in `#### NUMBER`, and text whose loss is between 1 and 2, as they demand."""
TRAINING_OF_A_DRY_RUN = {
    "dtype": "float32",
    "max_seq_length": 128,
    "batch_size": 2,
    "batch_size_eval": 2,
    "max_steps": 3,
    "eval_steps": 3,
    "generation_kwargs": {"max_length": 400, "max_new_tokens": 8},
}
TRAINED, ASKED, READ = 40, 4, 8
"""Training examples, questions of validation and of test, and texts that forgetting is measured on."""
NOT_EXERCISED = """A dry run shows that the code runs; its figures are no evidence. Not exercised:
- the hub: MetaMathQA is GSM8K's training examples with MetaMath's closing sentence, FineWiki is HumanEval's code
- a GPU, bfloat16, the sizes of Llama-3.2-3B; their accelerator's memory figures are zero
- 5,000 steps, generation beyond 8 tokens, 100 texts for forgetting, 1,319 test questions"""
STAND_INS = {
    **dict.fromkeys(("memory_allocated", "memory_reserved", "max_memory_reserved"), lambda: 0),
    **dict.fromkeys(("reset_peak_memory_stats", "empty_cache"), lambda: None),
    "manual_seed_all": lambda _seed: None,
    "get_device_name": lambda _number: "CPU",
}
"""What their code asks of an accelerator and torch.cpu lacks."""


class Stream:
    """FineWiki as their `get_wiki_small` reads it: `READ` texts in the place of the first 100, others behind `skip`."""

    def __init__(self, texts: list[str], skip: int) -> None:
        self._measured = texts[:READ]
        self._all = [*self._measured, *[""] * (skip - READ), *texts[READ:]]

    def take(self, count: int) -> list[dict[str, str]]:
        return [{"text": text} for text in (self._measured if count <= MEASURED else self._all[:count])]


def local_data(folder: Path, skip: int) -> Any:
    """A function in the place of `datasets.load_dataset`, with the fields of the three data sets that they load."""
    import datasets

    train, test = (load_rows(folder / FILES[name], limit=TRAINED) for name in ("train", "test"))
    solved = [
        {"query": row["question"], "response": f"{row['answer']}\nThe answer is: {row['answer'].rpartition('#### ')[2]}"}
        for row in train
    ]
    metamath = [{**row, "type": "GSM_Rephrased", "original_question": row["query"]} for row in solved]
    texts = [row["prompt"] + row["canonical_solution"] for row in load_rows(folder / FILES["text"], limit=2 * READ)]
    parts = {name: datasets.Dataset.from_list(rows[:ASKED]) for name, rows in (("train", train), ("test", test))}

    def load_dataset(name: str, *_arguments: Any, **_options: Any) -> Any:
        return {
            "meta-math/MetaMathQA": lambda: {"train": datasets.Dataset.from_list(metamath)},
            "openai/gsm8k": lambda: datasets.DatasetDict(parts),
            "HuggingFaceFW/finewiki": lambda: Stream(texts, skip),
        }[name]()

    return load_dataset


@contextlib.contextmanager
def on_cpu(checkout: Path, data: Path, skip: int) -> Iterator[Checkout]:
    """Their modules, which refuse to be imported without a GPU, with the CPU as accelerator and local data."""
    import torch

    use_peft_of(checkout)
    with mock.patch("peft.utils.infer_device", return_value="cuda"):
        theirs = Checkout.load(checkout)
    theirs.utils.device = "cpu"
    theirs.utils.infer_device = theirs.run.infer_device = lambda: "cpu"
    theirs.data.load_dataset = local_data(data, skip)
    with mock.patch.multiple(torch.cpu, create=True, **STAND_INS):
        yield theirs


def shrunk(experiment: Path, out: Path, model: str) -> Path:
    """A copy of an experiment in OUT, and of the one that it filters, with a small model, few steps and few samples."""
    target = out / "experiments" / name_of(experiment)
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(experiment, target)
    training = json.loads((target / TRAINING).read_text())
    (target / TRAINING).write_text(json.dumps({**training, **TRAINING_OF_A_DRY_RUN, "model_id": model}))
    start = Start.load(experiment)
    if start is not None:
        replace(start, keep_samples=READ, task_samples=READ, length=128, strengths=start.strengths[:1]).save(target)
        if start.of:
            shrunk(experiment.resolve().parent.parent / start.of, out, model)
    return target
