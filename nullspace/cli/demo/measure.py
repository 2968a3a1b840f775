"""What adapters have learned and how far they have moved the model, on held-out examples and text."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.functional import cross_entropy

IGNORED = -100
NEAR = 0.01


class Point(NamedTuple):
    """An adapter at a scale."""

    t: float
    """its change is multiplied by this"""
    loss: float
    """of the task's completions, nats a token"""
    kl: float
    """KL(base ‖ model) on the text, nats a token"""


class Scores(NamedTuple):
    """An adapter as it was trained, and scaled to the learning of the adapter that has learned least."""

    full: Point
    equal: Point | None
    """None if no adapter has learned anything"""


class Judge:
    """Measures the adapters of one model.

    Args:
        peft_model: with the adapters, all of them on the untouched base.
        tokenizer: of the model.
        rows: `prompt` and `completion`, held out.
        texts: held out; `length` tokens of each are read.
    """

    def __init__(self, peft_model: Any, tokenizer: Any, rows: Sequence[dict[str, str]], texts: Sequence[str], length: int) -> None:
        from nullspace.integrations.peft.guard.adapted import Start
        from nullspace.integrations.peft.guard.kl import KlToBase

        self._model = peft_model
        self._kl = KlToBase(peft_model, (), Start({}, residual=False), texts, tokenizer, length)
        self.text_tokens = self._kl.tokens
        self._batch, self._labels = _batch(tokenizer, rows)
        with peft_model.disable_adapter():
            self.base_loss = self._loss()

    def loss(self, adapter: str, t: float) -> float:
        """Of the task, nats a token."""
        with self._scaled(adapter, t):
            return self._loss()

    def point(self, adapter: str, t: float = 1.0) -> Point:
        """Loss and KL."""
        with self._scaled(adapter, t):
            return Point(t, self._loss(), self._kl())

    @torch.no_grad()
    def _loss(self) -> float:
        logits = self._model(**self._batch).logits[:, :-1].float()
        return float(cross_entropy(logits.flatten(0, 1), self._labels[:, 1:].flatten(), ignore_index=IGNORED))

    @contextlib.contextmanager
    def _scaled(self, adapter: str, t: float) -> Iterator[None]:
        from peft.helpers import rescale_adapter_scale

        self._model.set_adapter(adapter)
        with rescale_adapter_scale(self._model, t):
            yield


def compare(judge: Judge, adapters: Sequence[str], step: Callable[[], None]) -> dict[str, Scores]:
    """Measure each adapter as it is, and at the largest task loss among them, to which the others' changes are scaled down.

    Args:
        judge: measures.
        adapters: names.
        step: called twice an adapter.
    """
    full = {}
    for name in adapters:
        full[name] = judge.point(name)
        step()
    target = max(point.loss for point in full.values())
    scores = {}
    for name, point in full.items():
        equal = None
        if target < judge.base_loss:
            equal = point if point.loss == target else judge.point(name, _scale(judge, name, point, target))
        scores[name] = Scores(point, equal)
        step()
    return scores


def _scale(judge: Judge, adapter: str, full: Point, target: float) -> float:
    """The scale at which an adapter has this task loss, which lies between the base's and its own, to `NEAR` of what it learned."""
    from scipy.optimize import brentq

    known = {0.0: judge.base_loss, full.t: full.loss}
    near = NEAR * (judge.base_loss - full.loss)

    def beyond(t: float) -> float:
        difference = (known[t] if t in known else judge.loss(adapter, t)) - target
        return difference if abs(difference) > near else 0.0  # the search ends at a zero

    return float(brentq(beyond, 0.0, full.t))


def _batch(tokenizer: Any, rows: Sequence[dict[str, str]]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Prompts with their completions and the end of the text, padded on the right: (rows, tokens), and the labels."""
    pairs = [(tokenizer(row["prompt"])["input_ids"], tokenizer(row["completion"])["input_ids"]) for row in rows]
    width = max(len(before) + len(after) + 1 for before, after in pairs)
    ids = torch.full((len(rows), width), tokenizer.eos_token_id)
    labels, mask = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
    for row, (before, after) in enumerate(pairs):
        end = len(before) + len(after)
        ids[row, :end] = torch.tensor(before + after)
        labels[row, len(before) : end + 1] = ids[row, len(before) : end + 1]
        mask[row, : end + 1] = 1
    return {"input_ids": ids, "attention_mask": mask}, labels
