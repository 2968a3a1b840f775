"""Which linear layers a `LoraConfig` means, and a configuration for which PEFT wraps exactly these."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn

from nullspace.artifacts.sitewise import Sitewise
from nullspace.checks import check_integer, check_real
from nullspace.distributed import Job
from nullspace.errors import AdapterWarning, InputError, InputTypeError, OtherModelError
from nullspace.integrations.peft.fit import fit_config
from nullspace.methods import Sources
from nullspace.model.linear import is_conv1d, is_linear, unlike_linear, weight_of, weight_shape
from nullspace.model.sharded_tensors import is_sharded, shape_of
from nullspace.model.sites import Targets, find_targets
from nullspace.model.wrappers import unwrapped


def own_config(config: LoraConfig, model: nn.Module, given: Sources, job: Job) -> LoraConfig:
    """A checked copy of a configuration for which PEFT wraps exactly the targets, and starts them as plain LoRA.

    Raises:
        TypeError, ValueError: for what is no `LoraConfig`, a model with adapters, fields that are not supported, and targets that
            match nothing.

    Warns:
        UserWarning: naming the layers that `"all-linear"` leaves out, and targets that PEFT would read otherwise.
    """
    if not isinstance(config, LoraConfig):
        raise InputTypeError(f"config must be a LoraConfig, not {type(config).__name__}")
    if isinstance(model, PeftModel):
        raise InputTypeError("the model already is a PeftModel: merge its adapters first, or start from the base model again")
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise InputTypeError("the model already has adapters: merge them first, or start from the base model again")
    for name in ("target_parameters", "layer_replication", "use_qalora", "megatron_config"):
        if getattr(config, name, None):
            raise InputError(f"LoraConfig.{name} is not supported: factors belong to whole linear layers")
    check_scaling(config)
    config = copy.deepcopy(config)
    config.init_lora_weights = True
    sources = list(given.of_model())
    named = config.target_modules is not None and not _is_all_linear(config)
    if named:
        layers = chosen_layers(model, config)
    elif config.target_modules is None and sources:
        layers = _known_layers(model, sources[0])
    else:
        layers = chosen_layers(model, config if _is_all_linear(config) else replace(config, target_modules="all-linear"))
        for name in [name for name in layers if not all(name in each for each in sources)]:
            layers.leave_out(name, "is not among the layers of the spaces or covariances")
        if not sources:
            _leave_out_odd(layers)
    layers.refuse_empty()
    if not named:
        config.target_modules = list(layers)
    fitted = fit_config(config, model, layers)
    if layers.left_out or not (named or sources):
        layers.settle(model, warn=job.first, stacklevel=5)
    if named and fitted.target_modules != config.target_modules:
        _check_named(config, model, layers, warn=job.first)
    return fitted


def _is_all_linear(config: LoraConfig) -> bool:
    return isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"


def _known_layers(model: nn.Module, known: Sitewise[Any]) -> Targets:
    """The layers of null spaces or covariances."""
    modules = dict(model.named_modules(remove_duplicate=False))
    strange = next((name for name in known if name not in modules or not is_linear(modules[name])), None)
    if strange is not None:
        raise OtherModelError(f"{strange!r} is no linear layer of {type(model).__name__}: the {known.WHAT}s are of another model")
    return Targets({name: module for name, module in modules.items() if name in known}, optional=True)


def _leave_out_odd(layers: Targets) -> None:
    """Leave out layers whose own `forward` does not return W x + b, for methods without a calibration, which would check that."""
    for name, layer in list(layers.items()):
        weight = weight_of(layer)
        plain = type(layer).forward is nn.Linear.forward or is_conv1d(layer)
        if plain or is_sharded(weight) or not weight.is_floating_point() or weight.device.type == "meta":
            continue
        d_in = weight_shape(layer)[1]
        x = torch.linspace(-1, 1, 3 * d_in, device=weight.device).reshape(1, 3, d_in).to(weight.dtype)
        try:
            with torch.no_grad():
                why = unlike_linear(layer, x, layer(x))
        except Exception as error:  # of any type, from a forward that expects another shape
            why = f"({type(layer).__name__}) does not take inputs (batch, tokens, d_in): {error}"
        if why is not None:
            layers.leave_out(name, why)


def _check_named(config: LoraConfig, model: nn.Module, layers: Targets, *, warn: bool) -> None:
    """Warn if PEFT reads the user's targets otherwise than we do, unless they name layers in full."""
    if not isinstance(config.target_modules, str):
        entries = set(config.target_modules or ())
        nothing = next((e for e in sorted(entries) if not any(n == e or n.endswith(f".{e}") for n in layers)), None)
        if nothing is not None:
            raise InputError(
                f"target_modules: {nothing!r} matches no linear layer of {type(model).__name__}, and the parameters of its experts "
                "are not supported"
            )
        if entries == set(layers):
            return
    if warn:
        warnings.warn(
            f"PEFT takes target_modules={config.target_modules!r} of {type(model).__name__} for parameters of its experts too, "
            f"which are not supported: only the {len(layers)} linear layers of these names get adapters.",
            AdapterWarning,
            stacklevel=5,
        )


