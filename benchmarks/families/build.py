"""Which models there are, a tiny one of each, and batches that it takes."""

from __future__ import annotations

import contextlib
import copy
import inspect
import re
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto

from benchmarks.families.odd import FLOAT32, INPUTS, OF_CLASS
from benchmarks.families.shrink import LEFT_OUT, TEXT_TOKENS, shrunk

# Of models with more parameters than this none is built: their sizes have other names.
LARGEST = 4_000_000

KINDS = {
    "language model": "CAUSAL_LM",
    "encoder": "MASKED_LM",
    "multimodal": "MULTIMODAL_LM",
    "encoder–decoder": "SEQ_TO_SEQ_CAUSAL_LM",
    "speech": "SPEECH_SEQ_2_SEQ",
}
Batch = dict[str, torch.Tensor]


class Architecture(NamedTuple):
    """One model class of transformers."""

    name: str
    """Of the class."""
    family: str
    """Its model type."""
    kind: str
    """Of `KINDS`."""

    @property
    def model_class(self) -> Any:
        return getattr(transformers, self.name)


class Built(NamedTuple):
    """A tiny model."""

    model: nn.Module
    dtype: torch.dtype
    """float64 if the class computes in it, else float32."""


def architectures() -> dict[str, Architecture]:
    """Class name → architecture, of every class that transformers' automatic classes of these kinds know; each once."""
    families: dict[str, list[str]] = {}
    kinds: dict[str, str] = {}
    for kind, mapping in KINDS.items():
        for family, name in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").items():
            families.setdefault(name, []).append(family)
            kinds.setdefault(name, kind)
    return {name: Architecture(name, _own_family(name, families[name]), kind) for name, kind in kinds.items()}


def _own_family(name: str, families: list[str]) -> str:
    """Of several families that share a class, the one that it is named for."""
    own = [family for family in families if name.lower().startswith(re.sub("[_-]", "", family))]
    return own[0] if own else families[0]


def build(architecture: Architecture) -> Built:
    """A tiny model with random weights, in eval mode, which has run once; whatever the class raises means that there is none."""
    errors: list[Exception] = []
    for left_out in LEFT_OUT:
        try:
            return _run(architecture, left_out)
        except Exception as error:
            errors.append(error)
    raise errors[0]


def at_default_sizes(architecture: Architecture) -> nn.Module:
    """The model of the configuration class's own sizes, on the meta device."""
    with torch.device("meta"):
        return _made(architecture, architecture.model_class.config_class())


def as_built(model: Any) -> Any:
    """The same model, in eval mode, its experts computed one by one: grouped products take no float64."""
    with contextlib.suppress(Exception):  # a model without experts has none to set
        model.set_experts_implementation("eager")
    return model.eval()


def batches(architecture: Architecture, model: nn.Module, *, padded: bool = True, seed: int = 1) -> list[Batch]:
    """Three batches of text (and of what else the model needs), one each with padding on the right, on the left, without.

    Encoders and encoders of encoder–decoder models get no padding on the left, as no tokenizer of theirs makes it.
    """
    generator = torch.Generator().manual_seed(seed)
    sides = ("right", "left", None) if architecture.kind in ("language model", "multimodal") else ("right", "right", None)
    return [_batch(architecture, model, side if padded else None, generator) for side in sides]


def _run(architecture: Architecture, left_out: tuple[str, ...]) -> Built:
    config = shrunk(architecture.model_class.config_class, left_out, more=OF_CLASS.get(architecture.name))
    with torch.device("meta"):
        count = sum(p.numel() for p in _made(architecture, copy.deepcopy(config)).parameters())
    if count > LARGEST:
        raise ValueError(f"{architecture.name} has {count} parameters: sizes of unknown names")
    for dtype in (torch.float64, torch.float32)[architecture.name in FLOAT32 :]:
        torch.manual_seed(0)
        model = as_built(_made(architecture, copy.deepcopy(config)).to(dtype))
        try:
            with torch.no_grad():
                outputs = [scores_of(model(**batch)) for batch in batches(architecture, model)]
        except Exception:
            if dtype is torch.float32:
                raise
        else:
            # Masks of float64 are -inf where attention computes in float32, and a padded query without keys then NaN.
            if all(output.isfinite().all() for output in outputs):
                break
    return Built(model, dtype)


def scores_of(output: Any) -> torch.Tensor:
    """Logits, or the first tensor of a model without a head."""
    logits = getattr(output, "logits", None)
    if isinstance(logits, torch.Tensor):
        return logits
    return next(value for value in output.values() if isinstance(value, torch.Tensor) and value.dim() >= 2)


def _made(architecture: Architecture, config: Any) -> Any:
    made = architecture.model_class
    return made._from_config(config) if hasattr(made, "_from_config") else made(config)


def _batch(architecture: Architecture, model: Any, side: str | None, generator: torch.Generator, size: int = 4) -> Batch:
    dtype = next(model.parameters()).dtype
    takes = inspect.signature(model.forward).parameters
    batch = _text("", size, 32, side, generator)
    if architecture.name in INPUTS:
        own = INPUTS[architecture.name](size)
        if "input_features" in own or "input_values" in own:
            batch = {}
        batch |= {name: value.to(dtype) if value.is_floating_point() else value for name, value in own.items()}
    if model.config.is_encoder_decoder or "decoder_input_ids" in takes:
        batch |= _text("decoder_", size, 16, side and "right", generator)
    return {name: value for name, value in batch.items() if name in takes or "kwargs" in takes}


def _text(prefix: str, size: int, length: int, side: str | None, generator: torch.Generator) -> Batch:
    ids = torch.randint(TEXT_TOKENS.start, TEXT_TOKENS.stop, (size, length), generator=generator)
    mask = torch.ones_like(ids)
    if side is not None:
        for row, pad in enumerate(torch.randint(0, length // 2, (size,), generator=generator).tolist()):
            mask[row, slice(None, pad) if side == "left" else slice(length - pad, None)] = 0
    return {f"{prefix}input_ids": torch.where(mask.bool(), ids, 1), f"{prefix}attention_mask": mask}
