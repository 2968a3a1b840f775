"""The layers of a base model that get adapters: whether a method can serve them, and their PEFT counterparts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from nullspace.artifacts import identity
from nullspace.artifacts.identity import weights_of
from nullspace.artifacts.locks import temporary_folder
from nullspace.artifacts.residual import RESIDUALS, described, residual_mark
from nullspace.checks import check_one_of
from nullspace.distributed import Job
from nullspace.errors import InputError
from nullspace.integrations.peft.base import source_of
from nullspace.integrations.peft.experts.adapters import ExpertAdapter, expert_adapters
from nullspace.integrations.peft.experts.layout import parameter_name
from nullspace.integrations.peft.shell import on_disk, plan_base, without_weights
from nullspace.methods import METHODS, OTHER, Sources, check_rank
from nullspace.model.experts import ExpertMatrix
from nullspace.model.linear import is_conv1d, is_linear, weight_of, weight_shape
from nullspace.model.quantised import dequantised, is_dequantisable
from nullspace.model.sharded_tensors import is_sharded, shape_of
from nullspace.model.weights import restore_layout, tensor_of

RESIDUAL_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# The name of the second adapter, which subtracts it.
SUBTRACTED = "{}_subtracted"
# Beginnings of PEFT's `init_lora_weights` with which it subtracts s·BA from the base, whose residual is in no file.
PEFT_RESIDUALS = ("pissa", "corda", "olora", "loftq", "lora_ga", "astra")
# Where PEFT's wrappers keep what they wrap.
WRAPPED = ("base_layer", "original_module", "token_adapter")
ONE_AT_A_TIME = "it holds one weight at a time, and the model may be offloaded"


def check_servable(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    method: str,
    *,
    residual: str = "base",
    freeze_a: bool = False,
    freeze_b: bool = False,
    offloaded: bool = False,
) -> str:
    """Where the residual goes. Cheap: call it before a calibration.

    Args:
        model: the whole model, to see what else uses a weight.
        layers: module name → linear base layer.
        method: of `inject_adapters`.
        residual: of `inject_adapters`.
        freeze_a, freeze_b: whether A is frozen, or B.
        offloaded: accept weights that accelerate keeps on the disk: `write_init` reads them, `inject_adapters` cannot change them.

    Returns:
        `"none"` (the method leaves the base alone), `"base"`, `"adapter"`, or `"zero"` (one factor is frozen, and the other one
        starts at zero).

    Raises:
        ValueError: naming the layer, and what to use instead.
    """
    check_one_of("residual", residual, RESIDUALS)
    mark = residual_mark(model)
    if mark is not None:
        raise InputError(
            f"{type(model).__name__} {described(mark)}: start from that, or merge the adapter into the residual first (PEFT's "
            "merge_and_unload)"
        )
    if METHODS[method].reads_weight:
        blind = [name for name, each in METHODS.items() if not each.reads_weight]
        for name, layer in layers.items():
            if not is_readable(layer, offloaded):
                raise InputError(
                    f"the weight of {name!r} ({_described(layer)}) is quantised or offloaded, and its values cannot be read; "
                    f"{_listed(blind)} do not need them"
                )
    if not METHODS[method].changes_base:
        return "none"
    if residual == "adapter":
        return "adapter"
    if residual == "auto" and (freeze_a or freeze_b):
        return "zero"
    obstacle = _obstacle(model, layers, offloaded)
    if obstacle is None:
        if offloaded and on_disk(model) and source_of(model, [*map(parameter_name, layers)]) is None:
            with temporary_folder() as folder:
                plan_base(without_weights(model), folder)
        return "base"
    if residual == "auto":
        return "adapter"
    untouched = [name for name, each in METHODS.items() if not each.changes_base]
    raise InputError(
        f"{obstacle}, so it cannot become the residual of method {method!r}: let a second, frozen adapter take the product away "
        f'(inject_adapters(..., residual="adapter")), leave the layer out of target_modules, or use {_listed(untouched)}, '
        "which leave the base alone"
    )


def zero_factor(residual: str, frozen: str | None) -> str | None:
    """The factor that starts at zero whatever the method's is: the one that trains, where nothing subtracts s·B₀A₀.

    Args:
        residual: as `check_servable` returns it.
        frozen: the factor that does not train, `"A"` or `"B"`, if there is one.
    """
    return None if frozen is None or residual in ("base", "adapter") else OTHER[frozen]


def _obstacle(model: nn.Module, layers: Mapping[str, nn.Module], offloaded: bool) -> str | None:
    """Why a weight cannot be changed; None if all can."""
    users: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name.replace(".base_layer", ""))
    for name, layer in layers.items():
        weight = held_weight(layer)
        at_hand = _has_values(layer) or (offloaded and weight.device.type == "meta")
        if not at_hand or weight.dtype not in RESIDUAL_DTYPES:
            return f"the weight of {name!r} ({_described(layer)}) is quantised or offloaded"
        if len(users.get(id(weight), [])) > 1:
            return f"the weight of {name!r} is tied ({' and '.join(users[id(weight)])} are one tensor)"
    if getattr(model, "hf_quantizer", None) is not None:
        return f"{next(iter(layers), '')!r} is part of a quantised model, which transformers saves with no weights but its own"
    return None


def held_weight(layer: nn.Module) -> torch.Tensor:
    """The tensor that holds a layer's weight: its own or, of an expert's matrix, the parameter of all experts."""
    return layer.stack if isinstance(layer, ExpertMatrix) else weight_of(layer)


def expert_layers(layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The experts' matrices among layers."""
    return {name: layer for name, layer in layers.items() if isinstance(layer, ExpertMatrix)}


