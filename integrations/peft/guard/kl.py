"""KL divergence of a live model from its base on a few texts, a token."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import PeftModel

from nullspace.errors import InputError
from nullspace.integrations.peft.guard.adapted import Adapted, Start
from nullspace.model.sharded_tensors import local_parts, write


class KlToBase:
    """Mean over tokens of KL(base ‖ model) of the next token, in nats.

    The base's log-probabilities are computed once, here: with the adapter disabled, or, if the base is a residual, with A₀ and B₀
    in the adapter.

    Args:
        peft_model: with the adapter. If it is sharded, all ranks have to call this and every reading.
        layers: of the adapter.
        start: of the adapter.
        texts: at least one.
        tokenizer: of the model.
        length: tokens of each text, at most.

    In host memory, vocabulary × 4 bytes a token. A reading costs one forward pass over the texts, one at a time.

    Raises:
        ValueError: if there are no texts, or none has a token.
    """

    def __init__(
        self, peft_model: PeftModel, layers: tuple[Adapted, ...], start: Start, texts: Sequence[str], tokenizer: Any, length: int
    ) -> None:
        self._model = peft_model
        if isinstance(texts, str) or not texts:
            raise InputError(f"texts should be a list of strings, not {texts!r}")
        tokenised = [tokenizer(text, return_tensors="pt", truncation=True, max_length=length)["input_ids"] for text in texts]
        self._ids = [ids.long() for ids in tokenised if ids.numel() > 0]
        self.tokens = sum(ids.numel() for ids in self._ids)
        if not self.tokens:
            raise InputError("texts: the tokenizer makes no token of them")
        with _at_start(layers, start) if start.residual else _without_adapter(peft_model):
            self._base = [each.cpu() for each in self._log_probabilities()]

    def __call__(self) -> float:
        """The divergence now."""
        parts = []
        for base, now in zip(self._base, self._log_probabilities(), strict=True):
            base = base.to(now.device)
            parts.append((base.exp() * (base - now)).sum(dtype=torch.float64))
        return float(sum(torch.stack(parts).tolist())) / self.tokens

    @torch.no_grad()
    def _log_probabilities(self) -> Iterator[torch.Tensor]:
        """Text by text (tokens, vocabulary) float32, without dropout."""
        training = [module for module in self._model.modules() if module.training]
        self._model.eval()
        try:
            device = next(self._model.parameters()).device
            for ids in self._ids:
                yield self._model(input_ids=ids.to(device)).logits[0].float().log_softmax(dim=-1)
        finally:
            for module in training:
                module.training = True


@contextlib.contextmanager
def _without_adapter(peft_model: PeftModel) -> Iterator[None]:
    """Context manager: no adapter is active. PEFT's own makes all of an adapter trainable when it ends."""
    trainable = [(parameter, parameter.requires_grad) for parameter in peft_model.parameters()]
    try:
        with peft_model.disable_adapter():
            yield
    finally:
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)


@contextlib.contextmanager
@torch.no_grad()
def _at_start(layers: tuple[Adapted, ...], start: Start) -> Iterator[None]:
    """Context manager: A and B are A₀ and B₀."""
    before = [(part, part.clone()) for each in layers for factor in (each.a, each.b) for part in local_parts(factor)]
    try:
        for each in layers:
            factors = start.of(each)
            assert factors is not None
            for parameter, factor in zip((each.a, each.b), factors, strict=True):
                write(parameter, factor)
        yield
    finally:
        for part, was in before:
            part.copy_(was)
