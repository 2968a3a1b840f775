"""Which linear layers a `LoraConfig` means, and a configuration for which PEFT wraps exactly these."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
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
from nullspace.integrations.peft.experts.layout import layers_by_parameter, parameter_name, pattern_name
from nullspace.integrations.peft.fit import fit_config
from nullspace.methods import Sources
from nullspace.model.experts import ExpertMatrix, expert_of, named_layers
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
    config = checked_config(config, model)
    sources = list(given.of_model())
    layers = wanted_layers(config, model, sources)
    if not sources and not names_layers(config):
        _leave_out_odd(layers)
    exact = exact_config(config, model, layers, warn=job.first)
    if layers.left_out or not (sources or names_layers(config)):
        layers.settle(model, warn=job.first, stacklevel=4)
    return exact


def checked_config(config: LoraConfig, model: nn.Module) -> LoraConfig:
    """A copy of a configuration, checked without a look at its targets, that starts adapters as plain LoRA. Errors as above."""
    if not isinstance(config, LoraConfig):
        raise InputTypeError(f"config must be a LoraConfig, not {type(config).__name__}")
    if isinstance(model, PeftModel):
        raise InputTypeError("the model already is a PeftModel: merge its adapters first, or start from the base model again")
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise InputTypeError("the model already has adapters: merge them first, or start from the base model again")
    check_fields(config)
    config = copy.deepcopy(config)
    config.init_lora_weights = True
    return config


def check_fields(config: LoraConfig) -> None:
    """Raise `TypeError` or `ValueError`, naming the field, for fields that are not supported, and ranks and alphas as below."""
    for name in ("layer_replication", "use_qalora", "megatron_config"):
        if getattr(config, name, None):
            raise InputError(f"LoraConfig.{name} is not supported: factors belong to whole linear layers")
    check_scaling(config)


def names_layers(config: LoraConfig) -> bool:
    """Whether a configuration names its layers, so that one that cannot get an adapter is an error and not left out."""
    return not _is_all_linear(config) and (config.target_modules is not None or bool(config.target_parameters))


def wanted_layers(config: LoraConfig, model: nn.Module, sources: Sequence[Sitewise[Any]]) -> Targets:
    """The layers that a configuration means. Where it names none: those of all sources or, without sources, every linear layer."""
    if names_layers(config):
        return chosen_layers(model, config)
    if config.target_modules is None and sources:
        return _without_excluded(_known_layers(model, sources[0]), config)
    layers = chosen_layers(model, config if _is_all_linear(config) else replace(config, target_modules="all-linear"))
    for name in [name for name in layers if not all(name in each for each in sources)]:
        layers.leave_out(name, "is not among the layers of the spaces or covariances")
    return layers


def exact_config(config: LoraConfig, model: nn.Module, layers: Targets, *, warn: bool) -> LoraConfig:
    """A copy of a configuration for which PEFT wraps exactly these layers.

    Args:
        config: of `checked_config`.
        model: the base model.
        layers: of `wanted_layers`. Those of `"all-linear"` that PEFT cannot adapt are left out.
        warn: whether to warn of targets that PEFT would read otherwise.

    Raises:
        ValueError: as `own_config`.
    """
    layers.refuse_empty()
    config, named = copy.deepcopy(config), names_layers(config)
    if not named:
        config.target_modules, config.target_parameters = list(layers), None
    elif not isinstance(config.target_modules, str):
        _move_experts(config)
    fitted = fit_config(config, model, layers)
    if named and fitted.target_modules != config.target_modules:
        _check_named(config, model, layers, warn=warn)
    return fitted


def _move_experts(config: LoraConfig) -> None:
    """Name experts that `target_modules` lists by their parameters in `target_parameters`."""
    experts = [name for name in config.target_modules or () if expert_of(name)]
    if experts:
        parameters = dict.fromkeys((*(config.target_parameters or ()), *map(parameter_name, experts)))
        config.target_modules = [name for name in config.target_modules or () if name not in experts]
        config.target_parameters = list(parameters)


def _is_all_linear(config: LoraConfig) -> bool:
    return isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"


def _known_layers(model: nn.Module, known: Sitewise[Any]) -> Targets:
    """The layers of null spaces or covariances."""
    modules = named_layers(model)
    strange = next((name for name in known if name not in modules or not is_linear(modules[name])), None)
    if strange is not None:
        raise OtherModelError(f"{strange!r} is no linear layer of {type(model).__name__}: the {known.WHAT}s are of another model")
    return Targets({name: module for name, module in modules.items() if name in known}, optional=True)


def _leave_out_odd(layers: Targets) -> None:
    """Leave out layers whose own `forward` does not return W x + b, for methods without a calibration, which would check that."""
    for name, layer in list(layers.items()):
        if isinstance(layer, ExpertMatrix):
            continue
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
                f"target_modules: {nothing!r} matches no linear layer of {type(model).__name__}; experts that are one tensor are "
                "named in target_parameters"
            )
        if entries == {name for name in layers if not expert_of(name)}:
            return
    if warn:
        warnings.warn(
            f"PEFT takes target_modules={config.target_modules!r} of {type(model).__name__} for parameters of its experts too: "
            "only the linear layers of these names get adapters. Name experts in target_parameters.",
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
    """The linear layers and experts' matrices that a configuration means: name → layer, in the model's order.

    `"all-linear"` is that of `find_targets`, for `config.r`, without `exclude_modules`; with `target_parameters` it has no other
    experts than those. A list may also name experts' matrices in full.

    Raises:
        ValueError: if there are none, or something is named that is neither.
    """
    own: Any = copy.deepcopy(config)
    modules = named_layers(model)
    named = _of_parameters(model, modules, config)
    if own.target_modules is None and not named:
        own.target_modules = LoraModel.target_module_mapping.get(getattr(getattr(model, "config", None), "model_type", ""))
        if own.target_modules is None:
            raise InputError("the configuration names no target_modules, and PEFT knows none for this kind of model")
    if _is_all_linear(own):
        every = find_targets(model, rank=own.r)
        if named:
            every = every.only(name for name, layer in every.items() if not isinstance(layer, ExpertMatrix) or name in named)
        return _without_excluded(every, own)
    if not isinstance(own.target_modules, str):
        named |= {name: modules[name] for name in own.target_modules or () if isinstance(modules.get(name), ExpertMatrix)}
        own.target_modules = [name for name in own.target_modules or () if not expert_of(name)]
    with unwrapped(model):
        matched = {name: module for name, module in model.named_modules() if name and _is_match(own, name)}
    linear = {name: module for name, module in matched.items() if is_linear(module)}
    if not linear and not named:
        raise InputError(f"target_modules={config.target_modules!r} matches no linear layer of {type(model).__name__}")
    other = next((n for n, m in matched.items() if n not in linear and _has_matrix(m) and not _is_inside(n, linear)), None)
    if other is not None:
        raise InputError(f"target {other!r} is {type(matched[other]).__name__}, not a linear layer")
    chosen = linear | named
    return Targets({name: layer for name, layer in modules.items() if name in chosen})


def _is_match(config: Any, name: str) -> bool:
    return bool(config.target_modules) and bool(check_target_module_exists(config, name))


def _of_parameters(model: nn.Module, modules: Mapping[str, nn.Module], config: LoraConfig) -> dict[str, nn.Module]:
    """The layers whose weights `target_parameters` names, as PEFT matches it.

    Raises:
        ValueError: if an entry matches nothing, or the parameter of something else.
    """
    holders = {parameter_name(name): name for name, layer in reversed([*modules.items()]) if is_linear(layer)}
    stacks = layers_by_parameter(name for name, layer in modules.items() if isinstance(layer, ExpertMatrix))
    chosen: dict[str, nn.Module] = {}
    with unwrapped(model):
        parameters = [name for name, _ in model.named_parameters()]
    for target in config.target_parameters or ():
        matched = [name for name in parameters if name == target or name.endswith(f".{target}")]
        if not matched:
            raise InputError(f"target_parameters: {target!r} matches no parameter of {type(model).__name__}")
        for name in matched:
            if name not in holders:
                raise InputError(f"target_parameters: {name!r} is no weight of a linear layer or of experts")
            chosen |= {layer: modules[layer] for layer in stacks.get(name, [holders[name]])}
    return chosen


def _without_excluded(layers: Targets, config: LoraConfig) -> Targets:
    """Targets of `"all-linear"` without those that `exclude_modules` takes away; of experts it may name module and parameter."""
    if not config.exclude_modules:
        return layers
    own: Any = copy.deepcopy(config)

    def is_kept(name: str) -> bool:
        expert = expert_of(name)
        own.target_modules = [name] if expert is None else [expert.experts, expert.stack]
        return all(check_target_module_exists(own, each) for each in own.target_modules)

    kept = {name: layer for name, layer in layers.items() if is_kept(name)}
    excluded = [name for name in layers if name not in kept]
    return Targets(kept, optional=True, excluded=excluded, left_out=layers.left_out)


def _has_matrix(module: nn.Module) -> bool:
    return any(len(shape_of(parameter)) > 1 for parameter in module.parameters(recurse=False))


def _is_inside(name: str, layers: Mapping[str, nn.Module]) -> bool:
    return any(name.startswith(f"{layer}.") for layer in layers)


def rank_of(name: str, config: LoraConfig) -> int:
    """Of a layer's adapter: `rank_pattern`, or r."""
    patterns: Any = config.rank_pattern or {}
    return check_integer(f"the rank of {name!r}", patterns.get(get_pattern_key(patterns.keys(), pattern_name(name)), config.r))