def is_readable(layer: nn.Module, offloaded: bool) -> bool:
    """Whether a weight's values can be read: plain ones, quantised ones that `dequantised` serves, and with `offloaded` what
    accelerate keeps."""
    weight = held_weight(layer)
    if _has_values(layer) and weight.dtype in RESIDUAL_DTYPES:
        return True
    return (offloaded and weight.device.type == "meta") or is_dequantisable(layer, weight)


def _has_values(layer: nn.Module) -> bool:
    """Whether a weight's values are in memory, or can be gathered."""
    weight = held_weight(layer)
    if not isinstance(layer, ExpertMatrix) and sorted(shape_of(weight)) != sorted(weight_shape(layer)):  # packed
        return False
    return weight.is_floating_point() if is_sharded(weight) else identity.fingerprint(weight) is not None


def _described(layer: nn.Module) -> str:
    weight = held_weight(layer)
    return f"{type(layer).__name__}, {weight.dtype}, {weight.device}"


def _listed(methods: list[str]) -> str:
    return f"{', '.join(map(repr, methods[:-1]))} and {methods[-1]!r}"


def stored_weight(layer: nn.Module) -> torch.Tensor:
    """The weight as the layer stores it, (d_out, d_in) or the transpose of it (`Conv1D`); a quantised one as it computes.

    It is read from where accelerate keeps it. Collective if it is sharded: it is gathered.
    """
    restore_layout(layer)
    weight = held_weight(layer)
    return dequantised(layer, weight) if is_dequantisable(layer, weight) else tensor_of(layer, "weight")


def computed_weight(name: str, layer: nn.Module) -> torch.Tensor:
    """(d_out, d_in): the weight that a linear layer computes with, dequantised, and read from where accelerate keeps it.

    Raises:
        ValueError: naming the layer, if its values cannot be read.
    """
    if not is_readable(layer, offloaded=True):
        raise InputError(
            f"the weight of {name!r} ({_described(layer)}) is quantised or offloaded, and its values cannot be read: name a base "
            "that is not quantised"
        )
    stored = stored_weight(layer)
    return (stored.mT if is_conv1d(layer) else stored).detach()


