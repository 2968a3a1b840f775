"""The start of an experiment's adapters: calibration on the model that their run has loaded, then `inject_adapters`."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.method_comparison.checkout import Checkout, say
from benchmarks.method_comparison.experiments import FINEWIKI, Start
from nullspace import Covariances, compute_covariances
from nullspace.errors import InputError
from nullspace.integrations.peft import inject_adapters
from nullspace.integrations.transformers import load_texts
from nullspace.methods import METHODS

MEASURED = 100
"""Rows of FineWiki that their forgetting is measured on."""
Batch = dict[str, torch.Tensor]


def kept_texts(theirs: Checkout, start: Start) -> list[str]:
    """The texts that must be kept, none of which is among those that forgetting is measured on.

    Raises:
        ValueError: if `skip` is too small or leaves nothing.
    """
    measured = set(theirs.data.get_wiki_small())
    if start.keep == FINEWIKI:
        if start.skip < MEASURED:
            raise InputError(f"skip is {start.skip}: forgetting is measured on the first {MEASURED} rows of FineWiki")
        found = theirs.data.get_wiki_small(num_samples=start.skip + start.keep_samples)[start.skip :]
    else:
        found = [text for text in load_texts(start.keep, limit=10 * start.keep_samples) if isinstance(text, str)]
        found = sorted(found, key=len, reverse=True)[: start.keep_samples]  # headings and stubs of a text file say little
    texts = [text for text in found if text not in measured]
    if not texts:
        raise InputError(f"{start.keep} has no text to calibrate on")
    return texts


def kept_batches(theirs: Checkout, tokenizer: Any, start: Start) -> list[Batch]:
    """The texts to be kept as token ids, one a batch, cut as their measure of forgetting cuts its own."""
    rows = (tokenizer(text, truncation=True, max_length=start.length)["input_ids"] for text in kept_texts(theirs, start))
    return [{"input_ids": torch.tensor([row])} for row in rows if row]


def task_batches(examples: Any, start: Start, seed: int) -> list[Batch]:
    """Of their training examples (question and answer in their template, as token ids), one a batch."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(examples), generator=generator)[: start.task_samples].tolist()
    return [{"input_ids": torch.tensor([examples[number]["input_ids"][: start.length]])} for number in sorted(drawn)]


def moments(model: Any, batches: Sequence[Batch], targets: Any, folder: Path) -> Covariances:
    """Second moments of the inputs of an experiment's layers."""
    began = time.perf_counter()
    found = compute_covariances(model, batches, folder, targets=targets, overwrite=True, progress=False)
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    say(f"{folder.name}: {len(batches)} texts, {tokens} tokens, {time.perf_counter() - began:.0f} s")
    return found


class Starter:
    """Makes the PEFT model of an experiment: `checkout.Starter` of one `Start`."""

    def __init__(self, theirs: Checkout, start: Start) -> None:
        method = METHODS.get(start.method)
        if method is None:
            raise InputError(f"unknown method {start.method!r} in {start}: choose of {', '.join(METHODS)}")
        self._theirs, self._start, self._method = theirs, start, method

    def __call__(self, model: Any, config: Any, experiment: Path) -> Any:
        """Adapters in float32, as theirs, on the untouched base.

        Their forgetting begins with the model whose adapters are disabled. Where the start is not zero, a second adapter subtracts
        it, so that this model is the base; with a residual base it would be the residual, and forgetting far too small.
        """
        params = self._theirs.params(experiment)
        if not params.autocast_adapter_dtype:
            raise InputError(f"{experiment}: autocast_adapter_dtype must be true for adapters that nullspace starts")
        tokenizer, start = self._theirs.tokenizer(params), self._start
        with tempfile.TemporaryDirectory() as folder:
            of: dict[str, Covariances] = {}
            for name, batches in self._data(tokenizer, params).items():
                of[name] = moments(model, batches, config.target_modules, Path(folder) / name)
            first = of["task"] if "task" in of else of["keep"]
            return inject_adapters(
                model,
                config,
                method=start.method,
                covariances=first,
                preserve=of["keep"] if "preserve" in self._method.needs else None,
                freeze_a=start.freeze_a,
                residual="adapter" if self._method.changes_base else "auto",
            )

    def _data(self, tokenizer: Any, params: Any) -> dict[str, list[Batch]]:
        """What the method is computed from: the task, what must be kept, or both."""
        of_task = "preserve" in self._method.needs or self._start.method in ("eva", "corda-ipm")
        of_kept = "preserve" in self._method.needs or not of_task
        found = {}
        if of_task:
            found["task"] = task_batches(self._theirs.datasets(tokenizer, params)[0], self._start, params.seed)
        if of_kept:
            found["keep"] = kept_batches(self._theirs, tokenizer, self._start)
        return found
