"""What `inject_adapters` and `write_init` share: which layers a base offers, whether they can be served, what they start with."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from nullspace import factors, store
from nullspace.integrations.peft.shell import on_disk, plan_base, without_weights
from nullspace.sites import is_linear, weight_of
from nullspace.spaces import NullSpace, NullSpaces

METHODS = ("lora-null", "b-zero")
RESIDUAL_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_method(method: str, sigma_scale: float = 1.0) -> None:
    """Raise `ValueError` for a method that does not exist or a scale that it does not take."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, not {method!r}")
    if not 0.0 < sigma_scale < math.inf:
        raise ValueError(f"sigma_scale must be a positive number, not {sigma_scale}")
    if method == "b-zero" and sigma_scale != 1.0:
        raise ValueError("sigma_scale belongs to method 'lora-null'; 'b-zero' has no singular values to scale")


def check_servable(model: nn.Module, layers: Mapping[str, nn.Module], method: str, *, offloaded: bool = False) -> None:
    """Raise `ValueError`, naming the layer and the method that would do, if a base cannot be served. Cheap: ask it first.

    Args:
        model: the whole model, to see what else uses a weight.
        layers: module name → linear base layer.
        method: of `inject_adapters`.
        offloaded: weights that accelerate keeps on the disk will do: `write_init` reads them, `inject_adapters` cannot change them.
    """
    if method == "b-zero":
        return
    if offloaded and on_disk(model):
        with tempfile.TemporaryDirectory() as folder:
            plan_base(without_weights(model), Path(folder))
    users: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name.replace(".base_layer", ""))
    for name, layer in layers.items():
        weight = weight_of(layer)
        at_hand = store.fingerprint(weight) is not None or (offloaded and weight.device.type == "meta")
        if not at_hand or weight.dtype not in RESIDUAL_DTYPES:
            raise ValueError(
                f"the weight of {name!r} ({type(layer).__name__}, {weight.dtype}, {weight.device}) is quantised, sharded or "
                f"offloaded and cannot take the residual of method {method!r}; method 'b-zero' leaves the base alone"
            )
        if len(users.get(id(weight), [])) > 1:
            raise ValueError(
                f"the weight of {name!r} is tied ({' and '.join(users[id(weight)])} are one tensor), so it cannot become a "
                "residual; leave the layer out of target_modules, or use method 'b-zero', which leaves the base alone"
            )


def own_config(config: LoraConfig, model: nn.Module, spaces: NullSpaces) -> LoraConfig:
    """A checked copy of a configuration, with our own choices in it."""
    if not isinstance(config, LoraConfig):
        raise TypeError(f"config must be a LoraConfig, not {type(config).__name__}")
    if isinstance(model, PeftModel):
        raise TypeError("the model already is a PeftModel: merge or unload its adapters first")
    for name in ("target_parameters", "layer_replication", "use_qalora", "megatron_config"):
        if getattr(config, name, None):
            raise ValueError(f"LoraConfig.{name} is not supported: null spaces belong to whole linear layers")
    config = copy.deepcopy(config)
    config.init_lora_weights = True
    if config.target_modules is None:
        config.target_modules = list(spaces)
    return config


def lora_layers(peft_model: PeftModel, adapter_name: str) -> dict[str, LoraLayer]:
    """Name in the base model → LoRA layer."""
    base: Any = peft_model.base_model.model
    return {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, LoraLayer) and adapter_name in (*module.lora_A, *module.lora_embedding_A)
    }


def check_layer(name: str, layer: Any, base: nn.Module, adapter_name: str, spaces: NullSpaces) -> None:
    if not is_linear(base) or adapter_name not in layer.lora_A:
        raise ValueError(f"target {name!r} is {type(base).__name__}, not a linear layer")
    spaces.check(name, base)
    rank, columns = layer.r[adapter_name], spaces[name].rank
    limit = min(columns, layer.out_features)
    if rank > limit:
        raise ValueError(
            f"the adapter of {name!r} has rank {rank}, but its null space has {columns} directions and its weight "
            f"{layer.out_features} rows: use r ≤ {limit}, or compute the spaces with a larger rank"
        )


@torch.no_grad()
def start_of(
    layer: Any, stored: torch.Tensor, adapter: str, space: NullSpace, method: str, sigma_scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """What an adapter starts with, and what is left of the weight.

    Args:
        layer: PEFT's; asked for rank, scaling, layout and dtypes, never for values.
        stored: the weight as the base layer stores it, (d_out, d_in) or the transpose of it (`layer.fan_in_fan_out`).

    Returns:
        A (r, d_in) and B (d_out, r) in the adapter's dtypes, and the residual in the layout and dtype of `stored`, or None where
        the base stays as it is.
    """
    rank, scaling = layer.r[adapter], layer.scaling[adapter]
    dtype_a, dtype_b = (each[adapter].weight.dtype for each in (layer.lora_A, layer.lora_B))
    if method == "b-zero":
        a, b = factors.b_zero(space.basis, layer.out_features, rank=rank)
        return a.to(dtype_a), b.to(dtype_b), None
    weight = (stored.T if layer.fan_in_fan_out else stored).to(torch.float64, copy=True)
    a, b = factors.lora_null(weight, space.basis, rank=rank, sigma_scale=sigma_scale)
    # s·BA is the product that counts, so each factor takes 1/√s; the residual is that of the factors as they are stored.
    a, b = (a / math.sqrt(scaling)).to(dtype_a), (b / math.sqrt(scaling)).to(dtype_b)
    residual = weight.addmm_(b.to(weight), a.to(weight), alpha=-scaling).to(stored.dtype)
    return a, b, residual.T if layer.fan_in_fan_out else residual


def freeze_layers(layers: Mapping[str, LoraLayer], adapter: str) -> None:
    for layer in layers.values():
        # PEFT's own record of what set_adapter must not switch on again; a new dictionary, since the default is the class's.
        layer.frozen_peft_weight_names = {**layer.frozen_peft_weight_names, adapter: ("lora_A",)}
        layer.lora_A[adapter].requires_grad_(False)
