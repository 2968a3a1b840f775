"""Which layers PEFT wraps, tried on a copy of the model without weights, and configurations that name exactly some layers."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.utils.other import get_pattern_key
from torch import nn

from nullspace.errors import InputError
from nullspace.integrations.peft.experts.adapters import stack_of
from nullspace.integrations.peft.experts.checks import check_experts
from nullspace.integrations.peft.experts.layout import parameter_name, pattern_name
from nullspace.integrations.peft.shell import without_weights
from nullspace.model.experts import expert_of
from nullspace.model.linear import is_linear, weight_of, weight_shape
from nullspace.model.quantised import is_compressed
from nullspace.model.sites import Targets
from nullspace.model.wrappers import unwrapped


def fit_config(config: LoraConfig, model: nn.Module, layers: Targets) -> LoraConfig:
    """A configuration with which PEFT gives adapters to exactly these layers. It needs no weights: call it before a calibration.

    PEFT reads some names otherwise: in mixture models whose experts transformers has fused (DeepSeek-V3, GLM-4-MoE,
    Qwen3-MoE, …) the `gate_proj`, `up_proj` and `down_proj` of a dense layer or a shared expert become parameters of the routed
    experts, whether a list names them in full or an expression matches them. Such layers go into `target_parameters`, by the name
    of their weight: PEFT then wraps the same layer, and saves A and B under the same names. All others stay in the list.

    Experts that are one tensor are named in `target_parameters` too, by that tensor.

    Args:
        config: not changed.
        model: the base model; its weights are neither read nor copied.
        layers: that are to get an adapter. Those of `"all-linear"` that PEFT cannot adapt (Mamba's `out_proj`), or whose saved
            factors it would not read again, are left out.

    Returns:
        A copy; with the targets as given, if PEFT wraps exactly these layers for them.

    Raises:
        ValueError: naming the layer, if PEFT cannot adapt one that was asked for, and why; naming the option, if PEFT has none of
            it for experts, and the parameter, if only some of its experts are wanted.
    """
    check_experts(config, layers)
    compressed = next((name for name, layer in layers.items() if is_compressed(layer)), None)
    if compressed is not None:
        raise InputError(
            f"{compressed!r} is compressed until the model's first forward pass, and has no weight that PEFT could adapt: run the "
            "model once, or load it with CompressedTensorsConfig(dequantize=True)"
        )
    fitted, adapted = _fitted(config, model, layers)
    lost = _not_read_again(adapted, model)
    if lost:
        for name in [name for name in layers if pattern_name(name) in lost]:
            layers.leave_out(
                name, "gets no adapter: PEFT saves its factors, and takes them for those of another layer when it loads them"
            )
        layers.refuse_empty()
        fitted, _ = _fitted(config, model, layers)
    return fitted


def _fitted(config: LoraConfig, model: nn.Module, layers: Targets) -> tuple[LoraConfig, Any]:
    """A configuration with which PEFT wraps exactly these layers, and what PEFT makes of it, without weights."""
    listed = _exact(config, layers, ())
    matched = copy.copy(listed)  # a name in full may be the ending of another one
    matched.target_modules = "|".join(map(re.escape, listed.target_modules or ()))
    for as_it_is in (config, listed, matched) if listed.target_modules else (config, listed):
        problem, adapted = _tried(as_it_is, model, layers)
        if not problem:
            return copy.deepcopy(as_it_is), adapted
    names: list[str] = []
    by_weight: list[str] = []
    for group in _alike(layers):
        problem = _difference(_exact(config, group, ()), model, group)
        if not problem:
            names += group
        elif not expert_of(group[0]) and not _difference(_exact(config, (), group), model, group):
            by_weight += group
        else:
            for name in group:
                layers.leave_out(name, f"gets no adapter from PEFT: {problem}")
    layers.refuse_empty()
    exact = _exact(config, names, by_weight)
    problem, adapted = _tried(exact, model, layers)
    if problem:
        raise InputError(f"PEFT does not give adapters to exactly the layers that are wanted: {problem}")
    return exact, adapted


def refuse_other_layers(config: LoraConfig, model: nn.Module, layers: Targets) -> None:
    """Raise `ValueError` if `get_peft_model` would not give adapters to exactly these layers: where the caller calls it."""
    own = copy.deepcopy(config)
    own.init_lora_weights = True
    if layers.optional:
        own.target_modules = list(layers)
    problem = _difference(own, model, layers)
    if problem:
        raise InputError(
            f"get_peft_model would not adapt the layers that target_modules={config.target_modules!r} names: {problem}. Name other "
            "layers, or use inject_adapters, which names them so that PEFT takes them"
        )


def _difference(config: LoraConfig, model: nn.Module, wanted: Iterable[str]) -> str:
    """How the layers that PEFT wraps differ from these; empty if they do not."""
    return _tried(config, model, wanted)[0]


def _tried(config: LoraConfig, model: nn.Module, wanted: Iterable[str]) -> tuple[str, Any]:
    """`_difference`, and what PEFT makes of the configuration, without weights; None if it refuses."""
    try:
        adapted = _adapted(config, model)
    except ValueError as error:
        return str(error).rstrip("."), None
    wrapped = {}
    for name, module in adapted.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            expert = stack_of(name, module)
            wrapped[name if expert is None else expert.stack] = _is_whole(module, expert is not None)
    named = {pattern_name(name) for name in wanted}
    missing = sorted(name for name in named if not wrapped.get(name))
    extra = sorted(wrapped.keys() - named)
    parts = [f"it leaves out {missing[0]!r}"] if missing else []
    parts += [f"it takes {extra[0]!r}"] if extra else []
    return " and ".join(parts), adapted


def _adapted(config: LoraConfig, model: nn.Module) -> Any:
    """What PEFT makes of a configuration, without weights."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), unwrapped(model):
        warnings.simplefilter("ignore")
        return get_peft_model(without_weights(model), copy.deepcopy(config), low_cpu_mem_usage=True)


def _not_read_again(adapted: Any, model: nn.Module) -> set[str]:
    """Layers, and parameters of experts, whose factors PEFT saves under names that it takes for others when it loads them.

    It renames what it loads as transformers renames the weights of the model's checkpoint, whether they need it or not.

    Args:
        adapted: what PEFT makes of a configuration, without weights; changed.
        model: the base model.
    """
    vars(adapted.get_base_model()).pop("_tp_size", None)  # of a model in parts, whose adapters PEFT would gather
    with warnings.catch_warnings(), unwrapped(model):
        warnings.simplefilter("ignore")
        state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        result: Any = set_peft_model_state_dict(adapted, state, low_cpu_mem_usage=True)
    paths = {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in result.missing_keys if ".lora_" in key}
    modules = dict(adapted.get_base_model().named_modules())
    layers = {path: modules.get(path) for path in paths}  # the base may have modules whose names look like PEFT's
    experts = {path: stack_of(path, layer) for path, layer in layers.items() if isinstance(layer, LoraLayer)}
    return {path if expert is None else expert.stack for path, expert in experts.items()}


def _is_whole(layer: Any, of_experts: bool) -> bool:
    """Whether an adapter is one of a whole linear layer, or of all experts of a parameter, as the base computes it."""
    if of_experts:
        return bool(layer.get_param().is_floating_point())
    base = layer.get_base_layer()
    if not is_linear(base) or (layer.out_features, layer.in_features) != weight_shape(base):
        return False
    return not isinstance(layer, ParamWrapper) or weight_of(base).is_floating_point()


def _exact(config: LoraConfig, layers: Iterable[str], by_weight: Sequence[str]) -> LoraConfig:
    """The same for layers that are named in full, some of them by their weight, and experts by the parameter that holds them."""
    exact = copy.deepcopy(config)
    experts = dict.fromkeys(parameter_name(name) for name in layers if expert_of(name))
    exact.target_modules = [name for name in layers if not expert_of(name)]
    exact.target_parameters = [*(f"{name}.weight" for name in by_weight), *experts] or None
    exact.exclude_modules = exact.layers_to_transform = exact.layers_pattern = None
    for pattern in ("rank_pattern", "alpha_pattern"):
        given = getattr(config, pattern) or {}
        keys = {name: get_pattern_key(list(given), name) for name in by_weight}
        # Weights first, as of the entries that match PEFT takes the first.
        setattr(exact, pattern, {**{f"{name}.weight": given[key] for name, key in keys.items() if key in given}, **given})
    return exact


def _alike(layers: Mapping[str, nn.Module]) -> list[list[str]]:
    """Names of layers of one class with the same last part, which PEFT treats alike."""
    groups: dict[tuple[str, bool, type], list[str]] = {}
    for name, layer in layers.items():
        groups.setdefault((pattern_name(name).rpartition(".")[2], expert_of(name) is not None, type(layer)), []).append(name)
    return list(groups.values())
