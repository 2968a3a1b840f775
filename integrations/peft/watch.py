"""Warnings where an adapter and its base are not what they were together, without an error by which one could tell."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Collection
from typing import Any

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from nullspace.artifacts import residual
from nullspace.integrations.peft.layers import SUBTRACTED, lora_layers

INSTEAD = (
    "export_lora makes a plain LoRA for the untouched base; residual='adapter' and methods such as 'b-zero' leave the base as it is"
)


def warn_of_dropout(config: LoraConfig, method: str, place: str, *, stacklevel: int) -> None:
    """`UserWarning` if a model in training mode is another one from the first step on.

    Args:
        config: of the adapter.
        method: of `inject_adapters`.
        place: what `check_servable` said.
        stacklevel: of `warnings.warn`, as seen by the caller of this.
    """
    if config.lora_dropout > 0 and place in ("base", "adapter"):
        warnings.warn(
            f"lora_dropout={config.lora_dropout} with method {method!r}: the adapter starts with a part of the weights, and "
            "dropping its inputs changes what the model computes in training mode from the first step on. Use lora_dropout=0, or "
            "method 'b-zero', whose product starts at zero.",
            UserWarning,
            stacklevel=stacklevel + 1,
        )


def watch(peft_model: PeftModel, adapter: str, place: str) -> None:
    """Warn from now on where the model computes with one part of what belongs together.

    Where the base is a residual, its adapter has to be active or merged, beside others or alone; another adapter that names the
    same base, such as a copy or a checkpoint of it, does as well. Where a second adapter takes the product away, both have to be
    active or none. Copies of the model warn too.

    Args:
        peft_model: with the adapter.
        adapter: its name.
        place: what `check_servable` said.
    """
    layer: Any = next(iter(lora_layers(peft_model, adapter).values()), None)
    if layer is None or place not in ("base", "adapter") or any(_is_ours(hook) for hook in layer._forward_hooks.values()):
        return
    # PEFT sets all layers alike. It has let its own hooks choose adapters by the row when forward hooks are called.
    tuner: Any = peft_model.base_model
    own = tuner.peft_config[adapter]
    check = functools.partial(_check_residual, adapter, own, tuner) if place == "base" else functools.partial(_check_pair, adapter)
    layer.register_forward_hook(check, with_kwargs=True)
    if place == "base":
        for name in ("unload", "merge_and_unload"):
            setattr(tuner, name, functools.partial(_unload, tuner, name, adapter, own))


def _is_ours(hook: Any) -> bool:
    return getattr(hook, "func", None) in (_check_residual, _check_pair)


def _used(layer: Any, kwargs: dict[str, Any]) -> list[set[str]]:
    """The adapters with which a layer has just computed: for every row of the batch, if it says so itself, or for all."""
    names = kwargs.get("adapter_names")
    if names is not None:
        return [{name} for name in names]
    if layer.merged:
        return [set(layer.merged_adapters)]
    return [set() if layer.disable_adapters else set(layer.active_adapters)]


def _complete(used: Collection[str], adapter: str, own: LoraConfig, tuner: Any) -> bool:
    """Whether among these is one that belongs to the residual base."""
    configs = tuner.peft_config
    bases = {configs[name].base_model_name_or_path for name in used if name in configs}
    return adapter in used or own.base_model_name_or_path in bases


def _check_residual(adapter: str, own: LoraConfig, tuner: Any, layer: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
    used = _used(layer, kwargs)
    if not all(_complete(each, adapter, own, tuner) for each in used):
        active = ", ".join(sorted(map(repr, set.union(*used)))) or "none"
        warnings.warn(
            f"the base is the residual of adapter {adapter!r} and computes without it (active: {active}): what comes out is "
            f"neither the original model's nor what another adapter was made for. Keep {adapter!r} active beside others; "
            f"{INSTEAD}.",
            UserWarning,
            stacklevel=2,
        )


def _check_pair(adapter: str, layer: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
    second = SUBTRACTED.format(adapter)
    if not all((adapter in each) == (second in each) for each in _used(layer, kwargs)):
        warnings.warn(
            f"adapters {adapter!r} and {second!r} belong together, and one of them is active alone: call "
            f"PeftModel.set_adapter({adapter!r}), which sets both.",
            UserWarning,
            stacklevel=2,
        )


def _unload(tuner: Any, name: str, adapter: str, own: LoraConfig, *args: Any, **kwargs: Any) -> nn.Module:
    """`LoraModel.unload` or `merge_and_unload`, where the base is a residual."""
    layers = [module for module in tuner.model.modules() if isinstance(module, LoraLayer) and adapter in module.lora_A]
    model: nn.Module = getattr(type(tuner), name)(tuner, *args, **kwargs)
    if layers and all(_complete(layer.merged_adapters, adapter, own, tuner) for layer in layers):
        residual.unmark(model)
    else:
        warnings.warn(
            f"{name} returns the residual of adapter {adapter!r}, which is not the original model: merge {adapter!r} too "
            f"(merge_and_unload while it is active); {INSTEAD}.",
            UserWarning,
            stacklevel=2,
        )
    return model
