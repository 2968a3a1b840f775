"""Which base an adapter was made for, by what its configuration records: a few entries of weights, and the mark of a residual base.

PEFT loads an adapter on any base whose layers have the same names and shapes.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from nullspace.artifacts import identity, residual
from nullspace.errors import AdapterWarning
from nullspace.integrations.peft.layers import SUBTRACTED, lora_layers
from nullspace.model.experts import expert_of
from nullspace.model.sharded import is_model_sharded

# Layers whose weights are recorded.
LAYERS = 3


def entries_of(bases: Mapping[str, nn.Module]) -> dict[str, str]:
    """Some entries of the weights of the first, the middle and the last layer: name → `identity.as_text`.

    Experts' matrices and weights whose values cannot be read (quantised ones) are left out. A collective, where weights are
    sharded.

    Args:
        bases: layer → linear layer of the base.
    """
    names = [name for name in bases if expert_of(name) is None]
    chosen = {name: bases[name] for name in (names[:1] + names[len(names) // 2 :][:1] + names[-1:])[:LAYERS]}
    return {name: identity.as_text(mark) for name, (_, mark) in identity.weights_of(chosen).items() if mark is not None}


def is_recorded_base(known: Mapping[str, str], found: Mapping[str, torch.Tensor | None]) -> bool | None:
    """Whether fingerprints are those of `entries_of`, up to rounding to 16 bits; None if there are none to compare.

    Args:
        known: layer → text.
        found: layer → fingerprint of its weight; None, or no entry, where it cannot be read.
    """
    pairs = [(identity.from_text(text), found.get(name)) for name, text in known.items()]
    same = [identity.same_fingerprint(mine, other) for mine, other in pairs if mine is not None and other is not None]
    return all(same) if same else None


def problem(record: Mapping[str, Any], base: str, mark: Mapping[str, Any] | None, same: bool | None) -> str | None:
    """Why a base is not the one that an adapter was made for, to follow "adapter X"; None if nothing shows that.

    Args:
        record: of the adapter (`origin.recorded`).
        base: the base, for the text.
        mark: of a residual base; None for any other.
        same: whether it has the weights of the untouched base (`is_recorded_base`).
    """
    model, kind = record.get("model") or "the original model", record.get("residual")
    if kind == "base" and mark is None:
        what = f"is {model} itself" if same else "is not marked as one"
        return (
            f"was made for the residual base W₀ − s·BA of {model}, and {base} {what}: outputs are wrong. Load the adapter on the "
            "residual base ('base' in the folder that it started in), or make one for the untouched model: nullspace export"
        )
    if kind == "base" and mark is not None:
        factors = {record.get("factors"), mark.get("factors")}
        if len(factors - {None}) == 2:
            return f"was made for another residual base of {model} than {base}, which another start has left: outputs are wrong"
        return None
    if kind is not None and mark is not None:
        return f"was made for the untouched {model}, and {base} is the residual base of another adapter: outputs are wrong"
    if same is False:
        return f"was made for {model}, and {base} has other weights: load the adapter on the model that it was trained on"
    return None


def warn_of_base(peft_model: PeftModel, adapter: str, record: Mapping[str, Any], *, stacklevel: int) -> None:
    """`UserWarning` if a model computes wrongly with an adapter: on another base, or without the second adapter of a pair.

    Args:
        peft_model: with the adapter.
        adapter: its name.
        record: in its configuration (`origin.recorded`).
        stacklevel: of `warnings.warn`, counted from the caller.
    """
    base, layers = peft_model.get_base_model(), lora_layers(peft_model, adapter)
    merged = any(getattr(layer, "merged_adapters", ()) for layer in layers.values())
    if merged or hasattr(peft_model, "nullspace_residual"):  # of inject_adapters, in this process
        return
    mark, same = residual.residual_mark(base), None
    if mark is None and not is_model_sharded(base):
        known = record.get("base") or {}
        found = identity.weights_of({name: layers[name].get_base_layer() for name in known if name in layers})
        same = is_recorded_base(known, {name: entries for name, (_, entries) in found.items()})
    text = problem(record, "this base", mark, same)
    if text is None and record.get("residual") == "adapter" and SUBTRACTED.format(adapter) not in peft_model.peft_config:
        text = (
            "needs the second adapter that takes away what it started with, and that is not loaded: outputs are wrong until "
            "attach_subtracted has loaded it ('subtracted' in the folder that it started in)"
        )
    if text is not None:
        warnings.warn(f"adapter {adapter!r} {text}", AdapterWarning, stacklevel=stacklevel + 1)
