"""`convert_to_lora`: another PEFT method's adapter as a LoRA, cut where the layers' inputs notice it least."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from peft import convert_to_lora as convert_by_peft
from peft.tuners.miss.layer import MissLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from nullspace.artifacts.covariances import Covariances
from nullspace.artifacts.identity import weights_of
from nullspace.errors import InputError
from nullspace.factors import LowRank, truncated
from nullspace.integrations.peft.files import A_WEIGHT, B_WEIGHT, PREFIX
from nullspace.integrations.peft.filtering.moments import Moments, check, loaded, naming
from nullspace.model.linear import is_conv1d, is_linear


@torch.no_grad()
def convert_to_lora(
    model: nn.Module, rank: int | float, adapter_name: str = "default", *, covariances: Moments
) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """PEFT's function of this name, with the best ΔW_r in ‖(ΔW − ΔW_r) X‖_F in the place of that in ‖ΔW − ΔW_r‖_F.

    PEFT checks the model, chooses the ranks and makes the configuration; then `nullspace.factors.truncated` replaces A and B. Of
    MiSS, which is a product of its own rank, PEFT's factors stay.

    Args:
        model: with an adapter of a method that adds a ΔW to linear layers (LoHa, LoKr, VeRA, FourierFT and others), not merged.
        rank: r of the LoRA; or, as a float, the share of ‖ΔW‖²_F that PEFT chooses each layer's rank by.
        adapter_name: of the adapter.
        covariances: second moments of the inputs on which the outputs are to change least, those of the task, from the untouched
            model: an object or its directory.

    Returns:
        PEFT's pair: the configuration, for `save_pretrained`, and the tensors of `adapter_model.safetensors`, whose scaling is 1.

    Raises:
        TypeError, ValueError: PEFT's, for a method or a rank that cannot be converted; naming the layer, if it is not linear, has
            no second moment or that of another model, or if its change holds NaN or Inf.
    """
    moments = loaded(covariances)
    layers: dict[str, Any] = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    for name, layer in layers.items():
        _check(moments, name.removeprefix(PREFIX), layer)
    config, tensors = convert_by_peft(model, rank, adapter_name)
    for name, layer in layers.items():
        keys = name + A_WEIGHT, name + B_WEIGHT
        if keys[0] not in tensors or isinstance(layer, MissLinear):
            continue
        a, b = (tensors[key] for key in keys)
        with naming(name.removeprefix(PREFIX)):
            c = moments[name.removeprefix(PREFIX)].completed(a.shape[1]).matrix()
            cut = truncated(_as_product(layer, adapter_name), c, rank=len(a))
        tensors[keys[0]], tensors[keys[1]] = (factor.to(like).contiguous() for factor, like in zip(cut, (a, b), strict=True))
    return config, tensors


def _check(moments: Covariances, name: str, layer: Any) -> None:
    base = layer.get_base_layer()
    if not is_linear(base):
        raise InputError(f"{name!r} is a {type(base).__name__}: only linear layers have a second moment")
    check(moments, "covariances", name, weights_of({name: base})[name], "the adapter")
    if not all(bool(each.isfinite().all()) for each in layer.parameters() if each.is_floating_point() and each.itemsize > 1):
        raise InputError(f"{name!r} or its adapter holds NaN or Inf")


def _as_product(layer: Any, adapter_name: str) -> LowRank:
    """ΔW of a layer, (d_out, d_in), as a product of as few columns as it can have."""
    delta: torch.Tensor = layer.get_delta_weight(adapter_name).detach().to(torch.float64)
    delta = delta.T if is_conv1d(layer.get_base_layer()) else delta
    d_out, d_in = delta.shape
    one = torch.eye(min(d_out, d_in), dtype=delta.dtype, device=delta.device)
    return LowRank(delta, one) if d_out <= d_in else LowRank(one, delta)
