"""The second, frozen adapter (−B₀, A₀), which subtracts the initial product of the first if the base cannot be changed."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel

from nullspace.artifacts import residual
from nullspace.errors import InputError
from nullspace.integrations.peft.files import read_adapter
from nullspace.integrations.peft.layers import SUBTRACTED, freeze_layers, lora_layers
from nullspace.integrations.peft.made_for import warn_of_base
from nullspace.integrations.peft.origin import check_same, freeze_recorded, recorded
from nullspace.integrations.peft.watch import watch
from nullspace.model.sharded import placeholder_weights
from nullspace.model.wrappers import unwrap


def attach_subtracted(peft_model: PeftModel, directory: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Load the second adapter of `inject_adapters(..., residual="adapter")` beside the first, frozen and active.

    An A or B that the first adapter's configuration records as frozen is frozen again (`freeze_a`, `freeze_b`).

    For training on: `PeftModel.from_pretrained(base, OUT/adapter, is_trainable=True)`, then this with `OUT/subtracted`.

    Args:
        peft_model: with the first adapter loaded.
        directory: `OUT/subtracted`, as `save_init` wrote it.
        adapter_name: of the first adapter.

    Raises:
        FileNotFoundError: if a file of it is missing.
        ValueError: if the model has no LoRA layer with an adapter of that name, or is a residual base; if the adapter is recorded
            as started without a second one, or the two as parts of different starts; naming the file, if it is damaged.

    Warns:
        UserWarning: if the adapters were made for another base than this one.
    """
    peft_model = unwrap(peft_model)
    layers = lora_layers(peft_model, adapter_name)
    if not layers:
        raise InputError(f"the model has no LoRA adapter named {adapter_name!r}")
    mark = residual.residual_mark(peft_model.get_base_model())
    if mark is not None:
        raise InputError(f"the base {residual.described(mark)}: load the adapters on the original model")
    record = recorded(peft_model.peft_config[adapter_name])
    if record.get("residual") not in (None, "adapter"):
        raise InputError(
            f"adapter {adapter_name!r} was started without a second one (residual {record['residual']!r}): there is none to attach"
        )
    given = read_adapter(Path(directory))  # PEFT would leave an adapter with random factors where it cannot read them
    check_same(record, recorded(given.config), f"adapter {adapter_name!r}", directory)
    second = SUBTRACTED.format(adapter_name)
    peft_model.load_adapter(str(directory), adapter_name=second)
    _activate_both(peft_model, layers, adapter_name)
    freeze_recorded(peft_model, [adapter_name])
    warn_of_base(peft_model, adapter_name, record, stacklevel=2)


def refuse_settings(config: LoraConfig, residual: str, frozen: str | None) -> None:
    """Raise `ValueError` for what PEFT does not do with a second adapter, if the residual is one, or with a frozen B.

    Args:
        config: of the first adapter.
        residual: as `check_servable` returns it.
        frozen: the factor that does not train.
    """
    if frozen == "B" and config.lora_bias:
        raise InputError("lora_bias is a bias of B, which does not train with B frozen: leave it out, or freeze_b=False")
    if residual == "adapter" and config.use_dora:
        raise InputError("DoRA's magnitudes do not add up over two adapters: use_dora needs a base that can be changed")
    if residual == "adapter" and config.trainable_token_indices:
        raise InputError("PEFT saves no second adapter beside trainable_token_indices: they need a base that can be changed")


def add_second(peft_model: PeftModel, config: LoraConfig, adapter: str) -> str:
    """Add the second adapter, with PEFT's initial values. Returns its name.

    Args:
        peft_model: with the first adapter.
        config: of the first adapter.
        adapter: its name.
    """
    second = SUBTRACTED.format(adapter)
    config = copy.deepcopy(config)
    config.lora_dropout, config.bias, config.lora_bias = 0.0, "none", False
    config.modules_to_save = None
    with placeholder_weights(peft_model):
        peft_model.add_adapter(second, config)
    return second


def subtract(peft_model: PeftModel, config: LoraConfig, layers: Mapping[str, Any], adapter: str) -> None:
    """A second adapter with −B₀ and A₀."""
    second = add_second(peft_model, config, adapter)
    for layer in layers.values():
        with torch.no_grad():
            layer.lora_A[second].weight.copy_(layer.lora_A[adapter].weight)
            layer.lora_B[second].weight.copy_(-layer.lora_B[adapter].weight)
    _activate_both(peft_model, layers, adapter)


def _activate_both(peft_model: PeftModel, layers: Mapping[str, Any], adapter: str) -> None:
    second = SUBTRACTED.format(adapter)
    freeze_layers(layers, second, "AB")
    set_adapter = functools.partial(_set_adapter, peft_model)
    peft_model.set_adapter = set_adapter  # type: ignore[method-assign]
    set_adapter(adapter)
    watch(peft_model, adapter, "adapter")


def _set_adapter(peft_model: PeftModel, adapter_name: str, *args: Any, **kwargs: Any) -> None:
    """In place of `PeftModel.set_adapter`: activates an adapter together with its second one.

    transformers' Trainer calls it with the first active adapter's name when it resumes from a checkpoint.
    """
    type(peft_model).set_adapter(peft_model, adapter_name, *args, **kwargs)
    second = SUBTRACTED.format(adapter_name)
    if second in peft_model.peft_config:
        tuner: Any = peft_model.base_model
        tuner.set_adapter([adapter_name, second], *args, **kwargs)
