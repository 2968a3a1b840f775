"""Warnings where a model computes wrongly without an error: a residual base without its adapter, one adapter of a pair, dropout."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Collection
from typing import Any

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from nullspace.artifacts.residual import unmark
from nullspace.errors import AdapterWarning
from nullspace.integrations.peft.experts.adapters import adapted_by
from nullspace.integrations.peft.layers import SUBTRACTED, lora_layers

INSTEAD = (
    "export_lora makes a plain LoRA for the untouched base; residual='adapter' and methods such as 'b-zero' leave the base as it is"
)


def warn_of_dropout(config: LoraConfig, method: str, residual: str, *, stacklevel: int) -> None:
    """`UserWarning` if dropout changes the model's outputs from the first training step on.

    Args:
        config: of the adapter.
        method: of `inject_adapters`.
        residual: of `check_servable`.
        stacklevel: of `warnings.warn`, counted from the caller.
    """
    if config.lora_dropout > 0 and residual in ("base", "adapter"):
        warnings.warn(
            f"lora_dropout={config.lora_dropout} with method {method!r}: the adapter starts with a part of the weights, and "
            "dropping its inputs changes what the model computes in training mode from the first step on. Use lora_dropout=0, or "
            "method 'b-zero', whose product starts at zero.",
            AdapterWarning,
            stacklevel=stacklevel + 1,
        )


def watch(peft_model: PeftModel, adapter: str, residual: str) -> None:
    """Install hooks that warn if the model computes with a residual base and no adapter of it, or with one adapter of a pair.

    If the base is a residual, its adapter must be active or merged, alone or beside others; another adapter that names the same
    base, such as a copy or a checkpoint, will do. If a second adapter subtracts the product, both must be active, or none. Copies
    of the model warn too.

    Args:
        peft_model: with the adapter.
        adapter: its name.
        residual: of `check_servable`.
    """
    layer: Any = adapted_by(next(iter(lora_layers(peft_model, adapter).values()), None))
    if layer is None or residual not in ("base", "adapter") or any(_is_ours(hook) for hook in layer._forward_hooks.values()):
        return
    # One layer is enough, as PEFT sets all layers alike. Its own hooks, which choose adapters by row, run before forward hooks.
    tuner: Any = peft_model.base_model
    own = tuner.peft_config[adapter]
    check = (
        functools.partial(_check_residual, adapter, own, tuner) if residual == "base" else functools.partial(_check_pair, adapter)
    )
    layer.register_forward_hook(check, with_kwargs=True)
    if residual == "base":
        for name in ("unload", "merge_and_unload"):
            setattr(tuner, name, functools.partial(_unload, tuner, name, adapter, own))


def _is_ours(hook: Any) -> bool:
    return getattr(hook, "func", None) in (_check_residual, _check_pair)


def _used(layer: Any, kwargs: dict[str, Any]) -> list[set[str]]:
    """The adapters with which a layer has just computed: one set per row, if the batch names them, or one for all rows."""
    names = kwargs.get("adapter_names")
    if names is not None:
        return [{name} for name in names]
    if layer.merged:
        return [set(layer.merged_adapters)]
    return [set() if layer.disable_adapters else set(layer.active_adapters)]


def _complete(used: Collection[str], adapter: str, own: LoraConfig, tuner: Any) -> bool:
    """Whether one of these adapters belongs to the residual base."""
    configs = tuner.peft_config
    bases = {configs[name].base_model_name_or_path for name in used if name in configs}
    return adapter in used or own.base_model_name_or_path in bases


def _check_residual(adapter: str, own: LoraConfig, tuner: Any, layer: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
    used = _used(layer, kwargs)
    if not all(_complete(each, adapter, own, tuner) for each in used):
        active = ", ".join(sorted(map(repr, set.union(*used)))) or "none"
        warnings.warn(
            f"the base is the residual of adapter {adapter!r} and computes without it (active: {active}): its outputs are "
            f"neither the original model's nor those that another adapter was trained for. Keep {adapter!r} active beside others; "
            f"{INSTEAD}.",
            AdapterWarning,
            stacklevel=2,
        )


def _check_pair(adapter: str, layer: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
    second = SUBTRACTED.format(adapter)
    if not all((adapter in each) == (second in each) for each in _used(layer, kwargs)):
        warnings.warn(
            f"adapters {adapter!r} and {second!r} belong together, and one of them is active alone: call "
            f"PeftModel.set_adapter({adapter!r}), which sets both.",
            AdapterWarning,
            stacklevel=2,
        )


def _unload(tuner: Any, name: str, adapter: str, own: LoraConfig, *args: Any, **kwargs: Any) -> nn.Module:
    """`LoraModel.unload` or `merge_and_unload`, where the base is a residual."""
    layers = [module for module in tuner.model.modules() if isinstance(module, LoraLayer) and adapter in module.lora_A]
    model: nn.Module = getattr(type(tuner), name)(tuner, *args, **kwargs)
    if layers and all(_complete(layer.merged_adapters, adapter, own, tuner) for layer in layers):
        unmark(model)
    else:
        warnings.warn(
            f"{name} returns the residual of adapter {adapter!r}, which is not the original model: merge {adapter!r} too "
            f"(merge_and_unload while it is active); {INSTEAD}.",
            AdapterWarning,
            stacklevel=2,
        )
    return model