def lora_layers(peft_model: PeftModel, adapter_name: str) -> dict[str, LoraLayer | ExpertAdapter]:
    """Name in the base model → LoRA layer; for experts that are one tensor, one for each expert's matrix (`ExpertAdapter`)."""
    base: Any = peft_model.base_model.model
    layers: dict[str, LoraLayer | ExpertAdapter] = {}
    for name, module in base.named_modules():
        if isinstance(module, LoraLayer) and adapter_name in (*module.lora_A, *module.lora_embedding_A):
            experts = expert_adapters(name, module)
            layers |= experts if experts else {name: module}
    return layers


@contextlib.contextmanager
def without_adapters(base: nn.Module) -> Iterator[None]:
    """Context manager: the base's own modules are in the places of what PEFT has wrapped them in. It runs as it did before that."""
    taken = take_out(base)
    try:
        yield
    finally:
        for children, name, wrapper in reversed(taken):
            children[name] = wrapper


def take_out(base: nn.Module) -> list[tuple[dict[str, Any], str, nn.Module]]:
    """Put the base's own modules in the places of PEFT's wrappers. Returns these places, (modules of the parent, name, wrapper)."""
    taken: list[tuple[dict[str, Any], str, nn.Module]] = []
    for parent in list(base.modules()):
        children: dict[str, Any] = parent._modules
        for name, child in list(children.items()):
            inner: Any = child
            while isinstance(inner, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                parts: dict[str, Any] = vars(inner)["_modules"]
                inner = next(parts[key] for key in WRAPPED if parts.get(key) is not None)
            if inner is not child and not isinstance(parent, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                taken.append((children, name, child))
                children[name] = inner
    return taken


def check_layers(bases: Mapping[str, nn.Module], ranks: Mapping[str, int], method: str, given: Sources, job: Job) -> None:
    """Raise `ValueError`, naming the layer, for layers that are not linear, of another model, or smaller than their rank.

    Args:
        bases: name → base layer.
        ranks: name → rank of its adapter.
        method: of `inject_adapters`.
        given: its sources, as far as they are known.
        job: the processes that share the weights.
    """
    job.exchange(None)
    # Where weights are sharded, a collective, and what follows may fail on one rank. Those of all experts are read at once.
    weights = weights_of(bases if job.count > 1 else expert_layers(bases) if list(given.of_model()) else {})
    for name, base in bases.items():
        if not is_linear(base):
            raise InputError(f"target {name!r} is {type(base).__name__}, not a linear layer")
        for known in given.of_model():
            known.check(name, base, weights.get(name))
        check_rank(method, given, name, base, ranks[name])


def frozen_of(layers: Mapping[str, LoraLayer | ExpertAdapter], adapter: str) -> str | None:
    """The factor that `freeze_layers`, or PEFT's MiCA, has frozen in all of these layers, `"A"` or `"B"`; None if both train."""
    names = [layer.frozen_peft_weight_names.get(adapter, ()) for layer in layers.values()]
    return next((factor for factor in OTHER if all(f"lora_{factor}" in each for each in names)), None)


def freeze_layers(layers: Mapping[str, LoraLayer | ExpertAdapter], adapter: str, factors: Iterable[str]) -> None:
    """Freeze A, B or both of an adapter."""
    names = tuple(f"lora_{factor}" for factor in factors)
    for layer in layers.values():
        # PEFT's own record of what set_adapter must not switch on again; a new dictionary, since the default is the class's.
        layer.frozen_peft_weight_names = {**layer.frozen_peft_weight_names, adapter: names}
        for name in names:
            getattr(layer, name)[adapter].requires_grad_(False)


def unfreeze_layers(layers: Mapping[str, LoraLayer | ExpertAdapter], adapter: str) -> None:
    """Undo `freeze_layers`: a factor is trained where the other one is."""
    for layer in layers.values():
        if layer.frozen_peft_weight_names.get(adapter):
            layer.frozen_peft_weight_names = {k: v for k, v in layer.frozen_peft_weight_names.items() if k != adapter}
            factors: list[Any] = [layer.lora_A[adapter], layer.lora_B[adapter]]
            trained = any(factor.weight.requires_grad for factor in factors)
            for factor in factors:
                factor.requires_grad_(trained)