def check_scaling(config: LoraConfig) -> None:
    """Raise `TypeError` or `ValueError`, naming the field, for ranks and alphas that give no finite, positive scaling."""
    patterns: Mapping[str, Mapping[str, Any]] = {name: getattr(config, name) or {} for name in ("rank_pattern", "alpha_pattern")}
    for where, rank in {"r": config.r, **_entries("rank_pattern", patterns)}.items():
        check_integer(f"LoraConfig.{where}", rank)
    for where, alpha in {"lora_alpha": config.lora_alpha, **_entries("alpha_pattern", patterns)}.items():
        check_real(f"LoraConfig.{where}", alpha)


def _entries(name: str, patterns: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{name}[{key!r}]": value for key, value in patterns[name].items()}


def chosen_layers(model: nn.Module, config: LoraConfig) -> Targets:
    """The linear layers that a configuration means: name → layer, in the model's order.

    `"all-linear"` is that of `find_targets`, for `config.r`, without `exclude_modules`.

    Raises:
        ValueError: if there are none, or something is named that is not a linear layer.
    """
    own: Any = copy.deepcopy(config)
    if own.target_modules is None:
        own.target_modules = LoraModel.target_module_mapping.get(getattr(getattr(model, "config", None), "model_type", ""))
    if own.target_modules is None:
        raise InputError("the configuration names no target_modules, and PEFT knows none for this kind of model")
    if _is_all_linear(own):
        every = find_targets(model, rank=own.r)
        own.target_modules = list(every)
        kept = {name: module for name, module in every.items() if check_target_module_exists(own, name)}
        excluded = [name for name in every if name not in kept]
        return Targets(kept, optional=True, excluded=excluded, left_out=every.left_out)
    with unwrapped(model):
        matched = {name: module for name, module in model.named_modules() if name and check_target_module_exists(own, name)}
    linear = {name: module for name, module in matched.items() if is_linear(module)}
    if not linear:
        raise InputError(f"target_modules={config.target_modules!r} matches no linear layer of {type(model).__name__}")
    other = next((n for n, m in matched.items() if n not in linear and _has_matrix(m) and not _is_inside(n, linear)), None)
    if other is not None:
        raise InputError(f"target {other!r} is {type(matched[other]).__name__}, not a linear layer")
    return Targets(linear)


def _has_matrix(module: nn.Module) -> bool:
    return any(len(shape_of(parameter)) > 1 for parameter in module.parameters(recurse=False))


def _is_inside(name: str, layers: Mapping[str, nn.Module]) -> bool:
    return any(name.startswith(f"{layer}.") for layer in layers)


def rank_of(name: str, config: LoraConfig) -> int:
    """Of a layer's adapter: `rank_pattern`, or r."""
    patterns: Any = config.rank_pattern or {}
    return check_integer(f"the rank of {name!r}", patterns.get(get_pattern_key(patterns.keys(), name), config.r))
